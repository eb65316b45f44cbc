"""What is read of each record: `ReadOptions`, and the step from parsed fields to the text and the wanted fields."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, TypeAlias, cast

from ..errors import ConfigError, described, shortened
from ..labels import NumberOf, UnknownLabelError, as_labels, as_listed, is_class_label
from ..paths import find, splits
from ..tokens import Text, TokenBatch, TokenizedText
from .access import DEFAULT_ACCESS, Access
from .functions import Keep, Map, check_functions, kept_and_mapped, name_of
from .raw import BOM, RecordError, parse_text, values_of
from .token_ids import BESIDE_IDS, ids_of

Fields: TypeAlias = Mapping[str, Callable[[Any], Any] | Sequence[str] | Mapping[str, int] | None] | Sequence[str] | None
"""The option `fields`, see `ReadOptions`."""

PLACE = ("__key__", "__shard__", "__index__")
"""Fields of a batch that say where its records are from."""

NO_PLACE = "__none__"
"""Named in `fields`, it leaves out all of `PLACE`; naming none of them keeps all, as since version 0.1.0."""

RESERVED = (*PLACE, "__repeated__")
"""Fields that a batch has of its own."""

SOURCE = "__source__"
"""The number of a record's source, a field that batches of a mixture have of their own too."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ReadOptions:
    """What is read of each record, and how shards are opened. Pickles if its functions do.

    Attributes:
        text: the field that holds the text: a str, UTF-8 bytes, a list of str (words), or a list of int (token ids). A
            path such as "data.text" leads to what nested objects hold; so do the names of the other options.
        pair: the field that holds the second text of a pair; None if records are single texts.
        fields: the other fields to keep. None keeps all; names keep only these; a mapping from names to functions keeps
            these, each passed through its function, or as it is for None; a list or array of labels, or a mapping from
            labels to numbers, in place of a function makes numbers of them.
            A name of `PLACE` among them keeps only the named ones of these, and `NO_PLACE` keeps none.
        keep: says of a record, a dict of all its fields, whether it is read at all.
        map: makes the record of one that is kept, or None to drop it.
        access: how shards are opened.
        rows: a dataset to read instead of shards, see `split_rows`; None for shards.
        epoch: of the stream; a streaming dataset that shuffles itself has another order in each.
        reserved: names that no other field may have.
        tokenizer: what token ids depend on, by name, to refuse Parquet files that `bertstream.tokenize` wrote with
            another tokenizer; None refuses none.
        named: `fields` without `NO_PLACE`, and with functions for labels.
        place: those of `PLACE` that `fields` names.
        with_place: whether a batch has all of `PLACE`, because `fields` names none of them.
        required: the fields that every record must have in the end: the texts, and the other names in `fields`.
        stored: those of them that shards must hold: none where `map` may make them.
        wanted: the keys and columns to read; None for all.
    Raises:
        ConfigError: an argument has the wrong type, `fields` names a text, or a name is `reserved`.
    """

    text: str = "text"
    pair: str | None = None
    fields: Fields = None
    keep: Keep | None = None
    map: Map | None = None
    access: Access = DEFAULT_ACCESS
    rows: Any = field(default=None, repr=False)
    epoch: int = 0
    reserved: tuple[str, ...] = field(default=RESERVED, repr=False)
    tokenizer: Mapping[str, Any] | None = field(default=None, repr=False)
    named: Mapping[str, Callable[[Any], Any] | None] | Sequence[str] | None = field(init=False, repr=False)
    place: tuple[str, ...] = field(init=False, repr=False)
    with_place: bool = field(init=False, repr=False)
    required: tuple[str, ...] = field(init=False, repr=False)
    stored: tuple[str, ...] = field(init=False, repr=False)
    wanted: frozenset[str] | None = field(init=False, repr=False)

    def __post_init__(self) -> None:
        if not isinstance(self.text, str) or not self.text:
            raise ConfigError(
                f"text names the field that holds the text, a str; got {self.text!r}. A stream reads one text, or two "
                "as a pair with pair=. For vectors of several fields, use a DataLoader and wrap(..., text=(...))"
            )
        if self.pair is not None and (not isinstance(self.pair, str) or self.pair in ("", self.text)):
            raise ConfigError(f"pair names the field that holds the second text, another str; got {self.pair!r}")
        if isinstance(self.fields, str):
            raise ConfigError(f"fields takes several names: write fields=[{self.fields!r}]")
        names = list(self.fields or ())
        if not all(isinstance(name, str) for name in names):
            raise ConfigError(f"fields takes names of fields; got {shortened(names)}")
        place = tuple(name for name in names if name in PLACE)
        if place and NO_PLACE in names:
            raise ConfigError(f"fields names {place[0]!r}, and {NO_PLACE!r}, which leaves it out: write one of the two")
        object.__setattr__(self, "with_place", not place and NO_PLACE not in names)
        names = [name for name in names if name not in (*PLACE, NO_PLACE)]
        for name in (*self.texts, *names):
            if name in self.reserved:
                way_out = "leave it out of fields=, or rename it in the data"
                raise ConfigError(f"{name!r} is a field that each batch has of its own: {way_out}")
        for text in self.texts:
            if text in names:
                raise ConfigError(f"fields lists the other fields: leave out {text!r}, which is the text")
        named: Any = None if self.fields is None else tuple(name for name in self.fields if name != NO_PLACE)
        if isinstance(self.fields, Mapping):
            named = {name: _as_function(name, self.fields[name]) for name in named}
        object.__setattr__(self, "named", named)
        check_functions(self.keep, self.map)
        required = (*self.texts, *names)
        chooses = self.keep is not None or self.map is not None
        keys = frozenset(head for name in required for head, _ in splits(name))
        object.__setattr__(self, "place", place)
        object.__setattr__(self, "required", required)
        object.__setattr__(self, "stored", () if self.map is not None else required)
        object.__setattr__(self, "wanted", None if self.fields is None or chooses else keys)

    @property
    def texts(self) -> tuple[str, ...]:
        """The names of the one or two fields that make the text."""
        return (self.text,) if self.pair is None else (self.text, self.pair)

    @property
    def functions(self) -> dict[str, Any]:
        """The user's functions, by the arguments that hold them."""
        own = {name: function for name in ("keep", "map") if (function := getattr(self, name)) is not None}
        named = self.named if isinstance(self.named, Mapping) else {}
        return {f"{name}={name_of(function)}": function for name, function in own.items()} | {
            f"fields[{name!r}]={name_of(function)}": function
            for name, function in named.items()
            if function is not None
        }


def _as_function(name: str, function: Any) -> Callable[[Any], Any] | None:
    if function is None or (callable(function) and not is_class_label(function)):
        return cast("Callable[[Any], Any] | None", function)
    if isinstance(as_labels(function), (list, tuple, set, frozenset, Mapping)):
        return NumberOf(
            function, f"fields[{name!r}]", instead=f", or write a function, as in {{{json.dumps(name)}: int}}"
        )
    raise ConfigError(f"fields maps names to functions, or to lists of labels; got {name!r}: {shortened(function)}")


def take_text_and_fields(
    values: dict[str, Any], options: ReadOptions, place: Sequence[Any] = ()
) -> tuple[Text | TokenizedText, dict[str, Any]] | None:
    """Separate a record's text from its other fields, and keep the wanted ones.

    Args:
        values: the record's fields; may be changed.
        options: what to take.
        place: the values of `PLACE`.
    Returns:
        None for a record that `keep` or `map` drops.
    Raises:
        RecordError: a required field is missing, a text is no text, a field that is kept has the name of one that each
            batch has of its own, or a user's function raised.
    """
    if options.keep is not None or options.map is not None:
        for name in options.texts:
            if isinstance(values.get(name), bytes):
                values[name] = parse_text(values[name].removeprefix(BOM), name)
        chosen = kept_and_mapped(values, options.keep, options.map)
        if chosen is None:
            return None
        values = chosen
    check_required(options, values)
    text = _text_of(values, options)
    reserved = options.reserved if options.fields is None else options.place
    if not values.keys().isdisjoint(reserved):
        name = next(name for name in reserved if name in values)
        raise RecordError("each batch has a field of this name: rename it, or name others with fields=", name)
    if options.named is not None:
        if options.place:
            values |= zip(PLACE, place, strict=True)
        return text, _named_fields(values, options.named)
    if isinstance(text, TokenizedText) and options.text in values and not values.keys().isdisjoint(BESIDE_IDS):
        for name in BESIDE_IDS:
            values.pop(name, None)
    values.pop(options.text, None)  # an object that holds a text further down stays whole: it may be the user's own
    if options.pair is not None:
        values.pop(options.pair, None)
    return text, values


def take_columns(
    columns: Mapping[str, Any], options: ReadOptions, place: Sequence[Any]
) -> tuple[list[Text | TokenizedText] | TokenBatch, dict[str, Any]] | None:
    """What `take_text_and_fields` does, for several records at once.

    Args:
        columns: the records' fields, see `RawColumns`.
        options: what to take.
        place: the columns of `PLACE`.
    Returns:
        The texts and the columns of the other fields; None where a record may be broken or is to be looked at by
        itself: then `take_text_and_fields` says of each what it is.
    """
    reserved = options.reserved if options.fields is None else options.place
    looks_at_each = options.keep is not None or options.map is not None
    if (
        looks_at_each
        or any(name not in columns for name in options.required)
        or not columns.keys().isdisjoint(reserved)
    ):
        return None
    text = columns[options.text]
    if isinstance(text, TokenBatch):
        if options.pair is not None:
            return None
    elif not _all_texts(text) or ([] in text and not columns.keys().isdisjoint(BESIDE_IDS)):  # it may be one of ids
        return None
    elif options.pair is not None:
        pair = columns[options.pair]
        if not _all_texts(pair) or type(text[0]) is not type(pair[0]):
            return None
        text = list(zip(text, pair, strict=True))
    if options.named is None:
        return text, {name: column for name, column in columns.items() if name not in options.texts}
    columns = {**columns, **dict(zip(PLACE, place, strict=True))} if options.place else columns
    if not isinstance(options.named, Mapping):
        return text, {name: columns[name] for name in options.named}
    try:
        return text, {
            name: columns[name] if function is None else list(map(function, values_of(columns[name])))
            for name, function in options.named.items()
        }
    except Exception:  # of a user's function, on one of the records
        return None


def _all_texts(column: Any) -> bool:
    """Whether each entry is a good string, or each a list of good strings."""
    if not isinstance(column, list):
        return False
    kinds = set(map(type, column))
    words = list(chain.from_iterable(column)) if kinds == {list} else column
    if not (kinds == {str} or (kinds == {list} and set(map(type, words)) <= {str})):
        return False
    try:
        "".join(words).encode()
    except UnicodeEncodeError:  # half a surrogate pair
        return False
    return True


def _text_of(values: dict[str, Any], options: ReadOptions) -> Text | TokenizedText:
    value = _value(values, options.text)
    ids = None if isinstance(value, str) else ids_of(value, values, options.text)
    if options.pair is None:
        return _checked_text(value, options.text, or_ids=True) if ids is None else ids
    if ids is not None:
        raise RecordError("ids are of both texts of a pair: leave out pair=, or name fields of text", options.text)
    pair = _checked_text(value, options.text), _checked_text(_value(values, options.pair), options.pair)
    if type(pair[0]) is not type(pair[1]):
        raise RecordError("the two texts of a pair must both be strings, or both lists of words", options.pair)
    return cast(Text, pair)


def _named_fields(values: dict[str, Any], named: Mapping[str, Any] | Sequence[str]) -> dict[str, Any]:
    if not isinstance(named, Mapping):
        return {name: _value(values, name) for name in named}
    fields = {}
    for name, function in named.items():
        value = _value(values, name)
        try:
            fields[name] = value if function is None else function(value)
        except UnknownLabelError as error:
            raise RecordError(str(error), name) from None
        except Exception as error:  # a user's function may raise anything; it stays attached as the cause
            way_out = f": {as_listed(name)}" if function in (int, float) and isinstance(value, (str, bytes)) else ""
            raise RecordError(
                f"the function for this field raised {described(error)} on {shortened(value)}{way_out}", name
            ) from error
    return fields


def _value(values: Mapping[str, Any], name: str) -> Any:
    return values[name] if name in values else find(values, name)


def check_required(options: ReadOptions, values: Mapping[str, Any], unread: Sequence[str] = ()) -> None:
    """Refuse a record that lacks a required field.

    Args:
        options: what is read of the record.
        values: the fields that were read.
        unread: names of further fields of the record, for the message.
    Raises:
        RecordError: with the missing field, and those that are there.
    """
    for name in options.required:
        if name not in values:
            try:
                find(values, name)
            except KeyError:
                there = shortened(sorted(map(str, [*values, *unread])))
                after = "" if options.map is None else " after map="
                raise RecordError(f"the record has no such field{after}; it has {there}", name) from None


def _checked_text(text: Any, name: str, *, or_ids: bool = False) -> str | list[str]:
    if type(text) is str and text.isascii():  # the common case; the checks below take a microsecond
        return text
    if isinstance(text, bytes):
        text = parse_text(text.removeprefix(BOM), name)
    words = [text] if isinstance(text, str) else text
    if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
        others = ", or a list of token ids" if or_ids else ""
        raise RecordError(f"a text is a string or a list of strings{others}, not {shortened(text)}", name)
    for word in words:
        if not word.isascii():
            try:
                word.encode()
            except UnicodeEncodeError as error:
                raise RecordError(f"the text has half a surrogate pair: {shortened(word)}", name) from error
    return cast("str | list[str]", text)
