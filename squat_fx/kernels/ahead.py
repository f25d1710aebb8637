"""Compile kernels of ours before a graph calls them, beside the compiler of the graph.

    wait = start(prompts)  # threads: store keys; store values; attend, append_both_; attend_error
    inner = compiler(graph)     # meanwhile
    wait()

Triton compiles a kernel when it is called for the first time, one after the other, which took half
of the time of a first generation. Compiling does not hold Python's lock for the most part. So the
ops of a prompt, and those of the steps that will follow it, are called once on zeros, one layer of
each kind; what does not work out is left to the first call. Large tensors are one row that is read
again and again, so that only what a layer stores takes memory.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from threading import Thread
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from squat_fx.codecs import Format, Role, codec_from_spec
from squat_fx.kernels import ops, reference
from squat_fx.layouts import PAIRS
from squat_fx.pool import grown_capacity

logger = logging.getLogger(__name__)
_started: set[Prompt] = set()


@dataclass(frozen=True)
class Prompt:
    """What a layer's ops will be given.

    Attributes:
        key, value: stored formats.
        sizes: batch, query heads, KV heads and tokens.
        dtype, device: of the model's tensors.
        padded: whether it says which tokens are padding.
        scale, softcap: of the attention.
        sinks: whether there are any.
        causal: whether later keys are hidden.
        judged: whether the stored prompt is compared with its exact attention.
        given: what the layouts of keys and values are given, such as a calibrated basis.
    """

    key: Format
    value: Format
    sizes: tuple[int, int, int, int]
    dtype: torch.dtype
    device: torch.device
    padded: bool
    scale: float
    softcap: float
    sinks: bool
    causal: bool = True
    judged: bool = False
    given: tuple[Tensor | None, Tensor | None] = field(default=(None, None), compare=False)

    @property
    def sides(self) -> tuple[tuple[Role, Format, Tensor | None], ...]:
        """Role, format and what is given of keys and values."""
        return ("key", self.key, self.given[0]), ("value", self.value, self.given[1])


def start(prompts: Iterable[Prompt]) -> Callable[[], None]:
    """Compile what such prompts and the steps behind them call; returns what waits for it."""
    new = [prompt for prompt in dict.fromkeys(prompts) if prompt not in _started]
    _started.update(replace(prompt, given=(None, None)) for prompt in new)
    calls = partial(_store, side=0), partial(_store, side=1), _step, _judge
    threads = [Thread(target=_run, args=(new, call), daemon=True) for call in calls]
    for thread in threads if new else ():
        thread.start()

    def wait() -> None:
        for thread in threads if new else ():
            thread.join()

    return wait


def _run(prompts: Sequence[Prompt], call: Callable[[Prompt], Any]) -> None:
    for prompt in prompts:
        try:
            with torch.inference_mode(False), torch.no_grad(), _on(prompt.device):
                call(prompt)
        except Exception:  # the graph will say so, if it is more than a lack of memory
            logger.debug("kernels are not compiled ahead", exc_info=True)


def _on(device: torch.device) -> AbstractContextManager[Any]:
    """The stream that a thread starts with, so that others get the memory afterwards."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def _store(prompt: Prompt, side: int) -> Sequence[Tensor]:
    """What the graph of the prompt calls for keys (side 0) or for values."""
    batch, heads, kv_heads, tokens = prompt.sizes
    role, fmt, given = prompt.sides[side]
    valid = _zeros(prompt, (batch, tokens), torch.bool) if prompt.padded else None
    takes_query = "query" in codec_from_spec(fmt.codec).taps(role)
    query = _rows(prompt, heads, fmt.head_dim) if takes_query else None
    return ops.overload("store", fmt.layout)(
        _rows(prompt, kv_heads, fmt.head_dim), valid, query, given, role, fmt.codec, fmt.to_ints()
    )


def _judge(prompt: Prompt) -> None:
    """What the graph of the prompt calls to see how far off what it stored is."""
    pair = prompt.key.layout, prompt.value.layout
    if not prompt.judged or pair not in PAIRS:
        return
    batch, heads, _, tokens = prompt.sizes
    with FakeTensorMode(allow_non_fake_inputs=True):
        made = [x for side in (0, 1) for x in _store(prompt, side)]
    mask = None
    if prompt.padded:
        mask = _zeros(prompt, (1, 1, 1, tokens), torch.bool).expand(batch, 1, tokens, tokens)
    sinks = _zeros(prompt, (heads,), prompt.dtype) if prompt.sinks else None
    given = prompt.given[0] if prompt.key.stored_layout.shared else None
    ops.overload("attend_error", *pair)(
        _rows(prompt, heads, prompt.key.head_dim), _rows(prompt, heads, prompt.value.head_dim),
        *(_zeros(prompt, tuple(x.shape), x.dtype) for x in made),
        given, mask, sinks, prompt.scale, int(prompt.causal), prompt.softcap,
        prompt.key.to_ints(), prompt.value.to_ints(),
    )  # fmt: skip


def _step(prompt: Prompt) -> None:
    """What the graph of a step behind the prompt calls."""
    pair = prompt.key.layout, prompt.value.layout
    batch, heads, kv_heads, tokens = prompt.sizes
    if pair not in PAIRS:
        return
    capacity, arenas, new = grown_capacity(tokens, 0), [], []
    for _, fmt, given in prompt.sides:
        new.append(_zeros(prompt, (batch, kv_heads, 1, fmt.head_dim), prompt.dtype))
        arenas += reference.empty_arenas(new[-1], capacity, fmt, given).tensors(fmt)
    positions = _zeros(prompt, (2, 2), torch.int64)
    formats = prompt.key.to_ints(), prompt.value.to_ints()
    sinks = _zeros(prompt, (heads,), prompt.dtype) if prompt.sinks else None
    out = ops.overload("attend", *pair)(
        _zeros(prompt, (batch, heads, 1, prompt.key.head_dim), prompt.dtype), *new, *arenas,
        positions, 0, 1, -1, None, sinks, prompt.scale, reference.NO_CAUSALITY, prompt.softcap,
        *formats,
    )  # fmt: skip
    if prompt.key.codec == prompt.value.codec:
        ops.overload("append_both_", *pair)(
            *arenas, *new, None, positions, 0, 1, prompt.key.codec, *formats, [out]
        )


def _zeros(prompt: Prompt, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.zeros(shape, dtype=dtype, device=prompt.device)


def _rows(prompt: Prompt, heads: int, channels: int) -> Tensor:
    """``[batch, heads, tokens, channels]`` in the memory of one row."""
    batch, _, _, tokens = prompt.sizes
    return _zeros(prompt, (1, 1, 1, channels), prompt.dtype).expand(batch, heads, tokens, channels)
