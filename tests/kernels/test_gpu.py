"""The laws on a GPU, with every dtype and head dim, and what only a GPU shows: graphs."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace

import pytest
import torch

from squat_fx.codecs import (
    Codec,
    Format,
    Kivi,
    Kvarn,
    Lossless,
    Pruned,
    Qjl,
    Role,
    Squat,
    SquatPaper,
    Svdq,
    Think,
    TurboQuant,
    codec_spec,
)
from squat_fx.kernels import ops, reference
from squat_fx.kernels.reference import Arenas, Extent
from squat_fx.layouts.hadamard import rotation_pair
from squat_fx.layouts.rotary import Rotation
from squat_fx.state import QuantizedKV
from tests.choose import full
from tests.conftest import randn, stored_format

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
pytest.importorskip("triton")

from squat_fx.kernels import gluon_attend_channel, gluon_attend_token, launch  # noqa: E402
from tests.kernels import laws  # noqa: E402
from tests.kernels.part import keeping_a_part_agrees_with_the_reference  # noqa: E402

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
HEAD_DIMS = (16, 40, 64, 80, 96, 112, 128, 192, 256)
ROLES: tuple[Role, ...] = ("key", "value")


def on_gpu(*shape: int, seed: int) -> torch.Tensor:
    """Random normal numbers, fp16."""
    return randn(*shape, seed=seed).cuda().half()


def case_of(seed: int) -> laws.Case:
    """A case of ordinary size."""
    return laws.random_case(seed, DTYPES, HEAD_DIMS, longest=300)


@pytest.mark.parametrize("seed", range(64))
def test_attending_agrees_with_float64(seed: int) -> None:
    laws.attending_agrees_with_float64(case_of(seed), "cuda")


@pytest.mark.parametrize("seed", range(24))
def test_attending_to_radii_and_angles_agrees_with_float64(seed: int) -> None:
    laws.attending_agrees_with_float64(laws.polar_case(case_of(seed)), "cuda")


@pytest.mark.parametrize("seed", range(100, 112))
@pytest.mark.parametrize("role", ROLES)
def test_radii_and_angles_are_written_read_and_quantized_as_in_the_reference(
    seed: int, role: Role
) -> None:
    case = laws.polar_case(case_of(seed))
    laws.writing_agrees_with_the_reference(case, role, "cuda")
    laws.quantizing_agrees_with_the_reference(case, role, "cuda")
    laws.dequantizing_agrees_with_the_reference(case, role, "cuda")


CODECS = (
    *(Squat(), Kivi(32), Kvarn(32), Think(32), TurboQuant(), Qjl(), Qjl(outliers=0)),
    *(Svdq(), Svdq(budget=4096, outlier_chunks=2)),
)
CASES = list(itertools.product(enumerate(HEAD_DIMS), enumerate(CODECS), enumerate(DTYPES)))


@pytest.mark.parametrize(
    ("head_dim", "codec", "dtype"),
    [
        case if sum(places) % len(DTYPES) == 0 else full(case)[0]
        for places, case in (zip(*pairs, strict=True) for pairs in CASES)
    ],
    ids=str,
)
def test_attending_works_for_every_head_dim(
    head_dim: int, codec: Codec, dtype: torch.dtype
) -> None:
    case = replace(
        case_of(head_dim), codec=codec, key_dim=head_dim, value_dim=head_dim, dtype=dtype, bits=2,
        widths="uniform", pads=(0, 70), chunks=(210,), residual_length=32, sink_length=4, q_len=1,
        rotation=Rotation(head_dim // 2 * 2, "halves"),
    )  # fmt: skip
    laws.attending_agrees_with_float64(case, "cuda")


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize(
    ("codec", "role"),
    [
        (Kvarn(32), "key"),
        (Kvarn(32), "value"),
        (Think(32), "key"),
        (Svdq(), "key"),
        (Svdq(budget=16, outlier_chunks=2), "key"),
    ],
    ids=str,
)
def test_what_is_decoded_apart_is_as_in_the_reference(
    codec: Codec, role: Role, head_dim: int
) -> None:
    case = replace(case_of(head_dim), codec=codec, key_dim=head_dim, value_dim=head_dim)
    rotation = Rotation(head_dim // 4 * 2, "interleaved")
    case = replace(
        case, residual_length=5, chunks=(170, 1, 40, 1, 33), pads=(0, 9), rotation=rotation
    )
    laws.dequantizing_agrees_with_the_reference(case, role, "cuda")
    if isinstance(codec, Think | Svdq):
        laws.writing_agrees_with_the_reference(case, role, "cuda")


def token_kernel_launches(monkeypatch: pytest.MonkeyPatch) -> list:
    """The launches of the Gluon kernel for the layout planes/token from now on."""
    taken: list = []
    recorded = laws.Recorded(gluon_attend_token.swapped_attend_kernel, taken.append)
    monkeypatch.setattr(gluon_attend_token, "swapped_attend_kernel", recorded)
    return taken


@pytest.mark.parametrize(
    ("head_dim", "bits", "queries_per_kv", "q_len", "dtype"),
    [
        (64, 2, 3, 1, torch.float16),
        (64, 3, 1, 2, torch.bfloat16),
        (64, 4, 3, 1, torch.float16),
        (64, 8, 1, 3, torch.bfloat16),
        (80, 2, 4, 1, torch.bfloat16),
        (80, 4, 1, 1, torch.float16),
        (96, 2, 3, 4, torch.float16),
        (112, 2, 1, 1, torch.float16),
        (128, 1, 4, 1, torch.float16),
        (128, 2, 4, 1, torch.float16),
        (128, 2, 1, 8, torch.bfloat16),
        (128, 2, 4, 4, torch.float16),
        (128, 3, 4, 1, torch.float16),
        (128, 3, 16, 1, torch.bfloat16),
        (128, 4, 8, 1, torch.float16),
        (128, 5, 4, 3, torch.float16),
        (128, 6, 2, 2, torch.bfloat16),
        (128, 8, 4, 2, torch.float16),
        (192, 2, 4, 1, torch.float16),
        (192, 3, 1, 1, torch.bfloat16),
        (256, 1, 2, 4, torch.float16),
        (256, 2, 4, 1, torch.bfloat16),
        (256, 3, 4, 4, torch.float16),
        (256, 4, 8, 1, torch.float16),
    ],
)
@pytest.mark.parametrize("extras", [False, True])
def test_tokens_on_the_side_of_16_rows_agree_with_float64(
    monkeypatch: pytest.MonkeyPatch, head_dim: int, bits: int, queries_per_kv: int,
    q_len: int, dtype: torch.dtype, extras: bool,
) -> None:  # fmt: skip
    """``extras``: learned sinks, padding, offsets and factors, a basis of each head, no ring, a
    window.
    """
    taken = token_kernel_launches(monkeypatch)
    case = replace(
        case_of(head_dim + bits), codec=Squat(), key_dim=head_dim, value_dim=head_dim, dtype=dtype,
        bits=bits, widths="uniform", queries_per_kv=queries_per_kv, q_len=q_len, new_len=q_len,
        pads=(0, 70) if extras else (0, 0), chunks=(304,), residual_length=0 if extras else 32,
        sink_length=4, mask="none", causal=0, softcap=0.0, sinks=extras, shifted=extras,
        calibrated=extras, hidden=0.4 if extras else 0.0,
    )  # fmt: skip
    laws.attending_agrees_with_float64(case, "cuda")
    assert taken


@pytest.mark.parametrize(
    ("mask", "causal"),
    [
        ("none", reference.BOTTOM_RIGHT),
        ("bool", reference.NO_CAUSALITY),
        ("float", reference.TOP_LEFT),
        ("padding", reference.BOTTOM_RIGHT),
    ],
)
@pytest.mark.parametrize(
    ("key_dim", "value_dim", "bits", "queries_per_kv", "q_len", "softcap", "shifted"),
    [
        (128, 128, 2, 4, 1, 7.0, False),
        (128, 128, 3, 4, 4, 0.0, True),
        (64, 64, 2, 1, 5, 7.0, True),
        (192, 128, 4, 2, 3, 0.0, False),
    ],
)
def test_masks_windows_and_caps_on_the_side_of_16_rows_agree_with_float64(
    monkeypatch: pytest.MonkeyPatch, key_dim: int, value_dim: int, bits: int, queries_per_kv: int,
    q_len: int, softcap: float, shifted: bool, mask: str, causal: int,
) -> None:  # fmt: skip
    taken = token_kernel_launches(monkeypatch)
    case = replace(
        case_of(key_dim + bits), codec=Squat(), key_dim=key_dim, value_dim=value_dim,
        dtype=torch.float16, bits=bits, widths="uniform", queries_per_kv=queries_per_kv,
        q_len=q_len, new_len=q_len, pads=(0, 170), chunks=(304,), residual_length=32,
        sink_length=4, mask=mask, causal=causal, softcap=softcap, sinks=False, shifted=shifted,
        calibrated=False, hidden=0.5 if mask in ("none", "float") else 0.0,
    )  # fmt: skip
    laws.attending_agrees_with_float64(case, "cuda")
    assert taken


@pytest.mark.parametrize(
    ("head_dim", "bits", "group_size", "queries_per_kv", "q_len", "dtype"),
    [
        (64, 4, 32, 3, 1, torch.float16),
        (64, 8, 128, 1, 3, torch.bfloat16),
        (128, 2, 128, 4, 1, torch.float16),
        (128, 2, 64, 1, 8, torch.bfloat16),
        (128, 2, 32, 8, 1, torch.float16),
        (128, 4, 128, 2, 2, torch.bfloat16),
        (128, 8, 64, 4, 2, torch.float16),
        (256, 1, 32, 2, 4, torch.float16),
        (256, 2, 128, 4, 1, torch.bfloat16),
    ],
)
@pytest.mark.parametrize("extras", [False, True])
def test_groups_of_keys_on_the_side_of_16_rows_agree_with_float64(
    monkeypatch: pytest.MonkeyPatch, head_dim: int, bits: int, group_size: int,
    queries_per_kv: int, q_len: int, dtype: torch.dtype, extras: bool,
) -> None:  # fmt: skip
    """``extras``: learned sinks, padding, no ring."""
    taken = []
    kernel = gluon_attend_channel.swapped_attend_kernel
    recorded = laws.Recorded(kernel, taken.append)
    monkeypatch.setattr(gluon_attend_channel, "swapped_attend_kernel", recorded)
    case = replace(
        case_of(head_dim + bits), codec=Kivi(group_size), key_dim=head_dim, value_dim=head_dim,
        dtype=dtype, bits=bits, queries_per_kv=queries_per_kv, q_len=q_len, new_len=q_len,
        pads=(0, 70) if extras else (0, 0), chunks=(560,), residual_length=0 if extras else 32,
        sink_length=4, mask="none", causal=0, softcap=0.0, sinks=extras, hidden=0.0,
    )  # fmt: skip
    laws.attending_agrees_with_float64(case, "cuda")
    assert taken


@pytest.mark.parametrize("codec", [Squat(), Kivi(32), Kivi(128)], ids=codec_spec)
@pytest.mark.parametrize("bits", [2, 3])
def test_room_in_an_arena_changes_no_answer(codec: Codec, bits: int) -> None:
    handles = [
        QuantizedKV.from_dense(
            on_gpu(2, 8, 3000, 128, seed=i), stored_format(codec, role, 128, bits), role
        )
        for i, role in enumerate(ROLES)
    ]
    query, new = on_gpu(2, 32, 1, 128, seed=2), [on_gpu(2, 8, 1, 128, seed=i) for i in (3, 4)]

    def attended() -> torch.Tensor:
        storages = [handle.writable_storage() for handle in handles]
        extent = torch.tensor([[storages[0].length, storages[0].watermark]]).cuda()
        key, value = ((s.arenas, (extent, 0), s.fmt) for s in storages)
        return launch.attend(
            query, *new, key, value,
            mask=None, sinks=None, scale=128**-0.5, causal=reference.NO_CAUSALITY, softcap=0.0,
        )  # fmt: skip

    tight = attended()
    for handle in handles:
        handle.writable_storage().reserve(30000)
    # The shares are the same; only the empty ones beside them may change the order of a sum.
    torch.testing.assert_close(attended(), tight, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("codec", [TurboQuant(), TurboQuant(False), Qjl(), Qjl(96, 0)], ids=str)
@pytest.mark.parametrize("head_dim", [40, 80, 128])
@pytest.mark.parametrize("role", ROLES)
def test_other_layouts_are_written_and_read_as_in_the_reference(
    codec: Codec, head_dim: int, role: Role
) -> None:
    case = replace(
        case_of(head_dim), codec=codec, key_dim=head_dim, value_dim=head_dim, bits=2,
        residual_length=5, pads=(0, 40), chunks=(200, 1, 33, 1),
    )  # fmt: skip
    laws.writing_agrees_with_the_reference(case, role, "cuda")
    laws.dequantizing_agrees_with_the_reference(case, role, "cuda")
    laws.writing_both_agrees_with_writing_each(case, "cuda")


@pytest.mark.parametrize("seed", range(100, 124))
@pytest.mark.parametrize("role", ROLES)
def test_writing_agrees_with_the_reference(seed: int, role: Role) -> None:
    laws.writing_agrees_with_the_reference(case_of(seed), role, "cuda")


@pytest.mark.parametrize("seed", range(600, 612))
def test_writing_both_agrees_with_writing_each(seed: int) -> None:
    laws.writing_both_agrees_with_writing_each(case_of(seed), "cuda")


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("codec", [Kivi(32), Squat()], ids=lambda c: c.name)
@pytest.mark.parametrize("role", ROLES)
def test_quantizing_agrees_with_the_reference(bits: int, codec: Codec, role: Role) -> None:
    case = replace(case_of(bits), codec=codec, bits=bits, widths="uniform")
    laws.quantizing_agrees_with_the_reference(case, role, "cuda")


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("shift", [0.0, 50.0])
def test_learning_agrees_with_float64(head_dim: int, dtype: torch.dtype, shift: float) -> None:
    case = replace(
        case_of(head_dim), codec=Squat(), key_dim=head_dim, dtype=dtype, bits=2, widths="uniform",
        pads=(0, 170, 980), chunks=(1000,), sink_length=4, shifted=False,
    )  # fmt: skip
    laws.learning_agrees_with_float64(case, "cuda", shift)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e5])
def test_what_fp16_cannot_hold_is_not_learned_from(bad: float, dtype: torch.dtype) -> None:
    case = replace(case_of(1), codec=Squat(), key_dim=64, bits=2, widths="uniform", dtype=dtype,
                   calibrated=False, shifted=False, sink_length=4)  # fmt: skip
    laws.learning_leaves_out(bad, case, "cuda")


@pytest.mark.parametrize("queries_per_kv", [1, 3, 4, 8])
@pytest.mark.parametrize("calibrated", [False, True])
@pytest.mark.parametrize(
    "codec", [Squat(), Squat(center=False, strength=4.0), Squat(smooth=False), SquatPaper()]
)
def test_learning_from_a_long_prompt_agrees_with_float64(
    codec: Codec, calibrated: bool, queries_per_kv: int
) -> None:
    case = replace(
        case_of(1), codec=codec, key_dim=128, dtype=torch.float16, bits=2, widths="uniform",
        pads=(0,), chunks=(9000,), sink_length=4, queries_per_kv=queries_per_kv, shifted=False,
        calibrated=calibrated,
    )  # fmt: skip
    laws.learning_agrees_with_float64(case, "cuda")


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("head_dim", [64, 80, 96, 112, 128, 192, 256])
def test_storing_rotated_tokens_agrees_with_the_reference(
    head_dim: int, dtype: torch.dtype
) -> None:
    case = replace(
        case_of(head_dim), codec=Squat(), key_dim=head_dim, value_dim=head_dim, dtype=dtype,
        pads=(0, 70), chunks=(210,), residual_length=32, sink_length=4,
    )  # fmt: skip
    for role in ROLES:
        laws.storing_agrees_with_the_reference(case, role, "cuda")
    laws.writing_agrees_with_the_reference(case, "key", "cuda", with_feedback=True)


# A whole head in one compilation takes long at 256 channels, so these are few.
@pytest.mark.parametrize(("head_dim", "group_size"), [(64, 128), (80, 32), (128, 64)])
def test_kivi_with_feedback_agrees_with_the_reference(head_dim: int, group_size: int) -> None:
    case = replace(
        case_of(1), codec=SquatPaper(group_size), key_dim=head_dim, bits=2, dtype=torch.float16,
        pads=(0, 70), chunks=(300,), residual_length=32, sink_length=4,
    )  # fmt: skip
    laws.storing_agrees_with_the_reference(case, "key", "cuda")
    laws.quantizing_agrees_with_the_reference(case, "key", "cuda", with_feedback=True)


@pytest.mark.parametrize("seed", range(300, 316))
@pytest.mark.parametrize("role", ROLES)
def test_dequantizing_agrees_with_the_reference(seed: int, role: Role) -> None:
    laws.dequantizing_agrees_with_the_reference(case_of(seed), role, "cuda")


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize(
    "codec", [Squat(), Kivi(32), Lossless(), TurboQuant(), Kvarn(32), Think(32)], ids=codec_spec
)
def test_keeping_a_part_agrees_with_the_reference(codec: Codec, dtype: torch.dtype) -> None:
    part = Pruned(128, codec)
    keeping_a_part_agrees_with_the_reference(part, dtype, 128, 500, "cuda", nullcontext)


def test_a_graph_replays_right_over_a_part_of_a_prompt() -> None:
    """Eight steps recorded once answer as eight calls do, with a mask that hides kept tokens."""
    codec, query = Pruned(128), on_gpu(2, 32, 600, 128, seed=2)
    key, value = on_gpu(2, 8, 600, 128, seed=0), on_gpu(2, 8, 600, 128, seed=1)
    formats = [stored_format(codec, role, 128, 2) for role in ROLES]
    keys = QuantizedKV.from_dense(key, formats[0], "key", query=query)
    values = QuantizedKV.from_dense(value, formats[1], "value", keys=keys)
    storages = [handle.writable_storage(64) for handle in (keys, values)]
    positions = torch.zeros(2, 2, dtype=torch.int64, device="cuda")
    new, mask = on_gpu(2, 8, 1, 128, seed=3), on_gpu(1, 1, 1, 1024, seed=4) > 0
    names, ints = [f.layout for f in formats], [f.to_ints() for f in formats]

    def step() -> torch.Tensor:
        both = (*storages[0].tensors, *storages[1].tensors)
        output = ops.overload("attend", *names)(
            query[:, :, :1], new, new, *both, positions, 0, 1, -1, mask, None, 0.1, 0, 0.0, *ints
        )
        ops.overload("append_both_", *names)(
            *both, new, new, None, positions, 0, 1, formats[0].codec, *ints, [output]
        )
        return output

    def run(call: Callable[[], torch.Tensor]) -> list[torch.Tensor]:
        found, extent = [], storages[0].extent
        for _ in range(8):
            positions.copy_(torch.tensor([[extent.length, extent.watermark]] * 2))
            found.append(call().clone())
            extent = extent.after(1, formats[0])
        return found

    before = [[t.clone() for t in s.tensors] for s in storages]

    def restore() -> None:
        for storage, tensors in zip(storages, before, strict=True):
            for target, source in zip(storage.tensors, tensors, strict=True):
                target.copy_(source)

    expected = run(step)
    restore()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = step()

    def replay() -> torch.Tensor:
        graph.replay()
        return output

    for found, wanted in zip(run(replay), expected, strict=True):
        assert torch.equal(found, wanted)


@contextmanager
def no_waiting() -> Iterator[None]:
    """Waiting for the GPU is an error."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def codec_and_ints(fmt: Format) -> tuple[str, list[int]]:
    """A format as ops take it."""
    return fmt.codec, fmt.to_ints()


class Decoding:
    """A layer's storage on the GPU and its twin on the CPU, fed the same tokens through the ops."""

    def __init__(self, case: laws.Case, capacity: int, prompt: int) -> None:
        self.case = case
        self.formats: dict[Role, Format] = {role: case.format(role) for role in ROLES}
        self.twins: dict[Role, Arenas] = {
            role: laws.unwritten(case, role, capacity) for role in ROLES
        }
        self.arenas: dict[Role, Arenas] = {
            role: laws.to(twin, "cuda") for role, twin in self.twins.items()
        }
        self.fed: dict[Role, list[torch.Tensor]] = {role: [] for role in ROLES}
        self.extents: dict[Role, Extent] = dict.fromkeys(ROLES, Extent(0, 0))
        self.positions = torch.zeros(2, 2, dtype=torch.int64, device="cuda")
        batch = len(case.pads)
        self.new: dict[Role, torch.Tensor] = {
            role: torch.empty(
                batch, laws.NUM_KV_HEADS, 1, fmt.head_dim, dtype=case.dtype, device="cuda"
            )
            for role, fmt in self.formats.items()
        }
        heads = laws.NUM_KV_HEADS * case.queries_per_kv
        self.query = torch.empty(batch, heads, 1, case.key_dim, dtype=case.dtype, device="cuda")
        valid = torch.arange(prompt) >= torch.tensor(case.pads)[:, None]
        for i, role in enumerate(ROLES):
            x = case.randn(batch, laws.NUM_KV_HEADS, prompt, self.formats[role].head_dim, seed=i)
            self._write(role, x, valid)
        self._advance(prompt)

    def _write(self, role: Role, x: torch.Tensor, valid: torch.Tensor) -> None:
        fmt = self.formats[role]
        reference.write(self.twins[role], x, valid, self.extents[role], fmt)
        self.fed[role].append(x)
        row = ROLES.index(role)
        self._op("append_", fmt)(
            *laws.tensors_of(self.arenas[role]),
            x.cuda(),
            valid.cuda(),
            self.positions,
            row,
            *codec_and_ints(fmt),
        )

    def _op(self, name: str, fmt):
        return ops.overload(name, fmt.layout)

    def _advance(self, tokens: int) -> None:
        self.extents = {r: e.after(tokens, self.formats[r]) for r, e in self.extents.items()}
        rows = [(e.length, e.watermark) for e in self.extents.values()]
        self.positions.copy_(torch.tensor(rows))

    def step(self) -> torch.Tensor:
        """Attend over the past and the new token, then append it."""
        key, value = self.formats.values()
        output = self._op("attend", key)(
            self.query, self.new["key"], self.new["value"],
            *laws.tensors_of(self.arenas["key"]), *laws.tensors_of(self.arenas["value"]),
            self.positions, 0, 1, -1, None, None, 0.3, 0, 0.0, key.to_ints(), value.to_ints(),
        )  # fmt: skip
        for row, (role, fmt) in enumerate(self.formats.items()):
            self._op("append_", fmt)(
                *laws.tensors_of(self.arenas[role]),
                self.new[role],
                None,
                self.positions,
                row,
                *codec_and_ints(fmt),
            )
        return output

    def feed(self, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        """New inputs for ``step``; what torch makes of them in the model's dtype and in float64."""
        query = self.case.randn(*self.query.shape, seed=3 * step)
        self.query.copy_(query)
        new = []
        for i, x in enumerate(self.new.values()):
            new.append(self.case.randn(*x.shape, seed=3 * step + 1 + i))
            x.copy_(new[-1])
        held = {role: laws.to(arenas, "cpu") for role, arenas in self.arenas.items()}
        sides = [(held[r], self.extents[r], self.formats[r]) for r in ROLES]
        options = {"mask": None, "sinks": None, "scale": 0.3, "causal": 0, "softcap": 0.0}
        rounded = laws.attention_in_the_models_dtype(query, *new, *sides, **options)
        expected = laws.attention_in_float64(query, *new, *sides, **options)
        for role, x in zip(ROLES, new, strict=True):
            reference.write(self.twins[role], x, None, self.extents[role], self.formats[role])
            self.fed[role].append(x)
        return rounded, expected


@pytest.mark.parametrize("codec", [Squat(), Kivi(32), Lossless(32)], ids=lambda c: c.name)
def test_a_graph_replays_right_while_only_positions_change(codec: Codec) -> None:
    case = replace(
        case_of(0), codec=codec, key_dim=128, value_dim=64, bits=2, dtype=torch.float16,
        pads=(0, 9), residual_length=16, sink_length=4, queries_per_kv=4,
    )  # fmt: skip
    decoding = Decoding(case, capacity=320, prompt=50)
    before: dict[Role, Arenas] = {
        role: laws.to(arenas, "cuda") for role, arenas in decoding.arenas.items()
    }
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        decoding.step()  # compiles; what it wrote is undone below
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            output = decoding.step()
    torch.cuda.synchronize()
    for role, arenas in before.items():
        for target, source in zip(
            laws.tensors_of(decoding.arenas[role]), laws.tensors_of(arenas), strict=True
        ):
            target.copy_(source)
    steps = []
    for step in range(120):
        rounded, expected = decoding.feed(step)
        output.fill_(float("nan"))
        graph.replay()
        torch.cuda.synchronize()
        steps.append((output.cpu(), rounded, expected))
        assert laws.distance(*steps[-1][::2]) < 0.01
        decoding._advance(1)
    # Of a single step torch's rounding may happen to be close.
    laws.assert_as_close_as(*(torch.stack(tensors) for tensors in zip(*steps, strict=True)))
    for role, fmt in decoding.formats.items():
        laws.assert_same_storage(
            decoding.arenas[role],
            decoding.twins[role],
            torch.cat(decoding.fed[role], 2),
            decoding.extents[role],
            fmt,
        )


@pytest.mark.parametrize("codec", [Squat(), Kivi(32)], ids=lambda c: c.name)
def test_ops_never_wait_for_the_gpu(codec: Codec) -> None:
    case = replace(
        case_of(0), codec=codec, key_dim=64, value_dim=64, pads=(0, 0), dtype=torch.float16,
        calibrated=False,
    )  # fmt: skip
    decoding = Decoding(case, capacity=320, prompt=50)
    fmt = decoding.formats["key"]
    arenas = laws.tensors_of(decoding.arenas["key"])
    new = torch.zeros(2, laws.NUM_KV_HEADS, 40, 64, dtype=case.dtype, device="cuda")
    valid = torch.ones(2, 40, dtype=torch.bool, device="cuda")
    append_, store, quantize = (
        ops.overload(name, fmt.layout) for name in ("append_", "store", "quantize")
    )
    learned = arenas[2:4] if fmt.layout == "planes/token" else ()
    rotation_pair(64, new.device)  # a table that a process makes once
    with no_waiting():
        decoding.step()
        store(new, valid, decoding.query.expand(-1, -1, 40, -1), None, "key", *codec_and_ints(fmt))
        quantize(new[:, :, :32], None, *learned, *codec_and_ints(fmt))
        append_(*arenas, new, valid, decoding.positions, 0, *codec_and_ints(fmt))
