"""Error feedback against a query metric (SQuat; Wang et al., COLM 2025, section 4).

Keys matter through ``query @ key`` alone, so their rounding error ``e`` should be small where
queries point:

    min  e.T @ H @ e        H = I + lambda * C        C = sum of q.T @ q over the prompt's queries

Channels are rounded block by block; the error of a block is compensated in the channels that come
later. With ``U.T @ U = inv(H)``, ``U`` upper triangular, the best compensation is

    x[later] += error[block] @ inv(U[block, block]) @ U[block, later]

which equals the paper's recursion (Schur complements of ``H``) and GPTQ's. ``lambda`` is meant
relative to the mean eigenvalue of ``C``: an absolute one grows with the length of the prompt.

Everything is batched over sequences and heads, and nothing waits for the device.
"""

from __future__ import annotations

import torch
from torch import Tensor

CHUNK = 1024  # tokens at a time in fp64: in fp32 a Gram of low rank is not positive definite
POWER_STEPS = 10


def query_gram(query: Tensor, keep: Tensor, num_kv_heads: int) -> Tensor:
    """``C``, fp64 ``[batch, num_kv_heads, head_dim, head_dim]``.

    The queries that share a KV head are stacked.

    Args:
        query: ``[batch, num_heads, tokens, head_dim]``.
        keep: bool ``[batch, tokens]``.
        num_kv_heads: heads of the keys.
    """
    batch, _, tokens, head_dim = query.shape
    gram = query.new_zeros((batch, num_kv_heads, head_dim, head_dim), dtype=torch.float64)
    for first in range(0, tokens, CHUNK):
        dropped = ~keep[:, None, first : first + CHUNK, None]
        part = query[:, :, first : first + CHUNK].masked_fill(dropped, 0.0).double()
        part = part.unflatten(1, (num_kv_heads, -1)).flatten(2, 3)
        gram += part.transpose(-1, -2) @ part
    return gram


def metric(gram: Tensor, strength: float, relative: bool) -> Tensor:
    """``H``, fp64: ``lambda`` is ``strength``, over the mean eigenvalue of ``C`` if relative."""
    identity = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    if relative:
        mean = gram.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None]
        gram = gram / mean.clamp_min(torch.finfo(torch.float64).tiny)
    return identity + strength * gram


def leading_subspace(gram: Tensor, rank: int) -> Tensor:
    """``C`` restricted to its ``rank`` leading eigenvectors, by ten steps of block power iteration.

    An eigenvalue decomposition would run matrix by matrix; steps of matrix products and Cholesky
    factors are batched. The start is fixed.
    """
    head_dim = gram.shape[-1]
    if rank >= head_dim:
        return gram
    generator = torch.Generator().manual_seed(0)
    basis = torch.randn(head_dim, rank, generator=generator, dtype=gram.dtype).to(gram.device)
    basis = basis.expand(*gram.shape[:-2], -1, -1)
    for _ in range(POWER_STEPS):
        basis = _orthonormal(_orthonormal(gram @ basis))
    projector = basis @ basis.transpose(-1, -2)
    return projector @ gram @ projector


def _orthonormal(x: Tensor) -> Tensor:
    """Orthonormal columns that span those of ``x``, by Cholesky QR."""
    x = x / torch.linalg.vector_norm(x, dim=-2, keepdim=True).clamp_min(1e-150)
    inner = x.transpose(-1, -2) @ x
    inner = inner + 1e-12 * torch.eye(x.shape[-1], dtype=x.dtype, device=x.device)
    factor = torch.linalg.cholesky_ex(inner).L
    return torch.linalg.solve_triangular(factor.transpose(-1, -2), x, upper=True, left=False)


def feedback_matrix(h: Tensor, block: int) -> Tensor:
    """The compensation for blocks of ``block`` channels, fp32, strictly upper triangular in blocks.

    Row ``i`` is what the error of channel ``i`` adds to each later channel.

    Args:
        h: ``H``, fp64 ``[batch, heads, head_dim, head_dim]``.
        block: channels rounded together; the last block may be smaller.
    """
    # H = V @ V.T with V upper triangular, so inv(H) = U.T @ U with U = inv(V).
    flipped = torch.linalg.cholesky_ex(h.flip(-1, -2)).L
    v = flipped.flip(-1, -2)
    identity = torch.eye(h.shape[-1], dtype=h.dtype, device=h.device).expand_as(h)
    u = torch.linalg.solve_triangular(v, identity, upper=True)
    out = torch.zeros_like(u)
    for first in range(0, h.shape[-1] - block, block):
        rows, later = slice(first, first + block), slice(first + block, None)
        out[..., rows, later] = torch.linalg.solve_triangular(
            u[..., rows, rows], u[..., rows, later], upper=True
        )
    return out.float()
