"""Collect what a calibration needs: keys and queries of a model, wherever its graphs have them.

The model runs over texts through a backend of its own, which finds attentions as the rewriting does
and adds their keys and queries to the graph's outputs; nothing else is changed, and nothing stays
compiled into the model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from squat_fx.backend import copy_graph
from squat_fx.calibration import Calibration, Fingerprint, LayerCalibration
from squat_fx.codecs import Kivi
from squat_fx.codecs.feedback import query_gram
from squat_fx.config import Config
from squat_fx.passes import Rewriting, find_attentions
from squat_fx.passes.quantize_kv_cache import four_dim_query
from squat_fx.pool import TOKENS

Text = str | Tensor | Mapping[str, Any]
UNTRACED = "torch.compile traced no graph; torch._dynamo.reset() lets it try again"
FIRST = 4  # tokens of a piece whose keys are unlike all others, and which caches keep as they are
MOST_GRAPHS = 4096  # one per length of text; beyond torch's default of 8 they would go unseen


class Statistics:
    """Second moments of one layer, summed over prompts; those of keys without the first tokens."""

    def __init__(self) -> None:
        self._moment: Tensor | None = None
        self._gram: Tensor | None = None
        self._prompts = 0

    def add(self, key: Tensor, query: Tensor) -> None:
        """A batch of prompts: ``[batch, heads, tokens, head_dim]`` each."""
        later = key[:, :, min(FIRST, key.shape[2] - 1) :].float()
        centred = (later - later.mean(2, keepdim=True)).double()
        moment = (centred.mT @ centred).sum(0).cpu() / later.shape[2]
        keep = torch.ones(key.shape[0], key.shape[2], dtype=torch.bool, device=key.device)
        gram = query_gram(query, keep, key.shape[1]).sum(0).cpu() / key.shape[2]
        self._moment = moment if self._moment is None else self._moment + moment
        self._gram = gram if self._gram is None else self._gram + gram
        self._prompts += key.shape[0]

    def calibration(self) -> LayerCalibration:
        """The basis that they give."""
        assert self._moment is not None
        assert self._gram is not None
        return LayerCalibration.of(self._moment / self._prompts, self._gram / self._prompts)


def calibrate(
    model: nn.Module,
    texts: Iterable[Text] | Text,
    *,
    tokenizer: Any = None,
    window: int = 1024,
    windows: int = 8,
) -> Calibration:
    """Find a latent basis for the keys of every attention layer of ``model``.

    The model runs over ``windows`` pieces of ``window`` tokens, spread over the texts: seconds on a
    GPU. The texts should look like what the model will read, and need not be the same.

    Args:
        model: any traced model; it is left as it is.
        texts: strings, token ids (``[tokens]`` or ``[1, tokens]``), or mappings of the model's
            keyword arguments, which are passed as they are. A single one is a sequence of one.
        tokenizer: for strings; None loads the one that belongs to a Hugging Face model.
        window, windows: how much text is used; shorter texts give shorter pieces.

    Raises:
        ValueError: there is no text, no tokenizer for it, or no attention over a cache was found;
            the message says why.
    """
    if window < 1 or windows < 1:
        raise ValueError(f"window and windows must be at least 1, got {window} and {windows}")
    statistics: dict[int, Statistics] = {}
    tokens, reasons = 0, {UNTRACED}

    def backend(graph_module: fx.GraphModule, examples: Sequence[Any]) -> Callable[..., Any]:
        reasons.discard(UNTRACED)
        return _tapped(graph_module, statistics, reasons)

    # Its own function object: Dynamo keeps what it compiled per code, and guards on the backend.
    run = torch.compile(model.forward, backend=backend, dynamic=False)
    limits = {"recompile_limit": MOST_GRAPHS, "accumulated_recompile_limit": MOST_GRAPHS}
    is_training = model.training
    model.eval()
    try:
        for inputs in _pieces(model, texts, tokenizer, window, windows):
            with torch.no_grad(), torch._dynamo.config.patch(limits):
                run(**inputs)
            tokens += _num_tokens(inputs)
    finally:
        model.train(is_training)
    if not tokens:
        raise ValueError("there is nothing to calibrate on: give at least one text")
    if not statistics:
        why = f": {'; '.join(sorted(reasons))}" if reasons else ""
        raise ValueError(f"no attention over a cache was found in {type(model).__name__}{why}")
    layers = {number: found.calibration() for number, found in sorted(statistics.items())}
    return Calibration(layers, Fingerprint.of(model), tokens)


def _tapped(
    graph_module: fx.GraphModule, statistics: dict[int, Statistics], reasons: set[str]
) -> Callable[..., Any]:
    """``graph_module``, run as it is; keys and queries of its prefills are summed on the way."""
    rewriting = Rewriting(copy_graph(graph_module), Config(codec=Kivi()), {})
    graph = rewriting.graph
    rewriting.placeholders = tuple(graph.find_nodes(op="placeholder"))
    find_attentions(rewriting)
    reasons.update(skipped.reason for skipped in rewriting.skipped)
    sites = [site for site in rewriting.sites if site.kind == "prefill" and site.key.grows]
    output = graph.output_node()
    taps = []
    with graph.inserting_before(output):
        for site in sites:
            key = site.key.grown or site.key.stored  # all of them, where a window is stored
            if site.key.token_dim != TOKENS:
                key = graph.call_function(torch.transpose, (key, 1, 2))
            taps.append((key, four_dim_query(site, graph)))
    output.args = ((output.args[0], tuple(taps)),)
    rewriting.module.recompile()
    numbers = [site.layer for site in sites]

    def call(*args: Any) -> Any:
        result, found = rewriting.module.forward(*args)
        for number, (key, query) in zip(numbers, found, strict=True):
            statistics.setdefault(number, Statistics()).add(key, query)
        return result

    return call


def _pieces(
    model: nn.Module, texts: Any, tokenizer: Any, window: int, windows: int
) -> Iterable[dict[str, Any]]:
    """The model's inputs, a piece of text each."""
    if isinstance(texts, (str, Tensor, Mapping)):
        texts = [texts]
    texts = list(texts)
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    for number, text in enumerate(texts):
        if isinstance(text, Mapping):
            yield dict(text)
            continue
        if isinstance(text, str):
            tokenizer = tokenizer or _tokenizer_of(model)
            text = tokenizer(text, return_tensors="pt", add_special_tokens=False).input_ids
        ids = text.reshape(-1).to(device)
        share = windows // len(texts) + (number < windows % len(texts))
        fitting = max(1, min(share, len(ids) // window)) if share else 0
        for index in range(fitting):
            piece = ids[index * (len(ids) // fitting) :][:window]
            if len(piece):
                yield {"input_ids": piece[None]}


def _tokenizer_of(model: nn.Module) -> Any:
    name = getattr(model, "name_or_path", "")
    if not name:
        raise ValueError(
            "texts are strings, and this model does not say which tokenizer is its own; "
            "pass tokenizer=..., or token ids"
        )
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(name)


def _num_tokens(inputs: Mapping[str, Any]) -> int:
    ids = inputs.get("input_ids")
    return ids.numel() if isinstance(ids, Tensor) else 1
