"""Notices that a model is no longer what its weights were read from: hooks, patches, and modules put in place of others."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.nn.modules import module as torch_module

_GLOBAL_HOOKS: list[Any] = [torch_module._global_forward_hooks, torch_module._global_forward_pre_hooks]


class ModelGuard:
    """A picture of a model's structure. Checking it costs some ten microseconds for a hundred modules.

    Args:
        model: the pooler is left out: it runs as a module anyway.
    """

    def __init__(self, model: nn.Module) -> None:
        pooler = getattr(model, "pooler", None)
        left_out = set() if pooler is None else set(pooler.modules())
        named = [(path, module) for path, module in model.named_modules() if module not in left_out]
        self._paths = [path or type(model).__name__ for path, _ in named]
        self._hooks: list[Any] = [(module._forward_hooks, module._forward_pre_hooks) for _, module in named]
        self._flat_hooks = [hooks for pair in self._hooks for hooks in pair] + _GLOBAL_HOOKS
        self._vars: list[dict[str, Any]] = [vars(module) for _, module in named]
        self._entries: list[tuple[Any, str, object]] = [
            (entries, name, entry)
            for _, module in named
            for entries in (module._modules, module._parameters, module._buffers)
            for name, entry in entries.items()
        ]
        self._parameters = [p for _, module in named for p in module.parameters(recurse=False)]

    def intruder(self) -> str | None:
        """What would change a forward beside the modules themselves, in words; None if nothing does."""
        if any(self._flat_hooks) and (hooked := self._hooked()):
            return f"it has a hook on {hooked}"
        for path, own in zip(self._paths, self._vars, strict=True):
            if "forward" in own:
                return f"{path} has a forward of its own"
            if own.get("_compiled_call_impl") is not None:
                return f"{path} is compiled"
        return None

    def _hooked(self) -> str | None:
        """The first module with a hook that may matter."""
        if any(_GLOBAL_HOOKS):
            return "all modules"
        for path, pair in zip(self._paths, self._hooks, strict=True):
            for hook in (hook for hooks in pair for hook in hooks.values()):
                # transformers' own, for output_hidden_states=, stay in a model and do nothing outside such a call.
                if getattr(hook, "__module__", None) != "transformers.utils.output_capturing":
                    return path
        return None

    def replaced(self) -> bool:
        """Whether a module, parameter or buffer is another than it was."""
        try:
            return any(entries[name] is not entry for entries, name, entry in self._entries)
        except KeyError:
            return True

    def requires_grad(self) -> bool:
        """Whether any parameter requires a gradient."""
        return any(parameter.requires_grad for parameter in self._parameters)
