"""Plan: which strategies are compared, at which budgets, under which seeds. No model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from ..checks import MANY, integer, number
from ..protocols import Sampling
from ..steps import StepRule
from ..strategies import Beam, Lookahead, Strategy
from ..values import VALUES, Value, resolve_value

#: Strategies that choose among whole samples, which are drawn once and shared.
VOTES: tuple[str, ...] = ("majority", "best_of_n", "weighted")
SEARCHES: tuple[str, ...] = ("beam", "lookahead")
STRATEGIES: tuple[str, ...] = ("greedy", *VOTES, *SEARCHES)
WEIGHTS: tuple[str, ...] = ("softmax", "sigmoid")
BLIND = ("greedy", "majority")  # need no rewards
OWN = "own"  # the value that a scorer's rewards are meant for: its default_value, else q
PLANNED = (*VALUES, OWN)


@dataclass(frozen=True)
class Cell:
    """One line of the table: a strategy, how it was told to choose, and its budget.

    Attributes:
        strategy: one of STRATEGIES.
        n: the budget, in whole samples.
        pair: name of the pair that scores; None for greedy and majority.
        value: what candidates are ranked or weighed by; None likewise.
        weight: of a weighted vote, otherwise None.
    """

    strategy: str
    n: int
    pair: str | None = None
    value: str | None = None
    weight: str | None = None

    def title(self, *, with_pair: bool = False) -> str:
        """Return what tables call it, without its budget: "best_of_n q", "weighted min sigmoid"."""
        parts = [self.strategy, self.value, self.weight, f"({self.pair})" if with_pair and self.pair else None]
        return " ".join(word for word in parts if word)


@dataclass(frozen=True)
class Unit:
    """The content of one record: the samples of a problem under a seed, or one search.

    Attributes:
        kind: "greedy", "samples" or "search".
        problem: its place in the list.
        seed: None for greedy, which draws nothing.
        cell: of a search.
    """

    kind: Literal["greedy", "samples", "search"]
    problem: int
    seed: int | None = None
    cell: Cell | None = None


@dataclass(frozen=True)
class Plan:
    """The plan of an evaluation.

    A budget N is the policy tokens of N whole samples. majority, best_of_n and weighted choose among the first N
    samples of a problem. beam and lookahead may sample, on that problem and seed, as many tokens as those N took, or
    without a cap what their shape takes.

    Args:
        strategies: of STRATEGIES.
        budgets: whole samples, each >= 1.
        seeds: of the draws, 64-bit.
        values: names of values.VALUES: what best_of_n ranks by and weighted weighs by; or "own", each scorer's default
            value.
        search_values: the same for beam and lookahead; None for `values`.
        weights: "softmax", "sigmoid" or both, of weighted votes.
        weight_temperature: see answers.select.
        shapes: budget -> (width, expansions) of beam and lookahead; the others are chosen by `shape`.
        capped: cut a search of beam or lookahead at the tokens of the samples it is compared with; a cut search is
            wrong. False: the shape alone makes budgets alike, on average and not problem by problem.
        lookahead_steps, lookahead_rollouts: see strategies.Lookahead.
        steps, temperature, top_p, top_k, min_p, max_new_tokens: see Sampling; the same for samples and searches.

    Raises:
        ValueError, TypeError: naming the argument.
    """

    strategies: Sequence[str] = ("greedy", "majority", "best_of_n", "weighted", "beam")
    budgets: Sequence[int] = (1, 4, 16)
    seeds: Sequence[int] = (0,)
    values: Sequence[str] = ("q",)
    search_values: Sequence[str] | None = None
    weights: Sequence[str] = ("softmax",)
    weight_temperature: float = 1.0
    shapes: Mapping[int, tuple[int, int]] = field(default_factory=dict)
    capped: bool = True
    lookahead_steps: int = 1
    lookahead_rollouts: int = 1
    steps: StepRule = field(default_factory=StepRule)
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    max_new_tokens: int = 1024

    def __post_init__(self) -> None:
        for name, allowed in (("strategies", STRATEGIES), ("values", PLANNED), ("weights", WEIGHTS)):
            object.__setattr__(self, name, listed_names(name, getattr(self, name), allowed))
        if self.search_values is not None:
            object.__setattr__(self, "search_values", listed_names("search_values", self.search_values, PLANNED))
        for name, least, most in (("budgets", 1, MANY), ("seeds", 0, (1 << 64) - 1)):
            numbers = tuple(getattr(self, name))
            for value in numbers:
                integer(name, value, least, f"integers >= {least}, and at most {most:,},", most)
            if not numbers or len(set(numbers)) < len(numbers):
                raise ValueError(f"{name}={numbers!r}: at least one is needed, and none twice")
            object.__setattr__(self, name, numbers)
        object.__setattr__(self, "budgets", tuple(sorted(self.budgets)))
        number("weight_temperature", self.weight_temperature, "a finite number > 0", lambda x: 0 < x < float("inf"))
        for name in ("lookahead_steps", "lookahead_rollouts"):
            integer(name, getattr(self, name), 1, f"an integer >= 1, and at most {MANY:,},", MANY)
        for n, shape in self.shapes.items():
            if n not in self.budgets:
                raise ValueError(f"shapes: {n} is none of the budgets {list(self.budgets)}")
            for name, size in zip(("width", "expansions"), shape, strict=True):
                integer(f"shapes: {name}", size, 1, f"an integer >= 1, and at most {MANY:,},", MANY)
        self.sampling(0)

    @property
    def most(self) -> int:
        """Samples that are drawn of each problem under each seed: the largest budget."""
        return max(self.budgets)

    @property
    def ranked(self) -> tuple[str, ...]:
        """The strategies among them that need a pair."""
        return tuple(name for name in self.strategies if name not in BLIND)

    def sampling(self, seed: int) -> Sampling:
        """Return how tokens are drawn under a seed."""
        return Sampling(self.steps, self.temperature, self.top_p, self.top_k, self.min_p, self.max_new_tokens, seed)

    def votes(self, pairs: Sequence[str]) -> list[Cell]:
        """The cells that are read off the samples of a problem."""
        cells = [Cell("majority", n) for n in self.budgets if "majority" in self.strategies]
        for pair in pairs:
            for value in self.values:
                for n in self.budgets:
                    if "best_of_n" in self.strategies:
                        cells.append(Cell("best_of_n", n, pair, value))
                    if "weighted" in self.strategies:
                        cells += [Cell("weighted", n, pair, value, weight) for weight in self.weights]
        return cells

    def searches(self, pairs: Sequence[str]) -> list[Cell]:
        """The cells that are searches of their own."""
        values = self.values if self.search_values is None else self.search_values
        names = [name for name in SEARCHES if name in self.strategies]
        return [Cell(name, n, pair, v) for pair in pairs for name in names for v in values for n in self.budgets]

    def units(self, problems: int, pairs: Sequence[str]) -> list[Unit]:
        """Everything that is to be done, in order: one record each."""
        units = [Unit("greedy", i) for i in range(problems) if "greedy" in self.strategies]
        for seed in self.seeds:
            units += [Unit("samples", i, seed) for i in range(problems)]
            units += [Unit("search", i, seed, cell) for cell in self.searches(pairs) for i in range(problems)]
        return units

    def strategy(self, cell: Cell) -> Strategy:
        """The configured search of a cell."""
        value = None if cell.value == OWN else cell.value
        if cell.strategy == "beam":
            width, expansions = self.shapes.get(cell.n) or shape(cell.n)
            return Beam(width, expansions, value=value)
        steps, rollouts = self.lookahead_steps, self.lookahead_rollouts
        width, expansions = self.shapes.get(cell.n) or shape(max(1, cell.n // (1 + steps * rollouts)))
        return Lookahead(width, expansions, steps=steps, rollouts=rollouts, value=value)

    def card(self) -> dict[str, Any]:
        """The plan as plain values, for reports and keys."""
        entries = {name: getattr(self, name) for name in self.__dataclass_fields__}
        entries["shapes"] = {str(n): list(shape) for n, shape in sorted(self.shapes.items())}
        entries["steps"] = repr(self.steps)
        return {name: list(value) if isinstance(value, tuple) else value for name, value in entries.items()}


def own_value(value: str, scorer: object) -> Value:
    """Return a planned value for a scorer.

    Args:
        value: of `PLANNED`.
        scorer: whose default "own" means.
    """
    default = getattr(scorer, "default_value", None)
    return resolve_value((default or "q") if value == OWN else value)


def shape(n: int) -> tuple[int, int]:
    """(width, expansions) of a beam that draws n children a level: as square as n's divisors allow, 16 -> 4 x 4.

    Where they differ, the larger is the number of expansions. A beam whose answers are as long as samples are then
    draws what n samples draw. A lookahead spends steps * rollouts further steps on each child, so Plan gives it the
    shape of n / (1 + steps * rollouts).
    """
    expansions = next(divisor for divisor in range(1, n + 1) if n % divisor == 0 and divisor * divisor >= n)
    return n // expansions, expansions


def listed_names(name: str, names: Sequence[str], allowed: Sequence[str]) -> tuple[str, ...]:
    """The names as a tuple. Raises TypeError or ValueError, naming the argument, unless each is allowed, once."""
    if isinstance(names, str):
        raise TypeError(f"{name} must be a list of names, got the string {names!r}")
    chosen = tuple(names)
    for word in chosen:
        if word not in allowed:
            raise ValueError(f"{name}: {word!r} is unknown; it is one of {', '.join(allowed)}")
    if not chosen or len(set(chosen)) < len(chosen):
        raise ValueError(f"{name}={list(chosen)!r}: at least one is needed, and none twice")
    return chosen
