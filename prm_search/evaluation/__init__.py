"""Evaluation: which strategy answers how many problems, at what price, and how sure that is.

`evaluate` draws and searches, `summarise` makes the table of its records, `write_report` the page. No torch until a
model is run.
"""

from __future__ import annotations

from .plan import STRATEGIES, Cell, Plan, Unit
from .report import write_report
from .run import evaluate
from .summary import Outcome, Row, Summary, compare, outcomes, summarise

__all__ = [
    "STRATEGIES", "Cell", "Outcome", "Plan", "Row", "Summary", "Unit", "compare", "evaluate", "outcomes", "summarise",
    "write_report",
]  # fmt: skip
