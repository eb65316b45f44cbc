"""Words repeat: the ids of a text's pieces come from a dict, and the tokenizer is asked for new pieces only."""

from __future__ import annotations

import threading
from array import array
from collections.abc import Sequence
from itertools import groupby
from operator import itemgetter
from sys import getsizeof
from typing import Any, NamedTuple

from ..errors import EncoderError, shortened
from .word_cuts import Cut

LIMIT = 64 << 20
"""Bytes of a cache by default, in each process: some 250,000 words, more than a large vocabulary's texts repeat often,
and little beside the 300 MB of a worker process that has imported torch."""

_LONGEST = 64
"""Characters of the longest piece that is kept. Longer ones seldom come again: addresses, base64, lines of a table."""

_ENTRY = 100
"""Bytes that a dict takes for an entry, beside key and value: 60 to 120 after it grew, half of that before."""

_COMPARED = 1000
"""One chunk in so many is compared with the tokenizer: a thousandth of its time for proof that lasts."""


class WordCount(NamedTuple):
    """How many pieces were looked up, and how many of them the tokenizer was not asked for.

    A piece that is new in a chunk counts once as not found, however often it comes. A text that is not cut counts
    as its words, none of them found.
    """

    asked: int = 0
    found: int = 0


class _Words(dict[str, bytes]):
    """Pieces and their ids, int32 as bytes. A piece that is new is noted, and has none yet.

    Attributes:
        older: pieces of before; one that is found there moves here.
        new: the pieces that a chunk asked for and did not find; a chunk begins with none, also after one that failed.
        num_bytes: an estimate of what the entries take.
    """

    def __init__(self, older: dict[str, bytes]) -> None:
        self.older = older
        self.new: list[str] = []
        self.num_bytes = 0

    def __missing__(self, piece: str) -> bytes:
        ids = self.older.get(piece)
        if ids is None:
            self.new.append(piece)
            return b""
        self.add(piece, ids)
        return ids

    def add(self, piece: str, ids: bytes) -> None:
        self[piece] = ids
        self.num_bytes += getsizeof(piece) + getsizeof(ids) + _ENTRY


class WholeTexts:
    """The ids of texts and words from the tokenizer alone, with the methods of `WordCache`."""

    def __init__(self, backend: Any) -> None:
        self.count = WordCount()
        self._backend = backend

    def texts(self, texts: Sequence[str]) -> list[bytes]:
        """The ids of each text, int32 as bytes."""
        # The fast method keeps no offsets and no words, and takes a seventh less time.
        encodings = self._backend.encode_batch_fast(list(texts), add_special_tokens=False)
        return [_as_bytes(encoding.ids) for encoding in encodings]

    def lists(self, lists: Sequence[list[str]]) -> list[list[bytes]]:
        """The ids of each word of each list, int32 as bytes."""
        encodings = self._backend.encode_batch(list(lists), is_pretokenized=True, add_special_tokens=False)
        rows: list[list[bytes]] = [[b""] * len(words) for words in lists]
        for row, encoding in zip(rows, encodings, strict=True):
            for number, tokens in groupby(zip(encoding.word_ids, encoding.ids, strict=True), itemgetter(0)):
                row[number] = _as_bytes([token for _, token in tokens])
        return rows


class WordCache:
    """The ids of texts and words, without special tokens; safe to call from several threads.

    It has two halves. Once the younger one is full, it becomes the older one, whose pieces are dropped unless they are
    asked for again in time.

    Args:
        backend: a tokenizer of the tokenizers library, without truncation and padding, that nobody changes.
        cut: of this tokenizer.
        limit: bytes, exceeded by one chunk's new pieces at most.
    Attributes:
        count: what was looked up so far.
    """

    def __init__(self, backend: Any, cut: Cut, limit: int = LIMIT) -> None:
        self.count = WordCount()
        self._whole = WholeTexts(backend)
        self._cut = cut
        self._limit = limit
        self._words = _Words({})
        self._chunks = 0
        self._lock = threading.Lock()

    @property
    def num_bytes(self) -> int:
        """An estimate of what it takes."""
        older = self._words.older
        return self._words.num_bytes + (older.num_bytes if isinstance(older, _Words) else 0)

    def texts(self, texts: Sequence[str]) -> list[bytes]:
        """The ids of each text of a chunk, int32 as bytes.

        Raises:
            EncoderError: a text has other ids than the tokenizer gives it, of the chunks that are compared.
        """
        with self._lock:
            get, new = self._words.__getitem__, self._words.new
            new.clear()
            rows: list[bytes] = []
            again: list[tuple[int, list[str]]] = []
            whole: list[int] = []
            asked = 0
            for i, text in enumerate(texts):
                pieces = self._cut.pieces(text)
                if pieces is None:
                    whole.append(i)
                    rows.append(b"")
                    continue
                asked += len(pieces)
                known = len(new)
                rows.append(b"".join(map(get, pieces)))
                if len(new) > known:
                    again.append((i, pieces))
            missed = len(set(new))
            for i, ids in zip(whole, self._learn([texts[i] for i in whole]), strict=True):
                rows[i] = ids
                words = len(texts[i].split())
                asked, missed = asked + words, missed + words
            for i, pieces in again:
                rows[i] = b"".join(map(get, pieces))
            self._counted(asked, missed)
            if self._is_compared():
                _compare(texts, rows, self._whole.texts(texts))
            return rows

    def lists(self, lists: Sequence[list[str]]) -> list[list[bytes]]:
        """The ids of each word of each list, int32 as bytes. The tokenizer takes words one by one, so none is cut.

        Raises:
            EncoderError: as for `texts`.
        """
        with self._lock:
            get, new = self._words.__getitem__, self._words.new
            new.clear()
            rows = [list(map(get, words)) for words in lists]
            missed = len(set(new))
            if missed:
                self._learn([])
                rows = [list(map(get, words)) for words in lists]
            self._counted(sum(map(len, lists)), missed)
            if self._is_compared():
                _compare(lists, rows, self._whole.lists(lists))
            return rows

    def _learn(self, texts: Sequence[str]) -> list[bytes]:
        """Add the new pieces, in one call of the tokenizer, and return the ids of these texts."""
        words = self._words
        new = list(dict.fromkeys(words.new))
        asked = [*new, *texts]
        ids = self._whole.texts(asked) if asked else []
        for piece, of_piece in zip(new, ids, strict=False):
            words.add(piece, of_piece)
        return ids[len(new) :]

    def _counted(self, asked: int, missed: int) -> None:
        """End a chunk: count, drop pieces that are too long, and the older half if the younger is full."""
        words = self._words
        self.count = WordCount(self.count.asked + asked, self.count.found + asked - missed)
        for piece in {piece for piece in words.new if len(piece) > _LONGEST}:
            words.num_bytes -= getsizeof(piece) + getsizeof(words.pop(piece)) + _ENTRY
        if 2 * words.num_bytes > self._limit:
            words.older = {}
            self._words = _Words(words)

    def _is_compared(self) -> bool:
        self._chunks += 1
        return self._chunks % _COMPARED == 1


def _as_bytes(ids: list[int]) -> bytes:
    """Ids as int32, one after the other."""
    return array("i", ids).tobytes()


def _compare(texts: Sequence[Any], found: Sequence[Any], right: Sequence[Any]) -> None:
    wrong = next((i for i, ids in enumerate(found) if ids != right[i]), None)
    if wrong is not None:
        # Without `records`: skipping such a text would hide that others were wrong before.
        raise EncoderError(
            f"a text has other tokens from the word cache than from the tokenizer: {shortened(texts[wrong])}; "
            "make the encoder with word_cache=False, and report the tokenizer"
        )
