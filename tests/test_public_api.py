"""The public names, and that importing them has no effects."""

from __future__ import annotations

import inspect
import json
import subprocess
import sys

import squat_fx


def test_public_names() -> None:
    assert squat_fx.__all__ == [
        "CacheBytes",
        "Calibration",
        "Config",
        "GraphReport",
        "NotRewritten",
        "QuantizedKV",
        "Report",
        "cache_bytes",
        "calibrate",
        "compile",
        "explain",
        "list_codecs",
        "load_cache",
        "report",
        "rewrite",
        "save_cache",
    ]


def test_every_other_name_is_private_or_a_submodule() -> None:
    others = set(vars(squat_fx)) - set(squat_fx.__all__) - {"annotations"}
    visible = {name for name in others if not name.startswith("_")}
    assert all(inspect.ismodule(getattr(squat_fx, name)) for name in visible), visible


def test_every_public_name_says_what_it_does() -> None:
    for name in squat_fx.__all__:
        assert inspect.getdoc(getattr(squat_fx, name)), name


def test_public_functions_are_annotated() -> None:
    for name in (
        "cache_bytes", "compile", "explain", "list_codecs", "load_cache", "report", "rewrite",
        "save_cache",
    ):  # fmt: skip
        signature = inspect.signature(getattr(squat_fx, name))
        parameters = signature.parameters.values()
        assert signature.return_annotation is not inspect.Signature.empty, name
        assert all(p.annotation is not inspect.Parameter.empty for p in parameters), name


FRESH = """
import sys
sys.modules["triton"] = None
import json, logging, os, torch, torch._dynamo

def settings():
    return [
        torch.is_grad_enabled(), str(torch.get_default_dtype()), torch.get_num_threads(),
        torch.initial_seed(), torch._dynamo.config.recompile_limit, dict(os.environ), sys.path[:],
        len(logging.root.handlers),
    ]

before, known = settings(), set(sys.modules)
import squat_fx
unchanged, loaded = settings() == before, {m.split(".")[0] for m in set(sys.modules) - known}
import squat_fx.cli
_, report = squat_fx.rewrite(torch.fx.symbolic_trace(torch.nn.Linear(4, 3)), (torch.randn(2, 4),))
triton = [m for m in sys.modules if m.split(".")[0] == "triton" and sys.modules[m]]
print(json.dumps([unchanged, sorted(loaded), report.rewritten, triton]))
"""


def test_a_fresh_interpreter_without_triton_imports_the_package_and_nothing_else_happens() -> None:
    command = [sys.executable, "-W", "error", "-c", FRESH]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    unchanged, loaded, rewritten, triton = json.loads(done.stdout)
    assert unchanged
    assert not {"transformers", "typer", "rich", "gguf", "safetensors"} & set(loaded)
    assert (rewritten, triton) == (0, [])
