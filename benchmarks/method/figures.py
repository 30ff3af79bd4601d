"""From the stages' files to figures. No model is run here, so tables can be made again in seconds."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
from localise import Steps, localisation
from protocol import POLICY, WITHOUT, Protocol

from prm_search.demo.chains import Problem, answer, check, problems, wrong_steps
from prm_search.demo.tokenizer import DELIMITER_ID, EOS_ID, text
from prm_search.evaluation.plan import Cell, Plan
from prm_search.evaluation.samples import Cost, Sample, record_of
from prm_search.evaluation.statistics import paired_bootstrap, pass_at_k, wilson
from prm_search.training.data import LabelledResponse, read_rollouts


@dataclass
class Measured:
    """One seed's outcomes on its test problems.

    Attributes:
        right: name of a line -> right or wrong, problem by problem.
        tokens: name -> policy tokens of a problem.
        steps: pair -> step rewards of responses with and without errors.
        rates: pass@1 and the like.
        training: pair -> what its stage noted.
        policy: what its stage noted.
    """

    right: dict[str, list[bool]] = field(default_factory=dict)
    tokens: dict[str, float] = field(default_factory=dict)
    steps: dict[str, list[Steps]] = field(default_factory=dict)
    rates: dict[str, float] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)
    policy: dict[str, Any] = field(default_factory=dict)
    cpu_seconds: float = 0.0


def measure(folder: Path, seed: int, protocol: Protocol) -> Measured:
    """Reads a finished seed. Raises FileNotFoundError where a stage is missing."""
    p = protocol
    stages = {path.stem: json.loads(path.read_text()) for path in (folder / "stages").glob("*.json")}
    asked = problems(p.test_problems, split="test", seed=seed, length=p.test_length)
    rows = read_rollouts(folder / "samples.jsonl")
    found = Measured(policy=_plain(stages["policy"]), cpu_seconds=sum(each["cpu_seconds"] for each in stages.values()))
    runs = p.runs(seed)
    logprobs = {run.name: _logprobs(folder, run.name, rows) for run in runs}
    reference = _logprobs(folder, "policy", rows)
    rewards = {run.name: _rewards(rows, logprobs[run.name], reference, run.recipe.scale) for run in runs}
    # Without a reference: a constant in its place. All test responses are equally long, so which one is of no account.
    rewards[WITHOUT] = _rewards(rows, logprobs["ce"], [np.zeros_like(each) for each in reference], 0.05)
    rewards[POLICY] = _rewards(rows, reference, [np.zeros_like(each) for each in reference], 0.05)

    _votes(found, p, asked, rows, rewards)
    for run in runs:
        found.training[run.name] = _plain(stages[f"prm-{run.name}".replace(" ", "-")])
    for scorer, value in [*((run.name, value) for run in runs for value in run.beams), (WITHOUT, "q")]:
        note = stages[f"beam-{scorer}-{value}".replace(" ", "-")]
        name = f"beam {value} ({scorer})"
        found.right[name], found.tokens[name] = note["right"], fmean(note["policy_tokens"])
    for name in [run.name for run in runs if run.beams] + [POLICY]:
        found.steps[name] = _step_errors(asked, rows, rewards[name])
    return found


def _plain(note: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in note.items() if name != "settings"}


def _logprobs(folder: Path, name: str, rows: Sequence[LabelledResponse]) -> list[np.ndarray]:
    flat = np.load(folder / f"logprobs-{name.replace(' ', '-')}.npz")["logprobs"]
    return np.split(flat, np.cumsum([len(row.response_ids) for row in rows])[:-1])


def step_ends(ids: Sequence[int]) -> list[int]:
    """Return where each step of a response ends (exclusive): after a delimiter, or at the end of the response."""
    ends = [i + 1 for i, token in enumerate(ids) if token in (DELIMITER_ID, EOS_ID)]
    return ends if ends and ends[-1] == len(ids) else [*ends, len(ids)]


def _rewards(
    rows: Sequence[LabelledResponse], model: Sequence[np.ndarray], reference: Sequence[np.ndarray], beta: float
) -> list[np.ndarray]:
    """Step rewards of each sample."""
    found = []
    for row, mine, theirs in zip(rows, model, reference, strict=True):
        ends = step_ends(row.response_ids.tolist())
        found.append(beta * np.add.reduceat(mine - theirs, [0, *ends[:-1]]))
    return found


def _votes(
    found: Measured,
    p: Protocol,
    asked: Sequence[Problem],
    rows: Sequence[LabelledResponse],
    rewards: dict[str, list[np.ndarray]],
) -> None:
    """Majority, best-of-n and weighted votes of every pair among the same samples; pass@k."""
    sizes = [n for n in (1, 2, 4, 8, 16, 32, 64) if n <= p.samples]
    curves = Plan(("majority", "best_of_n", "weighted"), sizes, values=("q", "min"))
    last = Plan(("best_of_n", "weighted"), (p.samples,), values=("q",))
    tokens: defaultdict[int, list[int]] = defaultdict(list)
    labels = []
    for place, problem in enumerate(asked):
        here = range(place * p.samples, (place + 1) * p.samples)
        samples = []
        for i in here:
            said = text(rows[i].response_ids.tolist())
            values = {name: {"q": float(each[i].sum()), "min": float(each[i].min())} for name, each in rewards.items()}
            length, ended = len(rows[i].response_ids), int(rows[i].response_ids[-1]) == EOS_ID
            vote, finish = (answer(said), "stop") if ended else (None, "length")
            samples.append(Sample(said, vote, rows[i].label, length, length, finish, values))
        labels.append([sample.right for sample in samples])
        solved = [check(problem, sample.text).correct for sample in samples]
        found.rates["all steps right"] = found.rates.get("all steps right", 0.0) + fmean(solved) / len(asked)
        for n in sizes:
            tokens[n].append(sum(sample.tokens for sample in samples[:n]))
        for plan, names in ((curves, ["ce"]), (last, [name for name in rewards if name != "ce"])):
            record = record_of(samples, {name: Cost(0, 0, 0.0) for name in names}, plan)
            for choice in record["chosen"]:
                cell = Cell(*(choice[name] for name in ("strategy", "n", "pair", "value", "weight")))
                found.right.setdefault(line(cell), []).append(choice["right"])
                found.tokens[line(cell)] = fmean(tokens[cell.n])
    for k in sizes:
        found.rates[f"pass@{k}"] = fmean(pass_at_k(p.samples, sum(each), k) for each in labels)


def line(cell: Cell) -> str:
    """Return what a vote is called: "best_of_n 16 q (ce)"."""
    words = [cell.strategy, str(cell.n), cell.value, f"({cell.pair})" if cell.pair else None]
    return " ".join(word for word in words if word)


def _step_errors(
    asked: Sequence[Problem], rows: Sequence[LabelledResponse], rewards: Sequence[np.ndarray]
) -> list[Steps]:
    """Of each problem the first sample that has a wrong step, and the first that has none."""
    found = []
    samples = len(rows) // len(asked)
    for place, problem in enumerate(asked):
        wanted = {True, False}
        for i in range(place * samples, (place + 1) * samples):
            marks = wrong_steps(problem, text(rows[i].response_ids.tolist()))
            wrong = any(marks)
            if wrong in wanted and len(marks) == len(rewards[i]) == len(problem.ops):
                wanted.discard(wrong)
                found.append(Steps(place, rewards[i].tolist(), marks))
    return found


def compared(seeds: Sequence[Measured], a: str, b: str) -> dict[str, Any]:
    """Line a minus line b on the problems that both have: each seed, and all of them together."""
    pairs = [(each.right[a], each.right[b]) for each in seeds]
    pairs = [(mine[: len(theirs)], theirs[: len(mine)]) for mine, theirs in pairs]
    tests = [paired_bootstrap(mine, theirs) for mine, theirs in pairs]
    whole = paired_bootstrap([x for mine, _ in pairs for x in mine], [x for _, theirs in pairs for x in theirs])
    return {
        "a": a, "b": b, "difference": whole.difference, "low": whole.low, "high": whole.high, "p": whole.p,
        "problems": whole.problems, "by_seed": [{"difference": t.difference, "p": t.p} for t in tests],
    }  # fmt: skip


def pooled(seeds: Sequence[Measured], name: str) -> dict[str, Any]:
    """A line over all seeds' problems, with Wilson's interval, and each seed's share."""
    every = [right for each in seeds for right in each.right[name]]
    low, high = wilson(sum(every), len(every))
    return {
        "line": name, "accuracy": fmean(every), "low": low, "high": high, "tested": len(every),
        "policy_tokens": fmean(each.tokens[name] for each in seeds),
        "by_seed": [fmean(each.right[name]) for each in seeds],
    }  # fmt: skip


def located(seeds: Sequence[Measured], name: str) -> dict[str, Any]:
    """Step-error localisation by a pair's step rewards: means over the seeds, with F1 of each."""
    parts = [localisation(each.steps[name]) for each in seeds]
    keys = ("f1", "first_wrong", "right_passed", "auc", "lowest_is_wrong", "only_error_found")
    return {
        "pair": name,
        "responses": sum(each["responses"] for each in parts),
        **{key: fmean(each[key] for each in parts) for key in keys},
        "f1_by_seed": [each["f1"] for each in parts],
        "chance": {key: fmean(each["chance"][key] for each in parts) for key in parts[0]["chance"]},
    }
