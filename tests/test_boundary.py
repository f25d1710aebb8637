"""The edge of a compiled call: handles of one storage among its arguments, and calls that fail."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from squat_fx.boundary import Boundary
from squat_fx.kernels import ops
from squat_fx.passes.records import CacheEdge, InnerInput, InnerOutput
from squat_fx.report import Report
from squat_fx.state import QuantizedKV
from tests.conftest import randn, stored_format

FMT = stored_format()


def append_to_two(tokens: int, fails: bool = False) -> Boundary:
    """What the backend makes of a graph that appends the same ``tokens`` to two carriers."""
    count = len(FMT.arena_names)

    def inner(*fed: Tensor) -> tuple[()]:
        *arenas, where, new = fed
        append = ops.overload("append_", FMT.layout)
        for row in range(2):
            of_row = arenas[row * count : (row + 1) * count]
            append(*of_row, new, None, where, row, FMT.codec, FMT.to_ints())
        if fails:
            raise MemoryError
        return ()

    edge = CacheEdge("key", "decode", None, None, None, FMT)  # pyright: ignore
    return Boundary(
        inner,
        [
            *(InnerInput("arena", row, name) for row in range(2) for name in FMT.arena_names),
            InnerInput("positions"),
            InnerInput("argument", 2),
        ],
        [InnerOutput("appended", argument=row, tokens=tokens, edge=edge) for row in range(2)],
        [0, 1],
        [],
        Report(),
    )


RELATIVES: dict[str, Callable[[Tensor], Tensor]] = {
    "itself": lambda x: x,
    "an alias": lambda x: x.detach(),
    "a crop": lambda x: x[:, :, :19],
    "a window": lambda x: x[:, :, 7:],
    "a longer one whose tokens wait": lambda x: torch.cat([x, randn(1, 2, 3, 16, seed=2)], 2),
    "a longer one": lambda x: torch.cat([x, randn(1, 2, 3, 16, seed=2)], 2).clone(),
}


PAIRS = list(itertools.product(RELATIVES, RELATIVES))


@pytest.mark.parametrize("tokens", [1, 5])
@pytest.mark.parametrize(("first", "second"), PAIRS)
def test_handles_of_one_storage_are_appended_to_apart(first: str, second: str, tokens: int) -> None:
    """Also after a call that failed."""
    dense, new = randn(1, 2, 30, 16), randn(1, 2, tokens, 16, seed=9)
    expected = [RELATIVES[name](dense) for name in (first, second)]
    for fails_first in (False, True):
        handle = QuantizedKV.from_dense(dense, FMT, "key")
        arguments = [RELATIVES[name](handle) for name in (first, second)]
        with torch.no_grad():
            if fails_first:
                with pytest.raises(MemoryError):
                    append_to_two(tokens, fails=True)(*arguments, new)
                for argument, before in zip(arguments, expected, strict=True):
                    assert torch.equal(argument.dequantize(), before)
            longer = append_to_two(tokens)(*arguments, new)
        for argument, after, before in zip(arguments, longer, expected, strict=True):
            assert torch.equal(argument.dequantize(), before)
            assert torch.equal(after.dequantize(), torch.cat([before, new], 2))
        assert torch.equal(handle.dequantize(), dense)
