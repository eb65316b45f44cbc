"""What a stream's batches and their order depend on, as its states hold it."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import cached_property
from typing import Any

from .functions import name_of
from .lane_batches import LaneBatches
from .layout import Layout
from .mixture import Mixture
from .rows import digest_of_rows
from .saved_settings import completed, row_settings


class StreamSettings:
    """The settings of a stream; some of them are found when a state first asks for them.

    Args:
        sources: of the stream, each as its shards and its dataset of rows, or None.
        mixture: of the sources; None where there is one.
        batches: makes them.
        shuffle, seed: of the stream.
    """

    def __init__(
        self,
        sources: Sequence[tuple[list[str], Any]],
        mixture: Mixture | None,
        batches: LaneBatches,
        *,
        shuffle: bool,
        seed: int,
    ) -> None:
        self._files = [path for paths, rows in sources if rows is None for path in paths]
        self._rows = [rows for _, rows in sources]
        self._mixture = mixture
        self._batches = batches
        self._shuffle = shuffle
        self._seed = seed

    def within(self, layout: Layout) -> dict[str, Any]:
        """The settings by name, all but the epoch, where the data is laid out so."""
        batches, options, mixture = self._batches, self._batches.options, self._mixture
        mixed = {} if mixture is None else {"weights": [*mixture.weights], "stopping": mixture.stopping}
        return {
            **mixed,  # causes first: the first difference is the one that is reported
            "shuffle": self._shuffle,
            "seed": self._seed,
            "lanes": layout.lanes,
            "open_shards": layout.open_shards,
            "window": batches.reading.bucket_size,  # the name in states since version 0.1
            "batch_size": batches.batch_size,
            "max_tokens": batches.max_tokens,
            "text": list(options.texts),
            "passes_over_bad_records": batches.reading.max_bad_records > 0,
            **({"drop_last": True} if batches.drop_last else {}),
            **self._of_rows_in_files,
            **{
                name: name_of(function)  # only where there is one: states of before have no such entries
                for name in ("keep", "map")
                if (function := getattr(options, name)) is not None
            },
            "tokenizer": self._tokenizer_digest,
            "shards": layout.digest,
            **self._rows_digest,
        }

    def completed(self, layout: Layout, state: Any) -> tuple[dict[str, Any], Any]:
        """The settings, and a state, with what both leave out; see `saved_settings.completed`."""
        return completed(self.within(layout), state, self._files, self._batches.reading)

    @cached_property
    def _of_rows_in_files(self) -> dict[str, str]:
        return row_settings(self._files, self._batches.reading)

    @cached_property
    def _rows_digest(self) -> dict[str, str]:
        return digest_of_rows(self._rows, self._batches.options.texts)

    @cached_property
    def _tokenizer_digest(self) -> str:
        identity = getattr(self._batches.tokenizer, "identity", None)
        return hashlib.sha256(repr(identity).encode()).hexdigest()[:16]
