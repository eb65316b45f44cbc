"""What an encoder has to return for a text under any settings, slowly and one text at a time."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from bertstream.tokens import Text

from .cases import LAYERS, MOST, Case
from .families import build
from .reference import NoAnswerError, Tokens, combined, plain_states, pooled, tokenize, tokenize_running, windows
from .tokenizers import TOKENIZERS, byte_bpe


class Setting:
    """A tiny model of a family over the vocabulary of a tokenizer, and what plain transformers makes of texts.

    Args:
        model: a name of `families.names()`.
        tokenizer: a name of `TOKENIZERS`.
        dtype: of the weights; the reference computes in float32 with weights of this precision.
    """

    def __init__(self, model: str, tokenizer: str, dtype: str) -> None:
        self.kind = tokenizer
        self.tokenizer = TOKENIZERS[tokenizer]()
        self.model: nn.Module = build(model, self.tokenizer).model.requires_grad_(False)  # so that a cache takes it
        # transformers asks for add_prefix_space=True with lists of words; it would glue them together without.
        self.for_lists = byte_bpe(add_prefix_space=True) if tokenizer == "byte_bpe" else None
        self.own: Any = TOKENIZERS[tokenizer]()  # a call of transformers changes its truncation
        self.own.model_input_names = self.tokenizer.model_input_names
        self.plain: Any = copy.deepcopy(self.model)
        for parameter in self.plain.parameters():
            parameter.data = parameter.data.to(getattr(torch, dtype)).float()
        self.known: dict[tuple[Any, ...], list[Tensor]] = {}

    @property
    def hidden_size(self) -> int:
        """H."""
        return int(self.plain.config.hidden_size)

    def states(self, tokens: Tokens) -> list[Tensor]:
        """The hidden states of a text or window, [T, H] each."""
        key = (*tokens.ids, "types", *(tokens.types or ()))
        if key not in self.known:
            found = plain_states(self.plain, tokens.ids, tokens.types, fresh=False)
            assert all(state is not None for state in found)
            self.known[key] = [state for state in found if state is not None]
        return self.known[key]

    @torch.no_grad()
    def pooler_output(self, tokens: Tokens) -> Tensor:
        """[H] of a text or window, by the model's own pooler."""
        ids = torch.tensor([tokens.ids])
        types = {} if tokens.types is None else {"token_type_ids": torch.tensor([tokens.types])}
        return self.plain(input_ids=ids, attention_mask=torch.ones_like(ids), **types).pooler_output[0]

    def tokens(self, text: Text, max_length: int | None = None, side: str = "right", prompt: str = "") -> Tokens:
        """A text by transformers' own tokenizer, truncated on this side if `max_length` is given.

        A prompt is words of the first text, and their tokens are of no word.
        """
        self.own.truncation_side = side
        if self.for_lists is not None:
            self.for_lists.truncation_side = side
        first, *others = text if isinstance(text, tuple) else (text,)
        several: tuple[Any, ...] = (prompt + first if isinstance(first, str) else [*prompt.split(), *first], *others)
        whole: Any = several if others else several[0]
        if self.kind == "gemma" and isinstance(several[0], list):
            found = tokenize_running(self.own, whole, max_length=max_length)
        else:
            found = tokenize(self.own, whole, for_lists=self.for_lists, max_length=max_length)
        if isinstance(several[0], list):
            count = len(prompt.split())
            found.words = [None if word is None or word < count else word - count for word in found.words]
            found.num_words -= count
        return found


def longest(setting: Setting, case: Case) -> int:
    """Tokens of the longest text that the model takes: RoBERTa's family counts positions from padding_idx + 1."""
    config = setting.plain.config
    offset = 0
    if case.model in ("roberta", "xlm-roberta", "mpnet"):
        padding_idx = 1 if case.model == "mpnet" else config.pad_token_id
        offset = padding_idx + 1
    most = int(config.max_position_embeddings) - offset
    assert most >= MOST - 2
    return case.options.get("max_length") or most


def refusal(setting: Setting, case: Case) -> str:
    """Why the settings have no right answer; "" if they have one."""
    if case.must_refuse:
        return case.must_refuse
    names = case.options.get("pooling")
    names = (names,) if isinstance(names, str) else names or ()
    if "pooler" in names:
        if getattr(setting.plain, "pooler", None) is None:
            return "the model has no pooler"
        if [layer % (LAYERS + 1) for layer in case.layers] != [LAYERS] or case.options["combine"] == "stack":
            return "the pooler of another layer"
    if case.options["overflow"] == "windows":
        most = longest(setting, case)
        room = most - setting.tokenizer.num_special_tokens_to_add(pair=True)
        if room <= 0 or case.options["stride"] >= room:
            return "no room for the stride"
    elif longest(setting, case) < setting.tokenizer.num_special_tokens_to_add(pair=True):
        return "no room for special tokens"
    return ""


def expected(setting: Setting, case: Case, text: Text) -> Tensor:
    """A text's rows: [rows, ...] of tokens or words, [...] of a sentence; float32.

    Raises:
        NoAnswerError: there is no right answer.
    """
    options = case.options
    if options["output"] == "words":
        several = text if isinstance(text, tuple) else (text,)
        split: Any = tuple(part.split() if isinstance(part, str) else part for part in several)
        text = split if isinstance(text, tuple) else split[0]
    most = longest(setting, case)
    prompt = options.get("prompt") or ""
    whole = setting.tokens(text, prompt=prompt)
    pieces = [whole]
    if len(whole.ids) > most:
        if options["overflow"] == "error":
            raise NoAnswerError(f"{len(whole.ids)} tokens, {most} are allowed")
        if options["overflow"] == "truncate":
            pieces = [setting.tokens(text, most, case.truncation_side, prompt)]
        else:
            pieces = windows(whole, most, options["stride"])
    width = setting.hidden_size * (len(case.layers) if options["combine"] == "concat" else 1)
    empty = torch.zeros(len(case.layers), width) if options["combine"] == "stack" else torch.zeros(width)
    rows, first = [], []
    for number, piece in enumerate(pieces):
        if not piece.ids:
            continue
        states = setting.states(piece)
        vectors = [
            combined([states[layer][i] for layer in case.layers], options["combine"]) for i in range(len(piece.ids))
        ]
        if number == 0:
            first = vectors[:1]
        words = piece.words or [None] * len(piece.ids)
        rows += [
            (vector, word, part is None)
            for vector, word, part, mine in zip(vectors, words, piece.parts, piece.owned, strict=True)
            if mine
        ]
    if options["output"] == "words":
        how = options["pooling"] or "mean"
        of_word = [[vector for vector, word, _ in rows if word == number] for number in range(whole.num_words)]
        found = [pooled(mine, how, empty) if mine else widened(empty, how) for mine in of_word]
        return torch.stack(found) if found else torch.zeros(0, *widened(empty, how).shape)
    kept = [vector for vector, _, framing in rows if options["special_tokens"] or not framing]
    if options["output"] == "tokens":
        return torch.stack(kept) if kept else torch.zeros(0, *empty.shape)
    names = options["pooling"] or "mean"
    parts = []
    for how in (names,) if isinstance(names, str) else names:
        if how == "pooler":
            parts.append(setting.pooler_output(pieces[0]) if first else empty)
        else:
            parts.append(pooled(first if how == "cls" else kept, how, empty))
    vector = torch.cat(parts, -1)
    if options["normalize"]:
        size = vector.norm(dim=-1, keepdim=True)
        vector = vector / torch.where(size > 0, size, torch.ones_like(size))
    return vector


def widened(empty: Tensor, how: str) -> Tensor:
    """A row of zeros, as wide as this pooling makes it."""
    return torch.cat([empty, empty], -1) if how == "first_last" else empty
