"""BERT as a layer inside a model, in place of `nn.Embedding`: frozen or trained."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from .embeddings import Embeddings, Layout
from .encoding.encoder import Encoder
from .errors import ConfigError, EncoderError, check_at_least, check_choice, kind_of
from .system.distributed import can_talk
from .tokens import Text, TokenBatch

logger = logging.getLogger(__name__)


class BertEmbedding(nn.Module):
    """Turns texts into vectors inside a model, with gradients once the encoder is unfrozen.

    It also takes what a loader of the same encoder yields: `Embeddings`, which pass unchanged, or a `TokenBatch` while
    the encoder is trained. So one training script serves both.

    Args:
        encoder: frozen until `encoder.unfreeze()`. Its parameters are part of this module: in `parameters()`, the state
            dict and `.to()`.
        layout: None returns `Embeddings`; "padded", "nested", "packed_sequence" or "flat" return plain tensors, as for
            `bertstream.wrap`, for use in an `nn.Sequential`.
    Raises:
        ConfigError: an argument is out of range.
    """

    _said = False

    def __init__(self, encoder: Encoder, layout: Layout | None = None) -> None:
        super().__init__()
        if not isinstance(encoder, Encoder):
            raise ConfigError(f"encoder is {kind_of(encoder)}: pass a bertstream.Encoder")
        if layout is not None:
            check_choice("layout", layout, Layout)
        self.encoder = encoder
        self.layout = layout

    @property
    def embedding_dim(self) -> int:
        """H, the size of the vectors, under the name that `nn.Embedding` uses."""
        return self.encoder.embedding_dim

    def forward(self, texts: Sequence[Text] | TokenBatch | Embeddings) -> Any:
        """Embed strings, lists of words, pairs, or a `TokenBatch`; `Embeddings` of this encoder pass unchanged.

        Returns:
            `Embeddings`, or the tensors of `layout`. Once the encoder is unfrozen: with gradients, in the caller's
            autocast, and with dropout in train mode.
        Raises:
            ConfigError: `texts` is none of these.
            EncoderError: as for `Encoder.encode`; or the `Embeddings` have another output, other layers or size.
        """
        if isinstance(texts, Embeddings):
            found = texts
            self._check_own(found)
        else:
            self._warn_of_missing_gradients()
            found = self.encoder(texts)
        return found if self.layout is None else found.as_layout(self.layout)

    def _check_own(self, found: Embeddings) -> None:
        own = self.encoder
        right = own.output, own.layers, own.row_shape
        seen = found.output, found.layers or own.layers, tuple(found.values.shape[1:])
        if seen != right:
            raise EncoderError(
                f"these are Embeddings of another encoder: (output, layers, shape of a row) are {seen}, this encoder's "
                f"are {right}; use one encoder for the loader and the BertEmbedding"
            )

    def _warn_of_missing_gradients(self) -> None:
        """Warn once: `requires_grad_` of a surrounding module reaches the parameters but does not unfreeze."""
        if self._said or self.encoder.trainable or not torch.is_grad_enabled():
            return
        if any(parameter.requires_grad for parameter in self.encoder.parameters()):
            self._said = True
            logger.warning(
                "parameters of the encoder require gradients, but it is frozen, so none flow: call encoder.unfreeze() "
                "to train it, or encoder.freeze() to keep it frozen"
            )


class UnfreezeSchedule:
    """Unfreezes an encoder during training: all layers together, or one by one from the top.

        schedule = UnfreezeSchedule(encoder, start=1)
        for epoch in range(4):
            schedule.set(epoch)  # frozen in epoch 0, trained from epoch 1
            ...

    DistributedDataParallel averages only the parameters that were trainable when it was made: make a new one after each
    `set` that changes something.

    Args:
        encoder: frozen until `start`.
        start: the number given to `set` (an epoch or a step) at which the first layers are unfrozen.
        every: epochs or steps from one layer to the next; None unfreezes all at `start`.
    Raises:
        ConfigError: an argument is out of range.
    """

    def __init__(self, encoder: Encoder, start: int = 1, every: int | None = None) -> None:
        if not isinstance(encoder, Encoder):
            raise ConfigError(f"encoder is {kind_of(encoder)}: pass a bertstream.Encoder")
        check_at_least("start", start, 0)
        if every is not None:
            check_at_least("every", every, 1)
        self._encoder = encoder
        self._start = start
        self._every = every
        self._now: int | None = -1  # trained layers; None means all parameters
        self._said = False
        self._layers = len(encoder.parameter_groups(0.0)) - 1

    def set(self, number: int) -> None:
        """Apply the schedule for the epoch or step that begins; call it after loading a checkpoint too."""
        layers: int | None = 0
        if number >= self._start:
            layers = None if self._every is None else 1 + (number - self._start) // self._every
            layers = None if layers is None or layers > self._layers else layers
        if layers == self._now and self._encoder.trainable == (layers != 0):  # not frozen or unfrozen elsewhere
            return
        self._now = layers
        if layers == 0:
            self._encoder.freeze()
        else:
            self._encoder.unfreeze(layers)
        part = "everything" if layers is None else f"{layers} of {self._layers} layers"
        logger.info("from %d on, %s of the encoder is trained", number, part)
        if layers != 0 and can_talk() and not self._said:
            self._said = True
            logger.warning(
                "a DistributedDataParallel made before parameters were unfrozen does not average them over ranks: make "
                "a new one after each set() that changes something"
            )
