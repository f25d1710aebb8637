"""The same attention in many spellings: each is found, and each answers as the original does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx

from squat_fx.passes.spelling import kind, same_size, writers
from tests.passes.capture import (
    BATCH,
    HEADS,
    Attend,
    Cached,
    Prefill,
    assert_same_over_steps,
    aten,
    dense,
    examples,
    rewrite,
    symbolic,
    tokens,
)
from tests.passes.spellings import MASKED, PLAIN, sdpa_masked

CAPTURES = pytest.mark.parametrize("capture", [symbolic, aten])


def causal(query_len: int, kv_len: int) -> Tensor:
    """Bool ``[q_len, kv_len]``, the newest query sees all."""
    return torch.ones(query_len, kv_len, dtype=torch.bool).tril(kv_len - query_len)


def additive(query_len: int, kv_len: int) -> Tensor:
    """The same as numbers, ``[1, 1, q_len, kv_len]``."""
    shape = (1, 1, query_len, kv_len)
    return torch.zeros(shape).masked_fill(
        ~causal(query_len, kv_len), torch.finfo(torch.float32).min
    )


def bias_per_head(query_len: int, kv_len: int) -> Tensor:
    """Float ``[heads, q_len, kv_len]``."""
    slope = torch.arange(1, HEADS + 1)[:, None, None] / 16
    return slope * torch.arange(kv_len).expand(query_len, -1)


def padded(query_len: int, kv_len: int) -> Tensor:
    """Bool ``[batch, 1, q_len, kv_len]``: the last row's first three tokens are padding."""
    pads = torch.tensor([0] * (BATCH - 1) + [3])[:, None, None, None]
    return causal(query_len, kv_len) & (torch.arange(kv_len) >= pads)


@pytest.mark.parametrize(
    ("spelling", "capture"),
    [(s, c) for s in PLAIN for c in (symbolic, aten) if (s, c) != ("einsum", aten)],
)
def test_spelling_without_a_mask(spelling: str, capture: Callable[..., fx.GraphModule]) -> None:
    module = Cached(PLAIN[spelling])
    rewritten, report = rewrite(module, *examples(module), capture=capture)
    assert report.rewritten == 1, str(report)
    assert_same_over_steps(module, rewritten)


def test_an_einsum_that_was_decomposed_is_left_alone() -> None:
    """ATen has products over five dims in its place; torch's own graphs have the einsum."""
    module = Cached(PLAIN["einsum"])
    rewritten, report = rewrite(module, *examples(module), capture=aten)
    assert report.rewritten == 0
    reason = "grows like a cache, but no attention that reads it was recognized"
    assert {skipped.reason for skipped in report.skipped} == {reason}
    with torch.no_grad():
        torch.testing.assert_close(rewritten(*examples(module)), module(*examples(module)))


@CAPTURES
@pytest.mark.parametrize("spelling", MASKED)
def test_spelling_with_a_mask(spelling: str, capture: Callable[..., fx.GraphModule]) -> None:
    module = Cached(MASKED[spelling])
    inputs = examples(module, additive(3, 10))
    rewritten, report = rewrite(module, *inputs, capture=capture)
    assert report.rewritten == 1, str(report)
    assert_same_over_steps(module, rewritten, additive)


@pytest.mark.parametrize("spelling", ["gpt_neo", "flint", "mpt", "llama"])
def test_scores_in_fp32_over_a_cache_in_bfloat16(spelling: str) -> None:
    """Attention reads the cache as it is; its output has the dtype that it had."""
    module = Cached(MASKED[spelling]).bfloat16()
    inputs = [x.bfloat16() for x in examples(module, additive(3, 10))]
    rewritten, report = rewrite(module, *inputs)
    assert report.rewritten == 1, str(report)
    with torch.no_grad():
        found, expected = rewritten(*inputs)[0], module(*inputs)[0]
    assert found.dtype == expected.dtype
    torch.testing.assert_close(found, expected, atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize("mask_of", [causal, additive, bias_per_head, padded])
def test_mask_of_any_rank_and_dtype(mask_of: Callable[[int, int], Tensor]) -> None:
    module = Cached(sdpa_masked)
    rewritten, report = rewrite(module, *examples(module, mask_of(3, 10)))
    assert report.rewritten == 1, str(report)
    assert_same_over_steps(module, rewritten, mask_of)


def is_causal(_: Any, query: Any, key: Any, value: Any, mask: Any) -> Any:
    return torch.nn.functional.scaled_dot_product_attention(
        query, key, value, is_causal=True, enable_gqa=True
    )


@pytest.mark.parametrize("attend", [is_causal, *PLAIN.values()])
def test_prefill(attend: Attend) -> None:
    module = Prefill(attend)
    rewritten, report = rewrite(module, tokens(5))
    assert [graph.kind for graph in report.graphs] == ["prefill"], str(report)
    with torch.no_grad():
        out, key, value = rewritten(tokens(21))
        expected = module(tokens(21))
    torch.testing.assert_close((out, dense(key), dense(value)), expected)


def test_is_causal_over_a_past_is_top_left_as_torch_computes_it() -> None:
    module = Cached(is_causal)
    rewritten, report = rewrite(module, *examples(module))
    assert report.rewritten == 1, str(report)
    assert_same_over_steps(module, rewritten)
    with torch.no_grad():  # query 0 sees key 0 alone, however long the past is
        out = rewritten(*examples(module))[0]
    first_value = examples(module)[2][:, :, 0].repeat_interleave(2, 1)
    torch.testing.assert_close(out[:, :, 0], first_value)


def test_one_key_head_for_all_queries() -> None:
    def expanded(_: Any, query: Any, key: Any, value: Any, mask: Any) -> Any:
        weights = torch.softmax(query @ key.expand(-1, HEADS, -1, -1).mT, -1)
        return weights @ value.expand(-1, HEADS, -1, -1)

    module = Cached(expanded, kv_heads=1)
    rewritten, report = rewrite(module, *examples(module))
    assert report.graphs[0].sites[0].num_queries_per_kv == HEADS
    assert_same_over_steps(module, rewritten)


def test_writers_sees_through_views() -> None:
    def written(x: Any, y: Any) -> Any:
        x.view(-1).mul_(2)
        y.clone().mul_(2)
        return x + y

    x, y = fx.symbolic_trace(written).graph.find_nodes(op="placeholder")
    assert [node.target for node in writers(x)] == ["mul_"]
    assert writers(y) == []


def test_kinds_of_modules_operators_and_properties() -> None:
    def forward(x: Any) -> Any:
        return x.mT @ x

    graph = fx.symbolic_trace(forward).graph
    assert [kind(node) for node in graph.nodes] == [None, "mT", "matmul", None]


def test_sizes_are_compared_without_a_guard() -> None:
    import sympy

    n = sympy.Symbol("n", positive=True, integer=True)
    assert same_size(4 * (n + 1), 4 * n + 4)
    assert not same_size(n, 1)
    assert not same_size(n, n + 1)
