"""One pass over all tokens sees what decoding through the packed cache sees."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from simulation import OfConfig, PlainKivi, Rounding, Simulation, Site
from torch import Tensor
from transformers import DynamicCache, Gemma3ForCausalLM, Gemma3TextConfig
from variants import Statistics, Variant

import squat_fx
from squat_fx.codecs import Kivi, Lossless, Pruned, Squat, Svdq, TurboQuant
from tests.choose import full
from tests.models import VOCABULARY, build, prompt

PROMPT, TOKENS = 72, 48
WITHOUT_MEAN = ("polar", "turboquant", "qjl")  # a token's error grows with all of its channels


def make(family: str) -> Any:
    """A tiny model; Gemma 3 has a layer with a sliding window."""
    if family == "llama":
        return build(family)
    torch.manual_seed(0)
    config = Gemma3TextConfig(
        vocab_size=VOCABULARY, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=1, head_dim=32, query_pre_attn_scalar=2,
        sliding_window=24, layer_types=["sliding_attention", "full_attention"],
    )  # fmt: skip
    return Gemma3ForCausalLM(config).eval()


def simulated(model: Any, rounding: Rounding | None) -> Tensor:
    with torch.no_grad(), Simulation(rounding, PROMPT).of(model):
        ids = prompt(2, PROMPT + TOKENS)
        return model(ids, use_cache=False, logits_to_keep=TOKENS).logits


def decoded(model: Any) -> Tensor:
    ids, found = prompt(2, PROMPT + TOKENS), []
    with torch.no_grad():
        cache = DynamicCache(config=model.config)
        model(ids[:, :PROMPT], past_key_values=cache, use_cache=True)
        for token in ids[:, PROMPT:].split(1, dim=1):
            found.append(model(token, past_key_values=cache).logits)
    return torch.cat(found, 1)


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("llama", {}),
        ("llama", {"codec": Kivi(32)}),
        ("llama", {"codec": Svdq()}),
        ("gemma3", {"residual_length": 8}),
        *full(("llama", {"codec": Pruned(16), "guard": "off"})),
        ("llama", {"codec": Pruned(16, Lossless(4)), "guard": "off"}),
        ("gemma3", {"residual_length": 8, "codec": Pruned(16, TurboQuant()), "guard": "off"}),
    ],
)
def test_a_pass_sees_what_decoding_sees(family: str, options: dict[str, Any]) -> None:
    rounding = OfConfig(squat_fx.Config(**options))
    expected = decoded(squat_fx.compile(make(family), inner="eager", **options))
    found = simulated(make(family), rounding)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert (found - simulated(make(family), None)).abs().max() > 1e-2


def test_kivi_written_apart_is_kivi() -> None:
    model = build("llama")
    found = simulated(model, PlainKivi(bits=2, group_size=32))
    expected = simulated(model, OfConfig(squat_fx.Config(codec=Kivi(32))))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("variant", "options"),
    [
        (Variant(), {}),
        (Variant(key_bits=4, value_bits=3), {"key_bits": 4, "value_bits": 3}),
        (Variant(strength=3.0, smooth=0), {"codec": Squat(strength=3.0, smooth=False)}),
        (Variant(strength=0, center=False), {"codec": Squat(strength=0, center=False)}),
    ],
)
def test_a_variant_with_nothing_changed_is_squat(variant: Variant, options: dict[str, Any]) -> None:
    model = build("llama")
    found = simulated(model, variant)
    expected = simulated(model, OfConfig(squat_fx.Config(**options)))
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-2)  # an ulp of fp16 scales


def test_every_calibrated_variant_runs_and_the_plain_one_is_squat() -> None:
    model = build("llama")
    statistics = Statistics()
    simulated(model, statistics)
    calibration = statistics.calibration()
    fingerprint = squat_fx.calibrate(build("llama"), prompt(1, 20)).fingerprint
    config = squat_fx.Config(calibration=squat_fx.Calibration(calibration, fingerprint, 1))
    expected = simulated(model, OfConfig(config))
    torch.testing.assert_close(
        simulated(model, Variant(calibration=calibration)), expected, rtol=1e-4, atol=1e-4
    )
    for weight, joint, inner in ((0.0, False, True), (1.0, True, False)):
        other = Variant(calibration=statistics.calibration(weight, joint, inner), norm="search")
        assert (simulated(model, other) - expected).abs().max() > 1e-3


def test_different_widths_are_mended_as_in_the_codec() -> None:
    """In a rotated frame all channels count alike, in a calibrated one by what widths leave."""
    model, widths = make("gemma3"), {"key_bits": 1.5, "value_bits": 2.5}
    statistics = Statistics()
    simulated(model, statistics)
    bases = statistics.calibration()
    assert {basis.widths(1.5) for basis in bases.values()} == {(1, 2)}
    fingerprint = squat_fx.calibrate(build("llama"), prompt(1, 20)).fingerprint
    calibration = squat_fx.Calibration(bases, fingerprint, 1)
    for of_variant, of_codec in (({}, {}), ({"calibration": bases}, {"calibration": calibration})):
        expected = simulated(model, OfConfig(squat_fx.Config(**widths, **of_codec)))
        found = simulated(model, Variant(**widths, **of_variant))
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-2)
        other = simulated(model, Variant(**widths, **of_variant, mend_mixed=""))
        assert (other - expected).abs().max() > 2e-2


class NothingIsLeft(Rounding):
    """Packed keys are their mean, packed values zero: what a collapsed cache would say."""

    residual, sinks = 32, 4

    def groups(self, site: Site, key: Tensor) -> tuple[int, int]:
        return 1, 1

    def __call__(
        self, site: Site, query: Tensor, key: Tensor, value: Tensor
    ) -> tuple[Tensor, Tensor]:
        mean = key[:, :, site.sinks : site.prompt].mean(2, keepdim=True)
        return mean.expand_as(key), torch.zeros_like(value)


def test_large_biases_of_keys_let_no_codec_collapse() -> None:
    model = build("qwen2")  # biases of keys with a standard deviation of 20
    full = simulated(model, None).double().log_softmax(-1)

    def divergence(rounding: Rounding) -> float:
        found = simulated(model, rounding).double().log_softmax(-1)
        return (full.exp() * (full - found)).sum(-1).mean().item()

    collapsed = divergence(NothingIsLeft())
    for name in squat_fx.list_codecs():
        widths = [3.875] if name == "polar" else [2, 4]
        found = [divergence(OfConfig(squat_fx.Config(codec=name, bits=w))) for w in widths]
        assert max(found) < collapsed, name
        assert found == sorted(found, reverse=True), name
        assert found[-1] < collapsed * (0.75 if name in WITHOUT_MEAN else 0.5), name
