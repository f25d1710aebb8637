"""What a storage holds: it grows with what is read, and not with what was ever appended."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import Tensor

from squat_fx.codecs import Codec, Kivi, Lossless, Squat
from squat_fx.pool import SMALLEST_GROWTH
from squat_fx.state import QuantizedKV
from tests.choose import full
from tests.conftest import left_padding, randn, stored_format

WINDOW, HEADS, HEAD_DIM = 24, 2, 16
FMT = stored_format(residual_length=5, sink_length=2)


def first_tokens(
    tokens: int = 20, pads: tuple[int, ...] = (0,), codec: Codec | None = None
) -> tuple[Tensor, QuantizedKV]:
    """A prompt, dense and packed."""
    fmt = FMT if codec is None else stored_format(codec, residual_length=5, sink_length=2)
    x = randn(len(pads), HEADS, tokens, HEAD_DIM)
    valid = left_padding(list(pads), tokens) if any(pads) else None
    return x, QuantizedKV.from_dense(x, fmt, "key", valid)


def slide(handle: QuantizedKV, new: Tensor, window: int = WINDOW) -> QuantizedKV:
    """As a sliding layer does: one token more, and of all of them the newest."""
    longer = torch.cat([handle, new], 2)[:, :, -window:]
    assert isinstance(longer, QuantizedKV)
    return longer


@pytest.mark.parametrize(
    ("codec", "steps"), [(Lossless(4), 2500), (Kivi(32), 1000), *full((Squat(), 2500))]
)
def test_a_window_takes_the_same_room_for_thousands_of_steps(codec: Codec, steps: int) -> None:
    _, handle = first_tokens(codec=codec)
    new = randn(1, HEADS, steps, HEAD_DIM, seed=1)
    sizes, capacity = set(), handle._storage.capacity
    for token in new.split(1, 2):
        handle = slide(handle, token)
        sizes.add(handle._storage.nbytes)
    assert handle.shape == (1, HEADS, WINDOW, HEAD_DIM)
    assert handle.first + WINDOW == 20 + steps
    assert handle._storage.capacity == capacity
    assert len(sizes) == 1
    exact = handle.dequantize()[:, :, -5:]
    assert torch.equal(exact, new[:, :, -5:])
    if codec.name == "none":
        assert torch.equal(handle.dequantize(), new[:, :, -WINDOW:])


def test_a_wide_window_grows_to_little_more_than_it_reads() -> None:
    _, handle = first_tokens()
    for token in randn(1, HEADS, 4000, HEAD_DIM, seed=1).split(16, 2):
        handle = slide(handle, token, window=1500)
    least = 1500 + 16
    assert handle._storage.capacity <= least * 8 / 7 + SMALLEST_GROWTH


def test_rows_that_began_with_padding_are_dropped_from_as_well() -> None:
    _, handle = first_tokens(pads=(0, 3, 19))
    new = randn(3, HEADS, 900, HEAD_DIM, seed=1)
    capacity = handle._storage.capacity
    for token in new.split(1, 2):
        handle = slide(handle, token)
    assert torch.equal(handle.dequantize(), new[:, :, -WINDOW:])
    assert handle._storage.capacity == capacity
    starts = handle._storage["start"]
    assert (starts >= handle._storage.dropped).all()
    assert (starts % 4 == torch.tensor([0, 3, 3])).all()  # whole groups of four


def test_who_keeps_the_beginning_keeps_it_and_holds_nobody_back() -> None:
    x, kept = first_tokens()
    handle = kept
    new = randn(1, HEADS, 1200, HEAD_DIM, seed=1)
    for token in new.split(1, 2):
        handle = slide(handle, token)
    assert handle._storage is not kept._storage
    assert handle._storage.capacity <= 2 * kept._storage.capacity
    assert torch.equal(handle.dequantize(), new[:, :, -WINDOW:])
    assert torch.equal(kept.dequantize(), x)


def test_what_is_copied_of_a_window_goes_on_alone() -> None:
    _, handle = first_tokens(pads=(0, 7))
    new = randn(2, HEADS, 700, HEAD_DIM, seed=1)
    for token in new.split(1, 2):
        handle = slide(handle, token)
    more = randn(2, HEADS, 600, HEAD_DIM, seed=2)
    order = torch.tensor([1, 0, 1])
    others = {
        "deepcopy": (copy.deepcopy(handle), slice(None)),
        "pickle": (pickle.loads(pickle.dumps(handle)), slice(None)),
        "reordered": (handle.index_select(0, order), order),
    }
    for name, (other, rows) in others.items():
        assert torch.equal(other.dequantize(), new[rows, :, -WINDOW:]), name
        capacity = other._storage.capacity
        for token in more.split(1, 2):
            other = slide(other, token[rows])
        assert torch.equal(other.dequantize(), more[rows, :, -WINDOW:]), name
        assert other._storage.capacity == capacity, name
    assert torch.equal(handle.dequantize(), new[:, :, -WINDOW:])


def test_a_window_is_cropped() -> None:
    """As assisted decoding does: the newest tokens were not right after all."""
    _, handle = first_tokens()
    new = randn(1, HEADS, 600, HEAD_DIM, seed=1)
    for token in new.split(1, 2):
        handle = slide(handle, token)
    shorter = handle[:, :, :-6]
    assert isinstance(shorter, QuantizedKV)
    assert torch.equal(shorter.dequantize(), new[:, :, -WINDOW:-6])
    longer = slide(shorter, new[:, :, -3:])
    assert torch.equal(longer[:, :, -3:].dequantize(), new[:, :, -3:])
    assert torch.equal(longer[:, :, :-3].dequantize(), shorter.dequantize())
    assert torch.equal(handle.dequantize(), new[:, :, -WINDOW:])
