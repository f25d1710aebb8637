"""Rewrite an exported graph: ``torch.export`` once, ``squat_fx.rewrite``, run without Dynamo.

python examples/export_rewrite.py
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import squat_fx


class CachedAttention(nn.Module):
    """One decode step: append to the cache, attend, return the longer cache."""

    def __init__(self, width: int = 128, num_heads: int = 4, num_kv_heads: int = 2) -> None:
        super().__init__()
        self.num_heads, self.num_kv_heads = num_heads, num_kv_heads
        self.head_dim = width // num_heads
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, num_kv_heads * self.head_dim)
        self.value = nn.Linear(width, num_kv_heads * self.head_dim)

    def forward(
        self, x: Tensor, past_key: Tensor, past_value: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        def heads(y: Tensor, count: int) -> Tensor:
            return y.unflatten(-1, (count, self.head_dim)).transpose(1, 2)

        key = torch.cat([past_key, heads(self.key(x), self.num_kv_heads)], dim=-2)
        value = torch.cat([past_value, heads(self.value(x), self.num_kv_heads)], dim=-2)
        query = heads(self.query(x), self.num_heads)
        out = F.scaled_dot_product_attention(query, key, value, enable_gqa=True)
        return out.transpose(1, 2).flatten(2), key, value


def main(steps: int = 40, codec: str = "kivi") -> tuple[float, squat_fx.Report]:
    """Run both graphs side by side; returns the largest relative difference, and the report."""
    torch.manual_seed(0)
    model = CachedAttention().eval()
    past = torch.randn(1, 2, 200, 32)
    example = (torch.randn(1, 3, 128), past, past.clone())
    tokens, cached = torch.export.Dim("tokens", min=1), torch.export.Dim("cached", min=1)
    shapes = ({1: tokens}, {2: cached}, {2: cached})
    with torch.no_grad():
        exported = torch.export.export(model, example, dynamic_shapes=shapes).module()
        config = squat_fx.Config(bits=4, codec=codec, strict=True)
        rewritten, report = squat_fx.rewrite(exported, example, config)  # pyright: ignore[reportArgumentType]
        dense, packed, worst = example[1:], example[1:], 0.0
        for _ in range(steps):
            x = torch.randn(1, 1, 128)
            expected, *dense = model(x, *dense)
            out, *packed = rewritten(x, *packed)
            worst = max(worst, float((out - expected).norm() / expected.norm()))
    print(report)
    print(f"{type(packed[0]).__name__} of {packed[0].shape[2]} tokens, error {worst:.3f}")
    return worst, report


if __name__ == "__main__":
    main()
