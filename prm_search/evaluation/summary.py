"""summarise: records in, the table out. No model, so a report can be made again from its records alone."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import accumulate
from statistics import fmean
from typing import Any

from .plan import STRATEGIES, VOTES, Cell
from .statistics import Comparison, bootstrap_interval, clustered_wilson, paired_bootstrap, pass_at_k


@dataclass(frozen=True)
class Outcome:
    """A cell's outcome on one problem under one seed. Tokens and seconds are what this cell alone would have spent.

    Attributes:
        problem, seed: which.
        right: whether the answer that it chose is right.
        policy_tokens: sampled, pruned steps and rollouts included.
        prm_tokens, reference_tokens: encoded for scoring.
        seconds: wall time of sampling and scoring.
        cut: the search's budget cut something.
        full: the chosen response ended at the length limit, so it has no answer.
        shared: its seconds are a share of those that more samples took together: drawn alone, they take longer.
    """

    problem: int
    seed: int | None
    right: bool
    policy_tokens: float
    prm_tokens: float = 0.0
    reference_tokens: float = 0.0
    seconds: float = 0.0
    cut: bool = False
    full: bool = False
    shared: bool = False


@dataclass(frozen=True)
class SummaryRow:
    """A cell's figures over all problems and seeds.

    Attributes:
        cell: which.
        problems, answers: how many; answers = problems * seeds where the run is complete.
        accuracy, low, high: share of right answers, and statistics.clustered_wilson's 95 % interval.
        by_seed: share of right answers of each seed.
        policy_tokens, prm_tokens, reference_tokens: means of an answer; total_tokens is their sum.
        seconds: sum over all answers.
        cut: share of the answers whose search the budget cut.
        full: share of the answers that ended at the length limit, which are wrong.
        shared: whether the seconds are a share of those that more samples took together.
        oracle_gap: what a perfect choice would add, over the problems that have samples; None without any. For a vote:
            the share of problems with a right sample among the n it chose from, minus its accuracy, never below 0. For
            a search or greedy: pass@n minus its accuracy.
        against_majority: paired bootstrap of the accuracy minus that of majority at the same budget; None without it.
        against_best_of_n: the same for searches, against best_of_n of the same pair and budget. With several values,
            against the one that is right most often: the hardest to beat.
        rival: the value of that best_of_n.
    """

    cell: Cell
    problems: int
    answers: int
    accuracy: float
    low: float
    high: float
    by_seed: dict[str, float]
    policy_tokens: float
    prm_tokens: float
    reference_tokens: float
    total_tokens: float
    seconds: float
    cut: float
    full: float = 0.0
    shared: bool = False
    oracle_gap: float | None = None
    against_majority: Comparison | None = None
    against_best_of_n: Comparison | None = None
    rival: str | None = None


@dataclass(frozen=True)
class PassAt:
    """pass@k: the chance that k samples hold a right one, mean over problems, with a bootstrap 95 % interval."""

    k: int
    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class Summary:
    """The table.

    Attributes:
        problems: how many have any record.
        seeds: of the draws.
        rows: one a cell, by strategy, pair, value and budget.
        pass_at: one for each budget.
        samples, full_samples: how many samples were drawn, and how many of them ended at the length limit.
    """

    problems: int
    seeds: list[int]
    rows: list[SummaryRow]
    pass_at: list[PassAt]
    samples: int = 0
    full_samples: int = 0

    def row(self, strategy: str, n: int, **which: str | None) -> SummaryRow:
        """The one row of this strategy and budget, and of the other fields of its cell that are given (pair, value,
        weight).

        Raises:
            KeyError: no row fits, or several do.
        """
        named = {"strategy": strategy, "n": n, **which}
        matching = [row for row in self.rows if all(getattr(row.cell, k) == v for k, v in named.items())]
        if len(matching) != 1:
            raise KeyError(f"{len(matching)} rows have {named}")
        return matching[0]

    def card(self) -> dict[str, Any]:
        """As report.json has it: plain values, the cell's fields among the row's."""
        rows = [{**asdict(row.cell), **asdict(row)} for row in self.rows]
        for row in rows:
            del row["cell"]
        return {
            "problems": self.problems,
            "seeds": self.seeds,
            "samples": self.samples,
            "full_samples": self.full_samples,
            "pass_at": [asdict(estimate) for estimate in self.pass_at],
            "rows": rows,
        }


def outcomes(records: Iterable[Mapping[str, Any]]) -> dict[Cell, list[Outcome]]:
    """Return what each cell did, problem by problem, from the records of evaluate.

    Of n samples, the seconds and the scorer's tokens are those of all samples, shared out by tokens: by sampled ones,
    and by those that no earlier sample shares.
    """
    by_cell: dict[Cell, list[Outcome]] = defaultdict(list)
    for record in records:
        cell_outcomes = _of_samples(record) if record["kind"] == "samples" else [(_cell(record), _of_search(record))]
        for cell, outcome in cell_outcomes:
            by_cell[cell].append(outcome)
    return dict(by_cell)


def _of_search(record: Mapping[str, Any]) -> Outcome:
    same = ("problem", "seed", "right", "policy_tokens", "prm_tokens", "reference_tokens", "seconds")
    fields = {name: record[name] for name in same}
    return Outcome(**fields, cut=record["stopped"] == "tokens", full=record.get("finish") == "length")


def _of_samples(record: Mapping[str, Any]) -> Iterator[tuple[Cell, Outcome]]:
    samples = record["samples"]
    sampled = list(accumulate((sample["tokens"] for sample in samples), initial=0))
    fresh = list(accumulate((sample["new_tokens"] for sample in samples), initial=record["prompt_tokens"]))
    for choice in record["chosen"]:
        cell = _cell(choice)
        drawn, scored = sampled[cell.n] / sampled[-1], fresh[cell.n] / fresh[-1]
        cost = record["scoring"].get(cell.pair, {"prm_tokens": 0, "reference_tokens": 0, "seconds": 0.0})
        yield (
            cell,
            Outcome(
                record["problem"],
                record["seed"],
                choice["right"],
                policy_tokens=sampled[cell.n],
                prm_tokens=cost["prm_tokens"] * scored,
                reference_tokens=cost["reference_tokens"] * scored,
                seconds=record["seconds"] * drawn + cost["seconds"] * scored,
                full=choice.get("finish") == "length",
                shared=cell.n < len(samples),
            ),
        )


def compare(a: Sequence[Outcome], b: Sequence[Outcome]) -> Comparison | None:
    """Paired bootstrap of two cells' accuracies over the problems that both have; None without common problems.

    Problems are resampled, each with the mean of its seeds.
    """
    mine, theirs = _by_problem(a), _by_problem(b)
    both = sorted(mine.keys() & theirs.keys())
    if not both:
        return None
    return paired_bootstrap([fmean(mine[i]) for i in both], [fmean(theirs[i]) for i in both])


def summarise(records: Iterable[Mapping[str, Any]]) -> Summary:
    """The table of these records, which may be those of an unfinished run.

    Raises:
        ValueError: there are no records.
    """
    kept = list(records)
    if not kept:
        raise ValueError("records is empty: there is nothing to summarise")
    cells = outcomes(kept)
    samples = [record for record in kept if record["kind"] == "samples"]
    budgets = sorted({cell.n for cell in cells})
    chances = {n: _chances(samples, n) for n in budgets}
    oracles = {n: _oracles(samples, n) for n in budgets}
    rows = [
        _row(cell, cells, (oracles if cell.strategy in VOTES else chances)[cell.n])
        for cell in sorted(cells, key=_order)
    ]
    pass_at = []
    for n, by_problem in chances.items():
        if by_problem:
            means = [fmean(by_seed) for by_seed in by_problem.values()]
            pass_at.append(PassAt(n, fmean(means), *bootstrap_interval(means)))
    seeds = sorted({record["seed"] for record in kept if record["seed"] is not None})
    finishes = [sample["finish"] for record in samples for sample in record["samples"]]
    problems = len({record["problem"] for record in kept})
    return Summary(problems, seeds, rows, pass_at, len(finishes), finishes.count("length"))


def _row(cell: Cell, cells: Mapping[Cell, Sequence[Outcome]], best_choice: Mapping[int, Sequence[float]]) -> SummaryRow:
    done = cells[cell]
    by_problem = _by_problem(done)
    low, high = clustered_wilson(list(by_problem.values()))
    by_seed: dict[str, list[bool]] = defaultdict(list)
    for outcome in done:
        by_seed["all" if outcome.seed is None else str(outcome.seed)].append(outcome.right)
    both = [i for i in by_problem if i in best_choice]
    gap = fmean(fmean(best_choice[i]) - fmean(by_problem[i]) for i in both) if both else None
    policy, prm, reference = (
        fmean(getattr(outcome, name) for outcome in done)
        for name in ("policy_tokens", "prm_tokens", "reference_tokens")
    )
    majority = Cell("majority", cell.n)
    best = None if cell.strategy in VOTES else _best_of_n(cell, cells)
    return SummaryRow(
        cell,
        len(by_problem),
        len(done),
        fmean(outcome.right for outcome in done),
        low,
        high,
        {seed: fmean(right) for seed, right in sorted(by_seed.items())},
        policy,
        prm,
        reference,
        policy + prm + reference,
        sum(outcome.seconds for outcome in done),
        fmean(outcome.cut for outcome in done),
        fmean(outcome.full for outcome in done),
        any(outcome.shared for outcome in done),
        gap,
        compare(done, cells[majority]) if majority in cells and majority != cell else None,
        None if best is None else compare(done, cells[best]),
        None if best is None else best.value,
    )


def _best_of_n(cell: Cell, cells: Mapping[Cell, Sequence[Outcome]]) -> Cell | None:
    """The best_of_n of this cell's pair and budget that is right most often; None if there was no best_of_n."""
    rivals = [rival for rival in cells if (rival.strategy, rival.n, rival.pair) == ("best_of_n", cell.n, cell.pair)]
    return max(rivals, key=lambda rival: fmean(outcome.right for outcome in cells[rival]), default=None)


def _by_problem(done: Sequence[Outcome]) -> dict[int, list[bool]]:
    by_problem: dict[int, list[bool]] = defaultdict(list)
    for outcome in done:
        by_problem[outcome.problem].append(outcome.right)
    return by_problem


def _chances(samples: Sequence[Mapping[str, Any]], k: int) -> dict[int, list[float]]:
    """pass@k of each problem, one figure a seed; of problems with at least k samples."""
    by_problem: dict[int, list[float]] = defaultdict(list)
    for record in samples:
        labels = [sample["right"] for sample in record["samples"]]
        if k <= len(labels):
            by_problem[record["problem"]].append(pass_at_k(len(labels), sum(labels), k))
    return by_problem


def _oracles(samples: Sequence[Mapping[str, Any]], n: int) -> dict[int, list[float]]:
    """For each problem and seed, 1 if one of the first n samples is right, else 0."""
    by_problem: dict[int, list[float]] = defaultdict(list)
    for record in samples:
        labels = [sample["right"] for sample in record["samples"]]
        if n <= len(labels):
            by_problem[record["problem"]].append(float(any(labels[:n])))
    return by_problem


def _cell(record: Mapping[str, Any]) -> Cell:
    return Cell(record["strategy"], record["n"], record.get("pair"), record.get("value"), record.get("weight"))


def _order(cell: Cell) -> tuple[Any, ...]:
    return STRATEGIES.index(cell.strategy), cell.pair or "", cell.value or "", cell.weight or "", cell.n
