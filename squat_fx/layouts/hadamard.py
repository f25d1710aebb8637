"""The fixed rotation: a Hadamard matrix with fixed signs, the same for every model.

``rotate(x) = x @ R`` spreads every channel over all others, so that the numbers of a token look
like a Gaussian whatever the outlier channels were (PolarQuant's random preconditioning, Han et al.,
2025; QuaRot). ``R`` is orthogonal: ``R @ R.T`` is the identity. Head dims that are no power of two
get blocks of their largest power-of-two divisor.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor


def hadamard(order: int) -> Tensor:
    """Sylvester's Hadamard matrix, fp64 ``[order, order]`` of ones and minus ones.

    Raises:
        ValueError: ``order`` is no power of two.
    """
    if order < 1 or order & (order - 1):
        raise ValueError(f"the order of a Hadamard matrix must be a power of two, got {order}")
    matrix = torch.ones(1, 1, dtype=torch.float64)
    pair = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
    while matrix.shape[0] < order:
        matrix = torch.kron(pair, matrix)
    return matrix


def signs(count: int) -> Tensor:
    """The first ``count`` Rudin-Shapiro signs, fp64.

    Minus one where the index has an odd number of adjacent ones in binary. Over 4**k indices no
    sequence is further from all rows of a Hadamard matrix, so a constant vector spreads evenly,
    where a plain Hadamard matrix would collect it in one channel.
    """
    odd = [(i & (i >> 1)).bit_count() % 2 for i in range(count)]
    return 1.0 - 2.0 * torch.tensor(odd, dtype=torch.float64)


@lru_cache(maxsize=32)
def rotation(head_dim: int) -> Tensor:
    """The orthogonal matrix ``R``, fp32 ``[head_dim, head_dim]``; not to be written to."""
    block = head_dim & -head_dim
    matrix = hadamard(block) / block**0.5
    with torch.inference_mode(False):
        blocks = torch.block_diag(*[matrix] * (head_dim // block))
        return (signs(head_dim)[:, None] * blocks).float()


@lru_cache(maxsize=32)
def rotation_pair(head_dim: int, device: torch.device) -> Tensor:
    """``R`` and ``R.T`` as a basis that all heads share, fp32 ``[2, 1, head_dim, head_dim]``; not
    to be written to.
    """
    with torch.inference_mode(False), torch.no_grad():
        matrix = rotation(head_dim)
        return torch.stack([matrix, matrix.T])[:, None].contiguous().to(device)
