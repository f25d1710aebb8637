"""Rewriting a bare ``fx.GraphModule``: no Dynamo, no inner compiler."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

from squat_fx.backend import NotRewritten, rewrite_graph
from squat_fx.boundary import Boundary
from squat_fx.config import Config
from squat_fx.passes.records import Rewriting
from squat_fx.passes.spelling import argument, dim_of, kind, returned_nodes, shape_of, value_of
from squat_fx.report import GraphReport, Report


class RewrittenModule(nn.Module):
    """A rewritten graph, called as the original was, with ``QuantizedKV`` where the cache is."""

    def __init__(self, boundary: Boundary, module: fx.GraphModule, codegen: Any) -> None:
        super().__init__()
        self.module = module
        self._boundary = boundary
        self._codegen = codegen

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the rewritten graph."""
        flat = self._codegen.process_inputs(*args, **kwargs) if kwargs or self._is_pytree else args
        out = self._boundary(*flat)
        return self._codegen.process_outputs(out) if self._is_pytree else out

    @property
    def _is_pytree(self) -> bool:
        return isinstance(self._codegen, fx.graph._PyTreeCodeGen)


def rewrite_module(module, example_inputs, config):
    raise NotImplementedError
