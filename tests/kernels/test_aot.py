"""The kernels compile for GPUs that are not there, and fit their registers."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("triton.backends.nvidia")

from squat_fx.codecs import (
    Codec,
    Kivi,
    Kvarn,
    Lossless,
    Polar,
    PolarRope,
    Qjl,
    Squat,
    SquatPaper,
    Svdq,
    Think,
    TurboQuant,
)
from squat_fx.kernels import aot, launch, triton_attend_token
from squat_fx.kernels.aot import Launch, Resources, Shape
from squat_fx.layouts.rotary import Pairing, Rotation
from tests.choose import diagonal, full

MOST_REGISTERS = 255
MULTIPROCESSOR_BYTES = 227 * 1024  # of shared memory, sm_90
AMPERE_BYTES = 163 * 1024  # sm_80


def compiled(launches: list[Launch], capability: int) -> dict[str, Resources]:
    """By kernel."""
    resources = [aot.compile_launch(launched, capability) for launched in launches]
    assert all(0 < r.registers <= MOST_REGISTERS for r in resources)
    return {r.kernel: r for r in resources}


@pytest.mark.parametrize("capability", [90, *full(80)])
def test_one_token_of_a_common_head_needs_no_spills(capability: int) -> None:
    shape = Shape(head_dim=64, bits=2)
    launches = [*aot.attend_launches(shape), *aot.write_launches(shape, "key", 1)]
    resources = compiled([*launches, *aot.dequantize_launches(shape, "key")], capability)
    assert set(resources) == {"attend_kernel", "merge_kernel", "append_kernel", "dequantize_kernel"}
    assert not any(r.spills for r in resources.values())


@pytest.mark.parametrize("codec", [Kivi(), Squat()], ids=lambda codec: codec.name)
def test_a_window_needs_no_spills(codec: Codec) -> None:
    """Of groups of keys Gluon's kernel knows no windows, and leaves them to Triton's."""
    shape = Shape(head_dim=64, bits=2, codec=codec)
    resources = compiled(aot.attend_launches(shape, gpu="hopper", window=True), 90)
    attend = "swapped_attend_kernel" if codec == Squat() else "attend_kernel"
    assert set(resources) == {attend, "merge_kernel"}
    assert not any(r.spills for r in resources.values())


@pytest.mark.parametrize(("stored", "capability"), diagonal([(64, 3), (128, 2)], aot.CAPABILITIES))
def test_storing_rotated_tokens_needs_no_spills(stored: tuple[int, int], capability: int) -> None:
    head_dim, bits = stored
    shape = Shape(head_dim, bits, codec=Squat())
    launches = [*aot.write_launches(shape, "key", 1), *aot.dequantize_launches(shape, "key")]
    launches += aot.write_launches(shape, "key", 64, with_feedback=True)
    resources = compiled(launches, capability)
    assert list(resources) == [
        "append_kernel",
        "dequantize_token_kernel",
        "pack_kernel",
        "ring_kernel",
    ]
    assert not any(r.spills for r in resources.values())


@pytest.mark.parametrize(
    ("learned", "capability"),
    diagonal(
        [(64, torch.float16), (80, torch.bfloat16), (128, torch.bfloat16), (256, torch.float16)],
        aot.CAPABILITIES,
    ),
    ids=str,
)
def test_learning_needs_no_spills(learned: tuple[int, torch.dtype], capability: int) -> None:
    head_dim, dtype = learned
    shape = Shape(head_dim, 2, codec=Squat(), dtype=dtype)
    valid = torch.ones(2, 256, dtype=torch.bool)
    resources = compiled(aot.learn_launches(shape, 256, valid), capability)
    assert list(resources) == [
        "statistics_kernel",
        "gather_kernel",
        "latent_kernel",
        "feedback_kernel",
    ]
    assert not any(r.spills for r in resources.values())
    assert all(r.shared <= AMPERE_BYTES for r in resources.values())


def test_learning_without_feedback_takes_two_launches() -> None:
    shape = Shape(128, 2, codec=Squat(strength=0.0))
    resources = compiled(aot.learn_launches(shape), 90)
    assert list(resources) == ["statistics_kernel", "gather_kernel"]


def test_learning_feedback_alone_takes_three_launches() -> None:
    resources = compiled(aot.learn_launches(Shape(128, 2, codec=SquatPaper())), 90)
    assert list(resources) == ["statistics_kernel", "gather_kernel", "feedback_kernel"]
    assert not any(r.spills for r in resources.values())


def test_feedback_is_not_loaded_ahead_of_what_is_stored() -> None:
    launches = aot.learn_launches(Shape(128, 2, codec=Squat()))
    kernel = aot.compiled_kernel(launches[-1], 90)
    assert not any(text.startswith("LDGSTS") for _, text in aot.machine_code(kernel))


def test_one_token_of_keys_and_values_takes_one_launch() -> None:
    shape = Shape(128, 2, codec=Squat())
    key, value = (
        (shape.arenas(role), shape.tokens(1), (aot.POSITIONS, row), shape.format(role))
        for row, role in enumerate(aot.ROLES)
    )
    with aot.recorded() as launches:
        launch.write_both(key, value, None)
    (resources,) = compiled(launches, 90).values()
    assert resources.kernel == "append_both_kernel"
    assert launches[0].options["num_warps"] == 1
    assert resources.spills == 0
    assert resources.instructions <= 1200  # keys and values, of which a program runs one


@pytest.mark.parametrize(
    ("codec", "capability"), diagonal([Kvarn(), Think()], aot.CAPABILITIES), ids=str
)
def test_what_is_decoded_all_at_once_spills_little(codec: Codec, capability: int) -> None:
    shape = Shape(head_dim=64, bits=2, codec=codec)
    launches = [aot.attend_launches(shape)[0], *aot.dequantize_launches(shape, "key")]
    resources = compiled(launches, capability)
    assert resources["attend_kernel"].spills <= 256  # bytes
    assert not resources["dequantize_kernel"].spills


@pytest.mark.parametrize(("pairing", "most"), [("halves", 31), *full(("interleaved", 34))], ids=str)
def test_latent_keys_are_read_in_this_many_instructions(pairing: Pairing, most: int) -> None:
    shape = Shape(64, 2, codec=Svdq(schedule="1.25"), rotation=Rotation(64, pairing))
    attend, _ = aot.attend_launches(shape)
    kernel = aot.compiled_kernel(attend, 90)
    assert aot.resources_of(kernel).spills <= 768  # bytes
    assert aot.resources_of(kernel).shared <= 32 * 1024
    assert aot.instructions_per_code(kernel, 2 * 64 * attend.arguments["BLOCK_N"]) <= most
    (dequantize,) = aot.dequantize_launches(shape, "key")
    assert not aot.compile_launch(dequantize, 90).spills


def test_mixed_widths_of_an_uneven_head_compile() -> None:
    shape = Shape(head_dim=72, bits=(0, 1, 3, 8, 5), codec=Squat())
    launches = [*aot.write_launches(shape, "value", 64), *aot.dequantize_launches(shape, "value")]
    assert not any(r.spills for r in compiled(launches, 90).values())


def test_kivi_with_feedback_needs_no_spills() -> None:
    shape = Shape(head_dim=64, bits=2, codec=SquatPaper(32))
    resources = compiled(aot.write_launches(shape, "key", 64, with_feedback=True), 90)
    assert list(resources) == ["pack_kernel", "ring_kernel"]
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


@pytest.mark.parametrize(
    ("codec", "bits", "head_dim", "most"),
    [
        *[(Polar(), 3.875, 64, 68), (PolarRope(), 4, 64, 26)],
        *full((PolarRope(radius_bits=2), 3, 80, 60)),
    ],
    ids=str,
)
def test_radii_and_angles_take_this_many_instructions(
    codec: Codec, bits: float, head_dim: int, most: float
) -> None:
    """So that a compiler's change is seen. Huge angles, or tables copied ahead, would double it."""
    shape = Shape(head_dim, bits, codec=codec)
    attend, _ = aot.attend_launches(shape)
    assert attend.kernel.__name__ == "attend_kernel"
    kernel = aot.compiled_kernel(attend, 90)
    resources = aot.resources_of(kernel)
    assert resources.spills <= 512
    assert resources.shared <= 24 * 1024  # so that registers alone say how many programs run
    codes = 2 * head_dim * attend.arguments["BLOCK_N"]
    assert aot.instructions_per_code(kernel, codes) <= most
    (dequantize,) = aot.dequantize_launches(shape, "key")
    assert aot.compile_launch(dequantize, 80).spills <= 64


def test_a_launch_whose_shapes_are_the_same_is_the_same() -> None:
    """Nothing that grows reaches a launch: between two steps only positions in memory change."""
    first, second = (aot.attend_launches(Shape(head_dim=64, bits=2)) for _ in range(2))
    for a, b in zip(first, second, strict=True):
        constants = [
            {n: v for n, v in launched.arguments.items() if not isinstance(v, torch.Tensor | tuple)}
            for launched in (a, b)
        ]
        assert constants[0] == constants[1]


def attend_kernel(shape: Shape) -> Any:
    """The kernel that reads packed tokens, for sm_90."""
    launches = aot.attend_launches(shape)
    (attend,) = (x for x in launches if x.kernel.__name__ == "attend_kernel")
    return aot.compiled_kernel(attend, 90)


@pytest.mark.parametrize(
    ("bits", "most"), [(2, 2.0), ((4, 3, 2, 2, 2, 1, 1, 1), 2.2), *full((4, 2.1))]
)
def test_a_code_takes_few_instructions(bits: float | tuple[int, ...], most: float) -> None:
    """What keeps attention near the memory limit, so that a compiler's change is seen."""
    kernel = attend_kernel(Shape(head_dim=128, bits=bits, codec=Squat()))
    resources = aot.resources_of(kernel)
    assert resources.spills == 0
    assert resources.shared <= MULTIPROCESSOR_BYTES // launch.PROGRAMS_PER_MULTIPROCESSOR
    loop = aot.main_loop(aot.machine_code(kernel))
    assert aot.instructions_per_code(kernel, 2 * 128 * triton_attend_token.BLOCK_N) <= most
    assert sum("HMMA.16816" in text for text in loop) >= 2 * 64  # every dot in fp16
    assert any("LDGSTS.E.BYPASS.128" in text for text in loop), "codes are not copied ahead"
    assert not any(text.startswith(("I2F", "I2H", "LDL", "STL")) for text in loop)


def loop_on_the_side_of_16_rows(
    launches: list[Launch], capability: int, most: float
) -> tuple[list[str], Resources]:
    """The main loop of the Gluon kernel, which does what it has to in ``most`` instructions a code
    at most; and what it takes.
    """
    assert [x.kernel.__name__ for x in launches] == ["swapped_attend_kernel", "merge_kernel"]
    arguments = launches[0].arguments
    key, value, tokens = (arguments[name] for name in ("KEY", "VALUE", "BLOCK_N"))
    kernel = aot.compiled_kernel(launches[0], capability)
    loop = aot.main_loop(aot.machine_code(kernel))
    assert aot.instructions_per_code(kernel, (key.head_dim + value.head_dim) * tokens) <= most
    # A tile of 16 x 16 codes an instruction, and the two sums of weights.
    dots = (len(key.terms) + len(value.terms) + 2) * arguments["BLOCK_M"] // 8
    assert sum("HMMA.16816" in text for text in loop) == dots * tokens // 16
    assert not any(text.startswith(("I2F", "I2H", "LDL", "STL")) for text in loop)
    # Rows as wide as in shared memory, as many at once as a warp takes, and scales.
    copies = sum(
        tokens * fmt.token_row.width // fmt.token_row.together // 32 for fmt in (key, value)
    )
    assert sum("LDGSTS" in text for text in loop) == copies + 2, "codes are not copied ahead"
    return loop, aot.resources_of(kernel)


@pytest.mark.parametrize(
    ("code", "capability"),
    diagonal(
        [(128, 2, 1.25), (128, 4, 1.45), (128, (4, 3, 2, 2, 2, 1, 1, 1), 1.3), (256, 2, 1.15)],
        aot.CAPABILITIES,
    ),
    ids=str,
)
def test_a_code_takes_still_fewer_instructions_with_tokens_on_the_side_of_16_rows(
    code: tuple[int, float | tuple[int, ...], float], capability: int
) -> None:
    head_dim, bits, most = code
    launches = aot.attend_launches(Shape(head_dim, bits, codec=Squat()), gpu="ampere")
    loop, _ = loop_on_the_side_of_16_rows(launches, capability, most)
    assert any("LDGSTS.E.BYPASS.128" in text for text in loop)


@pytest.mark.parametrize(
    ("head_dim", "bits", "most"),
    [(64, 2, 1.55), (128, 3, 2.2), *full((64, 3, 2.8), (112, 2, 1.65))],
)
def test_odd_bytes_and_sections_take_few_instructions_too(
    head_dim: int, bits: float, most: float
) -> None:
    launches = aot.attend_launches(Shape(head_dim, bits, codec=Squat()), gpu="hopper")
    _, resources = loop_on_the_side_of_16_rows(launches, 90, most)
    assert resources.spills == 0


@pytest.mark.parametrize(
    ("what", "most"), [("mask", 1.5), *full(("softcap", 1.75), ("16 rows", 1.85))]
)
def test_masks_caps_and_more_rows_take_few_instructions_more(what: str, most: float) -> None:
    shape = Shape(128, 2, q_len=4 if what == "16 rows" else 1, codec=Squat())
    mask = torch.ones(2, 1, 1, 257, dtype=torch.bool) if what == "mask" else None
    softcap = 30.0 if what == "softcap" else 0.0
    launches = aot.attend_launches(shape, mask, gpu="hopper", softcap=softcap)
    _, resources = loop_on_the_side_of_16_rows(launches, 90, most)
    assert resources.spills == 0


@pytest.mark.parametrize(
    ("code", "capability"),
    diagonal(
        [(128, 2, 128, 1.3), (128, 2, 64, 1.8), (128, 2, 32, 2.6), (128, 4, 128, 1.7),
         (256, 2, 128, 1.5)],
        aot.CAPABILITIES,
    ),
    ids=str,
)  # fmt: skip
def test_groups_of_keys_take_few_instructions_too(
    code: tuple[int, int, int, float], capability: int
) -> None:
    head_dim, bits, group_size, most = code
    launches = aot.attend_launches(Shape(head_dim, bits, codec=Kivi(group_size)), gpu="ampere")
    names = [x.kernel.__name__ for x in launches]
    assert names == ["attend_kernel", "swapped_attend_kernel", "merge_kernel"]
    kernel = aot.compiled_kernel(launches[1], capability)
    loop, tokens = aot.main_loop(aot.machine_code(kernel)), launches[1].arguments["BLOCK_N"]
    assert aot.instructions_per_code(kernel, 2 * head_dim * tokens) <= most
    # The codes, the sum of weights, those of zero points, and the query's product with those.
    groups = -(-head_dim // group_size)
    multiplications = sum("HMMA.16816" in text for text in loop)
    assert multiplications == (2 * head_dim // 16 + 1 + groups) * tokens // 16 + head_dim // 16
    assert any("LDGSTS.E.BYPASS.128" in text for text in loop), "codes are not copied ahead"
    assert not any(text.startswith(("I2F", "I2H", "LDL", "STL")) for text in loop)


def test_kernels_that_begin_early_wait_for_the_one_before() -> None:
    fixed, calibrated = (Shape(128, 2, codec=Squat(), latent=latent) for latent in (False, True))
    launches = aot.attend_launches(fixed, gpu="hopper")
    launches += aot.write_launches(fixed, "key", 1, gpu="hopper")
    launches += aot.attend_launches(calibrated, gpu="hopper")
    assert {x.kernel.__name__: bool(x.options.get("launch_pdl")) for x in launches} == {
        "swapped_attend_kernel": True,
        "merge_kernel": True,
        "append_kernel": True,
        "prepare_kernel": False,
    }
    for early in launches:
        if early.options.get("launch_pdl"):
            assert "griddepcontrol.wait" in aot.compiled_kernel(early, 90).asm["ptx"]


@pytest.mark.parametrize(("head_dim", "shares"), diagonal([128, 256], [2, 8, 64, 128]))
def test_a_merging_thread_loads_few_maxima(
    head_dim: int, shares: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch, "num_shares", lambda *_: shares)
    merge = aot.attend_launches(Shape(head_dim, 2, codec=Squat()))[-1]
    kernel = aot.compiled_kernel(merge, 90)
    assert aot.resources_of(kernel).spills == 0
    loads = sum("LDG" in text for _, text in aot.machine_code(kernel))
    assert loads <= head_dim // 4 + 50  # of them, those of the outputs themselves


@pytest.mark.parametrize("dtype", [torch.float32, *full(torch.bfloat16)], ids=str)
def test_many_rows_of_wide_heads_fit_shared_memory(dtype: torch.dtype) -> None:
    shape = Shape(head_dim=256, bits=2, codec=Squat(), dtype=dtype, q_len=16)
    resources = compiled(aot.attend_launches(shape), 80)
    assert list(resources) == ["prepare_kernel", "attend_kernel", "merge_kernel"]
    assert all(r.shared <= AMPERE_BYTES for r in resources.values())


@pytest.mark.parametrize("codec", [Kivi(), Squat()], ids=lambda c: c.name)
def test_the_main_loop_of_attention_is_found(codec: Codec) -> None:
    shape = Shape(head_dim=64, bits=2, codec=codec)
    (attend,) = (
        launched
        for launched in aot.attend_launches(shape)
        if launched.kernel.__name__ == "attend_kernel"
    )
    kernel = aot.compiled_kernel(attend, 90)
    loop = aot.main_loop(aot.machine_code(kernel))
    assert sum("HMMA" in text for text in loop) >= 2 * 64 // 16  # a dot or more per plane group
    codes = 2 * 64 * attend.arguments["BLOCK_N"]
    threads = 32 * kernel.metadata.num_warps
    assert aot.instructions_per_code(kernel, codes) == len(loop) * threads / codes


def test_the_main_loop_is_the_longest_innermost_one_with_tensor_core_instructions() -> None:
    code = [
        (0x00, "MOV R1, c[0x0][0x28]"),
        (0x10, "HMMA.16816.F32 R4, R8, R12, R4"),  # outer loop from here
        (0x20, "HMMA.16816.F32 R4, R8, R12, R4"),  # short loop from here
        (0x30, "@P0 BRA 0x20"),
        (0x40, "LOP3.LUT R2, R2, 0x3, RZ, 0xc0, !PT"),  # the loop
        (0x50, "HGMMA.64x64x8.F32.TF32 R24, R104, gdesc[UR36], R24"),
        (0x60, "@!P1 BRA 0x80"),
        (0x70, "FADD R3, R3, R3"),
        (0x80, "@P2 BRA.U 0x40"),
        (0x90, "@P3 BRA 0x10"),
        (0xA0, "FADD R3, R3, R3"),  # a loop with nothing to multiply
        (0xB0, "@P4 BRA 0xa0"),
        (0xC0, "EXIT"),
        (0xD0, "BRA 0xd0"),
    ]
    assert aot.main_loop(code) == [text for address, text in code if 0x40 <= address <= 0x80]
    assert aot.main_loop(code[-4:]) == []


@pytest.mark.parametrize(
    ("codec", "capability"),
    [
        *diagonal([TurboQuant(), Qjl()], aot.CAPABILITIES),
        *full(*((Qjl(outliers=0), capability) for capability in aot.CAPABILITIES)),
    ],
    ids=str,
)
def test_attention_over_other_layouts_fits_its_registers(codec: Codec, capability: int) -> None:
    """At head_dim 128, with few spills: all plane groups of a tile are decoded at once."""
    shape = Shape(head_dim=128, bits=2, codec=codec)
    launches = [*aot.attend_launches(shape), *aot.dequantize_launches(shape, "key")]
    resources = compiled(launches, capability)
    assert set(resources) == {"attend_kernel", "merge_kernel", "dequantize_kernel"}
    assert resources["dequantize_kernel"].spills == 0
    assert resources["attend_kernel"].spills <= 256
    assert all(r.shared <= AMPERE_BYTES for r in resources.values())
