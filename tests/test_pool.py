"""The pool is memory and has no meaning: zeroed, writable, reused, bounded."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from squat_fx.pool import CAPACITY_MULTIPLE, SMALLEST_GROWTH, ArenaPool, grown_capacity

CPU = torch.device("cpu")


def take(pool: ArenaPool, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return pool.take(shape, dtype, CPU)


# capacity ---------------------------------------------------------------------------------------


@given(capacity=st.integers(0, 10**6), needed=st.integers(0, 2 * 10**6))
def test_capacity_grows_by_an_eighth_and_at_least_256_tokens(capacity: int, needed: int) -> None:
    grown = grown_capacity(capacity, needed)
    least = max(needed, capacity + max(capacity // 8, SMALLEST_GROWTH))
    assert least <= grown < least + CAPACITY_MULTIPLE
    assert grown % CAPACITY_MULTIPLE == 0


def test_growth_from_ten_to_two_thousand_tokens_copies_seldom() -> None:
    capacity, copies = grown_capacity(10, 0), 0
    for length in range(10, 2000):
        if length > capacity:
            capacity, copies = grown_capacity(capacity, length), copies + 1
    assert copies == 7


# memory -----------------------------------------------------------------------------------------


def test_an_arena_is_zeroed_and_writable_under_any_mode() -> None:
    pool = ArenaPool()
    with torch.inference_mode():
        arena = take(pool, 2, 3)
    assert not arena.is_inference()
    assert not arena.any()
    arena.add_(1)


def test_an_arena_is_reused_and_zeroed_again() -> None:
    pool = ArenaPool()
    arena = take(pool, 2, 3)
    address = arena.data_ptr()
    arena.fill_(7)
    pool.give(arena)
    again = take(pool, 2, 3)
    assert again.data_ptr() == address
    assert not again.any()
    assert pool.free_bytes == 0


@pytest.mark.parametrize(("shape", "dtype"), [((3, 2), torch.float32), ((2, 3), torch.int32)])
def test_near_miss_of_another_shape_or_dtype_is_not_reused(
    shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    pool = ArenaPool()
    pool.give(take(pool, 2, 3))
    assert take(pool, *shape, dtype=dtype).shape == shape
    assert pool.live_bytes == 24


def test_what_grows_gets_the_smallest_free_arena_with_room() -> None:
    pool = ArenaPool()
    arenas = [take(pool, 1, 2, tokens, 3) for tokens in (300, 900, 600)]
    for arena in arenas:
        pool.give(arena)
    sizes = [pool.take((1, 2, 400, 3), torch.float32, CPU, grows=True).shape[2] for _ in range(3)]
    assert sizes == [600, 900, 400]
    pool.give(arenas[0])
    assert take(pool, 1, 2, 200, 3).shape[2] == 200, "what does not grow gets what it asked for"


@given(order=st.permutations(range(6)))
def test_a_generation_gets_the_arenas_of_the_last_one(order: list[int]) -> None:
    pool = ArenaPool()

    def generation() -> list[Tensor]:
        return [pool.take((1, 2, 128, 3), torch.float32, CPU, grows=True) for _ in order]

    first = generation()
    for i in order:
        pool.give(first[i])
    assert [a.data_ptr() for a in generation()] == [a.data_ptr() for a in first]


def test_two_takes_never_share_memory() -> None:
    pool = ArenaPool()
    pool.give(take(pool, 2, 3))
    assert take(pool, 2, 3).data_ptr() != take(pool, 2, 3).data_ptr()


@given(
    actions=st.lists(st.tuples(st.booleans(), st.integers(1, 9)), max_size=40),
    slack=st.sampled_from([1.0, 1.25, 2.0]),
)
def test_it_counts_what_lives_and_holds_no_more_than_its_slack(
    actions: list[tuple[bool, int]], slack: float
) -> None:
    pool, live, peak = ArenaPool(slack), [], 0
    for gives, size in actions:
        if gives and live:
            pool.give(live.pop(size % len(live)))
        else:
            live.append(take(pool, size, 4))
        expected = sum(arena.nbytes for arena in live)
        peak = max(peak, expected)
        assert pool.live_bytes == expected
        assert pool.peak_bytes == peak
        assert pool.live_bytes + pool.free_bytes <= slack * peak


def test_the_oldest_free_arena_is_evicted_first() -> None:
    pool = ArenaPool(slack=1.0)
    first, second = take(pool, 1), take(pool, 2)
    kept = second.data_ptr()
    pool.give(first)
    pool.give(second)
    take(pool, 1, 1)  # of another shape: what is free must shrink by as much
    assert pool.free_bytes == second.nbytes
    assert take(pool, 2).data_ptr() == kept


def test_clear_frees_what_is_not_in_use() -> None:
    pool = ArenaPool()
    arena = take(pool, 4)
    pool.give(take(pool, 8))
    pool.clear()
    assert (pool.free_bytes, pool.live_bytes, pool.peak_bytes) == (0, arena.nbytes, arena.nbytes)


class Collecting(int):
    """A size whose comparison lets the garbage collector return arenas, as any line may."""

    pool: ArenaPool
    garbage: list[Tensor]

    def __eq__(self, other: object) -> bool:
        while self.garbage:
            self.pool.give(self.garbage.pop())
        return int(self) == other

    __hash__ = int.__hash__


def test_arenas_may_come_back_while_one_is_searched_for() -> None:
    pool = ArenaPool(slack=4)
    size = Collecting(3)
    size.pool, size.garbage = pool, [take(pool, n) for n in (5, 6)]
    pool.give(take(pool, 1, 1, 2))
    assert pool.take((1, 1, size), torch.float32, CPU).shape == (1, 1, 3)
    assert not size.garbage
    assert pool.live_bytes == 12
