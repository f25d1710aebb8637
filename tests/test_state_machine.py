"""Handles against plain tensors: whatever is done to them, each living one reads its own tokens.

The model of a handle is a dense tensor with zeros where padding was not stored. The codec is
lossless, so the two are equal and not merely close. Capacity is kept tight, so that growth happens,
and few handles are kept, so that storages find themselves with one reader and go in place.
"""

from __future__ import annotations

import gc
import pickle
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from torch import Tensor

from squat_fx.boundary import Boundary
from squat_fx.kernels import ops, reference
from squat_fx.passes.records import CacheEdge, InnerInput, InnerOutput
from squat_fx.pool import POOL
from squat_fx.report import Report
from squat_fx.state import QuantizedKV
from tests.conftest import left_padding, randn, stored_format

HEADS, HEAD_DIM, MOST_HANDLES, MOST_TOKENS, MOST_ROWS = 2, 16, 5, 120, 6
FMT = stored_format(head_dim=HEAD_DIM, residual_length=5, sink_length=2)

new_token_counts = st.just(1) | st.integers(1, 20)
pick = st.integers(0, MOST_HANDLES - 1)


def tight_capacity(capacity: int, needed: int) -> int:
    """Hardly more than is needed, in whole groups."""
    return -(-max(capacity, needed) // FMT.token_group) * FMT.token_group


class Interrupted(Exception):
    """Ctrl-C, no memory, a kernel that does not launch."""


@dataclass
class Living:
    """A handle, what it must read, and which of its positions are no padding."""

    handle: QuantizedKV
    expected: Tensor
    valid: Tensor  # bool [batch, tokens]

    def after(self, handle: Tensor, change: Callable[[Tensor], Tensor]) -> Living:
        """The result of an operation that does not add tokens."""
        assert isinstance(handle, QuantizedKV)
        return Living(handle, change(self.expected), change(self.valid))

    def longer(self, handle: Tensor, new: Tensor) -> Living:
        """The result of an append."""
        assert isinstance(handle, QuantizedKV)
        valid = torch.ones(len(new), new.shape[2], dtype=torch.bool)
        return Living(handle, torch.cat([self.expected, new], 2), torch.cat([self.valid, valid], 1))

    def newest(self, tokens: int) -> Living:
        """The same handle, which has only the newest ``tokens``."""
        return Living(self.handle, self.expected[:, :, -tokens:], self.valid[:, -tokens:])


def compiled_append(new_tokens: int, fails: bool, kept: int | None = None) -> Boundary:
    """What the backend makes of a graph that appends to one carrier, and keeps the newest tokens
    only if it says how many.
    """

    def inner(*fed: Tensor) -> tuple[()]:
        *tensors, where, new = fed
        append = ops.overload("append_", FMT.layout)
        append(*tensors, new, None, where, 0, FMT.codec, FMT.to_ints())
        if fails:
            raise Interrupted
        return ()

    edge = CacheEdge("key", "decode", None, None, None, FMT)  # pyright: ignore
    return Boundary(
        inner,
        [
            *(InnerInput("arena", 0, name) for name in FMT.arena_names),
            InnerInput("positions"),
            InnerInput("argument", 1),
        ],
        [InnerOutput("appended", argument=0, tokens=new_tokens, edge=edge, kept=kept)],
        [0],
        [],
        Report(),
        numbers=[] if kept is None else [(1, kept, (0,))],
    )


PROMPTS = {
    "pads": st.lists(st.integers(0, 12), min_size=1, max_size=3),
    "tokens": st.integers(1, 40),
}


class Handles(RuleBasedStateMachine):
    """Any number of generations, beams, crops and accidents.

    ``steps_run`` counts rules, over all machines.
    """

    steps_run = 0

    def __init__(self) -> None:
        super().__init__()
        POOL.clear()  # what an earlier machine made large would hide growth
        self.living: list[Living] = []
        self.seed = 0
        self.setting = ExitStack()
        self.setting.enter_context(torch.no_grad())
        for module in ("state", "storage"):
            self.setting.enter_context(patch(f"squat_fx.{module}.grown_capacity", tight_capacity))

    def teardown(self) -> None:
        self.setting.close()

    def numbers(self, *shape: int) -> Tensor:
        self.seed += 1
        return randn(*shape, seed=self.seed)

    def chosen(self, which: int) -> Living:
        return self.living[which % len(self.living)]

    def keep(self, new: Living) -> None:
        self.living.append(new)
        del self.living[:-MOST_HANDLES]

    def new_for(self, living: Living, tokens: int) -> Tensor:
        return self.numbers(len(living.expected), HEADS, tokens, HEAD_DIM)

    # a cache begins, grows and ends

    @initialize(**PROMPTS)
    def begin(self, pads: list[int], tokens: int) -> None:
        self.store(pads, tokens)

    @rule(**PROMPTS)
    def store(self, pads: list[int], tokens: int) -> None:
        x, valid = self.numbers(len(pads), HEADS, tokens, HEAD_DIM), left_padding(pads, tokens)
        handle = QuantizedKV.from_dense(x, FMT, "key", valid if any(pads) else None)
        self.keep(Living(handle, x.masked_fill(~valid[:, None, :, None], 0.0), valid))

    @precondition(lambda self: self.living)
    @rule(which=pick, tokens=new_token_counts, inference=st.booleans())
    def append(self, which: int, tokens: int, inference: bool) -> None:
        """Also a branch, where the handle was appended to before."""
        old = self.chosen(which)
        if old.handle.shape[2] < MOST_TOKENS:
            new = self.new_for(old, tokens)
            with torch.inference_mode(inference), torch.no_grad():
                self.keep(old.longer(torch.cat([old.handle, new], 2), new))

    @precondition(lambda self: self.living)
    @rule(which=pick, tokens=new_token_counts)
    def append_compiled(self, which: int, tokens: int) -> None:
        old = self.chosen(which)
        if old.handle.shape[2] < MOST_TOKENS:
            new = self.new_for(old, tokens)
            (longer,) = compiled_append(tokens, fails=False)(old.handle, new)
            self.keep(old.longer(longer, new))

    @precondition(lambda self: self.living)
    @rule(which=pick, tokens=new_token_counts)
    def generate(self, which: int, tokens: int) -> None:
        """Token by token, each handle dropped for the next."""
        living = self.living.pop(which % len(self.living))
        if living.handle.shape[2] >= MOST_TOKENS:
            return
        for _ in range(tokens):
            new = self.new_for(living, 1)
            (longer,) = compiled_append(1, fails=False)(living.handle, new)
            living = living.longer(longer, new)
        self.keep(living)

    @precondition(lambda self: self.living)
    @rule(
        which=pick, window=st.integers(1, 40), steps=st.lists(new_token_counts, max_size=40),
        eager=st.booleans(),
    )  # fmt: skip
    def slide(self, which: int, window: int, steps: list[int], eager: bool) -> None:
        """A sliding window, which forgets a token for each new one once it is full."""
        living = self.living.pop(which % len(self.living))
        for tokens in steps:
            new = self.new_for(living, tokens)
            kept = min(window, living.handle.shape[2] + tokens)
            if eager:
                longer = torch.cat([living.handle, new], 2)[:, :, -kept:]
            else:
                (longer,) = compiled_append(tokens, fails=False, kept=kept)(living.handle, new)
            living = living.longer(longer, new).newest(kept)
        self.keep(living)

    @precondition(lambda self: self.living)
    @rule(which=pick, fraction=st.floats(0, 1), in_place_of_its_source=st.booleans())
    def forget_the_oldest(self, which: int, fraction: float, in_place_of_its_source: bool) -> None:
        old = self.chosen(which)
        kept = max(1, round(fraction * old.handle.shape[2]))
        handle = old.handle[:, :, -kept:]
        assert isinstance(handle, QuantizedKV)
        if in_place_of_its_source:
            self.living = [x for x in self.living if x is not old]
        self.keep(Living(handle, old.expected, old.valid).newest(kept))

    @precondition(lambda self: self.living)
    @rule(which=pick)
    def drop(self, which: int) -> None:
        del self.living[which % len(self.living)]
        gc.collect(0)

    # accidents

    @precondition(lambda self: self.living)
    @rule(which=pick, tokens=new_token_counts)
    def append_compiled_and_be_interrupted(self, which: int, tokens: int) -> None:
        living = self.chosen(which)
        try:
            compiled_append(tokens, fails=True)(living.handle, self.new_for(living, tokens))
        except Interrupted:
            return
        raise AssertionError("the interruption was swallowed")

    @precondition(lambda self: self.living)
    @rule(which=pick, tokens=st.integers(0, 20), wrote=st.booleans())
    def fail_to_write_pending_tokens(self, which: int, tokens: int, wrote: bool) -> None:
        self.append(which=which, tokens=tokens, inference=False)
        write = reference.write

        def failing_write(*args: object) -> None:
            if wrote:
                write(*args)  # pyright: ignore[reportArgumentType]
            raise Interrupted

        with patch.object(reference, "write", failing_write), suppress(Interrupted):
            self.living[-1].handle.writable_storage()

    # beams, batches, assisted decoding

    @precondition(lambda self: self.living)
    @rule(which=pick, fraction=st.floats(0, 1), in_place_of_its_source=st.booleans())
    def crop(self, which: int, fraction: float, in_place_of_its_source: bool) -> None:
        old = self.chosen(which)
        length = max(1, round(fraction * old.handle.shape[2]))
        new = Living(old.handle[:, :, :length], old.expected[:, :, :length], old.valid[:, :length])
        assert isinstance(new.handle, QuantizedKV)
        if in_place_of_its_source:
            self.living = [x for x in self.living if x is not old]
        self.keep(new)

    @precondition(lambda self: self.living)
    @rule(which=pick, rows=st.lists(st.integers(0, MOST_ROWS), min_size=1, max_size=3))
    def reorder(self, which: int, rows: list[int]) -> None:
        old = self.chosen(which)
        order = torch.tensor(rows) % len(old.expected)
        self.keep(old.after(old.handle.index_select(0, order), lambda x: x[order]))

    @precondition(lambda self: self.living)
    @rule(which=pick, times=st.integers(1, 3))
    def repeat_interleave(self, which: int, times: int) -> None:
        old = self.chosen(which)
        if len(old.expected) * times <= MOST_ROWS:
            self.keep(
                old.after(
                    old.handle.repeat_interleave(times, dim=0),
                    lambda x: x.repeat_interleave(times, dim=0),
                )
            )

    @precondition(lambda self: self.living)
    @rule(which=pick, first=st.integers(0, 2), by_mask=st.booleans())
    def select_rows(self, which: int, first: int, by_mask: bool) -> None:
        old = self.chosen(which)
        first %= len(old.expected)
        rows = torch.arange(len(old.expected)) >= first if by_mask else slice(first, None)
        self.keep(old.after(old.handle[rows], lambda x: x[rows]))

    @precondition(lambda self: self.living)
    @rule(which=pick)
    def clone(self, which: int) -> None:
        old = self.chosen(which)
        self.keep(old.after(old.handle.clone(), Tensor.clone))

    @precondition(lambda self: self.living)
    @rule(which=pick)
    def keep_in_a_file(self, which: int) -> None:
        old = self.chosen(which)
        self.keep(old.after(pickle.loads(pickle.dumps(old.handle)), Tensor.clone))

    @precondition(lambda self: self.living)
    @rule(which=pick)
    def share(self, which: int) -> None:
        """Two handles over the same tokens, as ``detach`` gives."""
        old = self.chosen(which)
        self.keep(old.after(old.handle.detach(), Tensor.clone))

    # reading

    @precondition(lambda self: self.living)
    @rule(which=pick, queries=st.sampled_from([1, 3]))
    def attend(self, which: int, queries: int) -> None:
        living = self.chosen(which)
        seen = living.valid[:, None, None, :]
        query = self.numbers(len(living.expected), HEADS, queries, HEAD_DIM)
        out = F.scaled_dot_product_attention(
            query, living.handle, living.handle, attn_mask=seen.expand(-1, -1, queries, -1)
        )
        expected = F.scaled_dot_product_attention(
            query, living.expected, living.expected, attn_mask=seen
        )
        torch.testing.assert_close(out, expected)

    @invariant()
    def another_rule_ran(self) -> None:
        Handles.steps_run += 1

    @invariant()
    def every_living_handle_reads_its_own_tokens(self) -> None:
        for living in self.living:
            assert living.handle.shape == living.expected.shape
            assert torch.equal(living.handle.dequantize(), living.expected)

    @invariant()
    def no_storage_is_shorter_than_its_readers(self) -> None:
        for living in self.living:
            storage, pending = living.handle._storage, living.handle._pending
            stored = living.handle.shape[2] - (0 if pending is None else pending.shape[2])
            lease = living.handle._lease
            assert stored == lease.length - lease.first
            assert storage.dropped <= lease.first <= lease.length <= storage.length


def settings_of(examples: int) -> settings:
    """So many machines of at most 40 rules each."""
    return settings(max_examples=examples, stateful_step_count=40, deadline=None)


class TestHandles(Handles.TestCase):
    """``--hypothesis-show-statistics`` says what ran."""

    settings = settings_of(75)

    def setUp(self) -> None:
        self.before = Handles.steps_run

    def tearDown(self) -> None:
        assert Handles.steps_run - self.before >= 2000


@pytest.mark.full
@pytest.mark.parametrize("part", range(8))
def test_handles_in_the_long_run(part: int) -> None:
    """200,000 rules, in parts that may run side by side."""
    before = Handles.steps_run
    run_state_machine_as_test(Handles, settings=settings_of(850))
    steps = Handles.steps_run - before
    print(f"{steps} rules in part {part}")
    assert steps >= 25_000
