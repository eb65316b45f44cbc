"""What a forward may change of a model besides its result, and how to put it back.

big_bird, for example, switches its sparse attention off at the first short text, for good.
"""

from __future__ import annotations

import logging
import operator
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

_CAPTURING = "_output_capturing_hooks_installed"
"""The mark that transformers leaves in a model together with hooks, which change nothing; they stay, so it stays."""

_PLAIN = (bool, int, float, str, tuple, Tensor, type(None))


class ModelState:
    """A model's config, submodules, buffers and plain attributes at one time; weights are not part of it.

    Args:
        model: a transformers encoder.
    """

    def __init__(self, model: nn.Module) -> None:
        config: Any = model.config
        self._config = config
        self._settings = dict(config.__dict__)
        self._modules = [
            (module, dict(module.__dict__), dict(module._modules), dict(module._buffers), _clones(module))
            for module in model.modules()
        ]

    def differs(self) -> bool:
        """Whether the model is no longer as it was."""
        if not _same(self._config.__dict__, self._settings):
            return True
        return any(
            not (_identical(module.__dict__, attributes) or _same(_plain(module.__dict__), _plain(attributes)))
            or not _same(module._modules, children)
            or not _same_content(module._buffers, clones)
            for module, attributes, children, _, clones in self._modules
        )

    def put_back(self) -> None:
        """Make the model as it was."""
        self._config.__dict__.clear()
        self._config.__dict__.update(self._settings)
        for module, attributes, children, buffers, clones in self._modules:
            plain = _plain(attributes)
            for name in _plain(module.__dict__).keys() - plain.keys():
                del module.__dict__[name]
            module.__dict__.update(plain)
            _set(module._modules, children)
            _set(module._buffers, buffers)
            for name, clone in clones.items():
                if clone is not None and not torch.equal(cast(Tensor, buffers[name]), clone):
                    module._buffers[name] = clone.clone()


@contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    """A context after which the model is as it was before; in it, the model's own logger is silent.

    A model that warns of its change does so once where it changes for good, and here would do so in every forward.
    """
    state = ModelState(model)
    log = logging.getLogger(type(model).__module__)
    was_off, log.disabled = log.disabled, True
    try:
        yield
    finally:
        log.disabled = was_off
        state.put_back()


def remove_capture(model: nn.Module) -> None:
    """Remove the hooks that transformers leaves after `output_hidden_states=True`: they cannot be pickled.

    It adds them again where they are needed.
    """
    for module in model.modules():
        for key, hook in list(module._forward_hooks.items()):
            if getattr(hook, "__module__", None) == "transformers.utils.output_capturing":
                del module._forward_hooks[key]
        module.__dict__.pop(_CAPTURING, None)


def _plain(attributes: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in attributes.items() if isinstance(value, _PLAIN) and name != _CAPTURING}


def _clones(module: nn.Module) -> dict[str, Tensor | None]:
    return {name: None if buffer is None else buffer.clone() for name, buffer in module._buffers.items()}


def _identical(found: Mapping[str, Any], before: Mapping[str, Any]) -> bool:
    """Whether these are the same objects in the same order: cheap, and so for most modules."""
    return found.keys() == before.keys() and all(map(operator.is_, found.values(), before.values()))


def _same_content(found: dict[str, Tensor | None], before: dict[str, Tensor | None]) -> bool:
    if found.keys() != before.keys():
        return False
    pairs = [(found[name], before[name]) for name in found]
    return all(a is b if a is None or b is None else torch.equal(a, b) for a, b in pairs)


def _same(found: dict[str, Any], before: dict[str, Any]) -> bool:
    if _identical(found, before):
        return True
    if found.keys() != before.keys():
        return False
    return all(value is before[name] or _equal(value, before[name]) for name, value in found.items())


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, (nn.Module, Tensor)) or isinstance(other, (nn.Module, Tensor)):
        return False
    return type(one) is type(other) and bool(one == other)


def _set(target: dict[str, Any], content: dict[str, Any]) -> None:
    target.clear()
    target.update(content)
