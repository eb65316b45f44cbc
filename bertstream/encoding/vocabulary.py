"""Whether tokenizer and model belong together: their vocabularies at load, and the ids of each batch."""

from __future__ import annotations

import logging
import sys
from typing import Any

import numpy as np

from ..errors import EncoderError, shortened
from ..tokens import TokenBatch
from .tokenizer import TextTokenizer

logger = logging.getLogger(__name__)


def num_ids(config: Any) -> int | None:
    """How many ids a model takes, from 0 on; None where its config does not say."""
    if getattr(config, "model_type", None) == "canine":
        return sys.maxunicode + 1  # it takes characters, and hashes them in place of a table
    return getattr(config, "vocab_size", None)


def check_vocabulary(tokenizer: Any, config: Any, whose: str, *, saved_together: bool) -> None:
    """Refuse a tokenizer that cannot be the model's.

    An embedding table is often padded to a round size, so a vocabulary may be smaller than the table. Below half of it
    no such reason is left.

    Args:
        tokenizer: a transformers tokenizer; None for ids alone, of which each batch is checked.
        config: the model's.
        whose: the model, for messages.
        saved_together: whether both are of one folder; else a vocabulary below half of the table only gives a warning.
    Raises:
        EncoderError: it knows nothing but special tokens, none of its special tokens, or tokens that the model's
            embedding table has no row for.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None and not hasattr(tokenizer, "vocab_size"):
        return
    rows = num_ids(config) or 0
    if backend is None:  # written in Python, where every special token has an id
        known, own, added = len(tokenizer), tokenizer.vocab_size, tokenizer.added_tokens_decoder
    else:
        known = backend.get_vocab_size(with_added_tokens=True)
        own = backend.get_vocab_size(with_added_tokens=False)
        added = backend.get_added_tokens_decoder()
    special = set(getattr(tokenizer, "all_special_tokens", ()))
    belongs = "save the model's tokenizer beside it with tokenizer.save_pretrained(), or pass both to Encoder()"
    if special and known <= len(special) + 64 and not _ordinary(backend or tokenizer, special):
        raise EncoderError(
            f"{whose} comes without its tokenizer: the one found knows {known} tokens, none but special ones "
            f"({shortened(sorted(special))}), so every word would be unknown; {belongs}"
        )
    if special and backend and all(backend.token_to_id(token) is None for token in special):
        raise EncoderError(
            f"{whose}: the tokenizer knows none of its special tokens {shortened(sorted(special))}; {belongs}"
        )
    model = getattr(backend, "model", None)
    unknown = getattr(model, "unk_token", None) if type(model).__name__ in ("WordPiece", "WordLevel") else None
    if model is not None and unknown is not None and model.token_to_id(unknown) is None:
        raise EncoderError(f"{whose}: the tokenizer's vocabulary lacks its unknown token {unknown!r}; {belongs}")
    if own > rows:
        raise EncoderError(
            f"{whose}: the tokenizer's vocabulary has {own} entries, the model's embedding table {rows} rows: it is "
            f"another model's tokenizer; {belongs}"
        )
    # Nothing is padded here, so a padding token that was added for that purpose is never looked up.
    padding = getattr(tokenizer, "pad_token", None)
    beyond = {number: token.content for number, token in added.items() if number >= rows and token.content != padding}
    if beyond:
        raise EncoderError(
            f"{whose}: the tokenizer's added tokens {shortened(list(beyond.values()))} have ids up to {max(beyond)}, "
            f"the model's embedding table has {rows} rows: call model.resize_token_embeddings(len(tokenizer)) before "
            "you train and save the model, or take the tokenizer that was saved with it"
        )
    if 2 * known < rows:
        message = (
            f"{whose}: the tokenizer knows {known} tokens, the model {rows}, more than twice as many, so it seems to "
            "be another model's tokenizer"
        )
        if saved_together:
            raise EncoderError(f"{message}; if they belong together, pass both to Encoder()")
        logger.warning("%s", message)


def _ordinary(tokenizer: Any, special: set[str]) -> list[str]:
    """The tokens of a small vocabulary that are neither special nor the mark of a blank alone."""
    return [token for token in tokenizer.get_vocab() if token not in special and token.strip("▁Ġ ")]


def check_batch(batch: TokenBatch, tokenizer: TextTokenizer, vocab_size: int) -> None:
    """Refuse a batch that the model cannot take.

    Raises:
        EncoderError: a text is too long, or has an id without a row in the embedding table; `.records` names it.
    """
    lengths = batch.lengths if batch.window_lengths is None else batch.window_lengths
    if len(lengths) and lengths.max() > tokenizer.max_length:
        texts = np.flatnonzero(batch.lengths > tokenizer.max_length)
        message = f"text {texts[0]} has {batch.lengths[texts[0]]} tokens, {tokenizer.limit}"
        raise EncoderError(message, records=texts.tolist())
    unknown = np.flatnonzero((batch.input_ids < 0) | (batch.input_ids >= vocab_size))
    if len(unknown):
        text = int(np.searchsorted(batch.cu_seqlens, unknown[0], "right")) - 1
        raise EncoderError(
            f"text {text} has the token id {batch.input_ids[unknown[0]]}, the model knows 0 to {vocab_size - 1}: it "
            "was tokenized for another model, or tokens were added without "
            "model.resize_token_embeddings(len(tokenizer))",
            records=(text,),
        )
