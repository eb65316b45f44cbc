"""From token vectors to the vectors that were asked for.

Shapes: B texts, N tokens in all, H hidden size.
"""

from __future__ import annotations

import torch
from torch import Tensor


def mean_pool(values: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Average each text's token vectors, special tokens included.

    Args:
        values: [N, H] floating point, any device.
        cu_seqlens: [B + 1] int32, same device; text i owns rows cu_seqlens[i]:cu_seqlens[i + 1].
    Returns:
        [B, H] float32, summed in float32; a text without a token gives zeros.
    Source: Reimers and Gurevych 2019 (Sentence-BERT), section 3, MEAN strategy.
    """
    sums = torch.segment_reduce(values.float(), "sum", offsets=cu_seqlens.to(torch.int64), axis=0, unsafe=True)
    return sums / cu_seqlens.diff().clamp(min=1)[:, None]
