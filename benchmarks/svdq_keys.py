"""How near packed keys come to true ones: `svdq` against rounding per channel at equal bits.

    python benchmarks/svdq_keys.py --text wikitext2_test_raw.txt --out benchmarks/results/svdq_keys.json

The keys of a prompt, of every layer of a model, are stored, then those of the tokens that follow
are appended; likewise keys that were made up, of low rank before their rotary embedding and of no
structure at all. The error is that of packed tokens, squared and relative to the keys about their
mean. ``bits`` count codes and, per channel, scales and zero points in groups of 128 tokens;
``all`` counts what is learned, over the prompt, too. ``strongest`` is the share of the variance
that the strongest quarter of directions has, before the embedding and after it: where it does not
fall much there is nothing to gain.
"""  # noqa: E501

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from common import command, load_model, model_folder, text_record, text_tokens, write_result
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import DynamicCache

from squat_fx import QuantizedKV
from squat_fx.bench.record import versions
from squat_fx.codecs import Codec, Kivi, Svdq, codec_spec, make_format
from squat_fx.layouts.latent_rope import turned
from squat_fx.layouts.rotary import Rotation

SINKS = 4
CODECS: tuple[tuple[str, Codec, float], ...] = (
    ("svdq 1.25", Svdq(), 1.25),
    ("svdq 1.25, after the embedding", Svdq(pre_rope=False), 1.25),
    ("per channel, 1 bit", Kivi(128), 1),
    ("svdq 2", Svdq(), 2),
    ("svdq 2, after the embedding", Svdq(pre_rope=False), 2),
    ("per channel, 2 bits", Kivi(128), 2),
    ("svdq 4", Svdq(), 4),
    ("per channel, 4 bits", Kivi(128), 4),
)


def main(
    text: Annotated[list[Path], typer.Option(help="A text file.")],
    model: Annotated[Path | None, typer.Option(help="A Hugging Face folder.")] = None,
    prompt: Annotated[int, typer.Option(help="Tokens that are stored at once.")] = 1024,
    tokens: Annotated[int, typer.Option(help="Tokens that are appended.")] = 256,
    out: Annotated[Path | None, typer.Option(help="Where to write json.")] = None,
) -> None:
    """Print a table of errors, and write it."""
    folder = model_folder(model)
    rows = []
    for name, keys, inv_freq in [
        *((path.stem, *keys_of_model(folder, path, prompt + tokens)) for path in text),
        ("made up, low rank", *made_up(prompt + tokens, low_rank=True)),
        ("made up, Gaussian", *made_up(prompt + tokens, low_rank=False)),
    ]:
        before, after = (strongest(keys, inv_freq, turn_back) for turn_back in (True, False))
        for codec_name, codec, bits in CODECS:
            found = measure(keys, inv_freq, codec, bits, prompt)
            rows.append({"keys": name, "codec": codec_name, **found})
            rows[-1] |= {"strongest_before": before, "strongest_after": after}
    table = Table("keys", "codec", "bits", "all", "prompt", "appended", "strongest")
    for row in rows:
        numbers = [f"{row[n]:.2f}" for n in ("bits", "all")]
        numbers += [f"{row[n]:.5f}" for n in ("prompt", "appended")]
        shares = f"{row['strongest_before']:.2f}, {row['strongest_after']:.2f}"
        table.add_row(row["keys"], row["codec"], *numbers, shares)
    Console().print(table)
    options: dict[str, Any] = {"prompt": prompt, "tokens": tokens}
    texts = [text_record(path) for path in text]
    line = command("svdq_keys.py", model, out, text, **options)
    write_result(out, {"command": line, "versions": versions(), "texts": texts, "rows": rows})


def keys_of_model(folder: Path, text: Path, tokens: int) -> tuple[list[Tensor], Tensor]:
    """The keys of each layer as they are cached, and the frequencies of their embedding."""
    model, cache = load_model(folder), DynamicCache()
    with torch.no_grad():
        model(text_tokens(folder, text)[None, :tokens], past_key_values=cache, logits_to_keep=1)
    return [layer.keys for layer in cache.layers], model.model.rotary_emb.inv_freq


def made_up(tokens: int, low_rank: bool) -> tuple[list[Tensor], Tensor]:
    """Two heads of 128 channels; of low rank: sizes of directions fall as exp(-i / 18)."""
    head_dim, generator = 128, torch.Generator().manual_seed(0)
    inv_freq = 5e5 ** -(torch.arange(0, head_dim, 2) / head_dim)
    x = torch.randn(1, 2, tokens, head_dim, generator=generator)
    if not low_rank:
        return [x], inv_freq
    directions = torch.linalg.qr(torch.randn(2, head_dim, head_dim, generator=generator)).Q
    x = (x * torch.exp(-torch.arange(head_dim) / 18)) @ directions
    x += torch.randn(1, 2, 1, head_dim, generator=generator)
    angle = torch.arange(tokens)[:, None] * inv_freq
    return [Rotation(head_dim, "halves").apply(x, angle.cos(), angle.sin())], inv_freq


def formats(codec: Codec, bits: float, head_dim: int) -> Any:
    """Keys of which all but the sinks are packed."""
    fmt = make_format(codec, codec_spec(codec), "key", head_dim, bits, 0, SINKS)
    if "rotary" in codec.taps("key"):
        fmt = fmt.stored_layout.with_rotation(fmt, Rotation(head_dim, "halves"))
    return fmt


def measure(
    keys: list[Tensor], inv_freq: Tensor, codec: Codec, bits: float, prompt: int
) -> dict[str, float]:
    """Errors of the packed tokens of a prompt, and of those appended to it; bits."""
    fmt = formats(codec, bits, keys[0].shape[3])
    given = inv_freq if "rotary" in codec.taps("key") else None
    errors, learned = [], 0
    for x in keys:
        handle = QuantizedKV.from_dense(x[:, :, :prompt], fmt, "key", given=given)
        learned += sum(handle._storage[n].nbytes for n in fmt.stored_layout.fixed)
        longer: Any = torch.cat([handle, x[:, :, prompt:]], 2)
        storage = longer.writable_storage()
        packed = storage.extent.packed(0, fmt) + SINKS
        numbers, mean = longer.dequantize(), x.mean(2, keepdim=True)
        for part in (slice(SINKS, prompt), slice(prompt, packed)):
            difference = numbers[:, :, part] - x[:, :, part]
            size = (x - mean)[:, :, part]
            errors.append(torch.stack([difference.square().sum(), size.square().sum()]))
    of_prompt, of_rest = (torch.stack(errors[i::2]).sum(0) for i in (0, 1))
    stored = fmt.packed_bits_per_element()
    elements = sum(x[:, :, :prompt].numel() for x in keys)
    return {
        "bits": stored,
        "all": stored + 8 * learned / elements,
        "prompt": float(of_prompt[0] / of_prompt[1]),
        "appended": float(of_rest[0] / of_rest[1]),
    }


def strongest(keys: list[Tensor], inv_freq: Tensor, turn_back: bool) -> float:
    """The share of the variance about the mean that a quarter of the directions has."""
    shares = []
    for x in keys:
        fmt = formats(Svdq(), 2, x.shape[3])
        fixed = {"frequency": inv_freq[None, None, None]}
        fmt = fmt if turn_back else replace(fmt, details=())
        x = turned(x, fmt, fixed, torch.arange(x.shape[2]), back=True)
        squares = torch.linalg.svdvals(x - x.mean(2, keepdim=True)).square()
        shares.append(squares[..., : x.shape[3] // 4].sum(-1) / squares.sum(-1))
    return float(torch.cat([s.flatten() for s in shares]).mean())


if __name__ == "__main__":
    typer.run(main)
