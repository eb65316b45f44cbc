"""A stream's place as plain JSON, and back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..errors import StateError, shortened
from ..tokens import Cursor, OpenPiece
from .bad_records import BadRecords

STATE_VERSION = 1


def pack_state(
    settings: dict[str, Any], epoch: int, queues: Sequence[Sequence[Cursor] | None], bad: BadRecords
) -> dict[str, Any]:
    """A stream's place as plain JSON.

    Args:
        settings: what the order of batches depends on.
        epoch: counted from 0.
        queues: the lanes of each rank, the next one first; None for a rank whose lanes are not known here.
        bad: what was passed over.
    """
    return {
        "version": STATE_VERSION,
        "settings": settings,
        "epoch": epoch,
        "queues": [None if queue is None else [cursor_to_json(cursor) for cursor in queue] for queue in queues],
        "bad": bad.to_json(),
    }


def epoch_of(state: Any, owner: str, parts: Sequence[str]) -> int:
    """The epoch of a state, once it is known for one that can be read.

    Args:
        state: whatever was loaded.
        owner: what it should be of, for the message.
        parts: what it must have beside its version and epoch.
    Raises:
        StateError: it is none, or of another version.
    """
    for part in ("version", "epoch", *parts):
        if not isinstance(state, dict) or part not in state:
            kind = f"it has no {part!r}" if isinstance(state, dict) else type(state).__name__
            raise StateError(f"this is no state of {owner}: {kind}", key=part)
        if part == "version" and state[part] != STATE_VERSION:
            raise StateError(
                f"the state is of version {state[part]}, this bertstream reads version {STATE_VERSION}", key="version"
            )
    epoch = state["epoch"]
    if type(epoch) is not int or epoch < 0:
        raise StateError(f"the state has epoch={shortened(epoch)}, where a number from 0 belongs", key="epoch")
    return epoch


def unpack_state(state: Any, settings: dict[str, Any]) -> tuple[int, list[list[Cursor] | None], dict[str, Any]]:
    """The epoch, the lanes of each rank, and the counts of broken records of a packed state.

    Raises:
        StateError: the state is none, of another version, or of a stream with other settings.
    """
    parts = ("settings", "queues", "bad")
    epoch = epoch_of(state, "a stream", parts)
    for part in parts:
        if not state[part]:
            raise StateError(f"this is no state of a stream: its {part!r} is empty", key=part)
    for name, value in settings.items():
        saved = state["settings"].get(name)
        if saved != value:
            raise StateError(
                f"the state was saved with {name}={saved!r}, this stream has {name}={value!r}: make the stream as it "
                "was, or start an epoch anew without the state",
                key=name,
            )
    queues = [
        None if queue is None else [cursor_from_json(entry, epoch) for entry in queue] for queue in state["queues"]
    ]
    return epoch, queues, state["bad"]


def deal(queues: Sequence[list[Cursor] | None], rank: int, world_size: int) -> list[list[Cursor] | None]:
    """The lanes of each rank: its own where the number of ranks is what it was, else all of them dealt anew.

    Raises:
        StateError: lanes that `rank` needs are not in the state.
    """
    if len(queues) == world_size and queues[rank] is not None:
        return list(queues)
    known = [queue for queue in queues if queue is not None]
    if len(known) < len(queues):
        missing = [other for other, queue in enumerate(queues) if queue is None]
        raise StateError(
            f"the state was saved by one of {len(queues)} ranks and lacks the lanes of ranks {missing}: save each "
            "rank's, load it on as many ranks, or let torch.distributed be initialised before the loader is iterated",
            key="queues",
        )
    longest = max(map(len, known))
    turns = [queue[turn] for turn in range(longest) for queue in known if turn < len(queue)]
    return [turns[other::world_size] for other in range(world_size)]


def cursor_to_json(cursor: Cursor) -> list[Any]:
    """A lane's place as JSON holds it; the epoch is said once for all."""
    return [cursor.lane, cursor.next_piece, [list(place) for place in cursor.open], cursor.batch]


def cursor_from_json(entry: list[Any], epoch: int) -> Cursor:
    """What `cursor_to_json` was given."""
    lane, next_piece, places, batch = entry
    return Cursor(epoch, lane, next_piece, tuple(OpenPiece(*place) for place in places), batch)
