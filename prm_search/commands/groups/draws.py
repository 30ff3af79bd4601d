"""Options of how a response is drawn: ends of steps, sampling, budgets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import typer

from ...driver.budget import Budget
from ...protocols import Sampling
from ...steps import StepRule
from .. import options
from ..options import ADVANCED, SAMPLING, STEPS


@dataclass(frozen=True, kw_only=True)
class Steps:
    """Ends of steps."""

    delimiter: Annotated[
        list[str] | None,
        typer.Option(
            help=r"Ends a step; may be repeated; \n and \t are read as such. Default: the pair card's, else \n\n.",
            rich_help_panel=STEPS,
        ),
    ] = None
    step_tokens: Annotated[
        int | None,
        typer.Option(help="Tokens of a step at most; 0: no limit.", rich_help_panel=STEPS, show_default="256"),
    ] = None
    step_regex: Annotated[
        str | None, typer.Option(help="A pattern that ends a step, instead of a delimiter.", rich_help_panel=ADVANCED)
    ] = None

    def rule(self, default: str | Sequence[str] | None) -> StepRule:
        """The StepRule, with this delimiter where the options name none. Raises ValueError as StepRule does."""
        return options.make_steps(self.delimiter, self.step_tokens, self.step_regex, default=default)


@dataclass(frozen=True, kw_only=True)
class Draws:
    """Options of how tokens are drawn, but for the seed."""

    temperature: Annotated[float, typer.Option(help="0: the likeliest token.", rich_help_panel=SAMPLING)] = 1.0
    max_new_tokens: Annotated[int, typer.Option(help="Tokens of one response.", rich_help_panel=SAMPLING)] = 1024
    top_p: Annotated[float, typer.Option(help="Nucleus; 1 keeps all.", rich_help_panel=ADVANCED)] = 1.0
    top_k: Annotated[int, typer.Option(help="0 keeps all.", rich_help_panel=ADVANCED)] = 0
    min_p: Annotated[float, typer.Option(help="0 keeps all.", rich_help_panel=ADVANCED)] = 0.0

    def fields(self) -> dict[str, Any]:
        """As Sampling and Plan take them."""
        return {
            "temperature": self.temperature, "top_p": self.top_p, "top_k": self.top_k, "min_p": self.min_p,
            "max_new_tokens": self.max_new_tokens,
        }  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class SeededDraws(Draws):
    """The same with a seed."""

    seed: Annotated[int, typer.Option(help="Of every draw.", rich_help_panel=SAMPLING)] = 0
    stop: Annotated[
        list[str] | None,
        typer.Option(
            help=r"Ends a response, which does not show it; may be repeated; \n and \t are read as such.",
            rich_help_panel=SAMPLING,
        ),
    ] = None
    include_stop_str: Annotated[
        bool, typer.Option("--include-stop-str", help="Responses show it.", rich_help_panel=ADVANCED)
    ] = False

    def fields(self) -> dict[str, Any]:
        """As Sampling and SearchSettings take them."""
        stop = tuple(map(options.unescape, self.stop or ()))
        return super().fields() | {"stop": stop, "include_stop_str": self.include_stop_str}

    def sampling(self, steps: StepRule | None = None) -> Sampling:
        """A Sampling. Raises ValueError as it does."""
        return Sampling(steps or StepRule(), seed=self.seed, **self.fields())


@dataclass(frozen=True, kw_only=True)
class Limits:
    """The budget of a prompt."""

    budget: Annotated[int | None, typer.Option(help="Sampled tokens of a prompt.", rich_help_panel=SAMPLING)] = None
    budget_nodes: Annotated[int | None, typer.Option(help="Nodes of a tree.", rich_help_panel=ADVANCED)] = None
    budget_depth: Annotated[int | None, typer.Option(help="Steps of an answer.", rich_help_panel=ADVANCED)] = None
    budget_seconds: Annotated[float | None, typer.Option(help="Wall time of a prompt.", rich_help_panel=ADVANCED)] = (
        None
    )

    def make(self) -> Budget:
        """A Budget. Raises ValueError as it does."""
        return options.make_budget(self.budget, self.budget_nodes, self.budget_depth, self.budget_seconds)
