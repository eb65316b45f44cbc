"""How shards are read: the options of `bertstream.stream(reading=...)`."""

from __future__ import annotations

import warnings
from dataclasses import InitVar, dataclass
from typing import Literal, TypeAlias

from ..errors import ConfigError, check_at_least, check_choice
from .access import Access

Uneven: TypeAlias = Literal["pad", "stop", "leave"]


@dataclass(frozen=True, kw_only=True, slots=True)
class StreamConfig(Access):
    """How shards are read; the defaults suit most corpora.

    Attributes:
        bucket_size: records of each lane that are sorted by length and cut into batches together. A larger bucket makes
            lengths within a batch more alike, mixes better, and takes more memory.
        lanes: how many independent lanes share the shards; None is one for every 4 MiB of data, 32 at most, and at
            least one for each rank. The order of batches depends on it, not on the number of workers.
        open_shards: how many shards, or pieces of them, each lane reads in turn, one record from each. More mixes
            sorted data better and opens more files. None is 64 over all lanes of a shuffled stream, at least 4 a lane;
            1 for a stream that is not shuffled.
        max_bad_records: how many broken records and shards an epoch may skip, over all workers of a rank: a number, or
            a fraction below 1 of the records read, judged after 1,000 records. 0 raises at the first. Each one is
            counted, and a dozen of each bucket are named in the log. A shard that is given up counts as one on each
            rank that reads of it, and as those of its records whose number is known. Faults of the machine or network
            always raise.
        uneven: what ranks do when their shards give unequal numbers of batches, so that none waits forever in a
            collective of the training step. "pad": ranks that have finished repeat their last batch, marked by
            `__repeated__`, until all have. "stop": all end with the first; `left_texts` counts what was left. "leave":
            each ends when it ends. It takes effect where `torch.distributed` is initialised.
        rank_timeout_s: seconds after which the other ranks give up a rank that sends no sign. A rank sends one when it
            has read its next group.
        allow_pipe: whether `pipe:command` may be read, which runs the command in a shell.
        storage_options: passed to fsspec for URLs.
        shard_cache: a folder into which each remote shard is downloaded once and then read from; None reads remotely.
            It is not bounded, and a copy is not renewed when its origin changes: delete it. Workers and ranks may share
            it. Where there are fewer remote shards than lanes, they are downloaded at the start, to be cut into pieces.
        stall_warning_s: seconds after which a read of a URL or pipe that is still waiting is named in the log; None is
            never.
        format: of all shards, whatever their names, for endings such as "data.txt.1" and "part-0000": an ending without
            its dot, such as "jsonl" or "txt.gz". None is what each name says. Without a compression, it is that of the
            name, or the one that the first bytes show.
        delimiter: between the fields of csv and tsv; None is "," for csv and a tab for tsv.
        quoting: whether quotes enclose fields of csv and tsv. "standard": as in RFC 4180, with inner quotes doubled.
            "none": a quote is a character like others, and a line is a row. "auto": "standard" for csv; for tsv what
            the header and first rows of each shard show, which the log says.
        header: whether the first row of csv and tsv names the columns; or their names, if the files have no such row.
            The columns of False are called "0", "1" and so on.
        encoding: of txt, csv and tsv, such as "cp1252". jsonl, and text in tars, is UTF-8.
        max_record_bytes: the longest line, row of csv, or record of a tar (the members that are read); a longer one is
            a broken record. Without a limit a quote that is never closed, or a file without newlines, would be read
            into memory whole. 64 MiB is a thousand times the text that the longest encoders take.
        window: the old name of `bucket_size`; deprecated, gone in the next version.
    Raises:
        ConfigError: a value of a wrong type or out of range.
    """

    bucket_size: int = 2048
    lanes: int | None = None
    open_shards: int | None = None
    max_bad_records: float = 0
    uneven: Uneven = "pad"
    rank_timeout_s: float = 600
    window: InitVar[int | None] = None

    def __post_init__(self, window: int | None) -> None:
        Access.__post_init__(self)
        if window is not None:
            if self.bucket_size != StreamConfig.__dataclass_fields__["bucket_size"].default:
                raise ConfigError(f"window={window} is the old name of bucket_size={self.bucket_size}: leave it out")
            warnings.warn(
                "StreamConfig(window=) is now StreamConfig(bucket_size=); the next version drops the old name",
                FutureWarning,
                stacklevel=3,
            )
            object.__setattr__(self, "bucket_size", window)
        if self.max_bad_records < 0 or (self.max_bad_records > 1 and self.max_bad_records % 1):
            raise ConfigError(f"max_bad_records={self.max_bad_records}: write a whole number, or a fraction below 1")
        check_choice("uneven", self.uneven, Uneven)
        if not self.rank_timeout_s > 0:
            raise ConfigError(f"rank_timeout_s={self.rank_timeout_s}: write a number above 0")
        for name in ("bucket_size", "lanes", "open_shards"):
            value = getattr(self, name)
            if value is not None:
                check_at_least(name, value, 1)
