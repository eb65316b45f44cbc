"""Where a text may be cut so that its pieces have the tokens of the whole: what a tokenizer's parts prove.

Trying texts proves nothing here: one merge across a blank, among thousands, shows in no sample. So a cut is admitted
for normalizers and pre-tokenizers whose rules are known, and for vocabularies in which no token crosses it.
"""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from string import printable
from typing import Any

Part = Mapping[str, Any]
"""A normalizer, pre-tokenizer, model or added token, as `to_str` of a tokenizer writes it."""

_MARK = "\u2581"
"""SentencePiece's mark of a blank."""

_CONTROLS = "[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u180e]"
"""Some tokenizers drop them, some take them for blanks; of some, Python says they are blanks and Rust does not."""

_PREPENDED = (
    "\u0600-\u0605\u06dd\u070f\u0890\u0891\u08e2\u0d4e\U000110bd\U000110cd\U000111c2\U000111c3\U0001193f\U00011941"
    "\U000113d1\U00011a3a\U00011a84-\U00011a89\U00011d46\U00011f02"
)
_APART = (
    r"\s\w!-/:-@\[-`{-~\u00a1-\u00ac\u00ae-\u00bf\u2010-\u2027\u2030-\u205e\u20a0-\u20bf\u2100-\u2bff\u3001-\u3029"
    r"\u3030\U0001f000-\U0001f3fa\U0001f400-\U0001faff"
)
_JOINED = rf"%s(?=[^{_APART}]|[\u0e33\u0eb3\uff9e\uff9f])|[{_PREPENDED}]%s"
"""A character beside a cut that may form one grapheme with its neighbour; SentencePiece's `Precompiled` map replaces
whole graphemes. Characters that are known to be apart are listed, because Unicode adds new ones that are not."""

# Places of a cut. None, for all blanks, is the fourth.
_RUNS = r"(?<=\S)(?=\s)|(?<=\s)(?=\s\S)"
"""After a word, and before the last of several blanks, which goes with the next word: as `ByteLevel` cuts."""
_SINGLE = r"(?<=\S)(?= \S)"
"""Before a blank without others beside it."""
_ASCII = r"(?<=[!-~])(?= [!-~])"
"""Before a blank between two printable ASCII characters: no known normalizer makes blanks of these, or drops them."""
_PRINTED = frozenset(map(chr, range(ord("!"), ord("~") + 1)))
_BLANKS = [*(one for one in map(chr, range(0x3001)) if one.isspace() and not re.match(_CONTROLS, one)), "\r\n"]
"""All that `str.split` cuts at, in texts that are cut."""

_SPLITS = frozenset(
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|" + numbers + r"| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
    for numbers in (r"\p{N}", r"\p{N}{1,3}")
)
"""The expressions of Qwen 2 and Llama 3 (EuroBERT): in no alternative a blank follows anything but blanks."""

_OF_BLANKS = frozenset(["\\s{2,}|[\n\r\t]", r"\s{2,}|[\n\r\t]", r"\s+", " {2,}"])
"""Expressions of `Replace` that match nothing but blanks."""

_CHARACTERWISE = frozenset(["Lowercase", "NFC", "NFD", "NFKC", "NFKD", "Nmt", "StripAccents"])
"""Normalizers that keep a blank a blank, and do not look across it."""

_MODELS = {
    "WordPiece": {"unk_token", "continuing_subword_prefix", "max_input_chars_per_word"},
    "WordLevel": {"unk_token"},
    "Unigram": {"unk_id", "byte_fallback"},
    "BPE": {
        *("unk_token", "fuse_unk", "byte_fallback", "ignore_merges"),
        *("continuing_subword_prefix", "end_of_word_suffix"),
    },
}
"""Models, and their settings that leave them deterministic: not the dropout of BPE."""

_NASTY = (
    *(
        "",
        " ",
        "  ",
        "\n",
        "a",
        " a",
        "a ",
        "  a  b  ",
        "the bank\nof the\r\nriver",
        "\ta\t b\n\n c \n d  \n",
        "\u00a0 b",
    ),
    *("caf\u00e9 cafe\u0301 \u0301a", "\u00b4 \u00a8a a\u00b4 b", "\u6771\u4eac \u591c a\u4e2d b", "'s 're a 's"),
    *("\U0001f469\u200d\U0001f467 \U0001f44d\U0001f3fd x", "a\u200b b \ufeffc", "don't DON'T e-mail, (me) at 10:45!"),
    *(
        "\u2581 a \u2581b c\u2581 d",
        "##ing a ##b",
        "\u00df \u0130 \ufb01 \u01c6 \u212a",
        "1 234 5678 9",
        "= \u2260 \u0338=",
    ),
    *("\u0600 1 \u0e01\u0e33 \u0e33", "x" * 120 + " y", "a. b... c?!  d", "\ud55c\uad6d \u1112\u1161", "`` a '' b"),
    *(" ".join(printable[:94]), " ".join(f"a{one}b" for one in printable[:94])),
    *(f"a{blank}b {blank}c" for blank in "\u00a0\u1680\u2000\u2003\u2009\u200a\u2028\u2029\u202f\u205f\u3000"),
)
"""Texts with a trap each."""


class NoCutError(ValueError):
    """No cut is known to be exact for a tokenizer; the message names the part of it that is to blame."""


@dataclass(frozen=True)
class Cut:
    """Where texts are cut.

    Attributes:
        between: finds the places; None cuts at blanks and drops them.
        odd: finds characters that make a text one that is not cut; none of them is printable ASCII.
        added: finds the added tokens, which do so too; None if there are none.
    """

    between: re.Pattern[str] | None
    odd: re.Pattern[str]
    added: re.Pattern[str] | None

    def pieces(self, text: str) -> list[str] | None:
        """The pieces of a text, whose tokens one after the other are the text's; None if it is not to be cut."""
        plain = text.isascii() and text.isprintable()  # most texts; each expression adds to the time
        if not plain and self.odd.search(text) is not None:
            return None
        if self.added is not None and self.added.search(text) is not None:
            return None
        if self.between is None:
            return text.split()
        if plain and "  " not in text and " " not in (text[:1], text[-1:]):
            return text.replace(" ", "\n ").split("\n")  # the same in a tenth of the time
        return self.between.split(text)


def find_cut(backend: Any, content: str | None = None) -> Cut:
    """The cut that a tokenizer's parts prove, and that hostile texts do not disprove.

    Args:
        backend: a tokenizer of the tokenizers library, without truncation and padding.
        content: what its `to_str` returns, if that is known.
    Raises:
        NoCutError: there is none.
    """
    parts = json.loads(content or backend.to_str())
    model = parts["model"]
    if model["type"] not in _MODELS:
        raise NoCutError(f"the model is {model['type']}")
    known = {"type", "vocab", "merges", *_MODELS[model["type"]]}
    unknown = next((name for name, value in model.items() if value and name not in known), None)
    if unknown is not None:
        raise NoCutError(f"{model['type']} has {unknown}={model[unknown]!r}")
    steps = _flat(parts["normalizer"], "normalizers")
    between = _places(_flat(parts["pre_tokenizer"], "pretokenizers"), steps, model)
    hidden = [token for token in parts["added_tokens"] if not _is_shown(token, steps)]
    for token in hidden:
        _check_hidden(token, backend.normalizer, steps, at_blanks=between is None)
    if hidden and between == _RUNS:
        between = _SINGLE  # what is before an added token ends there, and all of its last blanks are one piece
    odd = _CONTROLS
    if any(step["type"] == "Precompiled" for step in steps):
        if any(step["type"] == "BertNormalizer" for step in steps):
            raise NoCutError("BertNormalizer drops characters between those that Precompiled joins")
        beside = r"\s" if between is None else "[!-~]"
        odd += "|" + _JOINED % (beside, beside)
    added = "|".join(re.escape(token["content"]) for token in parts["added_tokens"] if token["content"])
    cut = Cut(
        between=re.compile(between) if between else None,
        odd=re.compile(odd),
        added=re.compile(added) if added else None,
    )
    for text in _NASTY:
        pieces = cut.pieces(text)
        if pieces is not None and _ids(backend, *pieces) != _ids(backend, text):
            raise NoCutError(f"the pieces of {text!r} have other tokens")
    return cut


def _ids(backend: Any, *pieces: str) -> list[int]:
    return [number for piece in pieces for number in backend.encode(piece, add_special_tokens=False).ids]


def _flat(part: Any, name: str) -> list[Part]:
    """A part, or those of a sequence, as one list."""
    if part is None:
        return []
    return [step for inner in part[name] for step in _flat(inner, name)] if part["type"] == "Sequence" else [part]


def _places(splits: Sequence[Part], steps: Sequence[Part], model: Part) -> str | None:
    """The expression of the places where a tokenizer may be cut; None for all blanks."""
    kinds = [split["type"] for split in splits]
    if kinds and kinds[0] in ("BertPreTokenizer", "WhitespaceSplit", "Whitespace"):
        # What comes after sees one word at a time; "first" would look for the word's place in the text.
        later = [split for split in splits[1:] if not _sees_words_alone(split)]
        if not later:
            _check_steps(steps, _keeps_blanks)
            return None
    if kinds == ["Metaspace"] and splits[0]["split"] and splits[0]["replacement"] == _MARK:
        # A piece begins with its blank, which becomes the mark, unless the blank is stripped: then it needs a new one.
        adds = splits[0]["prepend_scheme"] == "always"
        _check_steps(steps, lambda step: _keeps_ascii(step) and (adds or not step.get("strip_left")))
        return _ASCII
    if kinds == ["ByteLevel"] and splits[0]["use_regex"]:
        _check_steps(steps, _keeps_runs)
        # It would put a blank before a piece that begins with a line end.
        return _SINGLE if splits[0]["add_prefix_space"] else _RUNS
    if kinds == ["Split", "ByteLevel"] and _is_known_split(*splits):
        _check_steps(steps, _keeps_runs)
        return _SINGLE
    if [*steps] == [_MARKS] and [*splits] in ([], [_AT_BLANKS]) and model["type"] == "BPE":
        _check_marks(model)
        return _ASCII
    raise NoCutError(f"the pre-tokenizer is {' + '.join(kinds) or 'none'}, or its settings are unusual")


_MARKS = {"type": "Replace", "pattern": {"String": " "}, "content": _MARK}
_AT_BLANKS = {"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious", "invert": False}
"""Finds no blank that the normalizer has left."""


def _sees_words_alone(split: Part) -> bool:
    kind = split["type"]
    return kind in ("Punctuation", "Digits") or (kind == "Metaspace" and split["prepend_scheme"] != "first")


def _is_known_split(split: Part, bytes_: Part) -> bool:
    plain = split["behavior"] == "Isolated" and not split["invert"]
    return (
        plain and split["pattern"].get("Regex") in _SPLITS and not (bytes_["use_regex"] or bytes_["add_prefix_space"])
    )


def _check_marks(model: Part) -> None:
    """Refuse a BPE over whole texts if a token crosses blanks: nothing else keeps it from doing so.

    The vocabulary shows the merges too, because each makes one of its tokens.
    """
    crossing = next((token for token in model["vocab"] if _MARK in token[1:] and token.strip(_MARK)), None)
    if crossing is not None:
        raise NoCutError(f"the token {crossing!r} crosses a blank")
    if _MARK not in model["vocab"]:
        raise NoCutError(f"the vocabulary lacks {_MARK!r}, so unknown tokens may cross a blank")
    unknown = model.get("unk_token")
    dropped = None if unknown else next((one for one in sorted(_PRINTED) if one not in model["vocab"]), None)
    if dropped is not None:
        raise NoCutError(f"the model drops {dropped!r}, so the blanks around it may become one token")
    if _MARK in (unknown or ""):
        raise NoCutError(f"unknown characters become {unknown!r}, which may be one token with a blank")
    for name in ("ignore_merges", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(name):
            raise NoCutError(f"a BPE over whole texts has {name}={model[name]!r}")


def _check_steps(steps: Sequence[Part], known: Callable[[Part], bool]) -> None:
    unknown = next((step["type"] for step in steps if not known(step)), None)
    if unknown is not None:
        raise NoCutError(f"the normalizer is {unknown}, or has it, with this pre-tokenizer")


def _keeps_blanks(step: Part) -> bool:
    """Whether blanks stay blanks, however many, and nothing looks across them."""
    if step["type"] == "Replace":
        return _is_of_print(step) or (_is_of_blanks(step) and step["content"] == " ")
    if step["type"] == "Precompiled":
        return all(mapped.isspace() for mapped in _mapped(step, _BLANKS))
    return step["type"] in _CHARACTERWISE or step["type"] in ("BertNormalizer", "Strip")


def _keeps_ascii(step: Part) -> bool:
    """Whether a blank between two printable ASCII characters stays one between two, and nothing looks across it."""
    if step["type"] == "Replace":
        return _is_of_print(step) or (
            _is_of_blanks(step) and step["pattern"]["Regex"] != r"\s+" and step["content"] in (" ", _MARK)
        )
    if step["type"] == "Precompiled":
        return _mapped(step, " ") == [" "] and all(map(_is_print, _mapped(step, _PRINTED)))
    return step["type"] in _CHARACTERWISE or step["type"] == "Strip"


def _keeps_runs(step: Part) -> bool:
    """Whether each blank stays a blank, and nothing else becomes one."""
    return step["type"] in ("NFC", "NFD", "Lowercase")


def _mapped(step: Part, texts: Iterable[str]) -> list[str]:
    """What a `Precompiled` map makes of these texts, each a grapheme: a map may be anybody's."""
    from tokenizers import normalizers

    normalizer = normalizers.Precompiled(base64.b64decode(step["precompiled_charsmap"]))
    return [normalizer.normalize_str(text) for text in texts]


def _is_of_print(step: Part) -> bool:
    """Whether a `Replace` finds no blank, and puts printable ASCII, which no step after it drops or makes blank."""
    pattern = step["pattern"].get("String")
    return bool(pattern) and not _has_blank(pattern) and _is_print(step["content"])


def _is_print(text: str) -> bool:
    return bool(text) and _PRINTED.issuperset(text)


def _is_of_blanks(step: Part) -> bool:
    return step["pattern"].get("Regex") in _OF_BLANKS


def _has_blank(text: str) -> bool:
    return any(one.isspace() or one == _MARK for one in text)


def _is_shown(token: Part, steps: Sequence[Part]) -> bool:
    """Whether each text that an added token is found in shows it, and so is not cut.

    These are tokens that are looked for before normalisation, and ASCII ones under NFC, which makes ASCII of three
    other characters only.
    """
    if not steps or not token["normalized"]:
        return True
    content = token["content"]
    return all(step["type"] == "NFC" for step in steps) and content.isascii() and not set(content) & set("K;`")


def _check_hidden(token: Part, normalizer: Any, steps: Sequence[Part], *, at_blanks: bool) -> None:
    """Refuse an added token that texts may hold without showing it, unless a piece holds it as the whole does.

    It does not if the token has a blank, or takes those around it, or if they are stripped once a piece begins with it.
    """
    content = token["content"]
    if (token["lstrip"] or token["rstrip"]) and not at_blanks:
        raise NoCutError(
            f"the added token {content!r} takes the blanks around it, and is looked for in normalized text"
        )
    if not at_blanks and any(step.get("strip_left") for step in steps):
        raise NoCutError(f"the added token {content!r} is looked for in normalized text, which Strip changes")
    form = normalizer.normalize_str(content)
    if not form or any(map(_has_blank, (content, form[1:], form[:1].replace(_MARK, "")))):
        raise NoCutError(f"the added token {content!r} has a blank, and is looked for in normalized text")
