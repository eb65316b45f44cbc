"""The rank comes from torch.distributed, or else from the launcher's environment."""

from __future__ import annotations

import pytest
import torch.distributed as dist

from bertstream.errors import ConfigError
from bertstream.system.distributed import local_rank, rank_and_world_size


def set_environment(patch: pytest.MonkeyPatch, **values: str | None) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        value = values.get(name)
        if value is None:
            patch.delenv(name, raising=False)
        else:
            patch.setenv(name, value)


@pytest.mark.parametrize(
    ("rank", "world_size", "found"),
    [(None, None, (0, 1)), ("0", "1", (0, 1)), ("2", "4", (2, 4)), ("11", "12", (11, 12))],
)
def test_rank_and_world_size_come_from_the_launchers_environment(
    monkeypatch: pytest.MonkeyPatch, rank: str | None, world_size: str | None, found: tuple[int, int]
) -> None:
    set_environment(monkeypatch, RANK=rank, WORLD_SIZE=world_size)
    assert rank_and_world_size() == found


@pytest.mark.parametrize(
    ("rank", "world_size"),
    [("0", None), (None, "2"), ("one", "2"), ("-1", "2"), ("", "2"), ("0", "2.0"), ("2", "2"), ("3", "2"), ("0", "0")],
)
def test_a_contradictory_environment_is_refused_with_its_values(
    monkeypatch: pytest.MonkeyPatch, rank: str | None, world_size: str | None
) -> None:
    set_environment(monkeypatch, RANK=rank, WORLD_SIZE=world_size)
    with pytest.raises(ConfigError, match="RANK=.*WORLD_SIZE=") as caught:
        rank_and_world_size()
    assert all(value in str(caught.value) for value in (rank, world_size) if value)
    assert ("Lightning's own launcher sets one: start with torchrun" in str(caught.value)) == (rank is None)


def test_an_initialized_process_group_takes_precedence_over_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    set_environment(monkeypatch, RANK="3", WORLD_SIZE="4")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        assert rank_and_world_size() == (0, 1)
    finally:
        dist.destroy_process_group()
    assert rank_and_world_size() == (3, 4)


@pytest.mark.parametrize(("value", "found"), [(None, None), ("0", 0), ("5", 5), ("", None), ("-1", None)])
def test_the_local_rank_is_none_unless_a_launcher_set_it(
    monkeypatch: pytest.MonkeyPatch, value: str | None, found: int | None
) -> None:
    set_environment(monkeypatch, LOCAL_RANK=value)
    assert local_rank() == found
