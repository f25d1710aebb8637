"""Launchers: check what the kernels assume, choose the grid, launch. Same callables as ``reference``.

An ``Extent`` here is either host numbers or ``(positions, row)``, read on the device: nothing below waits for the GPU, and
every grid follows from shapes alone, so a CUDA graph of these launches stays right as lengths grow.
"""

from __future__ import annotations

import logging
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache

import torch
import triton
from torch import Tensor

from squat_fx.codecs import Format
from squat_fx.kernels import triton_attend
from squat_fx.kernels.reference import Arenas, Extent
from squat_fx.kernels.triton_planes import Stored, StoredFormat, stored_format

logger = logging.getLogger(__name__)

DeviceExtent = tuple[Tensor, int]
Side = tuple[Arenas, DeviceExtent, Format]

NO_STRIDES = (0, 0, 0)
MOST_SHARES = 64
PROGRAMS_PER_MULTIPROCESSOR = 8
TILES_PER_SHARE = 4


def attend(
    query: Tensor,
    new_key: Tensor | None,
    new_value: Tensor | None,
    key: Side,
    value: Side,
    *,
    mask: Tensor | None,
    sinks: Tensor | None,
    scale: float,
    causal: int,
    softcap: float,
) -> Tensor:
    """See :func:`squat_fx.kernels.reference.attend`; two launches."""
    key_arenas, (positions, key_row), key_format = key
    value_arenas, (_, value_row), value_format = value
    key_constant, value_constant = stored_format(key_format), stored_format(value_format)
    query, new_key, new_value = (_rows(x) for x in (query, new_key, new_value))
    batch, num_heads, q_len = query.shape[:3]
    num_kv_heads, head_dim = value_arenas.dense.shape[1], value_format.head_dim
    queries_per_kv = num_heads // num_kv_heads
    new_len = 0 if new_key is None else new_key.shape[2]
    rows = q_len * queries_per_kv
    block_m, num_warps = triton_attend.tile(rows, max(head_dim, key_format.head_dim))
    blocks = triton.cdiv(rows, block_m)
    most_tokens = key_arenas.packed[0].shape[2] + key_format.dense_length + new_len
    shares = num_shares(batch * num_kv_heads * blocks, most_tokens, query.device)
    partial = query.new_empty((batch * num_heads * q_len, shares, head_dim), dtype=torch.float32)
    partial_max, partial_sum = partial.new_empty((2, *partial.shape[:2]))
    output = query.new_empty((batch, num_heads, q_len, head_dim))
    mask, mask_strides = _mask_and_strides(mask)
    with _on(query.device):
        triton_attend.attend_kernel[(batch * num_kv_heads, blocks, shares)](
            query, _like(new_key, key_arenas), _like(new_value, value_arenas),
            _stored(key_arenas, key_constant), _stored(value_arenas, value_constant),
            positions, key_row, value_row, mask, partial, partial_max, partial_sum,
            num_kv_heads, q_len, new_len, scale,
            query.stride()[:3], _strides(new_key), _strides(new_value), mask_strides,
            key_constant, value_constant, queries_per_kv, causal, softcap,
            BLOCK_M=block_m, BLOCK_N=triton_attend.BLOCK_N, num_warps=num_warps,
        )  # fmt: skip
        block_d = triton_attend.MERGE_BLOCK_D
        triton_attend.merge_kernel[(partial.shape[0], triton.cdiv(head_dim, block_d))](
            partial, partial_max, partial_sum, sinks, output, num_heads, q_len, shares,
            HEAD_DIM=head_dim, BLOCK_S=triton.next_power_of_2(shares), BLOCK_D=block_d,
        )  # fmt: skip
    return output


def num_shares(programs: int, tokens: int, device: torch.device) -> int:
    """Into how many shares to split ``tokens``: enough programs to fill the GPU, enough tiles for each."""
    wanted = triton.cdiv(PROGRAMS_PER_MULTIPROCESSOR * multiprocessors(device), programs)
    most = triton.cdiv(tokens, TILES_PER_SHARE * triton_attend.BLOCK_N)
    return max(1, min(wanted, most, MOST_SHARES))


@lru_cache(maxsize=16)
def multiprocessors(device: torch.device) -> int:
    """Multiprocessors of a GPU; the interpreter has one."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


# arguments ---------------------------------------------------------------------------------------


def _on(device: torch.device) -> AbstractContextManager:
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def _rows(x: Tensor | None) -> Tensor | None:
    """``x`` with neighbouring channels next to each other."""
    return x if x is None or x.stride(-1) == 1 else x.contiguous()


def _like(new: Tensor | None, arenas: Arenas) -> Tensor | None:
    """``new`` in the dtype of the dense buffer."""
    return None if new is None else new.to(arenas.dense.dtype)


def _strides(x: Tensor | None) -> tuple[int, ...]:
    """Strides of ``[batch, heads, tokens, channels]`` before the last."""
    return NO_STRIDES if x is None else x.stride()[:3]


def _mask_and_strides(mask: Tensor | None) -> tuple[Tensor | None, tuple[int, ...]]:
    """``mask`` as numbers, and its strides: zero along what it broadcasts."""
    if mask is None:
        return None, (*NO_STRIDES, 0)
    mask = mask[(None,) * (4 - mask.dim())]
    strides = tuple(0 if size == 1 else stride for size, stride in zip(mask.shape, mask.stride(), strict=True))
    return (mask.view(torch.uint8) if mask.dtype == torch.bool else mask), strides


def _stored(arenas: Arenas, constant: StoredFormat) -> Stored:
    """The kernel's view of ``arenas``.

    Raises:
        ValueError: an arena is not contiguous, or a head is too long for 32-bit offsets.
    """
    tensors = (*arenas.packed, arenas.dense, arenas.start)
    if not all(t.is_contiguous() for t in tensors):
        raise ValueError("arenas must be contiguous; pass the whole storage, not a slice of its tokens")
    qdata, *parameters = arenas.packed
    capacity = qdata.shape[2]
    if capacity * max(constant.row_size, constant.head_dim) >= 2**31:
        raise ValueError(f"a head of {capacity} tokens does not fit 32-bit offsets; split the sequence")
    scale, zero_point = parameters or (None, None)
    return Stored(qdata, scale, zero_point, arenas.dense, arenas.start, capacity)
