"""What an ending says: the format of a shard or member, and its compression."""

from __future__ import annotations

import re

from ..errors import ConfigError, shortened

COMPRESSIONS = ("gz", "zst", "bz2", "xz")
ENDINGS = ".tar, .jsonl, .ndjson, .json, .csv, .tsv, .txt, each also with .gz, .zst, .bz2 or .xz, and .parquet"
"""The known ones, for messages."""

_COMPRESSED = "|".join(COMPRESSIONS)
_TARS = {"tgz": "gz", "tzst": "zst", "tbz2": "bz2", "txz": "xz"}
_ENDING = re.compile(
    rf"\.(?:(?P<format>tar|jsonl|ndjson|json|csv|tsv|txt)(?:\.(?P<compression>{_COMPRESSED}))?"
    rf"|(?P<tar>{'|'.join(_TARS)})|(?P<parquet>parquet))$",
    re.IGNORECASE,
)
_COMPRESSION = re.compile(rf"\.(?P<compression>{_COMPRESSED})$", re.IGNORECASE)


def split_ending(name: str) -> tuple[str, str, str] | None:
    """A file's name without its endings, its format, and its compression or ""; None if the ending is unknown."""
    match = _ENDING.search(name)
    if match is None:
        return None
    stem = name[: match.start()]
    if match["tar"]:
        return stem, "tar", _TARS[match["tar"].lower()]
    return stem, (match["format"] or match["parquet"]).lower(), (match["compression"] or "").lower()


def parse_format(value: object) -> tuple[str, str, str]:
    """As `split_ending`, of the user's `format=`, such as "jsonl" or "jsonl.gz".

    Raises:
        ConfigError: it is none.
    """
    found = split_ending(f".{value}") if isinstance(value, str) else None
    if found is None or found[0]:
        raise ConfigError(f"format={shortened(value)}: write an ending without its dot, of {ENDINGS}")
    return found


def split_compression(name: str) -> tuple[str, str]:
    """A name without the ending of a compression, and that compression or ""."""
    match = _COMPRESSION.search(name)
    return (name, "") if match is None else (name[: match.start()], match["compression"].lower())
