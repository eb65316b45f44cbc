"""The upper half of a split encoder: continues from the lower half's vectors, and is trained inside a model."""

from __future__ import annotations

import copy
import dataclasses
import logging
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..embeddings import Embeddings
from ..errors import ConfigError, EncoderError, kind_of
from .attention import PACKED, plain_mode
from .forward import BatchedForward
from .freezing import warn_of_half
from .layers import begin_at, begun_with, unroll
from .own_model import own_copy
from .probe import batch_of, probe_texts, worst_error
from .row_forward import RowForward
from .uncompiled import uncompiled

logger = logging.getLogger(__name__)


class UpperEncoder(RowForward):
    """The upper layers of an encoder and its output; `Encoder.split` makes it.

        lower, upper = encoder.split(at=4)
        for batch in bertstream.stream(shards, lower, cache=cache):
            vectors = upper(batch["text"])  # Embeddings as from the whole encoder, with gradients

    Its parameters are those of its layers, shared with the encoder that was split; all are trained until
    `requires_grad_(False)`. It is in eval mode until `train()`, like a model that transformers loads.

    Args:
        model: the encoder's model, with a structure and config of its own.
        at: the layer whose hidden states the lower half gives.
        whole: the encoder.
    """

    def __init__(self, model: nn.Module, at: int, whole: BatchedForward) -> None:
        unroll(model)
        begin_at(model, at, keep_pooler="pooler" in whole.pooling)
        if whole.batching.packs:
            cast(Any, model).set_attn_implementation(PACKED)
        batching = dataclasses.replace(whole._batching, way="packed") if whole.batching.packs else whole._batching
        super().__init__(model, whole.spec, batching, whole._num_layers, whole._size.copied())
        self.at = at
        self.eval()

    @uncompiled
    def forward(self, vectors: Embeddings) -> Embeddings:
        """Continue a batch that the lower half encoded.

        Args:
            vectors: the lower half's, on any device and of any precision, from a loader, a cache or a call.
        Returns:
            The whole encoder's output for these texts, on the device of the upper half, in the caller's grad mode and
            autocast, with dropout in train mode.
        Raises:
            EncoderError: the vectors are not the lower half's, or the texts do not fit the output.
        """
        if not isinstance(vectors, Embeddings):
            raise EncoderError(
                f"the upper half takes Embeddings of the lower half, not {kind_of(vectors)}: leave layout= "
                "out of the lower half's loader, and pass texts through the lower half first"
            )
        right = (vectors.tokens.num_tokens, self._hidden_size)
        if vectors.output != "tokens" or vectors.values.shape != right or vectors.layers not in ((), (self.at,)):
            raise EncoderError(
                f"the upper half takes one row a token as encoder.split(at={self.at}) gives them, {list(right)} of "
                f"layer {self.at}; these are {vectors.output} vectors {list(vectors.values.shape)} of layers "
                f"{vectors.layers}: use the lower half of the same split"
            )
        self._check_marks(vectors.tokens)
        found = self._vectors(vectors.tokens, vectors.values.to(self.device, self.dtype))
        return dataclasses.replace(found, finder=vectors.finder)

    def extra_repr(self) -> str:
        """The settings that `print(upper)` shows beside the model."""
        return f"at={self.at}, output={self.output!r}, layers={self.layers}, {self.batching.way}"

    def _run(self, given: Tensor | None, **inputs: Any) -> list[Tensor]:
        assert given is not None
        with begun_with(self.model, given):
            found = super()._run(None, **inputs)
        return [given if layer == self.at else states for layer, states in zip(self.layers, found, strict=True)]


def cannot_split(model: nn.Module, at: int) -> ConfigError:
    """The error for a model that cannot be split; its cause names other arguments than `at`."""
    return ConfigError(
        f"split(at={at}): {type(model).__name__} cannot be split, because its layers do not run one by one from "
        f"layer {at} on; train it whole, with unfreeze()"
    )


def upper_half(at: int, whole: BatchedForward, lower: BatchedForward) -> UpperEncoder:
    """Make the upper half of an encoder, compare both halves with the whole, and train the upper one.

    Args:
        at: the layer whose hidden states the lower half gives.
        whole: the encoder.
        lower: its lower half.
    Raises:
        ConfigError: the model cannot be split, or its halves are not right.
    """
    try:
        upper = UpperEncoder(own_copy(whole.model), at, whole)
        batch = batch_of(probe_texts(whole.model))
        with plain_mode(whole.device):
            right = whole._token_vectors(batch, None, None)
            (given,) = lower._token_vectors(batch, None, None)
            found = upper._token_vectors(batch, given.to(upper.dtype), None)
    except Exception as error:  # whatever a model does that has no plain list of layers
        raise cannot_split(whole.model, at) from error
    lengths = batch.lengths.tolist()
    worst = max(worst_error(a.split(lengths), b.split(lengths)) for a, b in zip(found, right, strict=True))
    if not worst <= (1e-5 if whole.dtype == torch.float32 else 1e-2):
        raise ConfigError(
            f"split(at={at}): the halves of this {type(whole.model).__name__} differ from the whole (relative L2 error "
            f"{worst:.1e}); train it whole, with unfreeze()"
        )
    _keep_apart(lower, upper)
    upper.requires_grad_(True)
    warn_of_half(upper.parameters())
    return upper


def _keep_apart(lower: BatchedForward, upper: BatchedForward) -> None:
    """Give the lower half a copy of the parameters that both halves use, because training changes the upper half's."""
    uppers = {id(parameter) for parameter in upper.parameters()}
    lowers = {id(parameter): parameter for parameter in lower.parameters()}
    if uppers.isdisjoint(lowers):
        return
    logger.warning(
        "both halves of %s use %d of its parameters: the lower half keeps their present values, the upper half "
        "trains them, and the trained upper half fits this lower half only",
        type(lower.model).__name__,
        len(uppers & lowers.keys()),
    )
    alone: Any = {key: parameter for key, parameter in lowers.items() if key not in uppers}
    lower.model = copy.deepcopy(lower.model, alone)
