"""``prm-search calibrate``: from a scorer's values to probabilities of success, on labelled responses."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from ..calibration import Calibration
from ..evaluation.reliability import cross_fitted, plot_reliability, reliability
from ..values import VALUES, along
from . import BadInput, options
from .config import Common
from .grouped import grouped
from .options import ADVANCED, DATA, OUTPUT
from .records import json_lines, writable

METHODS = ("platt", "isotonic")


@dataclass(frozen=True, kw_only=True)
class Scored:
    """Scored responses, and their labels."""

    scores: Annotated[
        str, typer.Option(help="What prm-search score wrote of the responses, by any scorer.", rich_help_panel=DATA)
    ]
    labels: Annotated[
        str,
        typer.Option(
            help='The responses themselves, with "label" 0 or 1: what prm-search rollout wrote.', rich_help_panel=DATA
        ),
    ]
    value: Annotated[
        str,
        typer.Option(
            help=f"What is calibrated: reward (the scorer's own), or of {','.join(VALUES)}.", rich_help_panel=DATA
        ),
    ] = "reward"


@dataclass(frozen=True, kw_only=True)
class Fit:
    """The map."""

    method: Annotated[str, typer.Option(help="platt (two numbers), or isotonic (hundreds of responses).")] = "platt"
    folds: Annotated[
        int, typer.Option(help="Parts of the problems, between which it is measured.", rich_help_panel=ADVANCED)
    ] = 5
    bins: Annotated[int, typer.Option(help="Of the plot.", rich_help_panel=ADVANCED)] = 10
    out: Annotated[str, typer.Option(help="File for the calibration.", rich_help_panel=OUTPUT)]
    plot: Annotated[str | None, typer.Option(help="File for a reliability plot (PNG).", rich_help_panel=OUTPUT)] = None


@grouped
def calibrate(scored: Scored, fit: Fit, common: Common) -> None:
    """Map a scorer's values to probabilities of success."""
    options.one_of("--method", fit.method, METHODS)
    options.one_of("--value", scored.value, ("reward", *VALUES))
    options.at_least("--bins", fit.bins)
    for option, path in (("--out", fit.out), ("--plot", fit.plot)):
        if path is not None:
            writable(option, path)
    values, labels, problems = read_scored(scored.scores, scored.labels, scored.value)
    method: Any = fit.method
    made = Calibration.fit(values, labels, method=method, value=scored.value)
    with options.named({"folds": "--folds"}):
        crossed = reliability(
            cross_fitted(values, labels, problems, method=method, folds=fit.folds), labels, bins=fit.bins
        )
    made.save(fit.out)
    if fit.plot is not None:
        plot_reliability(crossed, Path(fit.plot), f"{scored.value}, {fit.method}, crossed between problems")
    print("predicted  right  95 % interval  responses")
    for one in crossed.bins:
        print(f"{one.predicted:9.3f}  {one.right:.3f}  [{one.low:.3f}, {one.high:.3f}]  {one.count:9d}")
    print(
        f"{fit.out}: {made.right} of {made.responses} right; crossed between {fit.folds} parts of "
        f"{len(set(problems))} problems: calibration error {crossed.error:.3f}, Brier score {crossed.brier:.3f} "
        f"(without a scorer {crossed.base_brier:.3f}){_even(made)}",
        file=sys.stderr,
    )


def _even(made: Calibration) -> str:
    """The value at which right and wrong are equally probable, where one has that probability."""
    try:
        return f"; even at {made.threshold(0.5):.4g}"
    except ValueError:
        return ""


def read_scored(scores: str, labels: str, value: str) -> tuple[list[float], list[bool], list[object]]:
    """Values of scored responses, their labels and their problems.

    Args:
        scores: a file of `prm-search score`.
        labels: the file that it scored, with labels.
        value: "reward", or a name of values.VALUES.

    Raises:
        BadInput: a file is no such file, or a record of one has no counterpart in the other.
    """
    known = [(where, record) for where, record in json_lines(labels)]
    values: list[float] = []
    right: list[bool] = []
    problems: list[object] = []
    for where, record in json_lines(scores):
        place = record.get("index")
        if isinstance(place, bool) or not isinstance(place, int) or not 0 <= place < len(known):
            raise BadInput(f"{where}: index {place!r}: {labels} has the responses 0 to {len(known) - 1}")
        values.append(_value(record, value, where))
        source, labelled = known[place]
        if labelled.get("label") not in (0, 1):
            raise BadInput(f'{source}: "label" is {labelled.get("label")!r}: 0 or 1 is needed')
        right.append(bool(labelled["label"]))
        problems.append(_problem(labelled))
    if not values:
        raise BadInput(f"{scores} holds no scores")
    return values, right, problems


def _problem(record: Mapping[str, Any]) -> str:
    """A name of the problem that a response is to."""
    names = ("problem", "prompt_ids", "prompt", "messages", "question")
    return next((repr(record[name]) for name in names if name in record), "")


def _value(record: Mapping[str, Any], value: str, where: str) -> float:
    steps = record.get("step_scores", record.get("step_rewards"))
    ends = record.get("step_ends")
    try:
        if value == "reward":
            return float(record["reward"])
        if steps is None:
            raise KeyError("step_rewards")
        return float(along(value, steps, ends or range(1, len(steps) + 1))[-1])
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise BadInput(f"{where}: no record of prm-search score: {error}") from error
