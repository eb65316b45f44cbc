"""How many records a stream has, and how many batches they make: they are counted, not parsed."""

from __future__ import annotations

from collections.abc import Sequence

from ..cursors import Cursor
from ..errors import BertstreamError, described, kind_of
from .lane_batches import LaneBatches
from .layout import Layout
from .options import ReadOptions
from .pieces import count_records
from .shards import Piece, shard_kind

_MOST_BYTES = 1 << 30
"""Of shards that are searched for the ends of records, where only a length is asked for, as `list` and progress bars
do: about a second from memory."""


class RecordCounts:
    """Counts a stream's records, of each shard once.

    Attributes:
        were_asked: whether somebody has learnt a number of batches.
    """

    def __init__(self) -> None:
        self.were_asked = False
        self._records: dict[str, int] = {}

    def records(self, paths: Sequence[str], options: ReadOptions) -> int | None:
        """Of all shards, or of the dataset of rows in their place; None if that takes about as long as reading them."""
        if options.rows is not None:
            return len(options.rows) if hasattr(options.rows, "__len__") else None
        total = 0
        for path in paths:
            if (count := self._of_shard(path, options)) is None:
                return None
            total += count
        return total

    def batches(
        self,
        batches: LaneBatches,
        layout: Layout,
        dealt: Sequence[Sequence[Piece]],
        queues: Sequence[Sequence[Cursor] | None],
    ) -> list[int]:
        """How many batches lanes make from their cursors on, for each queue of lanes.

        Args:
            batches: makes them.
            layout: of the lanes.
            dealt: the pieces of each lane.
            queues: the cursors of some lanes.
        Raises:
            TypeError: records cannot be counted fast, or broken or dropped ones change their number, or batches have
                no fixed number of texts.
        """
        if (reason := self._why_unknown(batches, layout)) is not None:
            raise TypeError(
                f"the number of a stream's batches is not known: {reason}. With steps_per_epoch= an epoch has a length"
            )
        self.were_asked = True
        return [
            sum(batches.count(self._records_after(cursor, dealt[cursor.lane]), cursor) for cursor in queue or ())
            for queue in queues
        ]

    def _records_after(self, cursor: Cursor, pieces: Sequence[Piece]) -> int:
        parts = [(pieces[opened.piece], opened.records) for opened in cursor.open]
        parts += [(piece, 0) for piece in pieces[cursor.next_piece :]]
        return sum(
            len(piece.own(piece.start + read, self._records[piece.path] if piece.stop is None else piece.stop))
            for piece, read in parts
        )

    def _why_unknown(self, batches: LaneBatches, layout: Layout) -> str | None:
        options = batches.options
        if batches.batch_size is None:
            return "max_tokens= cuts batches by the lengths of texts"
        if batches.mixing is not None:
            return "a Mixture leaves out or repeats records"
        if options.keep is not None or options.map is not None:
            return "keep= and map= may drop any number of records"
        if batches.reading.max_bad_records:
            return "max_bad_records= may skip any number of records"
        unknown = dict.fromkeys(piece.path for piece, _ in layout.pieces if piece.stop is None)
        if options.rows is not None:
            return f"{kind_of(options.rows)} has no length" if unknown else None
        try:
            size = sum(
                size
                for piece, size in layout.pieces
                if piece.path not in self._records and shard_kind(piece.path, options.access).format != "parquet"
            )
            if size > _MOST_BYTES:
                return f"to count their records, {size / 2**30:,.1f} GiB of shards would have to be read"
            for path in unknown:
                if self._of_shard(path, options) is None:
                    return f"the records of {path} cannot be counted without reading all of it"
        except (BertstreamError, OSError) as error:
            return described(error)
        return None

    def _of_shard(self, path: str, options: ReadOptions) -> int | None:
        count = self._records.get(path)
        if count is None and (count := count_records(path, options)) is not None:
            self._records[path] = count
        return count
