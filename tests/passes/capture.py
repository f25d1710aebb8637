"""Small cached attentions, the ways to capture them, and what the pass tests ask of the result."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.fx.experimental.proxy_tensor import make_fx

import squat_fx
from squat_fx import Config, Report
from squat_fx.codecs import Lossless
from squat_fx.passes import GraphPass, Rewriting, Skipped
from squat_fx.passes.format import format_graph
from squat_fx.standalone import _carriers, _propagate_shapes
from tests.conftest import randn

BATCH, HEADS, KV_HEADS, HEAD_DIM, WIDTH = 2, 4, 2, 8, 16
PAST = 7
STEPS = (1, 3, 1, 1, 3, 1, 1, 1)
LOSSLESS = Config(codec=Lossless(group_size=4), residual_length=4, sink_length=2, inner="eager")

Attend = Callable[[Any, Any, Any, Any, Any], Any]  # (module, query, key, value, mask) -> output


def sdpa(module: Any, query: Any, key: Any, value: Any, mask: Any) -> Any:
    """The plainest attention: grouped heads left to the op, no mask."""
    return F.scaled_dot_product_attention(query, key, value, enable_gqa=True)


class Cached(nn.Module):
    """One attention over past and new tokens, ``attend`` written as a test likes it."""

    def __init__(self, attend: Attend = sdpa, heads: int = HEADS, kv_heads: int = KV_HEADS) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.attend = attend
        self.kv_heads = kv_heads
        self.query = nn.Linear(WIDTH, heads * HEAD_DIM)
        self.key = nn.Linear(WIDTH, kv_heads * HEAD_DIM)
        self.value = nn.Linear(WIDTH, kv_heads * HEAD_DIM)
        self.sinks = nn.Parameter(torch.randn(heads))
        self.softmax = nn.Softmax(dim=-1)
        self.dropout = nn.Dropout(0.5)
        self.eval()

    def heads(self, projection: nn.Linear, x: Any) -> Any:
        """``[batch, tokens, width]`` to ``[batch, heads, tokens, head_dim]``."""
        return projection(x).unflatten(-1, (-1, HEAD_DIM)).transpose(1, 2)

    def forward(self, x: Any, past_key: Any, past_value: Any, mask: Any = None) -> Any:
        """``output, key, value``."""
        query = self.heads(self.query, x)
        key = torch.cat([past_key, self.heads(self.key, x)], -2)
        value = torch.cat([past_value, self.heads(self.value, x)], -2)
        return self.attend(self, query, key, value, mask), key, value


class Prefill(Cached):
    """The same without a past: keys and values are returned as they were made."""

    def forward(self, x: Any, mask: Any = None) -> Any:
        query, key, value = (self.heads(p, x) for p in (self.query, self.key, self.value))
        return self.attend(self, query, key, value, mask), key, value


def past(kv_heads: int = KV_HEADS, tokens: int = PAST) -> tuple[Tensor, Tensor]:
    """A dense past."""
    shape = (BATCH, kv_heads, tokens, HEAD_DIM)
    return randn(*shape, seed=1), randn(*shape, seed=2)


def tokens(count: int, seed: int = 0) -> Tensor:
    """``count`` hidden states."""
    return randn(BATCH, count, WIDTH, seed=seed)


def examples(module: Cached, *more: Any) -> tuple[Any, ...]:
    """Example inputs of a :class:`Cached` with three new tokens."""
    return (tokens(3), *past(module.kv_heads), *more)


def symbolic(module: nn.Module, *_: Any) -> fx.GraphModule:
    """Capture by ``fx.symbolic_trace``."""
    return fx.symbolic_trace(module)


def aten(module: nn.Module, *inputs: Any) -> fx.GraphModule:
    """Capture by ``make_fx``."""
    with torch.no_grad():
        trace = make_fx(module, tracing_mode="symbolic", _allow_non_fake_inputs=True)
        return trace(*inputs)


def analysed(module: nn.Module, inputs: tuple[Any, ...], *passes: type[GraphPass]) -> Rewriting:
    """Capture ``module`` and run only ``passes``."""
    graph_module = fx.symbolic_trace(module)
    placeholders = tuple(graph_module.graph.find_nodes(op="placeholder"))
    missing = [None] * (len(placeholders) - len(inputs))
    _propagate_shapes(graph_module, [*inputs, *missing])
    carriers = _carriers(graph_module.graph)
    rewriting = Rewriting(graph_module, LOSSLESS, carriers, placeholders=placeholders)
    for graph_pass in passes:
        graph_pass()(rewriting)
    return rewriting


def rewrite(
    module: nn.Module, *inputs: Any, capture: Callable[..., fx.GraphModule] = symbolic
) -> tuple[nn.Module, Report]:
    """``squat_fx.rewrite`` with a lossless cache whose groups are soon full."""
    return squat_fx.rewrite(capture(module, *inputs), inputs, LOSSLESS)


def left_alone(module: nn.Module, *inputs: Any) -> list[Skipped]:
    """What was skipped, where nothing was rewritten and the text of the graph is as it was."""
    graph_module = fx.symbolic_trace(module)
    before = format_graph(graph_module.graph)
    after, report = squat_fx.rewrite(graph_module, inputs, LOSSLESS)
    assert report.rewritten == 0
    assert format_graph(after.graph) == before
    return report.skipped


def run_steps(
    call: Callable[..., Any],
    kv_heads: int = KV_HEADS,
    mask_of: Callable[[int, int], Tensor] | None = None,
    steps: tuple[int, ...] = STEPS,
) -> tuple[Tensor, Tensor, Tensor]:
    """The outputs of a loop in which each step gets the last cache, and the final cache."""
    key, value = past(kv_heads)
    outputs = []
    for seed, count in enumerate(steps):
        mask = () if mask_of is None else (mask_of(count, key.shape[2] + count),)
        with torch.no_grad():
            out, key, value = call(tokens(count, seed), key, value, *mask)
        outputs.append(out)
    return torch.cat(outputs, 2), dense(key), dense(value)


def dense(x: Tensor) -> Tensor:
    """The numbers of a cache, packed or not."""
    return x.dequantize() if isinstance(x, squat_fx.QuantizedKV) else x


def assert_same_over_steps(
    module: Cached,
    rewritten: Callable[..., Any],
    mask_of: Callable[[int, int], Tensor] | None = None,
    steps: tuple[int, ...] = STEPS,
) -> None:
    """The law of the lossless codec: the same outputs and the same cache, step by step."""
    expected = run_steps(module, module.kv_heads, mask_of, steps)
    actual = run_steps(rewritten, module.kv_heads, mask_of, steps)
    torch.testing.assert_close(actual, expected)
