"""A calibration: what it gives, for which model, and how it is kept."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import squat_fx
from squat_fx import Calibration, Config, QuantizedKV
from squat_fx.calibration import Fingerprint, LayerCalibration, allocate
from squat_fx.codecs import Squat, codec_spec, make_format
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


@given(
    importance=st.lists(st.floats(1e-6, 1e3), min_size=1, max_size=16),
    bits=st.floats(0, 8),
)
def test_bits_go_where_they_count(importance: list[float], bits: float) -> None:
    total = int(bits * len(importance))
    widths = allocate(importance, total)
    assert sum(widths) == total
    assert all(0 <= width <= 8 for width in widths)
    order = sorted(range(len(importance)), key=importance.__getitem__)
    assert [widths[i] for i in order] == sorted(widths) or len(set(importance)) < len(importance)


def test_the_matrices_are_inverse_and_the_importance_falls() -> None:
    found, _, _ = layer()
    product = found.matrices[0] @ found.matrices[1]
    torch.testing.assert_close(product, torch.eye(64).expand(2, 64, 64), rtol=0, atol=1e-4)
    assert (found.importance.diff(dim=-1) < 0).all()
    assert found.widths(2)[0] > found.widths(2)[-1]
    assert sum(found.widths(2.5)) == 10


def test_it_lowers_the_error_of_the_scores() -> None:
    found, key_root, query_root = layer()
    x = (randn(1, 2, 300, 64, seed=3).double() @ key_root).float()
    query = (randn(1, 2, 50, 64, seed=4).double() @ query_root).float()
    codec, errors = Squat(strength=0), []
    for widths, basis in ((2, None), (found.widths(2), found.matrices)):
        fmt = make_format(codec, codec_spec(codec), "key", 64, widths, 0, 0, basis is not None)
        handle = QuantizedKV.from_dense(x, fmt, "key", basis=basis)
        assert fmt.packed_bits_per_element() == 2.25
        errors.append(float(((handle.dequantize() - x) @ query.mT).square().mean()))
    assert errors[1] < 0.5 * errors[0]


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
        assert one.widths(2) == loaded.layers[number].widths(2)
    loaded.check(model)


def test_another_model_is_refused() -> None:
    model = build("llama")
    mine = calibration(model, l0=layer()[0])
    mine.check(model.to(torch.bfloat16))
    mine.check(model.to(torch.float16))
    with pytest.raises(ValueError, match="its parameters have other names or shapes"):
        mine.check(build("gpt2"))
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
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="is no safetensors file, or damaged"):
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


# calibrate() ------------------------------------------------------------------------------------


def test_calibrate_finds_every_layer_and_leaves_the_model_as_it_was() -> None:
    model = build("llama").train()
    before = {name: p.clone() for name, p in model.state_dict().items()}
    found = squat_fx.calibrate(model, prompt(1, 200)[0], window=64, windows=3)
    assert found.tokens == 3 * 64
    assert sorted(found.layers) == [0, 1]
    assert model.training
    assert model._compiled_call_impl is None
    assert all(torch.equal(p, before[name]) for name, p in model.state_dict().items())


@pytest.mark.parametrize("bits", [2, 8])
def test_a_calibrated_model_generates(bits: int) -> None:
    model, ids = build("llama"), prompt(2, 90)
    with torch.no_grad():
        expected = model(ids).logits
    found = squat_fx.calibrate(model, prompt(1, 300, seed=5)[0], window=100, windows=3)
    squat_fx.compile(model, bits=bits, calibration=found, inner="eager", strict=True)
    out = model.generate(ids, max_new_tokens=20, do_sample=False, pad_token_id=0)
    assert out.shape == (2, 110)
    with torch.no_grad():
        cache = model(ids[:, :60]).past_key_values
        logits = [model(t, past_key_values=cache).logits for t in ids[:, 60:].split(1, 1)]
    assert cache.layers[0].keys.format.latent
    assert cache.layers[0].keys._storage["basis"] is found.layers[0].basis(torch.device("cpu"))
    error = (torch.cat(logits, 1) - expected[:, 60:]).abs().max() / expected.abs().max()
    assert error < (0.02 if bits == 8 else 1.0)
    assert "squat calibrated" in str(squat_fx.report(model))


def test_what_calibrate_refuses() -> None:
    model = build("llama")
    with pytest.raises(ValueError, match="give at least one text"):
        squat_fx.calibrate(model, [])
    model.config._name_or_path = model.name_or_path = ""
    with pytest.raises(ValueError, match="does not say which tokenizer is its own"):
        squat_fx.calibrate(model, "Call me Ishmael.")

    class NoCache(nn.Module):
        def forward(self, input_ids: Tensor) -> Tensor:
            return input_ids.float()

    with pytest.raises(ValueError, match="no attention over a cache was found in NoCache"):
        squat_fx.calibrate(NoCache(), prompt(1, 20)[0])
