"""The kernels compile for GPUs that are not there, and fit their registers."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton.backends.nvidia")

from squat_fx.codecs import Lossless
from squat_fx.kernels import aot
from squat_fx.kernels.aot import Launch, Resources, Shape

MOST_REGISTERS = 255


def compiled(launches: list[Launch], capability: int) -> dict[str, Resources]:
    """By kernel."""
    resources = [aot.compile_launch(launched, capability) for launched in launches]
    assert all(0 < r.registers <= MOST_REGISTERS for r in resources)
    return {r.kernel: r for r in resources}


@pytest.mark.parametrize("capability", aot.CAPABILITIES)
def test_one_token_of_a_common_head_needs_no_spills(capability: int) -> None:
    shape = Shape(head_dim=64, bits=2)
    launches = [*aot.attend_launches(shape), *aot.write_launches(shape, "key", 1)]
    resources = compiled([*launches, *aot.dequantize_launches(shape, "key")], capability)
    assert set(resources) == {"attend_kernel", "merge_kernel", "append_kernel", "dequantize_kernel"}
    assert not any(r.spills for r in resources.values())


@pytest.mark.parametrize("role", aot.ROLES)
def test_a_prompt_with_padding_takes_three_launches(role: aot.Role) -> None:
    valid = torch.ones(2, 64, dtype=torch.bool)
    resources = compiled(aot.write_launches(Shape(head_dim=80, bits=3), role, 64, valid), 90)
    assert list(resources) == ["start_kernel", "pack_kernel", "ring_kernel"]
    assert not any(r.spills for r in resources.values())


def test_masks_sinks_and_several_queries_compile_in_bfloat16() -> None:
    shape = Shape(head_dim=96, bits=4, q_len=8, dtype=torch.bfloat16)
    mask = torch.ones(2, 1, 8, 264, dtype=torch.bool)
    compiled(aot.attend_launches(shape, mask, torch.zeros(8)), 90)


def test_exact_storage_compiles() -> None:
    shape = Shape(head_dim=64, bits=2, codec=Lossless(32))
    launches = [*aot.attend_launches(shape), *aot.write_launches(shape, "key", 1)]
    assert not any(r.spills for r in compiled(launches, 80).values())


def test_a_launch_whose_shapes_are_the_same_is_the_same() -> None:
    """Nothing that grows reaches a launch: between two steps only positions in memory change."""
    first, second = (aot.attend_launches(Shape(head_dim=64, bits=2)) for _ in range(2))
    for a, b in zip(first, second, strict=True):
        constants = [
            {n: v for n, v in launched.arguments.items() if not isinstance(v, torch.Tensor | tuple)}
            for launched in (a, b)
        ]
        assert constants[0] == constants[1]
