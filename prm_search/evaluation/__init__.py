"""Evaluation: which strategy answers how many problems, at what price, and how sure that is.

`evaluate` draws and searches, `summarise` makes the table of its records, `write_report` the page. `evaluate_responses`
does it with responses that exist; `score_steps` and `summarise_steps` ask whether wrong steps are found. No torch until
a model is run.
"""

from __future__ import annotations

from .plan import STRATEGIES, Cell, Plan, Unit
from .report import write_report, write_step_report
from .responses import evaluate_responses
from .run import evaluate
from .step_errors import StepSummary, summarise_steps
from .step_scores import Solution, score_steps
from .summary import Outcome, Summary, SummaryRow, compare, outcomes, summarise

__all__ = [
    "STRATEGIES",
    "Cell",
    "Outcome",
    "Plan",
    "Solution",
    "StepSummary",
    "Summary",
    "SummaryRow",
    "Unit",
    "compare",
    "evaluate",
    "evaluate_responses",
    "outcomes",
    "score_steps",
    "summarise",
    "summarise_steps",
    "write_report",
    "write_step_report",
]  # fmt: skip
