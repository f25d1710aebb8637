"""Sign sketches: a vector as its norm and the signs of some projections.

    stored: |x| and signs = sign(P @ x)                             P: [sketch_dim, head_dim]
    x' = sqrt(pi / 2) / sketch_dim * |x| * signs @ P

``q @ x'`` is the estimator of ``q @ x`` in QJL (Zandieh et al., AAAI 2025, definition 3.1): for a
Gaussian direction ``p``, the mean of ``sign(p @ x) * (p @ q)`` is ``sqrt(2 / pi) * (q @ x) / |x|``.
The query stays as it is, so the estimate is linear in it and is the same as a product with ``x'``.

The directions come in blocks of ``head_dim`` that are orthogonal to each other, as the paper does
in practice, and have the norm ``sqrt(head_dim)`` of Gaussian ones; the last block may be cut short.
They are rounded to fp16, what tensor cores take, and *are* these rounded numbers, for those who
store and those who read.
"""

from __future__ import annotations

import math
from functools import cache

import torch
from torch import Tensor

SEED = 42
BYTE = 8


@cache  # recorded CUDA graphs read them where they are
def directions(head_dim: int, sketch_dim: int, device: torch.device) -> Tensor:
    """The matrix ``P``, fp16 ``[sketch_dim, head_dim]``, the same for every model; not to be
    written to. Fewer directions are the first of more.
    """
    with torch.inference_mode(False), torch.no_grad():
        generator = torch.Generator().manual_seed(SEED)
        blocks = [_orthogonal(head_dim, generator) for _ in range(-(-sketch_dim // head_dim))]
        return (math.sqrt(head_dim) * torch.cat(blocks))[:sketch_dim].half().to(device)


def _orthogonal(order: int, generator: torch.Generator) -> Tensor:
    """A matrix drawn evenly from all orthogonal ones, fp64 ``[order, order]``."""
    gaussian = torch.randn(order, order, dtype=torch.float64, generator=generator)
    matrix, triangle = torch.linalg.qr(gaussian)
    return matrix * triangle.diagonal().sign()  # the QR with a positive diagonal is the only one


def sign_bits(x: Tensor, sketch_dim: int) -> Tensor:
    """The signs of fp32 ``x`` ``[..., head_dim]`` along the directions, uint8 ``[..., sketch_dim /
    8]``: direction ``i`` is bit ``i % 8`` of byte ``i // 8``, set where the product is not
    negative.
    """
    projections = x @ directions(x.shape[-1], sketch_dim, x.device).float().T
    bits = (projections >= 0).to(torch.uint8).unflatten(-1, (-1, BYTE))
    return (bits << torch.arange(BYTE, dtype=torch.uint8, device=x.device)).sum(-1).to(torch.uint8)


def signs_of(stored: Tensor) -> Tensor:
    """Undo the packing of :func:`sign_bits`: fp32 ones and minus ones ``[..., sketch_dim]``."""
    place = torch.arange(BYTE, dtype=torch.uint8, device=stored.device)
    return (((stored[..., None] >> place) & 1).float() * 2 - 1).flatten(-2)


def estimate(stored: Tensor, norm: Tensor, head_dim: int) -> Tensor:
    """What :func:`sign_bits` and the norm ``[..., 1]`` tell: fp32 ``[..., head_dim]``."""
    sketch_dim = BYTE * stored.shape[-1]
    backwards = signs_of(stored) @ directions(head_dim, sketch_dim, stored.device).float()
    return backwards * (norm * (math.sqrt(math.pi / 2) / sketch_dim))
