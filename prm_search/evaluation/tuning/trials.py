"""Trials: what `tune` tries within a budget of tokens. No torch, and no model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ...answers import Select
from ...checks import MANY, integer, number
from ...confidence import TOP_TOKENS
from ...strategies import (
    DVTS,
    MCTS,
    AdaptiveBranch,
    Beam,
    BestOfN,
    DeepConf,
    Lookahead,
    ParticleFilter,
    Rebase,
    SelfConsistency,
    Steer,
    Strategy,
    plain_strategy,
)
from ..plan import OWN, PLANNED, listed_names, shape

VOTES: tuple[Select, ...] = ("best", "weighted", "majority")


@dataclass(frozen=True)
class Config:
    """One way to answer: what a guidance file says of it.

    Attributes:
        strategy: configured; its `value` is None.
        scorer: name of the reward model; None where none is asked.
        value: what nodes are ranked by; None likewise.
        select: the choice among candidates.
        weight_temperature: of a weighted vote.
        tokens: the budget that it was made for, in sampled tokens of a problem.
    """

    strategy: Strategy
    scorer: str | None
    value: str | None
    select: Select
    weight_temperature: float
    tokens: int

    @property
    def name(self) -> str:
        """Return what the strategy is called in files."""
        return str(plain_strategy(self.strategy)["name"])

    @property
    def family(self) -> str:
        """Return what tables call its kind: the strategy, or the vote where one decides among whole samples."""
        if self.name == "best_of_n" and self.select != "best":
            return self.select
        return self.name

    def title(self, *, with_scorer: bool = False) -> str:
        """Return what tables call it: "beam width=2 expansions=8, min, best"."""
        plain = plain_strategy(self.strategy)
        fields = " ".join(f"{key}={_short(value)}" for key, value in plain.items() if key != "name")
        vote = f"{self.select} T={self.weight_temperature:g}" if self.select == "weighted" else self.select
        parts = [f"{plain['name']} {fields}".strip(), self.value, vote, self.scorer if with_scorer else None]
        return ", ".join(part for part in parts if part)


@dataclass(frozen=True)
class Trial:
    """One search of every problem, and the ways to answer that are read off it.

    Attributes:
        strategy: what searches.
        scorer, value: None for whole samples, and for votes without a scorer.
        tokens: sampled tokens of a problem at most.
        configs: what can be read off its trees.
    """

    strategy: Strategy
    scorer: str | None
    value: str | None
    tokens: int | None
    configs: tuple[Config, ...]

    @property
    def whole(self) -> bool:
        """Return True if it draws whole samples, which serve every scorer, value and number up to its n."""
        return self.scorer is None and isinstance(self.strategy, BestOfN)


@dataclass(frozen=True)
class Scale:
    """The scale of the problems, from a few whole samples of some of them.

    Attributes:
        tokens, steps: of a whole sample, means.
        seconds: of a sampled token, its scoring included.
        spread: scorer -> value -> standard deviation of a sample's value within its problem.
        top_tokens: most probable tokens that the policy tells at each place, for votes by confidence; 0 for none.
    """

    tokens: float
    steps: float
    seconds: float
    spread: Mapping[str, Mapping[str, float]]
    top_tokens: int = 0

    def samples(self, tokens: int) -> int:
        """Return how many whole samples so many tokens are, at least 1."""
        return max(1, int(tokens / self.tokens + 0.05))

    def card(self) -> dict[str, Any]:
        """As plain values."""
        spread = {scorer: dict(values) for scorer, values in self.spread.items()}
        return {"tokens": self.tokens, "steps": self.steps, "seconds": self.seconds, "spread": spread,
                "top_tokens": self.top_tokens}  # fmt: skip


def _beams(n: int, steps: float, spread: float) -> list[Strategy]:
    return [Beam(width, n // width) for width in _powers(n // 2)]


def _dvts(n: int, steps: float, spread: float) -> list[Strategy]:
    return [DVTS(subtrees, 1, n // subtrees) for subtrees in _powers(n // 2) if subtrees > 1]


def _lookahead(n: int, steps: float, spread: float) -> list[Strategy]:
    return [Lookahead(*shape(n // 2))] if n >= 4 else []


def _particles(n: int, steps: float, spread: float) -> list[Strategy]:
    return [ParticleFilter(n, temperature=two_digits(spread * share)) for share in (0.25, 1.0)] if n > 1 else []


def _rebase(n: int, steps: float, spread: float) -> list[Strategy]:
    return [Rebase(n, temperature=two_digits(spread * share)) for share in (0.125, 0.5)] if n > 1 else []


def _mcts(n: int, steps: float, spread: float) -> list[Strategy]:
    return [MCTS(max(1, round(n * steps / 4)))] if n > 1 else []


def _adaptive(n: int, steps: float, spread: float) -> list[Strategy]:
    return [AdaptiveBranch(2 * n)] if n > 1 else []  # most of its answers begin below the root, and are shorter


#: Name -> searches of the size of n whole samples of so many steps, whose values spread so far within a problem.
SEARCHES: dict[str, Callable[[int, float, float], list[Strategy]]] = {
    "beam": _beams,
    "dvts": _dvts,
    "lookahead": _lookahead,
    "particle_filter": _particles,
    "rebase": _rebase,
    "mcts": _mcts,
    "adaptive_branch": _adaptive,
}


def _self_consistency(n: int, tokens: float, top: int) -> list[Strategy]:
    if n < 2:
        return []
    return [SelfConsistency(n, stop="beta"), *([SelfConsistency(n, weight="confidence", top=top)] if top else [])]


def _deep_conf(n: int, tokens: float, top: int) -> list[Strategy]:
    if n < 2 or not top:
        return []
    # A quarter of the budget warms up; what is stopped early leaves room for as many answers again.
    window = max(1, round(tokens / 4))
    return [DeepConf(max(2, n // 4), 2 * n, keep=keep, window=window, top=top) for keep in (0.1, 0.9)]


#: Name -> votes without a scorer, of the size of n whole samples of so many tokens; the policy tells `top` tokens.
VOTERS: dict[str, Callable[[int, float, int], list[Strategy]]] = {
    "self_consistency": _self_consistency,
    "deep_conf": _deep_conf,
}
#: Searches whose answers differ enough to vote.
DIVERSE = ("dvts", "particle_filter", "rebase", "adaptive_branch", "steer")
NAMES = ("best_of_n", *SEARCHES, *VOTERS, "steer")


@dataclass(frozen=True)
class Grid:
    """The choice of what is tried.

    Args:
        budgets: sampled tokens of a problem; each is a budget of its own.
        strategies: of NAMES.
        values: of plan.PLANNED.
        alphas: strengths of steer.
        temperatures: of weighted votes, in units of the spread of the values.

    Raises:
        ValueError, TypeError: naming the argument.
    """

    budgets: Sequence[int]
    strategies: Sequence[str] = NAMES[:-1]
    values: Sequence[str] = (OWN, "min")
    alphas: Sequence[float] = (0.5, 1.0)
    temperatures: Sequence[float] = field(default=(0.5, 2.0))

    def __post_init__(self) -> None:
        object.__setattr__(self, "strategies", listed_names("strategies", self.strategies, NAMES))
        object.__setattr__(self, "values", listed_names("values", self.values, PLANNED))
        for budget in self.budgets:
            integer("budgets", budget, 1, f"integers >= 1, and at most {MANY:,},", MANY)
        if not self.budgets or len(set(self.budgets)) < len(self.budgets):
            raise ValueError(f"budgets={list(self.budgets)!r}: at least one is needed, and none twice")
        object.__setattr__(self, "budgets", tuple(sorted(self.budgets)))
        for name in ("alphas", "temperatures"):
            for share in getattr(self, name):
                number(name, share, "finite numbers > 0", lambda x: 0 < x < float("inf"))

    def trials(self, scale: Scale, scorers: Sequence[str]) -> list[Trial]:
        """Everything that is tried with these scorers: the samples first, then each search."""
        sizes = {budget: scale.samples(budget) for budget in self.budgets}
        trials = [self._samples(scale, scorers, sizes)]
        for budget, n in sizes.items():
            for name in (name for name in self.strategies if name in VOTERS):
                made = VOTERS[name](n, scale.tokens, min(TOP_TOKENS, scale.top_tokens))
                trials += [self._vote(one, budget) for one in made]
        for scorer in scorers:
            for budget, n in sizes.items():
                for value in self.values:
                    spread = scale.spread[scorer][value]
                    for name in self.strategies:
                        if name in SEARCHES:
                            made = SEARCHES[name](n, scale.steps, spread)
                            trials += [self._search(name, one, scorer, value, spread, budget) for one in made]
                if "steer" in self.strategies:
                    value = self.values[0]
                    spread = scale.spread[scorer][value]
                    trials += [
                        self._search("steer", Steer(alpha, n), scorer, value, spread, budget) for alpha in self.alphas
                    ]
        return trials

    def _samples(self, scale: Scale, scorers: Sequence[str], sizes: Mapping[int, int]) -> Trial:
        """Whole samples, as many as the largest budget pays for; every smaller number is read off the first of them."""
        configs = []
        for budget, n in sizes.items():
            strategy = BestOfN(n)
            for scorer in scorers:
                for value in self.values:
                    configs.append(Config(strategy, scorer, value, "best", 1.0, budget))
                    configs += self._weighted(strategy, scorer, value, scale.spread[scorer][value], budget)
            configs.append(Config(strategy, None, None, "majority", 1.0, budget))
        return Trial(BestOfN(max(sizes.values())), None, None, None, tuple(configs))

    def _vote(self, strategy: Strategy, budget: int) -> Trial:
        select: Select = strategy.select  # type: ignore[attr-defined]
        return Trial(strategy, None, None, budget, (Config(strategy, None, None, select, 1.0, budget),))

    def _search(self, name: str, strategy: Strategy, scorer: str, value: str, spread: float, budget: int) -> Trial:
        configs = [Config(strategy, scorer, value, "best", 1.0, budget)]
        if name in DIVERSE:
            configs += self._weighted(strategy, scorer, value, spread, budget)
            configs.append(Config(strategy, scorer, value, "majority", 1.0, budget))
        return Trial(strategy, scorer, value, budget, tuple(configs))

    def _weighted(self, strategy: Strategy, scorer: str, value: str, spread: float, budget: int) -> list[Config]:
        return [
            Config(strategy, scorer, value, "weighted", two_digits(spread * share), budget)
            for share in self.temperatures
        ]


def _short(value: Any) -> str:
    """A field's value as a title shows it: of a bin's strategy its own title."""
    if isinstance(value, list):
        return f"[{', '.join(map(_short, value))}]"
    if isinstance(value, dict):
        return " ".join([value["name"], *(f"{key}={item}" for key, item in value.items() if key != "name")])
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def two_digits(number: float) -> float:
    """The number with two significant digits; 1 in place of 0."""
    return float(f"{number:.2g}") or 1.0


def _powers(most: int) -> list[int]:
    """The powers of 2 up to a number, 1 first; none for 0."""
    return [1 << place for place in range(most.bit_length())]
