"""Checks of what `wrap` and `stream` are given, before anything is read or encoded."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from typing import Any

from torch.utils.data import BatchSampler, DataLoader, Dataset, IterableDataset, Sampler, default_collate

from ..caching.cached_encoder import CachedEncoder
from ..embeddings import SupportsEncode, SupportsTraining
from ..errors import ConfigError, kind_of, shortened
from ..reading.dataset import TextStream
from ..reading.tables import is_table
from ..system.distributed import rank_and_world_size


def check_encoder(encoder: Any) -> None:
    """Refuse what is no encoder, such as the name of a model.

    Raises:
        ConfigError: with what the object lacks and what to pass instead.
    """
    if isinstance(encoder, (str, os.PathLike)):
        raise ConfigError(f"encoder={encoder!r} is a name: pass bertstream.Encoder.from_pretrained({str(encoder)!r})")
    missing = [name for name in ("encode", "tokenizer", "device", "max_forward_tokens") if not hasattr(encoder, name)]
    if missing:
        raise ConfigError(f"encoder is {kind_of(encoder)} without {', '.join(missing)}: pass a bertstream.Encoder")


def check_batches(loader: Any) -> None:
    """Refuse what yields no batches.

    Raises:
        ConfigError: it is an encoder, a table, a mapping or a DataLoader that joins a stream's batches, or it cannot be
            iterated.
    """
    if hasattr(loader, "encode"):
        raise ConfigError("the first argument is an encoder: write wrap(loader, encoder)")
    kind = kind_of(loader)
    if is_table(loader):
        raise ConfigError(f"loader is {kind}, which holds rows, not batches: write bertstream.stream(...) for it")
    if isinstance(loader, Mapping):
        raise ConfigError(f"loader is {kind} with the keys {shortened(list(loader))}: pass a DataLoader over one")
    joins = isinstance(loader, DataLoader) and loader.batch_size is not None and loader.collate_fn is default_collate
    if joins and isinstance(loader.dataset, TextStream):
        raise ConfigError(
            f"the DataLoader has batch_size={loader.batch_size}, but its TextStream makes the batches: write "
            "DataLoader(text_stream, batch_size=None), and batch_size= in TextStream"
        )
    if not isinstance(loader, Iterable):
        raise ConfigError(f"loader is {kind}: pass an iterable of batches")


def check_cacheable(encoder: SupportsEncode, cached: CachedEncoder) -> None:
    """Refuse an encoder whose weights may change although nobody called `unfreeze`: its cache would silently be off.

    Args:
        encoder: as the user passed it.
        cached: the encoder with its cache.
    Raises:
        ConfigError: its parameters require gradients.
    """
    if isinstance(encoder, SupportsTraining) and not encoder.trainable and cached.prefix() is None:
        raise ConfigError(
            "cache= is refused: parameters of the encoder require gradients, as those of your own model do by "
            "default, or its model has a hook, a patched forward or a module in train mode. Call encoder.freeze(), or "
            "remove the hook, first; encoder.unfreeze() may follow later"
        )


def check_not_replicated(loader: Any) -> None:
    """Refuse a map-style DataLoader that would yield all data on each of several ranks.

    Only samplers and batch samplers of torch that ignore ranks are refused; the user's own may know their rank.

    Raises:
        ConfigError: with the number of ranks and records.
    """
    _, world_size = rank_and_world_size()
    if world_size == 1 or not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset):
        return
    batch_sampler = loader.batch_sampler
    sampler = loader.sampler if type(batch_sampler) in (BatchSampler, type(None)) else batch_sampler
    # torch's samplers that ignore ranks share this module; DistributedSampler has its own.
    if type(sampler).__module__ == Sampler.__module__:
        raise ConfigError(
            f"{world_size} ranks would each read all {_size(loader.dataset)} records: give the DataLoader "
            "sampler=torch.utils.data.DistributedSampler(dataset), or pass allow_replicated=True if that is intended"
        )


def _size(dataset: Dataset[Any]) -> str:
    return str(len(dataset)) if hasattr(dataset, "__len__") else "the"
