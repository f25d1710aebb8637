"""What the report says: bytes held, layers rewritten, and why the others were not."""

from __future__ import annotations

import gc
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, Literal

import pytest
import torch
from torch import fx

from squat_fx.codecs import Kivi, Lossless
from squat_fx.config import Config
from squat_fx.passes.records import (
    Attention,
    AttentionSite,
    CacheEdge,
    InnerInput,
    Rewriting,
    Skipped,
)
from squat_fx.report import CacheBytes, GraphReport, Report, cache_bytes, is_static
from squat_fx.state import QuantizedKV
from tests.conftest import randn, stored_format

NODE = fx.Graph().placeholder("x")


def site(layer: int, kind: Literal["prefill", "decode"] = "decode", bits: int = 2) -> AttentionSite:
    sizes = {"head_dim": 64, "bits": bits, "residual_length": 32, "sink_length": 4}
    key, value = (
        CacheEdge(role, kind, NODE, NODE, NODE, stored_format(Kivi(), role, **sizes))
        for role in ("key", "value")
    )
    return AttentionSite(Attention(NODE, NODE, NODE, NODE, 1.0), key, value, 1, layer)


def packed(tokens: int = 20, seed: int = 0) -> QuantizedKV:
    return QuantizedKV.from_dense(randn(1, 2, tokens, 16, seed=seed), stored_format(), "key")


# bytes ------------------------------------------------------------------------------------------


def test_bytes_add_and_have_a_ratio() -> None:
    total = CacheBytes(10, 60) + CacheBytes(20, 90)
    assert total == CacheBytes(30, 150)
    assert total.ratio == 5.0
    assert CacheBytes(0, 0).ratio != CacheBytes(0, 0).ratio, "nothing has no ratio"


def test_a_dense_cache_is_as_large_as_it_is() -> None:
    key = torch.zeros(1, 2, 3, 4, dtype=torch.float16)
    assert cache_bytes(((key, key.clone()),)) == CacheBytes(96, 96)


def test_a_packed_cache_counts_spare_capacity_and_pending_tokens() -> None:
    handle = packed()
    longer = torch.cat([handle, randn(1, 2, 3, 16)], 2)
    assert cache_bytes([handle]) == CacheBytes(handle.storage_nbytes, 20 * 128)
    assert cache_bytes([longer]) == CacheBytes(handle.storage_nbytes + 3 * 128, 23 * 128)


def test_two_handles_of_one_storage_are_counted_once() -> None:
    handle = packed()
    assert cache_bytes([handle, handle.detach(), handle]) == cache_bytes(handle)


def hugging_face_cache(*tensors: Any) -> SimpleNamespace:
    layer = SimpleNamespace(keys=tensors[0], values=tensors[-1], is_initialized=True)
    return SimpleNamespace(layers=[layer])


def test_every_place_where_a_cache_may_sit_is_found() -> None:
    key, value = packed(seed=1), packed(seed=2)
    both = CacheBytes(key.storage_nbytes + value.storage_nbytes, 2 * 20 * 128)
    assert cache_bytes((key, [value])) == both
    assert cache_bytes({"layer": {"key": key, "value": value}}) == both
    assert cache_bytes(hugging_face_cache(key, value)) == both
    encoder_decoder = SimpleNamespace(
        self_attention_cache=hugging_face_cache(key),
        cross_attention_cache=hugging_face_cache(value),
    )
    assert cache_bytes(encoder_decoder) == both
    assert cache_bytes(None) == CacheBytes(0, 0)


# one graph --------------------------------------------------------------------------------------


def rewriting(*sites: AttentionSite, **found: Any) -> Rewriting:
    graph = fx.Graph()
    graph.output(graph.placeholder("x"))
    module = fx.GraphModule(torch.nn.Module(), graph)
    return Rewriting(module, Config(), {}, sites=list(sites), **found)


@pytest.mark.parametrize(
    ("sites", "kind"),
    [
        ([], "untouched"),
        ([site(0, "prefill")], "prefill"),
        ([site(0), site(1)], "decode"),
        ([site(0), site(1, "prefill")], "mixed"),
    ],
)
def test_the_kind_of_a_graph(sites: list[AttentionSite], kind: str) -> None:
    found = GraphReport.of(rewriting(*sites), "eager", static=False)
    assert found.kind == kind
    assert found.sites == tuple(sites)
    assert "return x" in found.text


def test_an_edge_without_an_attention_makes_a_graph_of_its_kind() -> None:
    found = GraphReport.of(rewriting(lone_edges=[site(0).key]), "eager", static=False)
    assert found.kind == "decode"


def test_a_graph_says_what_was_rewritten_and_why_the_rest_was_not() -> None:
    skipped = (
        Skipped("attention_3", "the layer is in skip_layers", 3),
        Skipped("attention_5", "the layer is in skip_layers", 5),
        Skipped("cross", "value is not a past + new concatenation on dim -2"),
    )
    sites = (site(0), site(1), site(2, bits=4), site(4))
    found = GraphReport("decode", sites, skipped, ("a growing mask keeps sizes",), "inductor", True)
    exact = "32 newest and 4 first tokens exact"
    assert str(found) == (
        "decode graph (inductor, static): 4 attentions rewritten\n"
        f"  layers 0-1, 4: keys kivi 2 bits per 32 tokens (3.00 stored bits, {exact}); "
        f"values kivi 2 bits per 32 channels (3.00 stored bits, {exact})\n"
        f"  layers 2: keys kivi 4 bits per 32 tokens (5.00 stored bits, {exact}); "
        f"values kivi 4 bits per 32 channels (5.00 stored bits, {exact})\n"
        "  left alone, layers 3, 5: the layer is in skip_layers\n"
        "  left alone, cross: value is not a past + new concatenation on dim -2\n"
        "  note: a growing mask keeps sizes"
    )


def test_a_lossless_layer_is_exact() -> None:
    exact = stored_format(Lossless())
    lossless = replace(
        site(0), key=replace(site(0).key, fmt=exact), value=replace(site(0).value, fmt=exact)
    )
    assert "layers 0: keys exact; values exact" in str(GraphReport("decode", (lossless,)))


# everything -------------------------------------------------------------------------------------


def test_an_empty_report_says_what_to_do() -> None:
    assert str(Report()) == "squat_fx: nothing was compiled yet; call the model once"


def test_a_report_adds_up_its_graphs() -> None:
    skipped = Skipped("x", "why", 0)
    report = Report(
        [GraphReport("prefill", (site(0), site(1))), GraphReport("decode", (site(1),), (skipped,))]
    )
    assert report.rewritten == 3
    assert report.skipped == [skipped]


def test_a_note_is_said_once() -> None:
    report = Report()
    report.note("the model was copied; the copy is not compiled")
    report.note("the model was copied; the copy is not compiled")
    assert str(report) == "note: the model was copied; the copy is not compiled"


def test_eager_calls_are_reported() -> None:
    report = Report([GraphReport("decode")], eager_calls=2)
    assert "2 calls ran eagerly, their caches were packed afterwards" in str(report)


def test_live_bytes_are_those_of_the_caches_that_are_alive() -> None:
    report = Report([GraphReport("decode")])
    first, second = report.track(packed(20)), report.track(packed(30))
    report.track(first.detach())
    stored = first.storage_nbytes + second.storage_nbytes
    assert report.live_bytes == CacheBytes(stored, 50 * 128)
    assert f"live caches: {stored / 2**20:.2f} MiB stored, 0.01 MiB if dense" in str(report)
    del second
    gc.collect()
    assert report.live_bytes == CacheBytes(first.storage_nbytes, 20 * 128)
    del first
    gc.collect()
    assert "live caches" not in str(report)


# static -----------------------------------------------------------------------------------------


def symbolic(*sizes: int) -> torch.Tensor:
    """A fake tensor whose sizes are symbols."""
    from torch._dynamo.source import ConstantSource
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

    context = StatelessSymbolicContext(dynamic_sizes=[DimDynamic.DYNAMIC] * len(sizes))
    mode = FakeTensorMode(shape_env=ShapeEnv())
    return mode.from_tensor(
        torch.empty(sizes), source=ConstantSource("x"), symbolic_context=context
    )


def test_only_a_capacity_may_be_symbolic_in_a_static_graph() -> None:
    growing = symbolic(5, 6)
    arguments = [torch.zeros(2, 3), growing, 7, growing.shape[0]]
    plain, dynamic, number, size = (InnerInput("argument", i) for i in range(4))
    assert is_static(arguments, [plain, number, InnerInput("positions")])
    assert is_static(arguments, [plain, InnerInput("arena", 1, "qdata")])
    assert not is_static(arguments, [plain, dynamic])
    assert not is_static(arguments, [InnerInput("dense", 1)])
    assert not is_static(arguments, [size])
    assert not is_static(arguments, [dynamic], besides=symbols_of(growing.shape[0]))
    assert is_static(arguments, [size, plain], besides=symbols_of(growing.shape[0]))


def symbols_of(size: object) -> set[object]:
    from torch.fx.experimental.symbolic_shapes import free_symbols

    return set(free_symbols(size))  # pyright: ignore[reportArgumentType]
