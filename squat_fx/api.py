"""The functions a user calls."""

from __future__ import annotations

import gc
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, fx, nn

from squat_fx.backend import compile_graph, copy_graph
from squat_fx.calibration import Calibration
from squat_fx.codecs import Codec
from squat_fx.config import Config, Guard, Inner
from squat_fx.fallback import pack_dense_caches
from squat_fx.guard import with_raised
from squat_fx.head_start import HeadStart
from squat_fx.masks import may_be_left_out, without_idle_mask
from squat_fx.offloaded_caches import on_their_device
from squat_fx.report import Report
from squat_fx.standalone import rewrite_module
from squat_fx.static_caches import with_growing_caches

RECOMPILE_LIMIT = (
    64  # graphs per callable; five ordinary generate() calls reach torch's default of 8
)
Target = TypeVar("Target", bound=Callable[..., Any])  # a module or a function, returned as it came
_ATTRIBUTE = "_squat_fx"


class Compiled:
    """A compiled callable: ``target`` through the backend, its eager calls packed afterwards, its
    report. ``drops_masks``: attention masks of ones are left out.
    """

    def __init__(
        self, target: Callable[..., Any], config: Config, drops_masks: bool = False
    ) -> None:
        self.config = config
        self._drops_masks = drops_masks
        self._compiles = True  # whether the next call may be expected to
        self.report = Report()
        self._head_start = HeadStart()
        self._target = target
        # What is compiled around this calls it; its own graphs would take no packed cache. Not a
        # decorator, which would import Dynamo, and Triton with it, when this file is imported.
        self._call = torch.compiler.disable(self._run, recursive=False)
        self._compile()

    def _compile(self) -> None:
        """Let Dynamo trace anew, with the bits that layers have by now."""
        config, self._raised = self.config, dict(self.report.raised)

        def backend(graph_module: fx.GraphModule, examples: Sequence[Any]) -> Callable[..., Any]:
            return compile_graph(graph_module, examples, config, self.report, self._head_start)

        # Graphs are kept by code, so that models of one class would count against one limit.
        own: dict[str, Any] = {"recompile_limit": RECOMPILE_LIMIT, "isolate_recompiles": True}
        known = inspect.signature(torch.compile).parameters
        self._takes_limit = "recompile_limit" in known
        self._compiled = torch.compile(
            self._target, backend=backend, **{name: own[name] for name in own if name in known}
        )

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._call(*args, **kwargs)

    def _run(self, *args: Any, **kwargs: Any) -> Any:
        with on_their_device(args, kwargs, self.report):
            return self._run_on_device(*args, **kwargs)

    def _run_on_device(self, *args: Any, **kwargs: Any) -> Any:
        before = self.report.runs_here
        if self.report.raised != self._raised:
            self._compile()
        if self._drops_masks:
            kwargs = without_idle_mask(kwargs)
        with self._head_start.of_call(args, kwargs):
            kwargs = with_growing_caches(args, kwargs, self.report)
            result = self._call_compiled(args, kwargs)
        if self.report.runs_here == before:
            config = with_raised(self.config, self.report.raised)
            packed = pack_dense_caches(args, kwargs, result, config, self.report)
            self.report.eager_calls += packed
        return result

    def _call_compiled(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        graphs = len(self.report.graphs)
        with without_collecting() if self._compiles else nullcontext():
            if self._takes_limit:
                result = self._compiled(*args, **kwargs)
            else:
                with torch._dynamo.config.patch(recompile_limit=RECOMPILE_LIMIT):
                    result = self._compiled(*args, **kwargs)
        # A prompt that was compiled is followed by a step that will be.
        self._compiles = len(self.report.graphs) > graphs
        return result


@contextmanager
def without_collecting() -> Iterator[None]:
    """Python's garbage collector waits: while Dynamo traces, it looks at millions of objects, all
    of them in use, which takes a tenth of the time.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


class _Mark:
    """What a compiled module carries; a copy of the module carries a copy of this, which knows that
    it is one.
    """

    def __init__(self, compiled: Compiled | None) -> None:
        self.compiled = compiled

    def __deepcopy__(self, memo: dict[int, Any]) -> _Mark:
        return _Mark(None)

    def __reduce__(self) -> Any:
        return _Mark, (None,)


def compile(
    model_or_fn: Target,
    bits: float = 2,
    *,
    codec: str | Codec | None = None,
    key_bits: float | None = None,
    value_bits: float | None = None,
    residual_length: int = 32,
    sink_length: int = 4,
    skip_layers: Sequence[int] = (),
    exact_layers: Sequence[int] = (),
    layer_bits: Mapping[int, float | tuple[float, float]] | None = None,
    guard: Guard = "warn",
    guard_threshold: float = 0.65,
    calibration: Calibration | None = None,
    inner: Inner = "inductor",
    cuda_graphs: bool = False,
    share_layers: bool = True,
    strict: bool = False,
) -> Target:
    """Give a model or a function a packed KV cache.

    An ``nn.Module`` is compiled in place, so that its ``generate()`` is reached, and returned;
    compiling it again replaces the first time. A plain callable is compiled and returned. See
    :class:`squat_fx.Config` for the options.

    Raises:
        ValueError: an option is out of range, or the calibration belongs to another model; nothing
            has been changed.
        TypeError: ``model_or_fn`` is neither a module nor callable.
    """
    config = Config(
        bits=bits,
        codec=codec,
        key_bits=key_bits,
        value_bits=value_bits,
        residual_length=residual_length,
        sink_length=sink_length,
        skip_layers=tuple(skip_layers),
        exact_layers=tuple(exact_layers),
        layer_bits=layer_bits or {},
        guard=guard,
        guard_threshold=guard_threshold,
        calibration=calibration,
        inner=inner,
        cuda_graphs=cuda_graphs,
        share_layers=share_layers,
        strict=strict,
    )
    if isinstance(model_or_fn, nn.Module):
        if config.calibration is not None:
            config.calibration.check(model_or_fn)
        compiled = Compiled(model_or_fn._call_impl, config, may_be_left_out(model_or_fn))
        model_or_fn._compiled_call_impl = compiled
        object.__setattr__(model_or_fn, _ATTRIBUTE, _Mark(compiled))
        return cast(Target, model_or_fn)
    if not callable(model_or_fn):
        raise TypeError(
            f"expected an nn.Module or a callable to compile, got {type(model_or_fn).__name__}"
        )
    return cast(Target, _wrap(model_or_fn, Compiled(model_or_fn, config)))


def _wrap(function: Callable[..., Any], compiled: Compiled) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        return compiled(*args, **kwargs)

    for name in ("__name__", "__doc__", "__module__", "__qualname__", "__wrapped__"):
        setattr(call, name, getattr(function, name, None))
    setattr(call, _ATTRIBUTE, _Mark(compiled))
    return call


def compiled_of(model: Any) -> Compiled | None:
    """What :func:`compile` made of ``model``; None if it did not, or if this is a copy."""
    mark = getattr(model, _ATTRIBUTE, None)
    return None if mark is None else mark.compiled


def report(model: Any) -> Report:
    """What was rewritten, what was left alone and why, for what :func:`compile` returned.

    Raises:
        ValueError: ``model`` was never compiled by :func:`compile`.
    """
    mark = getattr(model, _ATTRIBUTE, None)
    if mark is None:
        raise ValueError(
            "this model or function was not compiled by squat_fx.compile(); compile it first"
        )
    if mark.compiled is None:
        copied = Report()
        copied.note(
            "this is a copy of a compiled model (deepcopy or pickle), and copies run uncompiled, "
            "with a full-precision cache; call squat_fx.compile() on it"
        )
        return copied
    if isinstance(model, nn.Module) and model._compiled_call_impl is not mark.compiled:
        mark.compiled.report.note(
            "the model was compiled again by something else; squat_fx no longer runs"
        )
    return mark.compiled.report


def explain(
    model: Any, example_inputs: Mapping[str, Any] | Sequence[Any], bits: float = 2, **options: Any
) -> Report:
    """What :func:`compile` would rewrite, found by running ``model`` once.

    If it returns a Hugging Face cache, one decode step follows.

    The model is left as it is. ``example_inputs`` are positional (a sequence) or keyword arguments
    (a mapping).
    """
    config = Config.from_options({"bits": bits, **options, "inner": "eager"})
    target = model.forward if isinstance(model, nn.Module) else model
    compiled = Compiled(target, config, may_be_left_out(model))
    args, kwargs = (
        ((), dict(example_inputs))
        if isinstance(example_inputs, Mapping)
        else (tuple(example_inputs), {})
    )
    with torch.no_grad():
        result = compiled(*args, **kwargs)
        cache = getattr(result, "past_key_values", None)
        logits = getattr(result, "logits", None)
        if cache is not None and isinstance(logits, Tensor):
            step = {"input_ids": logits[:, -1:].argmax(-1), "past_key_values": cache}
            compiled(**{k: v for k, v in kwargs.items() if k == "use_cache"}, **step)
    return compiled.report


def rewrite(
    graph_module: fx.GraphModule, example_inputs: Sequence[Any], config: Config | None = None
) -> tuple[nn.Module, Report]:
    """Rewrite a bare graph (``symbolic_trace``, ``make_fx``, ``torch.export(...).module()``).

    Returns a module that takes and returns :class:`squat_fx.QuantizedKV` where the cache was (it
    also takes a dense cache and packs it), and the report. ``graph_module`` is left as it is.

    Raises:
        ValueError: ``example_inputs`` do not fit the graph.
    """
    return rewrite_module(
        copy_graph(graph_module), example_inputs, config or Config(), graph_module.graph._codegen
    )
