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
        ({"delimiter": ""}, "one ASCII character"),
        ({"delimiter": "||"}, "one ASCII character"),
        ({"delimiter": '"'}, "one ASCII character"),
        ({"quoting": "minimal"}, "write one of 'auto', 'standard', 'none'"),
        ({"header": "text"}, "names of the columns"),
        ({"header": []}, "names of the columns"),
        ({"header": ["a", "a"]}, "names of the columns"),
        ({"encoding": "utf-16"}, "iconv -f utf-16 -t UTF-8"),
        ({"encoding": "klingon"}, "name of a text encoding"),
        ({"encoding": "hex"}, "name of a text encoding"),
        ({"encoding": "idna"}, "name of a text encoding"),
        ({"max_record_bytes": 0}, "max_record_bytes=0"),
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
    with pytest.raises(ConfigError, match="allow_pipe='no': write True or False"):
        Access(allow_pipe="no")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="allow_pipe=True"):
        read(f"pipe:touch {tmp_path}/trace; echo a.txt")
    assert not (tmp_path / "trace").exists()


def test_a_tilde_in_shard_cache_is_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert StreamConfig(shard_cache="~/copies").shard_cache == Access(shard_cache=Path("~/copies")).shard_cache
    assert Access(shard_cache="~/copies").shard_cache == str(tmp_path / "copies")
