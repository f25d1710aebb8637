"""Layers that are alike are compiled once, and a graph of regions computes what the whole does."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers import DynamicCache

import squat_fx
from squat_fx import backend
from squat_fx.regions import Program
from tests.models import prompt

LAYERS, WIDTH = 12, 16
ENDS = 2  # the first region has what comes before the layers, the last what comes behind


class Block(nn.Module):
    """A layer with a constant, a width and a way of reading its input."""

    def __init__(self, scale: float = 1.0, width: int = 2 * WIDTH, gated: bool = False) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, width), nn.Linear(width, WIDTH)
        self.norm = nn.LayerNorm(WIDTH)
        self.scale, self.gated = scale, gated

    def forward(self, x: Tensor) -> Tensor:
        """``[tokens, WIDTH]``."""
        inside = self.up(self.norm(x) * self.scale)
        inside = inside.sigmoid() * inside if self.gated else inside.relu() + inside.sin() * 0.5
        for _ in range(4):
            inside = inside - (inside * 0.5).sin() * 0.1
        return x + self.down(inside.clamp(-3, 3)).tanh()


class Stack(nn.Module):
    """Blocks one after the other."""

    def __init__(self, *blocks: Block) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        """``[tokens, WIDTH]``."""
        for block in self.blocks:
            x = block(x)
        return self.head(x)


class Skipping(Stack):
    """Its ninth layer reads what its third one made, too."""

    def forward(self, x: Tensor) -> Tensor:
        """``[tokens, WIDTH]``."""
        kept = x
        for i, block in enumerate(self.blocks):
            x = block(x + kept) if i == 8 else block(x)
            kept = x if i == 2 else kept
        return self.head(x)


class InPlace(Stack):
    """Its layers write to one tensor."""

    def forward(self, x: Tensor) -> Tensor:
        """``[tokens, WIDTH]``."""
        stream = x * 1.0
        for block in self.blocks:
            stream.add_(block(stream))
        return self.head(stream)


def tied(stack: Stack) -> Stack:
    """One layer whose two norms are one tensor, and so are those of no other layer."""
    stack.blocks[4].norm.weight = stack.blocks[4].norm.bias
    return stack


def misaligned(stack: Stack) -> Stack:
    """One layer has a weight that starts at no multiple of 16 bytes."""
    room = torch.randn(2 * WIDTH * WIDTH + 1)
    stack.blocks[4].up.weight = nn.Parameter(room[1:].view(2 * WIDTH, WIDTH))
    return stack


@pytest.fixture
def compilations(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The nodes of each graph that the inner compiler was given."""
    torch._dynamo.reset()
    counted: list[int] = []
    original = backend._inner_compiler

    def counting(*args: Any) -> Any:
        compiler = original(*args)

        def compile_(module: Any, examples: list[Any]) -> Any:
            counted.append(len(module.graph.nodes))
            return compiler(module, examples)

        return compile_

    monkeypatch.setattr(backend, "_inner_compiler", counting)
    return counted


def blocks(**others: Block) -> list[Block]:
    """``LAYERS`` blocks, ``at_4=`` another one."""
    return [others.get(f"at_{i}") or Block() for i in range(LAYERS)]


def alternating() -> list[Block]:
    """Two kinds of layers in turn."""
    return [Block(gated=i % 2 == 1) for i in range(LAYERS)]


@pytest.mark.parametrize(
    ("make", "distinct"),
    [
        (lambda: Stack(*blocks()), 1),
        (lambda: Stack(*alternating()), 2),
        (lambda: Stack(*blocks(at_4=Block(scale=0.5))), 2),
        (lambda: Stack(*blocks(at_4=Block(width=3 * WIDTH))), 3),  # the cut lies within a layer
        (lambda: Skipping(*blocks()), 3),  # a layer that keeps, and one that reads
        (lambda: misaligned(Stack(*blocks())), 2),
        (lambda: tied(Stack(*blocks())), 2),
    ],
    ids=["alike", "two kinds", "constant", "width", "skipping", "misaligned", "tied"],
)
def test_each_kind_of_layer_is_compiled_once(
    compilations: list[int], make: Callable[[], Stack], distinct: int
) -> None:
    torch.manual_seed(0)
    model, x = make().eval(), torch.randn(5, WIDTH)
    with torch.no_grad():
        expected = model(x)
        actual = squat_fx.compile(model, inner="aot_eager")(x)
    assert len(compilations) <= distinct + ENDS
    assert len(compilations) > 1
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)
    assert not squat_fx.report(model).notes


@pytest.mark.parametrize(
    "make", [lambda: InPlace(*blocks()), lambda: Stack(Block())], ids=["in place", "one layer"]
)
def test_what_cannot_be_cut_is_compiled_as_a_whole(
    compilations: list[int], make: Callable[[], Stack]
) -> None:
    model, x = make().eval(), torch.randn(5, WIDTH)
    with torch.no_grad():
        expected = model(x)
        actual = squat_fx.compile(model, inner="aot_eager")(x)
    assert len(compilations) == 1
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


def test_layers_are_not_shared_if_one_does_not_want_that(compilations: list[int]) -> None:
    model = squat_fx.compile(Stack(*blocks()).eval(), inner="aot_eager", share_layers=False)
    with torch.no_grad():
        model(torch.randn(5, WIDTH))
    assert len(compilations) == 1


def test_other_sizes_are_served_by_the_same_regions(compilations: list[int]) -> None:
    model = Stack(*blocks()).eval()
    compiled = squat_fx.compile(lambda x: model(x), inner="aot_eager")
    with torch.no_grad():
        for tokens in (5, 7, 9, 12):  # the second makes it a symbol
            x = torch.randn(tokens, WIDTH)
            torch.testing.assert_close(compiled(x), model(x), rtol=0, atol=0)
    assert len(compilations) == 2 * (1 + ENDS)


def llama(layers: int) -> Any:
    """A tiny Llama."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=layers,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=4096,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval()
    model.generation_config.eos_token_id = None
    return model


def generated(model: Any) -> Tensor:
    """Logits of greedy tokens, through a growth of the arenas if there are any."""
    cache, ids, out = DynamicCache(config=model.config), prompt(1, 20), []
    for step in range(6):
        with torch.no_grad():
            logits = model(ids, past_key_values=cache, use_cache=True).logits[:, -1:]
        out.append(logits)
        ids = logits.argmax(-1)
        grows = step == 3 and isinstance(cache.layers[0].keys, squat_fx.QuantizedKV)
        for index, layer in enumerate(cache.layers if grows else ()):
            layer.keys.writable_storage().reserve(600 * (index + 1))
            layer.values.writable_storage().reserve(2500)
    return torch.cat(out, 1)


def test_a_generation_compiles_a_layer_once_for_the_prompt_and_once_for_steps(
    compilations: list[int],
) -> None:
    options: dict[str, Any] = {"inner": "aot_eager", "residual_length": 8}
    expected = generated(squat_fx.compile(llama(6), share_layers=False, **options))
    assert len(compilations) == 2
    compilations.clear()
    torch._dynamo.reset()
    model = squat_fx.compile(llama(6), **options)
    assert torch.equal(generated(model), expected)
    assert len(compilations) == 2 * (1 + ENDS)
    report = squat_fx.report(model)
    assert [graph.kind for graph in report.graphs] == ["prefill", "decode"]
    assert not report.notes
    assert not report.eager_calls


def test_regions_through_inductor_write_arenas_in_place(compilations: list[int]) -> None:
    model = squat_fx.compile(llama(6), codec="none")
    torch.testing.assert_close(generated(model), generated(llama(6)), rtol=1e-4, atol=1e-4)
    assert len(compilations) == 2 * (1 + ENDS)


def test_a_tensor_is_gone_when_the_last_region_that_reads_it_has_taken_it() -> None:
    program, alive = Program([]), []

    def double(given: list[Tensor]) -> list[Tensor]:
        (x,) = given
        given.clear()
        alive.append(weakref.ref(x))
        y = x * 2
        del x
        return [y]

    def check(given: list[Tensor]) -> list[Tensor]:
        assert alive[-1]() is None
        return double(given)

    program.add(lambda given: [given[0] + 1], [0], [])
    program.add(double, [1], [1])
    program.add(check, [2], [2])
    program.finish([3])
    assert [x.item() for x in program(torch.ones(()))] == [8.0]
