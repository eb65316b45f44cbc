"""Counts broken records and shards, and stops at the limit the user set."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from typing import Any

from ..errors import ShardError
from ..tokens import ReadReport

logger = logging.getLogger(__name__)

_MOST_NAMED = 10


@dataclass
class BadRecords:
    """Counts broken records and shards, names them in the log, and stops at a limit.

    Attributes:
        limit: how many may be passed over; below 1 a fraction of the records read, judged once 1,000 were read.
        read: records that were read, broken ones included.
        records: broken records that were passed over.
        given_up: broken shards whose rest, or the rest of some of their parts, was passed over.
        first: messages of the first ten.
    """

    limit: float
    read: int = 0
    records: int = 0
    given_up: list[str] = field(default_factory=list)
    first: list[str] = field(default_factory=list)

    def reset(self) -> None:
        """Begin to count anew: an epoch meets what the one before it met."""
        self.read = self.records = 0
        self.given_up, self.first = [], []

    def add(self, report: ReadReport) -> None:
        """Count what a window's reading met.

        Raises:
            ShardError: the limit is passed; it names the first ones.
        """
        self.read += report.read
        for error in report.bad:
            if not error.gives_up_shard:
                self.records += 1
            elif error.path not in self.given_up:
                self.given_up.append(str(error.path))
            logger.warning("%s %s", "gave up a shard:" if error.gives_up_shard else "passed over a record:", error)
            if len(self.first) < _MOST_NAMED:
                self.first.append(str(error))
        bad = self.records + len(self.given_up)
        allowed = self.limit if self.limit >= 1 or not self.limit else self.limit * max(self.read, 1000)
        if bad > allowed:
            last = report.bad[-1] if report.bad else None
            raise ShardError(
                f"{self.records} broken records and {len(self.given_up)} broken shards among {self.read} records read "
                f"are more than max_bad_records={self.limit:g} allows; the first: " + "; ".join(self.first),
                path=last.path if last else None,
                index=last.index if last else None,
                field=last.field if last else None,
            )

    def check_some_were_good(self) -> None:
        """At the end of an epoch.

        Raises:
            ShardError: everything was passed over: a fraction of nothing would be kept to, and an epoch be empty.
        """
        if self.first and self.read == self.records:
            raise ShardError("no record of the epoch was good, so this is no stray fault: " + "; ".join(self.first))

    def to_json(self) -> dict[str, Any]:
        """The counts."""
        return {"read": self.read, "records": self.records, "given_up": self.given_up, "first": self.first}

    def load(self, counts: dict[str, Any]) -> None:
        """Go on counting from `to_json`'s."""
        self.read, self.records = counts["read"], counts["records"]
        self.given_up, self.first = list(counts["given_up"]), list(counts["first"])
