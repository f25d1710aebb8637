"""A broken promise raises; a graph that cannot be static says why."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from squat_fx.kernels import ops
from squat_fx.passes import Rewriting, Verify
from tests.passes.capture import LOSSLESS, Cached, examples, rewrite
from tests.passes.spellings import sdpa_masked


def rewritten() -> Rewriting:
    """A rewritten decode graph, and what feeds it."""
    module, _ = rewrite(Cached(), *examples(Cached()))
    made: Any = module._rewriting
    return Rewriting(made.module, LOSSLESS, {}, inputs=made.inputs, outputs=made.outputs)


def test_a_rewritten_graph_passes() -> None:
    verify = Verify()
    verify(rewritten())
    assert verify.matched_count == 4  # an attend, an append of both, inputs, outputs


def test_an_attend_after_an_append_to_what_it_reads() -> None:
    rewriting = rewritten()
    graph = rewriting.graph
    (attend,) = graph.find_nodes(op="call_function", target=ops.overload("attend", "dense"))
    with graph.inserting_before(graph.output_node()):
        graph.node_copy(attend)
    with pytest.raises(AssertionError, match="reads after an append"):
        Verify()(rewriting)


def test_an_append_that_is_read() -> None:
    rewriting = rewritten()
    graph = rewriting.graph
    target = ops.both(*[ops.overload("append_", "dense")] * 2)
    (append,) = graph.find_nodes(op="call_function", target=target)
    graph.output_node().args = ((append,),)
    with pytest.raises(AssertionError, match="has readers"):
        Verify()(rewriting)


def test_a_placeholder_that_is_not_fed() -> None:
    rewriting = rewritten()
    with rewriting.graph.inserting_before(next(iter(rewriting.graph.nodes))):
        rewriting.graph.placeholder("forgotten")
    with pytest.raises(AssertionError, match="a placeholder is not fed"):
        Verify()(rewriting)


def test_an_output_that_the_caller_does_not_get() -> None:
    rewriting = rewritten()
    graph = rewriting.graph
    ((out,),) = graph.output_node().args
    graph.output_node().args = ((out, out),)
    with pytest.raises(AssertionError, match="2 outputs, but the caller is given"):
        Verify()(rewriting)


def test_note_names_the_inputs_that_change() -> None:
    _, report = rewrite(Cached(), *examples(Cached()))
    (note,) = report.graphs[0].notes
    assert note == "the decode graph is dynamic, because sizes of its inputs change: x"
    _, report = rewrite(Cached(sdpa_masked), *examples(Cached(), torch.zeros(3, 10)))
    (note,) = report.graphs[0].notes
    assert note.endswith(
        "x, mask; an attention mask grows with the cache, so leave out one that is all ones"
    )
