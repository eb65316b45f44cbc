"""What is read of each record: `ReadOptions`, and the step from parsed fields to the text and the wanted fields."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

from ..errors import ConfigError, described
from ..tokens import Text, TokenizedText
from .access import DEFAULT_ACCESS, Access
from .raw import RecordError, excerpt
from .token_ids import is_ids, take_ids

RESERVED = ("__key__", "__shard__", "__index__", "__repeated__")
"""Fields that a batch has of its own."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ReadOptions:
    """What is read of each record, and how shards are opened. Pickles if its functions do.

    Attributes:
        text: the field that holds the text: a str, a list of str (words), or a list of int (token ids).
        pair: the field that holds the second text of a pair; None if records are single texts.
        fields: the other fields to keep. None keeps all; names keep only these; a mapping from names to functions keeps
            these, each passed through its function.
        access: how shards are opened.
        rows: a dataset to read instead of shards, see `split_rows`; None for shards.
        epoch: of the stream; a streaming dataset that shuffles itself has another order in each.
        tokenizer: what token ids depend on, by name, to refuse Parquet files that `bertstream.tokenize` wrote with
            another tokenizer; None refuses none.
        required: the fields that every record must have: the texts, and the names in `fields`.
    Raises:
        ConfigError: an argument has the wrong type, `fields` names a text, or a name is one of `RESERVED`.
    """

    text: str = "text"
    pair: str | None = None
    fields: Mapping[str, Callable[[Any], Any]] | Sequence[str] | None = None
    access: Access = DEFAULT_ACCESS
    rows: Any = field(default=None, repr=False)
    epoch: int = 0
    tokenizer: Mapping[str, Any] | None = field(default=None, repr=False)
    required: tuple[str, ...] = field(init=False, repr=False)

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
            raise ConfigError(f"fields takes names of fields; got {names!r}")
        for name in (*self.texts, *names):
            if name in RESERVED:
                raise ConfigError(f"{name!r} is a field that each batch has of its own: rename it in the data")
        for text in self.texts:
            if text in names:
                raise ConfigError(f"fields lists the other fields: leave out {text!r}, which is the text")
        if isinstance(self.fields, Mapping) and not all(callable(function) for function in self.fields.values()):
            raise ConfigError(f"fields maps names to functions; got {dict(self.fields)!r}")
        object.__setattr__(self, "required", (*self.texts, *names))

    @property
    def texts(self) -> tuple[str, ...]:
        """The names of the one or two fields that make the text."""
        return (self.text,) if self.pair is None else (self.text, self.pair)


def take_text_and_fields(values: dict[str, Any], options: ReadOptions) -> tuple[Text | TokenizedText, dict[str, Any]]:
    """Separate a record's text from its other fields, and keep the wanted ones.

    Args:
        values: the record's fields; the texts are removed from it.
        options: what to take.
    Raises:
        RecordError: a required field is missing, a text is no text, a field that is kept has the name of one that each
            batch has of its own, or a function of `fields` raised.
    """
    check_required(options, values)
    value = values.pop(options.text)
    if type(value) is not str and is_ids(value, values):
        if options.pair is not None:
            raise RecordError("ids are of both texts of a pair: leave out pair=, or name fields of text", options.text)
        text: Text | TokenizedText = take_ids(value, values, options.text, options.required)
    else:
        text = _checked_text(value, options.text)
    if options.pair is not None:
        second = _checked_text(values.pop(options.pair), options.pair)
        if type(second) is not type(text):
            raise RecordError("the two texts of a pair must both be strings, or both lists of words", options.pair)
        text = cast(Text, (text, second))
    if options.fields is None:
        for name in RESERVED:
            if name in values:
                raise RecordError("each batch has a field of this name: rename it, or name others with fields=", name)
        return text, values
    if not isinstance(options.fields, Mapping):
        return text, {name: values[name] for name in options.fields}
    fields = {}
    for name, function in options.fields.items():
        try:
            fields[name] = function(values[name])
        except Exception as error:  # a user's function may raise anything; it stays attached as the cause
            message = f"the function for this field raised {described(error)} on {excerpt(values[name])}"
            raise RecordError(message, name) from error
    return text, fields


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
            raise RecordError(f"the record has no such field; it has {excerpt(sorted([*values, *unread]))}", name)


def _checked_text(text: Any, name: str) -> str | list[str]:
    if type(text) is str and text.isascii():  # the common case; the checks below take a microsecond
        return text
    words = [text] if isinstance(text, str) else text
    if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
        raise RecordError(f"a text is a string or a list of strings, not {excerpt(text)}", name)
    for word in words:
        if not word.isascii():
            try:
                word.encode()
            except UnicodeEncodeError as error:
                raise RecordError(f"the text has half a surrogate pair: {excerpt(word)}", name) from error
    return cast("str | list[str]", text)
