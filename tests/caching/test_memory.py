"""The memory tier returns what was put, evicts the least recently used texts, and keeps its bound."""

from __future__ import annotations

import sys
import tracemalloc
from collections import OrderedDict

import pytest
import torch
from fork_server import RANKS
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from bertstream.caching.memory import TEXT_BYTES, MemoryTier

pytestmark = pytest.mark.parametrize(
    "device", [torch.device("cpu"), pytest.param(torch.device("cuda", 0), marks=pytest.mark.cuda)], ids=str
)

ROW = 12
EACH = ROW + 8


def key(text: int) -> bytes:
    return b"prefix.." + text.to_bytes(16, "big")


def rows(*texts: tuple[int, int]) -> Tensor:
    """Random rows; each text is (its number, how many rows)."""
    draw = torch.Generator()
    made = [torch.randint(256, (count, ROW), dtype=torch.uint8, generator=draw.manual_seed(t)) for t, count in texts]
    return torch.cat([torch.zeros((0, ROW), dtype=torch.uint8), *made])


def put(tier: MemoryTier, *texts: tuple[int, int]) -> None:
    tier.put([key(text) for text, _ in texts], [count for _, count in texts], rows(*texts).to(tier.device))


def gives(tier: MemoryTier, *texts: tuple[int, int]) -> bool:
    """Whether all of them are there with the right rows."""
    found = tier.gather([key(text) for text, _ in texts])
    return found is not None and found.device == tier.device and found.cpu().equal(rows(*texts))


def held(tier: MemoryTier) -> list[int]:
    """The texts, the least recently used first."""
    return [int.from_bytes(k[8:], "big") for k in tier.keys()]  # noqa: SIM118


def test_rows_come_back_bit_for_bit_in_the_order_of_the_keys(device: torch.device) -> None:
    tier = MemoryTier(100_000, ROW, device)
    put(tier, (1, 3), (2, 0), (3, 5))
    assert gives(tier, (3, 5), (1, 3), (2, 0), (3, 5))
    assert tier.gather([key(1), key(4)]) is None


def test_gathered_rows_are_a_copy(device: torch.device) -> None:
    tier = MemoryTier(100_000, ROW, device)
    put(tier, (1, 3))
    for _ in range(2):
        found = tier.gather([key(1)])
        assert found is not None and found.cpu().equal(rows((1, 3)))
        found.zero_()


def test_the_least_recently_used_text_is_evicted_first(device: torch.device) -> None:
    tier = MemoryTier(3 * (2 * EACH + TEXT_BYTES), ROW, device)
    for text in (1, 2, 3):
        put(tier, (text, 2))
    assert held(tier) == [1, 2, 3] and tier.evictions == 0
    assert tier.gather([key(1)]) is not None
    put(tier, (4, 2))
    assert held(tier) == [3, 1, 4] and tier.evictions == 1


def test_a_miss_does_not_count_as_use(device: torch.device) -> None:
    tier = MemoryTier(2 * (EACH + TEXT_BYTES), ROW, device)
    put(tier, (1, 1))
    put(tier, (2, 1))
    assert tier.gather([key(1), key(9)]) is None
    put(tier, (3, 1))
    assert held(tier) == [2, 3]


def test_a_text_larger_than_the_bound_evicts_nothing(device: torch.device) -> None:
    tier = MemoryTier(3 * (2 * EACH + TEXT_BYTES), ROW, device)
    put(tier, (1, 2))
    put(tier, (2, 2), (3, 1000), (4, 2))
    assert held(tier) == [1, 2, 4] and tier.evictions == 0


def test_a_batch_larger_than_the_bound_keeps_its_last_texts(device: torch.device) -> None:
    tier = MemoryTier(3 * (2 * EACH + TEXT_BYTES), ROW, device)
    put(tier, *((text, 2) for text in range(10)))
    assert held(tier) == [7, 8, 9]


def test_dropping_a_prefix_makes_room_without_eviction(device: torch.device) -> None:
    tier = MemoryTier(4 * (EACH + TEXT_BYTES), ROW, device)
    put(tier, (1, 1), (2, 1))
    tier.put([b"another." + key(3)[8:]], [1], rows((3, 1)).to(device))
    assert tier.drop(b"prefix..") == 2 and len(tier) == 1
    put(tier, (4, 1), (5, 1), (6, 1))
    assert gives(tier, (4, 1), (5, 1), (6, 1)) and tier.evictions == 0


def test_dropping_most_texts_leaves_the_others_unchanged(device: torch.device) -> None:
    tier = MemoryTier(100_000, ROW, device)
    tier.put([b"another." + key(0)[8:]], [3], rows((0, 3)).to(device))
    put(tier, *((text, 4) for text in range(1, 20)))
    assert tier.drop(b"prefix..") == 19
    put(tier, (20, 1))
    found = tier.gather([b"another." + key(0)[8:], key(20)])
    assert found is not None and found.cpu().equal(rows((0, 3), (20, 1)))
    assert tier.evictions == 0


def test_short_texts_reuse_the_memory_of_long_ones(device: torch.device) -> None:
    tier = MemoryTier(200 * (EACH + TEXT_BYTES), ROW, device)
    put(tier, (0, (tier.limit_bytes - TEXT_BYTES) // EACH))
    for text in range(1, 1001):
        put(tier, (text, 1))
    assert len(tier) >= 190
    assert tier.gather([key(text) for text in range(811, 1001)]) is not None


@given(
    st.lists(
        st.tuples(st.booleans(), st.lists(st.tuples(st.integers(0, 12), st.integers(0, 6)), min_size=1, max_size=6)),
        max_size=40,
    ),
    st.integers(0, 12 * (3 * EACH + TEXT_BYTES)),
)
def test_any_sequence_keeps_the_bound_and_the_rows(
    device: torch.device, steps: list[tuple[bool, list[tuple[int, int]]]], limit: int
) -> None:
    tier = MemoryTier(limit, ROW, device)
    count_of: dict[int, int] = {}
    order: OrderedDict[int, None] = OrderedDict()  # texts that are still here, by last use
    for puts, drawn in steps:
        texts = {text: count_of.setdefault(text, count) for text, count in drawn}
        if puts:
            put(tier, *texts.items())
            for text in texts:
                order.setdefault(text)
        else:
            asked = [text for text in texts if key(text) in tier]
            assert gives(tier, *((text, texts[text]) for text in asked))
            for text in asked:
                order.move_to_end(text)
        for text in set(order) - set(held(tier)):
            del order[text]
        assert held(tier) == list(order)
        assert tier.num_bytes <= limit


def test_the_index_takes_no_more_than_it_is_counted_as(device: torch.device) -> None:
    limit = 4 << 20
    tier = MemoryTier(limit, ROW, device)
    count, same = 0, torch.zeros((3 * 100, ROW), dtype=torch.uint8, device=device)
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    # Ten times more than fit, so that freed memory which piles up shows.
    while tier.evictions < 9 * max(1, len(tier)):
        counts = [1 + text % 3 for text in range(count, count + 100)]
        tier.put([key(text) for text in range(count, count + 100)], counts, same[: sum(counts)])
        count += 100
    index = tracemalloc.get_traced_memory()[0] - before
    tracemalloc.stop()
    rows_held = tier._used * ROW
    assert 0.5 * limit < index + rows_held <= limit


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_resident_memory_stays_within_a_tenth_of_the_bound(device: torch.device) -> None:
    code = """
import torch
from bertstream.caching.memory import MemoryTier
def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096
limit = 64 << 20
rows = torch.ones((640, 1536), dtype=torch.uint8)
warm = MemoryTier(1 << 20, 1536)
for start in range(0, 6400, 64):
    warm.put([str(i).encode().zfill(24) for i in range(start, start + 64)], [10] * 64, rows)
before = resident()
tier = MemoryTier(limit, 1536)
texts = 10 * limit // 15360
for start in range(0, texts, 64):
    tier.put([str(i).encode().zfill(24) for i in range(start, start + 64)], [10] * 64, rows)
print((resident() - before) / limit, tier.num_bytes / limit, tier.evictions > 8 * len(tier))
"""
    printed, errors, status = RANKS.start(code).finish()
    assert status == 0, errors
    taken, counted, turned_over = printed.split()
    assert turned_over == "True" and 0.95 < float(counted) <= 1
    assert 0.9 < float(taken) < 1.1


@pytest.mark.slow
def test_a_large_bound_on_the_host_takes_nothing_until_used(device: torch.device) -> None:
    if device.type != "cpu":
        pytest.skip("on other devices all of it is allocated up front")
    code = """
import resource, torch
from bertstream.caching.memory import MemoryTier
torch.use_deterministic_algorithms(True)  # torch.empty then fills its memory
torch.set_default_device("meta")
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
tier = MemoryTier(4 << 30, 1536)
tier.put([b"a" * 24], [1], torch.ones((1, 1536), dtype=torch.uint8, device="cpu"))
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    printed, errors, status = RANKS.start(code).finish()
    assert status == 0, errors
    assert int(printed) < 50_000  # KiB
