"""How rows are read, as states hold it: only what differs from version 0.1.0, so that the states of then fit."""

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
    return settings, state | {"settings": _DEFAULTS | saved}
