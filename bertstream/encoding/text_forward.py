"""An encoder's calls: texts, or tokens, to embeddings; and the fingerprint of what made them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

from torch import nn

from ..embeddings import Embeddings
from ..tokens import Text, TokenBatch
from .attention import BatchingSupport, plain_mode
from .calibrating import CalibratedForward
from .cutting import warn_of_cut
from .fingerprint import hash_weights, weights_state
from .finite import FiniteCheck
from .forward_size import ForwardSize
from .model_guard import alteration
from .output_spec import OutputSpec
from .row_forward import check_segments
from .texts import text_list
from .tokenizer import TextTokenizer
from .uncompiled import uncompiled
from .vocabulary import check_batch, num_ids

Self = TypeVar("Self", bound="TextForward")


class TextForward(CalibratedForward):
    """A `CalibratedForward` that tokenizes texts, checks each batch, and has a fingerprint.

    Args:
        model, spec, batching, num_layers, size: as for `BatchedForward`.
        tokenizer: the model's.
    """

    _warned_of_cut = False

    def __init__(
        self,
        model: nn.Module,
        spec: OutputSpec,
        batching: BatchingSupport,
        num_layers: int,
        size: ForwardSize,
        tokenizer: TextTokenizer,
    ) -> None:
        super().__init__(model, spec, batching, num_layers, size)
        self.tokenizer = tokenizer
        self._check_finite = FiniteCheck()
        self._fingerprint: tuple[Any, bytes] | None = None
        self.train(False)

    def forward(self, texts: Sequence[Text] | TokenBatch) -> Embeddings:
        """Call `encode`, or `embed` once the encoder is unfrozen."""
        return self.embed(texts) if self.trainable else self.encode(texts)

    def encode(self, texts: Sequence[Text] | TokenBatch, *, max_forward_tokens: int | None = None) -> Embeddings:
        """Encode texts, longest together, in as many forwards as `max_forward_tokens` allows.

        The caller's grad mode, inference mode and autocast do not matter: the forward runs without them, and its result
        is an ordinary tensor that a trainable layer may take.

        Args:
            texts: strings, lists of words, or pairs of either as tuples; or a `TokenBatch`.
            max_forward_tokens: tokens of one forward in this call; None is the encoder's own number.
        Returns:
            A row for each token, word or text, in the order of the batch; on `device`, in `output_dtype`. A text
            without any token never enters the model; as a sentence it is a row of zeros.
        Raises:
            ConfigError: `texts` is no list of texts.
            EncoderError: a text is longer than the model takes, or says nothing of its words where word output needs
                them; or a float16 forward overflowed.
        """
        with plain_mode(self.device):
            return self.embed(texts, max_forward_tokens=max_forward_tokens)

    @uncompiled
    def embed(self, texts: Sequence[Text] | TokenBatch, *, max_forward_tokens: int | None = None) -> Embeddings:
        """Like `encode`, but in the caller's modes: with gradients and autocast, and with dropout while it is trained.

        Raises:
            ConfigError: as for `encode`.
            EncoderError: as for `encode`.
        """
        batch = texts if isinstance(texts, TokenBatch) else self._tokenized(texts)
        check_batch(batch, self.tokenizer, num_ids(self.model.config) or 0)
        check_segments(batch, self.model.config)
        self._check_marks(batch)
        found = self._vectors(batch, max_forward_tokens=max_forward_tokens)
        self._check_finite(found, self.dtype)
        return found

    def _tokenized(self, texts: Sequence[Text]) -> TokenBatch:
        listed = text_list(texts)
        batch = self.tokenizer.batch(listed)
        batch.texts = listed
        if not self._warned_of_cut and batch.cut_tokens.any():
            self._warned_of_cut = True
            counts = int((batch.cut_tokens > 0).sum()), len(batch), int(batch.cut_words.sum())
            warn_of_cut("in this call (said once; .tokens.cut_tokens counts)", *counts, int(batch.cut_tokens.sum()))
        return batch

    def fingerprint(self) -> bytes | None:
        """Hash all that changes the vectors of given tokens: weights, config and settings.

        The weights are read once, and again when they may have changed: after any of them required a gradient, was
        written in place, moved or converted, and after `freeze`. Writes through `.data` (an EMA's averages, for
        example) leave no trace, here and in the joined weights of a fused forward: call `freeze` after them.

        Rows of the fused and of the packed forward count as the same: in float32 they agree within 1e-5, in bfloat16
        they differ by rounding, as rows of two batches do.

        Returns:
            16 bytes, the same in every process; None while a parameter requires a gradient, because optimizers change
            weights without a trace, and while a hook, a patched forward or a module in train mode is in the model.
        """
        state = weights_state(self.model)
        if state is None or alteration(self.model) is not None:
            self._fingerprint = None
            return None
        known = self._fingerprint
        if known is None or known[0] != state:
            config: Any = self.model.config
            with self._weights():
                known = state, hash_weights(self.model, repr(self.spec.settings), config.to_dict())
            self._fingerprint = known
        return known[1]

    def freeze(self: Self) -> Self:
        """Stop training all parameters; from here on vectors may be cached.

        Call it too after writing weights through `.data`, which leaves no trace: fingerprint and joined weights are
        made again.
        """
        self._fingerprint = None  # the weights may have changed without a trace
        return super().freeze()

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"_fingerprint": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__({"_check_finite": FiniteCheck()} | state)  # encoders that were pickled before have none
