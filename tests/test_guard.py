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
from squat_fx.codecs import Codec, Kivi, Kvarn, Lossless, Polar, Role, Squat, TurboQuant
from squat_fx.guard import ALWAYS, EVERY, EXACT, Watch, next_bits, with_raised
from squat_fx.kernels import ops
from squat_fx.kernels.judge import QUERIES, Plan
from squat_fx.kernels.softmax import probabilities
from squat_fx.report import Report
from squat_fx.state import QuantizedKV
from tests.choose import diagonal
from tests.conftest import left_padding, randn, stored_format
from tests.models import build, prompt
from tests.passes.capture import Prefill, sdpa, symbolic, tokens

HEADS, KV_HEADS, HEAD_DIM = 4, 2, 16


# what is measured -------------------------------------------------------------------------------


def pair(codec: Codec) -> tuple[Any, Any]:
    roles: tuple[Role, Role] = ("key", "value")
    return tuple(stored_format(codec, role, HEAD_DIM) for role in roles)  # pyright: ignore


def measured(
    x: tuple[Tensor, Tensor, Tensor],
    codec: Codec,
    valid: Tensor | None = None,
    mask: Tensor | None = None,
    layers: int = 1,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """What the ops say of ``layers`` that are the same, and the error from its definition."""
    query, key, value = x
    formats = pair(codec)
    options = {"sinks": None, "scale": 0.3, "causal": 1, "softcap": 0.0} | options
    made: list[Tensor] = []
    packed: list[Tensor] = []
    for fmt, tensor, role in zip(formats, (key, value), ("key", "value"), strict=True):
        store = ops.overload("store", fmt.layout)
        made += store(tensor, valid, None, None, role, fmt.codec, fmt.to_ints())
        packed.append(QuantizedKV.from_dense(tensor, fmt, role, valid).dequantize())
    numbers = [fmt.layout for fmt in formats], *(fmt.to_ints() for fmt in formats)
    chosen = torch.ops.squat_fx.judged_tokens(key, valid, *numbers)
    row, queries, keys, _ = chosen
    plan = Plan.of(*formats)
    kept = (query[row, :, queries], key[row, :, keys], value[row, :, keys[:, : plan.sampled]])
    sinks, tokens = options["sinks"], key.shape[2]
    found = torch.ops.squat_fx.attend_errors(
        *([each] * layers for each in kept), made * layers, None,
        [] if sinks is None else [sinks] * layers,
        None if mask is None else mask[row[..., None], :, queries[:, :, None], keys[:, None]],
        list(chosen), tokens, valid is not None, options["scale"], options["causal"],
        options["softcap"], *numbers, None,
    )  # fmt: skip
    longest = 0 if valid is None else int(valid.sum(1).argmax())
    first = 0 if valid is None else int(valid[longest].int().argmax())
    count = plan.packed(tokens - first, *formats)
    end = first + plan.sinks + count
    sample = torch.arange(max(end - plan.sampled, first + plan.sinks), end)
    others = [t for t in range(first, tokens) if not first + plan.sinks <= t < end]
    return found, definition(
        [t[longest : longest + 1] for t in (*x, *packed)], sample, torch.tensor(others), options,
        None if mask is None else mask[longest : longest + 1],
    )  # fmt: skip


def definition(
    tensors: list[Tensor],
    sample: Tensor,
    others: Tensor,
    options: dict[str, Any],
    mask: Tensor | None,
) -> Tensor:
    """``| share (found - true) | / | share true |`` over attention to the sample alone."""
    if not len(sample):
        return torch.zeros(())
    query, key, value, found_key, found_value = tensors
    newest = torch.arange(max(query.shape[2] - QUERIES, 0), query.shape[2])

    def probs(key: Tensor, at: Tensor, sinks: Tensor | None) -> Tensor:
        seen = torch.ones(len(newest), len(at), dtype=torch.bool)
        if options["causal"]:
            seen = at <= newest[:, None]
        if mask is not None:
            seen = seen & mask[:, :, newest][..., at]
        heads = key.repeat_interleave(HEADS // KV_HEADS, 1)
        scores = query[:, :, newest] @ heads[:, :, at].mT * options["scale"]
        return probabilities(scores, seen, sinks, options["softcap"])

    all_of_them = torch.cat([sample, others])
    share = probs(key, all_of_them, options["sinks"])[..., : len(sample)].sum(-1, keepdim=True)
    outputs = [
        probs(k, sample, None) @ v[:, :, sample].repeat_interleave(HEADS // KV_HEADS, 1)
        for k, v in ((key, value), (found_key, found_value))
    ]
    true, found = (share * out for out in outputs)
    return (found - true).norm() / true.norm()


def qkv(count: int, batch: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    query = 2 * randn(batch, HEADS, count, HEAD_DIM, seed=1)
    key, value = (randn(batch, KV_HEADS, count, HEAD_DIM, seed=seed) for seed in (2, 3))
    return query, key, value


CODECS_OF_SEVERAL_GROUPS = [Squat(), Kivi(32), TurboQuant(), Kvarn(128)]


@pytest.mark.parametrize("codec", CODECS_OF_SEVERAL_GROUPS, ids=lambda c: c.name)
@pytest.mark.parametrize(
    "options", [{}, {"causal": 0}, {"softcap": 5.0}, {"sinks": randn(HEADS, seed=4)}], ids=str
)
@pytest.mark.parametrize("tokens", [60, 200])
def test_it_is_the_relative_error_over_a_sample_of_packed_tokens(
    codec: Codec, options: dict[str, Any], tokens: int
) -> None:
    found, expected = measured(qkv(tokens), codec, **options)
    no_tile_is_full = codec.name == "kvarn" and tokens == 60
    assert 0.02 < expected < 1 or (no_tile_is_full and expected == 0)
    torch.testing.assert_close(found, expected[None], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("codec", CODECS_OF_SEVERAL_GROUPS, ids=lambda c: c.name)
def test_layers_that_are_alike_are_judged_together(codec: Codec) -> None:
    alone, _ = measured(qkv(200), codec)
    together, _ = measured(qkv(200), codec, layers=3)
    torch.testing.assert_close(together, alone.expand(3))


@pytest.mark.parametrize("codec", CODECS_OF_SEVERAL_GROUPS, ids=lambda c: c.name)
@pytest.mark.parametrize("pads", [[0, 20], [30, 0], [11, 11], [200, 7]], ids=str)
def test_with_padding_the_row_with_the_most_tokens_is_judged(codec: Codec, pads: list[int]) -> None:
    valid = left_padding(pads, 200)
    mask = valid[:, None, None] & torch.ones(200, 200, dtype=torch.bool).tril()
    x = qkv(200)
    found, expected = measured(x, codec, valid, mask=mask, causal=0)
    torch.testing.assert_close(found, expected[None], rtol=1e-3, atol=1e-5)


def test_what_is_no_number_in_padding_does_not_matter() -> None:
    valid = left_padding([3, 20], 60)
    mask = valid[:, None, None] & torch.ones(60, 60, dtype=torch.bool).tril()
    x = qkv(60)
    expected = measured(x, Squat(), valid, mask=mask, causal=0)[0]
    for tensor in x:
        tensor.masked_fill_(~valid[:, None, :, None], torch.nan)
    assert torch.equal(measured(x, Squat(), valid, mask=mask, causal=0)[0], expected)


def test_tokens_that_are_still_exact_do_not_hide_what_happens_to_others() -> None:
    """Half of a prompt of 20 tokens is exact, and its error that of a long one."""
    (short, _), (long, _) = (measured(qkv(count), Squat()) for count in (20, 300))
    assert 0.7 < short / long < 1.4


@pytest.mark.parametrize("count", [1, 9, 10])
def test_a_prompt_that_stays_exact_has_no_error(count: int) -> None:
    assert measured(qkv(count), Kivi(32))[0] == 0


def test_a_lossless_codec_has_next_to_none() -> None:
    assert measured(qkv(90), Lossless(4))[0] < 1e-5


# whom it warns ----------------------------------------------------------------------------------


def compiled(family: str, **options: Any) -> Any:
    torch._dynamo.reset()
    return squat_fx.compile(build(family), inner="eager", **options)


def prefill(model: Any, count: int = 300, batch: int = 1) -> Any:
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
    assert min(report.attention_errors.values()) > 0.65
    worst = max(report.attention_errors.values())
    assert said == (
        f"what attention finds in packed tokens changes by up to {worst:.0%} in layers 0-1 "
        "(kivi; guard_threshold is 65%); more bits help: layer_bits={0: 4, 1: 4}, "
        "or guard='raise_bits'"
    )
    assert report.notes == [said]
    numbers = ", ".join(f"{report.attention_errors[layer]:.2f}" for layer in (0, 1))
    assert f"error of attention over packed tokens, layers 0-1: {numbers}\n" in str(report)


def largest_errors(model: Any, counts: tuple[int, ...]) -> list[float]:
    """That of the layer that loses most, for prompts of so many tokens."""
    errors, found = squat_fx.report(model).attention_errors, []
    for count in counts:
        errors.clear()
        prefill(model, count)
        assert sorted(errors) == [0, 1]
        found.append(max(errors.values()))
    return found


@pytest.mark.parametrize(("codec", "shortest"), [("kivi", 80), ("squat", 60)])
def test_large_key_biases_are_noticed_in_short_prompts_too(codec: str, shortest: int) -> None:
    """As soon as anything worth the name is packed: ``kivi`` packs 32 tokens at once."""
    errors = largest_errors(compiled("qwen2", codec=codec), (shortest, 100, 150, 600))
    assert min(errors) > 1.08 * Config.guard_threshold


@pytest.mark.parametrize(
    ("family", "codec"), diagonal(["llama", "gpt2", "opt"], ["squat", "kivi", "turboquant"])
)
def test_healthy_keys_are_not_warned_of(family: str, codec: str) -> None:
    model = compiled(family, codec=codec)
    errors = largest_errors(model, (80, 100, 150, 600))
    assert min(errors) > 0.2
    assert max(errors) < 0.75 * Config.guard_threshold
    assert not squat_fx.report(model).notes


def test_first_prompts_are_judged_and_then_one_of_several() -> None:
    """Unless the bits of the prompt itself depend on it."""
    for guard, expected in (("warn", [n < ALWAYS or n % EVERY == 0 for n in range(40)]),
                            ("raise_bits", [True] * 40)):  # fmt: skip
        model = squat_fx.compile(Prefill(sdpa), residual_length=4, inner="eager", guard=guard)
        errors, judged = squat_fx.report(model).attention_errors, []
        with torch.no_grad():
            for _ in range(40):
                errors[0] = 0.0
                model(tokens(60))
                judged.append(errors[0] > 0.01)
        assert judged == expected


def test_an_inner_compiler_takes_what_says_whether_to_judge() -> None:
    torch._dynamo.reset()
    model = squat_fx.compile(build("llama"), inner="aot_eager", strict=True)
    for count in (80, 100):
        prefill(model, count)
    assert sorted(squat_fx.report(model).attention_errors) == [0, 1]


def test_it_can_be_left_out() -> None:
    model = compiled("qwen2", codec="kivi", guard="off")
    out = prefill(model)
    report = squat_fx.report(model)
    assert bits_of(out) == [2, 2]
    assert not report.attention_errors
    assert not report.notes
    assert "attend_errors" not in report.graphs[0].text
    torch.testing.assert_close(out.logits, prefill(compiled("qwen2", codec="kivi")).logits)


# more bits --------------------------------------------------------------------------------------


def test_layers_that_lose_too_much_get_more_bits_and_keep_them() -> None:
    model = compiled("qwen2", codec="kivi", guard="raise_bits")
    expected = compiled("qwen2", codec="kivi", layer_bits={0: 4, 1: 4})
    for length in (300, 230):
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
    assert note.endswith("in layers 0-1 (kivi; guard_threshold is 65%); "
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


# on a GPU ---------------------------------------------------------------------------------------


on_a_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.mark.gpu
@on_a_gpu
@pytest.mark.parametrize("codec", CODECS_OF_SEVERAL_GROUPS, ids=lambda c: c.name)
@pytest.mark.parametrize("pads", [None, [30, 5]], ids=str)
def test_a_gpu_finds_the_same_errors(codec: Codec, pads: list[int] | None) -> None:
    """The stores themselves are rounded by kernels, a code may differ here and there."""
    x, valid, mask = qkv(200), None, None
    if pads is not None:
        valid = left_padding(pads, 200)
        mask = valid[:, None, None] & torch.ones(200, 200, dtype=torch.bool).tril()
    causal = int(mask is None)
    _, expected = measured(x, codec, valid, mask=mask, causal=causal)
    there: Any = [None if t is None else t.cuda() for t in (*x, valid, mask)]
    with torch.device("cuda"):
        found, by_definition = measured(there[:3], codec, there[3], mask=there[4], causal=causal)
    torch.testing.assert_close(found, by_definition[None], rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(found.cpu(), expected[None], rtol=0.05, atol=0.01)


@pytest.mark.gpu
@on_a_gpu
@pytest.mark.parametrize("inner", ["eager", "inductor"])
def test_errors_come_from_a_gpu_by_themselves(inner: Any) -> None:
    """While steps are replayed as CUDA graphs; two prompts in a row lose none."""
    torch._dynamo.reset()
    model = squat_fx.compile(
        build("qwen2").to("cuda"), inner=inner, codec="kivi", cuda_graphs=True, strict=True
    )
    for length in (90, 140):
        model.generate(prompt(2, length).cuda(), max_new_tokens=6, do_sample=False)
    report = squat_fx.report(model)
    assert report.replays > 0
    assert sorted(report.attention_errors) == [0, 1]
    assert max(report.attention_errors.values()) > Config.guard_threshold
    assert any("more bits help" in note for note in report.notes)


@pytest.mark.gpu
@on_a_gpu
def test_a_gpu_raises_bits_before_anything_is_committed() -> None:
    torch._dynamo.reset()
    model = squat_fx.compile(
        build("qwen2").to("cuda"), inner="eager", codec="kivi", guard="raise_bits"
    )
    with torch.no_grad():
        out = model(prompt(1, 300).cuda(), use_cache=True)
    assert max(bits_of(out)) == 4
    assert set(squat_fx.report(model).raised.values()) == {4}


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
