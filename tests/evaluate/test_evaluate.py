"""The comparison measures what it says: scores against a plain forward pass, bits against bytes."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import DynamicCache, PreTrainedTokenizerFast
from typer.testing import CliRunner

import squat_fx
from squat_fx.cli import app
from squat_fx.codecs import Lossless, Pruned
from squat_fx.demo import silent
from squat_fx.evaluate import attention, report, settings
from squat_fx.evaluate.measure import Evaluation, Row, Scores, hold
from squat_fx.evaluate.texts import Windows, spread
from tests.conftest import randn
from tests.models import VOCABULARY, build

PROMPT, TOKENS = 40, 12
NO_TOKENS = torch.tensor([], dtype=torch.int64)


def tokens_of(count: int, seed: int = 0) -> Tensor:
    return torch.randint(3, VOCABULARY, (count,), generator=torch.Generator().manual_seed(seed))


def two_texts() -> Windows:
    texts = {"a.txt": tokens_of(400), "b.txt": tokens_of(300, seed=1)}
    return Windows.cut(texts, NO_TOKENS, 2, PROMPT, TOKENS)


def run(family: str, *chosen: settings.Setting, batch: int = 3) -> list[Row]:
    evaluation = Evaluation(lambda: build(family), [two_texts()], batch)
    return [evaluation.run(s, lambda _: None) for s in (settings.full(), *chosen)]


# texts ------------------------------------------------------------------------------------------


def test_windows_begin_with_what_the_tokenizer_puts_first_and_lie_apart() -> None:
    ids = torch.arange(100)
    windows = Windows.cut({"x": ids}, torch.tensor([999]), 3, prompt=10, tokens=5)
    assert windows.ids.tolist() == [[999, *range(i, i + 15)] for i in (0, 33, 66)]
    assert windows.texts == ("x",) * 3


def test_a_text_that_is_too_short_is_refused() -> None:
    message = "3 windows of 40 tokens need 120 tokens, x has 100; ask for fewer or shorter ones"
    with pytest.raises(ValueError, match=f"^{message}$"):
        spread(torch.arange(100), 3, 40, "x")


def test_a_drifting_window_goes_on_with_the_next_text() -> None:
    texts = {"a": torch.arange(100), "b": torch.arange(100, 200), "c": torch.arange(200, 300)}
    drifting = Windows.cut(texts, NO_TOKENS, 2, prompt=3, tokens=1).drifting()
    assert drifting.texts == tuple(f"{x} then {y}" for x, y in ("ab", "bc", "ca") for _ in range(2))
    assert drifting.ids[0].tolist() == [0, 1, 2, 103, 104]
    assert drifting.ids[5].tolist() == [250, 251, 252, 53, 54]
    with pytest.raises(ValueError, match="of different texts need two texts"):
        Windows.cut({"a": torch.arange(100)}, NO_TOKENS, 2, prompt=3, tokens=1).drifting()


# settings ---------------------------------------------------------------------------------------


def test_codecs_and_widths_are_combined() -> None:
    found = settings.ours(["squat", 'kivi {"group_size": 64}', "none"], ["2", "3/2"])
    assert [setting.name for setting in found] == [
        "squat, 2 bits", "squat, 3/2 bits", 'kivi {"group_size": 64}, 2 bits',
        'kivi {"group_size": 64}, 3/2 bits', "none",
    ]  # fmt: skip


def test_a_codec_may_have_widths_of_its_own() -> None:
    found = settings.ours(["kivi", "polar at 3.875"], ["2", "3"])
    assert [s.name for s in found] == ["kivi, 2 bits", "kivi, 3 bits", "polar, 3.875 bits"]


def test_what_can_be_calibrated_is_measured_both_ways() -> None:
    found = settings.ours(["squat", "kivi"], ["2"], tokens_of(20))
    assert [s.name for s in found] == ["squat, 2 bits", "squat, 2 bits, calibrated", "kivi, 2 bits"]


@pytest.mark.parametrize(
    ("codec", "bits", "message"),
    [
        ("squid", "2", "did you mean 'squat'?"),
        ('kivi {"size": 3}', "2", "its fields are: group_size"),
        ("kivi 32", "2", None),
        ("kivi {32", "2", "come its fields as json"),
        ("squat", "two", "bits are a number, or keys/values as 3/2; got 'two'"),
        ("squat", "1/2/3", "bits are a number, or keys/values as 3/2; got '1/2/3'"),
        ("kivi", "2.5", "codec 'kivi' takes whole bits, got 2.5; the nearest are 2 and 3"),
    ],
)
def test_what_there_is_not_is_refused(codec: str, bits: str, message: str | None) -> None:
    with pytest.raises(ValueError, match=None if message is None else re.escape(message)):
        settings.ours([codec], [bits])


# scores -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_scores_are_those_of_a_plain_forward_pass(family: str) -> None:
    (full,) = run(family)
    model, ids = build(family), two_texts().ids
    with torch.no_grad():
        logits = model(ids[:, :-1], use_cache=False).logits[:, PROMPT:]
    expected = F.cross_entropy(
        logits.transpose(1, 2).double(), ids[:, PROMPT + 1 :], reduction="none"
    )
    (scores,) = full.scores
    torch.testing.assert_close(scores.nll, expected, rtol=1e-4, atol=1e-4)
    assert scores.kl.abs().max() == 0
    assert scores.top1.min() == 1
    assert not full.layers


def test_divergence_is_that_of_the_two_predictions() -> None:
    full, small = run("llama", *settings.ours(["squat"], ["2"], inner="eager", residual_length=8))
    windows = two_texts()
    models: list[Any] = [build("llama"), squat_fx.compile(build("llama"), inner="eager",
                                                          residual_length=8)]  # fmt: skip
    found = []
    with torch.no_grad():
        for model in models:
            cache, logits = DynamicCache(config=model.config), []
            model(windows.ids[:3, :PROMPT], past_key_values=cache, use_cache=True)
            for token in windows.ids[:3, PROMPT:-1].split(1, dim=1):
                logits.append(model(token, past_key_values=cache).logits[:, -1])
            found.append(torch.stack(logits, 1).double().log_softmax(-1))
    expected = F.kl_div(found[1], found[0], log_target=True, reduction="none").sum(-1)
    (scores,) = small.scores
    torch.testing.assert_close(scores.kl[:3], expected, rtol=1e-4, atol=1e-7)
    assert scores.mean_kl > 1e-5
    assert torch.equal(scores.top1[:3], (found[0].argmax(-1) == found[1].argmax(-1)).double())
    assert scores.nll.shape == full.scores[0].nll.shape == (4, TOKENS)


def test_batches_do_not_change_scores() -> None:
    chosen = settings.ours(["squat"], ["2"], inner="eager", residual_length=8)
    for one, all_of_them in zip(run("llama", *chosen, batch=1), run("llama", *chosen, batch=4),
                                strict=True):  # fmt: skip
        found, expected = one.scores[0], all_of_them.scores[0]
        torch.testing.assert_close(found.nll, expected.nll, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(found.kl, expected.kl, rtol=1e-2, atol=1e-5)


def test_every_length_of_prompt_has_scores_of_its_own() -> None:
    texts = {"a.txt": tokens_of(400)}
    sets = [Windows.cut(texts, NO_TOKENS, 2, length, TOKENS) for length in (PROMPT, 70)]
    found = []
    for chosen in (sets, sets[1:]):
        evaluation = Evaluation(lambda: build("llama"), chosen, 2)
        evaluation.run(settings.full(), lambda _: None)
        (setting,) = settings.ours(["squat"], ["2"], inner="eager", residual_length=8)
        found.append(evaluation.run(setting, lambda _: None).record(chosen)["texts"])
    assert list(found[0]) == [f"a.txt, prompt {PROMPT}", "a.txt, prompt 70"]
    assert found[0]["a.txt, prompt 70"]["kl"] == pytest.approx(found[1]["a.txt, prompt 70"]["kl"])


def test_a_hundredth_of_tokens_is_above_the_percentile() -> None:
    kl = torch.arange(1000, dtype=torch.float64).reshape(4, 250)
    scores = Scores(kl, kl, kl)[range(4)]
    assert (kl > scores.kl_p99).sum() == 10
    assert scores.mean_kl == 499.5


# attention --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("softcap", "with_sinks"), [(0.0, False), (5.0, False), (0.0, True)])
def test_attention_of_the_newest_tokens(softcap: float, with_sinks: bool) -> None:
    query, key, value = randn(4, 3, 16, seed=1), randn(2, 20, 16, seed=2), randn(2, 20, 16, seed=3)
    sinks = randn(4, seed=4) if with_sinks else None
    found = attention.attend(query, key, value, 0.3, softcap, sinks)
    for head in range(4):
        for i in range(3):
            seen = 18 + i
            scores = key[head // 2, :seen] @ query[head, i] * 0.3
            if softcap:
                scores = softcap * torch.tanh(scores / softcap)
            weights = scores.exp()
            total = weights.sum() + (sinks[head].exp() if sinks is not None else 0)
            expected = weights @ value[head // 2, :seen] / total
            torch.testing.assert_close(found[head, i], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("family", "layers"), [("llama", [0, 1]), ("gemma2", [1])])
def test_errors_are_those_of_layers_that_are_packed(family: str, layers: list[int]) -> None:
    chosen = settings.ours(["none", "squat"], ["2", "4"], inner="eager", residual_length=8)
    _, exact, two, four = run(family, *chosen)
    for row in (exact, two, four):
        assert sorted(row.layers) == layers
    assert max(exact.layers.values()) < 1e-4
    for layer in layers:
        assert exact.layers[layer] < four.layers[layer] < two.layers[layer]


# bytes ------------------------------------------------------------------------------------------


def test_bits_are_bytes_that_are_held() -> None:
    _, none, two = run("llama", *settings.ours(["none", "squat"], ["2"], inner="eager"))
    assert two.held.packed_bits == 2 + 16 / 16  # a scale a token of 16 channels
    for row in (none, two):
        elements = row.held.dense / 4
        assert row.held.all_bits == pytest.approx(8 * row.held.stored / elements)
    assert none.held.packed_bits == 16
    exact = 32 + 4  # of 52 tokens
    learned = 2 * 16 / 52 / 2  # means and factors, of keys only
    assert two.held.effective_bits == pytest.approx((3 * 16 + 16 * exact) / 52 + learned)
    assert none.held.effective_bits == 16


def test_what_a_prompt_lost_takes_no_bits_and_counts_as_an_error() -> None:
    part = Pruned(8, Lossless(1), window=8)
    options = {"inner": "eager", "residual_length": 8, "guard": "off"}
    _, some, whole = run(
        "llama",
        settings.packed("part", codec=part, **options),
        settings.packed("whole", codec=Lossless(1), **options),
    )
    packed, exact = 40 - 12 + 12 - 20, 12  # of 52 tokens; 28 of the prompt were packed, 8 are kept
    moved = (1 + 8 + 1) * 32 / 16 / 2  # of keys and of values, a number each for heads of 16
    assert some.held.effective_bits == pytest.approx((16 * (packed + exact) + moved) / 52)
    assert whole.held.effective_bits == 16
    for layer, error in some.layers.items():
        assert error > 0.05 > whole.layers[layer]
    assert some.scores[0].mean_kl > whole.scores[0].mean_kl


def test_a_setting_that_packs_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^no layer of turboquant, 2\.5 bits is packed: .*2\.5"):
        run("llama", *settings.ours(["turboquant"], ["2.5"], inner="eager"))  # head_dim 16


def test_what_a_cache_holds_is_measured_on_the_cache() -> None:
    model: Any = squat_fx.compile(build("gemma2"), inner="eager")
    with torch.no_grad():
        cache = model(tokens_of(50)[None], use_cache=True).past_key_values
    held = hold(cache)
    packed = [x for layer in cache.layers for x in (layer.keys, layer.values)
              if isinstance(x, squat_fx.QuantizedKV)]  # fmt: skip
    assert held.stored == sum(x.storage_nbytes for x in packed)
    assert held.dense == sum(x.numel() * x.element_size() for x in packed)
    assert held.left == len(cache.layers) - len(packed) // 2 == 0
    # 32 newest and 4 first of 50 tokens are exact; all of the 23 that a window still sees.
    exact, tokens = 2 * 23 + 2 * 36, 2 * 23 + 2 * 50
    learned = sum(8 * x._storage["affine"].nbytes for x in packed) / (2 * 32)
    bits = 16 * exact + 2 * 14 * (2 + 16 / 32) + learned
    assert held.effective_bits == pytest.approx(bits / tokens)


def test_eight_bit_floats_take_a_byte_each() -> None:
    found = [setting for setting in settings.peers(2, 32) if setting.name == "transformers fp8"]
    if not found:
        pytest.skip("this transformers has none")
    full, small = run("llama", *found)
    assert small.held.dense == full.held.dense == full.held.stored
    assert small.held.all_bits == pytest.approx(8, abs=0.1)
    assert small.held.effective_bits == pytest.approx(8, abs=0.1)
    assert 0 < small.scores[0].mean_kl < 1e-2


def comparison(folder: Path, chosen: Sequence[settings.Setting]) -> report.Comparison:
    return report.Comparison(folder, "cpu", "float32", [two_texts()], 4, chosen)


def test_a_peer_that_refuses_a_model_is_left_out(folder: Path) -> None:
    def refuse(_: Any) -> Any:
        raise ValueError("only full attention")

    said: list[str] = []
    chosen = [settings.full(), settings.Setting("peer", refuse, optional=True)]
    rows = report.run(comparison(folder, chosen), silent, said.append)
    assert [row["name"] for row in rows] == ["full"]
    assert said[-1] == "peer is left out: only full attention"
    chosen[1] = settings.Setting("ours", refuse)
    with pytest.raises(ValueError, match=r"^only full attention$"):
        report.run(comparison(folder, chosen), silent, said.append)


# the command ------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A tiny model with a tokenizer of its own."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {f"w{i}": i for i in range(VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()  # pyright: ignore[reportAttributeAccessIssue]
    path = tmp_path / "tiny"
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(path)
    build("llama").save_pretrained(path)
    return path


@pytest.fixture
def evaluate(folder: Path, tmp_path: Path) -> Callable[..., Any]:
    text = tmp_path / "words.txt"
    text.write_text(" ".join(f"w{i}" for i in tokens_of(300).tolist()), encoding="utf-8")

    def call(*arguments: str) -> Any:
        fixed = ["--model", str(folder), "--text", str(text), "--prompt", "60", "--tokens", "6"]
        return CliRunner().invoke(app, ["eval", *fixed, "--windows", "2", *arguments])

    return call


def test_the_command_writes_what_it_shows(evaluate: Callable[..., Any], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    out, picture = tmp_path / "eval.json", tmp_path / "eval.png"
    questions = tmp_path / "q.jsonl"
    questions.write_text('{"question": "w5 w6", "answer": "w7 w8 w9"}\n', encoding="utf-8")
    done = evaluate(
        "--codec", "squat", "--bits", "2", "--bits", "4", "--out", str(out), "--plot",
        str(picture), "--needle", "100", "--questions", str(questions), "--free-tokens", "5",
    )  # fmt: skip
    assert done.exit_code == 0, done.stderr
    assert "squat, 4 bits" in done.stdout
    assert "words.txt, prompt 60" in done.stdout
    written = json.loads(out.read_text())
    assert written["command"].startswith(
        "squat-fx eval --model tiny --text words.txt --codec squat --bits 2 --bits 4 --prompt 60 "
        "--needle 100"
    )
    full, two, four = written["rows"]
    scores = [row["texts"]["words.txt, prompt 60"] for row in (full, two, four)]
    assert scores[0]["kl"] == 0
    assert 0 < scores[2]["kl"] < scores[1]["kl"]
    assert sorted(two["attention_error"]) == ["0", "1"]
    assert two["cache_bytes"] > 0
    assert list(two["tasks"]) == ["needle in 100 tokens", "q.jsonl", "5 tokens of its own"]
    assert full["tasks"]["5 tokens of its own"]["same"] == 5
    assert "q.jsonl" in re.sub(r"\s+", " ", done.stdout)
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--codec", "squid"), "did you mean 'squat'?"),
        (("--windows", "40"), "words.txt has 300; ask for fewer or shorter ones"),
        (("--dtype", "int8"), "dtype must be one of float32, float16, bfloat16, got 'int8'"),
        (("--device", "tpu"), "device must be cpu or cuda, got 'tpu'"),
        (("--inner", "fast"), "inner must be one of inductor, aot_eager, eager, got 'fast'"),
    ],
)
def test_a_mistake_is_one_sentence(
    evaluate: Callable[..., Any], arguments: tuple[str, ...], message: str
) -> None:
    refused = evaluate(*arguments)
    assert refused.exit_code == 1
    assert message in re.sub(r"\s+", " ", refused.stderr)
