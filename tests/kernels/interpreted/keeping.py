"""Prompts of which a part is kept."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from squat_fx.codecs import Codec, Kivi, Lossless, Pruned, Squat, TurboQuant
from squat_fx.kernels import fit, launch, ops
from tests.choose import full
from tests.kernels.part import keeping_a_part_agrees_with_the_reference


@contextmanager
def kernels() -> Iterator[None]:
    """Ops on the CPU run kernels."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ops, "_implementation", lambda device: launch)
        patch.setattr(ops, "_learn", lambda device: fit.learn)
        yield


@pytest.mark.parametrize(
    ("codec", "dtype"),
    [
        (Squat(), torch.float16),
        *full(
            (Kivi(32), torch.float32), (Lossless(4), torch.float32), (TurboQuant(), torch.float16)
        ),
    ],
    ids=str,
)
def test_keeping_a_part_agrees_with_the_reference(codec: Codec, dtype: torch.dtype) -> None:
    part = Pruned(32, codec, window=8, pooling=3)
    keeping_a_part_agrees_with_the_reference(part, dtype, 16, 83, "cpu", kernels)
