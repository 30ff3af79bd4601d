"""Measured: what loops and threads count of the models they call."""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

from ..protocols import AsyncPolicyBase, PolicyBase, ScorerDefaults

Phase = Literal["policy", "scorer"]


class Measured:
    """A count of time and forwards.

    Attributes:
        seconds, forward_calls: spent so far, by phase ("policy", "scorer").
    """

    def __init__(self) -> None:
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self.forward_calls: Counter[str] = Counter()

    @contextmanager
    def measured(self, phase: Phase, model: PolicyBase | AsyncPolicyBase | ScorerDefaults) -> Iterator[None]:
        """Count the seconds and the forwards of a block: the model's own count of them, or else one."""
        began, before = time.perf_counter(), model.forward_calls
        try:
            yield
        finally:
            self.seconds[phase] += time.perf_counter() - began
            self.forward_calls[phase] += 1 if before is None else (model.forward_calls or 0) - before
