"""The upper half of an encoder: goes on where the lower half's vectors end, and is trained inside a model."""

from __future__ import annotations

from typing import Any, cast

from torch import Tensor, nn

from ..embeddings import Embeddings
from ..errors import EncoderError
from .attention import PACKED
from .forward import BatchedForward
from .layers import begin_at, begun_with, unroll


class UpperEncoder(BatchedForward):
    """The layers of an encoder from one on, and its output; `Encoder.split` makes it.

        lower, upper = encoder.split(at=4)
        for batch in bertstream.stream(shards, lower, cache=cache):
            vectors = upper(batch["text"])  # Embeddings, as of the whole encoder, with gradients

    Its parameters are those of its layers, shared with the encoder that was split; all of them are trained until
    `requires_grad_(False)`. It is in eval mode until `train()`, as a model is that transformers loads.

    Args:
        model: the encoder's model, structure and config of its own.
        at: the layer whose hidden states are handed in.
        whole: the encoder.
    """

    def __init__(self, model: nn.Module, at: int, whole: BatchedForward) -> None:
        super().__init__()
        self.at = at
        self.output = whole.output
        self.layers = whole.layers
        self.combine = whole.combine
        self.pooling = whole.pooling
        self.special_tokens = whole.special_tokens
        self.normalize = whole.normalize
        self.output_dtype = whole.output_dtype
        self.batching = whole.batching
        self._last_layer = whole._last_layer
        self._max_forward_tokens = whole._max_forward_tokens
        self._found_forward_tokens = dict(whole._found_forward_tokens)
        self._forward_tokens_limit = whole._forward_tokens_limit
        unroll(model)
        begin_at(model, at, keep_pooler="pooler" in self.pooling)
        if self.batching.way == "packed":
            cast(Any, model).set_attn_implementation(PACKED)
        self.model = model
        self.eval()

    def forward(self, vectors: Embeddings) -> Embeddings:
        """Continue a batch that the lower half encoded.

        Args:
            vectors: the lower half's, on any device and of any precision, out of a loader or a cache or at once.
        Returns:
            What the whole encoder gives for these texts, on the device of the upper half, in the caller's grad mode and
            autocast, with dropout in train mode.
        Raises:
            EncoderError: these are not the vectors of the lower half, or the texts do not fit the output.
        """
        if not isinstance(vectors, Embeddings):
            raise EncoderError(
                f"the upper half takes the Embeddings of the lower one, not a {type(vectors).__name__}: leave layout= "
                "out where the lower half is streamed, and pass texts through it first"
            )
        size = cast(Any, self.model.config).hidden_size
        right = (vectors.tokens.num_tokens, size)
        if vectors.output != "tokens" or vectors.values.shape != right or vectors.layers not in ((), (self.at,)):
            raise EncoderError(
                f"the upper half takes one row a token as encoder.split(at={self.at}) gives them, {list(right)} of "
                f"layer {self.at}; these are {vectors.output} vectors {list(vectors.values.shape)} of layers "
                f"{vectors.layers}: use the lower half of the same split"
            )
        self._check_marks(vectors.tokens)
        return self._vectors(vectors.tokens, vectors.values.to(self.device, self.dtype))

    def extra_repr(self) -> str:
        """What `print(upper)` shows beside the model."""
        return f"at={self.at}, output={self.output!r}, layers={self.layers}, {self.batching.way}"

    def _run(self, given: Tensor | None, **inputs: Any) -> list[Tensor]:
        assert given is not None
        with begun_with(self.model, given):
            found = super()._run(None, **inputs)
        return [given if layer == self.at else states for layer, states in zip(self.layers, found, strict=True)]
