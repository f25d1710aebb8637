"""Where keys and values come from the cache and go back to it, and what beside it must stay."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from expecttest import assert_expected_inline
from torch import Tensor, fx

import squat_fx
from squat_fx.passes import AttentionSite, Canonicalize, FindCacheEdges
from squat_fx.passes.find_cache_edges import layer_of
from tests.passes.capture import (
    HEAD_DIM,
    HEADS,
    KV_HEADS,
    LOSSLESS,
    Attend,
    Cached,
    Prefill,
    analysed,
    examples,
    left_alone,
    past,
    randn,
    sdpa,
    tokens,
)
from tests.passes.spellings import interleaved, llama, repeat_kv


def format_site(site: AttentionSite) -> str:
    lines = [f"{site.kind} of layer {site.layer}, {site.num_queries_per_kv} queries per kv head"]
    for edge in (site.key, site.value):
        stored = f"newest of {edge.grown}" if edge.is_window else edge.stored
        lines.append(f"{edge.role}: {stored} = past {edge.past} + new {edge.new}")
    if site.seen is not None:
        lines.append(f"sees {site.seen}")
    return "\n".join(lines)


def found(module: Any, *inputs: Any) -> str:
    rewriting = analysed(module, inputs, Canonicalize, FindCacheEdges)
    (site,) = rewriting.sites
    return format_site(site)


def reasons(module: Any, *inputs: Any) -> list[str]:
    return [skipped.reason for skipped in left_alone(module, *inputs)]


def reason(attend: Attend) -> str:
    """Why ``attend`` over the usual cache is left alone."""
    module = Cached(attend)
    (text,) = reasons(module, *examples(module))
    return text


def test_site_of_a_decode() -> None:
    assert_expected_inline(
        found(Cached(llama), *examples(Cached())),
        """\
decode of layer 0, 2 queries per kv head
key: cat = past past_key + new transpose_1
value: cat_1 = past past_value + new transpose_2""",
    )


def test_site_of_a_prefill() -> None:
    assert_expected_inline(
        found(Prefill(llama), tokens(3)),
        """\
prefill of layer 0, 2 queries per kv head
key: transpose_1 = past None + new transpose_1
value: transpose_2 = past None + new transpose_2""",
    )


def test_layer_is_read_from_the_module_path() -> None:
    node = fx.Graph().placeholder("x")
    assert layer_of(node, 3, 4) == 3
    node.meta["nn_module_stack"] = {"a": ("model", None), "b": ("model.layers.7.attention", None)}
    assert layer_of(node, 3, 4) == 7
    node.meta["nn_module_stack"] = {"a": ("L['self'].blocks[11]", None)}
    assert layer_of(node, 3, 4) == 11


# Near misses: the cache


class Variant(Cached):
    """A cache that differs in ``update``, which gives what is attended to and what is returned."""

    def update(self, past_key: Any, key: Any) -> tuple[Any, Any]:
        raise NotImplementedError

    def forward(self, x: Any, past_key: Any, past_value: Any) -> Any:
        query, key, value = (self.heads(p, x) for p in (self.query, self.key, self.value))
        key, stored_key = self.update(past_key, key)
        value, stored_value = self.update(past_value, value)
        return self.attend(self, query, key, value, None), stored_key, stored_value


class Sliding(Variant):
    """Attends to what ``seen``, and returns what ``kept`` makes of past and new tokens."""

    def __init__(self, seen: Callable[[Any], Any], kept: Callable[[Any], Any]) -> None:
        super().__init__()
        self.seen, self.kept = seen, kept

    def update(self, past_key: Any, key: Any) -> tuple[Any, Any]:
        full = torch.cat([past_key, key], -2)
        return self.seen(full), self.kept(full)


def whole(full: Any) -> Any:
    return full


def newest(full: Any) -> Any:
    return full[:, :, -6:, :]


def test_sliding_window_that_returns_its_newest_tokens() -> None:
    assert_expected_inline(
        found(Sliding(whole, newest), *examples(Cached())),
        """\
decode of layer 0, 2 queries per kv head
key: newest of cat = past past_key + new transpose_1
value: newest of cat_1 = past past_value + new transpose_2""",
    )


def test_sliding_window_that_attends_to_its_newest_tokens() -> None:
    assert_expected_inline(
        found(Sliding(newest, whole), *examples(Cached())),
        """\
decode of layer 0, 2 queries per kv head
key: cat = past past_key + new transpose_1
value: cat_1 = past past_value + new transpose_2
sees getitem""",
    )


@pytest.mark.parametrize(
    "kept",
    [lambda x: x[:, :, -6:], lambda x: x[..., -6:, :], lambda x: x[:, :, 4:], lambda x: x[..., :]],
)
def test_spellings_of_the_newest_tokens(kept: Callable[[Any], Any]) -> None:
    rewriting = analysed(Sliding(whole, kept), examples(Cached()), Canonicalize, FindCacheEdges)
    (site,) = rewriting.sites
    assert site.key.is_window
    assert site.value.is_window


@pytest.mark.parametrize(
    "kept",
    [
        lambda x: x[:, :, :6],
        lambda x: x[:, :, -6:-1],
        lambda x: x[:, :, -6::2],
        lambda x: x[:, :1, -6:],
        lambda x: x[1:, :, -6:],
    ],
)
def test_window_that_is_not_the_newest_tokens(kept: Callable[[Any], Any]) -> None:
    module = Sliding(whole, kept)
    assert reasons(module, *examples(module)) == [
        "key is a past + new concatenation that is not returned; "
        "only a part of it is, and not its newest tokens"
    ]


def test_cache_that_is_not_returned() -> None:
    class Forgetful(Variant):
        def update(self, past_key: Any, key: Any) -> tuple[Any, Any]:
            return torch.cat([past_key, key], -2), key

    assert reasons(Forgetful(), *examples(Forgetful())) == [
        "key is a past + new concatenation that is not returned; so the caller never gets it back"
    ]


def test_three_way_cat() -> None:
    class ThreeWay(Variant):
        def update(self, past_key: Any, key: Any) -> tuple[Any, Any]:
            full = torch.cat([past_key, key[:, :, :1], key[:, :, 1:]], -2)
            return full, full

    expected = "key is a concatenation of 3 tensors, not of past and new"
    assert reasons(ThreeWay(), *examples(ThreeWay())) == [expected]


def test_static_cache() -> None:
    class Static(Variant):
        def update(self, past_key: Any, key: Any) -> tuple[Any, Any]:
            full = past_key.index_copy(2, torch.arange(3), key)
            return full, full

    expected = (
        "key is a buffer of fixed size, written by index_copy; "
        "use a cache that grows by concatenation, such as DynamicCache"
    )
    assert reasons(Static(), *examples(Static())) == [expected]


def test_static_cache_written_in_place() -> None:
    class Static(Variant):
        def update(self, past_key: Any, key: Any) -> tuple[Any, Any]:
            past_key.index_copy_(2, torch.arange(3), key)
            return past_key, past_key

    expected = (
        "key is a buffer of fixed size, written in place by index_copy_; "
        "use a cache that grows by concatenation, such as DynamicCache"
    )
    assert reasons(Static(), *examples(Static())) == [expected]


def test_site_of_a_cache_whose_tokens_come_before_its_heads() -> None:
    class TokenMajor(Variant):
        def update(self, past_key: Any, key: Any) -> tuple[Any, Any]:
            full = torch.cat([past_key, key.transpose(1, 2)], 1)
            return full.transpose(1, 2), full

    inputs = (tokens(3), *(x.transpose(1, 2).contiguous() for x in past()))
    rewriting = analysed(TokenMajor(), inputs, Canonicalize, FindCacheEdges)
    (site,) = rewriting.sites
    assert (site.key.token_dim, site.value.token_dim) == (1, 1)
    assert site.key.sizes(site.key.stored)[1] == KV_HEADS


def test_cache_that_grows_by_heads() -> None:
    class Growing(Variant):
        def update(self, past_key: Any, key: Any) -> tuple[Any, Any]:
            full = torch.cat([past_key, key], 1)
            return full, full

    inputs = (tokens(3), *past(tokens=3))
    assert reasons(Growing(), *inputs) == ["key is concatenated on dim 1, not on dim -2"]


def test_cache_on_dim_3() -> None:
    class ChannelMajor(Variant):
        def update(self, past_key: Any, key: Any) -> tuple[Any, Any]:
            full = torch.cat([past_key, key.transpose(2, 3)], 3)
            return full.transpose(2, 3), full

    inputs = [tokens(3), *(x.transpose(2, 3).contiguous() for x in past())]
    assert reasons(ChannelMajor(), *inputs) == ["key is concatenated on dim 3, not on dim -2"]


def test_cache_written_in_place_after_the_append() -> None:
    class Scaling(Variant):
        def update(self, past_key: Any, key: Any) -> tuple[Any, Any]:
            full = torch.cat([past_key, key], -2)
            full[:, :, 1:].mul_(0.5)
            return full, full

    assert reasons(Scaling(), *examples(Scaling())) == [
        "key is changed in place by mul_ after it was made"
    ]


def test_conv_state() -> None:
    def forward(x: Tensor, state: Tensor) -> Any:
        state = torch.cat([state, x], -1)
        return F.conv1d(state, randn(8, 8, 3)), state

    assert left_alone(forward, randn(2, 8, 1), randn(2, 8, 4)) == []


def test_value_that_is_not_cached() -> None:
    class KeysOnly(Cached):
        def forward(self, x: Any, past_key: Any, past_value: Any) -> Any:
            query = self.heads(self.query, x)
            key = torch.cat([past_key, self.heads(self.key, x)], -2)
            value = F.pad(self.heads(self.value, x), (0, 0, 7, 0))
            return self.attend(self, query, key, value, None), key

    (text,) = reasons(KeysOnly(), *examples(KeysOnly()))
    assert text == (
        "value comes from pad, not from a past + new concatenation on dim -2 that is returned"
    )


def test_layer_that_is_skipped_by_the_config() -> None:
    graph_module = fx.symbolic_trace(Cached())
    config = replace(LOSSLESS, skip_layers=(0,))
    _, report = squat_fx.rewrite(graph_module, examples(Cached()), config)
    assert [s.reason for s in report.skipped] == ["the layer is in skip_layers"]


# Near misses: what is cached is no key

REBUILT = (
    "is rebuilt by Linear from a latent cache at every step (multi-head latent attention); "
    "what is cached is small already and stays as it is"
)
ABSORBED = (
    "key and value are parts of one latent cache (multi-head latent attention, its projections "
    "absorbed into the query), which is small already and stays as it is"
)


class Latent(Cached):
    """Multi-head latent attention: a latent and a rotary key for all heads are cached."""

    def __init__(self, written: bool = False, past: bool = True) -> None:
        super().__init__()
        self.down = torch.nn.Linear(16, 12)
        self.up = torch.nn.Linear(8, HEADS * 2 * HEAD_DIM)
        self.written, self.past = written, past
        self.query = torch.nn.Linear(16, HEADS * (HEAD_DIM + 4))

    def forward(self, x: Any, past_latent: Any = None, past_rotary: Any = None) -> Any:
        latent, rotary = self.down(x).split([8, 4], -1)
        rotary = rotary.unsqueeze(1)
        if self.past:
            latent = torch.cat([past_latent, latent], 1)
            rotary = torch.cat([past_rotary, rotary], 2)
        both = self.up(F.layer_norm(latent, (8,))).unflatten(-1, (HEADS, -1)).transpose(1, 2)
        plain, value = both.split([HEAD_DIM, HEAD_DIM], -1)
        turned = rotary.expand(-1, HEADS, -1, -1)
        if self.written:
            key = plain.new_empty(*plain.shape[:3], HEAD_DIM + 4)
            key[..., :HEAD_DIM] = plain
            key[..., HEAD_DIM:] = turned
        else:
            key = torch.cat([plain, turned], -1)
        query = self.query(x).unflatten(-1, (HEADS, -1)).transpose(1, 2)
        return F.scaled_dot_product_attention(query, key, value), latent, rotary


@pytest.mark.parametrize("written", [False, True])
def test_keys_that_are_rebuilt_from_a_latent_cache(written: bool) -> None:
    module = Latent(written)
    inputs = (tokens(3), randn(2, 7, 8), randn(2, 1, 7, 4))
    (skipped,) = squat_fx.rewrite(traced(module, inputs), inputs, LOSSLESS)[1].skipped
    assert skipped.reason == "key " + REBUILT.replace("Linear", "linear")


@pytest.mark.parametrize("past", [False, True])
def test_keys_that_are_rebuilt_from_a_latent_cache_in_dynamo(past: bool) -> None:
    module = Latent(past=past)
    inputs = (tokens(3), randn(2, 7, 8), randn(2, 1, 7, 4)) if past else (tokens(3),)
    report = squat_fx.explain(module, inputs, codec="none")
    assert [s.reason for s in report.skipped] == ["key " + REBUILT.replace("Linear", "linear")]


def traced(module: torch.nn.Module, inputs: Any) -> fx.GraphModule:
    """As ``torch.export`` has it."""
    return torch.export.export(module, inputs).module()


def test_latent_attention_whose_projections_are_absorbed() -> None:
    class Absorbed(Cached):
        def forward(self, x: Any, past_latent: Any) -> Any:
            latent = torch.cat([past_latent, self.heads(self.key, x)[:, :1]], 2)
            query, value = self.heads(self.query, x), latent[..., :6]
            return F.scaled_dot_product_attention(query, latent, value, enable_gqa=True), latent

    assert reasons(Absorbed(), tokens(3), past(1)[0]) == [ABSORBED]


def test_keys_that_are_projected_and_not_cached_are_no_latent_attention() -> None:
    """The hidden states are returned as well, and the query comes from them too."""

    class Encoder(Cached):
        def forward(self, x: Any) -> Any:
            x = x.relu()
            query, key, value = (self.heads(p, x) for p in (self.query, self.key, self.value))
            return self.attend(self, query, key, value, None), x

    (text,) = reasons(Encoder(), tokens(3))
    assert text == (
        "key comes from Linear, not from a past + new concatenation on dim -2 that is returned"
    )


# Near misses: other concatenations and other attentions


def test_rotary_cat() -> None:
    class Rotary(Cached):
        def forward(self, x: Any) -> Any:
            query, key, value = (self.heads(p, x) for p in (self.query, self.key, self.value))
            half = HEAD_DIM // 2
            key = torch.cat([-key[..., half:], key[..., :half]], -1)
            return self.attend(self, query, key, value, None), key, value

    # The key that is returned grows with the query, but its cat is rotary.
    rewriting = analysed(Rotary(), (tokens(3),), Canonicalize, FindCacheEdges)
    (skipped,) = rewriting.skipped
    assert skipped.reason == "key is concatenated on dim -1, not on dim -2"


class Cross(Cached):
    """Keys and values come from what was encoded; ``hand_over`` makes them what is returned."""

    def __init__(self, hand_over: Callable[[Any], Any]) -> None:
        super().__init__()
        self.hand_over = hand_over

    def forward(self, x: Any, encoded: Any) -> Any:
        query = self.heads(self.query, x)
        key = self.hand_over(self.heads(self.key, encoded))
        value = self.hand_over(self.heads(self.value, encoded))
        return self.attend(self, query, key, value, None), key, value


def test_cross_attention_whose_encoder_keys_are_returned() -> None:
    assert_expected_inline(
        found(Cross(whole), tokens(3), tokens(9)),
        """\
prefill of layer 0, 2 queries per kv head
key: transpose_1 = past None + new transpose_1
value: transpose_2 = past None + new transpose_2""",
    )


def test_cross_attention_whose_encoder_keys_go_through_an_empty_cat() -> None:
    module = Cross(lambda new: torch.cat([torch.tensor([]), new], -2))
    rewriting = analysed(module, (tokens(3), tokens(9)), Canonicalize, FindCacheEdges)
    (site,) = rewriting.sites
    assert site.kind == "prefill"


def test_cross_attention_that_reads_its_keys_from_an_input() -> None:
    class Reading(Cached):
        def forward(self, x: Any, key: Any, value: Any) -> Any:
            return self.attend(self, self.heads(self.query, x), key, value, None)

    expected = "key is read from a graph input to which nothing is appended"
    assert reasons(Reading(), *examples(Reading())) == [expected]


def test_cache_whose_attention_is_not_recognized() -> None:
    def attend(_: Any, query: Any, key: Any, value: Any, mask: Any) -> Any:
        scores = query @ interleaved(key).mT
        return scores.relu() @ interleaved(value)

    module = Cached(attend)
    expected = "grows like a cache, but no attention that reads it was recognized"
    assert reasons(module, *examples(module)) == [expected, expected]


def test_attention_without_a_cache() -> None:
    class Encoder(Cached):
        def forward(self, x: Any) -> Any:
            query, key, value = (self.heads(p, x) for p in (self.query, self.key, self.value))
            return self.attend(self, query, key, value, None)

    (text,) = reasons(Encoder(), tokens(3))
    assert text == (
        "key comes from Linear, not from a past + new concatenation on dim -2 that is returned"
    )


# Near misses: heads


def test_keys_in_tile_order_and_values_that_are_not() -> None:
    def attend(_: Any, query: Any, key: Any, value: Any, mask: Any) -> Any:
        key, value = key.repeat(1, 2, 1, 1), value.repeat_interleave(2, dim=1)
        return F.scaled_dot_product_attention(query, key, value)

    assert reason(attend) == "keys and values are repeated in different orders"


def test_tile_order_with_a_mask_per_head() -> None:
    def attend(_: Any, query: Any, key: Any, value: Any, mask: Any) -> Any:
        key, value = key.repeat(1, 2, 1, 1), value.repeat(1, 2, 1, 1)
        mask = torch.arange(4.0)[:, None, None] * torch.arange(10)
        return F.scaled_dot_product_attention(query, key, value, mask)

    expected = "heads are repeated as a whole, and masks or sinks differ by head"
    assert reason(attend) == expected


def test_tokens_that_are_repeated() -> None:
    def attend(_: Any, query: Any, key: Any, value: Any, mask: Any) -> Any:
        key, value = interleaved(key.repeat(1, 1, 2, 1)), interleaved(value.repeat(1, 1, 2, 1))
        return F.scaled_dot_product_attention(query, key, value)

    assert reason(attend).startswith("key reaches the attention with its axes in another order")


def test_keys_and_values_that_are_repeated_differently() -> None:
    class Uneven(Cached):
        def forward(self, x: Any, past_key: Any, past_value: Any) -> Any:
            query = self.heads(self.query, x)
            key = torch.cat([past_key, self.heads(self.key, x)], -2)
            value = torch.cat([past_value, self.heads(self.query, x)], -2)
            return F.softmax(query @ repeat_kv(key).mT, -1) @ value, key, value

    inputs = (tokens(3), past()[0], past(HEADS)[1])
    expected = "keys and values are repeated a different number of times"
    assert reasons(Uneven(), *inputs) == [expected]


def test_keys_and_values_with_different_numbers_of_heads() -> None:
    class Uneven(Cached):
        def forward(self, x: Any, past_key: Any, past_value: Any) -> Any:
            query = self.heads(self.query, x)
            key = torch.cat([past_key, self.heads(self.key, x)], -2)
            value = torch.cat([past_value, self.heads(self.query, x)], -2)
            return sdpa(self, query, key, value, None), key, value

    inputs = (tokens(3), past()[0], past(HEADS)[1])
    expected = "keys and values have different numbers of heads"
    assert reasons(Uneven(), *inputs) == [expected]


def test_query_heads_that_are_no_multiple_of_the_key_heads() -> None:
    def attend(_: Any, query: Any, key: Any, value: Any, mask: Any) -> Any:
        return F.softmax(query @ key.mT, -1) @ value  # one query head, broadcast

    module = Cached(attend, heads=1)
    (text,) = reasons(module, *examples(module))
    assert text == "the attention's output has other leading dims than its query"


def test_heads_in_the_place_of_tokens() -> None:
    def attend(_: Any, query: Any, key: Any, value: Any, mask: Any) -> Any:
        return F.scaled_dot_product_attention(query, key.transpose(1, 2), value.transpose(1, 2))

    class TokensAsHeads(Cached):
        def forward(self, x: Any, past_key: Any, past_value: Any) -> Any:
            key = torch.cat([past_key, self.heads(self.key, x)], -2)
            value = torch.cat([past_value, self.heads(self.value, x)], -2)
            query = F.pad(self.heads(self.query, x), (0, 0, 7, 0)).transpose(1, 2)
            return attend(self, query, key, value, None), key, value

    expected = ["key is concatenated on dim -2, not on dim 1"]
    assert reasons(TokensAsHeads(), *examples(TokensAsHeads())) == expected


def test_keys_that_are_also_the_values() -> None:
    class Latent(Cached):
        def forward(self, x: Any, past_key: Any) -> Any:
            key = torch.cat([past_key, self.heads(self.key, x)], -2)
            return sdpa(self, self.heads(self.query, x), key, key, None), key

    assert reasons(Latent(), tokens(3), past()[0]) == ["keys and values are the same tensor"]


def test_number_of_heads_that_is_symbolic() -> None:
    def forward(query: Any, key: Any, value: Any) -> Any:
        key, value = key * 2, value * 2
        return F.softmax(query @ key.mT, -1) @ value, key, value

    shape = (2, KV_HEADS, 3, HEAD_DIM)
    skipped = left_alone(forward, *(randn(*shape, seed=s) for s in range(3)))
    assert [s.reason for s in skipped] == [
        "the number of key heads is symbolic; capture the graph with a fixed number of heads"
    ]


def test_two_attentions_over_one_cache_are_both_rewritten() -> None:
    def attend(_: Any, query: Any, key: Any, value: Any, mask: Any) -> Any:
        first = sdpa(None, query, key, value, None)
        return sdpa(None, first, key, value, None)

    rewriting = analysed(Cached(attend), examples(Cached()), Canonicalize, FindCacheEdges)
    assert len(rewriting.sites) == 2
    assert len(rewriting.edges()) == 2


def test_attentions_that_would_store_one_cache_differently() -> None:
    def attend(_: Any, query: Any, key: Any, value: Any, mask: Any) -> Any:
        first = sdpa(None, query, key, value, None)
        return sdpa(None, first, interleaved(value), interleaved(key), None)

    rewriting = analysed(Cached(attend), examples(Cached()), Canonicalize, FindCacheEdges)
    assert len(rewriting.sites) == 1
    assert [s.reason for s in rewriting.skipped] == [
        "shares its cache with a layer that stores it differently"
    ]
