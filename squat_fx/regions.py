"""Compile each distinct region of a graph once, and call it wherever it occurs.

Before:
    compiled(graph of 32 layers)(*inputs)
After:
    first = compiled(embedding .. layer 0)
    layer = compiled(one layer)                  # called 31 times, each time with other weights
    last  = compiled(norm and head)

Two regions share a compilation if they have the same key (see ``passes.find_regions``) and their
inputs are alike: dtypes, shapes, strides, devices, alignment, which of them are the same tensor,
and sizes that are symbols in the same places. Where the compiler made an assumption on a symbol, it
is asserted of the symbols of the other regions, too, or they are compiled by themselves.

Keeps: the order of operations, arenas that are written in place, the marks by which a compiler
knows weights, and memory: a tensor that no later region reads is free as soon as the region that
reads it last has read it.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from functools import partial
from operator import itemgetter
from typing import Any

import sympy
import torch
from torch import Tensor, fx
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx.experimental.symbolic_shapes import free_symbols, free_unbacked_symbols

from squat_fx.passes.find_regions import Region, arguments_of, attribute_of, find_regions
from squat_fx.passes.spelling import size_of

logger = logging.getLogger(__name__)

Compiler = Callable[[fx.GraphModule, list[Any]], Callable[..., Any]]
Boxed = Callable[[list[Any]], Sequence[Any]]
ALIGNMENT = 16  # bytes; compilers load in such pieces where an example lies at a multiple


class NotAlike(Exception):
    """A graph cannot be compiled region by region; the message says why."""


@dataclass(frozen=True)
class Example:
    """An example of an input, made when it is asked for.

    Attributes:
        make: gives it as the compiler takes it, and as a fake tensor or a symbolic size.
        stand_in: equal for inputs of which one example may stand for another in the same place of
            another region; None if it may not.
    """

    make: Callable[[], tuple[Any, Any]]
    stand_in: Hashable = None


def compile_by_region(
    module: fx.GraphModule,
    examples: Sequence[Example],
    positions: int | None,
    compiler: Compiler,
) -> Callable[..., Any]:
    """``compiler(module, examples)``, where layers that are alike are compiled once.

    Args:
        module: what is compiled; left as it is if it has regions, else the compiler's.
        examples: of its inputs.
        positions: which of them is the positions tensor.
        compiler: called for each distinct region, or for the whole.
    """
    from torch._dynamo.exc import RestartAnalysis

    placeholders = module.graph.find_nodes(op="placeholder")
    node = None if positions is None else placeholders[positions]
    try:
        regions = find_regions(module.graph, node)
        if isinstance(regions, str):
            raise NotAlike(regions)
        return _Builder(module, regions, examples, node, compiler).build()
    except RestartAnalysis:  # Dynamo's way of beginning again
        raise
    except Exception as reason:
        unforeseen = not isinstance(reason, NotAlike)
        logger.debug("compiled as a whole: %s", reason, exc_info=unforeseen)
        return compiler(module, [example.make()[0] for example in examples])


class Program:
    """Regions called one after the other; called as the whole graph would be."""

    def __init__(self, constants: Sequence[Tensor]) -> None:
        self._constants = constants
        self._steps: list[tuple[Boxed, Callable[[list[Any]], Sequence[Any]], list[int]]] = []
        self._results: Callable[[list[Any]], Sequence[Any]] = itemgetter(slice(0))

    def add(self, run: Boxed, taken: Sequence[int], dropped: Sequence[int]) -> None:
        """Call ``run`` with the values at ``taken``, of which those ``dropped`` go; its results
        come behind all values there are.
        """
        self._steps.append((run, _getter(taken), list(dropped)))

    def finish(self, results: Sequence[int]) -> None:
        """Return the values at such places."""
        self._results = _getter(results)

    def __call__(self, *args: Any) -> Sequence[Any]:
        values = [*args, *self._constants]
        del args
        for run, take, dropped in self._steps:
            given = list(take(values))
            for i in dropped:
                values[i] = None
            values += run(given)
        return self._results(values)


def _getter(places: Sequence[int]) -> Callable[[list[Any]], Sequence[Any]]:
    """Values at places, in C where there are several."""
    if len(places) > 1:
        return itemgetter(*places)
    return lambda values: [values[i] for i in places]


class _Compiled:
    """A compiled region.

    Attributes:
        run: takes its inputs as a list, which it empties, and returns its outputs.
        outputs: fake tensors and sizes like those that the first such region returns.
        symbols: of the sizes of its inputs.
        assumed: what the compiler assumed of them, besides what was known before.
    """

    def __init__(
        self, run: Boxed, outputs: Sequence[Any], symbols: Sequence[Any], assumed: Sequence[Any]
    ) -> None:
        self.run = run
        self.outputs = outputs
        self.symbols = symbols
        self.assumed = assumed


class _Noting(fx.Interpreter):
    """Leaves on every node what it makes; a cache of compiled graphs asks for it."""

    def run_node(self, n: fx.Node) -> Any:
        """See ``fx.Interpreter``."""
        n.meta["example_value"] = made = super().run_node(n)
        return made


class _Builder:
    """Turns regions into a :class:`Program`."""

    def __init__(
        self,
        module: fx.GraphModule,
        regions: Sequence[Region],
        examples: Sequence[Example],
        positions: fx.Node | None,
        compiler: Compiler,
    ) -> None:
        given = module.graph.find_nodes(op="placeholder")
        self._makers = dict(zip(given, examples, strict=True))
        self._stand_ins: dict[Hashable, tuple[Any, Any]] = {}
        self._made: dict[fx.Node, tuple[Any, Any]] = {
            node: example.make()
            for node, example in self._makers.items()
            if example.stand_in is None
        }
        fakes = (fake for _, fake in self._made.values())
        mode = next((f.fake_mode for f in fakes if isinstance(f, FakeTensor)), None)
        if mode is None:
            raise NotAlike("none of the examples is a fake tensor")
        self._mode = mode
        self._module = module
        self._regions = regions
        self._positions = positions
        self._compiler = compiler
        self._compiled: dict[Hashable, _Compiled] = {}
        attributes = module.graph.find_nodes(op="get_attr")
        constants = [attribute_of(node) for node in attributes]
        for node, constant in zip(attributes, constants, strict=True):
            self._made[node] = constant, mode.from_tensor(constant, static_shapes=True)
        self._slots = {node: i for i, node in enumerate((*given, *attributes))}
        self._program = Program(constants)
        self._count = len(self._slots)

    def build(self) -> Program:
        """Compile what is distinct, and call it for all."""
        last_reader = {x: i for i, region in enumerate(self._regions) for x in region.inputs}
        outputs = self._module.graph.output_node().args[0]
        if not isinstance(outputs, (tuple, list)) or not all(
            isinstance(x, fx.Node) for x in outputs
        ):
            raise NotAlike("the graph returns something else than what it computed")
        rows = self._cut_positions()
        for i, region in enumerate(self._regions):
            inputs = [self._example(x, place) for place, x in enumerate(region.inputs)]
            slots = [self._slots[x] for x in region.inputs]
            if self._positions in region.inputs and region.rows:
                place = region.inputs.index(self._positions)
                slots[place], fake = rows[region.first_row, region.rows]
                inputs[place] = fake, fake
            for symbol in _unbound([fake for _, fake in inputs]):
                slot, size = self._size(symbol)
                slots.append(slot)
                inputs.append((size, size))
            compiled, made = self._compile(region, inputs)
            dropped = [
                self._slots[x]
                for x in region.inputs
                if last_reader[x] == i and x not in outputs and x is not self._positions
            ]
            self._program.add(compiled.run, slots, dropped)
            for node, fake in zip(region.outputs, made, strict=True):
                self._made[node] = fake, fake
                self._slots[node] = self._count
                self._count += 1
        self._program.finish([self._slots[x] for x in outputs])  # pyright: ignore
        logger.debug("%d regions, %d compiled", len(self._regions), len(self._compiled))
        return self._program

    def _example(self, node: fx.Node, place: int) -> tuple[Any, Any]:
        """An example of an input of a region, and a fake; ``place`` is where it is given."""
        if node in self._made:
            return self._made[node]
        example = self._makers[node]
        key = place, example.stand_in
        if key not in self._stand_ins:
            self._stand_ins[key] = example.make()
        return self._stand_ins[key]

    def _cut_positions(self) -> dict[tuple[int, int], tuple[int, Any]]:
        """Slots and examples of the pieces of the positions tensor that regions read."""
        pieces = list(dict.fromkeys((r.first_row, r.rows) for r in self._regions if r.rows))
        if not pieces:
            return {}
        assert self._positions is not None
        whole = self._made[self._positions][1]

        def cut(given: list[Any]) -> list[Any]:
            return [given[0].narrow(0, first, rows) for first, rows in pieces]

        self._program.add(cut, [self._slots[self._positions]], [])
        slots = range(self._count, self._count + len(pieces))
        self._count += len(pieces)
        with self._mode:
            fakes = [whole.new_empty((rows, *whole.shape[1:])) for _, rows in pieces]
        return dict(zip(pieces, zip(slots, fakes, strict=True), strict=True))

    def _size(self, symbol: sympy.Symbol) -> tuple[int, torch.SymInt]:
        """The slot of a size that is a symbol, and the size."""
        inputs = [node for node in self._makers if node in self._made]
        for node in inputs:
            fake = self._made[node][1]
            if isinstance(fake, torch.SymInt) and size_of(fake) == symbol:
                return self._slots[node], fake
        for node in inputs:
            fake = self._made[node][1]
            for dim, size in enumerate(fake.shape if isinstance(fake, Tensor) else ()):
                if isinstance(size, torch.SymInt) and size_of(size) == symbol:
                    self._program.add(partial(_size_along, dim), [self._slots[node]], [])
                    self._count += 1
                    return self._count - 1, size
        raise NotAlike(f"the size {symbol} is that of no input")

    def _compile(
        self, region: Region, inputs: Sequence[tuple[Any, Any]]
    ) -> tuple[_Compiled, Sequence[Any]]:
        """A region's callable, and what its outputs look like."""
        fakes = [fake for _, fake in inputs]
        alike, symbols = _likeness(inputs, [_is_static(x) for x in region.inputs])
        key: Hashable = (region.key, alike)
        known = self._compiled.get(key)
        if known is not None:
            if known.symbols == symbols:
                return known, known.outputs
            if self._holds(known, symbols):
                if _symbols_of(known.outputs).isdisjoint(_changed(known.symbols, symbols)):
                    return known, known.outputs
                return known, self._outputs(self._module_of(region, len(inputs)), fakes)
            key = key, len(self._compiled)
        module = self._module_of(region, len(inputs))
        outputs = self._outputs(module, fakes)
        shape_env = self._mode.shape_env
        before = len(shape_env.guards) if shape_env else 0
        compiled = self._compiler(module, [example for example, _ in inputs])
        assumed = [guard.expr for guard in shape_env.guards[before:]] if shape_env else []
        self._compiled[key] = _Compiled(_boxed(compiled), outputs, symbols, assumed)
        return self._compiled[key], outputs

    def _holds(self, compiled: _Compiled, symbols: Sequence[Any]) -> bool:
        """Whether what a compiler assumed is true of other symbols; from now on it is guarded."""
        renamed = dict(zip(compiled.symbols, symbols, strict=True))
        shape_env: Any = self._mode.shape_env
        expressions = (expression.xreplace(renamed) for expression in compiled.assumed)
        return all(bool(shape_env.evaluate_expr(expression)) for expression in expressions)

    def _outputs(self, module: fx.GraphModule, fakes: Sequence[Any]) -> Sequence[Any]:
        """What a region returns, without computing it."""
        with self._mode, enable_python_dispatcher(), torch.no_grad():
            outputs = _Noting(module).run(*fakes)
        for x in outputs:
            if not isinstance(x, (FakeTensor, torch.SymInt)) or free_unbacked_symbols(x):
                raise NotAlike(f"a region would return {type(x).__name__}")
        return outputs

    def _module_of(self, region: Region, arguments: int) -> fx.GraphModule:
        """A region as a graph of its own; arguments behind its inputs are sizes."""
        graph = fx.Graph()
        copies: dict[fx.Node, fx.Node] = {}
        for i in range(arguments):
            copied = graph.placeholder(f"input_{i}")
            copied._dynamo_source = None  # pyright: ignore[reportAttributeAccessIssue]
            if i < len(region.inputs):
                node = region.inputs[i]
                copies[node] = copied
                if node.op == "placeholder" and node is not self._positions:
                    copied.meta = dict(node.meta)
                    copied._dynamo_source = getattr(node, "_dynamo_source", None)  # pyright: ignore
        local = set(region.nodes)
        for node in region.nodes:
            args, kwargs = arguments_of(node, self._positions, region.first_row, local)
            args, kwargs = fx.map_arg((args, kwargs), copies.__getitem__)  # pyright: ignore
            copies[node] = graph.create_node(node.op, node.target, args, kwargs)
            copies[node].meta = dict(node.meta)
        graph.output(tuple(copies[node] for node in region.outputs))
        module = fx.GraphModule({}, graph)
        module.meta = dict(self._module.meta)
        if hasattr(self._module, "_param_name_to_source"):
            module._param_name_to_source = {}  # pyright: ignore[reportArgumentType]
        return module


def _size_along(dim: int, given: list[Any]) -> list[int]:
    return [given[0].shape[dim]]


def _boxed(compiled: Callable[..., Any]) -> Boxed:
    """``compiled`` as a function of a list that it empties: a tensor is free when it was read."""
    inside: Any = compiled
    while inside is not None:
        # Wrappers that spread the list out copy the mark of what they wrap.
        if getattr(inside, "_boxed_call", False) and _takes_one_argument(inside):
            return inside
        inside = getattr(inside, "__wrapped__", None)
    return lambda given: compiled(*given)


def _takes_one_argument(function: Callable[..., Any]) -> bool:
    parameters = inspect.signature(function, follow_wrapped=False).parameters.values()
    return [p.kind for p in parameters] == [inspect.Parameter.POSITIONAL_OR_KEYWORD]


def _is_static(node: fx.Node) -> bool:
    """Whether an input is a weight or a buffer that stays where it is."""
    return "_dynamo_static_input_type" in (node.meta.get("tensor_dict") or {})


def _likeness(
    inputs: Sequence[tuple[Any, Any]], static: Sequence[bool]
) -> tuple[Hashable, list[sympy.Symbol]]:
    """What compiled code may depend on besides the graph, with symbols by their place, and these.

    Args:
        inputs: an example and a fake of each.
        static: whether inputs are weights.
    """
    symbols: dict[sympy.Symbol, int] = {}
    tensors: dict[int, int] = {}

    def size(x: Any) -> Hashable:
        expression = size_of(x)
        if not isinstance(expression, sympy.Expr):
            return expression
        for symbol in sorted(expression.free_symbols, key=str):
            symbols.setdefault(symbol, len(symbols))  # pyright: ignore
        places = {s: sympy.Symbol(f"place_{symbols[s]}", integer=True) for s in symbols}
        return expression.xreplace(places)

    found: list[Hashable] = []
    for (example, fake), is_weight in zip(
        inputs, (*static, *(False for _ in inputs[len(static) :])), strict=True
    ):
        if not isinstance(fake, Tensor):
            found.append((type(fake), size(fake)))
            continue
        # Of other inputs the compiled code looks at the alignment whenever it is called.
        address = example.data_ptr() if is_weight and not isinstance(example, FakeTensor) else 0
        found.append(
            (
                isinstance(example, torch.nn.Parameter),
                fake.dtype,
                fake.device,
                tuple(map(size, fake.shape)),
                tuple(map(size, fake.stride())),
                size(fake.storage_offset()),
                fake.requires_grad,
                fake.is_inference(),
                address % ALIGNMENT,
                tensors.setdefault(id(example), len(tensors)),
                is_weight,
            )
        )
    return tuple(found), list(symbols)


def _symbols_of(values: Sequence[Any]) -> set[Any]:
    return set().union(*(free_symbols(x) for x in values))


def _changed(before: Sequence[Any], after: Sequence[Any]) -> set[Any]:
    return {a for a, b in zip(before, after, strict=True) if a != b}


def _unbound(fakes: Sequence[Any]) -> list[Any]:
    """Symbols in sizes and strides of inputs of which none is just that symbol."""
    sizes: set[Any] = set()
    for x in fakes:
        sizes.update(map(size_of, (*x.shape, *x.stride()) if isinstance(x, Tensor) else (x,)))
    expressions = [size for size in sizes if isinstance(size, sympy.Expr)]
    return sorted(set().union(*(e.free_symbols for e in expressions)) - sizes, key=str)
