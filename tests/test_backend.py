"""The backend as a whole: graph counts, memory, interruptions, fallbacks, options."""

from __future__ import annotations

import copy
import gc
import pickle
import re
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

import squat_fx
from squat_fx import QuantizedKV, backend
from squat_fx.kernels import reference
from squat_fx.passes.spelling import sizes_of
from tests.models import build, greedy, left_padded_batch, prompt

OPTIONS: dict[str, Any] = {"inner": "eager", "residual_length": 8}


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> None:
    torch._dynamo.reset()


def dense_tensors(shape: tuple[int, ...]) -> list[Tensor]:
    """Living plain tensors of ``shape``."""
    gc.collect()
    return [x for x in gc.get_objects() if type(x) is Tensor and tuple(x.shape) == shape]


def test_two_graphs_serve_a_whole_generation_growth_included() -> None:
    expected = build("llama").generate(prompt(1, 10), max_new_tokens=1990, do_sample=False)
    model = squat_fx.compile(build("llama"), codec="none", **OPTIONS)
    out = model.generate(
        prompt(1, 10), max_new_tokens=1990, do_sample=False, return_dict_in_generate=True
    )
    report = squat_fx.report(model)
    assert torch.equal(out.sequences, expected)
    assert [graph.kind for graph in report.graphs] == ["prefill", "decode"]
    assert report.graphs[1].static
    assert report.eager_calls == 0
    assert out.past_key_values.layers[0].keys.shape[2] == 1999


def test_a_graph_of_any_batch_can_be_replayed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Dynamo makes the batch a symbol once a second one comes; all steps of one are alike."""
    replayable: list[bool] = []
    moving = backend._moving_inputs

    def note(rewriting: Any, *args: Any) -> None:
        replayable.append(bool(rewriting.handles))
        moving(rewriting, *args)  # has its own reasons on a CPU

    monkeypatch.setattr(backend, "_moving_inputs", note)
    model = squat_fx.compile(build("llama"), codec="none", cuda_graphs=True, **OPTIONS)
    for batch in (1, 3, 2):
        model.generate(prompt(batch, 20), max_new_tokens=4, do_sample=False)
    kinds = [(g.kind, g.static) for g in squat_fx.report(model).graphs]
    assert kinds.count(("decode", True)) == 1
    assert kinds.count(("decode", False)) == 1
    assert replayable.count(True) == 2


def test_layers_that_are_equally_long_share_a_size(monkeypatch: pytest.MonkeyPatch) -> None:
    lengths: list[set[str]] = []
    original = backend.rewrite_graph

    def note(rewriting: Any) -> Any:
        lengths.append({str(sizes_of(node)[2]) for node in rewriting.carriers})
        return original(rewriting)

    monkeypatch.setattr(backend, "rewrite_graph", note)
    model = squat_fx.compile(build("llama"), codec="none", **OPTIONS)
    greedy(model, 8)
    assert [len(found) for found in lengths] == [0, 1]


def test_caches_that_were_equally_long_once_may_part() -> None:
    def two(x: Tensor, short: tuple[Tensor, Tensor], long: tuple[Tensor, Tensor]) -> Any:
        out, caches = x, []
        for key, value in (short, long):
            key, value = torch.cat([key, x], 2), torch.cat([value, x], 2)
            out = torch.nn.functional.scaled_dot_product_attention(out, key, value)
            caches.append((key, value))
        return out, *caches

    def run(step: Any) -> list[Tensor]:
        generator = torch.Generator().manual_seed(0)
        short, long = ((torch.ones(1, 2, 5, 16),) * 2 for _ in range(2))
        found = []
        with torch.no_grad():
            for i in range(9):
                x = torch.randn((1, 2, 1, 16), generator=generator)
                out, short, long = step(x, short, long)
                found.append(out)
                if i in (3, 6):
                    short = tuple(cache[:, :, :-2] for cache in short)
        return found

    compiled = squat_fx.compile(two, codec="none", **OPTIONS)
    for found, expected in zip(run(compiled), run(two), strict=True):
        torch.testing.assert_close(found, expected)
    assert len(squat_fx.report(compiled).graphs) == 3  # the first, equally long, and apart


def test_arenas_of_one_graph_grow_each_by_itself() -> None:
    """Inductor compiles sizes into its code: those of two arenas must not be taken for one."""

    def tokens(model: Any, grows: bool) -> Tensor:
        cache, ids, out = DynamicCache(config=model.config), prompt(1, 20), []
        for step in range(8):
            with torch.no_grad():
                ids = model(ids, past_key_values=cache, use_cache=True).logits[:, -1:].argmax(-1)
            out.append(ids)
            for index, layer in enumerate(cache.layers if grows and step == 3 else ()):
                layer.keys.writable_storage().reserve(600 * (index + 1))
                layer.values.writable_storage().reserve(2500)
        return torch.cat(out, 1)

    expected = tokens(build("llama"), False)
    model = squat_fx.compile(build("llama"), codec="none", residual_length=8)
    assert torch.equal(tokens(model, True), expected)
    report = squat_fx.report(model)
    assert [graph.kind for graph in report.graphs] == ["prefill", "decode"]
    assert report.eager_calls == 0


def test_inductor_copies_no_arena_and_mutates_them_in_place() -> None:
    from torch._inductor.utils import run_and_get_code

    model = squat_fx.compile(build("llama"), bits=2, residual_length=8)
    _, code = run_and_get_code(
        model.generate, prompt(1, 20), max_new_tokens=12, do_sample=False, pad_token_id=0
    )
    decode = next(text for text in code if "squat_fx.append_both_" in text)
    # Two layers, keys and values: six arenas each go straight from the call's arguments into the
    # op.
    calls = re.findall(r"squat_fx\.append_both_\.planes_token\((.*)\)", decode)
    assert len(calls) == 2
    arenas = [argument for call in calls for argument in call.split(", ")[:12]]
    assert all(re.fullmatch(r"arg\d+_1", argument) for argument in arenas), arenas
    assert len(set(arenas)) == 24
    assert "clone" not in decode.split("def call(")[1]
    assert "copy_(" not in decode.split("def call(")[1]


def test_prefill_leaves_no_dense_past_alive() -> None:
    model = squat_fx.compile(build("llama"), bits=2, **OPTIONS)
    with torch.no_grad():
        out = model(prompt(1, 333), use_cache=True)
    assert isinstance(out.past_key_values.layers[1].values, QuantizedKV)
    assert dense_tensors((1, 2, 333, 16)) == []


@pytest.mark.parametrize("tokens", [1, 5])
@pytest.mark.parametrize("failing_op", ["attend", "write"])
def test_a_run_that_raises_leaves_every_handle_as_it_was(
    monkeypatch: pytest.MonkeyPatch, tokens: int, failing_op: str
) -> None:
    model = squat_fx.compile(build("llama"), bits=2, residual_length=8, inner="eager")
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(prompt(1, 71), past_key_values=cache)
        model(
            prompt(1, tokens, seed=2), past_key_values=copy.deepcopy(cache)
        )  # compiled for this many tokens
        before = [x.dequantize() for layer in cache.layers for x in (layer.keys, layer.values)]
        shapes = [layer.keys.shape for layer in cache.layers]
        run, calls = getattr(reference, failing_op), []

        def failing(*args: Any, **kwargs: Any) -> Any:
            calls.append(1)
            if len(calls) == 2:  # the second layer: the first one has been appended to
                raise KeyboardInterrupt
            return run(*args, **kwargs)

        monkeypatch.setattr(reference, failing_op, failing)
        with pytest.raises(KeyboardInterrupt):
            model(prompt(1, tokens, seed=2), past_key_values=cache)
        monkeypatch.undo()
        after = [x.dequantize() for layer in cache.layers for x in (layer.keys, layer.values)]
        assert [layer.keys.shape for layer in cache.layers] == shapes
        assert all(map(torch.equal, before, after))
        resumed = model(prompt(1, tokens, seed=2), past_key_values=cache).logits
        other = DynamicCache(config=model.config)
        model(prompt(1, 71), past_key_values=other)
        assert torch.equal(resumed, model(prompt(1, tokens, seed=2), past_key_values=other).logits)


def _generate(model: Any) -> tuple[Tensor, Any]:
    out = model.generate(
        prompt(2, 40), max_new_tokens=50, do_sample=False, return_dict_in_generate=True
    )
    return out.sequences, out.past_key_values


@pytest.mark.parametrize("bits", [2, 8])
def test_eager_fallback_gives_the_same_tokens_and_a_small_cache(bits: int) -> None:
    expected, _ = _generate(squat_fx.compile(build("llama"), bits=bits, **OPTIONS))
    model = squat_fx.compile(build("llama"), bits=bits, **OPTIONS)
    with torch.compiler.set_stance("force_eager"):
        actual, cache = _generate(model)
    report = squat_fx.report(model)
    assert report.graphs == []
    assert report.eager_calls == 50
    assert "ran eagerly" in str(report)
    assert torch.equal(actual, expected)
    assert all(
        isinstance(x, QuantizedKV) for layer in cache.layers for x in (layer.keys, layer.values)
    )


def test_eager_fallback_keeps_padding_out_of_the_cache() -> None:
    """With a codec that does not learn from queries, which eager calls do not hand over."""
    codec = squat_fx.codecs.Squat(strength=0.0, smooth=False)
    expected = left_padded_batch(squat_fx.compile(build("llama"), bits=2, codec=codec, **OPTIONS))
    model = squat_fx.compile(build("llama"), bits=2, codec=codec, **OPTIONS)
    with torch.compiler.set_stance("force_eager"):
        assert torch.equal(left_padded_batch(model), expected)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_models_of_one_class_with_different_scales_are_all_rewritten(implementation: str) -> None:
    """Dynamo makes an input of a number that differs between two models."""
    torch._dynamo.reset()
    for scale in (0.25, 0.2, 0.15):
        model = build("llama", implementation)
        for layer in model.model.layers:
            layer.self_attn.scaling = scale
        expected = greedy(model, 20)
        squat_fx.compile(model, codec="none", strict=True, **OPTIONS)
        assert torch.equal(greedy(model, 20), expected)
        kinds = [graph.kind for graph in squat_fx.report(model).graphs]
        assert kinds == ["prefill", "decode"]


def test_a_scale_that_changes_is_seen() -> None:
    def step(query: Any, key: Any, value: Any, past: Any, scale: float) -> Any:
        keys, values = torch.cat([past[0], key], 2), torch.cat([past[1], value], 2)
        out = torch.nn.functional.scaled_dot_product_attention(query, keys, values, scale=scale)
        return out, keys, values

    torch._dynamo.reset()
    packed = squat_fx.compile(step, codec="none", strict=True, **OPTIONS)
    x = torch.randn(1, 2, 3, 16)
    past = (x[:, :, :0], x[:, :, :0])
    with torch.no_grad():
        for scale in (0.25, 0.5, 0.75, 0.25):
            torch.testing.assert_close(
                packed(x, x, x, past, scale)[0], step(x, x, x, past, scale)[0]
            )


def test_a_function_inside_of_another_compilation_runs_outside_of_it() -> None:
    """So nothing of a call need ask whether it is being traced."""
    dense = build("llama")

    def step(ids: Tensor) -> Any:
        out = dense(ids, use_cache=True)
        return out.logits, out.past_key_values

    inner = squat_fx.compile(step, codec="none", **OPTIONS)

    @torch.compile(backend="eager")
    def outer(ids: Tensor) -> tuple[Tensor, Any]:
        logits, cache = inner(ids + 1)
        return logits * 2, cache

    with torch.no_grad():
        found, cache = outer(prompt(1, 40))
        assert torch.equal(found, 2 * dense(prompt(1, 40) + 1).logits)
    assert all(isinstance(layer.keys, QuantizedKV) for layer in cache.layers)
    assert [graph.kind for graph in squat_fx.report(inner).graphs] == ["prefill"]


def test_a_failure_while_compiling_runs_the_model_as_it_was_and_says_so(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    expected = greedy(build("llama"), 16)

    def broken(*_: Any) -> None:
        raise RuntimeError("no such luck")

    monkeypatch.setattr("squat_fx.backend.run_pipeline", broken)
    model = squat_fx.compile(build("llama"), codec="none", **OPTIONS)
    assert torch.equal(greedy(model, 16), expected)
    assert "no such luck" in str(squat_fx.report(model))
    strict = squat_fx.compile(build("llama"), codec="none", strict=True, **OPTIONS)
    with pytest.raises(Exception, match="no such luck"):
        greedy(strict, 16)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_copy_of_a_compiled_model_is_uncompiled_and_says_so(duplicate: Any) -> None:
    model = squat_fx.compile(build("llama"), bits=2, **OPTIONS)
    greedy(model, 4)
    copied = duplicate(model)
    out = copied.generate(prompt(1, 9), max_new_tokens=4, return_dict_in_generate=True)
    assert not isinstance(out.past_key_values.layers[0].keys, QuantizedKV)
    assert "copies run uncompiled" in str(squat_fx.report(copied))
    assert "copies run uncompiled" not in str(squat_fx.report(model))


def test_gradients_leave_the_model_alone_with_a_reason() -> None:
    model = squat_fx.compile(build("llama"), bits=2, **OPTIONS)
    out = model(prompt(1, 9), labels=prompt(1, 9), use_cache=True)
    out.loss.backward()
    assert model.model.layers[0].self_attn.k_proj.weight.grad is not None
    assert "torch.no_grad()" in str(squat_fx.report(model))


def test_a_mask_that_grows_needs_two_dynamic_graphs_and_the_report_says_why() -> None:
    model = squat_fx.compile(build("llama"), codec="none", **OPTIONS)
    left_padded_batch(model)
    graphs = squat_fx.report(model).graphs
    assert [graph.kind for graph in graphs] == ["prefill", "decode"]
    assert not graphs[1].static
    assert "attention_mask" in graphs[1].notes[0]


def test_a_plain_loop_leaves_no_size_symbol_in_the_decode_graph() -> None:
    def loop(model: Any) -> Tensor:
        cache, token, out = DynamicCache(config=model.config), prompt(1, 12), []
        with torch.no_grad():
            for _ in range(40):
                token = model(token, past_key_values=cache).logits[:, -1:].argmax(-1)
                out.append(token)
        return torch.cat(out, 1)

    expected = loop(build("gpt2"))
    torch._dynamo.reset()
    model = squat_fx.compile(build("gpt2"), codec="none", **OPTIONS)
    assert torch.equal(loop(model), expected)
    assert [(g.kind, g.static) for g in squat_fx.report(model).graphs] == [
        ("prefill", True),
        ("decode", True),
    ]


def test_many_generations_stay_compiled() -> None:
    model = squat_fx.compile(build("llama"), codec="none", **OPTIONS)
    for batch, length in (
        (1, 5),
        (2, 9),
        (3, 17),
        (1, 33),
        (4, 6),
        (2, 50),
        (5, 11),
        (1, 80),
        (3, 40),
        (6, 7),
    ):
        model.generate(prompt(batch, length), max_new_tokens=3, do_sample=False)
    assert squat_fx.report(model).eager_calls == 0


def test_the_backend_is_found_by_name_without_an_import() -> None:
    program = """
import torch
def step(x, past_key, past_value):
    key, value = torch.cat([past_key, x], dim=2), torch.cat([past_value, -x], dim=2)
    return torch.nn.functional.scaled_dot_product_attention(x, key, value), key, value
empty = torch.randn(1, 2, 0, 16)
compiled = torch.compile(step, backend="squat", options={"bits": 2, "inner": "eager"})
with torch.no_grad():
    out, *past = compiled(torch.randn(1, 2, 40, 16), empty, empty)
    out, *past = compiled(torch.randn(1, 2, 1, 16), *past)
print(type(past[0]).__name__, tuple(past[0].shape))
try:
    torch.compile(step, backend="squat", options={"bit": 2})(empty, empty, empty)
except Exception as error:
    print(str(error))
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert "QuantizedKV (1, 2, 41, 16)" in done.stdout
    assert "unknown option 'bit'; did you mean 'bits'?" in done.stdout


def test_without_a_cpp_compiler_graphs_run_eagerly_with_one_warning(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from squat_fx import backend

    backend._warn_no_compiler.cache_clear()
    monkeypatch.setattr(backend, "_has_cpp_compiler", lambda: False)
    model = squat_fx.compile(build("llama"), bits=2)
    with pytest.warns(UserWarning, match="install g\\+\\+ or clang") as caught:
        greedy(model, 8)
    assert sum("C++ compiler" in str(w.message) for w in caught) == 1
    assert {g.inner for g in squat_fx.report(model).graphs} == {"eager"}


def test_bits_by_layer_and_skipped_layers() -> None:
    model = squat_fx.compile(
        build("llama"), bits=2, layer_bits={0: (4, 3)}, skip_layers=[-1], **OPTIONS
    )
    out = model.generate(prompt(1, 20), max_new_tokens=4, return_dict_in_generate=True)
    first, last = out.past_key_values.layers
    assert (first.keys.format.widths, first.values.format.widths) == ((4,), (3,))
    assert type(last.keys) is Tensor
    assert "the layer is in skip_layers" in str(squat_fx.report(model))


def test_strict_raises_where_an_attention_is_left_alone() -> None:
    model = squat_fx.compile(build("llama"), bits=2, strict=True, skip_layers=(1,), **OPTIONS)
    with pytest.raises(Exception, match="the layer is in skip_layers"):
        greedy(model, 4)


def test_explain_runs_a_copy_of_nothing_and_names_every_layer() -> None:
    model = build("gemma2")
    report = squat_fx.explain(model, {"input_ids": prompt(1, 12)}, skip_layers=(0,))
    assert model._compiled_call_impl is None
    assert {graph.kind for graph in report.graphs} == {"prefill", "decode"}
    assert "left alone, layers 0: " in str(report)
    assert "  layers 1: keys" in str(report)


def _by_squat_fx(model: Any) -> Any:
    return squat_fx.compile(model, bits=2, **OPTIONS)


def _by_model_compile(model: Any) -> Any:
    model.compile(backend="squat", options={"inner": "eager"})
    return model


def _by_forward(model: Any) -> Any:
    model.forward = torch.compile(model.forward, backend="squat", options={"inner": "eager"})
    return model


def _by_torch_compile(model: Any) -> Any:
    return torch.compile(model, backend="squat", options={"inner": "eager"})


@pytest.mark.parametrize(
    ("compiled", "reached"),
    [
        (_by_squat_fx, True),
        (_by_model_compile, True),
        (_by_forward, True),
        (_by_torch_compile, False),
    ],
)
def test_which_calls_of_generate_reach_the_backend(compiled: Any, reached: bool) -> None:
    out = compiled(build("llama")).generate(
        prompt(1, 12), max_new_tokens=3, do_sample=False, return_dict_in_generate=True
    )
    assert isinstance(out.past_key_values.layers[0].keys, QuantizedKV) == reached


def test_calling_what_torch_compile_returned_reaches_the_backend() -> None:
    with torch.no_grad():
        out = _by_torch_compile(build("llama"))(prompt(1, 12), use_cache=True)
    assert isinstance(out.past_key_values.layers[0].keys, QuantizedKV)
