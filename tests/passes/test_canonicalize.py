"""Every spelling of attention becomes one record; what is not understood keeps its reason."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from expecttest import assert_expected_inline

from squat_fx.passes import Attention, Canonicalize
from tests.passes.capture import Attend, Cached, analysed, examples, left_alone, randn
from tests.passes.spellings import gemma2, gpt_oss, interleaved, repeat_kv, sdpa_masked

MASK = torch.zeros(1, 1, 3, 10)
UNREAD = "grows like a cache, but no attention that reads it was recognized"


def record(module: Cached, *more: Any) -> str:
    """The only attention of ``module``, a field a line."""
    (attention,) = analysed(module, examples(module, *more), Canonicalize).attentions
    return format_record(attention)


def format_record(attention: Attention) -> str:
    return "\n".join(f"{f.name}: {getattr(attention, f.name)}" for f in fields(attention))


def reason(attend: Attend, mask: Any = None) -> str:
    """Why an attention is left alone, its graph being as it was."""
    module = Cached(attend)
    (skipped,) = left_alone(module, *examples(module, mask))
    return skipped.reason


def test_record_of_sdpa() -> None:
    assert_expected_inline(
        record(Cached(sdpa_masked), MASK),
        """\
output: scaled_dot_product_attention
query: transpose
key: cat
value: cat_1
scale: 0.3535533905932738
mask: mask
causal: 0
softcap: 0.0
sinks: None
spelling: sdpa
terms: ()""",
    )


def test_record_of_gemma2() -> None:
    assert_expected_inline(
        record(Cached(gemma2), MASK),
        """\
output: matmul_1
query: transpose
key: transpose_3
value: reshape_1
scale: 0.5
mask: mask
causal: 0
softcap: 3.0
sinks: None
spelling: eager
terms: ()""",
    )


def test_record_of_gpt_oss() -> None:
    assert_expected_inline(
        record(Cached(gpt_oss), MASK),
        """\
output: matmul_1
query: transpose
key: transpose_3
value: reshape_2
scale: 0.25
mask: mask
causal: 0
softcap: 0.0
sinks: sinks
spelling: eager
terms: ()""",
    )


def test_a_second_run_finds_the_same_and_changes_no_node() -> None:
    module = Cached(gemma2)
    rewriting = analysed(module, examples(module, MASK), Canonicalize)
    nodes = list(rewriting.graph.nodes)
    first = rewriting.attentions.pop()
    canonicalize = Canonicalize()
    canonicalize(rewriting)
    assert canonicalize.matched_count == 1
    assert rewriting.attentions == [first]
    assert list(rewriting.graph.nodes) == nodes


def test_terms_of_a_mask_a_bias_and_a_condition() -> None:
    """From the softmax up: the mask, a condition, and a bias that is scaled with the scores."""

    def attend(_: Any, query: Any, key: Any, value: Any, mask: Any) -> Any:
        scores = (query @ interleaved(key).mT + mask.sin()) * 0.5
        scores = torch.where(mask.eq(0), scores, torch.finfo(torch.float32).min)
        return F.softmax(scores + mask, -1) @ interleaved(value)

    module = Cached(attend)
    (attention,) = analysed(module, examples(module, MASK), Canonicalize).attentions
    assert attention.mask is not None
    assert attention.mask.name == "mask"
    terms = [(t.node.name, t.means, t.factor) for t in attention.terms]
    assert terms == [("eq", "attend", 1.0), ("sin", "add", 0.5)]


# Near misses of scaled_dot_product_attention


def test_active_dropout() -> None:
    def attend(_: Any, query: Any, key: Any, value: Any, mask: Any) -> Any:
        return F.scaled_dot_product_attention(query, key, value, dropout_p=0.1, enable_gqa=True)

    assert reason(attend) == "dropout is active; call model.eval()"


def test_dropout_module_while_training() -> None:
    def attend(module: Any, query: Any, key: Any, value: Any, mask: Any) -> Any:
        weights = module.softmax(query @ interleaved(key).transpose(2, 3))
        return module.dropout(weights) @ interleaved(value)

    module = Cached(attend).train()
    (skipped,) = left_alone(module, *examples(module))
    assert skipped.reason == "dropout is active; call model.eval()"


def test_mask_of_int_dtype() -> None:
    def attend(_: Any, query: Any, key: Any, value: Any, mask: Any) -> Any:
        scores = query @ interleaved(key).transpose(2, 3) + mask
        return F.softmax(scores, -1) @ interleaved(value)

    expected = "the mask is torch.int64, neither bool nor floating point"
    assert reason(attend, torch.zeros(3, 10, dtype=torch.int64)) == expected


def test_mask_that_is_a_number() -> None:
    def attend(_: Any, query: Any, key: Any, value: Any, mask: Any) -> Any:
        return F.softmax(query @ interleaved(key).mT + 1.0, -1) @ interleaved(value)

    assert reason(attend) == "a number is added to the scores"


# Near misses of eager attention


def test_scale_computed_in_the_graph() -> None:
    def attend(module: Any, query: Any, key: Any, value: Any, mask: Any) -> Any:
        scores = query @ interleaved(key).mT * module.sinks.mean()
        return F.softmax(scores, -1) @ interleaved(value)

    assert reason(attend) == "the scale is computed in the graph"


def test_attention_weights_that_are_returned() -> None:
    class Weighing(Cached):
        def forward(self, x: Any, past_key: Any, past_value: Any) -> Any:
            query = self.heads(self.query, x)
            key = torch.cat([past_key, self.heads(self.key, x)], -2)
            value = torch.cat([past_value, self.heads(self.value, x)], -2)
            weights = F.softmax(query @ interleaved(key).mT, -1)
            return weights @ interleaved(value), weights, key, value

    (skipped,) = left_alone(Weighing(), *examples(Weighing()))
    assert skipped.reason == (
        "the attention weights leave the graph as well (output_attentions, or code behind the "
        "attention that Dynamo cannot trace and that is handed them)"
    )


def test_attention_weights_with_a_second_reader() -> None:
    def attend(_: Any, query: Any, key: Any, value: Any, mask: Any) -> Any:
        weights = F.softmax(query @ interleaved(key).mT, -1)
        return weights @ interleaved(value) + weights.sum(-1, keepdim=True)

    assert reason(attend) == "the attention weights have another reader"


def test_attention_weights_that_are_changed() -> None:
    def attend(_: Any, query: Any, key: Any, value: Any, mask: Any) -> Any:
        weights = F.softmax(query @ interleaved(key).mT, -1).clamp(min=0.01)
        return weights @ interleaved(value)

    expected = "the attention weights pass through clamp, which is not understood"
    assert reason(attend) == expected


def test_attention_weights_that_are_set_to_zero() -> None:
    def attend(_: Any, query: Any, key: Any, value: Any, mask: Any) -> Any:
        scores = (query @ interleaved(key).mT).masked_fill(mask < -1, -torch.inf)
        return scores.softmax(-1).masked_fill(mask < -2, 0.0) @ interleaved(value)

    expected = "attention weights are set to zero that may be others"
    assert reason(attend, MASK) == expected


def test_mask_added_before_capping() -> None:
    def attend(_: Any, query: Any, key: Any, value: Any, mask: Any) -> Any:
        scores = 3.0 * torch.tanh((query @ interleaved(key).mT + mask) / 3.0)
        return F.softmax(scores, -1) @ interleaved(value)

    assert reason(attend, MASK) == "a term is added to the scores before they are capped"


def test_scores_hidden_before_capping() -> None:
    def attend(_: Any, query: Any, key: Any, value: Any, mask: Any) -> Any:
        scores = (query @ interleaved(key).mT).masked_fill(mask, -torch.inf)
        return F.softmax(3.0 * torch.tanh(scores / 3.0), -1) @ interleaved(value)

    assert reason(attend, MASK.bool()) == "a term is added to the scores before they are capped"


def test_term_that_is_the_same_for_all_keys() -> None:
    def attend(_: Any, query: Any, key: Any, value: Any, mask: Any) -> Any:
        scores = query @ interleaved(key).mT + mask[..., :1]
        return F.softmax(scores, -1) @ interleaved(value)

    assert reason(attend, MASK) == "what is added to the scores is the same for all keys"


def test_bool_mask_that_is_added() -> None:
    def attend(_: Any, query: Any, key: Any, value: Any, mask: Any) -> Any:
        return F.softmax(query @ interleaved(key).mT + mask, -1) @ interleaved(value)

    assert reason(attend, MASK.bool()) == "a bool mask is added to the scores"


def test_mask_times_alpha() -> None:
    def attend(_: Any, query: Any, key: Any, value: Any, mask: Any) -> Any:
        scores = torch.add(query @ interleaved(key).mT, mask, alpha=2)
        return F.softmax(scores, -1) @ interleaved(value)

    assert reason(attend, MASK) == "the scores pass through add, which is not understood"


def test_division_that_rounds() -> None:
    def attend(_: Any, query: Any, key: Any, value: Any, mask: Any) -> Any:
        scores = torch.div(query @ interleaved(key).mT, 2.0, rounding_mode="floor")
        return F.softmax(scores, -1) @ interleaved(value)

    assert reason(attend) == "the scores pass through div, which is not understood"


def test_scores_replaced_by_a_number_that_hides_nothing() -> None:
    def attend(_: Any, query: Any, key: Any, value: Any, mask: Any) -> Any:
        scores = (query @ interleaved(key).mT).masked_fill(mask, -100.0)
        return F.softmax(scores, -1) @ interleaved(value)

    expected = "scores are replaced by -100 in masked_fill, which hides nothing"
    assert reason(attend, MASK.bool()) == expected


def test_scores_replaced_by_a_number_that_is_made_small_again() -> None:
    def attend(_: Any, query: Any, key: Any, value: Any, mask: Any) -> Any:
        scores = (query @ interleaved(key).mT).masked_fill(mask, -1e5) * 0.01
        return F.softmax(scores, -1) @ interleaved(value)

    expected = "scores are replaced by -100000 in masked_fill, which hides nothing"
    assert reason(attend, MASK.bool()) == expected


def test_scores_replaced_by_other_scores() -> None:
    def attend(_: Any, query: Any, key: Any, value: Any, mask: Any) -> Any:
        scores = query @ interleaved(key).mT
        return F.softmax(torch.where(mask, scores, -scores), -1) @ interleaved(value)

    expected = "the scores pass through where, which is not understood"
    assert reason(attend, MASK.bool()) == expected


def test_baddbmm_whose_factor_is_computed_in_the_graph() -> None:
    def attend(module: Any, query: Any, key: Any, value: Any, mask: Any) -> Any:
        query, key, value = (x.flatten(0, 1) for x in (query, interleaved(key), interleaved(value)))
        alpha = query.size(1)
        scores = torch.baddbmm(mask, query, key.transpose(1, 2), alpha=alpha)
        return torch.bmm(F.softmax(scores, -1), value).unflatten(0, (-1, 4))

    assert reason(attend, MASK[0].expand(8, -1, -1)) == "the scale is computed in the graph"


@pytest.mark.parametrize("sign", [-1, 1])
def test_sigmoid_of_something_else_than_logsumexp_minus_sinks(sign: int) -> None:
    """The weights are then not those of attention with sinks; what reads them stays as it is."""

    def attend(module: Any, query: Any, key: Any, value: Any, mask: Any) -> Any:
        scores = query @ interleaved(key).mT
        total = torch.logsumexp(scores if sign > 0 else 2 * scores, -1)
        gate = (sign * (total - module.sinks.view(1, -1, 1))).sigmoid()
        gate = gate if sign < 0 else gate**2
        return (F.softmax(scores, -1) @ interleaved(value)) * gate.unsqueeze(-1)

    module = Cached(attend)
    (attention,) = analysed(module, examples(module), Canonicalize).attentions
    assert attention.sinks is None
    assert attention.output.name == "matmul_1"


def test_mask_written_into_the_scores() -> None:
    def attend(_: Any, query: Any, key: Any, value: Any, mask: Any) -> Any:
        scores = query @ interleaved(key).mT
        scores.masked_fill_(mask, -torch.inf)
        return F.softmax(scores, -1) @ interleaved(value)

    assert reason(attend, MASK.bool()) == "the scores are changed in place by masked_fill_"


@pytest.mark.parametrize(("inner", "outer"), [(3.0, 2.0), (3.0, None), (None, 3.0)])
def test_tanh_that_is_no_softcap(inner: float | None, outer: float | None) -> None:
    def attend(_: Any, query: Any, key: Any, value: Any, mask: Any) -> Any:
        scores = query @ interleaved(key).mT
        scores = torch.tanh(scores if inner is None else scores / inner)
        scores = scores if outer is None else scores * outer
        return F.softmax(scores, -1) @ interleaved(value)

    expected = "tanh is applied to the scores, but not as softcap * tanh(scores / softcap)"
    assert reason(attend) == expected


def test_dropped_column_that_is_no_sink() -> None:
    def attend(_: Any, query: Any, key: Any, value: Any, mask: Any) -> Any:
        weights = F.softmax(query @ interleaved(key).mT, -1)[..., :-1]
        return weights @ interleaved(value)[:, :, :-1]

    expected = "a column is dropped after the softmax, but no sink column was added before it"
    assert reason(attend) == expected


def test_sink_column_that_is_no_logit_per_head() -> None:
    def attend(module: Any, query: Any, key: Any, value: Any, mask: Any) -> Any:
        logits = torch.cat([query @ interleaved(key).mT, query.sum(-1, keepdim=True)], -1)
        return F.softmax(logits, -1)[..., :-1] @ interleaved(value)

    assert reason(attend) == ("the sink column is not one logit per head, the same for all queries")


def test_sinks_of_every_query_of_its_own() -> None:
    """As Inkling 2 computes them."""

    def attend(module: Any, query: Any, key: Any, value: Any, mask: Any) -> Any:
        scores, sinks = query @ interleaved(key).mT, query.mean(-1, keepdim=True)
        probs = F.softmax(torch.cat([scores, sinks], dim=-1).float(), dim=-1)
        return probs[..., :-1] @ interleaved(value)

    assert reason(attend) == "the sink column is not one logit per head, the same for all queries"


@pytest.mark.parametrize(
    ("raise_", "why"),
    [
        (lambda x: x.clamp(min=-50.0), "scores below -50 are raised to it, where they still count"),
        (lambda x: x.clamp(max=5.0), "the scores pass through clamp, which is not understood"),
        (lambda x: x.clamp(-1e9, 5.0), "the scores pass through clamp, which is not understood"),
        (
            lambda x: torch.maximum(x, x.mean(-1, keepdim=True)),
            "the scores pass through maximum, which is not understood",
        ),
        (
            lambda x: torch.maximum(x, -x),
            "the scores pass through maximum, which is not understood",
        ),
        (
            lambda x: x.clamp(min=-1e5) * 0.01,
            "scores below -100000 are raised to it, where they still count",
        ),
    ],
)
def test_scores_that_are_raised_to_what_counts(raise_: Any, why: str) -> None:
    def attend(_: Any, query: Any, key: Any, value: Any, mask: Any) -> Any:
        return F.softmax(raise_(query @ interleaved(key).mT), -1) @ interleaved(value)

    assert reason(attend) == why


def test_maximum_of_another_dim_is_subtracted() -> None:
    def attend(module: Any, query: Any, key: Any, value: Any, mask: Any) -> Any:
        scores = query @ interleaved(key).mT
        scores = scores - scores.max(dim=-2, keepdim=True).values
        return F.softmax(scores, -1) @ interleaved(value)

    assert reason(attend) == "the scores pass through sub, which is not understood"


def test_sinks_with_something_else_subtracted() -> None:
    def attend(module: Any, query: Any, key: Any, value: Any, mask: Any) -> Any:
        sinks = module.sinks.reshape(1, -1, 1, 1).expand(query.size(0), -1, query.size(2), -1)
        logits = torch.cat([query @ interleaved(key).mT, sinks], -1)
        return F.softmax(logits - logits.abs(), -1)[..., :-1] @ interleaved(value)

    expected = "something else than its maximum is subtracted from the scores"
    assert reason(attend) == expected


# No attention at all: no reason either


def test_softmax_of_a_router_is_no_attention() -> None:
    def attend(module: Any, query: Any, key: Any, value: Any, mask: Any) -> Any:
        return F.softmax(query @ module.router, -1).topk(2, -1).values

    module = Cached(attend)
    module.register_buffer("router", randn(8, 5))
    assert {s.reason for s in left_alone(module, *examples(module))} == {UNREAD}


def test_softmax_over_another_dim_is_no_attention() -> None:
    def attend(_: Any, query: Any, key: Any, value: Any, mask: Any) -> Any:
        return F.softmax(query @ repeat_kv(key).mT, -2) @ repeat_kv(value)

    module = Cached(attend)
    assert {s.reason for s in left_alone(module, *examples(module))} == {UNREAD}
