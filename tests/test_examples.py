"""Every example runs, at toy size, and does what its text says."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path

import pytest
import torch

EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.fixture(autouse=True)
def _importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    torch._dynamo.reset()


def test_every_example_is_tested() -> None:
    names = {path.stem for path in EXAMPLES.glob("*.py")}
    assert names == {
        "huggingface_generate", "own_loop", "export_rewrite", "write_a_codec", "keep_a_prompt",
    }  # fmt: skip


def test_huggingface_generate() -> None:
    size = importlib.import_module("huggingface_generate").main(tokens=24, inner="eager")
    assert size.ratio > 2.5


def test_own_loop_is_exact_with_the_lossless_codec() -> None:
    module = importlib.import_module("own_loop")
    tokens, key = module.main(tokens=40, codec="none", inner="eager")
    assert type(key).__name__ == "QuantizedKV"
    torch.manual_seed(0)
    model = module.Model().eval()
    token, cache, expected = torch.randint(0, 256, (1, 300)), None, []
    with torch.no_grad():
        for _ in range(40):
            logits, cache = model(token, cache)
            token = logits.argmax(-1, keepdim=True)
            expected.append(token)
    assert torch.equal(tokens, torch.cat(expected, 1))


def test_own_loop_needs_no_import_of_ours() -> None:
    assert "import squat_fx" not in (EXAMPLES / "own_loop.py").read_text().split('"""', 2)[2]
    program = "import own_loop; own_loop.main(tokens=3, inner='eager')"
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, cwd=EXAMPLES, capture_output=True, text=True, check=True)
    assert "QuantizedKV(key, shape=(1, 2, 302, 64)" in done.stdout


def test_export_rewrite() -> None:
    module = importlib.import_module("export_rewrite")
    error, report = module.main(steps=12, codec="none")
    assert error < 1e-5
    assert report.rewritten == 1
    assert module.main(steps=12)[0] < 0.25


def test_write_a_codec() -> None:
    errors = importlib.import_module("write_a_codec").main(tokens=512)
    assert errors["clipped"] < 0.85 * errors["kivi"]


def test_keep_a_prompt() -> None:
    size, dense = importlib.import_module("keep_a_prompt").main(tokens=800, inner="eager")
    assert size < dense / 5
