"""The instruments every pass has: a count, a time, a log line, a lint."""

from __future__ import annotations

import logging
import time
from abc import ABC, abstractmethod
from typing import ClassVar

from squat_fx.passes.records import Rewriting

logger = logging.getLogger(__name__)


class GraphPass(ABC):
    """One idea about graphs, called with the graph that is being rewritten.

    Attributes:
        name: a verb phrase.
        matched_count: what the last call found.
    """

    name: ClassVar[str]

    def __init__(self) -> None:
        self.matched_count = 0

    def __call__(self, rewriting: Rewriting) -> None:
        """Run on ``rewriting``, then lint its graph."""
        started = time.perf_counter()
        self.matched_count = self.run(rewriting)
        rewriting.graph.lint()
        logger.debug(
            "%s: %d in %.1f ms",
            self.name,
            self.matched_count,
            1e3 * (time.perf_counter() - started),
        )

    @abstractmethod
    def run(self, rewriting: Rewriting) -> int:
        """Do the work; return how much was found."""
