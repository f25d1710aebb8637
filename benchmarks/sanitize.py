"""Every kernel once on small shapes, to be watched by NVIDIA's compute-sanitizer.

    export PYTORCH_NO_CUDA_MEMORY_CACHING=1
    seq 0 11 | xargs -P 12 -I {} compute-sanitizer --tool memcheck python benchmarks/sanitize.py {}

Every tensor is then an allocation of its own, so that a read past its end is seen. A case a
process, since most of the time kernels are compiled; ``--tool racecheck`` looks at shared memory.
"""

from __future__ import annotations

import sys
from typing import Any

import torch

from squat_fx.codecs import Codec, Format, Kivi, Role, Squat, codec_spec, make_format
from squat_fx.kernels import launch, ops, reference
from squat_fx.kernels.reference import Arenas, Extent

ROLES: tuple[Role, ...] = ("key", "value")
BATCH, KV_HEADS, TOKENS = 2, 2, 331
BOTTOM_RIGHT = reference.BOTTOM_RIGHT

# Codec, head_dim, bits, query heads per KV head, query tokens, mask, softcap.
CASES: tuple[tuple[Codec, int, float, int, int, bool, float], ...] = (
    (Squat(), 128, 2, 4, 1, False, 0.0),
    (Squat(), 128, 4, 4, 1, True, 0.0),
    (Squat(), 128, 3, 4, 1, False, 20.0),
    (Squat(), 128, 2, 4, 4, True, 0.0),
    (Squat(), 64, 2, 3, 1, False, 0.0),
    (Squat(), 64, 3, 3, 2, True, 0.0),
    (Squat(), 80, 2, 1, 1, False, 0.0),
    (Squat(), 112, 2, 1, 1, False, 0.0),
    (Squat(), 40, 2, 1, 1, False, 0.0),
    (Kivi(128), 128, 2, 4, 1, False, 0.0),
    (Kivi(32), 64, 2, 3, 1, False, 0.0),
    (Kivi(32), 64, 2, 3, 2, True, 0.0),
)


def attended(
    codec: Codec, head_dim: int, bits: float, queries: int, q_len: int, masked: bool,
    softcap: float,
) -> torch.Tensor:  # fmt: skip
    """Store a prompt, append a token to it and attend."""
    torch.manual_seed(0)
    spec = codec_spec(codec)
    formats: dict[Role, Format] = {
        role: make_format(codec, spec, role, head_dim, bits, 32, 4) for role in ROLES
    }

    def randn(heads: int, tokens: int) -> torch.Tensor:
        return torch.randn(BATCH, heads, tokens, head_dim, device="cuda", dtype=torch.float16)

    query = randn(KV_HEADS * queries, q_len)
    positions = torch.zeros(2, 2, dtype=torch.int64, device="cuda")
    sides: dict[Role, Any] = {}
    for row, (role, fmt) in enumerate(formats.items()):
        prompt = randn(KV_HEADS, TOKENS)
        taps = randn(KV_HEADS * queries, TOKENS) if "query" in codec.taps(role) else None
        ops.overload("store", fmt.layout)(prompt, None, taps, None, role, spec, fmt.to_ints())
        group = max(fmt.token_group, 16)
        capacity = -(-TOKENS // group) * group
        arenas: Arenas = reference.empty_arenas(prompt, capacity, fmt)
        launch.write(arenas, prompt, None, Extent(0, 0), fmt)
        extent = Extent(0, 0).after(TOKENS, fmt)
        positions[row, 0], positions[row, 1] = extent.length, extent.watermark
        sides[role] = (arenas, (positions, row), fmt)
        launch.dense_past(arenas, extent, fmt)
    new = {role: randn(KV_HEADS, q_len) for role in ROLES}
    mask = None
    if masked:
        mask = torch.ones(BATCH, 1, q_len, TOKENS + q_len, dtype=torch.bool, device="cuda")
        mask[1, ..., :70] = False
    output = launch.attend(
        query, new["key"], new["value"], sides["key"], sides["value"], mask=mask, sinks=None,
        scale=head_dim**-0.5, causal=BOTTOM_RIGHT if q_len > 1 else 0, softcap=softcap,
    )  # fmt: skip
    key, value = ((sides[role][0], new[role], *sides[role][1:]) for role in ROLES)
    launch.write_both(key, value, None)
    return output


def main() -> None:
    """Run the cases that the arguments number, all without any, and say so."""
    for number in map(int, sys.argv[1:] or range(len(CASES))):
        output = attended(*CASES[number])
        torch.cuda.synchronize()
        assert output.isfinite().all(), CASES[number]
        codec, head_dim, bits, *_ = CASES[number]
        print(f"{codec.name}, head_dim {head_dim}, {bits} bits: ran", flush=True)


if __name__ == "__main__":
    main()
