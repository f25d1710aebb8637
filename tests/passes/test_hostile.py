"""Models whose caches a naive matcher would get wrong: each is rewritten and right, or left alone
with its reason.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

import squat_fx
from squat_fx import QuantizedKV
from squat_fx.passes.format import format_graph
from tests.passes.capture import LOSSLESS, Cached, past, tokens
from tests.passes.spellings import interleaved

STEPS = (3, 1, 1, 3, 1)
BACK = "appended to what {} makes of a graph input, not to a past as it was returned"


class Model(Cached):
    """One attention; ``step`` gives what is attended to, and what goes back of the keys."""

    def forward(self, x: Any, past_key: Any, past_value: Any) -> Any:
        query, *new = (self.heads(p, x) for p in (self.query, self.key, self.value))
        return self.step(query, *new, past_key, past_value)

    def step(self, query: Any, key: Any, value: Any, past_key: Any, past_value: Any) -> Any:
        raise NotImplementedError


def grown(key: Any, value: Any, past_key: Any, past_value: Any) -> tuple[Any, Any]:
    return torch.cat([past_key, key], -2), torch.cat([past_value, value], -2)


def attention(query: Any, key: Any, value: Any, **options: Any) -> Any:
    return F.scaled_dot_product_attention(query, key, value, enable_gqa=True, **options)


# Left alone: what was packed would be rounded again at every call, or the numbers be others


class NewBeforePast(Model):
    def step(self, query: Any, key: Any, value: Any, past_key: Any, past_value: Any) -> Any:
        key, value = torch.cat([key, past_key], -2), torch.cat([value, past_value], -2)
        return attention(query, key, value), key, value


class ReorderedInside(Model):
    """Rows of the past change places in the graph."""

    def step(self, query: Any, key: Any, value: Any, past_key: Any, past_value: Any) -> Any:
        rows = torch.tensor([1, 0])
        pasts = past_key.index_select(0, rows), past_value.index_select(0, rows)
        key, value = grown(key, value, *pasts)
        return attention(query, key, value), key, value


class Decayed(Model):
    """The past is made smaller at every step."""

    def step(self, query: Any, key: Any, value: Any, past_key: Any, past_value: Any) -> Any:
        key, value = grown(key, value, past_key * 0.9, past_value * 0.9)
        return attention(query, key, value), key, value


class WrittenPast(Model):
    """The past is written in place before it is appended to."""

    def step(self, query: Any, key: Any, value: Any, past_key: Any, past_value: Any) -> Any:
        past_key = past_key.clone()
        past_key[:, :, 0].zero_()
        key, value = grown(key, value, past_key, past_value)
        return attention(query, key, value), key, value


class WrittenInput(Model):
    """The same without a copy of it."""

    def step(self, query: Any, key: Any, value: Any, past_key: Any, past_value: Any) -> Any:
        past_key[:, :, :1].mul_(0.5)
        key, value = grown(key, value, past_key, past_value)
        return attention(query, key, value), key, value


class WrittenNew(Model):
    """New keys are written in place after they were concatenated."""

    def step(self, query: Any, key: Any, value: Any, past_key: Any, past_value: Any) -> Any:
        key = key.contiguous()
        full, value = grown(key, value, past_key, past_value)
        key.mul_(2.0)
        return attention(query, full, value), full, value


class ThreePieces(Model):
    def step(self, query: Any, key: Any, value: Any, past_key: Any, past_value: Any) -> Any:
        key = torch.cat([past_key, key[:, :, :1], key[:, :, 1:]], -2)
        value = torch.cat([past_value, value], -2)
        return attention(query, key, value), key, value


class ScaleOfATensor(Model):
    def step(self, query: Any, key: Any, value: Any, past_key: Any, past_value: Any) -> Any:
        key, value = grown(key, value, past_key, past_value)
        scores = query @ interleaved(key).mT * self.sinks[0]
        return scores.softmax(-1) @ interleaved(value), key, value


class ScaleByHead(Model):
    def step(self, query: Any, key: Any, value: Any, past_key: Any, past_value: Any) -> Any:
        key, value = grown(key, value, past_key, past_value)
        scores = query @ interleaved(key).mT * self.sinks.view(1, -1, 1, 1)
        return scores.softmax(-1) @ interleaved(value), key, value


class OtherReader(Model):
    """Attention weights are read for something else."""

    def step(self, query: Any, key: Any, value: Any, past_key: Any, past_value: Any) -> Any:
        key, value = grown(key, value, past_key, past_value)
        weights = (query @ interleaved(key).mT).softmax(-1)
        kept = weights.amax(-1, keepdim=True)
        return weights @ interleaved(value) * kept, key, value


class NormedAfterwards(Model):
    """Keys are normed after they come from the cache."""

    def step(self, query: Any, key: Any, value: Any, past_key: Any, past_value: Any) -> Any:
        key, value = grown(key, value, past_key, past_value)
        return attention(query, F.normalize(key, dim=-1), value), key, value


class Half(Model):
    """The attention reads half of the keys' channels, and so of the queries'."""

    def step(self, query: Any, key: Any, value: Any, past_key: Any, past_value: Any) -> Any:
        key, value = grown(key, value, past_key, past_value)
        return attention(query[..., :4], key[..., :4], value), key, value


class Shifted(Model):
    """Values are those of the token before."""

    def step(self, query: Any, key: Any, value: Any, past_key: Any, past_value: Any) -> Any:
        key, value = grown(key, value, past_key, past_value)
        return attention(query, key, value.roll(1, 2)), key, value


class Flipped(Model):
    """Keys are read in the other order of tokens."""

    def step(self, query: Any, key: Any, value: Any, past_key: Any, past_value: Any) -> Any:
        key, value = grown(key, value, past_key, past_value)
        return attention(query, key.flip(2), value.flip(2)), key, value


LEFT: dict[type[Model], str] = {
    NewBeforePast: "key is a concatenation of new tokens and of a past behind them",
    ReorderedInside: f"key is {BACK.format('index_select')}",
    Decayed: f"key is {BACK.format('mul')}",
    WrittenPast: f"key is {BACK.format('clone')}",
    WrittenInput: "key is appended to a past that is changed in place by mul_",
    WrittenNew: "key is concatenated from tensors that are changed in place later",
    ThreePieces: "key is a concatenation of 3 tensors, not of past and new",
    ScaleOfATensor: "the scale is computed in the graph",
    ScaleByHead: "the scale is computed in the graph",
    OtherReader: "the attention weights have another reader",
    NormedAfterwards: "key comes from normalize, not from a past + new concatenation on dim -2 "
    "that is returned",
    Half: "key passes through getitem, which is no repeat, transpose or merge of heads",
    Shifted: "value comes from roll, not from a past + new concatenation on dim -2 that is "
    "returned",
    Flipped: "key comes from flip, not from a past + new concatenation on dim -2 that is returned",
}


@pytest.mark.parametrize("kind", LEFT, ids=lambda kind: kind.__name__)
def test_left_alone(kind: type[Model]) -> None:
    module, inputs = kind(), (tokens(3), *past())
    traced = torch.fx.symbolic_trace(module)
    before = format_graph(traced.graph)
    rewritten, report = squat_fx.rewrite(traced, inputs, LOSSLESS)
    assert [skipped.reason for skipped in report.skipped] == [LEFT[kind]]
    assert report.rewritten == 0
    assert format_graph(rewritten.graph) == before


# Rewritten, and right


class KeyUsedElsewhere(Model):
    """Its mean is part of the output."""

    def step(self, query: Any, key: Any, value: Any, past_key: Any, past_value: Any) -> Any:
        key, value = grown(key, value, past_key, past_value)
        out = attention(query, key, value)
        return out + interleaved(key).mean(2, keepdim=True), key, value


class ReadTwice(Model):
    """Two attentions with queries of their own read one cache."""

    def step(self, query: Any, key: Any, value: Any, past_key: Any, past_value: Any) -> Any:
        key, value = grown(key, value, past_key, past_value)
        return attention(query, key, value) - attention(query * 2, key, value), key, value


class Pruned(Model):
    """Only the largest scores count: the mask depends on the scores."""

    def step(self, query: Any, key: Any, value: Any, past_key: Any, past_value: Any) -> Any:
        key, value = grown(key, value, past_key, past_value)
        scores = query @ interleaved(key).mT * 0.3
        least = scores.topk(4, -1).values[..., -1:]
        probs = scores.masked_fill(scores < least, float("-inf")).softmax(-1)
        return probs @ interleaved(value), key, value


class MaskedByValues(Model):
    """Tokens whose values are small are hidden."""

    def step(self, query: Any, key: Any, value: Any, past_key: Any, past_value: Any) -> Any:
        key, value = grown(key, value, past_key, past_value)
        size = interleaved(value).norm(dim=-1)
        seen = (size >= size.mean(-1, keepdim=True)).unsqueeze(2)
        return attention(query, key, value, attn_mask=seen), key, value


class ScaledQueries(Model):
    """By a tensor: that is the queries' matter."""

    def step(self, query: Any, key: Any, value: Any, past_key: Any, past_value: Any) -> Any:
        key, value = grown(key, value, past_key, past_value)
        return attention(query * self.sinks.view(1, -1, 1, 1), key, value), key, value


class ReturnsViews(Model):
    """A view of the cache goes back as well, and the past as it came."""

    def step(self, query: Any, key: Any, value: Any, past_key: Any, past_value: Any) -> Any:
        key, value = grown(key, value, past_key, past_value)
        out = attention(query, key, value) + interleaved(key)[:, :, -1:] - past_value.mean()
        return out, key, value


class SharedPast(Model):
    """The old values are read beside the new cache."""

    def step(self, query: Any, key: Any, value: Any, past_key: Any, past_value: Any) -> Any:
        out = attention(query, past_key, past_value)
        key, value = grown(key, value, past_key, past_value)
        return out + attention(query, key, value), key, value


RIGHT = (
    KeyUsedElsewhere, ReadTwice, Pruned, MaskedByValues, ScaledQueries, ReturnsViews, SharedPast,
)  # fmt: skip


@pytest.mark.parametrize("kind", RIGHT)
def test_rewritten_and_right(kind: type[Model]) -> None:
    module = kind()
    traced = torch.fx.symbolic_trace(module)
    rewritten, report = squat_fx.rewrite(traced, (tokens(3), *past()), LOSSLESS)
    assert report.rewritten >= 1, str(report)
    found, expected = past(), past()
    with torch.no_grad():
        for seed, count in enumerate(STEPS):
            x = tokens(count, seed)
            (out, *found), (wanted, *expected) = rewritten(x, *found), module(x, *expected)
            torch.testing.assert_close(out, wanted)
    assert all(isinstance(x, QuantizedKV) for x in found)
    torch.testing.assert_close([x.dequantize() for x in found], expected)


class TransposedBack(Model):
    """Kept as ``[B, T, H, D]``, appended to and read as ``[B, H, T, D]``."""

    def step(self, query: Any, key: Any, value: Any, past_key: Any, past_value: Any) -> Any:
        key, value = grown(key, value, past_key.transpose(1, 2), past_value.transpose(1, 2))
        return attention(query, key, value), key.transpose(1, 2), value.transpose(1, 2)


def test_a_cache_that_is_turned_before_and_after() -> None:
    module, turned = TransposedBack(), [x.transpose(1, 2).contiguous() for x in past()]
    traced = torch.fx.symbolic_trace(module)
    rewritten, report = squat_fx.rewrite(traced, (tokens(3), *turned), LOSSLESS)
    found, expected = turned, turned
    with torch.no_grad():
        for seed, count in enumerate(STEPS):
            x = tokens(count, seed)
            (out, *found), (wanted, *expected) = rewritten(x, *found), module(x, *expected)
            torch.testing.assert_close(out, wanted)
    assert report.rewritten == 1, str(report)
    assert [x.shape for x in found] == [x.shape for x in expected]
