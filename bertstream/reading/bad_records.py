"""Counts broken records and shards, and stops at the limit the user set; counts dropped records too."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from typing import Any

from ..errors import ShardError, counted
from ..tokens import ReadReport

logger = logging.getLogger(__name__)

_MOST_NAMED, _MOST_LOGGED = 10, 12


@dataclass
class BadRecords:
    """The one count of what a stream skips; it names a dozen of a bucket in the log, and raises beyond the limit.

    Attributes:
        limit: how many may be skipped; below 1 a fraction of the records read, judged after 1,000 records.
        droppers: the arguments that the stream was given of `keep=`, `map=` and `drop_last`, for messages.
        read: records read in this epoch, broken and dropped ones included.
        records: broken records skipped in this epoch, and records known to be lost with shards that were given up.
        given_up: shards given up in this epoch: the rest of each, or of some of its pieces, was skipped. What a shard
            holds beyond its last cut is not known, nor is anything of one that was not cut.
        first: messages of the first ten.
        dropped: records that `keep=`, `map=` and `drop_last` dropped in this epoch, which no limit counts.
        all_records: as `records`, over all epochs of this process.
        all_shards: as the number of `given_up`, over all epochs of this process.
        all_dropped: as `dropped`, over all epochs of this process.
    """

    limit: float
    droppers: tuple[str, ...] = ()
    read: int = 0
    records: int = 0
    given_up: list[str] = field(default_factory=list)
    first: list[str] = field(default_factory=list)
    dropped: int = 0
    all_records: int = 0
    all_shards: int = 0
    all_dropped: int = 0

    def reset(self) -> None:
        """Start an epoch: it meets the same broken records as the last one."""
        self.read = self.records = self.dropped = 0
        self.given_up, self.first = [], []

    def add(self, report: ReadReport) -> None:
        """Count what the reading of a bucket met.

        Raises:
            ShardError: the limit is exceeded; the message names the first ones.
        """
        self.read += report.read
        self.dropped += report.dropped
        self.all_dropped += report.dropped
        for error in report.bad:
            self.records += error.records or 0
            self.all_records += error.records or 0
            if error.gives_up_shard and error.path not in self.given_up:
                self.given_up.append(str(error.path))
                self.all_shards += 1
            if len(self.first) < _MOST_NAMED:
                self.first.append(str(error))
        for error in sorted(report.bad, key=lambda error: not error.gives_up_shard)[:_MOST_LOGGED]:
            lost = "unknown" if error.records is None else error.records
            logger.warning(
                "%s (records lost: %s): %s", "gave up a shard" if error.gives_up_shard else "skipped", lost, error
            )
        if (more := len(report.bad) - _MOST_LOGGED) > 0:
            logger.warning("and %d more, which stats() counts", more)
        bad = self.records + len(self.given_up)
        allowed = self.limit if self.limit >= 1 or not self.limit else self.limit * max(self.read, 1000)
        if bad > allowed:
            last = report.bad[-1] if report.bad else None
            raise ShardError(
                f"{counted(self.records, 'broken record')} and {counted(len(self.given_up), 'broken shard')} among "
                f"{counted(self.read, 'record')} read are more than max_bad_records={self.limit:g} allows; the first: "
                + "; ".join(self.first),
                path=last.path if last else None,
                index=last.index if last else None,
                field=last.field if last else None,
            )

    def check_some_were_good(self) -> None:
        """At the end of an epoch, refuse one without a good record.

        Raises:
            ShardError: every record was skipped: no fraction of nothing is exceeded, and the epoch would be empty.
        """
        if self.first and self.read == self.records:
            raise ShardError("every record of the epoch was broken: " + "; ".join(self.first))

    def to_json(self) -> dict[str, Any]:
        """This epoch's counts, which do not change with later ones."""
        counts = {"read": self.read, "records": self.records, "given_up": [*self.given_up], "first": [*self.first]}
        # Without it, states are as before there was this count.
        return counts | ({"dropped": self.dropped} if self.dropped else {})

    def load(self, counts: dict[str, Any]) -> None:
        """Continue from `to_json`'s counts."""
        self.read, self.records = counts["read"], counts["records"]
        self.given_up, self.first = list(counts["given_up"]), list(counts["first"])
        self.dropped = counts.get("dropped", 0)
