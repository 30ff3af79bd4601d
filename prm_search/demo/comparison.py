"""The demo's comparison: strategies on held-out chains, each with the policy tokens of 16 whole answers. No torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from ..driver.result import Result
from ..evaluation import Plan, Summary, SummaryRow, Unit, evaluate
from ..evaluation.plan import OWN
from ..problems import Problem
from ..protocols import Policy, Scorer
from ..steps import StepRule
from ..tree import Prompt
from . import chains

LENGTH = 8  # steps of a problem
STEP_TOKENS = 4  # variable, operation, result, and delimiter or end
SAMPLES, WIDTH, EXPANSIONS = 16, 4, 4
VALUE = "min"  # of the beam: one wrong step spoils an answer, so a prefix is as good as its worst
TITLES = {
    "greedy": "greedy",
    "majority": f"majority of {SAMPLES}",
    "best_of_n": f"best of {SAMPLES}",
    "weighted": "weighted vote",
    "beam": f"beam {WIDTH} x {EXPANSIONS}",
}


def judge(text: str, reference: str) -> tuple[str | None, bool]:
    """The final answer of a response, and whether it is the reference answer: a label (see problems.Judge)."""
    answer = chains.answer(text)
    return answer, answer == reference


def plan(seed: int, *, own: bool = False) -> Plan:
    """All strategies of TITLES under one seed.

    Args:
        seed: of every draw.
        own: rank by the value that the scorer is meant for, in place of the pair's.
    """
    return Plan(
        strategies=tuple(TITLES),
        budgets=(SAMPLES,),
        seeds=(seed,),
        values=(OWN if own else "q",),
        search_values=(OWN if own else VALUE,),
        shapes={SAMPLES: (WIDTH, EXPANSIONS)},
        steps=StepRule(chains.DELIMITER, max_tokens=2 * STEP_TOKENS),
        max_new_tokens=2 * LENGTH * STEP_TOKENS,
    )


def as_problems(problems: Sequence[chains.Problem]) -> list[Problem]:
    """Chains as evaluation and rollouts take them."""
    return [Problem(Prompt(text=problem.prompt), problem.answer) for problem in problems]


def compare(
    problems: Sequence[chains.Problem],
    policy: Policy,
    scorer: Scorer,
    seed: int,
    *,
    on_result: Callable[[Unit, Result], object] | None = None,
) -> Iterator[dict[str, Any]]:
    """Records of `evaluation.evaluate`, as they are finished."""
    how = plan(seed, own=not getattr(scorer, "rewards_tokens", True))
    return evaluate(
        as_problems(problems), policy=policy, scorers=scorer, plan=how, judge=judge, answer=chains.answer,
        on_result=on_result,
    )  # fmt: skip


def figures(row: SummaryRow) -> dict[str, float]:
    """A strategy's line, as `prm-search demo --json` and the card of the pair have it."""
    return {
        "accuracy": round(row.accuracy, 4),
        "low": round(row.low, 4),
        "high": round(row.high, 4),
        "policy_tokens": round(row.policy_tokens, 1),
        "prm_tokens": round(row.prm_tokens, 1),
        "reference_tokens": round(row.reference_tokens, 1),
        "seconds": round(row.seconds, 2),
    }


def card(summary: Summary) -> dict[str, Any]:
    """A comparison as the card of a pair has it: every line but its seconds, pass@16, and the paired tests."""
    tests: dict[str, Any] = {}
    for row in summary.rows:
        for rival in ("majority", "best_of_n"):
            against = getattr(row, f"against_{rival}")
            if against is not None and row.cell.strategy != "greedy":
                tests[f"{row.cell.strategy} against {rival}"] = {
                    "difference": round(against.difference, 4), "p": against.p
                }  # fmt: skip
    lines = {row.cell.strategy: figures(row) for row in summary.rows}
    for line in lines.values():
        del line["seconds"]
    chance = next(estimate for estimate in summary.pass_at if estimate.k == SAMPLES)
    return {
        "problems": summary.problems, "seeds": summary.seeds, f"pass@{chance.k}": round(chance.mean, 4),
        "strategies": lines, "tests": tests,
    }  # fmt: skip
