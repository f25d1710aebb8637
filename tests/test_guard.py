"""The quality guard: what it measures, whom it warns, and what more bits are given to."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

import squat_fx
from squat_fx import Config
from squat_fx.codecs import Codec, Kivi, Lossless, Polar, Role, Squat, TurboQuant
from squat_fx.guard import EXACT, Watch, next_bits, with_raised
from squat_fx.kernels import ops, reference
from squat_fx.report import Report
from squat_fx.state import QuantizedKV
from tests.choose import every
from tests.conftest import left_padding, randn, stored_format
from tests.models import build, prompt
from tests.passes.capture import Prefill, sdpa, symbolic, tokens

HEADS, KV_HEADS, HEAD_DIM = 4, 2, 16


# what is measured -------------------------------------------------------------------------------


def pair(codec: Codec) -> tuple[Any, Any]:
    roles: tuple[Role, Role] = ("key", "value")
    return tuple(stored_format(codec, role, HEAD_DIM) for role in roles)  # pyright: ignore


def measured(
    x: tuple[Tensor, Tensor, Tensor], codec: Codec, valid: Tensor | None = None, **options: Any
) -> tuple[Tensor, Tensor]:
    """What the op says, and the same from its definition."""
    query, key, value = x
    formats = pair(codec)
    options = {"mask": None, "sinks": None, "scale": 0.3, "causal": 1, "softcap": 0.0} | options
    true = reference.attention(query, key, value, **options)
    made: list[Tensor] = []
    packed = []
    for fmt, tensor, role in zip(formats, (key, value), ("key", "value"), strict=True):
        store = ops.overload("store", fmt.layout)
        made += store(tensor, valid, None, None, role, fmt.codec, fmt.to_ints())
        packed.append(QuantizedKV.from_dense(tensor, fmt, role, valid).dequantize())
    found = ops.overload("attend_error", *(fmt.layout for fmt in formats))(
        query, true, *made, None, *options.values(), *(fmt.to_ints() for fmt in formats)
    )
    newest = slice(-reference.NEWEST_QUERIES, None)
    if options["mask"] is not None:
        options["mask"] = options["mask"][:, :, newest]
    options["causal"] = reference.BOTTOM_RIGHT if options["causal"] else 0
    attended = reference.attention(query[:, :, newest], *packed, **options)
    true = true[:, :, newest]
    return found, (attended - true).norm() / true.norm()


def qkv(count: int, batch: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    query = 2 * randn(batch, HEADS, count, HEAD_DIM, seed=1)
    key, value = (randn(batch, KV_HEADS, count, HEAD_DIM, seed=seed) for seed in (2, 3))
    return query, key, value


@pytest.mark.parametrize("codec", [Squat(), Kivi(32), TurboQuant()], ids=lambda c: c.name)
@pytest.mark.parametrize(
    "options", [{}, {"causal": 0}, {"softcap": 5.0}, {"sinks": randn(HEADS, seed=4)}], ids=str
)
def test_it_is_the_relative_error_of_the_newest_queries(
    codec: Codec, options: dict[str, Any]
) -> None:
    found, expected = measured(qkv(90), codec, **options)
    assert 0.02 < expected < 1
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5)


def test_padding_changes_nothing() -> None:
    valid = left_padding([0, 20], 90)
    mask = valid[:, None, None] & torch.ones(90, 90, dtype=torch.bool).tril()
    x = qkv(90)
    found, expected = measured(x, Kivi(32), valid, mask=mask, causal=0)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("count", [1, 9, 10])
def test_a_prompt_that_stays_exact_has_no_error(count: int) -> None:
    assert measured(qkv(count), Kivi(32))[0] == 0


def test_a_lossless_codec_has_next_to_none() -> None:
    assert measured(qkv(90), Lossless(4))[0] < 1e-5


# whom it warns ----------------------------------------------------------------------------------


def compiled(family: str, **options: Any) -> Any:
    torch._dynamo.reset()
    return squat_fx.compile(build(family), inner="eager", **options)


def prefill(model: Any, count: int = 200, batch: int = 1) -> Any:
    with torch.no_grad():
        return model(prompt(batch, count), use_cache=True)


def bits_of(out: Any) -> list[float]:
    return [layer.keys.format.bits for layer in out.past_key_values.layers]


def test_large_key_biases_are_noticed_once(caplog: pytest.LogCaptureFixture) -> None:
    """The keys of Qwen2.5, on which caches of few bits collapse."""
    model = compiled("qwen2", codec="kivi")
    with caplog.at_level(logging.WARNING, "squat_fx"):
        for _ in range(2):
            prefill(model)
    report = squat_fx.report(model)
    (said,) = [r.getMessage() for r in caplog.records if r.name == "squat_fx.guard"]
    assert min(report.attention_errors.values()) > 0.6
    worst = max(report.attention_errors.values())
    assert said == (
        f"the packed cache changes attention's output by up to {worst:.0%} in layers 0-1 "
        "(kivi; guard_threshold is 60%); more bits help: layer_bits={0: 4, 1: 4}, "
        "or guard='raise_bits'"
    )
    assert report.notes == [said]
    numbers = ", ".join(f"{report.attention_errors[layer]:.2f}" for layer in (0, 1))
    assert f"error of attention's output after a prompt, layers 0-1: {numbers}\n" in str(report)


@pytest.mark.parametrize("family", every(2, ["llama", "gpt2", "opt"]))
def test_healthy_keys_are_not_warned_of(family: str) -> None:
    model = compiled(family)
    for count in (60, 300):
        prefill(model, count, batch=2)
    report = squat_fx.report(model)
    assert sorted(report.attention_errors) == [0, 1]
    assert 0.01 < max(report.attention_errors.values()) < 0.45
    assert not report.notes


def test_it_can_be_left_out() -> None:
    model = compiled("qwen2", codec="kivi", guard="off")
    out = prefill(model)
    report = squat_fx.report(model)
    assert bits_of(out) == [2, 2]
    assert not report.attention_errors
    assert not report.notes
    assert "attend_error" not in report.graphs[0].text
    torch.testing.assert_close(out.logits, prefill(compiled("qwen2", codec="kivi")).logits)


# more bits --------------------------------------------------------------------------------------


def test_layers_that_lose_too_much_get_more_bits_and_keep_them() -> None:
    model = compiled("qwen2", codec="kivi", guard="raise_bits")
    expected = compiled("qwen2", codec="kivi", layer_bits={0: 4, 1: 4})
    for length in (200, 230):
        out, wanted = (
            m.generate(prompt(1, length), max_new_tokens=8, do_sample=False,
                       return_dict_in_generate=True)
            for m in (model, expected)
        )  # fmt: skip
        assert bits_of(out) == [4, 4]
        assert torch.equal(out.sequences, wanted.sequences)
    report = squat_fx.report(model)
    assert report.raised == {0: 4, 1: 4}
    assert report.attention_errors == squat_fx.report(expected).attention_errors
    assert max(report.attention_errors.values()) < 0.3
    (note,) = report.notes
    assert note.endswith("in layers 0-1 (kivi; guard_threshold is 60%); "
                         "stored with 4 bits from now on")  # fmt: skip
    kinds = [(graph.kind, graph.sites[0].key.fmt.bits) for graph in report.graphs]
    assert kinds == [("prefill", 2), ("prefill", 4), ("decode", 4), ("prefill", 4)]


def test_bits_rise_until_the_error_is_small_enough_or_there_is_none() -> None:
    model = compiled("llama", guard="raise_bits", guard_threshold=1e-3)
    out = prefill(model)
    assert squat_fx.report(model).raised == {0: EXACT, 1: EXACT}
    assert not squat_fx.report(model).attention_errors
    keys = [layer.keys for layer in out.past_key_values.layers]
    assert [key.format.layout for key in keys] == ["dense", "dense"]
    exact = prefill(build("llama")).past_key_values.layers
    for key, layer in zip(keys, exact, strict=True):
        torch.testing.assert_close(key.dequantize(), layer.keys)


def test_a_higher_threshold_raises_no_more() -> None:
    raised = []
    for threshold in (0.05, 0.2, 0.5):
        model = compiled("llama", guard="raise_bits", guard_threshold=threshold)
        prefill(model)
        report = squat_fx.report(model)
        assert max(report.attention_errors.values(), default=0.0) <= threshold
        raised.append([report.raised.get(layer, 2) for layer in (0, 1)])
    for layer in (0, 1):
        bits = [each[layer] for each in raised]
        assert bits == sorted(bits, reverse=True)
    assert raised[-1] == [2, 2]
    assert raised[0][0] > 2


class Counting(Prefill):
    """Writes to a buffer of its own in every call."""

    def __init__(self) -> None:
        super().__init__(sdpa)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Any, mask: Any = None) -> Any:
        self.calls.add_(1)
        return super().forward(x, mask)


def widths_of_three_prompts(model: Any) -> list[float]:
    with torch.no_grad():
        return [model(tokens(60))[1].format.bits for _ in range(3)]


def test_a_call_that_changes_its_inputs_is_not_repeated() -> None:
    options: dict[str, Any] = {"guard_threshold": 0.03, "residual_length": 4, "inner": "eager"}
    model = squat_fx.compile(Counting(), guard="raise_bits", **options)
    assert widths_of_three_prompts(model) == [2, 4, 8]
    assert model.calls == 3
    first, second = squat_fx.report(model).notes
    assert first.endswith("stored with 4 bits from the next prompt on")
    assert second.endswith("stored with 8 bits from the next prompt on")
    beside = squat_fx.compile(Prefill(sdpa), guard="raise_bits", **options)
    assert widths_of_three_prompts(beside) == [8, 8, 8]


def test_bare_graphs_are_only_warned_of() -> None:
    module = Prefill(sdpa)
    with pytest.raises(ValueError, match=r"^guard='raise_bits' stores a prompt again"):
        squat_fx.rewrite(symbolic(module), (tokens(60),), Config(guard="raise_bits"))
    config = Config(guard_threshold=1e-3, residual_length=4)
    rewritten, report = squat_fx.rewrite(symbolic(module), (tokens(60),), config)
    with torch.no_grad():
        rewritten(tokens(60))
    assert report.attention_errors[0] > 0.05
    assert "in layers 0 (squat; " in report.notes[0]


@pytest.mark.parametrize(
    ("config", "ladder"),
    [
        (Config(), [4, 8, EXACT]),
        (Config(bits=4.5), [8, EXACT]),
        (Config(key_bits=3), [4, 8, EXACT]),
        (Config(codec=TurboQuant()), [4, EXACT]),
        (Config(codec=Polar(), bits=3.875), [EXACT]),
        (Config(layer_bits={0: (2, 8)}), [EXACT]),
    ],
    ids=lambda x: str(getattr(x, "codec", "")),
)
def test_the_next_bits_are_some_that_the_codec_has(config: Config, ladder: list[float]) -> None:
    found: dict[int, float] = {}
    for expected in ladder:
        found[0] = next_bits(with_raised(config, found), 0)
        assert found[0] == expected
    formats = with_raised(config, found).formats(0, 2, 2, 64, 64)
    assert [fmt.layout for fmt in formats] == ["dense"] * 2  # pyright: ignore


# the numbers of a GPU ---------------------------------------------------------------------------


@dataclass
class Event:
    """Of a copy that is there once somebody waits."""

    there: bool = False
    waits: list[None] = field(default_factory=list)

    def query(self) -> bool:
        return self.there

    def synchronize(self) -> None:
        self.there = True
        self.waits.append(None)


def test_nobody_waits_for_numbers_before_they_are_asked_for() -> None:
    report, taken, event = Report(), [], Event()
    report.arriving = event, lambda: taken.append(1)
    report.read_arrived()
    assert not taken
    assert report.attention_errors == {}  # asks
    assert (taken, len(event.waits), report.arriving) == ([1], 1, None)
    report.arriving = Event(there=True), lambda: taken.append(2)
    report.read_arrived()
    assert taken == [1, 2]


def test_what_is_no_number_is_too_far() -> None:
    report = Report()
    Watch((0, 3), Config(), report, True)(torch.tensor([0.2, float("nan")]))
    assert "by up to nan% in layers 3 (squat; " in report.notes[0]
