"""Settings for opening shards are checked where they are made, and commands run only if allowed."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
from shard_files import read

from bertstream import StreamConfig
from bertstream.errors import ConfigError
from bertstream.reading.access import Access


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shard_cache": ""}, "shard_cache=''"),
        ({"shard_cache": 3}, "shard_cache=3"),
        ({"stall_warning_s": 0}, "stall_warning_s=0"),
        ({"stall_warning_s": "x"}, "stall_warning_s='x'"),
    ],
)
def test_bad_settings_are_refused_with_their_value(options: dict[str, Any], message: str) -> None:
    for config in (Access, StreamConfig):
        with pytest.raises(ConfigError, match=message):
            config(**options)


def test_a_stream_config_pickles_and_hides_passwords() -> None:
    reading = StreamConfig(bucket_size=3, storage_options={"password": "xyzzy"}, shard_cache="a")
    assert pickle.loads(pickle.dumps(reading)) == reading
    assert "xyzzy" not in repr(reading)


def test_a_pipe_that_is_not_allowed_runs_nothing(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="allow_pipe=True"):
        read(f"pipe:touch {tmp_path}/trace; echo a.txt")
    assert not (tmp_path / "trace").exists()
