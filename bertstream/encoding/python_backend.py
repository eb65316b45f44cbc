"""A transformers tokenizer that is written in Python, asked for one text at a time."""

from __future__ import annotations

import inspect
import json
import logging
from collections.abc import Sequence
from functools import cached_property
from hashlib import blake2b
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import ConfigError, EncoderError, described, kind_of, shortened
from .frame import Framed
from .word_cache import WordCount
from .words import Blanks, better_blanks

logger = logging.getLogger(__name__)

_USED = (
    "tokenize",
    "convert_tokens_to_ids",
    "build_inputs_with_special_tokens",
    "create_token_type_ids_from_sequences",
    "get_vocab",
)
_INPUTS = {"input_ids", "attention_mask", "token_type_ids"}
_NAMED: set[type] = set()
"""The classes that the log has named as slow."""


class _Token(int):
    """A token's id that knows where it is from, wherever the tokenizer puts it among special tokens."""

    sequence: int
    word: int

    @classmethod
    def of(cls, token: int, sequence: int, word: int) -> _Token:
        """The id of a token of this word of this text of a pair."""
        self = cls(token)
        self.sequence, self.word = sequence, word
        return self


class _Encoded(NamedTuple):
    """A text or pair with its special tokens, in the names of the tokenizers library's `Encoding`."""

    ids: list[int]
    special_tokens_mask: list[bool]
    type_ids: list[int]
    word_ids: list[int | None]
    sequence_ids: list[int | None]


class PythonBackend:
    """The `Backend` of a tokenizer that is written in Python.

    Args:
        tokenizer: a transformers tokenizer. It is read, never changed; workers that are spawned get it pickled.
    Raises:
        ConfigError: it is no transformers tokenizer, has not the special tokens that it puts around texts, or gives
            other tokens, or other inputs of a model, when it is called.
    """

    takes_texts = True
    word_count = WordCount()

    def __init__(self, tokenizer: Any) -> None:
        if lacking := [name for name in _USED if not callable(getattr(tokenizer, name, None))]:
            raise ConfigError(
                f"tokenizer is {kind_of(tokenizer)} without {lacking[0]}(): pass a transformers tokenizer, or None"
            )
        self._tokenizer = tokenizer
        self.splits_special = bool(getattr(tokenizer, "split_special_tokens", False))
        try:
            self.special_of_pair = len(self._framed([[[]], [[]]]).ids)
        except ValueError:  # it refuses pairs, as ESM's without its end
            self.special_of_pair = len(self._framed([[[]]]).ids)
        self._check_call()
        self.blanks = better_blanks(
            (Blanks(), Blanks(others=True)),
            of_text=lambda text: self._tokens([text]),
            of_words=self._tokens,
        )
        if type(tokenizer) not in _NAMED:
            _NAMED.add(type(tokenizer))
            logger.warning(
                "%s is written in Python, so texts are tokenized one by one, without the word cache: "
                "num_workers= shares the work among processes",
                type(tokenizer).__name__,
            )

    def _check_call(self) -> None:
        """Compare with the tokenizer's own call: a class may change what that does, or a model may need more of it."""
        kind, text = type(self._tokenizer).__name__, "a b"
        try:
            called, own = dict(self._tokenizer(text)), self.ids(text)
        except Exception as error:
            raise ConfigError(f"{kind}({text!r}) fails: {described(error)}; it is no tokenizer of texts") from error
        if more := sorted(called.keys() - _INPUTS):
            raise ConfigError(f"{kind} makes {', '.join(more)} too: its model takes more than ids, which is all here")
        if called.get("input_ids") != own:
            raise ConfigError(
                f"{kind}({text!r}) gives the ids {shortened(called.get('input_ids'))}, its parts give "
                f"{shortened(own)}: it cannot be followed; tokenize yourself, and pass ids to "
                "Encoder(model, None)"
            )

    def _tokens(self, words: Sequence[str]) -> list[str]:
        """The tokens of a sample; none if it refuses this script, which says nothing of blanks."""
        try:
            return [token for word in words for token in self._tokenizer.tokenize(word)]
        except Exception:
            return []

    @cached_property
    def content(self) -> str:
        """A hash of all that its tokens depend on, as far as it can be seen from outside."""
        tokenizer = self._tokenizer
        options = [name for name in inspect.signature(type(tokenizer).__init__).parameters if name != "self"]
        given = getattr(tokenizer, "init_kwargs", {})
        files = getattr(tokenizer, "vocab_files_names", {})
        found = {name: getattr(tokenizer, name, given.get(name)) for name in options}
        parts = (
            type(tokenizer).__qualname__,
            json.dumps(tokenizer.get_vocab(), sort_keys=True),  # of CANINE's million a second, as repr five
            sorted((name, repr(value)) for name, value in found.items() if name not in files),
            sorted((number, repr(token)) for number, token in tokenizer.added_tokens_decoder.items()),
        )
        digest = blake2b(repr(parts).encode(), digest_size=16)
        for name in sorted(files):
            path = found.get(name) or given.get(name)
            if isinstance(path, str) and Path(path).is_file():
                digest.update(Path(path).read_bytes())
        return f"{type(tokenizer).__name__} {digest.hexdigest()}"

    def framed(self, parts: Sequence[Any], texts: int, in_words: bool) -> Framed:
        """As `Backend.framed`.

        Raises:
            EncoderError: the tokenizer's own code fails on a text, or has no id for a token; `.records` is its number.
        """
        inputs = [parts[i : i + texts] for i in range(0, len(parts), texts)]
        encoded = []
        for number, one in enumerate(inputs):
            try:
                encoded.append(self._framed([[*map(self._ids, part if in_words else [part])] for part in one]))
            except Exception as error:  # whatever its own code raises
                raise EncoderError(
                    f"{type(self._tokenizer).__name__} fails on {shortened(tuple(one) if texts == 2 else one[0])}: "
                    f"{described(error)}",
                    records=(number,),
                ) from error
        return Framed.of(encoded, [[len(part) for part in one] if in_words else [] for one in inputs])

    def ids(self, text: str) -> list[int]:
        """As `Backend.ids`."""
        return self._framed([[self._ids(text)]]).ids

    def with_blanks(self, words: list[str]) -> list[str]:
        """As `Backend.with_blanks`."""
        return self.blanks.put(words)

    def _ids(self, text: str) -> list[int]:
        tokens = self._tokenizer.tokenize(text)
        ids: list[Any] = self._tokenizer.convert_tokens_to_ids(tokens)
        if None in ids:
            raise ValueError(f"it has no id for its token {tokens[ids.index(None)]!r}, and no unk_token")
        return ids

    def _framed(self, parts: Sequence[Sequence[Sequence[int]]]) -> _Encoded:
        """One text, or the two of a pair, each as the ids of its words."""
        own = [
            [_Token.of(token, sequence, word) for word, ids in enumerate(part) for token in ids]
            for sequence, part in enumerate(parts)
        ]
        built = self._tokenizer.build_inputs_with_special_tokens(*own)
        if None in built:
            raise ConfigError(
                f"{type(self._tokenizer).__name__} puts special tokens around texts that it does not have: set its "
                "cls_token, sep_token, bos_token or eos_token"
            )
        sequences = [getattr(token, "sequence", None) for token in built]
        segments = self._tokenizer.create_token_type_ids_from_sequences(*own)
        if len(segments) != len(built):  # ByT5 counts an end twice that the text has already; it has no segments
            if "token_type_ids" in getattr(self._tokenizer, "model_input_names", ()):
                raise ValueError(f"it makes {len(segments)} segment ids for {len(built)} tokens")
            segments = [0] * len(built)
        return _Encoded(
            ids=built,
            special_tokens_mask=[sequence is None for sequence in sequences],
            type_ids=segments,
            word_ids=[getattr(token, "word", None) for token in built],
            sequence_ids=sequences,
        )
