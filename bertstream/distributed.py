"""Which process of how many this is; the only reader of the environment variables that say so."""

from __future__ import annotations

import os

import torch.distributed as dist

from .errors import ConfigError


def rank_and_world_size() -> tuple[int, int]:
    """This process's rank and the number of ranks: torch.distributed's, else RANK and WORLD_SIZE, else (0, 1).

    Raises:
        ConfigError: RANK and WORLD_SIZE contradict each other, or one of them is missing.
    """
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    rank, world_size = os.environ.get("RANK"), os.environ.get("WORLD_SIZE")
    if rank is None and world_size is None:
        return 0, 1
    if rank is None or world_size is None or not rank.isdecimal() or not world_size.isdecimal():
        raise ConfigError(f"RANK={rank!r} with WORLD_SIZE={world_size!r}: set both, as whole numbers, or neither")
    if int(rank) >= int(world_size):
        raise ConfigError(f"RANK={rank} is not below WORLD_SIZE={world_size}")
    return int(rank), int(world_size)


def local_rank() -> int | None:
    """LOCAL_RANK, the process's number on its machine; None if it is not set."""
    value = os.environ.get("LOCAL_RANK", "")
    return int(value) if value.isdecimal() else None
