"""Notices that a model is no longer what its weights were read from: hooks, patches, replaced modules and weights."""

from __future__ import annotations

from itertools import chain
from operator import is_
from typing import Any

from torch import nn
from torch.nn.modules import module as torch_module

_GLOBAL_HOOKS: list[Any] = [torch_module._global_forward_hooks, torch_module._global_forward_pre_hooks]


class ModelGuard:
    """A picture of a model's structure, cheap enough to compare with every batch.

    Args:
        model: the pooler is left out: it runs as a module anyway.
    """

    def __init__(self, model: nn.Module) -> None:
        pooler = getattr(model, "pooler", None)
        left_out = set() if pooler is None else set(pooler.modules())
        named = {path or type(model).__name__: m for path, m in model.named_modules() if m not in left_out}
        self._modules = named
        self._hooks = [hooks for m in named.values() for hooks in (m._forward_hooks, m._forward_pre_hooks)]
        self._hooks += _GLOBAL_HOOKS
        self._vars = [vars(module) for module in named.values()]
        self._sizes: list[int] = []  # looked at once in any case
        tables = [table for m in named.values() for table in (m._modules, m._parameters, m._buffers)]
        self._tables: list[dict[str, object]] = [table for table in tables if table]
        self._lengths = list(map(len, self._tables))
        self._entries = list(chain.from_iterable(map(dict.values, self._tables)))
        self._parameters = [p for module in named.values() for p in module.parameters(recurse=False)]

    def intruder(self) -> str | None:
        """What would change a forward beside the modules themselves, in words; None if nothing does."""
        if any(self._hooks) and (hooked := self._hooked()):
            return f"it has a hook on {hooked}"
        if list(map(len, self._vars)) == self._sizes:
            return None
        for path, module in self._modules.items():
            if "forward" in vars(module):
                return f"{path} has a forward of its own"
            if vars(module).get("_compiled_call_impl") is not None:
                return f"{path} is compiled"
        self._sizes = list(map(len, self._vars))
        return None

    def _hooked(self) -> str | None:
        """The first module with a hook that may matter."""
        if any(_GLOBAL_HOOKS):
            return "all modules"
        for path, module in self._modules.items():
            for hook in (*module._forward_hooks.values(), *module._forward_pre_hooks.values()):
                # transformers' own, for output_hidden_states=, stay in a model and do nothing outside such a call.
                if getattr(hook, "__module__", None) != "transformers.utils.output_capturing":
                    return path
        return None

    def replaced(self) -> bool:
        """Whether a module, parameter or buffer is another than it was."""
        entries = chain.from_iterable(map(dict.values, self._tables))
        return list(map(len, self._tables)) != self._lengths or not all(map(is_, entries, self._entries))

    def requires_grad(self) -> bool:
        """Whether any parameter requires a gradient."""
        return any(parameter.requires_grad for parameter in self._parameters)
