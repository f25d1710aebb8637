"""Learn from a prompt on a GPU: ``learn`` as in ``reference``, without waiting for the device.

``triton_fit.py`` computes for the codec ``squat`` and 16-bit tensors; all else is learned with
torch operations, as the reference does.
"""

# pyright: reportArgumentType=false, reportCallIssue=false
# Triton's launches take plain numbers for constexpr parameters, and options beside the parameters.

from __future__ import annotations

import torch
import triton
from torch import Tensor

from squat_fx.codecs import Fit, Format, Role, Squat, codec_from_spec
from squat_fx.codecs.planes import num_planes
from squat_fx.kernels import reference, triton_fit
from squat_fx.kernels.launch import (
    _on,
    _strides,
    _valid_and_strides,
    contiguous_channels,
    multiprocessors,
    padded,
)
from squat_fx.kernels.reference import Arenas

DTYPES = (torch.float16, torch.bfloat16)
LARGEST_STRENGTH = 4.0
LARGEST_HEAD_DIM = 256
PROGRAMS_PER_MULTIPROCESSOR = 1  # what their registers leave room for
MOST_CHUNKS = 64
MOST_ROWS = 16384  # that a program sums in fp32


def learn(
    arenas: Arenas, new: Tensor, valid: Tensor | None, query: Tensor | None, fmt: Format, role: Role
) -> Fit:
    """See :func:`squat_fx.kernels.reference.learn`; two launches, four with feedback."""
    codec = codec_from_spec(fmt.codec)
    if type(codec) is not Squat or not _computes(codec, new, query):
        return reference.learn(arenas, new, valid, query, fmt, role)
    if not codec.affine(role) and not codec.taps(role):
        return Fit()
    query = query if codec.taps(role) else None
    affine = arenas.affine if fmt.affine and codec.affine(role) else None
    basis = arenas.basis if fmt.latent else None
    return Fit(affine, _learn(codec, affine, basis, new, valid, query, fmt.sink_length))


def _computes(codec: Squat, new: Tensor, query: Tensor | None) -> bool:
    """Whether the kernels take this: fp16 and bf16 products are exact in fp32, and sums of them
    stay positive definite in it under a small strength.
    """
    return (
        all(x is None or x.dtype in DTYPES for x in (new, query))
        and codec.strength <= LARGEST_STRENGTH
        and new.shape[3] <= LARGEST_HEAD_DIM
    )


def _learn(
    codec: Squat,
    affine: Tensor | None,
    basis: Tensor | None,
    new: Tensor,
    valid: Tensor | None,
    query: Tensor | None,
    sink_length: int,
) -> Tensor | None:
    """The feedback; offsets and factors go into ``affine``."""
    new = contiguous_channels(new)
    query = None if query is None else contiguous_channels(query)
    batch, heads, tokens, head_dim = new.shape
    queries_per_kv = 1 if query is None else query.shape[1] // heads
    with_feedback = query is not None and codec.strength > 0
    channels, programs = padded(head_dim), batch * heads
    block_d = min(channels, triton_fit.BLOCK_D)
    blocks = 1 if query is None else (channels // block_d) ** 2
    in_chunk = chunk_tokens(programs * blocks, tokens, queries_per_kv, new.device)
    chunks = max(1, triton.cdiv(tokens, in_chunk))

    def fresh(*shape: int) -> Tensor:
        return new.new_empty(shape, dtype=torch.float32)

    moments = fresh(programs, chunks, 4, head_dim)
    grams = None if query is None else fresh(programs, chunks, head_dim, head_dim)
    feedback = fresh(batch, heads, head_dim, head_dim) if with_feedback else None
    # Queries go into the latent frame with the transpose of its inverse.
    inverse = reference.basis_pair(basis, head_dim, new.device)[1]
    frame = inverse, inverse.stride(0) if inverse.shape[0] > 1 else 0
    valid, valid_strides = _valid_and_strides(valid, batch)
    sizes = {"HEAD_DIM": head_dim, "CHANNELS": channels}
    block_k = min(channels, triton_fit.BLOCK_K)
    with _on(new.device):
        triton_fit.statistics_kernel[(programs, chunks, blocks)](
            new, _strides(new), query, _strides(query), valid, valid_strides, moments, grams,
            heads, tokens, sink_length, in_chunk,
            QUERIES_PER_KV=queries_per_kv, BLOCK_D=block_d, BLOCK_T=triton_fit.BLOCK_T,
            KEY_BLOCK_T=triton_fit.KEY_BLOCK_T, **sizes, num_warps=8, num_stages=4,
        )  # fmt: skip
        planes = num_planes(head_dim) if with_feedback else 1
        triton_fit.gather_kernel[(programs, planes)](
            moments, grams, *frame, affine, feedback, heads, chunks,
            CENTER=codec.center, SMOOTH=codec.smooth and query is not None and basis is None,
            CHUNKS=triton.next_power_of_2(chunks), BLOCK_K=block_k, **sizes,
        )  # fmt: skip
        if with_feedback:
            triton_fit.latent_kernel[(programs, planes)](
                *frame, feedback, heads, BLOCK_K=block_k, **sizes
            )
            triton_fit.feedback_kernel[(programs,)](
                feedback, float(codec.strength), BLOCK_R=triton_fit.BLOCK_R, **sizes,
                num_warps=8, num_stages=1,
            )  # fmt: skip
    return feedback


def chunk_tokens(programs: int, tokens: int, queries_per_kv: int, device: torch.device) -> int:
    """Tokens of a chunk: as many chunks as fill the GPU, or more if one had too many rows."""
    wanted = PROGRAMS_PER_MULTIPROCESSOR * multiprocessors(device) // programs
    wanted = max(1, wanted, triton.cdiv(tokens * queries_per_kv, MOST_ROWS))
    chunk = triton.cdiv(max(tokens, 1), min(wanted, MOST_CHUNKS))
    return triton.cdiv(chunk, triton_fit.BLOCK_T) * triton_fit.BLOCK_T
