"""The table of supported models is what is measured."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import tests.models  # noqa: F401  (which keeps transformers offline)
from squat_fx import coverage, tiny
from squat_fx.coverage import Row

ROOT = Path(__file__).parents[1]
ROWS, VERSIONS = coverage.from_json(
    json.loads((ROOT / "benchmarks" / "results" / "supported_models.json").read_text())
)
TABLE = {(row.architecture, row.attention): row for row in ROWS}
SAMPLE = [
    ("bert", "eager"),
    ("bloom", "eager"),
    ("cohere2", "sdpa"),
    ("deepseek_v3", "sdpa"),
    ("diffllama", "sdpa"),
    ("falcon", "eager"),
    ("gemma2", "eager"),
    ("gemma3n_text", "sdpa"),
    ("gpt_bigcode", "eager"),
    ("gpt_neo", "eager"),
    ("granite_swa", "eager"),
    ("lfm2", "sdpa"),
    ("llama", "sdpa"),
    ("llama4_text", "sdpa"),
    ("mamba", "eager"),
    ("mimo_v2_flash", "eager"),
    ("mpt", "eager"),
    ("opt", "sdpa"),
]


def facts(row: Row) -> dict[str, object]:
    """What does not depend on the machine, nor on the version of torch."""
    return {name: fact for name, fact in row.facts().items() if name != "graphs"}


@pytest.mark.parametrize(("architecture", "attention"), SAMPLE)
def test_row_is_what_is_measured(architecture: str, attention: str) -> None:
    torch._dynamo.reset()
    row = coverage.cover(architecture, attention)
    assert row.equal, row
    assert not row.error
    assert facts(row) == facts(TABLE[architecture, attention])


@pytest.mark.full
def test_every_row_is_what_is_measured() -> None:
    for row in coverage.sweep(jobs=2):
        assert facts(row) == facts(TABLE[row.architecture, row.attention])


def test_document_is_made_of_the_results() -> None:
    document = (ROOT / "docs" / "supported-models.md").read_text()
    assert document == coverage.document(ROWS, VERSIONS)


@pytest.mark.parametrize(("attention", "share"), [("sdpa", 0.95), ("eager", 0.90)])
def test_full_attention_is_packed(attention: str, share: float) -> None:
    full = [row for row in ROWS if row.attention == attention and row.has_full]
    assert len(full) > 90
    packed = [row for row in full if row.is_full_packed]
    assert len(packed) >= share * len(full)


def test_no_output_is_wrong_nothing_fails_and_every_no_has_a_reason() -> None:
    ran = [row for row in ROWS if not row.not_run]
    assert len(ran) > 270
    assert [row for row in ran if row.error or not row.equal or row.is_unexplained] == []


def test_every_architecture_has_its_rows() -> None:
    assert set(TABLE) == {(n, a) for n in tiny.architectures() for a in coverage.ATTENTIONS}


def test_models_of_a_name_are_alike() -> None:
    """What is built depends on nothing but the architecture's name and the seed."""
    first, second = (tiny.model_named("LlamaConfig") for _ in range(2))
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)


def test_process_that_dies_is_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    def die(row: Row, send: object) -> None:
        raise SystemExit

    monkeypatch.setattr(coverage, "_cover_and_send", die)
    (row,) = coverage.sweep(["llama"], ["sdpa"])
    assert row.error == coverage.DIED


@pytest.mark.parametrize(
    "name", ["gemma2", "Gemma2Config", "Gemma2ForCausalLM", "gemma2forcausallm"]
)
def test_names_of_an_architecture(name: str) -> None:
    assert tiny.architecture_named(name) == "gemma2"


def test_config_keeps_layers_and_heads_and_gets_narrow() -> None:
    import transformers

    wide = transformers.LlamaConfig(num_hidden_layers=5, num_attention_heads=8)
    narrow = tiny.like_config(wide, "sdpa")
    assert (narrow.num_hidden_layers, narrow.num_attention_heads) == (5, 8)
    assert narrow.hidden_size == tiny.WIDTH
    assert sum(p.numel() for p in tiny.tiny_model("llama", narrow).parameters()) < 1_000_000
