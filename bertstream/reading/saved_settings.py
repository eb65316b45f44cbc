"""A stream's settings, as states hold them: what states of version 0.1.0 lack, and what differs, in words."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .access import DEFAULT_ACCESS, Access
from .delimited import first_rows_decide, reads_unquoted

_ROWS_OF_0_1_0 = {
    option: str(getattr(DEFAULT_ACCESS, option))
    for option in ("format", "delimiter", "header", "encoding", "max_record_bytes")
} | {"quoting": "standard"}

_DEFAULTS = {"drop_last": False, **_ROWS_OF_0_1_0}
"""Settings that states lack where a stream has these values."""


def row_settings(files: Sequence[str], access: Access) -> dict[str, str]:
    """The options of rows that differ from version 0.1.0.

    Args:
        files: the shards; their first rows decide what "auto" means.
        access: how they are opened.
    """
    options = {option: str(getattr(access, option)) for option in _ROWS_OF_0_1_0}
    if options["quoting"] == "auto" and not any(first_rows_decide(path, access) for path in files):
        options["quoting"] = "standard"
    return {option: value for option, value in options.items() if value != _ROWS_OF_0_1_0[option]}


def completed(settings: dict[str, Any], state: Any, files: Sequence[str], access: Access) -> tuple[dict[str, Any], Any]:
    """The settings of a stream, and a state for it, with what both leave out, so that they can be compared.

    Args:
        settings: of the stream.
        state: whatever was loaded; what is no state stays as it is.
        files, access: as for `row_settings`.
    """
    settings = _DEFAULTS | settings
    saved = state.get("settings") if isinstance(state, dict) else None
    if not saved or not isinstance(saved, dict):
        return settings, state
    # Of version 0.1.0: does this stream read the same rows?
    if settings["quoting"] == "auto" and "quoting" not in saved:
        settings["quoting"] = "auto" if any(reads_unquoted(path, access) for path in files) else "standard"
    if not ("rows" in saved and "rows" in settings):  # a state of before, or rows that could not be read
        settings, saved = (
            {name: value for name, value in values.items() if name != "rows"} for values in (settings, saved)
        )
    return settings, state | {"settings": _DEFAULTS | saved}


def difference(saved: dict[str, Any], settings: dict[str, Any]) -> tuple[str, str] | None:
    """What keeps a state from its stream: the name of the first setting that differs, and all of them in words.

    Args:
        saved: the settings of the state.
        settings: those of the stream.
    Returns:
        None if they are the same.
    """
    differing = [name for name in {**settings, **saved} if settings.get(name) != saved.get(name)]
    if not differing:
        return None
    plain = [name for name in differing if name not in ("tokenizer", "shards", "rows")]
    if {"shuffle", "lanes"} & {*plain}:  # which decide it, where the user does not
        plain = [name for name in plain if name != "open_shards"]
    found = []
    if plain:
        here, there = (
            " and ".join(_as_written(name, values.get(name)) for name in plain) for values in (settings, saved)
        )
        why = " (without StreamConfig(lanes=) the size of the data and the number of ranks decide)"
        found.append(f"with {there}, this stream has {here}{why * ('lanes' in plain)}")
    if "tokenizer" in differing:
        found.append("with a tokenizer of other settings or another vocabulary than this encoder's")
    if "shards" in differing:
        there, here = (str(values.get("shards")).partition(" ")[0] for values in (saved, settings))
        if there != here:
            found.append(f"over other data: {there} shard{'s' * (there != '1')}, this stream has {here}")
        elif not {"lanes", "open_shards"} & {*differing}:  # which alone change where the shards are cut
            found.append(
                f"over other data: as many shards, {here}, but of other names, sizes or records; a state has a digest "
                "of these alone, so that it cannot say which"
            )
    elif "rows" in differing and "text" not in differing:
        found.append(
            "over other rows, or over these in another order, such as that of another shuffle(seed=); a state has a "
            "digest of the texts of 32 rows, so that it cannot say which"
        )
    return differing[0], "; ".join(found)


def _as_written(name: str, value: Any) -> str:
    """A setting as the user writes it; some have another name in states."""
    if name == "passes_over_bad_records":
        return "max_bad_records" + (" above 0" if value else "=0")
    option = "bucket_size" if name == "window" else name
    return f"{option}={value!r}"
