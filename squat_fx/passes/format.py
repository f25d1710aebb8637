"""Print a graph in a few stable lines, for goldens, reports and the README.

    inputs: x, *past_key, *past_value, positions
    query = linear(x, self.weight)
    attend = squat_fx.attend.dense(query, key, value, *past_key, *past_value, positions, ...)
    return query, *store

One line per node, names as in the graph. The arenas of a cache are one word: ``*past_key`` for what
arrives, ``*store`` for what the op ``store`` returns.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Iterable
from typing import Any

import torch
from torch import fx

from squat_fx.passes.spelling import flat_outputs


def format_graph(graph: fx.Graph) -> str:
    """The graph as text; stable over runs, machines and versions of torch."""
    lines = [f"inputs: {_joined(graph.find_nodes(op='placeholder'))}"]
    for node in graph.nodes:
        if node.op in ("placeholder", "get_attr", "output") or _stored_arena(node):
            continue
        text = _call(node)
        lines.append(f"{node.name} = {text}" if node.users else text)
    lines.append(f"return {_joined(flat_outputs(graph))}")
    return "\n".join(lines)


def _call(node: fx.Node) -> str:
    if node.target is operator.getitem:
        index = node.args[1] if isinstance(node.args[1], tuple) else (node.args[1],)
        return f"{_value(node.args[0])}[{', '.join(map(_index, index))}]"
    given = [_joined(node.args)] if node.args else []
    given += [f"{name}={_value(value)}" for name, value in node.kwargs.items()]
    return f"{_operation(node)}({', '.join(given)})"


def _operation(node: fx.Node) -> str:
    """``squat_fx.attend.dense``, ``aten.mul.Tensor``, ``cat``, ``self.dropout``."""
    target = node.target
    if node.op == "call_module":
        return f"self.{target}"
    if isinstance(target, torch._ops.OpOverload):
        return str(target).removesuffix(".default")
    return target if isinstance(target, str) else getattr(target, "__name__", str(target))


def _joined(values: Iterable[Any]) -> str:
    """Values with commas between; arenas that belong together as one word."""
    words: list[str] = []
    for value in values:
        word = _stored_arena(value) or _arriving_arena(value) or _value(value)
        if not word.startswith("*") or word not in words[-1:]:
            words.append(word)
    return ", ".join(words)


def _stored_arena(value: Any) -> str | None:
    """``*store`` for what is taken out of the result of the op ``store``."""
    if not isinstance(value, fx.Node) or value.target is not operator.getitem:
        return None
    made = value.args[0]
    is_store = isinstance(made, fx.Node) and _operation(made).startswith("squat_fx.store")
    return f"*{made}" if is_store else None


def _arriving_arena(value: Any) -> str | None:
    """``*past_key`` for the placeholders of a carrier's arenas."""
    if not isinstance(value, fx.Node) or value.op != "placeholder":
        return None
    arenas = "qdata|scale|zero_point|affine|basis|center|frequency|dense|start"
    match = re.fullmatch(rf"(\w+)_({arenas})", value.name)
    if match is None:
        return None
    names = {node.name for node in value.graph.find_nodes(op="placeholder")}
    carrier = match.group(1)
    return f"*{carrier}" if {f"{carrier}_dense", f"{carrier}_start"} <= names else None


def _value(value: Any) -> str:
    if isinstance(value, fx.Node):
        return f"self.{value.target}" if value.op == "get_attr" else value.name
    if isinstance(value, (list, tuple)):
        text = _joined(value)
        return f"[{text}]" if isinstance(value, list) else f"({text})"
    if isinstance(value, float):
        text = f"{value:.6g}"
        return text if re.search(r"[.en]", text) else f"{text}.0"
    if isinstance(value, (torch.dtype, torch.layout)):
        return str(value).removeprefix("torch.")
    return str(value) if isinstance(value, torch.device) else repr(value)


def _index(item: Any) -> str:
    if item is Ellipsis:
        return "..."
    if not isinstance(item, slice):
        return _value(item)
    start, stop = ("" if x is None else _value(x) for x in (item.start, item.stop))
    step = "" if item.step is None else f":{_value(item.step)}"
    return f"{start}:{stop}{step}"
