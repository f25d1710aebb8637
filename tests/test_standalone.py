"""Bare graphs, however they were captured: rewritten, they answer as the model does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

import squat_fx
from squat_fx import Config, NotRewritten, QuantizedKV
from tests.conftest import randn
from tests.passes.capture import (
    BATCH,
    LOSSLESS,
    STEPS,
    Cached,
    Prefill,
    assert_same_over_steps,
    aten,
    dense,
    examples,
    past,
    run_steps,
    symbolic,
    tokens,
)
from tests.passes.spellings import llama, sdpa_masked


def exported(module: nn.Module, *inputs: Any) -> fx.GraphModule:
    """Capture by ``torch.export``, batch and tokens dynamic where the model allows it."""
    auto = torch.export.Dim.AUTO
    names = ("x", "past_key", "past_value", "mask")
    dims = ({0: auto, 1: auto}, {0: auto, 2: auto}, {0: auto, 2: auto}, {2: auto, 3: auto})
    shapes = dict(zip(names[: len(inputs)], dims, strict=False))
    return torch.export.export(module, inputs, dynamic_shapes=shapes).module()


def rewrite(
    module: nn.Module,
    *inputs: Any,
    capture: Callable[..., fx.GraphModule] = symbolic,
    config: Config = LOSSLESS,
) -> nn.Module:
    rewritten, report = squat_fx.rewrite(capture(module, *inputs), inputs, config)
    assert report.rewritten == 1, str(report)
    return rewritten


@pytest.mark.parametrize("capture", [symbolic, aten, exported])
@pytest.mark.parametrize("attend", [Cached().attend, llama])
def test_a_loop_of_steps_of_one_and_three_tokens(attend: Any, capture: Any) -> None:
    module = Cached(attend)
    rewritten = rewrite(module, *examples(module), capture=capture)
    assert_same_over_steps(module, rewritten, steps=STEPS * 2)


def padded(query_len: int, kv_len: int) -> Tensor:
    """Causal; the rows begin with 0 and 5 tokens of padding."""
    causal = torch.ones(query_len, kv_len, dtype=torch.bool).tril(kv_len - query_len)
    pads = torch.arange(BATCH)[:, None, None, None] * 5
    return causal & (torch.arange(kv_len) >= pads)


@pytest.mark.parametrize("capture", [symbolic, aten, exported])
def test_rows_of_different_lengths(capture: Any) -> None:
    first, then = Prefill(sdpa_masked), Cached(sdpa_masked)
    prefill, _ = squat_fx.rewrite(symbolic(first), (tokens(9), padded(9, 9)), LOSSLESS)
    decode = rewrite(then, *examples(then, padded(3, 10)), capture=capture)
    with torch.no_grad():
        _, *expected = first(tokens(9), padded(9, 9))
        _, *actual = prefill(tokens(9), padded(9, 9))
        for seed, count in enumerate(STEPS):
            mask = padded(count, expected[0].shape[2] + count)
            wanted, *expected = then(tokens(count, seed), *expected, mask)
            out, *actual = decode(tokens(count, seed), *actual, mask)
            torch.testing.assert_close(out, wanted)
    start = actual[0]._storage["start"]
    assert start.tolist() == [0, 5]
    torch.testing.assert_close(dense(actual[0])[1, :, 5:], expected[0][1, :, 5:])


def test_a_dense_cache_is_packed() -> None:
    rewritten = rewrite(Cached(), *examples(Cached()), config=Config(bits=2))
    out, key, value = rewritten(tokens(1), *past(tokens=100))
    assert isinstance(key, QuantizedKV)
    assert isinstance(value, QuantizedKV)
    assert (key.role, value.role) == ("key", "value")
    assert key.shape == (BATCH, 2, 101, 8)
    assert out.shape == (BATCH, 4, 1, 8)
    _, again, _ = rewritten(tokens(3), key, value)
    assert again.shape[2] == 104


def test_the_graph_that_was_given_is_left_as_it_was() -> None:
    graph_module = symbolic(Cached())
    code = graph_module.code
    squat_fx.rewrite(graph_module, examples(Cached()), LOSSLESS)
    assert graph_module.code == code
    torch.testing.assert_close(run_steps(graph_module), run_steps(Cached()))


def test_a_call_with_gradients_enabled_returns_none() -> None:
    rewritten = rewrite(Prefill(), tokens(3))
    out, key, _ = rewritten(tokens(3))
    assert not out.requires_grad
    assert isinstance(key, QuantizedKV)


def test_inputs_by_name() -> None:
    rewritten = rewrite(Cached(), *examples(Cached()))
    x, key, value = examples(Cached())
    expected = rewritten(x, key, value)[0]
    torch.testing.assert_close(rewritten(x, past_value=value, past_key=key)[0], expected)


@pytest.mark.parametrize(("capture", "batch"), [(aten, 2), (exported, r"\?")])
def test_a_graph_with_one_new_token_fixed(capture: Any, batch: Any) -> None:
    inputs = (tokens(1), *past())
    rewritten = rewrite(Cached(), *inputs, capture=capture)
    assert_same_over_steps(Cached(), rewritten, steps=(1,) * 9)
    with pytest.raises(ValueError, match=rf"captured for \[{batch}, 1, 16\]; capture it with"):
        rewritten(tokens(3), *past())


def test_a_call_of_another_shape() -> None:
    rewritten = rewrite(Cached(), *examples(Cached()))
    with pytest.raises(ValueError, match=r"input 'past_key' has shape \(2, 3, 7, 8\), but the"):
        rewritten(tokens(1), *past(kv_heads=3))


def test_a_call_with_other_inputs() -> None:
    rewritten = rewrite(Cached(), *examples(Cached()))
    with pytest.raises(ValueError, match="expected 4 inputs, got 5"):
        rewritten(*examples(Cached()), None, None)
    with pytest.raises(ValueError, match="unexpected input 'past'; the inputs are x, past_key"):
        rewritten(tokens(1), past=past())
    with pytest.raises(ValueError, match="input 'past_value' is missing"):
        rewritten(tokens(1), past()[0])


def test_examples_that_do_not_fit_the_graph() -> None:
    with pytest.raises(ValueError, match=r"example inputs of shape \[2, 3, 16\], \[2, 3, 7, 8\]"):
        squat_fx.rewrite(symbolic(Cached()), (tokens(3), *past(kv_heads=3)), LOSSLESS)
    with pytest.raises(ValueError, match="the graph has 4 inputs, got 5 example inputs"):
        squat_fx.rewrite(symbolic(Cached()), (*examples(Cached()), None, None), LOSSLESS)


def test_strict_raises_the_reasons() -> None:
    def attend(_: Any, query: Any, key: Any, value: Any, mask: Any) -> Any:
        key, value = (x.repeat_interleave(2, 1) for x in (key.roll(1, 1), value))
        return torch.softmax(query @ key.mT, -1) @ value

    config = Config(codec="none", strict=True)
    with pytest.raises(NotRewritten, match="key comes from roll, not from a past"):
        squat_fx.rewrite(symbolic(Cached(attend)), examples(Cached()), config)


def test_a_graph_without_attention_runs_as_it_was() -> None:
    rewritten, report = squat_fx.rewrite(symbolic(nn.Linear(4, 3)), (randn(2, 4),))
    assert report.rewritten == 0
    assert report.skipped == []
    assert rewritten(randn(5, 4)).shape == (5, 3)
