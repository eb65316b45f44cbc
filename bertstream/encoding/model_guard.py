"""Notices that a model is no longer what its weights were read from: hooks, patches, replaced modules and weights."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import chain
from operator import is_
from typing import Any

from torch import nn
from torch.nn.modules import module as torch_module

_HARMLESS = ("transformers.utils.output_capturing", "bertstream.encoding.layers")
"""Where hooks come from that change nothing: transformers' for output_hidden_states=, and ours that read layers."""

_GLOBAL_HOOKS: list[Any] = [torch_module._global_forward_hooks, torch_module._global_forward_pre_hooks]


class ModelGuard:
    """A picture of a model's structure, cheap enough to compare with every batch.

    Args:
        model: its pooler and its sentence head are left out: they run as modules anyway.
    Attributes:
        kinds: the class of each module, by its path.
    """

    def __init__(self, model: nn.Module) -> None:
        apart = [part for name in ("pooler", "sentence_head") if (part := getattr(model, name, None)) is not None]
        left_out = {module for part in apart for module in part.modules()}
        named = {path or type(model).__name__: m for path, m in model.named_modules() if m not in left_out}
        self._modules = named
        self._hooks = [hooks for m in named.values() for hooks in (m._forward_hooks, m._forward_pre_hooks)]
        self._hooks += _GLOBAL_HOOKS
        self._vars = [vars(module) for module in named.values()]
        self._sizes: list[int] = []  # empty, so that the first call looks
        self.kinds = {path: type(module) for path, module in named.items()}
        tables = [table for m in named.values() for table in (m._modules, m._parameters, m._buffers)]
        self._tables: list[dict[str, object]] = [table for table in tables if table]
        self._lengths = list(map(len, self._tables))
        self._entries = list(chain.from_iterable(map(dict.values, self._tables)))
        self._parameters = [p for module in named.values() for p in module.parameters(recurse=False)]

    def interference(self) -> str | None:
        """What would change a forward beside the modules themselves, in words; None if nothing does."""
        if any(self._hooks):
            hooked = "all modules" if any(_GLOBAL_HOOKS) else _hooked(self._modules.items())
            if hooked is not None:
                return f"it has a hook on {hooked}"
        if list(map(type, self._modules.values())) != list(self.kinds.values()):
            return "a module is of another class than it was"
        if list(map(len, self._vars)) == self._sizes:
            return None
        for path, module in self._modules.items():
            if "forward" in vars(module):
                return f"{path} has a forward of its own"
            if vars(module).get("_compiled_call_impl") is not None:
                return f"{path} is compiled"
        self._sizes = list(map(len, self._vars))
        return None

    def replaced(self) -> bool:
        """Whether a module, parameter or buffer is another than it was."""
        entries = chain.from_iterable(map(dict.values, self._tables))
        return list(map(len, self._tables)) != self._lengths or not all(map(is_, entries, self._entries))

    def requires_grad(self) -> bool:
        """Whether any parameter requires a gradient."""
        return any(parameter.requires_grad for parameter in self._parameters)


def alteration(model: nn.Module) -> str | None:
    """What may change a model's vectors beside its weights: a hook, a patched forward, or train mode; else None."""
    named = [(path or type(model).__name__, module) for path, module in model.named_modules()]
    if (hooked := _hooked(named)) is not None:
        return f"it has a hook on {hooked}"
    for path, module in named:
        if "forward" in vars(module) and not hasattr(module, "_hf_hook"):  # accelerate's only move weights
            return f"{path} has a forward of its own"
        if module.training:  # dropout
            return f"{path} is in train mode"
    return None


def _hooked(named: Iterable[tuple[str, nn.Module]]) -> str | None:
    """The path of the first module with a hook that may matter."""
    for path, module in named:
        for hook in (*module._forward_hooks.values(), *module._forward_pre_hooks.values()):
            if getattr(hook, "__module__", None) not in _HARMLESS:
                return path
    return None
