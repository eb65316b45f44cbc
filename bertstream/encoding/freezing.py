"""Which parameters of an encoder are trained, and which of its modules are in train mode."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import TypeVar

import torch
from torch import nn

from ..errors import ConfigError, check_at_least
from .fingerprint import note_training
from .layers import known_layers, layer_list
from .row_forward import RowForward

logger = logging.getLogger(__name__)

Self = TypeVar("Self", bound="FreezableForward")


class FreezableForward(RowForward):
    """A `RowForward` that is frozen until `unfreeze`, and in eval mode wherever it is frozen.

    Attributes:
        trainable: whether it was unfrozen.
        times_frozen: how often it was frozen; vectors from before the last time may be of other weights.
    """

    trainable = False
    times_frozen = 0
    _mode = False  # what train() was last called with
    _warned_of_half = False

    def train(self: Self, mode: bool = True) -> Self:
        """Set the mode of trained parameters; frozen layers stay in eval mode, without dropout."""
        self._mode = mode
        super().train(False)
        self.training = mode and self.trainable
        if self.training:
            if any(parameter.requires_grad for parameter in self._layer_parameters()[-1]):
                self.model.train()
            for layer in known_layers(self.model):
                layer.train(any(parameter.requires_grad for parameter in layer.parameters()))
        return self

    def requires_grad_(self: Self, requires_grad: bool = True) -> Self:
        """As in torch, for all parameters; `unfreeze` leaves out the unused ones."""
        if not requires_grad:
            nn.Module.train(self, False)  # before another thread encodes again
        with self._weights():  # later encoding sees all that optimizers have queued
            super().requires_grad_(requires_grad)
            self.trainable = requires_grad
            self.times_frozen += not requires_grad
        return self.train(self._mode)

    def freeze(self: Self) -> Self:
        """Stop training all parameters; from here on vectors may be cached."""
        note_training(self.parameters())  # also frozen ones, which may have been written through `.data`
        return self.requires_grad_(False)

    def unfreeze(self: Self, layers: int | None = None, *, parameters: Iterable[nn.Parameter] | None = None) -> Self:
        """Train these parameters, and no others, until `freeze` is called.

        Loaders of this encoder then yield `TokenBatch`es, also for batches that were encoded ahead, and use no cache.
        Put the encoder into a `BertEmbedding` to get vectors with gradients. After `train()`, called before or after
        this, the trained layers have dropout.

        A DistributedDataParallel averages only the parameters that required gradients when it was made: make it again
        afterwards.

        Args:
            layers: how many of the used layers to train, from the top (with a pooler in use); 0 is none. None is all of
                them, and the parameters outside the layers, such as the embedding layer.
            parameters: train these instead, those of an adapter for example.
        Raises:
            ConfigError: `layers` is no number, or there are fewer; or the parameters are none or not this encoder's.
        """
        if parameters is None:
            groups = self._layer_parameters()
            if layers is not None:
                check_at_least("layers", layers, 0)
            if layers:
                layer_list(self.model)  # says what to do where the layers are not known
            if layers is not None and layers >= len(groups):
                raise ConfigError(f"layers={layers}: {len(groups) - 1} layers are used; None is all of them and more")
            chosen = [p for group in groups[: None if layers is None else layers] for p in group]
        else:
            chosen = list(parameters)
            own = {id(parameter) for parameter in self.parameters()}
            foreign = sum(id(parameter) not in own for parameter in chosen)
            if layers is not None:
                raise ConfigError(f"layers={layers} and parameters=: give one of them")
            if not chosen or foreign:
                raise ConfigError(
                    f"parameters= holds {len(chosen)}, {foreign} of them not this encoder's: choose from "
                    "encoder.parameters(). They do not include the layers above layers=, and are copies if dtype= or "
                    "device= differ from the model's"
                )
        self.requires_grad_(False)
        note_training(chosen)
        with self._weights():  # optimizers' work from here on waits for all earlier encoding
            for parameter in chosen:
                parameter.requires_grad_(True)
            self.trainable = bool(chosen)
        self._warned_of_half = self._warned_of_half or warn_of_half(chosen)
        return self.train(self._mode)


def warn_of_half(trained: Iterable[nn.Parameter]) -> bool:
    """Warn if parameters in half precision will be trained: small steps are rounded away.

    Returns:
        Whether there are any.
    """
    half = {parameter.dtype for parameter in trained} & {torch.bfloat16, torch.float16}
    for dtype in half:
        logger.warning(
            "parameters are trained in %s, where a step that is small beside the weight is rounded away: AdamW at "
            "2e-5 left 7 of 8 bfloat16 weights unchanged. Make the encoder with dtype='float32' and train it under "
            "torch.autocast",
            str(dtype).removeprefix("torch."),
        )
    return bool(half)
