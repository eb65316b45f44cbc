"""A stream read by worker processes, several batches in a message: torch takes 0.1 ms to receive one of any size."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from itertools import chain, islice, repeat
from typing import Any, TypeAlias

import torch
from torch._utils import ExceptionWrapper
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from .dataset import StreamItem, TextStream

MessageItem: TypeAlias = StreamItem | ExceptionWrapper | None
"""What a worker sends: also errors that are not bertstream's, and None after its last item."""

MESSAGE = 8
"""Batches in a message. The loop waits for all of them, and they take up memory together; but with 4 in a message the
loop's thread took 0.12 s for a million tokens, with 8 it took 0.075."""

AHEAD = 16 // MESSAGE
"""Messages that each worker process may have ready, 16 batches. Workers take turns, so one that is late for a
moment stops the others once their queues are full: with 8 batches, two workers were 1.55 to 1.73 times as fast as one,
with 16 1.86 times."""


class StreamMessages(IterableDataset[list[MessageItem]]):
    """The items of a stream in lists, for workers whose messages `WorkersInTurn` takes apart.

    A worker's first lists are shorter, so that its first batch comes at once; they are as long as those of the others.

    Args:
        stream: whose progress the reader advances, see `TextStream.items`.
    """

    def __init__(self, stream: TextStream) -> None:
        super().__init__()
        self._stream = stream

    def __iter__(self) -> Iterator[list[MessageItem]]:
        items = chain(self._stream.items(), [None])
        for size in chain((1, 2, 4), repeat(MESSAGE)):
            message: list[MessageItem] = []
            try:
                for item in islice(items, size):
                    message.append(item)  # one by one: an error must not take those before it along
            except Exception:
                # As torch sends an error; raised here, it would arrive as a message of its own, out of turn.
                message.append(ExceptionWrapper(where=f"in worker process {_worker_id()} of a stream"))
            if not message:
                return
            yield message


def _worker_id() -> int:
    worker = get_worker_info()
    return 0 if worker is None else worker.id


class WorkersInTurn(Iterator[StreamItem]):
    """One item of each worker in turn, as a DataLoader yields them without messages.

    Args:
        messages: of `StreamMessages` in workers, one of each in turn.
        workers: how many.
    """

    def __init__(self, messages: Iterator[list[MessageItem]], workers: int) -> None:
        self._messages = messages
        self._turns: deque[deque[MessageItem]] = deque(deque() for _ in range(workers))

    def __next__(self) -> StreamItem:
        while self._turns:
            items = self._turns.popleft()
            if not items:  # nor have those after it more than this turn: the next message is of this worker
                items.extend(next(self._messages))
            item = items.popleft()
            if isinstance(item, ExceptionWrapper):
                item.reraise()
            elif item is not None:
                self._turns.append(items)
                return item
        raise StopIteration

    def close(self) -> None:
        """End the workers, and drop what they have sent."""
        self._turns.clear()
        self._messages._shutdown_workers()  # type: ignore[attr-defined]  # not when it is collected: a traceback may hold it


class StreamLoader(DataLoader[Any]):
    """A DataLoader over a stream.

    Args:
        stream: whose batches it yields; a reader that minds the progress itself has it read `StreamMessages` instead.
        num_workers: processes that read and tokenize; 0 for its own.
    """

    def __init__(self, stream: TextStream, num_workers: int) -> None:
        # A DataLoader draws its workers' seed when an epoch starts: from torch's global generator, a resumed run would
        # draw once more than the undisturbed one, and its dropout would differ from then on.
        own = torch.Generator().manual_seed(torch.initial_seed())
        ahead = AHEAD if num_workers else None
        super().__init__(stream, batch_size=None, num_workers=num_workers, prefetch_factor=ahead, generator=own)

    def __iter__(self) -> Any:
        received = super().__iter__()
        return WorkersInTurn(received, self.num_workers) if isinstance(self.dataset, StreamMessages) else received
