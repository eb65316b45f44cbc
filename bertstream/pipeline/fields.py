"""Where texts stand in a batch, whatever its structure: getting them out, and putting vectors in."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from ..embeddings import Embeddings, Layout
from ..errors import BertstreamError, ConfigError
from ..tokens import SupportsTokenize, TokenBatch

Field: TypeAlias = str | int
"""A part of a record or batch: a key, a position, or an attribute."""


def as_fields(text: Field | Sequence[Field] | None, option: str = "text") -> tuple[Field, ...] | None:
    """The user's `text=`, or another option, as a tuple of places; None stays None."""
    if text is None:
        return None
    places: tuple[Any, ...] = (text,)
    if isinstance(text, Sequence) and not isinstance(text, (str, bytes)):
        places = tuple(text)
    named = all(isinstance(place, (str, int)) and not isinstance(place, bool) for place in places)
    if not places or not named or len(set(places)) < len(places):
        raise ConfigError(f"{option}={text!r}: name a key, a position or an attribute, or several different ones")
    return places


def check_pair(pair: Field | None, places: tuple[Field, ...] | None) -> None:
    """Refuse the place of a second text where it is not clear which one is the first."""
    if pair is not None and places == (pair,):
        raise ConfigError(f"pair={pair!r} is the place of the first text too: name the second's")
    if pair is not None and (places is None or len(places) > 1):
        text = None if places is None else places
        raise ConfigError(f"pair={pair!r} for text={text!r}: name the one place of the first text")


def get_field(holder: Any, place: Field, option: str = "text") -> Any:
    """What stands at a key of a mapping, a position of a sequence, or an attribute of anything else.

    Raises:
        ConfigError: nothing does; `option` is the argument that named the place.
    """
    try:
        if isinstance(holder, Mapping):
            return holder[place]
        if isinstance(place, int) and isinstance(holder, Sequence) and not isinstance(holder, str):
            return holder[place]
        if isinstance(place, str) and (hasattr(holder, "_fields") or not isinstance(holder, Sequence)):
            return getattr(holder, place)
    except (KeyError, IndexError, AttributeError):
        pass
    positions = isinstance(place, str) and isinstance(holder, Sequence) and not isinstance(holder, str)
    way_out = (
        f": a place in it is a number, {option}=0 the first" if positions and not hasattr(holder, "_fields") else ""
    )
    raise ConfigError(f"{option}={place!r} names nothing in {describe(holder)}{way_out}")


def put_fields(holder: Any, values: Mapping[Any, Any]) -> Any:
    """A shallow copy with other values at these places, of the same type; the holder is left as it was."""
    if hasattr(holder, "_fields"):  # a namedtuple
        names = holder._fields
        return holder._replace(**{names[p] if isinstance(p, int) else p: value for p, value in values.items()})
    if isinstance(holder, tuple):
        return type(holder)(values.get(i, values.get(i - len(holder), part)) for i, part in enumerate(holder))
    out = copy.copy(holder)
    for place, value in values.items():
        if isinstance(out, (Mapping, list)):
            out[place] = value  # type: ignore[index]
        else:
            object.__setattr__(out, place, value)  # also in a frozen dataclass: the copy is ours
    return out


def as_tensors(column: Any) -> Any:
    """A column of `bucket.stack_column` with its arrays of numbers as tensors over the same memory."""
    if isinstance(column, list):
        return [_as_tensor(value) for value in column]
    return _as_tensor(column)


def texts_of(
    batch: Any, places: tuple[Field, ...] | None, tokenizer: SupportsTokenize, pair: Field | None = None
) -> dict[Field | None, TokenBatch]:
    """The texts at these places of somebody's batch, as tokens; at None where the batch is the texts.

    Where they were tokenized in a worker process, an error may stand there in their place: it is raised here.

    Args:
        batch: a `TokenBatch`, or anything that holds texts or tokens.
        places: where.
        tokenizer: what texts go through.
        pair: where the second texts stand, which make pairs with those at the one place.
    Raises:
        ConfigError: a place names nothing, or what stands there is no batch of texts.
        EncoderError: a text cannot be tokenized.
        BertstreamError: what a worker process found.
    """
    if isinstance(batch, BertstreamError):
        raise batch
    if isinstance(batch, TokenBatch):
        if pair is not None:
            raise ConfigError(f"pair={pair!r}: the batches are tokenized already, give it to what tokenizes them")
        return {None: batch}
    out = {}
    for place in places or (None,):
        texts = batch if place is None else get_field(batch, place)
        if isinstance(texts, BertstreamError):  # of a `TokenCollate` within a collate_fn of the user's
            raise texts
        if pair is not None:
            out[place] = TokenBatch.from_texts(tokenizer(_paired(texts, get_field(batch, pair, "pair"), place, pair)))
            continue
        out[place] = texts if isinstance(texts, TokenBatch) else _tokenized(texts, place, batch, tokenizer)
    return out


def with_vectors(
    batch: Any,
    embeddings: Mapping[Field | None, Embeddings | TokenBatch],
    *,
    text: tuple[Field, ...] | None,
    into: tuple[Field, ...] | None,
    layout: Layout | None,
) -> Any:
    """The batch with vectors where its texts were, or at `into`; a `TokenBatch` as a dict of its fields.

    Raises:
        ConfigError: `into` was asked for, and the batch is no dict; or another field has the name already.
    """
    vectors: dict[Any, Any] = {
        place: found if layout is None or isinstance(found, TokenBatch) else found.as_layout(layout)
        for place, found in embeddings.items()
    }
    if isinstance(batch, TokenBatch):
        if not batch.fields:
            return vectors[None]
        vectors = {(text or ("text",))[0]: vectors[None]}
        batch = {name: as_tensors(column) for name, column in batch.fields.items()}
    elif text is None:
        return vectors[None]
    if into is not None:
        vectors = dict(zip(into, vectors.values(), strict=True))
        if not isinstance(batch, Mapping):
            raise ConfigError(f"into={into!r} needs batches that are dicts; this is a {type(batch).__name__}")
        _check_new(into, batch, text, f"into={into!r}")
    if isinstance(batch, Mapping) and layout == "padded":
        masks = {f"{place}_mask": value[1] for place, value in vectors.items() if isinstance(value, tuple)}
        _check_new(masks, batch, text, "layout='padded'")
        vectors = {p: value[0] if isinstance(value, tuple) else value for p, value in vectors.items()} | masks
    return put_fields(batch, vectors)


def _check_new(names: Iterable[Any], batch: Mapping[Any, Any], text: tuple[Field, ...] | None, option: str) -> None:
    taken = [name for name in names if name in batch and name not in (text or ())]
    if taken:
        raise ConfigError(f"{option} would write over the batch's own {taken[0]!r}: choose another into=")


def describe(holder: Any) -> str:
    """A record or batch in the words of an error: its type, and the places it has."""
    kind = f"a {type(holder).__name__}"
    if isinstance(holder, Mapping):
        return f"{kind} with the keys {list(holder)}"
    if hasattr(holder, "_fields"):
        return f"{kind} with the fields {list(holder._fields)}"
    if dataclasses.is_dataclass(holder):
        return f"{kind} with the fields {[field.name for field in dataclasses.fields(holder)]}"
    if isinstance(holder, Sequence) and not isinstance(holder, str):
        return f"{kind} of length {len(holder)}"
    return kind


def _paired(first: Any, second: Any, place: Field | None, pair: Field) -> list[tuple[Any, Any]]:
    for where, texts in ((f"text={place!r}", first), (f"pair={pair!r}", second)):
        if isinstance(texts, TokenBatch):
            raise ConfigError(f"{where} is tokenized already: give pair= to TokenCollate instead")
        _check_texts(texts, where)
    if len(first) != len(second):
        raise ConfigError(f"text={place!r} holds {len(first)} texts, pair={pair!r} {len(second)}")
    return list(zip(first, second, strict=True))


def _tokenized(texts: Any, place: Field | None, batch: Any, tokenizer: SupportsTokenize) -> TokenBatch:
    where = "the batch" if place is None else f"text={place!r}"
    if isinstance(texts, Tensor) and not (isinstance(batch, Mapping) and "attention_mask" in batch):
        raise ConfigError(f"{where} is a tensor: padded ids need their attention_mask beside them, in a dict")
    if isinstance(texts, Tensor):
        return TokenBatch.from_padded(texts, batch["attention_mask"], batch.get("token_type_ids"))
    if isinstance(texts, Mapping) and place is None:
        raise ConfigError(f"a batch is a {type(texts).__name__}: name its text, text= one of {list(texts)}")
    bare = place is None and isinstance(texts, (list, tuple))
    if bare and any(isinstance(entry, (Tensor, np.ndarray)) for entry in texts):
        raise ConfigError(f"the batch is {describe(batch)}, one for each field: say where the texts are, with text=0")
    _check_texts(texts, where)
    return TokenBatch.from_texts(tokenizer(texts))


def _check_texts(texts: Any, where: str) -> None:
    if not isinstance(texts, Sequence) or isinstance(texts, str):
        kind = type(texts).__name__
        raise ConfigError(f"{where} is a {kind}: a batch of texts is a list of strings or of lists of words")
    if any(isinstance(entry, tuple) for entry in texts):
        raise ConfigError(
            f"{where} holds tuples: torch's default collate turns lists inside out, so that the first words of all "
            "texts stand together. Give the DataLoader collate_fn=bertstream.TokenCollate(encoder, text=...), which "
            "also takes pairs of texts as tuples; or, for several texts a row, one of your own that lays them behind "
            "one another"
        )


def _as_tensor(value: Any) -> Any:
    if not isinstance(value, np.ndarray) or value.dtype.kind not in "biufc":
        return value
    return torch.from_numpy(value if value.flags.writeable else value.copy())
