"""Gets texts out of a batch and puts vectors in, whatever the structure of the batch."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterable, Mapping, MutableMapping, Sequence
from contextlib import suppress
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from ..embeddings import Embeddings, Layout
from ..encoding.texts import text_list
from ..errors import BertstreamError, ConfigError, described, kind_of, shortened, table_columns
from ..paths import find, splits, trail
from ..reading.batch_fields import Strings
from ..reading.tables import is_table
from ..tokens import SupportsTokenize, TokenBatch, tokenize_batch

Field: TypeAlias = str | int
"""A part of a record or batch: a key, a position, an attribute, or a path of them such as "in.text"."""


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


def as_written(fields: Sequence[Field] | None) -> Field | Sequence[Field] | None:
    """Fields of `as_fields` as the user wrote them, for messages: one of them alone."""
    return fields[0] if fields is not None and len(fields) == 1 else fields


def check_pair(pair: Field | None, fields: tuple[Field, ...] | None) -> None:
    """Refuse `pair=` unless exactly one other field holds the first texts."""
    if pair is not None and fields == (pair,):
        raise ConfigError(f"pair={pair!r} is also the field of the first text: name the second's")
    if pair is not None and (fields is None or len(fields) > 1):
        raise ConfigError(f"pair={pair!r} for text={fields!r}: name the one field of the first text")


def get_field(holder: Any, field: Field, option: str = "text") -> Any:
    """The value at a key of a mapping, a position of a sequence, an attribute of anything else, or a path of these.

    Args:
        holder: a record or batch.
        field: which value; "in.text" is the field "text" of the field "in", unless a field itself is named so.
        option: the argument that named the field, for the message.
    Raises:
        ConfigError: there is no such field.
    """
    try:
        return find(holder, field, _part) if isinstance(field, str) else _part(holder, field)
    except KeyError:
        raise _missing(holder, field, option) from None


def way_to(holder: Any, field: Field, option: str = "text") -> tuple[Field, ...]:
    """The fields that lead to a field, one a level; ConfigError as `get_field`."""
    try:
        if isinstance(field, str):
            return tuple(step for step, _ in trail(holder, field, _part))
        _part(holder, field)
    except KeyError:
        raise _missing(holder, field, option) from None
    return (field,)


def follow(holder: Any, way: Iterable[Field]) -> Any:
    """What a way of `way_to` leads to."""
    for step in way:
        holder = _part(holder, step)
    return holder


def position(holder: Any, field: Field) -> Field:
    """The field as `put_fields` and columns of records name it: in a tuple, list or namedtuple its position, from 0."""
    if not _has_positions(holder):
        return field
    if field in getattr(holder, "_fields", ()):
        return int(holder._fields.index(field))
    return int(field) % len(holder)


def _part(holder: Any, field: Field) -> Any:
    """One level down; KeyError if there is nothing."""
    named = getattr(holder, "_fields", None)
    if isinstance(holder, Mapping):
        if field in holder:  # a defaultdict would make it
            return holder[field]
    elif isinstance(field, str) and (field in named if named is not None else not _has_positions(holder)):
        found = getattr(holder, field, _NOTHING)
        if found is not _NOTHING:
            return found
    elif _has_positions(holder) and (isinstance(field, int) or field.isdecimal()):
        with suppress(IndexError):
            return holder[int(field)]
    raise KeyError(field)


_NOTHING = object()


def _has_positions(holder: Any) -> bool:
    return isinstance(holder, Sequence) and not isinstance(holder, str)


def _missing(holder: Any, field: Field, option: str) -> ConfigError:
    """The error for a field that is not there: what is, as far as the path leads."""
    prefix = ""
    for head, rest in splits(field) if isinstance(field, str) else ():
        if rest:
            with suppress(KeyError):
                holder, prefix = find(holder, head, _part), head
                break
    named = isinstance(field, str) and _has_positions(holder) and not hasattr(holder, "_fields")
    first = repr(f"{prefix}.0") if prefix else "0"
    way_out = f": its fields are positions, {option}={first} is the first" if named else ""
    if not prefix and isinstance(holder, list) and holder and all(isinstance(part, Mapping) for part in holder):
        way_out = ", which are records: give the DataLoader collate_fn=bertstream.TokenCollate(encoder, text=...)"
    if prefix:
        return ConfigError(f"{option}={field!r} names nothing: {prefix!r} is {describe(holder)}{way_out}")
    return ConfigError(f"{option}={field!r} names nothing in {describe(holder)}{way_out}")


def put_fields(holder: Any, values: Mapping[Any, Any], way: Sequence[Field] = ()) -> Any:
    """A shallow copy of the same type with these values in these fields; the holder is unchanged.

    Args:
        holder: a record or batch.
        values: by field.
        way: of `way_to`, to the holder within it that has these fields; those on the way are copied likewise.
    Raises:
        ConfigError: the fields of such a holder cannot be set.
    """
    if way:
        values = {way[0]: put_fields(_part(holder, way[0]), values, way[1:])}
    values = {position(holder, field): value for field, value in values.items()}
    if hasattr(holder, "_fields"):  # a namedtuple
        return holder._replace(**{holder._fields[field]: value for field, value in values.items()})
    if isinstance(holder, tuple):
        return type(holder)(values.get(i, part) for i, part in enumerate(holder))
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
    """A column of `stack_column`, its arrays of numbers as tensors that share their memory."""
    if isinstance(column, Strings):
        return column
    if isinstance(column, list):
        if not any(issubclass(kind, np.ndarray) for kind in set(map(type, column))):
            return column  # keys and names, mostly: no look at each costs the loop's thread less
        return [_as_tensor(value) for value in column]
    return _as_tensor(column)


def texts_of(
    batch: Any,
    fields: tuple[Field, ...] | None,
    tokenizer: SupportsTokenize,
    pair: Field | None = None,
    *,
    mask: tuple[Field, ...] | None = None,
    token_type_ids: tuple[Field, ...] | None = None,
) -> dict[Field | None, TokenBatch]:
    """The texts in these fields of the user's batch, as tokens.

    A worker process that tokenizes may put an error in place of the texts or the batch; it is raised here.

    Args:
        batch: a `TokenBatch`, or anything that holds texts or tokens.
        fields: of the texts; None if the batch is the texts.
        tokenizer: for texts that are not tokens yet.
        pair: the field of the second texts, which form pairs with those in the one field of `fields`.
        mask, token_type_ids: for each of `fields`, which then hold padded ids, the fields of their masks and segment
            ids; None for those of the usual names in the same dict.
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
    if is_table(batch):
        raise ConfigError(
            f"a batch is {kind_of(batch)} with the columns {shortened(table_columns(batch))}, where vectors "
            "cannot be put: yield dicts of columns, such as df.to_dict('list') of pandas or table.to_pydict() of Arrow"
        )
    out = {}
    for i, field in enumerate(fields or (None,)):
        texts = batch if field is None else get_field(batch, field)
        if isinstance(texts, BertstreamError):  # from a `TokenCollate` within the user's own collate_fn
            raise texts
        if pair is not None:
            out[field] = tokenize_batch(
                tokenizer, _paired(texts, get_field(batch, pair, "pair"), field, pair), keep_text=True
            )
            continue
        beside = {
            name: (named[i], get_field(batch, named[i], option))
            for name, option, named in (
                ("attention_mask", "mask", mask),
                ("token_type_ids", "token_type_ids", token_type_ids),
            )
            if named is not None
        }
        if isinstance(texts, TokenBatch) and not beside:
            out[field] = texts
        else:
            out[field] = _tokenized(texts, field, batch, tokenizer, beside)
    return out


def with_vectors(
    batch: Any,
    embeddings: Mapping[Field | None, Embeddings | TokenBatch],
    *,
    text: tuple[Field, ...] | None,
    into: tuple[Field, ...] | None,
    layout: Layout | None,
) -> Any:
    """The batch with vectors in place of its texts, or at `into` beside them; a `TokenBatch` becomes a dict.

    Args:
        batch: the user's, unchanged by this.
        embeddings: by the field of the texts, as `texts_of` names it.
        text, into, layout: as for `wrap`.
    Raises:
        ConfigError: `into` is given and the texts are in no dict, or another field already has the name.
    """
    vectors: list[Any] = [
        found if layout is None or isinstance(found, TokenBatch) else found.as_layout(layout)
        for found in embeddings.values()
    ]
    if isinstance(batch, TokenBatch):
        if not batch.fields and text is None:  # a stream names its text, so that its batches are dicts in any case
            return vectors[0]
        ways: list[tuple[Field, ...]] = [(text or ("text",))[:1]]
        batch = {name: as_tensors(column) for name, column in batch.fields.items()}
    elif text is None:
        return vectors[0]
    else:
        ways = [way_to(batch, field) for field in text]
    for place in dict.fromkeys(way[:-1] for way in ways):
        here = [i for i, way in enumerate(ways) if way[:-1] == place]
        texts = [ways[i][-1] for i in here]
        names = texts if into is None else [into[i] for i in here]
        found = dict(zip(names, (vectors[i] for i in here), strict=True))
        holder = follow(batch, place)
        if into is not None:
            _check_into(into, names, holder, place)
            _check_new(found, holder, texts, f"into={as_written(into)!r}")
        if isinstance(holder, Mapping) and layout == "padded":
            masks: dict[Any, Any] = {
                f"{name}_mask": value[1] for name, value in found.items() if isinstance(value, tuple)
            }
            _check_new(masks, holder, texts, "layout='padded'")
            found = {name: value[0] if isinstance(value, tuple) else value for name, value in found.items()} | masks
        batch = put_fields(batch, found, place)
    return batch


def _check_into(into: tuple[Field, ...], names: Sequence[Field], holder: Any, place: tuple[Field, ...]) -> None:
    path = ".".join(map(str, place))
    if not isinstance(holder, Mapping):
        seen = f"this is {kind_of(holder)}" if not place else f"{path!r} is {describe(holder)}"
        raise ConfigError(f"into={as_written(into)!r} needs batches that are dicts; {seen}")
    for name in names:
        if place and str(name).startswith(f"{path}."):
            key = str(name)[len(path) + 1 :]
            raise ConfigError(f"into={name!r}: the vectors go beside the text, into {path!r}: write into={key!r}")


def _check_new(names: Iterable[Any], batch: Mapping[Any, Any], texts: Sequence[Field], option: str) -> None:
    taken = [name for name in names if name in batch and name not in texts]
    if taken:
        raise ConfigError(f"{option} would overwrite the batch's own {taken[0]!r}: choose another into=")


def describe(holder: Any) -> str:
    """A record or batch for an error message: its type and its fields."""
    kind = kind_of(holder)
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
    parts = []
    for where, texts in ((f"text={field!r}", first), (f"pair={pair!r}", second)):
        if isinstance(texts, TokenBatch):
            raise ConfigError(f"{where} is tokenized already: give pair= to TokenCollate instead")
        parts.append(_checked_texts(texts, where))
    if len(parts[0]) != len(parts[1]):
        raise ConfigError(f"text={field!r} holds {len(parts[0])} texts, pair={pair!r} {len(parts[1])}")
    return list(zip(*parts, strict=True))


def _tokenized(
    texts: Any, field: Field | None, batch: Any, tokenizer: SupportsTokenize, beside: Mapping[str, tuple[Field, Any]]
) -> TokenBatch:
    where = "the batch" if field is None else f"text={field!r}"
    ids = as_tensors(texts) if isinstance(texts, np.ndarray) else texts
    if isinstance(ids, Tensor) and field is not None:
        return _from_padded(ids, where, follow(batch, way_to(batch, field)[:-1]), beside)
    if beside:
        named, _ = next(iter(beside.values()))
        raise ConfigError(f"{where} is {kind_of(texts)}: the field {named!r} is for padded ids, a tensor [B, T]")
    if isinstance(texts, Mapping) and field is None:
        raise ConfigError(f"a batch is {kind_of(texts)}: name its texts with text=, one of {list(texts)}")
    bare = field is None and isinstance(texts, (list, tuple))
    if bare and any(isinstance(entry, (Tensor, np.ndarray)) for entry in texts):
        raise ConfigError(f"the batch is {describe(batch)}, one entry per field: say where the texts are, with text=0")
    return tokenize_batch(tokenizer, _checked_texts(texts, where), keep_text=True)


def _from_padded(ids: Tensor, where: str, holder: Any, beside: Mapping[str, tuple[Field, Any]]) -> TokenBatch:
    """Padded ids with the mask and segment ids that were named, or are in the same dict under their usual names."""
    usual = ("attention_mask", "token_type_ids")
    parts = {name: holder[name] for name in usual if isinstance(holder, Mapping) and name in holder}
    parts |= {name: as_tensors(value) for name, (_, value) in beside.items()}
    mask = parts.get("attention_mask")
    if mask is None:
        raise ConfigError(
            f"{where} is a tensor: padded ids need their attention_mask in the same dict, or its field named, as in "
            "wrap(loader, encoder, text=0, mask=1)"
        )
    try:
        return TokenBatch.from_padded(ids, mask, parts.get("token_type_ids"))
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None


def _checked_texts(texts: Any, where: str) -> list[Any]:
    """A batch of texts as a list, whatever array or column it comes in."""
    try:
        listed = text_list(texts)
    except ConfigError as error:
        raise ConfigError(
            f"{where} is {kind_of(texts)}: a batch of texts is a list of strings or of lists of words, or such a column"
        ) from error
    if any(isinstance(entry, Tensor) for entry in listed):
        raise ConfigError(
            f"{where} holds tensors: torch's default collate transposes lists, which puts the first ids of all texts "
            "together. Give the DataLoader collate_fn=bertstream.TokenCollate(encoder, text=...), which takes lists of "
            "token ids with their attention_mask"
        )
    if any(isinstance(entry, tuple) for entry in listed):
        raise ConfigError(
            f"{where} holds tuples: pairs of texts, or lists that torch's default collate transposed; they look alike. "
            "Give the DataLoader collate_fn=bertstream.TokenCollate(encoder, text=...), which takes pairs as tuples "
            "and leaves lists as they are; or, in a collate_fn of your own, put "
            "bertstream.TokenCollate(encoder)(texts) in the batch; several texts per record are joined into one list"
        )
    return listed


def _as_tensor(value: Any) -> Any:
    if not isinstance(value, np.ndarray) or value.dtype.kind not in "biufc":
        return value
    return torch.from_numpy(value if value.flags.writeable else value.copy())
