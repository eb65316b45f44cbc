"""Which layers a forward keeps, and where it stops.

Layers are counted as transformers counts `hidden_states`: 0 is what the embedding layer gives, L what the last layer
gives. Layer k < L is taken as the input of entry k of the model's list of layers, not as the output of entry k - 1:
some models (deberta-v2) work on it in between.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .errors import ConfigError


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
    """Cut a model off behind a layer, so that its forward ends there; the layers above are let go.

    Args:
        model: an encoder of the caller's own, structure and config.
        layer: counted from 0, below the number of layers.
    """
    config: Any = model.config
    owner, name, layers = _layer_list(model)
    end = _End(_gives_tuple(model, layers[0]), getattr(layers[layer], "attention_type", None))
    setattr(owner, name, nn.ModuleList([*layers[:layer], end]))
    config.num_hidden_layers = layer + 1  # some loops count by the config, not by the list
    if hasattr(config, "num_hidden_groups"):
        config.num_hidden_groups = layer + 1


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


class _End(nn.Module):
    """Stands for all layers above: hands its input on, in the form that the loop around it expects."""

    def __init__(self, gives_tuple: bool, attention_type: str | None) -> None:
        super().__init__()
        self.gives_tuple = gives_tuple
        self.attention_type = attention_type  # by which modernbert's loop chooses a mask

    def forward(self, hidden_states: Tensor, *arguments: Any, **named: Any) -> Any:
        """The hidden states as they came."""
        return (hidden_states, None) if self.gives_tuple else hidden_states


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
    shared = {id(parameter): parameter for parameter in entries.parameters()}
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
    ids = torch.ones(1, 4, dtype=torch.int64, device=next(model.parameters()).device)
    try:
        with torch.inference_mode(False), torch.no_grad():
            model(input_ids=ids, attention_mask=torch.ones_like(ids))
    finally:
        hook.remove()
    if not seen:
        raise ConfigError(f"{type(model).__name__} does not call its layers one by one: leave layers= out")
    return seen[0]
