"""Rotary embeddings as people write them and as models of transformers do, and what is beside."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
import transformers
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.passes.fake_tensor_prop import FakeTensorProp

from squat_fx.layouts.rotary import Pairing, Rotation, rearranged
from squat_fx.passes import CacheEdge, Canonicalize, FindCacheEdges, Rewriting
from squat_fx.passes.find_rotary import find_rotary
from squat_fx.passes.records import Rotary
from squat_fx.standalone import _carriers, _propagate_shapes
from tests.conftest import randn
from tests.passes.capture import (
    BATCH,
    HEAD_DIM,
    KV_HEADS,
    LOSSLESS,
    Cached,
    aten,
    past,
    sdpa,
    tokens,
)

NONE = "no rotary embedding before the cache"
CHANGED = "the key is changed again between its rotation and the cache, as by a norm"
UNKNOWN = "what makes the key is not understood as a rotary embedding"


class Recorder(fx.Interpreter):
    """Runs a graph and keeps what every node was."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module, garbage_collect_values=False)
        self.values: dict[fx.Node, Any] = {}

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        self.values[n] = value.clone() if isinstance(value, Tensor) else value
        return value


def key_edges(module: fx.GraphModule) -> list[CacheEdge]:
    placeholders = tuple(module.graph.find_nodes(op="placeholder"))
    rewriting = Rewriting(module, LOSSLESS, _carriers(module.graph), placeholders=placeholders)
    for graph_pass in (Canonicalize, FindCacheEdges):
        graph_pass()(rewriting)
    return [site.key for site in rewriting.sites]


def assert_reproduces(found: Rotary, values: dict[fx.Node, Any]) -> None:
    """The law: what the record says makes the cached key of the key before, and undoes it."""
    key = rearranged(values[found.key], found.key_dims)
    cos, sin = (rearranged(values[node], found.cos_dims) for node in (found.cos, found.sin))
    rotated = values[found.rotated]
    assert torch.equal(found.rotation.apply(key, cos, sin).to(rotated.dtype), rotated)
    tolerance = 1e-2 if rotated.dtype == torch.float16 else 1e-4
    undone = found.rotation.invert(rotated, cos, sin)
    torch.testing.assert_close(undone, key.to(rotated.dtype), rtol=tolerance, atol=tolerance)
    if found.angles is not None:
        assert_angles(found, cos, values)


def assert_angles(found: Rotary, cos: Tensor, values: dict[fx.Node, Any]) -> None:
    angles = found.angles
    assert angles is not None
    numbers = rearranged(values[angles.node], angles.dims)
    expected = found.rotation.per_channel(angles.scaling * numbers.cos())
    torch.testing.assert_close(found.rotation.per_channel(cos), expected)
    if angles.positions is not None and angles.inv_freq is not None:
        positions = values[angles.positions].reshape(*numbers.shape[:-1], 1)
        torch.testing.assert_close(positions * values[angles.inv_freq].flatten(), numbers)


def recorded(
    function: Callable[..., Any], calls: list[tuple[Any, ...]], dynamic: bool | None = None
) -> list[tuple[fx.GraphModule, dict[fx.Node, Any]]]:
    """Dynamo's graphs of ``calls``, and what their nodes were."""
    torch._dynamo.reset()
    found: list[tuple[fx.GraphModule, dict[fx.Node, Any]]] = []

    def backend(module: fx.GraphModule, _: Any) -> Callable[..., Any]:
        recorder = Recorder(module)
        found.append((module, recorder.values))
        return lambda *args: recorder.run(*args)

    compiled = torch.compile(function, backend=backend, dynamic=dynamic)
    with torch.no_grad():
        for inputs in calls:
            compiled(*inputs)
    return found


# spellings ----------------------------------------------------------------------------------------

Rope = Callable[[Any, Any, Any], Any]  # (key, cos, sin) of [batch, heads, tokens, channels]


class Rotated(Cached):
    """One attention whose key goes through ``rope`` before it is cached."""

    def __init__(self, rope: Rope) -> None:
        super().__init__(sdpa)
        self.rope = rope

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, x: Any, past_key: Any, past_value: Any, cos: Any, sin: Any
    ) -> Any:
        key = self.rope(self.heads(self.key, x), cos, sin)
        key = torch.cat([past_key, key], -2)
        value = torch.cat([past_value, self.heads(self.value, x)], -2)
        return sdpa(self, self.heads(self.query, x), key, value, None), key, value


def quarter(x: Any) -> Any:
    half = HEAD_DIM // 2
    return torch.cat((-x[..., half:], x[..., :half]), dim=-1)


def sliced(key: Any, cos: Any, sin: Any) -> Any:
    return key * cos + quarter(key) * sin


def chunked(key: Any, cos: Any, sin: Any) -> Any:
    first, second = key.chunk(2, dim=-1)
    return torch.cat([-second, first], -1).mul(sin).add(cos.mul(key))


def split(key: Any, cos: Any, sin: Any) -> Any:
    first, second = torch.split(key, HEAD_DIM // 2, -1)
    return torch.add(key * cos, torch.cat([second.neg(), first], -1) * sin)


def half_tables(key: Any, cos: Any, sin: Any) -> Any:
    """GPT-OSS."""
    cos, sin = cos[..., : HEAD_DIM // 2], sin[..., : HEAD_DIM // 2]
    first, second = torch.chunk(key, 2, -1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)


def tables_sliced_apart(key: Any, cos: Any, sin: Any) -> Any:
    half = HEAD_DIM // 2
    first, second = key[..., :half], key[..., half:]
    one = first * cos[..., :half] - second * sin[..., :half]
    return torch.cat([one, second * cos[..., half:] + first * sin[..., half:]], -1)


def backwards(key: Any, cos: Any, sin: Any) -> Any:
    """Nanochat: turns by minus the angle."""
    first, second = key.chunk(2, -1)
    return key * cos + torch.cat([second, -first], -1) * sin


def in_float(key: Any, cos: Any, sin: Any) -> Any:
    return sliced(key.float(), cos.float(), sin.float()).to(torch.float32)


def tokens_first(key: Any, cos: Any, sin: Any) -> Any:
    """The rotation lies before the transpose to heads first."""
    key = key.transpose(1, 2).contiguous()
    return sliced(key, cos.transpose(1, 2), sin.transpose(1, 2)).permute(0, 2, 1, 3)


def stacked(key: Any, cos: Any, sin: Any) -> Any:
    """GPT-J, Cohere."""
    turned = torch.stack((-key[..., 1::2], key[..., ::2]), dim=-1).flatten(-2)
    return key * cos + turned * sin


def paired(key: Any, cos: Any, sin: Any) -> Any:
    """Pairs as a dim of their own, a number for each."""
    pairs = key.unflatten(-1, (-1, 2))
    first, second = pairs.unbind(-1)
    cos, sin = cos[..., ::2], sin[..., ::2]
    return torch.stack([first * cos - second * sin, second * cos + first * sin], -1).flatten(3)


def partial(key: Any, cos: Any, sin: Any) -> Any:
    """GPT-NeoX, Phi: the first channels turn."""
    turning, rest = key[..., :4], key[..., 4:]
    turned = torch.cat([-turning[..., 2:], turning[..., :2]], -1)
    return torch.cat([turning * cos[..., :4] + turned * sin[..., :4], rest], -1)


def partial_pairs(key: Any, cos: Any, sin: Any) -> Any:
    """GLM."""
    turning, rest = key.split([4, 4], -1)
    cos, sin = (x[..., :2].repeat_interleave(2, -1) for x in (cos, sin))
    turned = torch.stack([-turning[..., 1::2], turning[..., ::2]], -1).flatten(-2)
    return torch.cat([turning * cos + turned * sin, rest], -1)


SPELLINGS: dict[Rope, tuple[Pairing, int, int]] = {
    sliced: ("halves", 8, 1),
    chunked: ("halves", 8, 1),
    split: ("halves", 8, 1),
    half_tables: ("halves", 8, 1),
    tables_sliced_apart: ("halves", 8, 1),
    backwards: ("halves", 8, -1),
    in_float: ("halves", 8, 1),
    tokens_first: ("halves", 8, 1),
    stacked: ("interleaved", 8, 1),
    paired: ("interleaved", 8, 1),
    partial: ("halves", 4, 1),
    partial_pairs: ("interleaved", 4, 1),
}
Capture = Callable[..., fx.GraphModule]


def inputs_of(count: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    tables = (randn(1, 1, count, HEAD_DIM, seed=s) for s in (3, 4))
    return tuple(x.to(dtype) for x in (tokens(count), *past(), *tables))


def static(module: Any, *inputs: Tensor) -> fx.GraphModule:
    """Captured by ``fx.symbolic_trace``, all sizes fixed."""
    graph_module = fx.symbolic_trace(module)
    with torch.no_grad():
        FakeTensorProp(graph_module, FakeTensorMode(allow_non_fake_inputs=True)).propagate(*inputs)
    return graph_module


def dynamic(module: Any, *inputs: Tensor) -> fx.GraphModule:
    """Captured by ``fx.symbolic_trace``, no size fixed."""
    graph_module = fx.symbolic_trace(module)
    _propagate_shapes(graph_module, list(inputs))
    return graph_module


def find(
    rope: Rope, capture: Capture = static, dtype: torch.dtype = torch.float32
) -> tuple[Rotary | str, dict[fx.Node, Any]]:
    """What is found before the cache of ``Rotated(rope)``, and what its nodes are."""
    module, inputs = Rotated(rope).to(dtype), inputs_of(3, dtype)
    graph_module = capture(module, *inputs)
    (edge,) = key_edges(graph_module)
    recorder = Recorder(graph_module)
    with torch.no_grad():
        recorder.run(*inputs)
    return find_rotary(edge), recorder.values


def assert_read(rope: Rope, capture: Capture) -> None:
    found, values = find(rope, capture)
    assert isinstance(found, Rotary), found
    pairing, rotary_dim, sign = SPELLINGS[rope]
    assert found.rotation == Rotation(rotary_dim, pairing, sign, torch.float32)
    assert_reproduces(found, values)


@pytest.mark.parametrize("rope", SPELLINGS, ids=lambda rope: rope.__name__)
def test_spelling_is_read(rope: Rope) -> None:
    assert_read(rope, static)


@pytest.mark.parametrize("capture", [dynamic, aten])
@pytest.mark.parametrize("rope", [split, paired, partial, tokens_first], ids=lambda f: f.__name__)
def test_spelling_is_read_whatever_captured_it(rope: Rope, capture: Capture) -> None:
    assert_read(rope, capture)


def test_a_key_cast_for_its_rotation_is_found_as_the_cache_keeps_it() -> None:
    def rope(key: Any, cos: Any, sin: Any) -> Any:
        return sliced(key.float(), cos, sin).half()

    found, values = find(rope, dtype=torch.float16)
    assert isinstance(found, Rotary), found
    assert values[found.key].dtype == torch.float16
    assert found.rotation.dtype == torch.float32
    assert_reproduces(found, values)


def test_a_long_prompt_is_not_computed_to_be_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sizes that tracing fixed become small, those in arguments of views among them."""

    def reshaped(key: Any, cos: Any, sin: Any) -> Any:
        shape = (BATCH, KV_HEADS, 500, HEAD_DIM)
        return (key.reshape(*shape) * cos + quarter(key) * sin).view(shape)

    largest: list[int] = []
    randn_of_torch = torch.randn

    def measured(shape: Any, **options: Any) -> Tensor:
        numbers = randn_of_torch(shape, **options)
        largest.append(numbers.numel())
        return numbers

    module, inputs = Rotated(reshaped), inputs_of(500)
    ((graph_module, _),) = recorded(module, [inputs], dynamic=False)
    (edge,) = key_edges(graph_module)
    monkeypatch.setattr(torch, "randn", measured)
    assert isinstance(find_rotary(edge), Rotary)
    assert max(largest) < 31 * BATCH * KV_HEADS * HEAD_DIM + 1


def test_a_rotation_of_the_first_tokens_is_none_of_a_long_prompt() -> None:
    def first_tokens(key: Any, cos: Any, sin: Any) -> Any:
        return torch.cat([sliced(key, cos, sin)[:, :, :100], key[:, :, 100:]], 2)

    ((graph_module, _),) = recorded(Rotated(first_tokens), [inputs_of(500)], dynamic=False)
    (edge,) = key_edges(graph_module)
    assert find_rotary(edge) == CHANGED


# near misses --------------------------------------------------------------------------------------


def unrotated(key: Any, cos: Any, sin: Any) -> Any:
    return key


def normed(key: Any, cos: Any, sin: Any) -> Any:
    return key * torch.rsqrt(key.pow(2).mean(-1, keepdim=True)) * cos[..., :1, :]


def normed_after(key: Any, cos: Any, sin: Any) -> Any:
    return normed(sliced(key, cos, sin), cos, sin)


def rounded(key: Any, cos: Any, sin: Any) -> Any:
    return sliced(key.to(torch.int8).to(torch.float32), cos, sin).to(torch.int8).float()


def mirrored(key: Any, cos: Any, sin: Any) -> Any:
    """Without the minus sign: no rotation."""
    first, second = key.chunk(2, -1)
    return key * cos + torch.cat([second, first], -1) * sin


def twice_cosine(key: Any, cos: Any, sin: Any) -> Any:
    return key * cos + quarter(key) * cos


def scaled(key: Any, cos: Any, sin: Any) -> Any:
    return sliced(key, cos, sin) * 0.5


def complex_numbers(key: Any, cos: Any, sin: Any) -> Any:
    """Llama 4."""
    numbers = torch.view_as_complex(key.unflatten(-1, (-1, 2)).contiguous())
    turn = torch.polar(torch.ones_like(cos[..., ::2]), cos[..., ::2])
    return torch.view_as_real(numbers * turn).flatten(3)


def rest_from_elsewhere(key: Any, cos: Any, sin: Any) -> Any:
    """Latent attention: the rotated part is shared by all heads."""
    turning = key[..., :4] @ key.new_ones(4, 4)
    turned = torch.cat([-turning[..., 2:], turning[..., :2]], -1)
    return torch.cat([key[..., 4:], turning * cos[..., :4] + turned * sin[..., :4]], -1)


def in_place(key: Any, cos: Any, sin: Any) -> Any:
    turned = quarter(key) * sin
    return turned.add_(key * cos)


def changed_before(key: Any, cos: Any, sin: Any) -> Any:
    """The key before its rotation is another one by the time the step ends."""
    rotated = sliced(key, cos, sin)
    key.mul_(2.0)
    return rotated


NEAR_MISSES: dict[Rope, str] = {
    unrotated: NONE,
    normed: NONE,
    normed_after: CHANGED,
    rounded: CHANGED,
    scaled: CHANGED,
    mirrored: UNKNOWN,
    twice_cosine: UNKNOWN,
    complex_numbers: "the rotation is a multiplication of complex numbers, which is not read",
    rest_from_elsewhere: (
        "only 4 of the key's 8 channels come from a rotation, and the others from elsewhere"
    ),
    in_place: "the key or its rotation is changed in place, by add_",
    changed_before: "the key or its rotation is changed in place, by mul_",
}


@pytest.mark.parametrize("rope", NEAR_MISSES, ids=lambda rope: rope.__name__)
def test_near_miss_is_declined(rope: Rope) -> None:
    found, _ = find(rope)
    assert found == NEAR_MISSES[rope]


# models -------------------------------------------------------------------------------------------

SMALL = {
    "vocab_size": 96, "hidden_size": 64, "intermediate_size": 32, "num_hidden_layers": 1,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
    "pad_token_id": 0,
}  # fmt: skip
HEADS_16 = SMALL | {"head_dim": 16}
FULL = HEADS_16 | {"layer_types": ["full_attention"]}
GPT = {"vocab_size": 96, "n_embd": 64, "n_layer": 1, "n_head": 4, "n_positions": 64}
MODELS: dict[str, tuple[dict[str, Any], tuple[Pairing, int] | str]] = {
    "Llama": (SMALL, ("halves", 16)),
    "Gemma2": (FULL, ("halves", 16)),
    "Gemma3Text": (FULL, ("halves", 16)),
    "Qwen2": (SMALL, ("halves", 16)),
    "Qwen3": (HEADS_16, ("halves", 16)),
    "GptOss": (FULL | {"num_local_experts": 2, "num_experts_per_tok": 1}, ("halves", 16)),
    "Phi": (SMALL, ("halves", 8)),
    "GPTNeoX": (SMALL, ("halves", 4)),
    "StableLm": (SMALL, ("halves", 4)),
    "Cohere": (SMALL, ("interleaved", 16)),
    "Glm": (HEADS_16, ("interleaved", 8)),
    "GPTJ": (GPT | {"rotary_dim": 8}, ("interleaved", 8)),
    "HunYuanDenseV1": (HEADS_16, CHANGED),
    "GPT2": (GPT, NONE),
}
EAGER = {"Gemma2", "GPTJ", "GptOss"}
CLASSES = {"Gemma3Text": "Gemma3ForCausalLM", "GPT2": "GPT2LMHeadModel"}
WITHOUT_ANGLES = {"GPTJ"}  # cosines and sines are read from a table


def build(name: str) -> transformers.PreTrainedModel:
    config = getattr(transformers, f"{name}Config")(**MODELS[name][0])
    config._attn_implementation = "eager" if name in EAGER else "sdpa"
    torch.manual_seed(0)
    model = getattr(transformers, CLASSES.get(name, f"{name}ForCausalLM"))
    return model(config).eval()


@pytest.mark.parametrize("name", MODELS)
def test_model_is_read_or_declined(name: str) -> None:
    expected = MODELS[name][1]
    model = build(name)
    cache = transformers.DynamicCache(config=model.config)

    def step(ids: Tensor) -> Tensor:
        return model(ids, past_key_values=cache, use_cache=True).logits

    ids = torch.randint(3, 96, (2, 7), generator=torch.Generator().manual_seed(0))
    graphs = recorded(step, [(ids[:, :6],), (ids[:, 6:],)])
    assert [edge.kind for module, _ in graphs for edge in key_edges(module)] == [
        "prefill",
        "decode",
    ]
    for module, values in graphs:
        (edge,) = key_edges(module)
        found = find_rotary(edge)
        if isinstance(expected, str):
            assert found == expected
            continue
        assert isinstance(found, Rotary), found
        rotation = found.rotation
        assert (rotation.pairing, rotation.rotary_dim, rotation.sign) == (*expected, 1)
        assert found.rotated is edge.new
        assert (found.angles is None) == (name in WITHOUT_ANGLES)
        assert_reproduces(found, values)
