"""One hash of all that an encoder's vectors depend on: the content of its weights, its config, its settings."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn

_REVISION = 2
"""Raise it when a change of this package changes the vectors of the same weights."""

_RIGHT_SINCE_1 = {
    *("AlbertModel", "BertModel", "DebertaV2Model", "DistilBertModel", "ElectraModel", "ErnieModel", "EuroBertModel"),
    *("MobileBertModel", "ModernBertModel", "MPNetModel", "NomicBertModel"),
}
"""Models whose vectors revision 2 did not change, so that their caches stay: it reads inner layers of models that pad
inside, counts RoBERTa's positions without the padding id, and packs fewer models (esm)."""

# Entries of a config about where it came from and how it runs, not about what it computes.
_IGNORED = {"_name_or_path", "transformers_version", "architectures", "dtype", "torch_dtype", "use_cache"}

_TIMES_TRAINED = "_bertstream_times_trained"


def hash_weights(model: nn.Module, settings: str, config: Mapping[str, Any]) -> bytes:
    """16 bytes that identify a model by the content of its parameters and buffers, in any process and on any device.

    Args:
        model: all of its weights are read once, about a second for each GB.
        settings: other things that change the vectors.
        config: the model's, as a dict; its path and versions are ignored.
    """
    digest = hashlib.blake2b(digest_size=16)
    kept = {name: value for name, value in config.items() if name not in _IGNORED}
    name = type(model).__name__
    about = (1 if name in _RIGHT_SINCE_1 else _REVISION, name, settings, json.dumps(kept, sort_keys=True, default=repr))
    digest.update(repr(about).encode())
    tensors = _tensors(model)
    if adapters := _adapters(model, tensors):
        digest.update(repr(adapters).encode())
    for name, tensor in sorted(tensors, key=lambda named: named[0]):
        digest.update(repr((name, tensor.dtype, tuple(tensor.shape))).encode())
        content: Any = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        digest.update(content)
    return digest.digest()


def note_training(tensors: Iterable[Tensor]) -> None:
    """Note that these parameters or buffers will be trained, or were until now, so they may change without a trace.

    Fused optimizers do not raise a tensor's version. The count is on the tensor itself, because another encoder may
    share it.
    """
    for tensor in tensors:
        tensor.__dict__[_TIMES_TRAINED] = tensor.__dict__.get(_TIMES_TRAINED, 0) + 1


def weights_state(model: nn.Module) -> object | None:
    """A value that changes with `states_of` the model's parameters and buffers, or with its adapters.

    Cheap enough for every batch.

    Returns:
        None while a parameter requires a gradient: optimizers may change it without a trace.
    """
    named = _tensors(model)
    tensors = [tensor for _, tensor in named]
    if any(tensor.requires_grad for tensor in tensors):
        return None
    return states_of(tensors), _adapters(model, named)


def states_of(tensors: Sequence[Tensor]) -> object:
    """A value that changes when one of these is written in place, moved, converted, replaced, or noted as trained.

    It takes some ten microseconds for 100 tensors.
    """
    versions = [0 if tensor.is_inference() else tensor._version for tensor in tensors]
    trained = [tensor.__dict__.get(_TIMES_TRAINED, 0) for tensor in tensors]
    return list(map(_KIND, tensors)), list(map(Tensor.data_ptr, tensors)), versions, trained


_KIND = attrgetter("requires_grad", "dtype")


def _adapters(model: nn.Module, tensors: Sequence[tuple[str, Tensor]]) -> list[tuple[object, ...]]:
    """The settings of PEFT's adapted layers that are no tensors: active adapters, their scaling, merged or not."""
    if not any(".base_layer." in name for name, _ in tensors):  # the common case, without a loop over all modules
        return []
    names = ("active_adapters", "scaling", "merged_adapters", "disable_adapters")
    return [
        (path, *(repr(getattr(module, name, None)) for name in names))
        for path, module in model.named_modules()
        if hasattr(module, "base_layer")
    ]


def _tensors(model: nn.Module) -> list[tuple[str, Tensor]]:
    return [*model.named_parameters(), *model.named_buffers()]
