"""Every strategy at growing sizes: what the report compares, fixed before the reported seeds were run. No model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from prm_search.answers import Select
from prm_search.evaluation.plan import shape
from prm_search.evaluation.tuning.trials import Config, Grid, Trial
from prm_search.strategies import (
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
    Strategy,
)

SIZES = (4, 8, 16, 32)  # in whole samples: 128, 256, 512 and 1,024 policy tokens of a test problem
FEW = (4, 8, 16)  # of variants whose family has another line
PROBLEMS = 40  # test problems of a seed
VALUE = "min"
WEIGHT = 0.1  # temperature of weighted votes
BUDGETS = (256, 512)
EQUAL = 16  # best of so many sets the cost at which lines are compared
ACCEPT = -0.3  # least step reward of a draft's proposal: between the rewards of right and of wrong steps


@dataclass(frozen=True)
class Entry:
    """One line of the comparison at one size.

    Attributes:
        name: of the line.
        size: in whole samples.
        trial: what is run; its configs are named by `names`.
        names: of the lines that are read off it.
        draft: whether a small model proposes the steps.
    """

    name: str
    size: int
    trial: Trial
    names: tuple[str, ...]
    draft: bool = False


def searches(n: int, steps: int) -> dict[str, Strategy]:
    """Line -> a search that may spend as much as n whole samples. The budget in tokens is the limit of each.

    Simulations of MCTS leave room for one answer, which it samples from the best leaf where none was reached.
    """
    return {
        "beam": Beam(*shape(n)),
        "dvts": DVTS(max(2, n // 4), 1, max(2, n // max(2, n // 4))),
        "lookahead": Lookahead(*shape(n // 2)),
        "lookahead, greedy": Lookahead(*shape(n // 2), greedy=True),
        "particle filter": ParticleFilter(n, temperature="auto"),
        "particle filter, T 1": ParticleFilter(n),
        "particle Gibbs": ParticleFilter(max(2, n // 4), temperature="auto", sweeps=4),
        "rebase": Rebase(n),
        "mcts, puct": MCTS((n - 1) * steps // 4),
        "mcts, uct": MCTS((n - 1) * steps // 4, rule="uct"),
        "mcts, rollouts": MCTS((n - 1) * steps // 4, rollout_steps=2),
        "adaptive branch, steps": AdaptiveBranch(2 * n * steps, until="step"),
        "adaptive branch, answers": AdaptiveBranch(4 * n),
        "adaptive branch, steps, published": AdaptiveBranch(2 * n * steps, until="step", rule="published"),
        "adaptive branch, answers, published": AdaptiveBranch(4 * n, rule="published"),
    }


def votes(n: int, tokens_per_answer: int) -> dict[str, Strategy]:
    """Line -> a vote without a scorer. Those that stop early may draw more answers than n; the tokens limit them."""
    return {
        "self-consistency, adaptive": SelfConsistency(n, stop="adaptive"),
        "self-consistency, beta": SelfConsistency(n, stop="beta"),
        "self-consistency, confidence": SelfConsistency(n, weight="confidence"),
        "deepconf": DeepConf(max(2, n // 4), 2 * n, keep=0.5, window=tokens_per_answer // 4),
    }


MAIN = (
    "samples", "beam", "dvts", "particle filter", "rebase", "mcts, puct", "adaptive branch, steps",
    "adaptive branch, answers", "self-consistency, beta", "deepconf",
)  # fmt: skip


def entries(tokens_per_answer: int, steps: int, sizes: Sequence[int] = SIZES) -> list[Entry]:
    """All lines at all sizes, in whole samples."""
    lines = []
    for n in sizes:
        tokens = n * tokens_per_answer
        samples = BestOfN(n)
        configs = (
            Config(samples, None, None, "majority", 1.0, tokens),
            Config(samples, "prm", VALUE, "best", 1.0, tokens),
            Config(samples, "prm", VALUE, "weighted", WEIGHT, tokens),
        )
        trial = Trial(samples, None, None, None, configs)
        lines.append(Entry("samples", n, trial, ("majority", "best of n", "weighted vote")))
        lines += [_entry(name, n, one, "prm", VALUE, "best", tokens) for name, one in searches(n, steps).items()]
        for name, one in votes(n, tokens_per_answer).items():
            select: Select = one.select  # type: ignore[attr-defined]
            lines.append(_entry(name, n, one, None, None, select, tokens))
    return [line for line in lines if line.name in MAIN or line.size in FEW]


def drafted(tokens_per_answer: int, sizes: Sequence[int] = SIZES) -> list[Entry]:
    """Lines whose policy is a DraftPolicy: both models' tokens are policy tokens.

    A step that is written twice costs twice, so half as many steps are asked for: all answers end within the budget.
    """
    lines = []
    for n in (size for size in sizes if size in FEW):
        for name, one in {"draft, best of n": BestOfN(n // 2), "draft, beam": Beam(*shape(n // 2))}.items():
            lines.append(replace(_entry(name, n, one, "prm", VALUE, "best", n * tokens_per_answer), draft=True))
    return lines


def _entry(
    name: str, n: int, strategy: Strategy, scorer: str | None, value: str | None, select: Select, tokens: int
) -> Entry:
    config = Config(strategy, scorer, value, select, 1.0, tokens)
    return Entry(name, n, Trial(strategy, scorer, value, tokens, (config,)), (name,))


def grid() -> Grid:
    """The grid that `tune` tries, on other problems."""
    return Grid(BUDGETS, values=(VALUE,))
