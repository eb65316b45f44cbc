"""Which hidden states a forward keeps, and at which layer it starts and stops.

Layers are counted as transformers counts `hidden_states`: 0 is the output of the embedding layer, L that of the last
layer. Layer k < L is read as the input of entry k in the model's list of layers, not as the output of entry k - 1: some
models (deberta-v2) change it in between.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..errors import ConfigError


def name_layers(layers: int | Sequence[int]) -> tuple[int, ...]:
    """One or several layers as a tuple, before the model's number of layers is known.

    Raises:
        ConfigError: none is named, or one is not a whole number.
    """
    if isinstance(layers, str):
        numbers = layers.strip("()[] ").replace(",", " ").split()
        meant = all(re.fullmatch(r"[+-]?\d+", number) for number in numbers) and [int(number) for number in numbers]
        raise ConfigError(f"layers={layers!r} is a string: write numbers, as in layers={meant or [-2, -1]}")
    named = tuple(layers) if isinstance(layers, Iterable) else (layers,)
    if not named or not all(isinstance(layer, int) and not isinstance(layer, bool) for layer in named):
        raise ConfigError(f"layers={layers!r}: name one or several layers by number; 0 is the embeddings, -1 the last")
    return named


def resolve_layers(layers: Sequence[int], count: int) -> tuple[int, ...]:
    """Layers counted from 0, of a model with `count` of them after its embedding layer; -1 is the last.

    Raises:
        ConfigError: one is out of range, or one is named twice.
    """
    resolved = tuple(layer + count + 1 if layer < 0 else layer for layer in layers)
    if not all(0 <= layer <= count for layer in resolved) or len(set(resolved)) < len(resolved):
        raise ConfigError(
            f"layers={layers!r}: the model has the layers 0 (embeddings) to {count}, or {-count - 1} to -1 (the "
            "last); name one or several, none twice"
        )
    return resolved


def stop_after(model: nn.Module, layer: int) -> None:
    """Cut a model off after a layer, so that its forward ends there, and drop the weights above.

    Args:
        model: an encoder that shares neither structure nor config with the user's.
        layer: counted from 0, below the number of layers.
    """
    config: Any = model.config
    owner, name, layers = _layer_list(model)
    end = _Through(_gives_tuple(model, layers[0]), layers[layer])
    setattr(owner, name, nn.ModuleList([*layers[:layer], end]))
    config.num_hidden_layers = layer + 1  # some loops count by the config, not by the list
    if hasattr(config, "num_hidden_groups"):
        config.num_hidden_groups = layer + 1
    _drop_unused(model, layer)


def is_cut(model: nn.Module) -> bool:
    """Whether `stop_after` cut the model off."""
    return any(isinstance(module, _Through) for module in model.modules())


def begin_at(model: nn.Module, layer: int, keep_pooler: bool) -> None:
    """Make a model's forward begin at a layer, with the hidden states of `begun_with`, and drop the weights below.

    Args:
        model: an encoder that shares neither structure nor config with the user's, one entry a layer (see `unroll`).
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
        _drop_unused(model, None, keep=[model.pooler] if keep_pooler else [])


@contextmanager
def begun_with(model: nn.Module, hidden_states: Tensor) -> Iterator[None]:
    """A context in which a model that begins at a layer gives that layer these hidden states."""
    (begin,) = (layer for layer in layer_list(model) if isinstance(layer, _Begin))
    begin.hidden_states = hidden_states
    try:
        yield
    finally:
        begin.hidden_states = None


@contextmanager
def kept_inputs(model: nn.Module, layers: Sequence[int]) -> Iterator[dict[int, Tensor]]:
    """A context in which a forward puts the input of these entries of the model's list of layers into the dict."""
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
    """In place of a layer: returns its input, in the form that the model's loop expects."""

    def __init__(self, gives_tuple: bool, layer: nn.Module) -> None:
        super().__init__()
        self.gives_tuple = gives_tuple
        self.attention_type = getattr(layer, "attention_type", None)  # by which modernbert's loop chooses a mask

    def forward(self, hidden_states: Tensor, *arguments: Any, **named: Any) -> Any:
        """The hidden states as they came."""
        return (hidden_states, None) if self.gives_tuple else hidden_states


class _Begin(nn.Module):
    """Around a layer: gives it the hidden states of `begun_with` instead of the loop's.

    The layer receives them as an argument, which gradient checkpointing keeps for its second run.
    """

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer
        self.attention_type = getattr(layer, "attention_type", None)
        self.hidden_states: Tensor | None = None

    def forward(self, hidden_states: Tensor, *arguments: Any, **named: Any) -> Any:
        """The layer's output for the hidden states of `begun_with`."""
        return self.layer(self.hidden_states, *arguments, **named)


class _StandIn(nn.Module):
    """In place of a module that does not affect the result: returns numbers of the same shape, without weights."""

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


def _drop_unused(model: nn.Module, layer: int | None, keep: Sequence[object] = ()) -> None:
    """Replace modules whose weights do not affect a layer's hidden states with `_StandIn`s; None is the last layer.

    A weight affects them if autograd's graph connects the two. The model's own layers, the modules in `keep`, and
    modules that the probe does not call (another batch may call them) stay as they are.
    """
    sizes: dict[nn.Module, int] = {}

    def note(module: nn.Module, arguments: Any, out: Any) -> None:
        if isinstance(out, Tensor):
            sizes[module] = out.shape[-1]

    # Separate leaves over the same memory leave requires_grad of the parameters alone.
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
    entrance = cast(Any, model).get_input_embeddings()  # transformers looks for it at its place

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
    """The tensors that a gradient of the result flows to."""
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
    """Give albert, which runs its groups of layers several times, one entry a layer over the groups' parameters.

    Args:
        model: an encoder that shares neither structure nor config with the user's; unchanged if it has one entry a
            layer already.
    """
    config: Any = model.config
    groups = getattr(config, "num_hidden_groups", None)
    if groups is None or groups == config.num_hidden_layers:
        return
    owner, name, entries = _layer_list(model)
    shared: dict[int, Any] = {id(parameter): parameter for parameter in entries.parameters()}
    shared[id(config)] = config  # each layer looks its attention function up there
    each = config.num_hidden_layers / groups
    layers = [copy.deepcopy(entries[int(i / each)], dict(shared)) for i in range(config.num_hidden_layers)]
    setattr(owner, name, nn.ModuleList(layers))
    config.num_hidden_groups = config.num_hidden_layers


def layer_list(model: nn.Module) -> nn.ModuleList:
    """The model's layers, bottom first; a model that was cut off ends with the entry that replaces the rest."""
    return _layer_list(model)[2]


def known_layers(model: nn.Module) -> Iterable[nn.Module]:
    """The model's layers, bottom first; empty where it has no one list of them."""
    try:
        return layer_list(model)
    except ConfigError:
        return ()


def parameters_by_layer(model: nn.Module, with_pooler: bool) -> list[list[nn.Parameter]]:
    """The parameters of each used layer, top first, then all others; none twice (albert's layers share theirs).

    Of a model that has no one list of layers, all are others.

    Args:
        model: an encoder.
        with_pooler: whether the pooler is used, so that its parameters belong to the top layer; else they are in no
            group.
    """
    pooler = getattr(model, "pooler", None)
    above = list(pooler.parameters()) if pooler is not None else []
    head = getattr(model, "sentence_head", None)
    top = list(head.parameters()) if head is not None else []
    groups = [list(layer.parameters()) for layer in known_layers(model)][::-1]
    groups = [group for group in groups if group] or [[]]
    seen = {id(parameter) for group in (above, top, *groups) for parameter in group}
    groups.append([parameter for parameter in model.parameters() if id(parameter) not in seen])
    groups[0] = top + (above if with_pooler else []) + groups[0]
    seen.clear()
    out = []
    for group in groups:
        out.append([parameter for parameter in group if id(parameter) not in seen])
        seen |= {id(parameter) for parameter in group}
    return [group for group in out[:-1] if group] + out[-1:]


def _layer_list(model: nn.Module) -> tuple[nn.Module, str, nn.ModuleList]:
    """The owner and name of the model's one list of layers, and the list."""
    config: Any = model.config
    count = getattr(config, "num_hidden_groups", None) or config.num_hidden_layers
    found: dict[str, nn.ModuleList] = {}
    for path, module in model.named_modules():  # a list before the lists inside it
        inside = any(path.startswith(f"{outer}.") for outer in found)
        if isinstance(module, nn.ModuleList) and len(module) == count and not inside:
            found[path] = module
    if len(found) != 1:
        raise ConfigError(
            f"{type(model).__name__} has {len(found)} lists of {config.num_hidden_layers} layers instead of one, so "
            "its layers cannot be told apart: train all of it, and do not split it"
        )
    ((path, layers),) = found.items()
    owner, _, name = path.rpartition(".")
    return model.get_submodule(owner), name, layers


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
