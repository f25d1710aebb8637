"""The carrier: it tells the truth about the tensor it stands for, whatever is done to it."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from squat_fx.codecs import CODECS, Codec, Format, Kivi, Kvarn, Role, Squat, Think
from squat_fx.kernels import reference
from squat_fx.pool import POOL
from squat_fx.state import QuantizedKV
from squat_fx.storage import Storage
from tests.conftest import left_padding, randn, stored_format

SHAPE = (3, 2, 30, 16)
MODES = {"no_grad": torch.no_grad, "inference_mode": torch.inference_mode}


@pytest.fixture(params=MODES, autouse=True)
def mode(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every test runs under both modes in which people generate."""
    with MODES[request.param]():
        yield request.param


@pytest.fixture
def dense() -> Tensor:
    return randn(*SHAPE)


@pytest.fixture
def handle(dense: Tensor) -> QuantizedKV:
    return QuantizedKV.from_dense(dense, stored_format(), "key")


def new_tokens(tokens: int, seed: int = 1) -> Tensor:
    return randn(SHAPE[0], SHAPE[1], tokens, SHAPE[3], seed=seed)


def assert_is(handle: Tensor, expected: Tensor) -> None:
    """``handle`` is packed and stands for exactly ``expected``."""
    assert isinstance(handle, QuantizedKV)
    assert (handle.shape, handle.dtype, handle.device) == (
        expected.shape,
        expected.dtype,
        expected.device,
    )
    assert torch.equal(handle.dequantize(), expected)


# what it is -------------------------------------------------------------------------------------


def test_it_tells_the_truth_of_the_dense_tensor(handle: QuantizedKV, dense: Tensor) -> None:
    assert handle.shape == dense.shape
    assert handle.dtype == dense.dtype
    assert handle.device == dense.device
    assert handle.numel() == dense.numel()
    assert handle.dim() == 4
    assert handle.size(-2) == 30
    assert handle.stride() == dense.stride()
    assert handle.is_contiguous()
    assert not handle.requires_grad


def test_it_says_what_it_is(handle: QuantizedKV) -> None:
    assert repr(handle) == (
        "QuantizedKV(key, shape=(3, 2, 30, 16), dtype=torch.float32, device=cpu, "
        f"codec='none {{\"group_size\": 4}}', {handle.storage_nbytes} bytes)"
    )
    assert handle.format == stored_format()
    assert handle.role == "key"


def test_it_counts_its_bytes_with_spare_capacity_and_pending_tokens(handle: QuantizedKV) -> None:
    arenas = sum(arena.nbytes for arena in handle._storage.tensors)
    assert handle.storage_nbytes == arenas
    assert torch.cat([handle, new_tokens(2)], 2).storage_nbytes == arenas + new_tokens(2).nbytes


@pytest.mark.parametrize("name", ["squat", "squat_paper", "think", "kivi", "qjl"])
def test_queries_say_nothing_of_values(name: str) -> None:
    fmt, x = stored_format(CODECS[name](), "value", 32), randn(1, 2, 60, 32)
    asked = QuantizedKV.from_dense(x, fmt, "value", query=randn(1, 4, 60, 32, seed=1))
    assert_is(asked, QuantizedKV.from_dense(x, fmt, "value").dequantize())


def test_padding_reads_as_zeros(dense: Tensor) -> None:
    valid = left_padding([0, 7, 30], 30)
    handle = QuantizedKV.from_dense(dense, stored_format(), "key", valid)
    assert_is(handle, dense.masked_fill(~valid[:, None, :, None], 0.0))


@pytest.mark.parametrize("shape", [(2, 30, 16), (1, 2, 30, 8)])
def test_another_shape_is_refused(shape: tuple[int, ...]) -> None:
    text = f"expected [batch, heads, tokens, 16] to pack, got {shape}"
    with pytest.raises(ValueError, match=f"^{re.escape(text)}$"):
        QuantizedKV.from_dense(torch.zeros(shape), stored_format(), "key")


def test_packing_frees_the_dense_tensor() -> None:
    """Two bits, scales, spare capacity and exact tokens: less than a third of fp16."""
    fmt = stored_format(Kivi(), head_dim=64, residual_length=32, sink_length=4)
    x = randn(1, 2, 2000, 64, dtype=torch.float16)
    handle = QuantizedKV.from_dense(x, fmt, "key")
    assert handle.storage_nbytes < x.nbytes / 3


# appending --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dim", [2, -2])
@pytest.mark.parametrize("tokens", [1, 2, 13])
def test_cat_appends(handle: QuantizedKV, dense: Tensor, dim: int, tokens: int) -> None:
    longer = torch.cat([handle, new_tokens(tokens)], dim)
    assert_is(longer, torch.cat([dense, new_tokens(tokens)], 2))
    assert_is(handle, dense)
    assert longer._storage is handle._storage


def test_cat_appends_several_pieces_at_once(handle: QuantizedKV, dense: Tensor) -> None:
    pieces = [new_tokens(1), new_tokens(4, seed=2), new_tokens(0)]
    assert_is(torch.cat([handle, *pieces], 2), torch.cat([dense, *pieces], 2))


def test_cat_with_nothing_is_the_same(handle: QuantizedKV, dense: Tensor) -> None:
    assert_is(torch.cat([handle, new_tokens(0)], 2), dense)


def test_appending_token_by_token_copies_nothing(handle: QuantizedKV, dense: Tensor) -> None:
    storage, expected, longer = handle._storage, dense, handle
    for i in range(40):
        longer = torch.cat([longer, new_tokens(1, seed=i)], 2)
        expected = torch.cat([expected, new_tokens(1, seed=i)], 2)
        assert longer._storage is storage
    assert_is(longer, expected)
    assert_is(handle, dense)


def test_appending_beyond_capacity_grows(handle: QuantizedKV, dense: Tensor) -> None:
    capacity = handle._storage.capacity
    longer = torch.cat([handle, new_tokens(capacity)], 2).clone()
    assert longer._storage.capacity >= capacity + 256
    assert_is(longer, torch.cat([dense, new_tokens(capacity)], 2))


def test_the_appended_tokens_may_be_overwritten_afterwards(
    handle: QuantizedKV, dense: Tensor
) -> None:
    """A static buffer of the model is reused in the next step."""
    buffer = new_tokens(1)
    longer = torch.cat([handle, buffer], 2)
    buffer.fill_(torch.nan)
    assert_is(longer, torch.cat([dense, new_tokens(1)], 2))


def test_two_branches_of_one_handle_are_apart(handle: QuantizedKV, dense: Tensor) -> None:
    left = torch.cat([torch.cat([handle, new_tokens(3)], 2), new_tokens(9, seed=2)], 2)
    right = torch.cat([torch.cat([handle, new_tokens(5, seed=3)], 2), new_tokens(9, seed=4)], 2)
    assert_is(left, torch.cat([dense, new_tokens(3), new_tokens(9, seed=2)], 2))
    assert_is(right, torch.cat([dense, new_tokens(5, seed=3), new_tokens(9, seed=4)], 2))
    assert_is(handle, dense)


def test_lower_precision_is_appended_in_the_cache_dtype(handle: QuantizedKV, dense: Tensor) -> None:
    new = new_tokens(1).to(torch.bfloat16)
    assert_is(torch.cat([handle, new], 2), torch.cat([dense, new], 2))


def appends_in_a_way_that_is_no_append() -> dict[str, Callable[[Tensor, Tensor], Tensor]]:
    return {
        "along the batch": lambda x, new: torch.cat([x, x[:1].clone()], 0),
        "along the heads": lambda x, new: torch.cat([x, x], 1),
        "in front": lambda x, new: torch.cat([new, x], 2),
        "to itself": lambda x, new: torch.cat([x, x], 2),
        "of one tensor": lambda x, new: torch.cat([x], 2),
        "of a higher precision": lambda x, new: torch.cat([x, new.double()], 2),
        "after an empty legacy cache": lambda x, new: torch.cat([torch.tensor([]), x], -2),
    }


@pytest.mark.parametrize("way", appends_in_a_way_that_is_no_append())
def test_near_miss_of_an_append_is_a_dense_cat(
    handle: QuantizedKV, dense: Tensor, way: str
) -> None:
    cat = appends_in_a_way_that_is_no_append()[way]
    out, expected = cat(handle, new_tokens(2)), cat(dense, new_tokens(2))
    assert not isinstance(out, QuantizedKV)
    assert out.dtype == expected.dtype
    assert torch.equal(out, expected)
    assert_is(handle, dense)


@pytest.mark.parametrize(
    ("new", "dim", "error"),
    [
        (torch.zeros(1, 2, 1, 16), 2, "Sizes of tensors must match except in dimension 2"),
        (torch.zeros(3, 1, 1, 16), 2, "Sizes of tensors must match except in dimension 2"),
        (torch.zeros(3, 2, 1, 8), -2, "Sizes of tensors must match except in dimension"),
        (torch.zeros(3, 2, 1, 16), 6, "Dimension out of range"),
    ],
)
def test_a_cat_that_torch_refuses_is_refused(
    handle: QuantizedKV, new: Tensor, dim: int, error: str
) -> None:
    with pytest.raises((RuntimeError, IndexError), match=error):
        torch.cat([handle, new], dim)


# attending --------------------------------------------------------------------------------------


@pytest.fixture
def dequantized_handles(monkeypatch: pytest.MonkeyPatch) -> list[QuantizedKV]:
    """The handles that were dequantized while the test ran."""
    seen: list[QuantizedKV] = []
    original = QuantizedKV.dequantize

    def spy(self: QuantizedKV) -> Tensor:
        seen.append(self)
        return original(self)

    monkeypatch.setattr(QuantizedKV, "dequantize", spy)
    return seen


@pytest.mark.parametrize("pending", [0, 1, 5])
@pytest.mark.parametrize("with_mask", [False, True])
def test_attention_reads_the_packed_tokens(
    handle: QuantizedKV,
    dense: Tensor,
    dequantized_handles: list[QuantizedKV],
    pending: int,
    with_mask: bool,
) -> None:
    key = torch.cat([handle, new_tokens(pending)], 2)
    expected_key = torch.cat([dense, new_tokens(pending)], 2)
    query = randn(3, 4, 5, 16, seed=7)
    mask = randn(3, 1, 5, 30 + pending, seed=8) > -1 if with_mask else None
    options = {"attn_mask": mask, "scale": 0.3, "enable_gqa": True}
    out = F.scaled_dot_product_attention(query, key, key, **options)
    expected = F.scaled_dot_product_attention(query, expected_key, expected_key, **options)
    assert not dequantized_handles
    torch.testing.assert_close(out, expected)


def test_causal_attention_is_top_left(handle: QuantizedKV, dense: Tensor) -> None:
    query = randn(3, 2, 5, 16, seed=7)
    out = F.scaled_dot_product_attention(query, handle, handle, is_causal=True)
    expected = F.scaled_dot_product_attention(query, dense, dense, is_causal=True)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(out[:, :, 0], dense[:, :, 0])


def test_attention_leaves_padding_out() -> None:
    x, valid = randn(*SHAPE), left_padding([0, 7, 29], 30)
    handle = QuantizedKV.from_dense(x, stored_format(), "key", valid)
    query = randn(3, 2, 1, 16, seed=7)
    expected = F.scaled_dot_product_attention(query, x, x, attn_mask=valid[:, None, None])
    torch.testing.assert_close(F.scaled_dot_product_attention(query, handle, handle), expected)


def test_attention_of_an_older_reader_reads_its_own_tokens(
    handle: QuantizedKV, dense: Tensor
) -> None:
    longer = torch.cat([torch.cat([handle, new_tokens(9)], 2), new_tokens(9)], 2)
    query = randn(3, 2, 1, 16, seed=7)
    torch.testing.assert_close(
        F.scaled_dot_product_attention(query, handle, handle),
        F.scaled_dot_product_attention(query, dense, dense),
    )
    assert longer.shape[2] == 48


def test_near_miss_dense_values_beside_packed_keys(handle: QuantizedKV, dense: Tensor) -> None:
    query = randn(3, 2, 1, 16, seed=7)
    torch.testing.assert_close(
        F.scaled_dot_product_attention(query, handle, dense),
        F.scaled_dot_product_attention(query, dense, dense),
    )


def test_near_miss_grouped_heads_without_saying_so(handle: QuantizedKV) -> None:
    with pytest.raises(RuntimeError, match="must match"):
        F.scaled_dot_product_attention(randn(3, 4, 1, 16), handle, handle)


# selecting --------------------------------------------------------------------------------------

STAYS_PACKED: dict[str, Callable[[Tensor], Tensor]] = {
    "index_select": lambda x: x.index_select(0, torch.tensor([2, 0, 0, 1])),
    "index_select, negative dim": lambda x: torch.index_select(x, -4, torch.tensor([1])),
    "index by a tensor": lambda x: x[torch.tensor([1, 1, 2, 0])],
    "index by a tensor and an ellipsis": lambda x: x[torch.tensor([1, 0]), ...],
    "index by a list": lambda x: x[[2, 0]],
    "index by a mask": lambda x: x[torch.tensor([True, False, True])],
    "rows from": lambda x: x[1:],
    "rows to": lambda x: x[:2],
    "rows from the end": lambda x: x[-2:],
    "every second row": lambda x: x[::2],
    "narrow on the batch": lambda x: x.narrow(0, 1, 1),
    "all of it": lambda x: x[...],
    "all of each dim": lambda x: x[:, :, :, :],
    "crop": lambda x: x[:, :, :11],
    "crop with an ellipsis": lambda x: x[..., :-4, :],
    "crop to one token": lambda x: x[:, :, :1],
    "crop nothing": lambda x: x[:, :, :30],
    "narrow on the tokens": lambda x: x.narrow(2, 0, 20),
    "repeat_interleave": lambda x: x.repeat_interleave(2, dim=0),
    "repeat_interleave, positional": lambda x: x.repeat_interleave(3, -4),
    "repeat_interleave by row": lambda x: x.repeat_interleave(torch.tensor([2, 0, 1]), dim=0),
    "clone": lambda x: x.clone(),
    "detach": lambda x: x.detach(),
    "contiguous": lambda x: x.contiguous(),
    "deepcopy": lambda x: copy.deepcopy(x),
    "copy": lambda x: copy.copy(x),
    "pickle": lambda x: pickle.loads(pickle.dumps(x)),
    "to a lower precision": lambda x: x.to(torch.bfloat16),
    "half": lambda x: x.half(),
    "to another precision, copied": lambda x: x.to(torch.float32, copy=True),
    "to a device": lambda x: x.to("cpu"),
    "cpu": lambda x: x.cpu(),
    "to what another tensor is": lambda x: x.to(torch.zeros(1, dtype=torch.float16)),
    "to the same": lambda x: x.to(dtype=torch.float32),
    "last token": lambda x: x[:, :, -1:],
    "newest tokens": lambda x: x[:, :, -9:],
    "a window": lambda x: x[:, :, 3:9],
    "a window of a window": lambda x: x[:, :, 3:][:, :, 2:-4],
}

DEQUANTIZES: dict[str, Callable[[Tensor], Tensor]] = {
    "add": lambda x: x + 1,
    "radd": lambda x: 1 + x,
    "matmul": lambda x: x @ x.transpose(-1, -2),
    "sum": lambda x: x.sum(),
    "transpose": lambda x: x.transpose(2, 3),
    "reshape": lambda x: x.reshape(6, 30, 16),
    "expand the heads": lambda x: x[:, :, None].expand(3, 2, 4, 30, 16).reshape(3, 8, 30, 16),
    "every second token": lambda x: x[:, :, ::2],
    "no tokens": lambda x: x[:, :, :0],
    "one head": lambda x: x[:, :1],
    "half of the channels": lambda x: x[..., :8],
    "one row": lambda x: x[1],
    "no rows": lambda x: x[3:],
    "tokens by index": lambda x: x[:, :, torch.tensor([0, 5])],
    "rows and heads by index": lambda x: x[torch.tensor([0, 1]), torch.tensor([1, 1])],
    "rows by a matrix": lambda x: x[torch.tensor([[0, 1], [2, 2]])],
    "index_select on heads": lambda x: x.index_select(1, torch.tensor([1, 0])),
    "repeat_interleave on heads": lambda x: x.repeat_interleave(2, dim=1),
    "repeat_interleave of everything": lambda x: x.repeat_interleave(2),
    "split": lambda x: torch.cat(x.split(10, dim=2), 0),
    "to integers": lambda x: (10 * x).to(torch.int32),
    "masked_fill": lambda x: x.masked_fill(x > 0, 0.0),
    "where": lambda x: torch.where(x > 0, x, torch.zeros(())),
    "copied into a dense tensor": lambda x: torch.empty(SHAPE).copy_(x),
    "written into out": lambda x: torch.add(x, 1, out=torch.empty(SHAPE)),
}


@pytest.mark.parametrize("name", STAYS_PACKED)
def test_stays_packed_and_is_right(handle: QuantizedKV, dense: Tensor, name: str) -> None:
    operation = STAYS_PACKED[name]
    assert_is(operation(handle), operation(dense))
    assert_is(handle, dense)


@pytest.mark.parametrize("name", STAYS_PACKED)
def test_stays_packed_with_tokens_pending_and_with_padding(dense: Tensor, name: str) -> None:
    valid = left_padding([0, 3, 26], 26)
    handle = QuantizedKV.from_dense(dense[:, :, :26], stored_format(), "key", valid)
    handle = torch.cat([handle, dense[:, :, 26:]], 2)
    dense[:, :, :26].masked_fill_(~valid[:, None, :, None], 0.0)
    assert_is(STAYS_PACKED[name](handle), STAYS_PACKED[name](dense))
    assert_is(handle, dense)


@pytest.mark.parametrize("name", STAYS_PACKED)
def test_the_result_and_its_source_go_on_apart(
    handle: QuantizedKV, dense: Tensor, name: str
) -> None:
    result, expected = STAYS_PACKED[name](handle), STAYS_PACKED[name](dense)
    ours, theirs = new_tokens(9), randn(len(expected), 2, 9, 16, seed=5, dtype=expected.dtype)
    longer = torch.cat([torch.cat([handle, ours], 2), ours], 2)
    other = torch.cat([torch.cat([result, theirs], 2), theirs], 2)
    assert_is(longer, torch.cat([dense, ours, ours], 2))
    assert_is(other, torch.cat([expected, theirs, theirs], 2))
    assert_is(result, expected)
    assert_is(handle, dense)


@pytest.mark.parametrize("name", DEQUANTIZES)
def test_everything_else_dequantizes_and_is_right(
    handle: QuantizedKV, dense: Tensor, name: str
) -> None:
    out, expected = DEQUANTIZES[name](handle), DEQUANTIZES[name](dense)
    assert type(out) is Tensor
    assert out.dtype == expected.dtype
    assert torch.equal(out, expected)
    assert_is(handle, dense)


def test_the_same_codes_are_copied_not_quantized_again() -> None:
    fmt = stored_format(Kivi(), residual_length=8)
    handle = QuantizedKV.from_dense(randn(2, 2, 90, 16), fmt, "key")
    copies = handle.clone(), handle.index_select(0, torch.tensor([0, 1])), handle.to("cpu")
    for x in copies:
        assert torch.equal(x._storage["qdata"], handle._storage["qdata"])
        assert torch.equal(x._storage["scale"], handle._storage["scale"])


def test_a_change_of_dtype_keeps_the_precision_of_scales() -> None:
    fmt = stored_format(Kivi(), residual_length=8)
    handle = QuantizedKV.from_dense(randn(2, 2, 90, 16), fmt, "key").to(torch.bfloat16)
    assert handle.dtype == handle._storage["dense"].dtype == torch.bfloat16
    assert handle._storage["scale"].dtype == torch.float16
    assert handle._storage["qdata"].dtype == torch.uint8


def test_a_deepcopy_keeps_shared_handles_shared(handle: QuantizedKV) -> None:
    first, second = copy.deepcopy([handle, handle])
    assert first is second


def test_it_survives_torch_save(handle: QuantizedKV, dense: Tensor) -> None:
    file = io.BytesIO()
    torch.save({"cache": [torch.cat([handle, new_tokens(3)], 2)]}, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)["cache"][0]
    assert_is(loaded, torch.cat([dense, new_tokens(3)], 2))
    assert_is(torch.cat([loaded, new_tokens(1)], 2)[:, :, :33], loaded.dequantize())


def test_loading_leaves_the_pool_balanced(handle: QuantizedKV) -> None:
    gc.collect()
    before = POOL.live_bytes
    loaded = pickle.loads(pickle.dumps(handle))
    assert POOL.live_bytes == before + loaded.storage_nbytes
    del loaded
    gc.collect()
    assert POOL.live_bytes == before


# writing in place -------------------------------------------------------------------------------

IN_PLACE: dict[str, tuple[str, Callable[[Tensor], object]]] = {
    "mul_": ("aten.mul_.Tensor", lambda x: x.mul_(2)),
    "add_": ("aten.add_.Tensor", lambda x: x.add_(1)),
    "copy_": ("aten.copy_.default", lambda x: x.copy_(torch.zeros(SHAPE))),
    "zero_": ("aten.zero_.default", lambda x: x.zero_()),
    "index_copy_": (
        "aten.index_copy_.default",
        lambda x: x.index_copy_(2, torch.tensor([0]), new_tokens(1)),
    ),
    "out": ("aten.add.out", lambda x: torch.add(torch.zeros(SHAPE), 1, out=x)),
    "foreach": ("aten._foreach_mul_.Scalar", lambda x: torch._foreach_mul_([x], 2.0)),
    "assignment": ("item assignment", lambda x: x.__setitem__((..., 0), 1.0)),
    "assignment by index": ("item assignment", lambda x: x.__setitem__(torch.tensor([0]), 1.0)),
}


@pytest.mark.parametrize("name", IN_PLACE)
def test_a_write_in_place_is_refused(handle: QuantizedKV, dense: Tensor, name: str) -> None:
    op, write = IN_PLACE[name]
    text = (
        f"a QuantizedKV cannot be written in place ({op}); build a new tensor from its dequantize()"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(text)}$"):
        write(handle)
    assert_is(handle, dense)


# whose tokens are whose -------------------------------------------------------------------------


def test_the_only_reader_is_cropped_in_place(handle: QuantizedKV, dense: Tensor) -> None:
    """What assisted decoding does in every round."""
    storage = handle._storage
    for i in range(5):
        handle = torch.cat([handle, new_tokens(4, seed=i)], 2)
        dense = torch.cat([dense, new_tokens(4, seed=i)], 2)[:, :, :-3]
        handle = handle[:, :, :-3]
        assert_is(handle, dense)
    assert handle._storage is storage


def test_a_crop_beside_a_longer_reader_copies_when_it_is_appended_to(
    handle: QuantizedKV, dense: Tensor
) -> None:
    crop = handle[:, :, :12]
    assert crop._storage is handle._storage, "a crop alone copies nothing"
    longer = torch.cat([torch.cat([crop, new_tokens(2)], 2), new_tokens(20)], 2)
    assert longer._storage is not handle._storage
    assert_is(longer, torch.cat([dense[:, :, :12], new_tokens(2), new_tokens(20)], 2))
    assert_is(crop, dense[:, :, :12])
    assert_is(handle, dense)


def test_a_dropped_reader_no_longer_counts(handle: QuantizedKV, dense: Tensor) -> None:
    storage = handle._storage
    longer = torch.cat([torch.cat([handle, new_tokens(20)], 2), new_tokens(1)], 2)
    assert storage.length == 50
    del longer
    again = torch.cat([handle, new_tokens(2, seed=9)], 2)
    assert again._storage is storage
    assert storage.length == 30
    assert_is(again, torch.cat([dense, new_tokens(2, seed=9)], 2))


def test_an_append_after_a_crop_into_the_padding(dense: Tensor) -> None:
    valid = left_padding([0, 20, 30], 30)
    handle = QuantizedKV.from_dense(dense, stored_format(), "key", valid)[:, :, :10]
    longer = torch.cat([handle, new_tokens(12)], 2).clone()
    kept = dense.masked_fill(~valid[:, None, :, None], 0.0)[:, :, :10]
    assert_is(longer, torch.cat([kept, new_tokens(12)], 2))


@pytest.mark.parametrize("tokens", [1, 11])
@pytest.mark.parametrize("wrote", ["nothing", "everything"])
def test_an_append_that_fails_changes_nothing(
    handle: QuantizedKV, dense: Tensor, tokens: int, wrote: str
) -> None:
    longer = torch.cat([handle, new_tokens(tokens)], 2)
    write = reference.write

    def failing_write(*args: object) -> None:
        if wrote == "everything":
            write(*args)  # pyright: ignore[reportArgumentType]
        raise MemoryError

    with patch.object(reference, "write", failing_write), pytest.raises(MemoryError):
        longer.writable_storage()
    assert_is(handle, dense)
    assert_is(longer, torch.cat([dense, new_tokens(tokens)], 2))
    longer.writable_storage()
    assert_is(longer, torch.cat([dense, new_tokens(tokens)], 2))


def test_growth_that_fails_midway_can_be_tried_again() -> None:
    fmt = stored_format(Kivi(), residual_length=8)
    handle = QuantizedKV.from_dense(randn(1, 2, 90, 16), fmt, "key")
    storage, take, taken = handle._storage, POOL.take, []

    def failing_take(*args: Any, **kwargs: Any) -> Tensor:
        if taken:
            raise MemoryError
        taken.append(args)
        return take(*args, **kwargs)

    with patch.object(POOL, "take", failing_take), pytest.raises(MemoryError):
        storage.reserve(1000)
    storage.reserve(1000)
    capacities = {storage.capacity_of(name) for name in fmt.packed_names}
    assert capacities == {storage.capacity}
    assert storage.capacity >= 1000


@pytest.mark.parametrize("codec", [Squat(), Kivi(32), Kvarn(32), Think()], ids=lambda c: c.name)
def test_keys_and_values_grow_in_the_same_step(codec: Codec) -> None:
    x = randn(*SHAPE)
    roles: tuple[Role, ...] = ("key", "value")
    handles: list[Any] = [
        QuantizedKV.from_dense(x, stored_format(codec, role), role) for role in roles
    ]
    for step in range(700):
        handles = [torch.cat([h, new_tokens(1)], 2) for h in handles]
        assert len({h.writable_storage().capacity for h in handles}) == 1, step


def test_arenas_of_a_longer_generation_serve_a_shorter_one(dense: Tensor) -> None:
    POOL.clear()
    fmt = stored_format(Squat())
    long = QuantizedKV.from_dense(dense.repeat(1, 1, 40, 1), fmt, "key")
    capacity, address = long._storage.capacity, long._storage["qdata"].data_ptr()
    del long
    short = QuantizedKV.from_dense(dense, fmt, "key")
    assert (short._storage.capacity, short._storage["qdata"].data_ptr()) == (capacity, address)
    assert {short._storage.capacity_of(name) for name in fmt.packed_names} == {capacity}
    assert_is(short, QuantizedKV.from_dense(dense, fmt, "key").dequantize())
    POOL.clear()


# arenas -----------------------------------------------------------------------------------------


def test_arenas_are_four_dim_normal_tensors_with_tokens_on_dim_two() -> None:
    fmt = stored_format(Kivi(), residual_length=8)
    handle = QuantizedKV.from_dense(randn(2, 2, 90, 16), fmt, "key")
    for name in (*fmt.packed_names, "dense"):
        arena = handle._storage[name]
        assert arena.dim() == 4
        assert not arena.is_inference()
    for name in fmt.packed_names:
        assert handle._storage[name]._dynamo_weak_dynamic_indices == {2}
    assert handle._storage.capacity == 384
    assert {handle._storage.capacity_of(name) for name in fmt.packed_names} == {384}


def test_an_unknown_attribute_is_an_attribute_error(handle: QuantizedKV) -> None:
    with pytest.raises(AttributeError, match=r"^'QuantizedKV' object has no attribute 'scale'$"):
        _ = handle.scale  # a lossless handle has none


def test_arenas_go_back_to_the_pool(dense: Tensor) -> None:
    gc.collect()
    before = POOL.live_bytes
    handle = QuantizedKV.from_dense(dense, stored_format(), "key")
    crop = handle[:, :, :4]
    assert POOL.live_bytes == before + handle.storage_nbytes
    del handle
    assert POOL.live_bytes > before, "the crop still reads them"
    del crop
    assert POOL.live_bytes == before


@pytest.mark.parametrize("made_in", MODES)
@pytest.mark.parametrize("used_in", MODES)
def test_a_handle_made_in_one_mode_goes_on_in_the_other(made_in: str, used_in: str) -> None:
    with torch.inference_mode(False):
        x, valid = randn(*SHAPE), left_padding([0, 3, 8], 30)
        expected = torch.cat([x.masked_fill(~valid[:, None, :, None], 0.0), new_tokens(300)], 2)
        with MODES[made_in]():
            handle = QuantizedKV.from_dense(x, stored_format(), "key", valid)
            handle = torch.cat([handle, new_tokens(300)[:, :, :5]], 2)
        with MODES[used_in]():
            for first in range(5, 300, 59):
                handle = torch.cat([handle, new_tokens(300)[:, :, first : first + 59]], 2)
            assert_is(handle, expected)
            handle = handle[:, :, :20].index_select(0, torch.tensor([2, 1]))
            assert_is(
                torch.cat([handle, new_tokens(1)[:2]], 2).clone()[:, :, :20], handle.dequantize()
            )


# while Dynamo traces ----------------------------------------------------------------------------


def contents(storage: Storage) -> list[object]:
    return [storage.length, storage.watermark, *(arena.clone() for arena in storage.tensors)]


@pytest.mark.parametrize("dynamic", [False, True])
def test_a_fake_is_its_dense_shape_and_nothing_is_written(
    handle: QuantizedKV, dynamic: bool
) -> None:
    before = contents(handle._storage)
    shape_env = ShapeEnv() if dynamic else None
    with (
        torch.inference_mode(False),
        torch.no_grad(),
        FakeTensorMode(shape_env=shape_env) as fake_mode,
    ):
        fake = fake_mode.from_tensor(handle)
        assert isinstance(fake, QuantizedKV)
        longer = torch.cat([fake, torch.empty(3, 2, 1, 16)], -2)
        crop = fake[:, :, :-1]
        reordered = fake.index_select(0, torch.tensor([0, 0]))
        repeated = fake.repeat_interleave(2, dim=0)
        out = F.scaled_dot_product_attention(torch.empty(3, 2, 1, 16), longer, longer)
        found = [x.shape for x in (longer, crop, reordered, repeated, out)]
        types = {type(x) for x in (longer, crop, reordered, repeated, out)}
        expected = [(3, 2, 31, 16), (3, 2, 29, 16), (2, 2, 30, 16), (6, 2, 30, 16), (3, 2, 1, 16)]
        assert [tuple(int(n) for n in shape) for shape in found] == expected
    assert QuantizedKV not in types
    for a, b in zip(contents(handle._storage), before, strict=True):
        assert torch.equal(a, b) if isinstance(a, Tensor) else a == b


def test_a_fake_knows_nothing_that_grows(handle: QuantizedKV) -> None:
    """A guard on capacity would compile a new graph at each growth, and guards take time."""
    shape_env = ShapeEnv()
    with (
        torch.inference_mode(False),
        torch.no_grad(),
        FakeTensorMode(shape_env=shape_env) as fake_mode,
    ):
        fake = fake_mode.from_tensor(handle)
        assert [name for name in handle.format.arena_names if hasattr(fake, name)] == ["dense"]
        longer = torch.cat([fake, torch.empty(3, 2, 1, 16)], -2)
        out = F.scaled_dot_product_attention(torch.empty(3, 2, 1, 16), longer, longer)
        assert tuple(out.shape) == (3, 2, 1, 16)
        torch.cat([fake, torch.empty(3, 2, 1000, 16)], -2)


def test_a_write_to_a_fake_is_refused_too(handle: QuantizedKV) -> None:
    with torch.inference_mode(False), torch.no_grad(), FakeTensorMode() as fake_mode:
        fake = fake_mode.from_tensor(handle)
        with pytest.raises(
            ValueError, match=r"^a QuantizedKV cannot be written in place \(aten.mul_"
        ):
            fake.mul_(2)


def test_a_graph_of_another_backend_is_refused(handle: QuantizedKV) -> None:
    storage = handle._storage
    storage._arenas = {name: Foreign(arena) for name, arena in storage._arenas.items()}
    text = (
        "a QuantizedKV reached a graph that was not compiled with backend='squat'; "
        "compile it with that backend, or pass cache.dequantize()"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(text)}$"):
        _ = handle + 1


class Foreign(Tensor):
    """Stands for the functional tensors of a tracer that is not ours."""

    __torch_function__ = torch._C._disabled_torch_function_impl  # pyright: ignore

    @staticmethod
    def __new__(cls, arena: Tensor) -> Foreign:
        return Tensor._make_wrapper_subclass(cls, arena.shape, dtype=arena.dtype)

    @classmethod
    def __torch_dispatch__(cls, *args: object) -> None:
        raise AssertionError("never reached")


# a lossy codec ----------------------------------------------------------------------------------


@pytest.mark.parametrize("role", ["key", "value"])
def test_a_lossy_handle_is_right_to_half_a_step(role: str) -> None:
    fmt = stored_format(Kivi(), role, bits=8, residual_length=8)  # pyright: ignore
    x = randn(2, 2, 90, 16)
    handle = QuantizedKV.from_dense(x[:, :, :50], fmt, role)  # pyright: ignore
    for first in range(50, 90, 8):
        handle = torch.cat([handle, x[:, :, first : first + 8]], 2)
    span = x.amax() - x.amin()
    assert (handle.dequantize() - x).abs().max() <= 0.52 * span / 255
    assert torch.equal(handle.dequantize()[:, :, -8:], x[:, :, -8:])


# a codec that learned ---------------------------------------------------------------------------


@pytest.fixture(params=["the fixed rotation", "a calibrated basis"])
def learned(request: pytest.FixtureRequest) -> QuantizedKV:
    """Keys under ``squat``, the third row with too few tokens to learn from."""
    latent = request.param == "a calibrated basis"
    fmt = stored_format(Squat(), head_dim=16, bits=3, latent=latent)
    basis = None
    if latent:
        matrix = torch.eye(16) + 0.1 * randn(2, 16, 16, seed=3)
        basis = torch.stack([matrix, torch.linalg.inv(matrix)])
    return QuantizedKV.from_dense(
        randn(3, 2, 60, 16) + 4, fmt, "key", left_padding([0, 3, 30], 60),
        randn(3, 4, 60, 16, seed=1), basis,
    )  # fmt: skip


KEEPS_WHAT_WAS_LEARNED: dict[str, tuple[Callable[[Tensor], Tensor], list[int]]] = {
    "index_select": (lambda x: x.index_select(0, torch.tensor([2, 0, 0])), [2, 0, 0]),
    "index": (lambda x: x[torch.tensor([1, 2])], [1, 2]),
    "rows": (lambda x: x[1:], [1, 2]),
    "repeat_interleave": (lambda x: x.repeat_interleave(2, dim=0), [0, 0, 1, 1, 2, 2]),
    "clone": (lambda x: x.clone(), [0, 1, 2]),
    "deepcopy": (lambda x: copy.deepcopy(x), [0, 1, 2]),
    "pickle": (lambda x: pickle.loads(pickle.dumps(x)), [0, 1, 2]),
    "half": (lambda x: x.half(), [0, 1, 2]),
    "bfloat16": (lambda x: x.to(torch.bfloat16), [0, 1, 2]),
    "crop": (lambda x: x[:, :, :41], [0, 1, 2]),
    "detach": (lambda x: x.detach(), [0, 1, 2]),
    "cat": (lambda x: torch.cat([x, randn(3, 2, 9, 16, seed=5)], 2), [0, 1, 2]),
}


@pytest.mark.parametrize("name", KEEPS_WHAT_WAS_LEARNED)
def test_what_was_learned_goes_with_the_rows_and_the_basis_is_shared(
    learned: QuantizedKV, name: str
) -> None:
    operation, rows = KEEPS_WHAT_WAS_LEARNED[name]
    before = learned.dequantize()
    result = operation(learned)
    assert isinstance(result, QuantizedKV)
    assert result.format == learned.format
    expected = operation(before)
    step = torch.finfo(expected.dtype).eps
    torch.testing.assert_close(result.dequantize(), expected, rtol=4 * step, atol=1e-5)
    assert result._storage["affine"].dtype == torch.float16
    assert torch.equal(result._storage["affine"], learned._storage["affine"][rows])
    assert result._storage["basis"].dtype == torch.float32
    assert torch.equal(result._storage["basis"], learned._storage["basis"])
    shared = result._storage["basis"].data_ptr() == learned._storage["basis"].data_ptr()
    assert shared == (name != "pickle" or not learned._storage["basis"].numel())
    torch.testing.assert_close(learned.dequantize(), before, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", KEEPS_WHAT_WAS_LEARNED)
def test_what_is_appended_later_is_rounded_with_what_was_learned(
    learned: QuantizedKV, name: str
) -> None:
    """As it would have been, had nothing been done to the handle."""
    operation, rows = KEEPS_WHAT_WAS_LEARNED[name]
    new = randn(3, 2, 40, 16, seed=6) + 4
    expected = torch.cat([learned.clone(), new], 2).clone().dequantize()[:, :, -40:]
    result = operation(learned.clone())
    longer = torch.cat([result, new[rows].to(result.dtype)], 2).clone()
    found = longer.dequantize()[:, :, -40:]
    step = torch.finfo(found.dtype).eps
    same = (found - expected[rows]).abs() <= 4 * step * expected[rows].abs() + 1e-5
    assert same.float().mean() >= (1.0 if found.dtype == torch.float32 else 0.9), (
        "a code may flip where the new token was cast first"
    )
    assert torch.equal(found[:, :, -8:], new[rows, :, -8:].to(found.dtype)), "the newest are exact"
    assert not torch.equal(expected, new)
    assert torch.equal(longer._storage["affine"], learned._storage["affine"][rows])


def test_two_handles_of_a_layer_hold_one_basis_between_them(learned: QuantizedKV) -> None:
    """It belongs to the model, not to the pool: a handle that ends leaves it as it was."""
    basis = learned._storage["basis"]
    kept = basis.clone()
    other = learned.index_select(0, torch.tensor([1]))
    del learned
    gc.collect()
    more = [QuantizedKV.from_dense(randn(3, 2, 60, 16), other.format, "key", given=basis)
            for _ in range(2 if other.format.latent else 0)]  # fmt: skip
    assert all(handle._storage["basis"] is basis for handle in more)
    assert torch.equal(basis, kept)
    assert other.dequantize().isfinite().all()


def test_attention_over_a_handle_that_learned_is_that_over_its_numbers(
    learned: QuantizedKV,
) -> None:
    query, valid = randn(3, 4, 1, 16, seed=7), left_padding([0, 3, 30], 60)
    numbers = learned.dequantize()
    torch.testing.assert_close(
        F.scaled_dot_product_attention(query, learned, learned, enable_gqa=True),
        F.scaled_dot_product_attention(
            query, numbers, numbers, attn_mask=valid[:, None, None], enable_gqa=True
        ),
    )


def test_keys_and_values_of_one_layer_may_differ_in_format() -> None:
    fmts: list[Format] = [
        stored_format(Kivi(), "key", bits=8),
        replace(stored_format(Kivi(), "value", bits=4, head_dim=40), residual_length=3),
    ]
    x, y = randn(2, 2, 90, 16), randn(2, 2, 90, 40, seed=1)
    key, value = (
        QuantizedKV.from_dense(x, fmts[0], "key"),
        QuantizedKV.from_dense(y, fmts[1], "value"),
    )
    query = randn(2, 2, 1, 16, seed=2)
    torch.testing.assert_close(
        F.scaled_dot_product_attention(query, key, value),
        F.scaled_dot_product_attention(query, key.dequantize(), value.dequantize()),
    )
