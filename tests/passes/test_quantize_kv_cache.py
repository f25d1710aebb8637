# ruff: noqa: E501 - a golden shows one node a line
"""Rewritten graphs, read as text; who else reads a cache gets the numbers."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from expecttest import assert_expected_inline
from torch import Tensor, fx

import squat_fx
from squat_fx import Calibration, Config, QuantizedKV
from squat_fx.calibration import Fingerprint, LayerCalibration
from squat_fx.codecs import Codec, Kivi, Kvarn, Lossless, Squat, SquatPaper, Think
from squat_fx.passes.format import format_graph
from tests.conftest import randn
from tests.passes.capture import (
    HEAD_DIM,
    HEADS,
    KV_HEADS,
    LOSSLESS,
    PAST,
    STEPS,
    WIDTH,
    Attend,
    Cached,
    Prefill,
    assert_same_over_steps,
    dense,
    examples,
    past,
    rewrite,
    run_steps,
    sdpa,
    tokens,
)
from tests.passes.spellings import gemma2, gpt_oss, llama_masked, merged_heads, sdpa_masked

MASK = torch.zeros(1, 1, 3, 10)


def text(module: Any, *inputs: Any, config: Config | None = None) -> str:
    """The rewritten graph from the attention on, by default under the default 2-bit codec."""
    config = config or Config(bits=2)
    rewritten, _ = squat_fx.rewrite(fx.symbolic_trace(module), inputs, config)
    lines = format_graph(rewritten.graph).split("\n")
    return "\n".join(
        [lines[0], *(line for line in lines if "squat_fx" in line or "return" in line)]
    )


def test_prefill() -> None:
    module = Prefill(sdpa_masked)
    assert_expected_inline(
        text(module, tokens(3), torch.zeros(3, 3)),
        """\
inputs: judge_this_prompt, x, mask
valid_tokens_default = squat_fx.valid_tokens(unsqueeze_1, transpose_1)
judged_tokens_default = squat_fx.judged_tokens(transpose_1, valid_tokens_default, ['planes/token', 'planes/token'], [8, 1, 8, 32, 4, 1, 0, 0, 2], [8, 1, 8, 32, 4, 0, 0, 1, 2])
store_planes_token = squat_fx.store.planes_token(transpose_1, valid_tokens_default, transpose, None, 'key', 'squat {"center": true, "smooth": true, "strength": 1.0}', [8, 1, 8, 32, 4, 1, 0, 0, 2])
store_planes_token_1 = squat_fx.store.planes_token(transpose_2, valid_tokens_default, None, None, 'value', 'squat {"center": true, "smooth": true, "strength": 1.0}', [8, 1, 8, 32, 4, 0, 0, 1, 2])
attend_errors_default = squat_fx.attend_errors([getitem_15], [getitem_16], [getitem_17], [*store_planes_token, *store_planes_token_1], None, [], getitem_21, [getitem_10, getitem_11, getitem_12, getitem_13], size_1, True, 0.353553, 0, 0.0, ['planes/token', 'planes/token'], [8, 1, 8, 32, 4, 1, 0, 0, 2], [8, 1, 8, 32, 4, 0, 0, 1, 2], judge_this_prompt)
return scaled_dot_product_attention, *store_planes_token, *store_planes_token_1, attend_errors_default""",
    )


def calibration() -> Calibration:
    """Of layer 0 of the small modules here."""
    keys, queries = (randn(KV_HEADS, HEAD_DIM, HEAD_DIM, seed=s).double() for s in (1, 2))
    found = LayerCalibration.of(keys @ keys.mT, queries @ queries.mT)
    return Calibration({0: found}, Fingerprint.of(Prefill()), 10)


def test_prefill_of_a_calibrated_layer() -> None:
    """The basis is an input that is always fed the same tensor."""
    config = Config(bits=2, calibration=calibration())
    assert_expected_inline(
        text(Prefill(), tokens(3), config=config),
        """\
inputs: transpose_1_basis, judge_this_prompt, x, mask
judged_tokens_default = squat_fx.judged_tokens(transpose_1, None, ['planes/token', 'planes/token'], [8, 1, 8, 32, 4, 1, 1, 0, 2], [8, 1, 8, 32, 4, 0, 0, 1, 2])
store_planes_token = squat_fx.store.planes_token(transpose_1, None, transpose, transpose_1_basis, 'key', 'squat {"center": true, "smooth": true, "strength": 1.0}', [8, 1, 8, 32, 4, 1, 1, 0, 2])
store_planes_token_1 = squat_fx.store.planes_token(transpose_2, None, None, None, 'value', 'squat {"center": true, "smooth": true, "strength": 1.0}', [8, 1, 8, 32, 4, 0, 0, 1, 2])
attend_errors_default = squat_fx.attend_errors([getitem_15], [getitem_16], [getitem_17], [*store_planes_token, *store_planes_token_1], transpose_1_basis, [], None, [getitem_10, getitem_11, getitem_12, getitem_13], size_1, False, 0.353553, 0, 0.0, ['planes/token', 'planes/token'], [8, 1, 8, 32, 4, 1, 1, 0, 2], [8, 1, 8, 32, 4, 0, 0, 1, 2], judge_this_prompt)
return scaled_dot_product_attention, *store_planes_token, *store_planes_token_1, attend_errors_default""",
    )


def test_decode_of_a_calibrated_layer() -> None:
    config = Config(bits=2, calibration=calibration())
    assert_expected_inline(
        text(Cached(), *examples(Cached()), config=config),
        """\
inputs: positions, x, *past_key, *past_value, mask
attend_planes_token = squat_fx.attend.planes_token(transpose, transpose_1, transpose_2, *past_key, *past_value, positions, 0, 1, -1, None, None, 0.353553, 0, 0.0, [8, 1, 8, 32, 4, 1, 1, 0, 2], [8, 1, 8, 32, 4, 0, 0, 1, 2])
squat_fx.append_both_.planes_token(*past_key, *past_value, transpose_1, transpose_2, None, positions, 0, 1, 'squat {"center": true, "smooth": true, "strength": 1.0}', [8, 1, 8, 32, 4, 1, 1, 0, 2], [8, 1, 8, 32, 4, 0, 0, 1, 2], [attend_planes_token])
return transpose_4""",
    )


def test_prefill_of_merged_heads() -> None:
    """Queries of a ``bmm`` get their heads back before they are stored with."""
    assert_expected_inline(
        text(Prefill(merged_heads), tokens(3)),
        """\
inputs: judge_this_prompt, x, mask
judged_tokens_default = squat_fx.judged_tokens(transpose_1, None, ['planes/token', 'planes/token'], [8, 1, 8, 32, 4, 1, 0, 0, 2], [8, 1, 8, 32, 4, 0, 0, 1, 2])
store_planes_token_1 = squat_fx.store.planes_token(transpose_2, None, None, None, 'value', 'squat {"center": true, "smooth": true, "strength": 1.0}', [8, 1, 8, 32, 4, 0, 0, 1, 2])
store_planes_token = squat_fx.store.planes_token(transpose_1, None, unflatten_4, None, 'key', 'squat {"center": true, "smooth": true, "strength": 1.0}', [8, 1, 8, 32, 4, 1, 0, 0, 2])
attend_errors_default = squat_fx.attend_errors([getitem_17], [getitem_18], [getitem_19], [*store_planes_token, *store_planes_token_1], None, [], None, [getitem_12, getitem_13, getitem_14, getitem_15], size_9, False, 1.0, 0, 0.0, ['planes/token', 'planes/token'], [8, 1, 8, 32, 4, 1, 0, 0, 2], [8, 1, 8, 32, 4, 0, 0, 1, 2], judge_this_prompt)
return unflatten_3, *store_planes_token, *store_planes_token_1, attend_errors_default""",
    )


@pytest.mark.parametrize(
    "codec",
    [
        *(Squat(strength=0.0, smooth=False), SquatPaper(strength=0.0), Think(ratio=0.0)),
        *(Kivi(), Kvarn(), Lossless()),
    ],
)
def test_a_codec_that_does_not_ask_gets_no_queries(codec: Codec) -> None:
    config = Config(codec=codec)
    rewritten, _ = squat_fx.rewrite(fx.symbolic_trace(Prefill()), (tokens(3),), config)
    stores = [n for n in rewritten.graph.nodes if "squat_fx.store" in str(n.target)]
    assert [n.args[2] for n in stores] == [None, None]


class Wide(Prefill):
    """Heads of 48 channels, three plane groups: what is rounded first is compensated later."""

    def __init__(self, attend: Attend) -> None:
        super().__init__(attend)
        self.query, self.key, self.value = (
            torch.nn.Linear(WIDTH, heads * 48) for heads in (HEADS, KV_HEADS, KV_HEADS)
        )

    def heads(self, projection: torch.nn.Linear, x: Any) -> Any:
        return projection(x).unflatten(-1, (-1, 48)).transpose(1, 2)


@pytest.mark.parametrize("codec", [Squat(), SquatPaper(), Think()])
@pytest.mark.parametrize("attend", [sdpa, llama_masked, gemma2, gpt_oss, merged_heads])
def test_the_prompt_is_stored_with_its_own_queries(codec: Codec, attend: Attend) -> None:
    """However the attention is written: as if by hand."""
    module, x = Wide(attend), tokens(70)
    mask = torch.zeros(1, 1, 70, 70)
    config = Config(codec=codec, residual_length=4, sink_length=2)
    rewritten, _ = squat_fx.rewrite(fx.symbolic_trace(module), (x, mask), config)
    with torch.no_grad():
        _, key, value = rewritten(x, mask)
        query, plain_key, plain_value = (
            module.heads(p, x) for p in (module.query, module.key, module.value)
        )
    expected = QuantizedKV.from_dense(plain_key, key.format, "key", None, query)
    without = QuantizedKV.from_dense(plain_key, key.format, "key")
    assert torch.equal(key.dequantize(), expected.dequantize())
    assert not torch.equal(key.dequantize(), without.dequantize()), "the queries must matter here"
    stored_value = QuantizedKV.from_dense(plain_value, value.format, "value")
    assert torch.equal(value.dequantize(), stored_value.dequantize())


@pytest.mark.parametrize("attend", [sdpa_masked, gemma2, gpt_oss])
@pytest.mark.parametrize("calibrated", [False, True])
def test_eight_bits_are_close_to_dense_step_by_step(attend: Attend, calibrated: bool) -> None:
    """Also under a softcap and beside sinks, which see the mean of the keys."""
    module = Cached(attend)
    with torch.no_grad():
        module.key.bias.copy_(20 * randn(KV_HEADS * HEAD_DIM, seed=5))
    found = calibration() if calibrated else None
    config = Config(bits=8, residual_length=4, sink_length=2, calibration=found)
    rewritten, report = squat_fx.rewrite(fx.symbolic_trace(module), examples(module, MASK), config)
    assert report.rewritten == 1

    def mask_of(query_len: int, kv_len: int) -> Tensor:
        return torch.zeros(1, 1, query_len, kv_len)

    steps = (40, *STEPS)
    expected, *_ = run_steps(module, KV_HEADS, mask_of, steps)
    actual, key, _ = run_steps(rewritten, KV_HEADS, mask_of, steps)
    assert key.shape[2] == PAST + sum(steps)
    assert ((actual - expected).norm() / expected.norm()).item() < 0.03


def test_decode() -> None:
    assert_expected_inline(
        text(Cached(), *examples(Cached())),
        """\
inputs: positions, x, *past_key, *past_value, mask
attend_planes_token = squat_fx.attend.planes_token(transpose, transpose_1, transpose_2, *past_key, *past_value, positions, 0, 1, -1, None, None, 0.353553, 0, 0.0, [8, 1, 8, 32, 4, 1, 0, 0, 2], [8, 1, 8, 32, 4, 0, 0, 1, 2])
squat_fx.append_both_.planes_token(*past_key, *past_value, transpose_1, transpose_2, None, positions, 0, 1, 'squat {"center": true, "smooth": true, "strength": 1.0}', [8, 1, 8, 32, 4, 1, 0, 0, 2], [8, 1, 8, 32, 4, 0, 0, 1, 2], [attend_planes_token])
return transpose_4""",
    )


def test_decode_with_mask_softcap_and_repeated_heads() -> None:
    assert_expected_inline(
        text(Cached(gemma2), *examples(Cached(), MASK)),
        """\
inputs: positions, x, *past_key, *past_value, mask
valid_tokens_default = squat_fx.valid_tokens(mask, transpose_1)
attend_planes_token = squat_fx.attend.planes_token(transpose, transpose_1, transpose_2, *past_key, *past_value, positions, 0, 1, -1, mask, None, 0.5, 0, 3.0, [8, 1, 8, 32, 4, 1, 0, 0, 2], [8, 1, 8, 32, 4, 0, 0, 1, 2])
squat_fx.append_both_.planes_token(*past_key, *past_value, transpose_1, transpose_2, valid_tokens_default, positions, 0, 1, 'squat {"center": true, "smooth": true, "strength": 1.0}', [8, 1, 8, 32, 4, 1, 0, 0, 2], [8, 1, 8, 32, 4, 0, 0, 1, 2], [attend_planes_token])
return attend_planes_token""",
    )


class Windows(Cached):
    """Two layers that slide over seven tokens and the new ones."""

    def layer(self, x: Any, past_key: Any, past_value: Any) -> Any:
        key = torch.cat([past_key, self.heads(self.key, x)], -2)
        value = torch.cat([past_value, self.heads(self.value, x)], -2)
        out = sdpa(self, self.heads(self.query, x), key, value, None)
        return out, key[:, :, -PAST:], value[:, :, -PAST:]

    def forward(self, x: Any, k1: Any, v1: Any, k2: Any, v2: Any) -> Any:
        first = self.layer(x, k1, v1)
        second = self.layer(first[0].transpose(1, 2).flatten(2)[..., :WIDTH], k2, v2)
        return second[0], *first[1:], *second[1:]


def test_decode_of_windows() -> None:
    """A layer's rows of positions are together, the third of them where its window begins."""
    inputs = (tokens(1), *past(), *past())
    assert_expected_inline(
        text(Windows(), *inputs, config=LOSSLESS),
        """\
inputs: positions, x, *k1, *v1, *k2, *v2
attend_dense = squat_fx.attend.dense(transpose_2, transpose, transpose_1, *k1, *v1, positions, 0, 1, 2, None, None, 0.353553, 0, 0.0, [8, 4, 1, 4, 2, 0, 0, 0], [8, 1, 4, 4, 2, 0, 0, 0])
squat_fx.append_both_.dense(*k1, *v1, transpose, transpose_1, None, positions, 0, 1, 'none {"group_size": 4}', [8, 4, 1, 4, 2, 0, 0, 0], [8, 1, 4, 4, 2, 0, 0, 0], [attend_dense])
attend_dense_1 = squat_fx.attend.dense(transpose_6, transpose_4, transpose_5, *k2, *v2, positions, 3, 4, 5, None, None, 0.353553, 0, 0.0, [8, 4, 1, 4, 2, 0, 0, 0], [8, 1, 4, 4, 2, 0, 0, 0])
squat_fx.append_both_.dense(*k2, *v2, transpose_4, transpose_5, None, positions, 3, 4, 'none {"group_size": 4}', [8, 4, 1, 4, 2, 0, 0, 0], [8, 1, 4, 4, 2, 0, 0, 0], [attend_dense_1])
return attend_dense_1""",
    )


def test_windows_see_and_keep_as_much_as_they_did() -> None:
    module, inputs = Windows(), [tokens(1), *past(), *past()]
    rewritten, _ = squat_fx.rewrite(fx.symbolic_trace(module), inputs, LOSSLESS)
    ours, theirs = inputs[1:], inputs[1:]
    for seed in range(40):
        if seed == 20:  # keys that begin anew beside values that do not
            ours[0] = dense(ours[0])
        expected, *theirs = module(tokens(1, seed), *theirs)
        actual, *ours = rewritten(tokens(1, seed), *ours)
        torch.testing.assert_close(actual, expected)
        assert all(x.shape[2] == PAST for x in ours)
    torch.testing.assert_close([dense(x) for x in ours], theirs)


def test_a_window_that_arrives_where_all_is_seen_is_all_there_is() -> None:
    module = Cached()
    rewritten, _ = squat_fx.rewrite(fx.symbolic_trace(module), examples(module), LOSSLESS)
    _, *theirs = module(tokens(3), *past())
    _, *ours = rewritten(tokens(3), *past())
    expected, *theirs = module(tokens(3, 1), *(x[:, :, 4:] for x in theirs))
    actual, *ours = rewritten(tokens(3, 1), *(x[:, :, 4:] for x in ours))
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close([dense(x) for x in ours], theirs)


def test_decode_of_merged_heads() -> None:
    rewritten, _ = rewrite(Cached(merged_heads), *examples(Cached()))
    lines = format_graph(rewritten.graph).split("\n")
    assert_expected_inline(
        "\n".join(lines[-7:]),
        """\
mul_2 = mul(flatten, 0.25)
unflatten_4 = unflatten(mul_2, 0, (-1, 4))
attend_dense = squat_fx.attend.dense(unflatten_4, transpose_1, transpose_2, *past_key, *past_value, positions, 0, 1, -1, None, None, 1.0, 0, 0.0, [8, 4, 1, 4, 2, 0, 0, 0], [8, 1, 4, 4, 2, 0, 0, 0])
squat_fx.append_both_.dense(*past_key, *past_value, transpose_1, transpose_2, None, positions, 0, 1, 'none {"group_size": 4}', [8, 4, 1, 4, 2, 0, 0, 0], [8, 1, 4, 4, 2, 0, 0, 0], [attend_dense])
flatten_3 = flatten(attend_dense, 0, 1)
unflatten_3 = unflatten(flatten_3, 0, (-1, 4))
return unflatten_3""",
    )


def test_nothing_of_the_attention_is_left() -> None:
    rewritten, _ = rewrite(Cached(llama_masked), *examples(Cached(), MASK))
    calls = {str(node.target) for node in rewritten.graph.nodes if node.op != "placeholder"}
    assert not {"matmul", "softmax", "cat", "expand", "dropout"} & calls
    assert not any("softmax" in call or "matmul" in call for call in calls)


def test_metadata_of_the_output_is_kept() -> None:
    module = fx.symbolic_trace(Cached())
    rewritten, report = squat_fx.rewrite(module, examples(Cached()), LOSSLESS)
    (attend,) = (n for n in rewritten.graph.nodes if "attend" in str(n.target))
    assert attend.meta["squat_layer"] == report.graphs[0].sites[0].layer
    output = rewritten.graph.output_node().args[0][0]
    assert output.meta["val"].shape[1:] == (4, output.meta["val"].shape[2], 8)


def test_key_with_a_second_reader_gets_the_numbers_and_the_cache_still_grows_packed() -> None:
    class Curious(Cached):
        def forward(self, x: Any, past_key: Any, past_value: Any) -> Any:
            out, key, value = super().forward(x, past_key, past_value)
            return out + key.mean(), key, value

    module = Curious()
    rewritten, report = rewrite(module, *examples(module))
    assert report.rewritten == 1
    lines = format_graph(rewritten.graph).split("\n")
    assert_expected_inline(
        "\n".join(x for x in lines if "cat" in x or "past" in x),
        """\
inputs: positions, x, past_key, *past_key, *past_value
cat = cat([past_key, transpose_1], -2)
attend_dense = squat_fx.attend.dense(transpose, transpose_1, transpose_2, *past_key, *past_value, positions, 0, 1, -1, None, None, 0.353553, 0, 0.0, [8, 4, 1, 4, 2, 0, 0, 0], [8, 1, 4, 4, 2, 0, 0, 0])
squat_fx.append_both_.dense(*past_key, *past_value, transpose_1, transpose_2, None, positions, 0, 1, 'none {"group_size": 4}', [8, 4, 1, 4, 2, 0, 0, 0], [8, 1, 4, 4, 2, 0, 0, 0], [attend_dense])
mean = mean(cat)""",
    )
    assert_same_over_steps(module, rewritten)


def test_attention_that_is_left_alone_reads_the_numbers_of_a_cache_that_grows_packed() -> None:
    def attend(_: Any, query: Any, key: Any, value: Any, mask: Any) -> Any:
        first = F.scaled_dot_product_attention(query, key, value, enable_gqa=True)
        scores = (first @ key.repeat(1, 2, 1, 1).mT).abs()
        return torch.softmax(scores, -1) @ value.repeat(1, 2, 1, 1)

    module = Cached(attend)
    rewritten, report = rewrite(module, *examples(module))
    assert report.rewritten == 1
    assert [s.reason for s in report.skipped] == [
        "the scores pass through abs, which is not understood"
    ]
    assert_same_over_steps(module, rewritten)


def test_writes_that_nobody_names_survive() -> None:
    def attend(_: Any, query: Any, key: Any, value: Any, mask: Any) -> Any:
        grown = mask.clone()
        grown.masked_fill_(grown > 0, -torch.inf)
        return F.scaled_dot_product_attention(query, key, value, grown, enable_gqa=True)

    def last_row_hides_the_first_key(query_len: int, kv_len: int) -> Tensor:
        mask = torch.zeros(2, 1, query_len, kv_len)
        mask[1, :, :, 0] = 1
        return mask

    module = Cached(attend)
    inputs = examples(module, last_row_hides_the_first_key(3, 10))
    rewritten, report = rewrite(module, *inputs)
    assert report.rewritten == 1
    assert "masked_fill_" in format_graph(rewritten.graph)
    assert_same_over_steps(module, rewritten, last_row_hides_the_first_key)


def test_mask_that_is_filled_in_place_is_asked_for_padding_only_then() -> None:
    def filled(_: Any, query: Any, key: Any, value: Any, mask: Any) -> Any:
        full = torch.full_like(mask, torch.finfo(torch.float32).min)
        value = value.contiguous()
        full.mul_(0.0)
        return F.scaled_dot_product_attention(query, key, value, full, enable_gqa=True)

    module = Prefill(filled)
    rewritten, _ = rewrite(module, tokens(3), torch.zeros(3, 3))
    _, key, _ = rewritten(tokens(3), torch.zeros(3, 3))
    torch.testing.assert_close(dense(key), module(tokens(3), torch.zeros(3, 3))[1])


def test_one_node_of_padding_serves_keys_and_values() -> None:
    rewritten, _ = rewrite(Cached(sdpa_masked), *examples(Cached(), MASK))
    assert format_graph(rewritten.graph).count("= squat_fx.valid_tokens") == 1


def test_rewriting_twice_changes_nothing_more() -> None:
    graph_module = fx.symbolic_trace(Cached())
    code = graph_module.code
    first, _ = squat_fx.rewrite(graph_module, examples(Cached()), LOSSLESS)
    second, _ = squat_fx.rewrite(graph_module, examples(Cached()), LOSSLESS)
    assert graph_module.code == code
    assert format_graph(first.graph) == format_graph(second.graph)


def test_formats_of_a_layer_follow_the_config() -> None:
    config = replace(LOSSLESS, codec=None, layer_bits={0: (4, 3)})
    _, report = squat_fx.rewrite(fx.symbolic_trace(Cached()), examples(Cached()), config)
    (site,) = report.graphs[0].sites
    assert (site.key.fmt.widths, site.value.fmt.widths) == ((4,), (3,))


def test_two_pasts_of_different_lengths() -> None:
    module = Cached()
    rewritten, _ = rewrite(module, *examples(module))
    key, value = past(tokens=5)
    out = rewritten(tokens(1), key, value)
    torch.testing.assert_close(out[0], module(tokens(1), key, value)[0])
    assert out[1].shape[2] == out[2].shape[2] == 6
