"""Vectors that are not finite: a float16 forward overflowed, or the weights hold NaN."""

from __future__ import annotations

import logging

import numpy as np
import torch
from torch import Tensor

from ..embeddings import Embeddings
from ..errors import EncoderError, shortened
from ..tokens import Int32Array, TokenBatch, cumulate

logger = logging.getLogger(__name__)


def texts_not_finite(values: Tensor, row_counts: Int32Array) -> list[int]:
    """The texts that have a number that is not finite; the host waits for the device of `values`.

    A row's sum shows it, and takes a twentieth of the time of `isfinite` on a CPU.

    Args:
        values: [N, ...] rows.
        row_counts: [B] rows of each text.
    """
    sums = values.detach().flatten(1).sum(1, dtype=torch.promote_types(values.dtype, torch.float32))
    rows = np.flatnonzero(~sums.isfinite().cpu().numpy())
    return list(map(int, np.unique(np.searchsorted(cumulate(row_counts)[1:], rows, "right"))))


def named(texts: list[int], batch: TokenBatch) -> str:
    """How many texts of a batch, and the first of them, for a message; by its ids where its text was not kept."""
    first = texts[0]
    ids = batch.input_ids[slice(*batch.cu_seqlens[first : first + 2])].tolist()
    shown = shortened(ids if batch.texts is None else batch.texts[first])
    return f"{len(texts)} of {len(batch)} texts, the first of which is number {first}, {shown}"


class FiniteCheck:
    """Looks at an encoder's vectors where that is nearly free: on a CPU, and of float16 at the first batch.

    On CUDA the host would wait for each forward.
    """

    _saw_half = _warned = False

    def __call__(self, found: Embeddings, dtype: torch.dtype) -> None:
        """Check a batch; the log names the first texts that are not finite, once.

        Args:
            found: the batch.
            dtype: of the forward.
        Raises:
            EncoderError: it is the first batch in float16, and not finite.
        """
        first_half = dtype == torch.float16 and not self._saw_half
        if not len(found.values) or not (first_half or found.values.device.type == "cpu"):
            return
        texts = texts_not_finite(found.values, found.lengths.numpy())
        if texts and first_half:
            raise EncoderError(
                "the first float16 batch holds values that are not finite: this model overflows in float16, ask for "
                "dtype='bfloat16' or 'float32'"
            )
        self._saw_half = self._saw_half or first_half
        if texts and not self._warned:
            self._warned = True
            logger.warning(
                "vectors are not finite in %s (said once): %s; look at the model's weights, of these tokens too, or "
                "ask for a dtype and output_dtype of a wider range. Texts of the same forward may become so with them",
                str(dtype).removeprefix("torch."),
                named(texts, found.tokens),
            )
