"""How many tokens one forward takes: the user's number, a measured one, or the default of the device."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from ..errors import check_at_least

FORWARD_TOKENS = {"cpu": 2048, "cuda": 16384}
"""Tokens of one forward. On a few CPU cores a larger one no longer fits its activations into the cache; a GPU is bound
by kernel launches below 5-10 k tokens."""

_LEAST_FORWARD_TOKENS = 256
"""An out-of-memory error never lowers the limit below this."""


@dataclass(slots=True)
class ForwardSize:
    """Tokens of one forward at most, per device.

    Attributes:
        given: the user's number, or None.
        measured: the fastest number found on each device.
        limit: the number that an out-of-memory error lowered it to, or None.
    """

    given: int | None = None
    measured: dict[torch.device, int] = field(default_factory=dict)
    limit: int | None = None

    def __post_init__(self) -> None:
        if self.given is not None:
            check_at_least("max_forward_tokens", self.given, 1)

    def default(self, device: torch.device) -> int:
        """The user's number, or the default of the device."""
        return self.given or FORWARD_TOKENS.get(device.type, FORWARD_TOKENS["cpu"])

    def most(self, device: torch.device, asked: int | None = None) -> int:
        """Tokens of the next forward at most; `asked` replaces the user's and the measured number."""
        most = asked or self.given or self.measured.get(device, self.default(device))
        return min(most, self.limit or most)

    def lower(self, tokens: int) -> None:
        """Halve the limit after a forward of so many tokens, padding included, ran out of memory.

        A small forward does not lower it further: another program took the memory for a moment.
        """
        lowered = max(_LEAST_FORWARD_TOKENS, tokens // 2)
        self.limit = min(lowered, self.limit or lowered)

    def is_open(self, device: torch.device) -> bool:
        """Whether measuring could change the number."""
        return self.given is None and self.limit is None and device not in self.measured

    def copied(self) -> ForwardSize:
        """The same numbers, for an encoder of its own."""
        return ForwardSize(self.given, dict(self.measured), self.limit)
