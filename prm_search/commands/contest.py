"""The demo's contest: strategies on the same held-out problems, each with the same number of policy tokens."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.table import Table

from ..answers import Select, select
from ..demo.chains import DELIMITER, Problem, answer
from ..driver.budget import Budget
from ..driver.result import Event, Result
from ..evaluation.statistics import wilson
from ..search import search
from ..steps import StepRule
from ..strategies import Beam, BestOfN, Strategy
from ..tree import Node

LENGTH = 8  # steps of a problem
STEP_TOKENS = 4  # variable, operation, result, and delimiter or end
SAMPLES, WIDTH, EXPANSIONS = 16, 4, 4
BEAM = Beam(WIDTH, EXPANSIONS, value="min")  # one wrong step spoils an answer, so a prefix is as good as its worst
BUDGET = SAMPLES * LENGTH * STEP_TOKENS  # policy tokens a problem: enough for 16 whole answers
TITLES = {
    "greedy": "greedy",
    "majority": f"majority of {SAMPLES}",
    "best_of_n": f"best of {SAMPLES}",
    "weighted": "weighted vote",
    "beam": f"beam {WIDTH} x {EXPANSIONS}",
}


@dataclass
class Row:
    """What a strategy did: answers so far, and what they cost.

    Attributes:
        right: for each problem whether the answer was right.
        policy_tokens, prm_tokens, reference_tokens: means of a problem; see `docs/cli.md`.
        seconds: wall time for all problems.
    """

    right: list[bool]
    policy_tokens: float
    prm_tokens: float
    reference_tokens: float
    seconds: float

    @property
    def accuracy(self) -> float:
        """Share of right answers."""
        return sum(self.right) / len(self.right)

    def interval(self) -> tuple[float, float]:
        """Wilson's 95 % interval of the accuracy."""
        return wilson(sum(self.right), len(self.right))

    def record(self) -> dict[str, float]:
        """As `--json` has it."""
        low, high = self.interval()
        return {
            "accuracy": round(self.accuracy, 4),
            "low": round(low, 4),
            "high": round(high, 4),
            "policy_tokens": round(self.policy_tokens, 1),
            "prm_tokens": round(self.prm_tokens, 1),
            "reference_tokens": round(self.reference_tokens, 1),
            "seconds": round(self.seconds, 2),
        }


class Board:
    """The table, filled while the strategies run."""

    def __init__(self, total: int, console: Console) -> None:
        self.total = total
        self.rows: dict[str, Row] = {}
        self.status: dict[str, str] = {}
        self._live = Live(self._table(), console=console, auto_refresh=console.is_terminal)

    @contextmanager
    def shown(self) -> Iterator[Board]:
        """Live on a terminal; elsewhere the final table is printed, once, at the end."""
        with self._live:
            yield self

    def solved(self, names: Sequence[str], done: int) -> None:
        """So many problems are done under these strategies."""
        self.status = dict.fromkeys(names, f"{done}/{self.total}")
        self._update()

    def put(self, name: str, row: Row) -> None:
        """A strategy is done."""
        self.rows[name] = row
        self.status.pop(name, None)
        self._update()

    def _update(self) -> None:
        self._live.update(self._table(), refresh=self._live.console.is_terminal)

    def _table(self) -> Table:
        table = Table(
            caption=f"{self.total} held-out problems. Tokens: mean of a problem; the policy samples at most {BUDGET}.",
            caption_justify="left",
        )
        table.add_column("strategy")
        for title in ("right", "95 % interval", "policy tokens", "PRM tokens", "ref. tokens", "seconds"):
            table.add_column(title, justify="right")
        best = max((row.accuracy for row in self.rows.values()), default=0.0)
        for name, title in TITLES.items():
            row = self.rows.get(name)
            if row is None:
                table.add_row(title, self.status.get(name, ""), style="dim")
                continue
            low, high = row.interval()
            table.add_row(
                title,
                f"{row.accuracy:.3f}",
                f"[{low:.3f}, {high:.3f}]",
                f"{row.policy_tokens:.1f}",
                f"{row.prm_tokens:.1f}",
                f"{row.reference_tokens:.1f}",
                f"{row.seconds:.1f}",
                style="bold green" if row.accuracy == best else None,
            )
        return table


@dataclass
class Contest:
    """All strategies on the same problems."""

    asked: list[Problem]
    policy: Any
    pair: Any
    seed: int
    board: Board

    def run(self) -> tuple[list[Result], dict[str, list[str | None]]]:
        """Fill the board. Returns the beam's results, and every strategy's answers."""
        chosen: dict[str, list[str | None]] = {}
        greedy, seconds = self._search(["greedy"], BestOfN(1), scored=False, temperature=0.0)
        chosen["greedy"] = [result.answer for result in greedy]
        self._put("greedy", chosen["greedy"], greedy, seconds)

        votes: dict[str, Select] = {"majority": "majority", "best_of_n": "best", "weighted": "weighted"}
        samples, seconds = self._search(list(votes), BestOfN(SAMPLES))
        scoring = samples[0].usage.seconds.get("scorer", 0.0)
        for name, how in votes.items():
            chosen[name] = [self._choose(result.candidates, how) for result in samples]
            blind = name == "majority"  # needs no rewards, so it is not charged for them
            self._put(name, chosen[name], samples, seconds - scoring if blind else seconds, blind=blind)

        beams, seconds = self._search(["beam"], BEAM)
        chosen["beam"] = [result.answer for result in beams]
        self._put("beam", chosen["beam"], beams, seconds)
        return beams, chosen

    def _search(
        self, names: Sequence[str], strategy: Strategy, *, scored: bool = True, temperature: float = 1.0
    ) -> tuple[list[Result], float]:
        """All problems in one call; the seconds it took."""
        done = 0

        def on_event(event: Event) -> None:
            nonlocal done
            if event.kind == "done":
                done += 1
                self.board.solved(names, done)

        self.board.solved(names, 0)
        began = time.perf_counter()
        results = search(
            [problem.prompt for problem in self.asked],
            policy=self.policy,
            scorer=self.pair if scored else None,
            strategy=strategy,
            steps=StepRule(DELIMITER, max_tokens=2 * STEP_TOKENS),
            max_new_tokens=2 * LENGTH * STEP_TOKENS,
            temperature=temperature,
            seed=self.seed,
            answer=answer,
            budget=Budget(tokens=BUDGET),
            on_event=on_event,
        )
        return results, time.perf_counter() - began

    def _choose(self, candidates: Sequence[Node], how: Select) -> str | None:
        whole = [node for node in candidates if node.finish == "stop"] or candidates
        if how != "majority":
            return select(whole, how, answer=answer).answer
        votes: Counter[str] = Counter()  # blind: `select` would break ties by reward, here the first drawn wins
        for node in sorted(whole, key=lambda node: node.index):
            found = answer(node.path_text())
            if found is not None:
                votes[found] += node.count
        return max(votes, key=votes.__getitem__, default=None)

    def _put(
        self, name: str, answers: Sequence[str | None], results: Sequence[Result], seconds: float, blind: bool = False
    ) -> None:
        def mean(count: Callable[[Result], int]) -> float:
            return sum(map(count, results)) / len(results)

        def encoded(role: str) -> float:
            return mean(lambda r: r.usage.of_role(role))

        row = Row(
            [given == problem.answer for given, problem in zip(answers, self.asked, strict=True)],
            mean(lambda r: r.usage.sampled_tokens.get("policy", 0)),
            0.0 if blind else encoded("prm"),
            0.0 if blind else encoded("reference"),
            seconds,
        )
        self.board.put(name, row)
