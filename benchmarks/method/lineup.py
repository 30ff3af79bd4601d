"""Every strategy at growing sizes: what the report compares, fixed before the reported seeds were run. No model."""

from __future__ import annotations

from dataclasses import dataclass

from prm_search.evaluation.plan import shape
from prm_search.evaluation.tuning.trials import Config, Grid, Trial
from prm_search.strategies import (
    DVTS,
    MCTS,
    AdaptiveBranch,
    Beam,
    BestOfN,
    Lookahead,
    ParticleFilter,
    Rebase,
    Strategy,
)

SIZES = {4: 100, 16: 60}  # in whole samples (128 and 512 policy tokens of a test problem) -> test problems of a seed
VALUE = "min"
WEIGHT = 0.1  # temperature of weighted votes
BUDGETS = (256, 512)


@dataclass(frozen=True)
class Entry:
    """One line of the comparison at one size.

    Attributes:
        name: of the line.
        size: in whole samples.
        trial: what is run; its configs are named by `names`.
        names: of the lines that are read off it.
    """

    name: str
    size: int
    trial: Trial
    names: tuple[str, ...]


def searches(n: int, tokens_per_answer: int, steps: int) -> dict[str, Strategy]:
    """Line -> a search that may spend as much as n whole samples. The budget in tokens is the limit of each."""
    return {
        "beam": Beam(*shape(n)),
        "dvts": DVTS(max(2, n // 4), 1, max(2, n // max(2, n // 4))),
        "lookahead": Lookahead(*shape(n // 2)),
        "lookahead, greedy": Lookahead(*shape(n // 2), greedy=True),
        "particle filter": ParticleFilter(n, temperature=0.1),
        "particle filter, T 1": ParticleFilter(n),
        "particle Gibbs": ParticleFilter(max(2, n // 4), temperature=0.1, sweeps=4),
        "rebase": Rebase(n),
        "mcts, puct": MCTS(n * steps // 4),
        "mcts, uct": MCTS(n * steps // 4, rule="uct"),
        "mcts, rollouts": MCTS(n * steps // 4, rollout_steps=2),
        "adaptive branch, answers": AdaptiveBranch(4 * n),
        "adaptive branch, steps": AdaptiveBranch(n * steps, until="step"),
    }


def entries(tokens_per_answer: int, steps: int) -> list[Entry]:
    """All lines at all sizes."""
    found = []
    for n in SIZES:
        tokens = n * tokens_per_answer
        samples = BestOfN(n)
        configs = (
            Config(samples, None, None, "majority", 1.0, tokens),
            Config(samples, "prm", VALUE, "best", 1.0, tokens),
            Config(samples, "prm", VALUE, "weighted", WEIGHT, tokens),
        )
        trial = Trial(samples, None, None, None, configs)
        found.append(Entry("samples", n, trial, ("majority", "best of n", "weighted vote")))
        for name, strategy in searches(n, tokens_per_answer, steps).items():
            config = Config(strategy, "prm", VALUE, "best", 1.0, tokens)
            found.append(Entry(name, n, Trial(strategy, "prm", VALUE, tokens, (config,)), (name,)))
    return found


def grid() -> Grid:
    """The grid that `tune` tries, on other problems."""
    return Grid(BUDGETS, values=(VALUE,))
