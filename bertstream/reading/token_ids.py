"""Texts that come as token ids: lists of integers in records of any format, whole columns at a time in Parquet."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor

from ..errors import ConfigError, EncoderError, shortened
from ..paths import trail
from ..tokens import (
    Indices,
    Int32Array,
    SupportsTokenize,
    Text,
    TokenBatch,
    TokenizedText,
    cumulate,
    hash_texts,
    tokenize_batch,
)
from .raw import RecordError

_MASKS = ("attention_mask", "special_tokens_mask")
_LISTS = (*_MASKS, "token_type_ids", "word_ids")
"""Fields with an entry for each id, which are taken where a record has them. An attention mask of 0 is padding, a word
of -1 or None is none."""

BESIDE_IDS = (*_LISTS, "num_words")
"""All fields that are taken with ids. `num_words` is how many words the text had, those without a token included."""

_METADATA = "bertstream_ids"

_Part = tuple[npt.NDArray[Any], Indices]
"""The numbers of a column of lists, and where the list of each row begins in them."""


def ids_of(value: Any, values: Mapping[str, Any], field: str) -> TokenizedText | None:
    """A record's ids as a text, with what the record says of them; padding is left out.

    Args:
        value: of the text's field: numbers, or the text that `columns_of_ids` made of them.
        values: the record's fields; those beside the text's, in the same object, are taken with it.
        field: the text's name or path.
    Returns:
        None if the value is no list of numbers. An empty list is one of words, unless fields of ids are beside it.
    Raises:
        RecordError: an id is no whole number of 32 bits, or another field does not fit the ids.
    """
    if isinstance(value, TokenizedText):
        return value
    if isinstance(value, list):
        if value and not _begins_with_a_number(value):
            return None
    elif isinstance(value, np.ndarray):
        if value.dtype.kind not in "biuf":
            return None
    elif not isinstance(value, Tensor):
        return None
    holder = values if field in values else trail(values, field)[-2][1]
    beside = {name: holder[name] for name in BESIDE_IDS if isinstance(holder, Mapping) and name in holder}
    if isinstance(value, list) and not value and not any(name in _LISTS for name in beside):
        return None
    ids = _integers(value, field)
    lists = {name: _integers(beside[name], name) for name in _LISTS if beside.get(name) is not None}
    for name, entries in lists.items():
        if len(entries) != len(ids):
            raise RecordError(f"it has {len(entries)} entries, {field!r} has {len(ids)}: one for each id", name)
    count = beside.get("num_words")
    [text] = _batch(
        ids, np.array([0, len(ids)]), lists, None if count is None else _integers([count], "num_words")
    ).apart()
    return text


def tokens_of(tokenizer: SupportsTokenize, texts: Sequence[Text | TokenizedText] | TokenBatch) -> TokenBatch:
    """Texts, those that are ids among them, as one batch in their order, with hashes.

    Args:
        tokenizer: takes texts; its method `ids`, if it has one, takes those that are ids, checks and cuts them.
        texts: any kinds, mixed; or ids alone, as a batch.
    Raises:
        EncoderError: a text cannot be tokenized, or its ids are wrong; `.records` names it.
    """
    if isinstance(texts, TokenBatch):
        tokens = tokenizer.ids(texts) if hasattr(tokenizer, "ids") else texts
        tokens.hashes = hash_texts(tokens)
        return tokens
    ready = [isinstance(text, TokenizedText) for text in texts]
    others = np.flatnonzero(~np.array(ready, np.bool_))
    tokenize = partial(tokenize_batch, tokenizer)
    if len(others) == len(texts):
        return _at(others, texts, tokenize)
    ids = np.flatnonzero(ready)
    tokens = _at(ids, texts, getattr(tokenizer, "ids", TokenBatch.from_texts))
    tokens.hashes = hash_texts(tokens)
    if not len(others):
        return tokens
    rest = _at(others, texts, tokenize)
    return TokenBatch.concat([tokens, rest]).pick(np.argsort(np.concatenate([ids, others])))


def _at(indices: Indices, texts: Sequence[Any], tokenize: Callable[[list[Any]], TokenBatch]) -> TokenBatch:
    try:
        return tokenize([texts[i] for i in indices.tolist()])
    except EncoderError as error:
        raise EncoderError(str(error), records=indices[list(error.records)].tolist()) from error


def _begins_with_a_number(value: list[Any]) -> bool:
    """Whether this is a list of numbers, or such a list within others: `_integers` says what is wrong with these."""
    first: Any = value
    while isinstance(first, list) and first:
        first = first[0]
    return isinstance(first, (int, float, np.number, np.bool_))


def _integers(value: Any, name: str) -> Int32Array:
    if isinstance(value, Tensor):
        value = value.numpy()
    elif isinstance(value, list) and name == "word_ids":
        value = [-1 if entry is None else entry for entry in value]
    try:
        array = np.asarray(value) if len(value) else np.zeros(0, np.int32)
    except (TypeError, ValueError):  # a single number, or lists within the list
        array = np.array(None)
    if array.ndim > 1:
        raise RecordError(
            f"{shortened(array.tolist())} has one dimension too many: the numbers of one text are one list, as a "
            "tokenizer gives them without return_tensors=",
            name,
        )
    if array.ndim != 1 or array.dtype.kind not in ("biu" if name in _MASKS else "iu"):
        raise RecordError(f"a list of whole numbers belongs here, not {shortened(value)}", name)
    return _in_32_bits(array, name)


def _in_32_bits(array: npt.NDArray[Any], name: str) -> Int32Array:
    if array.dtype == np.int32:
        return array
    small = array.astype(np.int32)
    if (wrong := small != array).any():
        raise RecordError(f"{array[wrong][0]} does not fit into 32 bits", name)
    return small


def _batch(
    ids: Int32Array, bounds: Indices, lists: Mapping[str, Int32Array], num_words: Int32Array | None
) -> TokenBatch:
    """Texts whose ids come one after the other, without padding.

    Args:
        ids: [N].
        bounds: [B + 1], where each text begins, and the last one ends.
        lists: [N] each, by name.
        num_words: [B], or None.
    Raises:
        RecordError: the words of one of the texts are out of order.
    """
    mask = lists.get("attention_mask")
    if mask is not None and not mask.all():
        real = mask != 0
        ids, bounds = ids[real], cumulate(real)[bounds].astype(np.int64)
        lists = {name: array[real] for name, array in lists.items()}
    special, types, words = (lists.get(name) for name in _LISTS[1:])
    nothing = np.zeros(len(bounds) - 1, np.int32)
    return TokenBatch(
        input_ids=ids,
        cu_seqlens=bounds.astype(np.int32),
        special=None if special is None else special != 0,
        token_type_ids=types if types is not None and types.any() else None,
        word_ids=words,
        num_words=nothing if words is None else _word_counts(words, bounds, num_words),
        cut_tokens=nothing,
    )


def _word_counts(words: Int32Array, bounds: Indices, num_words: Int32Array | None) -> Int32Array:
    """[B] how many words each text has: what `num_words` says, or as many as its tokens name."""
    if len(words) and words.min() < -1:
        raise RecordError(f"{words.min()} is no word: -1 or null is for a token of no word", "word_ids")
    named = np.flatnonzero(words >= 0)
    starts = np.searchsorted(named, bounds)
    falls = np.diff(words[named], prepend=0) < 0
    falls[starts[starts < len(named)]] = False  # from one text to the next
    if falls.any():
        raise RecordError(
            f"word {words[named][falls][0]} comes after a later one: words are counted through both texts of a pair",
            "word_ids",
        )
    counts = np.zeros(len(bounds) - 1, np.int32)
    some = starts[1:] > starts[:-1]
    counts[some] = words[named[starts[1:][some] - 1]] + 1
    if num_words is None:
        return counts
    if (fewer := num_words < counts).any():
        raise RecordError(f"{num_words[fewer][0]}, but word_ids name {counts[fewer][0]} words", "num_words")
    return num_words


# --- Parquet ----------------------------------------------------------------------------------------------------------


def metadata_of(identity: Mapping[str, Any]) -> dict[str, str]:
    """What a file of ids says in the metadata of its schema: `TextTokenizer.ids_identity` of the tokenizer."""
    return {_METADATA: json.dumps(dict(identity))}


def check_tokenizer(metadata: Mapping[bytes, bytes], identity: Mapping[str, Any] | None, path: str) -> None:
    """Refuse a file of another tokenizer's ids.

    Args:
        metadata: of its schema; nothing is checked where `bertstream.tokenize` did not write it.
        identity: of this encoder's tokenizer; None accepts all.
        path: the file, for the message.
    Raises:
        ConfigError: naming what differs.
    """
    if identity is None or _METADATA.encode() not in metadata:
        return
    there = json.loads(metadata[_METADATA.encode()])
    for name in (*identity, *there):
        if there.get(name) != identity.get(name):
            raise ConfigError(
                f"{path}: its ids were made with {name}={there.get(name)!r}, this encoder's tokenizer has "
                f"{name}={identity.get(name)!r}: use the model and prompt that the texts were tokenized for, or "
                "tokenize them again"
            )


def holds_ids(kind: Any) -> bool:
    """Whether an Arrow type is that of lists of integers."""
    from pyarrow import types

    return _is_list(kind) and bool(types.is_integer(kind.value_type))


def columns_of_ids(batch: Any, field: str, kept: Sequence[str]) -> dict[str, Any]:
    """The columns of an Arrow record batch, the ids as one batch, and without those that are taken with ids.

    Where a record's ids are wrong, all columns are as they were: `ids_of` then finds the record, and says what is
    wrong.

    Args:
        batch: a `pyarrow.RecordBatch`.
        field: the column of ids.
        kept: the names of columns taken with ids that are also fields.
    Returns:
        The columns by name: the ids as a `TokenBatch` or a list, others as pyarrow has them.
    """
    columns = dict(zip(batch.schema.names, batch.columns, strict=True))
    texts: TokenBatch | None = None
    with suppress(RecordError):
        texts = _texts_in(columns, field)
    if texts is None:
        # As arrays, because an empty list would be one of words.
        columns[field] = [np.zeros(0, np.int32) if row == [] else row for row in columns[field].to_pylist()]
        return columns
    columns = {name: column for name, column in columns.items() if name in kept or name not in BESIDE_IDS}
    return columns | {field: texts}


def _texts_in(columns: Mapping[str, Any], field: str) -> TokenBatch | None:
    """The rows' texts; None if a row lacks what others have, or its lists are of several lengths."""
    used = {name: column for name in BESIDE_IDS if (column := columns.get(name)) is not None and not _is_empty(column)}
    counts = used.pop("num_words", None)
    whole = _numbers(columns[field])
    if whole is None or (counts is not None and counts.null_count):
        return None
    ids, bounds = whole
    lists = {}
    for name, column in used.items():
        part = _numbers(column, none=-1 if name == "word_ids" else None, is_mask=name in _MASKS)
        if part is None or not np.array_equal(part[1], bounds):
            return None
        lists[name] = _in_32_bits(part[0], name)
    num_words = None if counts is None else _integers(counts.to_numpy(zero_copy_only=False), "num_words")
    return _batch(_in_32_bits(ids, field), bounds, lists, num_words)


def _is_empty(column: Any) -> bool:
    return bool(column.null_count == len(column))


def _is_list(kind: Any) -> bool:
    from pyarrow import types

    return bool(types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind))


def _numbers(column: Any, *, none: int | None = None, is_mask: bool = False) -> _Part | None:
    """A column of lists of numbers; None if a row or a number is missing, or it is another column.

    Args:
        column: a `pyarrow.Array`.
        none: what a missing number means.
        is_mask: whether truth values are numbers.
    """
    from pyarrow import int64, types

    if column.null_count or not _is_list(column.type):
        return None
    numbers = column.flatten()
    if types.is_fixed_size_list(column.type):
        bounds = column.type.list_size * np.arange(len(column) + 1)
    else:
        bounds = column.offsets.to_numpy().astype(np.int64)
        bounds -= bounds[0]
    if numbers.null_count and none is not None:
        numbers = numbers.cast(int64()).fill_null(none)
    known = types.is_integer(numbers.type) or (is_mask and types.is_boolean(numbers.type))
    return (numbers.to_numpy(zero_copy_only=False), bounds) if known and not numbers.null_count else None
