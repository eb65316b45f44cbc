"""Packed forwards as CUDA graphs: one launch where there were hundreds, and the GIL left to the training loop.

A graph replays fixed shapes in fixed memory. So the tokens of a forward, its texts and its longest text are rounded up
to a few sizes, and what is left over is filled with texts of padding: rows that no text covered would be computed from
whatever was in memory before.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from .attention import Packing, worst_error
from .cuda import GraphPool, InTurn, to_device
from .errors import EncoderError
from .fingerprint import weights_state
from .types import Int32Array, cumulate

logger = logging.getLogger(__name__)

Int64Array: TypeAlias = npt.NDArray[np.int64]

MOST_GRAPHS = 64
"""Shapes beyond so many run without a graph: letting one go for another could end in a capture for each forward."""


class Shape(NamedTuple):
    """What a graph is captured for; a forward that it fits has as much of each, or less.

    Attributes:
        tokens: T.
        texts: that begin at an offset of their own, those of padding and empty ones included.
        longest: tokens of the longest text.
        names: of the inputs.
    """

    tokens: int
    texts: int
    longest: int
    names: tuple[str, ...]

    @classmethod
    def around(cls, lengths: Int32Array, names: Iterable[str]) -> Shape:
        """The shape for texts of these lengths; above 256 tokens it has an eighth more of them at most."""
        held = int(lengths.sum())
        tokens = _rounded_up(max(256, held), 8)
        longest = _rounded_up(max(16, int(lengths.max())), 1)
        padding = -(-(tokens - held) // longest)
        return cls(tokens, _rounded_up(max(16, len(lengths) + padding), 1), longest, tuple(names))

    def offsets(self, lengths: Int32Array) -> Int32Array:
        """[texts + 1] where these texts begin, behind them those of padding, and empty ones at the end."""
        found = np.full(self.texts + 1, self.tokens, np.int32)
        found[: len(lengths) + 1] = cumulate(lengths)
        padding = np.arange(found[len(lengths)], self.tokens, self.longest)
        found[len(lengths) : len(lengths) + len(padding)] = padding
        return found


class GraphedForward:
    """Packed forwards of a frozen model, replayed where there is a graph for their shape.

    A shape without one is noted, and captured by the next call of `capture`. That belongs into the thread of the
    training loop: while anything is captured no thread may wait for the whole device, as `torch.cuda.synchronize()` in
    a training step does. A graph's first replay is compared with the forward that it was captured from; where that
    raises, or the two differ, graphs are given up for good, and the log says why. For one thread at a time.

    Args:
        model: the graphs read its weights where they lie, and are let go when others are there.
    Attributes:
        wanted: shapes to be captured, with a value of each input that the model takes.
        given_up: why there are no graphs; empty while there may be.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.given_up = ""
        self._weights: object = None
        self._begin(0)

    def _begin(self, capacity: int) -> None:
        """Take memory for forwards of so many tokens; the graphs over other memory are let go."""
        self._device = next(self.model.parameters()).device
        self._capacity = capacity
        self._replays: dict[Shape, Callable[[], object]] = {}
        self.wanted: dict[Shape, dict[str, Int64Array]] = {}
        self._pool: GraphPool | None = None
        self._turns = InTurn(self._device)
        self._inputs: dict[str, Tensor] = {}
        # A shape has at most as many texts as tokens, rounded up to a power of two.
        self._offsets = torch.zeros(2 * capacity + 1, dtype=torch.int32, device=self._device)
        self._outputs: list[Tensor] = []

    @property
    def captured(self) -> int:
        """How many graphs there are."""
        return len(self._replays)

    def run(self, inputs: Mapping[str, Int64Array], lengths: Int32Array, most: int) -> list[Tensor] | None:
        """One forward, on the current stream.

        Args:
            inputs: [N] each, by the names that the model's forward has for them.
            lengths: of the texts, N tokens in all.
            most: tokens of the largest forward that is to be expected: memory for it is taken at once.
        Returns:
            [N, H] for each wanted layer, in memory of their own; None where this forward has to run without a graph.
        """
        weights = weights_state(self.model)
        if self.given_up or weights is None:
            self._let_go()
            return None
        shape = Shape.around(lengths, inputs)
        if weights != self._weights or shape.tokens > self._capacity:
            self._begin(max(shape.tokens, _rounded_up(most, 8)))
            self._weights = weights
        replay = self._replays.get(shape)
        if replay is None:
            if len(self._replays) + len(self.wanted) < MOST_GRAPHS:
                self.wanted[shape] = {name: values[:1] for name, values in inputs.items()}
            return None
        tokens = int(lengths.sum())
        with self._turns.use(self._offsets, *self._inputs.values(), *self._outputs):
            self._fill(shape, inputs, lengths)
            replay()
            return [out[0, :tokens].clone() for out in self._outputs]

    def capture(self, forward: Callable[..., list[Tensor]]) -> None:
        """Capture one of the shapes that are wanted, if there is any; the device is waited for.

        Args:
            forward: from the inputs, each [1, T], and a `Packing` without lengths to [1, T, H] for each wanted layer.
        """
        if not self.wanted or weights_state(self.model) != self._weights:
            return
        shape = next(iter(self.wanted))
        values = self.wanted.pop(shape)
        with self._turns.use(self._offsets, *self._inputs.values(), *self._outputs):
            self._fill(shape, values, np.array([min(shape.longest, shape.tokens)], np.int32))
            reason = self._captured(shape, forward)
        if reason:
            self.given_up = reason
            logger.warning("%s runs without CUDA graphs: %s", type(self.model).__name__, reason)
            self._let_go()

    def _captured(self, shape: Shape, forward: Callable[..., list[Tensor]]) -> str:
        """Capture the forward over what was filled in, and replay it; why that cannot be, or nothing."""
        try:
            self._compute(shape, forward)  # without a graph: it loads kernels, which cannot be done within a capture
            computed = [out[0, : shape.tokens] for out in self._outputs]
            right = [rows.clone() for rows in computed]
            for rows in computed:
                rows.fill_(torch.nan)  # what a replay does not write will show
            self._pool = self._pool or GraphPool(self._device)
            replay = self._pool.capture(lambda: self._compute(shape, forward))
            replay()
            worst = worst_error(computed, right)
        except (EncoderError, RuntimeError) as error:
            return f"{type(error).__name__}: {error}"
        tolerance = 8 * torch.finfo(right[0].dtype).eps
        if worst > tolerance:
            return f"a replay differs (relative L2 error {worst:.1e} > {tolerance:.0e})"
        self._replays[shape] = replay
        logger.info("captured a forward of %d tokens in %d texts of up to %d", *shape[:3])
        return ""

    def _fill(self, shape: Shape, inputs: Mapping[str, Int64Array], lengths: Int32Array) -> None:
        self._offsets[: shape.texts + 1].copy_(to_device(shape.offsets(lengths), self._device))
        for name, values in inputs.items():
            filled = np.full(shape.tokens, values[0], np.int64)  # padding repeats what the model surely takes
            filled[: len(values)] = values
            if name not in self._inputs:
                self._inputs[name] = torch.zeros(1, self._capacity, dtype=torch.int64, device=self._device)
            self._inputs[name][0, : shape.tokens].copy_(to_device(filled, self._device))

    def _compute(self, shape: Shape, forward: Callable[..., list[Tensor]]) -> None:
        """The forward, from the inputs' memory to the outputs'."""
        inputs = {name: self._inputs[name][:, : shape.tokens] for name in shape.names}
        packing = Packing(None, self._offsets[: shape.texts + 1], shape.longest)
        found = forward(**inputs, packing=packing)
        self._outputs = self._outputs or [rows.new_zeros(1, self._capacity, rows.shape[-1]) for rows in found]
        for out, rows in zip(self._outputs, found, strict=True):
            out[:, : shape.tokens].copy_(rows)

    def _let_go(self) -> None:
        if self._capacity:
            self._begin(0)


def _rounded_up(count: int, parts: int) -> int:
    """Up to the next of the sizes that divide each power of two, to the next one, into so many parts."""
    step = max(1, (1 << (count.bit_length() - 1)) // parts)
    return -(-count // step) * step
