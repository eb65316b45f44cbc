"""The Triton kernels that `kernels` launches; imported by its first launch only, because Triton is optional.

Names in capitals are known when a kernel is compiled; one of them that changes costs a compilation, others do not.
Offsets of rows are computed in 64 bits: N x width exceeds 2^31 in large forwards. All arithmetic is in float32.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["rows"])
def add_norm(
    x, residual, weight, bias, total, out, rows, eps, HIDDEN: tl.constexpr, PADDED: tl.constexpr, ROWS: tl.constexpr,
    RMS: tl.constexpr,
):  # fmt: skip
    """Norm of x + residual [rows, HIDDEN], ROWS rows a program; `residual`, `bias` and `total` may be None."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, PADDED)
    known = column < HIDDEN
    inside = (row < rows)[:, None] & known[None, :]
    at = row[:, None] * HIDDEN + column[None, :]
    value = tl.load(x + at, inside, 0.0).to(tl.float32)
    if residual is not None:
        value += tl.load(residual + at, inside, 0.0).to(tl.float32)
    if total is not None:
        tl.store(total + at, value, inside)
    if not RMS:
        mean = tl.sum(value, 1) / HIDDEN
        value = tl.where(inside, value - mean[:, None], 0.0)
    scale = 1.0 / tl.sqrt(tl.sum(value * value, 1) / HIDDEN + eps)
    value = value * scale[:, None] * tl.load(weight + column, known, 0.0).to(tl.float32)[None, :]
    if bias is not None:
        value += tl.load(bias + column, known, 0.0).to(tl.float32)[None, :]
    tl.store(out + at, value, inside)


@triton.jit(do_not_specialize=["cu_seqlens", "tiles"])
def attend(
    qkv, cu_seqlens, tiles, out, scale, HEADS: tl.constexpr, KV_HEADS: tl.constexpr, HEAD: tl.constexpr,
    PADDED: tl.constexpr, WINDOW: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Attention of one query head over ROWS rows of one text, by blocks of COLUMNS keys; a WINDOW of 0 is none."""
    # The heads of a tile are neighbours, because they read neighbouring memory.
    tile = tl.program_id(0) // HEADS
    head = tl.program_id(0) % HEADS
    text = tl.load(tiles + 2 * tile)
    first = tl.load(tiles + 2 * tile + 1)
    start = tl.load(cu_seqlens + text)
    length = tl.load(cu_seqlens + text + 1) - start

    width: tl.constexpr = (HEADS + 2 * KV_HEADS) * HEAD
    row = tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)
    d = tl.arange(0, PADDED)
    known = d < HEAD
    mine = (first + row < length)[:, None] & known[None, :]
    query = qkv + (start + first).to(tl.int64) * width + head * HEAD
    q = tl.load(query + row[:, None] * width + d[None, :], mine, 0.0)
    key = qkv + start.to(tl.int64) * width + (HEADS + head // (HEADS // KV_HEADS)) * HEAD

    begin = 0
    end = length
    if WINDOW > 0:
        begin = tl.maximum(first - WINDOW + 1, 0)
        end = tl.minimum(first + ROWS + WINDOW - 1, length)
        key += begin.to(tl.int64) * width
    to_log2 = scale * 1.4426950408889634
    # Hidden scores are finite, not -inf: a row that sees nothing of a block would compute inf - inf. What such a row
    # sums up before the first key it sees is multiplied by exp2(-1e30) = 0 there.
    best = tl.full((ROWS,), -1e30, tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    sums = tl.zeros((ROWS, PADDED), tl.float32)
    for at in range(begin, end, COLUMNS):
        there = at + column < end
        k = tl.load(key + column[None, :] * width + d[:, None], there[None, :] & known[:, None], 0.0)
        scores = tl.dot(q, k, input_precision="ieee") * to_log2
        seen = there[None, :]
        if WINDOW > 0:
            apart = (first + row)[:, None] - (at + column)[None, :]
            seen = seen & (apart < WINDOW) & (apart > -WINDOW)
        scores = tl.where(seen, scores, -1e30)
        higher = tl.maximum(best, tl.max(scores, 1))
        weights = tl.exp2(scores - higher[:, None])
        shrink = tl.exp2(best - higher)
        total = total * shrink + tl.sum(weights, 1)
        v = tl.load(key + KV_HEADS * HEAD + column[:, None] * width + d[None, :], there[:, None] & known[None, :], 0.0)
        sums = tl.dot(weights.to(v.dtype), v, sums * shrink[:, None], input_precision="ieee")
        best = higher
        key += COLUMNS * width
    into = out + (start + first).to(tl.int64) * (HEADS * HEAD) + head * HEAD
    tl.store(into + row[:, None] * (HEADS * HEAD) + d[None, :], sums / total[:, None], mine)


@triton.jit(do_not_specialize=["rows"])
def gate(
    x, out, rows, INNER: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr, ACTIVATION: tl.constexpr,
    UP_FIRST: tl.constexpr,
):  # fmt: skip
    """ACTIVATION(gate) * up of x [rows, 2 * INNER], ROWS x COLUMNS values a program."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = (row < rows)[:, None] & (column < INNER)[None, :]
    at = row[:, None] * (2 * INNER) + column[None, :]
    if UP_FIRST:
        up = tl.load(x + at, inside, 0.0).to(tl.float32)
        g = tl.load(x + at + INNER, inside, 0.0).to(tl.float32)
    else:
        g = tl.load(x + at, inside, 0.0).to(tl.float32)
        up = tl.load(x + at + INNER, inside, 0.0).to(tl.float32)
    if ACTIVATION == "gelu":
        active = 0.5 * g * (1.0 + tl.erf(g * 0.7071067811865476))
    elif ACTIVATION == "gelu_tanh":
        # 0.5 * (1 + tanh(t)) is the sigmoid of 2 t.
        active = g / (1.0 + tl.exp(-1.5957691216057308 * g * (1.0 + 0.044715 * g * g)))
    else:
        active = g / (1.0 + tl.exp(-g))
    tl.store(out + row[:, None] * INNER + column[None, :], active * up, inside)


@triton.jit(do_not_specialize=["pairs"])
def rotate(
    qkv, cos, sin, pairs, HEADS: tl.constexpr, WIDTH: tl.constexpr, HEAD: tl.constexpr, HALF: tl.constexpr,
    PADDED: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Rotate, in place, the first 2 * HALF values of the first HEADS heads in each row of qkv [N, WIDTH].

    A program has ROWS pairs of a token and a head.
    """
    pair = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    token = (pair // HEADS).to(tl.int64)[:, None]
    head = (pair % HEADS)[:, None]
    column = tl.arange(0, PADDED)[None, :]
    inside = (pair < pairs)[:, None] & (column < HALF)
    lower = qkv + token * WIDTH + head * HEAD + column
    angle = token * (2 * HALF) + column
    a = tl.load(lower, inside, 0.0).to(tl.float32)
    b = tl.load(lower + HALF, inside, 0.0).to(tl.float32)
    cos_a = tl.load(cos + angle, inside, 0.0).to(tl.float32)
    sin_a = tl.load(sin + angle, inside, 0.0).to(tl.float32)
    cos_b = tl.load(cos + angle + HALF, inside, 0.0).to(tl.float32)
    sin_b = tl.load(sin + angle + HALF, inside, 0.0).to(tl.float32)
    tl.store(lower, a * cos_a - b * sin_a, inside)
    tl.store(lower + HALF, b * cos_b + a * sin_b, inside)
