"""The ``squat`` backend: copy the graph, run the pipeline, compile what is left, put the boundary
around it.
"""

from __future__ import annotations

import contextlib
import logging
import shutil
import warnings
from collections.abc import Callable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import replace
from functools import lru_cache
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx.experimental.symbolic_shapes import free_symbols

from squat_fx import replay
from squat_fx.boundary import Boundary, joins_of, with_joined
from squat_fx.config import Config
from squat_fx.guard import Watch, repeated, with_raised
from squat_fx.head_start import HeadStart
from squat_fx.joined import JoinedKV, parts_of
from squat_fx.kernels import ahead, reference
from squat_fx.kernels.fallback import strictly
from squat_fx.packed import PackedTensor
from squat_fx.passes import Rewriting, run_pipeline
from squat_fx.passes.records import Beside, InnerInput
from squat_fx.passes.spelling import memory_of, value_of, written_by
from squat_fx.regions import Compiler, Example, compile_by_region
from squat_fx.replay import Moving, is_number
from squat_fx.report import GraphReport, Report, is_static
from squat_fx.state import QuantizedKV
from squat_fx.storage import TOKENS, Storage

logger = logging.getLogger(__name__)


class NotRewritten(RuntimeError):
    """With ``strict=True``: an attention was left alone; the message gives the reasons."""


def squat(
    graph_module: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    options: Mapping[str, Any] | None = None,
    mode: str | None = None,
) -> Callable[..., Any]:
    """The backend behind ``torch.compile(fn, backend="squat", options={...})``.

    Raises:
        ValueError: an option is unknown or out of range, or ``mode`` was given.
    """
    if mode is not None:
        raise ValueError(
            f"backend 'squat' takes options, not mode={mode!r}; try options={{'cuda_graphs': True}}"
        )
    return compile_graph(graph_module, example_inputs, Config.from_options(options or {}), Report())


def compile_graph(
    graph_module: fx.GraphModule,
    example_inputs: Sequence[Any],
    config: Config,
    report: Report,
    head_start: HeadStart | None = None,
) -> Callable[..., Any]:
    """Rewrite and compile one Dynamo graph; what cannot be rewritten or compiled runs as it was."""
    raised = with_raised(config, report.raised)
    try:
        run = _compile_rewritten(graph_module, list(example_inputs), raised, report, head_start)
        if config.guard == "raise_bits" and report.graphs[-1].kind == "prefill":
            run = repeated(run, _rewritten_again(graph_module, config, report))
    except Exception as error:
        if config.strict:
            raise
        text = (
            f"a graph runs as it was, because compiling it failed: {type(error).__name__}: {error}"
        )
        logger.warning("%s", text, exc_info=True)
        report.note(text)
        report.graphs.append(GraphReport("untouched", inner="eager"))
        run = graph_module.forward

    def counted(*args: Any) -> Any:
        report.count_run()
        report.read_arrived()
        with strictly() if config.strict else contextlib.nullcontext():
            return run(*args)

    return counted


def _rewritten_again(
    graph_module: fx.GraphModule, config: Config, report: Report
) -> Callable[[], Callable[..., Any]]:
    """Makes a prompt's graph with the bits that its layers have by then; it runs eagerly, since
    Dynamo's guards are made and an inner compiler could not add to them.
    """
    kept = copy_graph(graph_module)
    config = replace(config, inner="eager", cuda_graphs=False)

    def again() -> Callable[..., Any]:
        examples = [value_of(node) for node in kept.graph.find_nodes(op="placeholder")]
        return _compile_rewritten(kept, examples, with_raised(config, report.raised), report)

    return again


def _compile_rewritten(
    graph_module: fx.GraphModule,
    examples: list[Any],
    config: Config,
    report: Report,
    head_start: HeadStart | None = None,
) -> Callable[..., Any]:
    rewriting = Rewriting(copy_graph(graph_module), config, {}, is_replayed=config.cuda_graphs)
    placeholders = tuple(rewriting.graph.find_nodes(op="placeholder"))
    rewriting.placeholders = placeholders
    if _needs_gradients(examples):
        reason = (
            "gradients are enabled; call the model under torch.no_grad() or torch.inference_mode()"
        )
        report.graphs.append(GraphReport("untouched", notes=(reason,), inner="eager"))
        if any(isinstance(e, PackedTensor) for e in examples):
            return _on_dense_caches(graph_module.forward)
        return _inner_compiler(config)(rewriting.module, examples)
    for node, example in zip(placeholders, examples, strict=True):
        if isinstance(example, QuantizedKV):
            rewriting.carriers[node] = example._storage.fmt
        elif isinstance(example, JoinedKV):
            rewriting.joined[node] = example.join
    spec = rewrite_graph(rewriting)
    taken = joins_of(rewriting)
    examples = [*examples, *(x for i, join in taken for x in parts_of(examples[i], join))]
    placeholders = rewriting.placeholders
    # Dynamo hands over real tensors; the fake ones, with their symbolic sizes, are in the metadata.
    fakes = [
        e if value_of(n) is None else value_of(n)
        for n, e in zip(placeholders, examples, strict=True)
    ]
    if config.strict and rewriting.skipped:
        raise NotRewritten("\n".join(f"{s.node}: {s.reason}" for s in rewriting.skipped))
    static = is_static(fakes, rewriting.inputs)
    inner_name = _available_inner(config)
    report.graphs.append(GraphReport.of(rewriting, inner_name, static))
    compiled_ahead = ahead.start(_prompts(rewriting))
    inner = _compile_inner(rewriting, examples, fakes, config)
    compiled_ahead()
    handles = [placeholders.index(node) for node in rewriting.handles]
    boundary = Boundary(
        inner, rewriting.inputs, rewriting.outputs, handles, fakes, report,
        _moving_inputs(rewriting, examples, report)
        if config.cuda_graphs and is_static(fakes, rewriting.inputs, _batch_symbols(fakes, handles))
        else None,
        [
            (row, number.size, tuple(placeholders.index(node) for node in number.carriers))
            for row, number in rewriting.numbers
        ],
        Watch(
            rewriting.watched, config, report, _changes_no_input(rewriting), rewriting.due
        )
        if rewriting.watched
        else None,
        None if _changed_in_place(rewriting) else head_start,
        rewriting.beside,
    )  # fmt: skip
    run = with_joined(boundary, taken, rewriting.returned_as)
    return run if spec is None else _with_spec(run, spec)


def _changes_no_input(rewriting: Rewriting) -> bool:
    """Whether a call may be repeated: it has no cache to append to and writes to none of its own
    inputs.
    """
    return not rewriting.handles and not _changed_in_place(rewriting)


def _changed_in_place(rewriting: Rewriting) -> set[fx.Node]:
    """Inputs, weights and buffers that a graph writes to; not what our own ops append to."""
    placeholders = rewriting.graph.find_nodes(op="placeholder")
    arenas = {
        node
        for node, fed in zip(placeholders, rewriting.inputs, strict=True)
        if fed.kind == "arena"
    }
    written = {memory_of(x) for node in rewriting.graph.nodes for x in written_by(node)}
    return {x for x in written - arenas if x.op in ("placeholder", "get_attr")}


def _prompts(rewriting: Rewriting, device: str = "cuda") -> list[ahead.Prompt]:
    """What a graph stores on such devices, for each attention; only there kernels are compiled."""
    found: list[ahead.Prompt] = []
    for site in rewriting.sites:
        attention, key = site.attention, value_of(site.key.stored)
        plain = all(
            edge.token_dim == TOKENS and not isinstance(edge.given, fx.Node)
            for edge in (site.key, site.value)
        )
        if site.kind == "prefill" and plain and key.device.type == device:
            batch, kv_heads, tokens, _ = map(_hint, key.shape)
            sizes = batch, kv_heads * site.num_queries_per_kv, kv_heads, tokens
            found.append(
                ahead.Prompt(
                    site.key.fmt,
                    site.value.fmt,
                    sizes,
                    key.dtype,
                    key.device,
                    attention.mask is not None,
                    attention.scale,
                    attention.softcap,
                    attention.sinks is not None,
                    attention.causal != reference.NO_CAUSALITY,
                    site.layer in rewriting.watched,
                    (site.key.constant, site.value.constant),
                )
            )
    return found


def _hint(size: int | torch.SymInt) -> int:
    """A size as it is in the example."""
    return size if isinstance(size, int) else int(size.node.hint)


def _on_dense_caches(forward: Callable[..., Any]) -> Callable[..., Any]:
    """``forward`` with numbers for what is packed: autograd cannot save a handle."""

    def run(*args: Any) -> Any:
        return forward(*(a.dequantize() if isinstance(a, PackedTensor) else a for a in args))

    return run


def _compile_inner(
    rewriting: Rewriting, examples: Sequence[Any], fakes: Sequence[Any], config: Config
) -> Callable[..., Any]:
    """Compile the rewritten graph, layers that are alike once."""
    compiler, inputs = _inner_compiler(config), rewriting.inputs
    positions = _fake_positions(rewriting, fakes)
    beside = _fake_beside(rewriting.beside, fakes, positions)
    inner = [_inner_example(fed, examples, fakes, positions, beside) for fed in inputs]
    if not config.share_layers or compiler is _run_as_it_is:
        return compiler(rewriting.module, [example.make()[0] for example in inner])
    kinds = [fed.kind for fed in inputs]
    row = kinds.index("positions") if "positions" in kinds else None
    return compile_by_region(rewriting.module, inner, row, compiler)


def _with_spec(run: Callable[..., Any], spec: pytree.TreeSpec) -> Callable[..., Any]:
    return lambda *args: pytree.tree_unflatten(list(run(*args)), spec)


def rewrite_graph(rewriting: Rewriting) -> pytree.TreeSpec | None:
    """Run the pipeline on a copied graph; returns the structure of its outputs if that is no flat
    tuple.
    """
    output = rewriting.graph.output_node().args[0]
    flat, spec = pytree.tree_flatten(output, is_leaf=lambda x: x is None)
    positions: list[fx.Node] = []
    rewriting.rows = list(rewriting.carriers)

    def make_positions(row: int) -> fx.Node:
        graph = rewriting.graph
        if not positions:
            first = rewriting.placeholders[0]
            with graph.inserting_before(first):
                taken = any(node.target == "positions" for node in rewriting.placeholders)
                node = graph.placeholder("squat_fx_positions" if taken else "positions")
            node._dynamo_source = _source("squat_fx_positions")  # pyright: ignore[reportAttributeAccessIssue]
            positions.append(node)
        if row < 0:
            return positions[0]
        return graph.call_function(torch.select, (positions[0], 0, row))

    rewriting.make_positions = make_positions
    run_pipeline(rewriting)
    _annotate_sources(rewriting)
    rewriting.module.recompile()
    is_flat = isinstance(output, (tuple, list)) and len(flat) == len(output)
    return None if is_flat else spec


# copying a Dynamo graph ---------------------------------------------------------------------------


def copy_graph(graph_module: fx.GraphModule) -> fx.GraphModule:
    """A copy that may be changed: Dynamo reads the original afterwards, AOT reads these attributes
    to know which inputs are parameters.
    """
    graph = fx.Graph()
    mapping: dict[fx.Node, fx.Node] = {}
    graph.output(graph.graph_copy(graph_module.graph, mapping))
    graph.output_node().meta.update(graph_module.graph.output_node().meta)
    copied = fx.GraphModule(graph_module, graph)
    copied.meta = dict(graph_module.meta)
    for name in ("_param_name_to_source",):
        if hasattr(graph_module, name):
            setattr(copied, name, getattr(graph_module, name))
    for old in graph_module.graph.find_nodes(op="placeholder"):
        if hasattr(old, "_dynamo_source"):
            mapping[old]._dynamo_source = old._dynamo_source  # pyright: ignore[reportAttributeAccessIssue]
    return copied


def _source(name: str) -> Any:
    from torch._dynamo.source import LocalSource

    return LocalSource(name)


def _annotate_sources(rewriting: Rewriting) -> None:
    """Give arena placeholders the source ``carrier.arena``, and constants and those of what is
    computed beside the graph one of their own.
    """
    from torch._dynamo.source import AttrSource

    nodes = rewriting.graph.find_nodes(op="placeholder")
    for node, fed in zip(nodes, rewriting.inputs, strict=True):
        if fed.kind in ("beside", "constant"):
            node._dynamo_source = _source(node.name)  # pyright: ignore[reportAttributeAccessIssue]
        if fed.kind != "arena":
            continue
        source = getattr(rewriting.placeholders[fed.index], "_dynamo_source", None)
        if source is not None:
            node._dynamo_source = AttrSource(source, fed.name)


# the inner compiler -------------------------------------------------------------------------------


def _moving_inputs(rewriting: Rewriting, examples: Sequence[Any], report: Report) -> Moving | None:
    """Which inner inputs may be elsewhere at every call; None if the graph cannot be replayed as a
    CUDA graph, with a note that says why.
    """
    arguments: dict[int, int] = {}
    positions: list[int] = []
    others: list[int] = []
    changed = _changed_in_place(rewriting)
    for i, fed in enumerate(rewriting.inputs):
        if fed.kind == "positions":
            positions.append(i)
        elif fed.kind in ("argument", "dense"):
            node, example = rewriting.placeholders[fed.index], examples[fed.index]
            is_packed = isinstance(example, PackedTensor)
            if is_number(example):
                others.append(fed.index)
            elif is_packed or example.device.type != replay.DEVICE:
                where = "packed" if is_packed else f"on {example.device}"
                report.note(f"a graph is not replayed, because its input {node.name} is {where}")
                return None
            elif _stays_in_place(node, example):
                others.append(fed.index)
            elif node in changed:
                report.note(
                    f"a graph is not replayed, because it writes to its input {node.name}, which "
                    "may be elsewhere at every call"
                )
                return None
            else:
                arguments[i] = fed.index
    return Moving(arguments, positions, others) if rewriting.handles else None


def _batch_symbols(fakes: Sequence[Any], handles: Sequence[int]) -> AbstractSet[Any]:
    """The symbols in the batch size of caches: all steps of a generation have the same."""
    return set().union(*(free_symbols(fakes[i].shape[0]) for i in handles))


def _stays_in_place(node: fx.Node, example: Tensor) -> bool:
    """Whether an argument is a weight or a buffer."""
    marks = node.meta.get("tensor_dict") or {}
    return isinstance(example, torch.nn.Parameter) or "_dynamo_static_input_type" in marks


def _needs_gradients(examples: Sequence[Any]) -> bool:
    return torch.is_grad_enabled() and any(
        isinstance(e, Tensor) and e.requires_grad for e in examples
    )


def _fake_positions(rewriting: Rewriting, fakes: Sequence[Any]) -> Any:
    """An example of the positions tensor: fake, or AOT would give a real one symbolic sizes."""
    handles = [fakes[rewriting.placeholders.index(node)] for node in rewriting.handles]
    if not handles:
        return None
    like = handles[0]._storage["dense"]
    with like.fake_mode if isinstance(like, FakeTensor) else contextlib.nullcontext():
        rows = len(rewriting.rows)
        return torch.zeros((rows, 2), dtype=torch.int64, device=like.device)


def _fake_mode(fakes: Sequence[Any]) -> Any:
    """The mode of the other examples; None if they are real."""
    return next((f.fake_mode for f in fakes if isinstance(f, FakeTensor)), None)


def _fake_constant(tensor: Tensor, fakes: Sequence[Any]) -> Tensor:
    """An example of ``tensor`` in the mode of the other examples, with sizes that are numbers."""
    with _fake_mode(fakes) or contextlib.nullcontext():
        return torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device)


def _fake_arena(storage: Storage, fed: InnerInput, fakes: Sequence[Any]) -> Tensor:
    """An example of an arena: nothing may depend on how many tokens fit into one that grows.

    Dynamo does not know of it and guards on nothing of it.
    """
    arena = storage[fed.name]
    mode = _fake_mode(fakes)
    if mode is None or mode.shape_env is None or fed.name not in storage.fmt.packed_names:
        return _fake_constant(arena, fakes)
    sizes = list(arena.shape)
    sizes[TOKENS] = max(sizes[TOKENS], 2)  # 0 and 1 would be taken for constants
    with torch.inference_mode(False):
        like = arena.new_empty(sizes) if sizes != list(arena.shape) else arena
        return _with_dynamic_dim(like, TOKENS, f"squat_fx_{fed.index}_{fed.name}", mode)


def _fake_beside(beside: Beside | None, fakes: Sequence[Any], positions: Any) -> list[Any]:
    """Examples of what the graph beside another one gives it: nothing may depend on how many
    columns they have, if those grow.
    """
    if beside is None:
        return []
    given = [fakes[fed.index] if fed.kind == "argument" else positions for fed in beside.inputs]
    mode = _fake_mode(fakes)
    with mode or contextlib.nullcontext(), enable_python_dispatcher(), torch.no_grad():
        found = [x.new_empty(x.shape) for x in beside.module(*given)]
    if mode is None or mode.shape_env is None:
        return found
    for i, (x, grows) in enumerate(zip(found, beside.grow, strict=True)):
        if grows:
            columns = torch.empty(max(_hint(x.shape[-1]), 2), device="meta")
            columns = _with_dynamic_dim(columns, 0, f"squat_fx_beside_{i}", mode).shape[0]
            found[i] = x.new_empty((*x.shape[:-1], columns))
    return found


def _with_dynamic_dim(like: Tensor, dim: int, name: str, mode: Any) -> Tensor:
    """A fake tensor like another one, of which the size along ``dim`` is a symbol of its own that
    Dynamo does not know of.
    """
    from torch.fx.experimental.symbolic_shapes import DimDynamic, StatelessSymbolicContext

    sizes = [DimDynamic.DYNAMIC if i == dim else DimDynamic.STATIC for i in range(like.dim())]
    context = StatelessSymbolicContext(dynamic_sizes=sizes)
    return mode.from_tensor(like, symbolic_context=context, source=_source(name))


def _inner_example(
    fed: InnerInput,
    examples: Sequence[Any],
    fakes: Sequence[Any],
    positions: Any,
    beside: Sequence[Any],
) -> Example:
    def make() -> tuple[Any, Any]:
        if fed.kind == "argument":
            return examples[fed.index], fakes[fed.index]
        fake: Any = positions
        if fed.tensor is not None:
            fake = _fake_constant(fed.tensor, fakes)
        elif fed.kind == "beside":
            fake = beside[fed.index]
        elif fed.kind == "arena":
            fake = _fake_arena(examples[fed.index]._storage, fed, fakes)
        elif fed.kind == "dense":
            fake = fakes[fed.index]
            if not isinstance(fake, PackedTensor):
                return examples[fed.index], fake
            with fake.dense.fake_mode:
                fake = fake.outline()
        return fake, fake

    if fed.kind != "arena":
        return Example(make)
    storage = examples[fed.index]._storage
    arena = storage[fed.name]
    return Example(make, (storage.fmt, storage.role, fed.name, arena.shape, arena.dtype))


@lru_cache(maxsize=1)
def _has_cpp_compiler() -> bool:
    from torch._inductor import cpp_builder

    try:
        return shutil.which(cpp_builder.get_cpp_compiler()) is not None
    except Exception:
        return False


@lru_cache(maxsize=1)
def _warn_no_compiler() -> None:
    warnings.warn(
        "no C++ compiler was found, so graphs run with inner='eager'; "
        "install g++ or clang, or pass inner='eager'",
        stacklevel=2,
    )


def _available_inner(config: Config) -> str:
    """The inner compiler that can run here."""
    if config.inner != "inductor" or _has_cpp_compiler():
        return config.inner
    _warn_no_compiler()
    return "eager"


def _run_as_it_is(module: fx.GraphModule, _: list[Any]) -> Callable[..., Any]:
    return module.forward


def _inner_compiler(config: Config) -> Compiler:
    name = _available_inner(config)
    if name == "eager":
        return _run_as_it_is
    if name == "aot_eager":
        from torch._dynamo.backends.debugging import aot_eager

        return aot_eager
    from torch._inductor.compile_fx import compile_fx

    compiler: Any = compile_fx
    return compiler
