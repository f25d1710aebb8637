"""Learn from a prompt on a GPU: ``learn`` as in ``reference``, without waiting for the device.

``triton_fit.py`` computes what ``squat`` and ``squat_paper`` learn from 16-bit tensors, with the
exceptions that :func:`_task` names; all else is learned with torch operations, as in the reference.
"""

# pyright: reportArgumentType=false, reportCallIssue=false
# Triton's launches take plain numbers for constexpr parameters, and options beside the parameters.

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from squat_fx.codecs import Codec, Fit, Format, Role, Squat, SquatPaper, codec_from_spec
from squat_fx.codecs.squat import SMALLEST_PROMPT
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
from squat_fx.layouts.planes import LANES, num_planes

DTYPES = (torch.float16, torch.bfloat16)
LARGEST_STRENGTH = 4.0
LARGEST_HEAD_DIM = 256
PROGRAMS_PER_MULTIPROCESSOR = 1  # what their registers leave room for
MOST_CHUNKS = 64
MOST_ROWS = 16384  # that a program sums in fp32


@dataclass(frozen=True)
class Task:
    """What to learn: offsets, factors, feedback unless ``strength`` is 0.

    ``smallest_prompt`` is the fewest tokens to learn from. 0: any, with no offset and factor.
    """

    center: bool
    smooth: bool
    strength: float
    smallest_prompt: int


def learn(
    arenas: Arenas, new: Tensor, valid: Tensor | None, query: Tensor | None, fmt: Format, role: Role
) -> Fit:
    """See :func:`squat_fx.kernels.reference.learn`; two launches, with feedback up to four."""
    codec = codec_from_spec(fmt.codec)
    query = query if codec.taps(role) else None
    task = _task(codec, query is not None, fmt.latent)
    fitting = new.shape[3] <= LARGEST_HEAD_DIM and all(
        x is None or x.dtype in DTYPES for x in (new, query)
    )
    if task is None or not fitting:
        return reference.learn(arenas, new, valid, query, fmt, role)
    affine = arenas.affine if codec.affine(role) else None
    if affine is None and query is None:
        return Fit()
    frame = None
    if task.smallest_prompt:  # queries go into the latent frame with the transpose of its inverse
        basis = arenas.basis if fmt.latent else None
        frame = reference.basis_pair(basis, fmt.head_dim, new.device)[1]
    learned = {} if affine is None else {"affine": affine}
    return Fit(learned, _run(task, affine, frame, new, valid, query, fmt.sink_length))


def _task(codec: Codec, with_query: bool, latent: bool) -> Task | None:
    """What ``codec`` learns; None if the kernels do not compute it.

    In fp32 a matrix of bounded condition stays positive definite: the strength must be relative to
    the queries, and not large. Feedback is made for plane groups.
    """
    if type(codec) is Squat and codec.strength <= LARGEST_STRENGTH:
        smooth = codec.smooth and with_query and not latent
        return Task(codec.center, smooth, codec.strength * with_query, SMALLEST_PROMPT)
    if type(codec) is SquatPaper and codec.relative and codec.strength <= LARGEST_STRENGTH:
        all_of_it = codec.rank is None and codec.block == LANES
        return Task(False, False, codec.strength * with_query, 0) if all_of_it else None
    return None


def _run(
    task: Task,
    affine: Tensor | None,
    frame: Tensor | None,
    new: Tensor,
    valid: Tensor | None,
    query: Tensor | None,
    sink_length: int,
) -> Tensor | None:
    """The feedback; offsets and factors go into ``affine``."""
    key = contiguous_channels(new) if task.smallest_prompt else None
    query = None if query is None else contiguous_channels(query)
    batch, heads, tokens, head_dim = new.shape
    queries_per_kv = 1 if query is None else query.shape[1] // heads
    channels, programs = padded(head_dim), batch * heads
    block_d = min(channels, triton_fit.BLOCK_D)
    blocks = 1 if query is None else (channels // block_d) ** 2
    in_chunk = chunk_tokens(programs * blocks, tokens, queries_per_kv, new.device)
    chunks = max(1, triton.cdiv(tokens, in_chunk))

    def fresh(*shape: int) -> Tensor:
        return new.new_empty(shape, dtype=torch.float32)

    moments = fresh(programs, chunks, 4, head_dim)
    grams = None if query is None else fresh(programs, chunks, head_dim, head_dim)
    feedback = fresh(batch, heads, head_dim, head_dim) if task.strength else None
    frame_stride = 0 if frame is None or frame.shape[0] == 1 else frame.stride(0)
    valid, valid_strides = _valid_and_strides(valid, batch)
    sizes = {"HEAD_DIM": head_dim, "CHANNELS": channels}
    block_k = min(channels, triton_fit.BLOCK_K)
    with _on(new.device):
        triton_fit.statistics_kernel[(programs, chunks, blocks)](
            key, _strides(key), query, _strides(query), valid, valid_strides, moments, grams,
            heads, tokens, sink_length, in_chunk,
            QUERIES_PER_KV=queries_per_kv, BLOCK_D=block_d, BLOCK_T=triton_fit.BLOCK_T,
            KEY_BLOCK_T=triton_fit.KEY_BLOCK_T, **sizes, num_warps=8, num_stages=4,
        )  # fmt: skip
        planes = 1 if feedback is None else num_planes(head_dim)
        triton_fit.gather_kernel[(programs, planes)](
            moments, grams, frame, frame_stride, affine, feedback, heads, chunks,
            CENTER=task.center, SMOOTH=task.smooth, SMALLEST_PROMPT=task.smallest_prompt,
            CHUNKS=triton.next_power_of_2(chunks), BLOCK_K=block_k, **sizes,
        )  # fmt: skip
        if feedback is None:
            return None
        if frame is not None:
            triton_fit.latent_kernel[(programs, planes)](
                frame, frame_stride, feedback, heads, BLOCK_K=block_k, **sizes
            )
        triton_fit.feedback_kernel[(programs,)](
            feedback, float(task.strength), BLOCK_R=triton_fit.BLOCK_R, **sizes,
            num_warps=8, num_stages=1,
        )  # fmt: skip
    return feedback


def chunk_tokens(programs: int, tokens: int, queries_per_kv: int, device: torch.device) -> int:
    """Tokens of a chunk: as many chunks as fill the GPU, or more if one had too many rows."""
    fewest = -(-tokens * queries_per_kv // MOST_ROWS)
    wanted = max(1, PROGRAMS_PER_MULTIPROCESSOR * multiprocessors(device) // programs, fewest)
    chunk = -(-max(tokens, 1) // min(wanted, MOST_CHUNKS))
    return -(-chunk // triton_fit.BLOCK_T) * triton_fit.BLOCK_T
