"""BERT inside a model: what stands where `nn.Embedding` stood, frozen or trained."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from .embeddings import Embeddings, Layout
from .encoding.encoder import Encoder
from .errors import ConfigError, EncoderError, check_choice
from .system.distributed import can_talk
from .tokens import Text, TokenBatch

logger = logging.getLogger(__name__)


class BertEmbedding(nn.Module):
    """Texts to vectors inside a model, with gradients where the encoder was unfrozen.

    It takes what a loader of the same encoder hands out, whether that is encoded (`Embeddings`, which pass as they are)
    or not (`TokenBatch`, once the encoder is trained), so one training script serves both.

    Args:
        encoder: frozen until `encoder.unfreeze()`. Its parameters are this module's: in `parameters()`, the state dict
            and `.to()`.
        layout: None gives `Embeddings`; "padded", "nested", "packed_sequence" or "flat" give plain tensors, as for
            `bertstream.wrap`, so that it stands in an `nn.Sequential`.
    Raises:
        ConfigError: an argument is out of range.
    """

    _said = False

    def __init__(self, encoder: Encoder, layout: Layout | None = None) -> None:
        super().__init__()
        if not isinstance(encoder, Encoder):
            raise ConfigError(f"encoder is a {type(encoder).__name__}: pass a bertstream.Encoder")
        if layout is not None:
            check_choice("layout", layout, Layout)
        self.encoder = encoder
        self.layout = layout

    @property
    def embedding_dim(self) -> int:
        """H, the size of the vectors; the name that `nn.Embedding` uses."""
        return self.encoder.embedding_dim

    def forward(self, texts: Sequence[Text] | TokenBatch | Embeddings) -> Any:
        """Embed strings, lists of words, pairs, or a `TokenBatch`; `Embeddings` of this encoder pass as they are.

        Returns:
            `Embeddings`, or what `layout` says. Packed as in a loader; where the encoder was unfrozen, with gradients,
            in the caller's autocast, and with dropout in train mode.
        Raises:
            EncoderError: as `Encoder.encode`; or the `Embeddings` are of another output, other layers or size.
        """
        if isinstance(texts, Embeddings):
            found = texts
            self._check_own(found)
        else:
            self._warn_of_gradients_that_do_not_flow()
            found = self.encoder(texts)
        return found if self.layout is None else found.as_layout(self.layout)

    def _check_own(self, found: Embeddings) -> None:
        own = self.encoder
        right = own.output, own.layers, own.row_shape
        seen = found.output, found.layers or own.layers, tuple(found.values.shape[1:])
        if seen != right:
            raise EncoderError(
                f"these are Embeddings of another encoder: (output, layers, shape of a row) are {seen}, of this one "
                f"{right}; give the loader and the BertEmbedding the same"
            )

    def _warn_of_gradients_that_do_not_flow(self) -> None:
        """Once: `requires_grad_` of a module around this one reaches the parameters, and not the encoder."""
        if self._said or self.encoder.trainable or not torch.is_grad_enabled():
            return
        if any(parameter.requires_grad for parameter in self.encoder.parameters()):
            self._said = True
            logger.warning(
                "parameters of the encoder require gradients, but it is frozen, so none flow: call encoder.unfreeze() "
                "to train it, or encoder.freeze() to say that it is not trained"
            )


class UnfreezeSchedule:
    """Unfreezes an encoder as training goes on: all at once, or layer by layer from the top.

        schedule = UnfreezeSchedule(encoder, start=1)
        for epoch in range(4):
            schedule.set(epoch)  # frozen in epoch 0, trained from epoch 1 on
            ...

    A DistributedDataParallel averages the parameters that were trained when it was made, and no others: make it anew
    after each call of `set` that changes something.

    Args:
        encoder: is frozen until `start`.
        start: the epoch, or step, whatever `set` counts, at which the first layers are unfrozen.
        every: after so many more epochs, or steps, one more layer is unfrozen; None unfreezes all at `start`.
    Raises:
        ConfigError: an argument is out of range.
    """

    def __init__(self, encoder: Encoder, start: int = 1, every: int | None = None) -> None:
        if not isinstance(encoder, Encoder):
            raise ConfigError(f"encoder is a {type(encoder).__name__}: pass a bertstream.Encoder")
        if start < 0:
            raise ConfigError(f"start={start}: write a number of at least 0")
        if every is not None and every < 1:
            raise ConfigError(f"every={every}: write a number of at least 1, or None for all layers at once")
        self._encoder = encoder
        self._start = start
        self._every = every
        self._now: int | None = -1  # layers that are trained; None for everything
        self._said = False
        self._layers = len(encoder.parameter_groups(0.0)) - 1

    def set(self, number: int) -> None:
        """Say which epoch, or step, begins; a run that goes on from a checkpoint says it likewise."""
        layers: int | None = 0
        if number >= self._start:
            layers = None if self._every is None else 1 + (number - self._start) // self._every
            layers = None if layers is None or layers > self._layers else layers
        if layers == self._now and self._encoder.trainable == (layers != 0):  # nor was it frozen in between
            return
        self._now = layers
        if layers == 0:
            self._encoder.freeze()
        else:
            self._encoder.unfreeze(layers)
        said = "everything" if layers is None else f"{layers} of {self._layers} layers"
        logger.info("from %d on %s of the encoder is trained", number, said)
        if layers != 0 and can_talk() and not self._said:
            self._said = True
            logger.warning(
                "a DistributedDataParallel that was made before parameters were unfrozen does not average them over "
                "ranks: make it anew after each set() that changes something"
            )
