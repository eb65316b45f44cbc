"""Gets texts out of a batch and puts vectors in, whatever the structure of the batch."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterable, Mapping, MutableMapping, Sequence
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from ..embeddings import Embeddings, Layout
from ..errors import BertstreamError, ConfigError, described
from ..tokens import SupportsTokenize, TokenBatch, tokenize_batch

Field: TypeAlias = str | int
"""A part of a record or batch: a key, a position, or an attribute."""


def as_fields(text: Field | Sequence[Field] | None, option: str = "text") -> tuple[Field, ...] | None:
    """The user's `text=`, or another option, as a tuple of fields; None stays None.

    Raises:
        ConfigError: it names no field, the same one twice, or something that cannot be one.
    """
    if text is None:
        return None
    fields: tuple[Any, ...] = (text,)
    if isinstance(text, Sequence) and not isinstance(text, (str, bytes)):
        fields = tuple(text)
    named = all(isinstance(field, (str, int)) and not isinstance(field, bool) for field in fields)
    if not fields or not named or len(set(fields)) < len(fields):
        raise ConfigError(f"{option}={text!r}: name a key, a position or an attribute, or several different ones")
    return fields


def check_pair(pair: Field | None, fields: tuple[Field, ...] | None) -> None:
    """Refuse `pair=` unless exactly one other field holds the first texts."""
    if pair is not None and fields == (pair,):
        raise ConfigError(f"pair={pair!r} is also the field of the first text: name the second's")
    if pair is not None and (fields is None or len(fields) > 1):
        raise ConfigError(f"pair={pair!r} for text={fields!r}: name the one field of the first text")


def get_field(holder: Any, field: Field, option: str = "text") -> Any:
    """The value at a key of a mapping, a position of a sequence, or an attribute of anything else.

    Args:
        holder: a record or batch.
        field: which value.
        option: the argument that named the field, for the message.
    Raises:
        ConfigError: there is no such field.
    """
    try:
        if isinstance(holder, Mapping):
            return holder[field]
        if isinstance(field, int) and isinstance(holder, Sequence) and not isinstance(holder, str):
            return holder[field]
        if isinstance(field, str) and (hasattr(holder, "_fields") or not isinstance(holder, Sequence)):
            return getattr(holder, field)
    except (KeyError, IndexError, AttributeError):
        pass
    in_sequence = isinstance(holder, Sequence) and not isinstance(holder, str) and not hasattr(holder, "_fields")
    way_out = f": its fields are positions, {option}=0 is the first" if isinstance(field, str) and in_sequence else ""
    raise ConfigError(f"{option}={field!r} names nothing in {describe(holder)}{way_out}")


def put_fields(holder: Any, values: Mapping[Any, Any]) -> Any:
    """A shallow copy of the same type with these values in these fields; the holder is unchanged.

    Raises:
        ConfigError: the fields of such a holder cannot be set.
    """
    if hasattr(holder, "_fields"):  # a namedtuple
        names = holder._fields
        return holder._replace(**{names[f] if isinstance(f, int) else f: value for f, value in values.items()})
    if isinstance(holder, tuple):
        return type(holder)(values.get(i, values.get(i - len(holder), part)) for i, part in enumerate(holder))
    try:
        if isinstance(holder, Mapping) and not isinstance(holder, MutableMapping):
            # A mappingproxy and frozen dicts are made of a dict.
            return type(holder)({**holder, **values})  # type: ignore[call-arg]
        out = copy.copy(holder)
        for field, value in values.items():
            if isinstance(out, (Mapping, list)):
                out[field] = value  # type: ignore[index]
            else:
                object.__setattr__(out, field, value)  # works in a frozen dataclass too; the copy is ours
    except (TypeError, AttributeError) as error:
        raise ConfigError(
            f"{', '.join(map(repr, values))} cannot be set in a copy of {describe(holder)} ({described(error)}): yield "
            "batches whose fields can be replaced, such as dicts"
        ) from error
    return out


def as_tensors(column: Any) -> Any:
    """A column of `bucket.stack_column`, its arrays of numbers as tensors that share their memory."""
    if isinstance(column, list):
        if not any(issubclass(kind, np.ndarray) for kind in set(map(type, column))):
            return column  # keys and names, mostly: no look at each costs the loop's thread less
        return [_as_tensor(value) for value in column]
    return _as_tensor(column)


def texts_of(
    batch: Any, fields: tuple[Field, ...] | None, tokenizer: SupportsTokenize, pair: Field | None = None
) -> dict[Field | None, TokenBatch]:
    """The texts in these fields of the user's batch, as tokens.

    A worker process that tokenizes may put an error in place of the texts or the batch; it is raised here.

    Args:
        batch: a `TokenBatch`, or anything that holds texts or tokens.
        fields: of the texts; None if the batch is the texts.
        tokenizer: for texts that are not tokens yet.
        pair: the field of the second texts, which form pairs with those in the one field of `fields`.
    Returns:
        Tokens by field; by None if the batch is the texts.
    Raises:
        ConfigError: there is no such field, or it holds no batch of texts.
        EncoderError: a text cannot be tokenized.
        BertstreamError: the error that a worker process sent.
    """
    if isinstance(batch, BertstreamError):
        raise batch
    if isinstance(batch, TokenBatch):
        if pair is not None:
            raise ConfigError(
                f"pair={pair!r}: the batches are tokenized already, give it to TokenCollate or TextStream"
            )
        return {None: batch}
    out = {}
    for field in fields or (None,):
        texts = batch if field is None else get_field(batch, field)
        if isinstance(texts, BertstreamError):  # from a `TokenCollate` within the user's own collate_fn
            raise texts
        if pair is not None:
            out[field] = tokenize_batch(
                tokenizer, _paired(texts, get_field(batch, pair, "pair"), field, pair), keep_text=True
            )
            continue
        out[field] = texts if isinstance(texts, TokenBatch) else _tokenized(texts, field, batch, tokenizer)
    return out


def with_vectors(
    batch: Any,
    embeddings: Mapping[Field | None, Embeddings | TokenBatch],
    *,
    text: tuple[Field, ...] | None,
    into: tuple[Field, ...] | None,
    layout: Layout | None,
) -> Any:
    """The batch with vectors in place of its texts, or at `into`; a `TokenBatch` becomes a dict of its fields.

    Args:
        batch: the user's, unchanged by this.
        embeddings: by the field of the texts, as `texts_of` names it.
        text, into, layout: as for `wrap`.
    Raises:
        ConfigError: `into` is given and the batch is no dict, or another field already has the name.
    """
    vectors: dict[Any, Any] = {
        field: found if layout is None or isinstance(found, TokenBatch) else found.as_layout(layout)
        for field, found in embeddings.items()
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
        masks = {f"{name}_mask": value[1] for name, value in vectors.items() if isinstance(value, tuple)}
        _check_new(masks, batch, text, "layout='padded'")
        vectors = {name: value[0] if isinstance(value, tuple) else value for name, value in vectors.items()} | masks
    return put_fields(batch, vectors)


def _check_new(names: Iterable[Any], batch: Mapping[Any, Any], text: tuple[Field, ...] | None, option: str) -> None:
    taken = [name for name in names if name in batch and name not in (text or ())]
    if taken:
        raise ConfigError(f"{option} would overwrite the batch's own {taken[0]!r}: choose another into=")


def describe(holder: Any) -> str:
    """A record or batch for an error message: its type and its fields."""
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


def _paired(first: Any, second: Any, field: Field | None, pair: Field) -> list[tuple[Any, Any]]:
    for where, texts in ((f"text={field!r}", first), (f"pair={pair!r}", second)):
        if isinstance(texts, TokenBatch):
            raise ConfigError(f"{where} is tokenized already: give pair= to TokenCollate instead")
        _check_texts(texts, where)
    if len(first) != len(second):
        raise ConfigError(f"text={field!r} holds {len(first)} texts, pair={pair!r} {len(second)}")
    return list(zip(first, second, strict=True))


def _tokenized(texts: Any, field: Field | None, batch: Any, tokenizer: SupportsTokenize) -> TokenBatch:
    where = "the batch" if field is None else f"text={field!r}"
    if isinstance(texts, Tensor) and not (isinstance(batch, Mapping) and "attention_mask" in batch):
        raise ConfigError(f"{where} is a tensor: padded ids need their attention_mask in the same dict")
    if isinstance(texts, Tensor):
        return TokenBatch.from_padded(texts, batch["attention_mask"], batch.get("token_type_ids"))
    if isinstance(texts, Mapping) and field is None:
        raise ConfigError(f"a batch is a {type(texts).__name__}: name its texts with text=, one of {list(texts)}")
    bare = field is None and isinstance(texts, (list, tuple))
    if bare and any(isinstance(entry, (Tensor, np.ndarray)) for entry in texts):
        raise ConfigError(f"the batch is {describe(batch)}, one entry per field: say where the texts are, with text=0")
    _check_texts(texts, where)
    return tokenize_batch(tokenizer, texts, keep_text=True)


def _check_texts(texts: Any, where: str) -> None:
    if not isinstance(texts, Sequence) or isinstance(texts, str):
        kind = type(texts).__name__
        raise ConfigError(f"{where} is a {kind}: a batch of texts is a list of strings or of lists of words")
    if any(isinstance(entry, tuple) for entry in texts):
        raise ConfigError(
            f"{where} holds tuples: torch's default collate transposes lists, which puts the first words of all texts "
            "together. Give the DataLoader collate_fn=bertstream.TokenCollate(encoder, text=...), which also takes "
            "pairs of texts as tuples; for several texts per record, write a collate_fn that joins them into one list"
        )


def _as_tensor(value: Any) -> Any:
    if not isinstance(value, np.ndarray) or value.dtype.kind not in "biufc":
        return value
    return torch.from_numpy(value if value.flags.writeable else value.copy())
