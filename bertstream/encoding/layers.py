"""Which layers a forward keeps, and where it stops.

Layers are counted as transformers counts `hidden_states`: 0 is what the embedding layer gives, L what the last layer
gives. Layer k < L is taken as the input of entry k of the model's list of layers, not as the output of entry k - 1:
some models (deberta-v2) work on it in between.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..errors import ConfigError


def resolve_layers(layers: int | Sequence[int], count: int) -> tuple[int, ...]:
    """Layers counted from 0, of a model with `count` of them behind its embedding layer; -1 is the last.

    Raises:
        ConfigError: none is named, one is out of range, or one is named twice.
    """
    named = (layers,) if isinstance(layers, int) else tuple(layers)
    resolved = tuple(layer + count + 1 if layer < 0 else layer for layer in named if isinstance(layer, int))
    in_range = all(0 <= layer <= count for layer in resolved) and len(resolved) == len(named)
    if not resolved or not in_range or len(set(resolved)) < len(resolved):
        raise ConfigError(
            f"layers={layers!r}: the model has the layers 0 (embeddings) to {count}, or {-count - 1} to -1 (the "
            "last); name one or several, none twice"
        )
    return resolved


def stop_behind(model: nn.Module, layer: int) -> None:
    """Cut a model off behind a layer, so that its forward ends there; what stands above is let go.

    Args:
        model: an encoder of the caller's own, structure and config.
        layer: counted from 0, below the number of layers.
    """
    config: Any = model.config
    owner, name, layers = _layer_list(model)
    end = _Through(_gives_tuple(model, layers[0]), layers[layer])
    setattr(owner, name, nn.ModuleList([*layers[:layer], end]))
    config.num_hidden_layers = layer + 1  # some loops count by the config, not by the list
    if hasattr(config, "num_hidden_groups"):
        config.num_hidden_groups = layer + 1
    _let_go(model, layer)


def begin_at(model: nn.Module, layer: int, keep_pooler: bool) -> None:
    """Make a model's forward begin at a layer, with what `begun_with` hands in; what stands below is let go.

    Args:
        model: an encoder of the caller's own, structure and config, each layer with its entry (see `unroll`).
        layer: counted from 0, above 0 and below the number of layers.
        keep_pooler: whether the model's pooler is used.
    """
    layers = layer_list(model)
    gives_tuple = _gives_tuple(model, layers[0])
    for below in range(layer):
        layers[below] = _Through(gives_tuple, layers[below])
    layers[layer] = _Begin(layers[layer])
    weight = next(layers[layer].parameters())
    with begun_with(model, torch.zeros(1, 4, cast(Any, model.config).hidden_size).to(weight)):
        _let_go(model, None, keep=[model.pooler] if keep_pooler else [])


@contextmanager
def begun_with(model: nn.Module, hidden_states: Tensor) -> Iterator[None]:
    """Inside this context a forward of a model that begins at a layer gives that layer these hidden states."""
    (begin,) = (layer for layer in layer_list(model) if isinstance(layer, _Begin))
    begin.hidden_states = hidden_states
    try:
        yield
    finally:
        begin.hidden_states = None


@contextmanager
def kept_inputs(model: nn.Module, layers: Sequence[int]) -> Iterator[dict[int, Tensor]]:
    """Inside this context a forward leaves the input of these entries of the model's list of layers in the dict."""
    kept: dict[int, Tensor] = {}
    entries: Sequence[nn.Module] = list(_layer_list(model)[2]) if layers else []

    def keep(layer: int) -> Any:
        def hook(module: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
            kept[layer] = arguments[0] if arguments else named["hidden_states"]

        return hook

    hooks = [entries[layer].register_forward_pre_hook(keep(layer), with_kwargs=True) for layer in layers]
    try:
        yield kept
    finally:
        for hook in hooks:
            hook.remove()


class _Through(nn.Module):
    """Stands for a layer: hands its input on, in the form that the loop around it expects."""

    def __init__(self, gives_tuple: bool, layer: nn.Module) -> None:
        super().__init__()
        self.gives_tuple = gives_tuple
        self.attention_type = getattr(layer, "attention_type", None)  # by which modernbert's loop chooses a mask

    def forward(self, hidden_states: Tensor, *arguments: Any, **named: Any) -> Any:
        """The hidden states as they came."""
        return (hidden_states, None) if self.gives_tuple else hidden_states


class _Begin(nn.Module):
    """Stands around a layer: gives it the hidden states that were handed in, whatever the loop has.

    The layer gets them as an argument. Gradient checkpointing, which runs it again in the backward, keeps that.
    """

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer
        self.attention_type = getattr(layer, "attention_type", None)
        self.hidden_states: Tensor | None = None

    def forward(self, hidden_states: Tensor, *arguments: Any, **named: Any) -> Any:
        """What the layer makes of the hidden states that were handed in."""
        return self.layer(self.hidden_states, *arguments, **named)


class _StandIn(nn.Module):
    """Stands for a module that has no say in the result: gives numbers of the same shape, and has no weights."""

    def __init__(self, size: int, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.size = size
        self.register_buffer("zero", torch.zeros((), dtype=dtype, device=device), persistent=False)

    def forward(self, *arguments: Any, **named: Any) -> Tensor:
        """The first tensor itself where it has the shape already, else zeros."""
        first: Tensor = next(value for value in (*arguments, *named.values()) if isinstance(value, Tensor))
        if not first.is_floating_point():  # ids
            return cast(Tensor, self.zero).expand(*first.shape, self.size)
        return first if first.shape[-1] == self.size else first.new_zeros(*first.shape[:-1], self.size)


def _let_go(model: nn.Module, layer: int | None, keep: Sequence[object] = ()) -> None:
    """Put stand-ins where a forward passes through modules whose weights have no say in a layer; None is the last.

    What has a say is what the layer's hidden states are connected to in the graph that autograd keeps. The model's own
    layers, what is to be kept, and modules that were not called (they may be, for another batch) are left as they are.
    """
    sizes: dict[nn.Module, int] = {}

    def note(module: nn.Module, arguments: Any, out: Any) -> None:
        if isinstance(out, Tensor):
            sizes[module] = out.shape[-1]

    # Leaves of their own over the same memory: whether the parameters themselves require gradients is not touched.
    named = [*model.named_parameters(), *model.named_buffers()]
    hooks = [module.register_forward_hook(note) for module in model.modules()]
    try:
        entries = [] if layer is None else [layer]
        with torch.inference_mode(False), torch.enable_grad(), kept_inputs(model, entries) as kept:
            own = {path: tensor.clone() if tensor.is_inference() else tensor.detach() for path, tensor in named}
            leaves = {
                id(own[path].requires_grad_()): parameter
                for path, parameter in model.named_parameters()
                if parameter.is_floating_point()
            }
            out: Any = torch.func.functional_call(model, own, kwargs=_probe(model))
            result = out.last_hidden_state if layer is None else kept[layer]
            used = {id(leaves[id(leaf)]) for leaf in _leaves(result) if id(leaf) in leaves}
    finally:
        for hook in hooks:
            hook.remove()
    layers = layer_list(model)
    parameter = next(model.parameters())
    entrance = cast(Any, model).get_input_embeddings()  # where it stands, transformers looks for it

    def visit(parent: nn.Module) -> None:
        for name, child in parent.named_children():
            weights = [id(weight) for weight in child.parameters()]
            if child is layers or child in keep or not weights:
                continue
            above_entrance = child is not entrance and entrance in child.modules()
            if child in sizes and used.isdisjoint(weights) and not above_entrance:
                setattr(parent, name, _StandIn(sizes[child], parameter.dtype, parameter.device))
            else:
                visit(child)

    visit(model)


def _leaves(result: Tensor) -> Iterator[Tensor]:
    """The tensors that a gradient of the result would flow to."""
    waiting, seen = [result.grad_fn], set()
    while waiting:
        node: Any = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            yield node.variable
        waiting.extend(following for following, _ in node.next_functions)


def unroll(model: nn.Module) -> None:
    """Give albert, whose groups of layers are run several times, one entry a layer over the groups' own parameters.

    Args:
        model: an encoder of the caller's own, structure and config; left as it is if each layer has its entry.
    """
    config: Any = model.config
    groups = getattr(config, "num_hidden_groups", None)
    if groups is None or groups == config.num_hidden_layers:
        return
    owner, name, entries = _layer_list(model)
    shared: dict[int, Any] = {id(parameter): parameter for parameter in entries.parameters()}
    shared[id(config)] = config  # in which each layer looks up its attention function
    each = config.num_hidden_layers / groups
    layers = [copy.deepcopy(entries[int(i / each)], dict(shared)) for i in range(config.num_hidden_layers)]
    setattr(owner, name, nn.ModuleList(layers))
    config.num_hidden_groups = config.num_hidden_layers


def layer_list(model: nn.Module) -> nn.ModuleList:
    """The model's layers, the first one at the bottom; where it was cut off, what stands for the rest at the end."""
    return _layer_list(model)[2]


def _layer_list(model: nn.Module) -> tuple[nn.Module, str, nn.ModuleList]:
    """The owner and name of the model's one list of layers, and the list."""
    config: Any = model.config
    count = getattr(config, "num_hidden_groups", None) or config.num_hidden_layers
    for path, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            owner, _, name = path.rpartition(".")
            return model.get_submodule(owner), name, module
    raise ConfigError(
        f"{type(model).__name__} has no list of {config.num_hidden_layers} layers, so only its last can be had: "
        "leave layers= out"
    )


def _gives_tuple(model: nn.Module, layer: nn.Module) -> bool:
    seen: list[bool] = []
    hook = layer.register_forward_hook(lambda module, arguments, out: seen.append(isinstance(out, tuple)))
    try:
        with torch.inference_mode(False), torch.no_grad():
            model(**_probe(model))
    finally:
        hook.remove()
    if not seen:
        raise ConfigError(f"{type(model).__name__} does not call its layers one by one: leave layers= out")
    return seen[0]


def _probe(model: nn.Module) -> dict[str, Tensor]:
    ids = torch.ones(1, 4, dtype=torch.int64, device=next(model.parameters()).device)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
