"""``pruned``: its options, and whole models that keep a part of their prompts."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx
from transformers import DynamicCache, PreTrainedModel

import squat_fx
from squat_fx import QuantizedKV
from squat_fx.codecs import (
    Codec,
    Kivi,
    Kvarn,
    Lossless,
    Pruned,
    Squat,
    codec_from_spec,
    codec_spec,
)
from tests import kinds
from tests.conftest import stored_format
from tests.models import SCENARIOS, VOCABULARY, beam, build, chat, greedy, left_padded_batch, prompt
from tests.uses import generate, prefilled

EXACT = Pruned(8, Lossless(1), window=8)
OPTIONS: dict[str, Any] = {"inner": "eager", "residual_length": 8, "guard": "off"}


def compiled(model: PreTrainedModel, codec: Codec, **options: Any) -> PreTrainedModel:
    torch._dynamo.reset()
    return squat_fx.compile(model, codec=codec, **(OPTIONS | options))


# options ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "codec",
    [
        Pruned(),
        Pruned(64, "kivi"),  # pyright: ignore[reportArgumentType]
        Pruned(128, Kivi(128), window=16, pooling=1),
        Pruned(32, Kvarn(32)),
    ],
    ids=str,
)
def test_a_spec_says_everything(codec: Codec) -> None:
    assert codec_from_spec(codec_spec(codec)) == codec


def test_the_codec_beneath_is_given_by_name_or_with_fields() -> None:
    assert codec_from_spec('pruned {"codec": "kivi", "budget": 96}') == Pruned(96, Kivi())
    spec = r'pruned {"budget": 128, "codec": "kivi {\"group_size\": 128}"}'
    assert codec_from_spec(spec) == Pruned(128, Kivi(128))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"budget": 0}, "budget must be a number of tokens, 1 or more, got 0"),
        ({"budget": 0.25}, "budget must be a number of tokens, 1 or more, got 0.25"),
        ({"window": True}, "window must be a number of tokens, 1 or more, got True"),
        ({"pooling": 4}, "pooling must be odd, got 4; choose 5"),
        ({"codec": 3}, "codec must be a codec or the name of one, got 3"),
        ({"codec": Pruned()}, "codec must be one that keeps all tokens, got another 'pruned'"),
        (
            {"codec": "svdq"},
            "codec 'svdq' rounds a key by its position, which kept tokens lose; choose another, "
            "such as 'squat'",
        ),
        (
            {"codec": "kivi", "budget": 100},
            "budget must be whole groups of 32 tokens, which codec 'kivi' packs at once, got 100; "
            "choose 128",
        ),
        ({"codec": "kiwi"}, "unknown codec 'kiwi', choose one of .*; did you mean 'kivi'"),
    ],
)
def test_what_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        Pruned(**options)


def test_a_format_has_the_numbers_of_the_codec_beneath() -> None:
    for codec in (Squat(), Kivi(64)):
        for role in ("key", "value"):
            fmt = stored_format(Pruned(256, codec), role, 64, 3)
            own = stored_format(codec, role, 64, 3)
            assert fmt.layout == f"kept/{own.layout}"
            assert fmt.packed_bits_per_element() == own.packed_bits_per_element()
            assert fmt.bits == own.bits
            assert fmt.stored_layout.describe(fmt).endswith(", 256 tokens of a prompt kept")


def test_widths_are_those_of_the_codec_beneath() -> None:
    with pytest.raises(ValueError, match=r"codec 'kivi' takes whole bits, got 2\.5"):
        squat_fx.Config(bits=2.5, codec=Pruned(64, Kivi()))
    squat_fx.Config(bits=2.5, codec=Pruned(64))
    calibration: Any = object.__new__(squat_fx.Calibration)
    with pytest.raises(ValueError, match=r"^codec 'pruned' takes no calibration"):
        squat_fx.Config(codec="pruned", calibration=calibration)


# whole models -------------------------------------------------------------------------------------


@pytest.mark.full
@pytest.mark.parametrize("scenario", SCENARIOS)
def test_with_budget_for_all_a_model_answers_as_with_the_codec_beneath(scenario: str) -> None:
    run = SCENARIOS[scenario]
    expected = run(compiled(build("llama"), Squat()))
    assert torch.equal(run(compiled(build("llama"), Pruned(512))), expected)


def test_a_small_budget_is_told_and_pays() -> None:
    model = compiled(build("llama"), Pruned(16), guard="warn")
    out = model.generate(
        prompt(1, 600), max_new_tokens=4, do_sample=False, return_dict_in_generate=True
    )
    report = squat_fx.report(model)
    text = "keys pruned 2 bits per token, 16 tokens of a prompt kept (3.00 stored bits"
    assert text in str(report)
    assert "(pruned; guard_threshold is 65%); a larger budget helps, or more bits: " in str(report)
    assert min(report.attention_errors.values()) > 0.1
    whole = compiled(build("llama"), Squat())
    larger = whole.generate(
        prompt(1, 600), max_new_tokens=4, do_sample=False, return_dict_in_generate=True
    )
    small, large = (squat_fx.cache_bytes(x.past_key_values) for x in (out, larger))
    assert small.dense == large.dense
    assert small.stored < 0.6 * large.stored


def test_a_padded_row_answers_as_it_would_alone() -> None:
    model = compiled(build("llama"), EXACT)
    ids, mask = prompt(2, 60), torch.ones(2, 60, dtype=torch.int64)
    mask[1, :17] = 0
    options: dict[str, Any] = {"max_new_tokens": 30, "do_sample": False}
    together = model.generate(ids * mask, attention_mask=mask, **options)[:, 60:]
    assert torch.equal(together[:1], model.generate(ids[:1], **options)[:, 60:])
    assert torch.equal(together[1:], model.generate(ids[1:, 17:], **options)[:, 43:])


def test_assisted_decoding_answers_as_greedy_decoding() -> None:
    """Several queries a step, cropped back every round. Nothing in the prompt is there twice, so
    that no guesses go in with it.
    """
    model, ids = compiled(build("llama"), EXACT), torch.randperm(VOCABULARY - 3)[None, :60] + 3
    expected = generate(model, ids, 40)
    assert torch.equal(generate(model, ids, 40, prompt_lookup_num_tokens=4), expected)
    assert not torch.equal(expected, generate(build("llama"), ids, 40)), "nothing was lost"
    assert squat_fx.report(model).eager_calls == 0


def test_tokens_in_one_call_find_what_they_find_one_by_one() -> None:
    """A chat turn."""
    model, ids = compiled(build("llama"), EXACT), prompt(2, 90)
    found = []
    for sizes in ((60, 30), (60, *[1] * 30), (60, 7, 23)):
        cache = DynamicCache(config=model.config)
        with torch.no_grad():
            parts = [model(x, past_key_values=cache).logits for x in ids.split(sizes, 1)]
        found.append(torch.cat(parts, 1))
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=1e-4, atol=1e-4)


@pytest.mark.full
@pytest.mark.parametrize("run", [beam, chat, greedy, left_padded_batch])
def test_a_compiler_answers_as_none_does(run: Callable[[Any], Tensor]) -> None:
    expected = run(compiled(build("llama"), EXACT))
    model = compiled(build("llama"), EXACT, inner="aot_eager")
    assert torch.equal(run(model), expected)
    assert squat_fx.report(model).eager_calls == 0


def layouts(cache: Any) -> list[str]:
    return [layer.keys.format.layout for layer in cache.layers]


def test_windows_forget_by_themselves_and_keep_all_else() -> None:
    model = compiled(kinds.build("gemma3"), Pruned(4))
    out = model.generate(
        prompt(1, 60), max_new_tokens=20, do_sample=False, return_dict_in_generate=True
    )
    assert layouts(out.past_key_values) == ["planes/token", "kept/planes/token"]
    assert squat_fx.report(model).eager_calls == 0
    assert not squat_fx.report(model).skipped


@pytest.mark.full
@pytest.mark.parametrize("kind", ["mistral", "bart"])
def test_windows_and_what_was_encoded_lose_nothing(kind: str) -> None:
    tokens = {"prompt_tokens": 60, "tokens": 20}
    expected = kinds.generate(compiled(kinds.build(kind), Squat()), **tokens)
    model = compiled(kinds.build(kind), Pruned(4))
    assert torch.equal(kinds.generate(model, **tokens), expected)
    sites = {site.key.fmt.layout for graph in squat_fx.report(model).graphs for site in graph.sites}
    of_decoder = {"kept/planes/token"} if kind == "bart" else set()  # whose prompt is one token
    assert sites == {"planes/token"} | of_decoder


def test_a_scale_of_its_own_counts_in_votes() -> None:
    """Of Gemma: the query is multiplied, so that what the codec sees are scores."""
    model = compiled(build("gemma2", "eager"), EXACT)
    assert (model.config.query_pre_attn_scalar, model.config.head_dim) == (24, 32)
    model.generate(prompt(1, 40), max_new_tokens=2, do_sample=False)
    (text,) = (g.text for g in squat_fx.report(model).graphs if g.kind == "prefill")
    assert f"* {24**-0.5 * 32**0.5}"[:6] in text
    plain = compiled(build("llama"), EXACT)
    plain.generate(prompt(1, 40), max_new_tokens=2, do_sample=False)
    assert all("mul = query" not in graph.text for graph in squat_fx.report(plain).graphs)


def test_calls_that_run_eagerly_keep_all_tokens() -> None:
    found = []
    for model in (build("llama"), compiled(build("llama"), EXACT)):
        cache = DynamicCache(config=model.config)
        with torch.compiler.set_stance("force_eager"):
            first = generate(model, prompt(1, 60), 10, past_key_values=cache)
        longer = torch.cat([first, prompt(1, 5)], 1)
        found.append(generate(model, longer, 10, past_key_values=cache))
    assert torch.equal(*found)
    assert layouts(cache) == ["dense", "dense"]


def test_an_eager_step_attends_to_the_part() -> None:
    model, ids = compiled(build("llama"), EXACT), prompt(2, 60)
    cache = prefilled(model, ids[:, :-1])
    rest = copy.deepcopy(cache)
    expected = generate(model, ids, 20, past_key_values=cache)
    with torch.compiler.set_stance("force_eager"):
        assert torch.equal(generate(model, ids, 20, past_key_values=rest), expected)
    assert layouts(rest) == ["kept/dense", "kept/dense"]


def test_a_file_goes_on_where_the_prompt_ended(tmp_path: Path) -> None:
    path, ids = tmp_path / "prompt.safetensors", prompt(2, 70)
    model = compiled(kinds.build("gemma3"), Pruned(8))
    cache = prefilled(model, ids[:, :60])
    squat_fx.save_cache(path, cache, model)
    expected = generate(model, ids, 10, past_key_values=cache)
    loaded = squat_fx.load_cache(path, model)
    assert layouts(loaded) == ["planes/token", "kept/planes/token"]
    assert torch.equal(generate(model, ids, 10, past_key_values=loaded), expected)
    other = compiled(kinds.build("gemma3"), Pruned(16))
    with pytest.raises(ValueError, match=r"was stored with codec 'pruned .*\"budget\": 8"):
        squat_fx.load_cache(path, other)


def lost_keys() -> QuantizedKV:
    """Keys whose prompt lost tokens."""
    x = torch.randn(2, 1, 2, 60, 16)
    return QuantizedKV.from_dense(x[0], stored_format(EXACT, "key", 16), "key", query=x[1])


@pytest.mark.parametrize("kept", [None, 20])
def test_what_wants_all_keys_says_what_to_do(kept: int | None) -> None:
    """A second reader, and a window."""

    def step(query: Tensor, new: Tensor, past: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        keys = torch.cat([past, new], 2)
        out = torch.nn.functional.scaled_dot_product_attention(query, keys, keys)
        return out, keys.square().sum(-1), keys if kept is None else keys[:, :, -kept:]

    torch._dynamo.reset()
    options: dict[str, Any] = {"codec": EXACT, "inner": "eager", "residual_length": 8}
    run, new = torch.compile(step, backend="squat", options=options), torch.randn(1, 2, 1, 16)
    with torch.no_grad(), pytest.raises(ValueError, match=r"^these keys lost tokens"):
        run(new, new, lost_keys())


class Prompt(torch.nn.Module):
    """Returns all keys and values, and attends to the newest."""

    def __init__(self, newest: int) -> None:
        super().__init__()
        self.newest = newest

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
        key, value, newest = 2 * key, 2 * value, slice(-self.newest, None)
        out = torch.nn.functional.scaled_dot_product_attention(
            query, key[:, :, newest], value[:, :, newest], scale=0.25
        )
        return out, key, value


@pytest.mark.parametrize(("newest", "layout"), [(0, "kept/dense"), (10, "dense")])
def test_bare_graphs_keep_a_part_but_not_of_what_is_read_as_a_window(
    newest: int, layout: str
) -> None:
    x = tuple(torch.randn(3, 1, 2, 60, 16))
    config = squat_fx.Config(codec=EXACT, residual_length=8)
    module, report = squat_fx.rewrite(make_fx(Prompt(newest))(*x), x, config)
    assert report.rewritten == 1, str(report)
    _, key, value = module(*x)
    assert key.format.layout == value.format.layout == layout
    assert key._storage.lost_tokens == value._storage.lost_tokens == (not newest)
