"""What the laws are tried on, small enough for the interpreter."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from squat_fx.codecs import Codec, Kvarn, Qjl, Svdq, Think, TurboQuant, codec_spec
from squat_fx.layouts.rotary import Rotation
from tests.kernels import laws

# The interpreter multiplies bfloat16 as integers, so bfloat16 waits for a GPU.
DTYPES = (torch.float32, torch.float16)
HEAD_DIMS = (16, 24, 40, 64, 80)
ROLES = ("key", "value")
DECODED_APART = (Kvarn(32), Kvarn(64), Think(32), Think(64, ratio=0.7), Think(32, ratio=0.0))


def case_of(seed: int) -> laws.Case:
    """A small case."""
    return laws.random_case(seed, DTYPES, HEAD_DIMS, longest=70)


def of_other_layouts(codec: Codec, head_dim: int, **changes: Any) -> laws.Case:
    """A case of a layout that packs with torch and decodes in a function of its own."""
    case = replace(
        case_of(head_dim), codec=codec, key_dim=head_dim, value_dim=40, bits=3,
        widths="uniform", pads=(0, 11), chunks=(90, 1, 7), residual_length=5, sink_length=4,
        shifted=False, calibrated=False,
    )  # fmt: skip
    return replace(case, **changes)


OTHER_LAYOUTS = (
    *(of_other_layouts(TurboQuant(), head_dim, bits=b) for head_dim, b in ((16, 1), (24, 2))),
    *(of_other_layouts(TurboQuant(False), head_dim, bits=b) for head_dim, b in ((64, 3), (80, 4))),
    of_other_layouts(TurboQuant(), 64, value_dim=64, bits=2.25),
    of_other_layouts(Qjl(64, 3, 32), 24),
    of_other_layouts(Qjl(48, 0), 40, pads=(0, 0)),
    of_other_layouts(Qjl(96, 8, 144), 80, dtype=torch.float16),
)
LATENT = tuple(
    replace(case, chunks=(50, 1, 7), value_dim=16, q_len=3, new_len=3)
    for case in (
        of_other_layouts(Svdq(schedule=(5, 3, 0)), 40, rotation=Rotation(20, "halves")),
        of_other_layouts(Svdq(schedule=(4, 2)), 24, rotation=Rotation(24, "interleaved")),
        of_other_layouts(Svdq(), 64, rotation=Rotation(64, "halves"), dtype=torch.float16),
        of_other_layouts(Svdq(pre_rope=False), 16, pads=(0, 0)),
        of_other_layouts(Svdq(budget=16, outlier_chunks=2), 40, rotation=Rotation(40, "halves")),
    )
)


def named(parameter: Any) -> str:
    """Of a case, a codec or a plain parameter."""
    if isinstance(parameter, laws.Case):
        return f"{parameter.codec.name}-{parameter.key_dim}-{parameter.bits}"
    return codec_spec(parameter) if isinstance(parameter, Codec) else str(parameter)
