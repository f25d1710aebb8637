"""Your own model and your own decoding loop, through ``torch.compile(..., backend="squat")``.

The backend is found by name; this file never imports squat_fx. The cache is a tuple of tensors that
the model returns and takes back, and after the first step those tensors are packed.

    python examples/own_loop.py
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Cache = tuple[Tensor, Tensor]


class Attention(nn.Module):
    """Causal self-attention that appends to the keys and values it is given."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.project = nn.Linear(width, 3 * width)
        self.output = nn.Linear(width, width)

    def forward(self, x: Tensor, past: Cache | None) -> tuple[Tensor, Cache]:
        batch, tokens, width = x.shape
        heads = self.project(x).view(batch, tokens, 3, self.num_heads, width // self.num_heads)
        query, key, value = heads.permute(2, 0, 3, 1, 4)
        if past is not None:
            key = torch.cat([past[0], key], dim=-2)
            value = torch.cat([past[1], value], dim=-2)
        out = F.scaled_dot_product_attention(query, key, value, is_causal=past is None)
        return self.output(out.transpose(1, 2).reshape(batch, tokens, width)), (key, value)


class Model(nn.Module):
    """A few attention layers between an embedding and its transpose."""

    def __init__(self, vocabulary: int = 256, width: int = 128, layers: int = 2) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.layers = nn.ModuleList(Attention(width, num_heads=2) for _ in range(layers))

    def forward(self, tokens: Tensor, cache: list[Cache] | None) -> tuple[Tensor, list[Cache]]:
        x, present = self.embedding(tokens), []
        for index, layer in enumerate(self.layers):
            y, pair = layer(F.layer_norm(x, x.shape[-1:]), cache[index] if cache else None)
            x = x + y
            present.append(pair)
        return x[:, -1] @ self.embedding.weight.T, present


def main(tokens: int = 64, codec: str = "kivi", inner: str = "inductor") -> tuple[Tensor, Tensor]:
    """Decode greedily; returns the tokens, and one of the cached keys."""
    torch.manual_seed(0)
    model = Model().eval()
    step = torch.compile(
        model, backend="squat", options={"bits": 2, "codec": codec, "inner": inner}
    )
    token, cache, out = torch.randint(0, 256, (1, 300)), None, []
    with torch.no_grad():
        for _ in range(tokens):
            logits, cache = step(token, cache)
            token = logits.argmax(-1, keepdim=True)
            out.append(token)
    assert cache is not None
    print(f"layer 0 keys: {cache[0][0]}")
    return torch.cat(out, 1), cache[0][0]


if __name__ == "__main__":
    main()
