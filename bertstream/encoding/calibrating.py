"""An encoder that measures how many tokens of one forward are fastest."""

from __future__ import annotations

import logging
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F

from ..tokens import batch_of_ids
from . import onednn
from .attention import plain_mode
from .autotune import TRIED_TOKENS, fastest_forward_tokens, is_faster
from .forward_size import FORWARD_TOKENS
from .freezing import FreezableForward

logger = logging.getLogger(__name__)


class CalibratedForward(FreezableForward):
    """A `FreezableForward` that finds the size of its forwards, and on a CPU the layout of its weights, by trying."""

    _products_chosen = False

    def calibrate(self) -> int:
        """Measure how many tokens of one forward are fastest on this device: once, and only if the user gave no number.

        On a CPU the feed-forward products of one layer are timed, on CUDA whole forwards, for about a second plus the
        slowest of them. On a CPU it also measures whether copies of the weights in oneDNN's own layout are faster, and
        uses them if so, which takes half a second, and memory for the weights of all layers.

        A loader calls it at its start, unless it is deterministic or the encoder is trained.

        Returns:
            `max_forward_tokens`, as it is from now on.
        """
        tried = TRIED_TOKENS.get(self.device.type) if not self.trainable else None
        if tried is not None and self._size.is_open(self.device):
            run = self._feed_forward() if self.device.type == "cpu" else self._dummy_forward
            with self._weights():
                found = fastest_forward_tokens(tried, run, self.device, FORWARD_TOKENS[self.device.type])
            self._size.measured[self.device] = found
            logger.info("forwards of %d tokens are fastest on %s", found, self.device)
        if self.device.type == "cpu" and not self.trainable and not self._products_chosen:
            self._choose_products()
        return self.max_forward_tokens

    def _choose_products(self) -> None:
        self._products_chosen = True
        with self._weights():
            fused = self._fused
            if fused is None or not max(self.layers) or not onednn.available(self.dtype) or not fused.ready(self.model):
                return
            rows = self._most_tokens(None)
            blocked, plain = (fused.products_of_a_layer(rows, blocked=blocked) for blocked in (True, False))
            if is_faster(blocked, plain):
                fused.use_blocked_weights(rows)
                logger.info("products with weights in oneDNN's layout are faster on this CPU")

    def _feed_forward(self) -> Callable[[int], object]:
        size = self._hidden_size
        up = torch.zeros(4 * size, size, dtype=self.dtype, device="cpu")
        rows = torch.zeros(max(TRIED_TOKENS["cpu"]), size, dtype=self.dtype, device="cpu")
        return lambda tokens: F.linear(F.gelu(F.linear(rows[:tokens], up)), up.T)

    def _dummy_forward(self, tokens: int) -> object:
        lengths = np.full(tokens // 32, 32, np.int32)
        ids = np.zeros(32 * len(lengths), np.int32)
        batch = batch_of_ids(ids, lengths)
        with plain_mode(self.device):
            return self._chosen_forward()(batch, np.arange(len(ids)), lengths, None)
