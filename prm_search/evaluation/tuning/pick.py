"""The pick: which configuration is best within a budget, for all problems or by their difficulty. No model."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np

from ...strategies import ByDifficulty, Steer
from .pilot import PROBE
from .trials import Config, Scale, Trial

COSTS = ("policy_tokens", "prm_tokens", "reference_tokens", "seconds")
BINS = 3


@dataclass(frozen=True)
class Table:
    """The outcomes of all configs on the same problems.

    Attributes:
        configs: in the order in which they were tried.
        right: [configs, problems] bool.
        costs: name of COSTS -> [configs, problems] float64.
        difficulty: (scorer, value) -> [problems] mean value of the first samples; low is hard.
    """

    configs: tuple[Config, ...]
    right: np.ndarray
    costs: Mapping[str, np.ndarray]
    difficulty: Mapping[tuple[str, str], np.ndarray]

    @classmethod
    def of(
        cls,
        trials: Sequence[Trial],
        records: Iterable[Mapping[str, Any]],
        problems: int,
        left_out: Collection[int] = (),
        *,
        numbers: Sequence[int] | None = None,
    ) -> Table:
        """From a run's records.

        Args:
            trials, problems: of the run.
            records: in any order.
            left_out: places of problems that are not looked at, as failed ones.
            numbers: of the trials that are; None for all.

        Raises:
            ValueError: records are missing, or no problem is left.
        """
        by_index = {record["index"]: record for record in records}
        places = [place for place in range(problems) if place not in left_out]
        if not places:
            raise ValueError(f"all {problems} problems failed")
        chosen = range(len(trials)) if numbers is None else numbers
        indices = [[trial * problems + place for place in places] for trial in chosen]
        missing = sum(index not in by_index for row in indices for index in row)
        if missing:
            raise ValueError(f"{missing} records are missing: the run is not finished")
        rows = [[by_index[index]["ways"] for index in row] for row in indices]
        flat = [
            (config, [ways[way] for ways in row])
            for trial, row in zip(chosen, rows, strict=True)
            for way, config in enumerate(trials[trial].configs)
        ]
        difficulty: dict[tuple[str, str], list[float]] = defaultdict(list)
        for trial, row_of in zip(chosen, indices, strict=True):
            if trials[trial].whole:
                for index in row_of:
                    for scorer, means in by_index[index]["difficulty"].items():
                        for value, mean in means.items():
                            difficulty[scorer, value].append(mean)
        return cls(
            tuple(config for config, _ in flat),
            np.array([[way["right"] for way in ways] for _, ways in flat], bool),
            {name: np.array([[way[name] for way in ways] for _, ways in flat], np.float64) for name in COSTS},
            {key: np.array(means) for key, means in difficulty.items()},
        )

    def cost(self, name: str) -> np.ndarray:
        """[configs] mean of a problem."""
        means: np.ndarray = self.costs[name].mean(axis=1)
        return means

    def accuracy(self) -> np.ndarray:
        """[configs] share of right answers."""
        shares: np.ndarray = self.right.mean(axis=1)
        return shares

    def some(self, problems: np.ndarray) -> Table:
        """The same on these problems alone."""
        return Table(
            self.configs, self.right[:, problems], {name: cost[:, problems] for name, cost in self.costs.items()},
            {key: means[problems] for key, means in self.difficulty.items()},
        )  # fmt: skip


@dataclass(frozen=True)
class Pick:
    """The choice of what answers.

    Attributes:
        config: of a uniform choice; of bins, a ByDifficulty over the configs of the bins.
        bins: the places of the bins' configs, hardest first; empty for a uniform choice.
    """

    config: Config
    bins: tuple[int, ...] = ()


def best(table: Table, places: Sequence[int], cost: str) -> int:
    """The config that is right most often; of equals the cheapest, then the first."""
    shares, costs = table.accuracy(), table.cost(cost)
    return min(places, key=lambda place: (-shares[place], costs[place], place))


def affordable(table: Table, *, tokens: int | None = None, seconds: float | None = None) -> list[int]:
    """The configs within a budget of a problem.

    Args:
        table: see Table.
        tokens: those that were made for at most so many sampled tokens. Searches are cut there; n whole samples have
            them on average.
        seconds: those whose mean was at most so long.

    Raises:
        ValueError: not one of them is given, or no best-of-N is within it.
    """
    if (tokens is None) == (seconds is None):
        raise ValueError(f"tokens={tokens!r}, seconds={seconds!r}: one of them is needed")
    if tokens is not None:
        places = [place for place, config in enumerate(table.configs) if config.tokens <= tokens]
    else:
        places = [int(place) for place in np.flatnonzero(table.cost("seconds") <= seconds)]
    if not any(table.configs[place].family == "best_of_n" for place in places):
        limit = f"{tokens} tokens" if seconds is None else f"{seconds:g} seconds"
        raise ValueError(f"no best-of-N is within {limit} a problem: a larger budget is needed")
    return places


def pick_within(
    table: Table, scale: Scale, *, tokens: int | None = None, seconds: float | None = None, bins: int = BINS
) -> tuple[Pick, dict[str, float]]:
    """`pick` among what a budget affords; of bins, what it affords beside the samples that tell the difficulty."""
    places = affordable(table, tokens=tokens, seconds=seconds)
    spent = PROBE * scale.tokens * (1 - 1 / scale.steps)  # of the probe, beyond the first steps that are used again
    cost, limit, probe = "policy_tokens", tokens or 0.0, spent
    if seconds is not None:
        cost, limit, probe = "seconds", seconds, spent * scale.seconds
    means = table.cost(cost)
    beside = [
        place for place in places
        if means[place] + (0.0 if table.configs[place].name == "best_of_n" else probe) <= limit * (1 + 1e-9)
    ]  # fmt: skip
    choice, judged = pick(table, places, cost, beside, bins=bins)
    if choice.bins:  # what a bin's strategy was made for, and the probe before it
        room = choice.config.tokens + math.ceil(PROBE * scale.tokens) if tokens is None else tokens
        choice = replace(choice, config=replace(choice.config, tokens=room))
    return choice, judged


def baseline(table: Table, places: Sequence[int], cost: str) -> int:
    """Plain best-of-N within the budget, under the value that serves it best: the hardest to beat.

    Raises:
        ValueError: none is within the budget.
    """
    plain = [place for place in places if table.configs[place].family == "best_of_n"]
    if not plain:
        raise ValueError("no best-of-N is within the budget: one whole sample costs more")
    largest = max(table.configs[place].strategy.n for place in plain)  # type: ignore[attr-defined]
    return best(table, [p for p in plain if table.configs[p].strategy.n == largest], cost)  # type: ignore[attr-defined]


def pick(
    table: Table, places: Sequence[int], cost: str, beside: Sequence[int], *, bins: int = BINS
) -> tuple[Pick, dict[str, float]]:
    """Choose a config for all problems, or one for each bin of difficulty where that holds up in cross-validation.

    As in compute-optimal scaling (arXiv 2408.03314, section 3.2): the strategy of each bin is chosen on one half of the
    problems and judged on the other, and the reverse. Bins are used where their mean over both is above that of a
    uniform choice made in the same way. Configs of one tree share the value and the choice, so a choice by bins is
    among those that do.

    Args:
        table: see Table.
        places: of the configs that may be chosen.
        cost: of COSTS, by which equals are told apart.
        beside: those of them that may be a bin's.
        bins: quantiles of difficulty.

    Returns:
        The pick, and the cross-validated shares: "uniform", and "bins" where there are groups.
    """
    halves = [np.arange(table.right.shape[1]) % 2 == half for half in (0, 1)]
    judged = {"uniform": 0.0}
    for half in halves:
        chosen = best(table.some(~half), places, cost)
        judged["uniform"] += float(table.right[chosen, half].mean()) / 2
    groups = _groups(table, beside)
    shares = {
        key: sum(float(_split(table, members, key, half, cost, bins).mean()) / 2 for half in halves)
        for key, members in groups.items()
    }
    if shares:
        group = max(shares, key=lambda key: shares[key])
        judged["bins"] = shares[group]
        if judged["bins"] > judged["uniform"]:
            thresholds, chosen_bins = _bins(table, groups[group], group, cost, bins)
            if len(set(chosen_bins)) > 1:
                return _by_difficulty(table, thresholds, chosen_bins), judged
    return Pick(table.configs[best(table, places, cost)]), judged


Group = tuple[str, str, str, float]


def _groups(table: Table, places: Sequence[int]) -> dict[Group, list[int]]:
    """The configs that one search can choose among, as it knows the difficulty: scorer, value, choice -> places."""
    groups: dict[Group, list[int]] = defaultdict(list)
    for place in places:
        config = table.configs[place]
        if config.scorer is not None and config.value is not None and may_be_a_bins(config):
            groups[config.scorer, config.value, config.select, config.weight_temperature].append(place)
    return {key: members for key, members in groups.items() if len(members) > 1}


def may_be_a_bins(config: Config) -> bool:
    """Return True if a config may be what a bin of difficulty goes on with: it ranks, and does not steer."""
    return config.scorer is not None and config.value is not None and not isinstance(config.strategy, Steer)


def edges_of(difficulty: np.ndarray, bins: int) -> tuple[float, ...]:
    """The thresholds between bins of difficulty, its quantiles: ascending, fewer where some are equal."""
    quantiles = np.quantile(difficulty, np.arange(1, bins) / bins)
    edges = tuple(float(f"{edge:.6g}") for edge in quantiles)
    return tuple(edge for before, edge in pairwise((-np.inf, *edges)) if edge > before)


def _bins(
    table: Table, places: Sequence[int], group: Group, cost: str, bins: int
) -> tuple[tuple[float, ...], tuple[int, ...]]:
    """Thresholds of difficulty, and the best config of each bin; the group's best where a bin has none better."""
    difficulty = table.difficulty[group[:2]]
    thresholds = edges_of(difficulty, bins)
    overall = best(table, places, cost)
    members = np.searchsorted(thresholds, difficulty, side="right")
    chosen = []
    for number in range(len(thresholds) + 1):
        here = table.some(members == number)
        if not here.right.shape[1]:
            chosen.append(overall)
            continue
        own = best(here, places, cost)
        better = here.right[own].sum() > here.right[overall].sum()
        chosen.append(own if better else overall)
    return thresholds, tuple(chosen)


def _split(table: Table, places: Sequence[int], group: Group, held_out: np.ndarray, cost: str, bins: int) -> np.ndarray:
    """[held out] outcomes of the bins that are chosen on the other problems."""
    thresholds, chosen = _bins(table.some(~held_out), places, group, cost, bins)
    here = table.some(held_out)
    members = np.array([bisect_right(thresholds, mean) for mean in here.difficulty[group[:2]]])
    outcomes: np.ndarray = here.right[np.array(chosen)[members], np.arange(here.right.shape[1])]
    return outcomes


def _by_difficulty(table: Table, thresholds: Sequence[float], chosen: Sequence[int]) -> Pick:
    """A pick of bins. Neighbours that go on alike are one bin."""
    configs = [table.configs[place] for place in chosen]
    edges = [edge for edge, (a, b) in zip(thresholds, pairwise(configs), strict=True) if a.strategy != b.strategy]
    kept = [configs[0], *(b for a, b in pairwise(configs) if a.strategy != b.strategy)]
    first = configs[0]
    strategy = ByDifficulty(PROBE, tuple(edges), tuple(config.strategy for config in kept))
    tokens = max(config.tokens for config in configs)
    whole = Config(strategy, first.scorer, first.value, first.select, first.weight_temperature, tokens)
    return Pick(whole, tuple(chosen))
