"""A calibration: what it gives, for which model, and how it is kept."""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import squat_fx
from squat_fx import Calibration, Config, QuantizedKV
from squat_fx.calibration import (
    QUERY_WEIGHT,
    RIDGE,
    Fingerprint,
    LayerCalibration,
    allocate,
)
from squat_fx.codecs import Squat, codec_spec, make_format
from squat_fx.layouts.symmetric import DISTORTION
from tests.conftest import randn
from tests.models import build, prompt


def layer(head_dim: int = 64, heads: int = 2) -> tuple[LayerCalibration, Tensor, Tensor]:
    """A calibration of keys and queries that prefer a few directions."""
    spread = torch.logspace(0, -1.5, head_dim).double()
    directions = torch.linalg.qr(randn(2, heads, head_dim, head_dim, seed=1).double())[0]
    key, query = ((d * spread) @ d.mT for d in directions)
    return LayerCalibration.of(key @ key.mT, query @ query.mT), key, query


def calibration(model: nn.Module, **layers: LayerCalibration) -> Calibration:
    found = {int(name[1:]): value for name, value in layers.items()}
    return Calibration(found, Fingerprint.of(model), 64)


# which widths it gives --------------------------------------------------------------------------


@given(
    importance=st.lists(st.floats(1e-6, 1e3), min_size=1, max_size=16),
    bits=st.floats(0, 8),
)
def test_bits_go_where_they_count(importance: list[float], bits: float) -> None:
    total = int(bits * len(importance))
    widths = allocate(importance, total)
    assert sum(widths) == total
    assert all(0 <= width <= 8 for width in widths)
    for one, width in zip(importance, widths, strict=True):
        assert all(width >= w for i, w in zip(importance, widths, strict=True) if i < one)


@given(importance=st.lists(st.floats(1e-3, 1e3), min_size=2, max_size=4), total=st.integers(0, 12))
def test_no_other_widths_of_that_sum_have_a_smaller_error(
    importance: list[float], total: int
) -> None:
    """Greedy is the best there is, since every further bit gains less than the one before it."""

    def error(widths: tuple[int, ...]) -> float:
        return sum(i * DISTORTION[w] for i, w in zip(importance, widths, strict=True))

    widths = allocate(importance, total)
    every = itertools.product(range(9), repeat=len(importance))
    least = min(error(other) for other in every if sum(other) == total)
    assert error(widths) <= least * (1 + 1e-9)


@given(
    importance=st.lists(st.floats(1e-6, 1e3), min_size=1, max_size=16), total=st.integers(0, 120)
)
def test_a_further_bit_takes_none_away(importance: list[float], total: int) -> None:
    total = min(total, 8 * len(importance) - 1)
    fewer, more = allocate(importance, total), allocate(importance, total + 1)
    assert all(a <= b for a, b in zip(fewer, more, strict=True))


def test_all_heads_of_a_layer_get_the_same_widths_and_none_decides_alone() -> None:
    """A head whose keys are a thousand times larger has no more to say than the others."""
    found, _, _ = layer()
    reversed_heads = found.importance.clone()
    reversed_heads[1] = reversed_heads[1].flip(-1)
    louder = reversed_heads.clone()
    louder[1] *= 1e6
    widths = [LayerCalibration(found.matrices, i).widths(2) for i in (reversed_heads, louder)]
    assert widths[0] == widths[1]


@pytest.mark.parametrize("bits", [1, 2, 2.25, 3.5, 8])
def test_the_widths_average_what_was_asked(bits: float) -> None:
    widths = layer()[0].widths(bits)
    assert sum(widths) == 4 * bits
    assert list(widths) == sorted(widths)


def test_an_average_that_the_planes_do_not_have_is_refused() -> None:
    with pytest.raises(ValueError, match=r"4 plane groups of head_dim 64 cannot average 2.1 bits"):
        layer()[0].widths(2.1)


# the basis --------------------------------------------------------------------------------------


@pytest.mark.parametrize("head_dim", [16, 20, 40, 80, 128])
def test_a_basis_of_any_head_dim_undoes_itself(head_dim: int) -> None:
    there, back = layer(head_dim)[0].matrices
    identity = torch.eye(head_dim).expand(2, -1, -1)
    torch.testing.assert_close(there @ back, identity, rtol=0, atol=1e-4)
    assert layer(head_dim)[0].importance.shape == (2, -(-head_dim // 16))


def test_keys_in_the_basis_vary_alike_in_every_channel() -> None:
    """So that one scale per token serves planes of any importance."""
    found, key, _ = layer()
    second_moment = (key @ key.mT).float()
    latent = found.matrices[0].mT @ second_moment @ found.matrices[0]
    variance = latent.diagonal(dim1=-2, dim2=-1)
    assert (variance > 0.4).all()
    assert (variance < 1.1).all()
    planes = variance.unflatten(-1, (-1, 16))
    torch.testing.assert_close(
        planes, planes.mean(-1, keepdim=True).expand_as(planes), rtol=0.5, atol=0
    )


def test_errors_in_the_basis_cost_what_the_importance_says() -> None:
    """``inv(basis) @ M @ inv(basis).T`` has the importance of each plane on its diagonal."""
    found, _, query = layer()
    gram = query @ query.mT
    gram = gram / gram.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None]
    identity = torch.eye(64, dtype=torch.float64)
    weighted = (1 - QUERY_WEIGHT + RIDGE) * identity + QUERY_WEIGHT * gram
    back = found.matrices[1].double()
    cost = back @ weighted @ back.mT
    expected = found.importance.double().repeat_interleave(16, -1)
    torch.testing.assert_close(cost, torch.diag_embed(expected), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("constant", ["keys", "queries"])
def test_what_does_not_vary_gives_a_basis_all_the_same(constant: str) -> None:
    nothing, something = torch.zeros(2, 2, 32, 32).double(), torch.eye(32).double().repeat(2, 1, 1)
    moments = (nothing[0], something) if constant == "keys" else (something, nothing[0])
    found = LayerCalibration.of(*moments)
    assert found.matrices.isfinite().all()
    assert (found.importance > 0).all()
    assert found.widths(2) == (2, 2)


def test_one_tensor_serves_a_device() -> None:
    found, cpu = layer()[0], torch.device("cpu")
    with torch.inference_mode():
        first = found.basis(cpu)
    assert found.basis(cpu) is first
    assert not first.is_inference()


def test_the_matrices_are_inverse_and_the_importance_rises() -> None:
    found, _, _ = layer()
    product = found.matrices[0] @ found.matrices[1]
    torch.testing.assert_close(product, torch.eye(64).expand(2, 64, 64), rtol=0, atol=1e-4)
    assert (found.importance.diff(dim=-1) > 0).all()
    assert found.widths(2)[0] < found.widths(2)[-1]
    assert sum(found.widths(2.5)) == 10


def test_it_lowers_the_error_of_the_scores() -> None:
    found, key_root, query_root = layer()
    x = (randn(1, 2, 300, 64, seed=3).double() @ key_root).float()
    query = (randn(1, 2, 50, 64, seed=4).double() @ query_root).float()
    codec, errors = Squat(strength=0), []
    for widths, basis in ((2, None), (found.widths(2), found.matrices)):
        fmt = make_format(codec, codec_spec(codec), "key", 64, widths, 0, 0, basis is not None)
        handle = QuantizedKV.from_dense(x, fmt, "key", given=basis)
        assert fmt.packed_bits_per_element() == 2.25
        errors.append(float(((handle.dequantize() - x) @ query.mT).square().mean()))
    assert errors[1] < 0.5 * errors[0]


# the file ---------------------------------------------------------------------------------------


def test_a_file_holds_all_of_it(tmp_path: Path) -> None:
    model, path = build("llama"), tmp_path / "calibration.safetensors"
    saved = calibration(model, l0=layer()[0], l3=layer(32)[0])
    saved.save(path)
    loaded = Calibration.load(path)
    assert sorted(loaded.layers) == [0, 3]
    assert loaded.tokens == 64
    assert loaded.nbytes == saved.nbytes > 0
    for number, one in saved.layers.items():
        assert torch.equal(one.matrices, loaded.layers[number].matrices)
        assert torch.equal(one.importance, loaded.layers[number].importance)
        assert one.widths(2) == loaded.layers[number].widths(2)
    loaded.check(model)


def test_another_model_is_refused() -> None:
    model = build("llama")
    mine = calibration(model, l0=layer()[0])
    mine.check(model.to(torch.bfloat16))
    mine.check(model.to(torch.float16))
    with pytest.raises(ValueError, match="its parameters have other names or shapes"):
        mine.check(build("gpt2"))
    with pytest.raises(ValueError, match=r"its weights are others; run squat_fx.calibrate"):
        mine.check(build("llama", seed=1))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    with pytest.raises(ValueError, match=r"another model than this LlamaForCausalLM: its weights"):
        squat_fx.compile(model, calibration=mine)
    assert model._compiled_call_impl is None, "nothing was changed"


def test_files_that_are_none_are_refused_by_name(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    path = tmp_path / "calibration.safetensors"
    with pytest.raises(FileNotFoundError, match="there is no calibration file"):
        Calibration.load(path)
    calibration(build("llama"), l0=layer()[0]).save(path)
    whole = path.read_bytes()
    for length in (0, 7, 8, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(
            ValueError, match=f"^{re.escape(str(path))} is no safetensors file, or damaged: "
        ):
            Calibration.load(path)
    save_file({"x": torch.zeros(1)}, str(path))
    with pytest.raises(ValueError, match="is no calibration"):
        Calibration.load(path)
    about = {"format": "squat_fx calibration", "about": json.dumps({"version": 99})}
    save_file({"x": torch.zeros(1)}, str(path), metadata=about)
    with pytest.raises(ValueError, match="has version 99, this squat_fx reads version 1"):
        Calibration.load(path)


def test_a_codec_without_calibration_refuses_one() -> None:
    mine = calibration(build("llama"), l0=layer()[0])
    with pytest.raises(
        ValueError, match="codec 'kivi' takes no calibration; leave it out or choose squat"
    ):
        Config(codec="kivi", calibration=mine)


def test_what_is_no_calibration_is_refused(tmp_path: Path) -> None:
    text = "calibration must come from squat_fx.calibrate() or Calibration.load(), got PosixPath"
    with pytest.raises(ValueError, match=f"^{re.escape(text)}$"):
        Config(calibration=tmp_path)  # pyright: ignore[reportArgumentType]


def test_an_attention_that_it_does_not_fit_is_left_alone_with_the_reason() -> None:
    model, reason = build("llama"), "the calibration is for 3 heads of 16 channels, the keys have 2"
    wrong = calibration(model, l0=layer(16, heads=3)[0], l1=layer(16)[0])
    squat_fx.compile(model, calibration=wrong, inner="eager")
    out = model.generate(prompt(1, 20), max_new_tokens=3, return_dict_in_generate=True)
    first, second = out.past_key_values.layers
    assert type(first.keys) is type(first.values) is Tensor
    assert isinstance(second.keys, QuantizedKV)
    assert second.keys.format.latent
    assert f"left alone, layers 0: {reason}" in str(squat_fx.report(model))
    strict = squat_fx.compile(build("llama"), calibration=wrong, inner="eager", strict=True)
    with pytest.raises(Exception, match=reason):
        strict.generate(prompt(1, 20), max_new_tokens=3)


def test_keys_of_another_shape_leave_the_layer_alone() -> None:
    config = Config(calibration=calibration(build("llama"), l0=layer()[0]))
    assert config.formats(0, 2, 4, 64, 64) == (
        "the calibration is for 2 heads of 64 channels, the keys have 4 of 64; calibrate this model"
    )
    formats = config.formats(0, 2, 2, 64, 64)
    assert not isinstance(formats, str)
    assert [fmt.latent for fmt in formats] == [True, False]
    other = config.formats(1, 2, 4, 64, 64)
    assert not isinstance(other, str)
    assert not other[0].latent, "a layer that was not calibrated takes the fixed rotation"
