"""The options of `prm-search tune` that say what is tried."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import typer

from ..evaluation.plan import OWN, PLANNED
from ..evaluation.tuning.confirm import Limit
from ..evaluation.tuning.trials import NAMES, Grid
from . import BadInput, options
from .options import ADVANCED, listed, numbers

_TRIED = "What is tried"


@dataclass(frozen=True, kw_only=True)
class Tried:
    """The budgets, and what is tried within them."""

    budget: Annotated[
        str | None,
        typer.Option(help="Sampled tokens of a problem; several with commas, each a budget.", rich_help_panel=_TRIED),
    ] = None
    budget_seconds: Annotated[
        float | None, typer.Option(help="In place of --budget: wall time of a problem.", rich_help_panel=_TRIED)
    ] = None
    strategies: Annotated[str, typer.Option(help=f"Of {','.join(NAMES)}.", rich_help_panel=_TRIED)] = ",".join(
        NAMES[:-1]
    )
    values: Annotated[str, typer.Option(help=f"To rank by, of {','.join(PLANNED)}.", rich_help_panel=_TRIED)] = (
        f"{OWN},min"
    )
    alphas: Annotated[str, typer.Option(help="steer: strengths.", rich_help_panel=ADVANCED)] = "0.5,1"
    bins: Annotated[int, typer.Option(help="Bins of difficulty; 1: one strategy for all.", rich_help_panel=_TRIED)] = 3
    race: Annotated[
        bool,
        typer.Option(
            "--race/--no-race", help="Do not try on all problems what falls clearly behind.", rich_help_panel=_TRIED
        ),
    ] = True

    def __post_init__(self) -> None:
        if (self.budget is None) == (self.budget_seconds is None):
            raise BadInput("a budget is needed: --budget, in tokens, or --budget-seconds")
        if self.budget_seconds is not None and not 0 < self.budget_seconds < float("inf"):
            raise BadInput(f"--budget-seconds {self.budget_seconds}: a finite number above 0 is needed")
        options.at_least("--bins", self.bins)
        self.grid((1,))

    @property
    def tokens(self) -> list[int]:
        """The budgets in tokens; none where the budget is one of seconds."""
        return [] if self.budget is None else numbers("--budget", self.budget)

    @property
    def limits(self) -> list[Limit]:
        """The budgets."""
        if self.budget_seconds is not None:
            return [Limit(seconds=self.budget_seconds)]
        return [Limit(tokens=tokens) for tokens in sorted(self.tokens)]

    def grid(self, budgets: Sequence[int]) -> Grid:
        """The Grid. Raises BadInput or ValueError naming the option."""
        flags = {"budgets": "--budget", **{name: f"--{name}" for name in ("strategies", "values", "alphas")}}
        try:
            alphas = [float(word) for word in listed(self.alphas)]
        except ValueError as error:
            raise BadInput(f"--alphas {self.alphas!r:.80}: numbers with commas between them are needed") from error
        with options.named(flags):
            return Grid(budgets, listed(self.strategies), listed(self.values), alphas)
