"""Few labels against all labels on the demo's task: does self-training close the gap? Minutes on one core.

    python benchmarks/self_training.py --work DIR --out benchmarks/results/self_training

Everything was fixed before the first run: two seeds, a quarter of the problems labelled, confidence 0.2,0.8, and three
rounds.
Test problems are of a split that no model was trained on. Pseudo-labels are compared with the true labels here alone.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from prm_search import ImplicitPRM
from prm_search.cli import main as command
from prm_search.demo import pair_dir
from prm_search.demo.chains import problems
from prm_search.training.data import LabelledResponse, by_prompt, read_rollouts, split
from prm_search.training.pair_accuracy import pair_accuracy
from prm_search.training.recipe import Recipe
from prm_search.training.run import train
from prm_search.training.self_training import SelfTraining, self_train

POLICY = str(pair_dir() / "policy")
SEEDS = (0, 1)
LENGTHS = ((2, 200), (3, 300), (4, 300))  # (steps, problems) to train on
TESTED, TEST_LENGTH = 200, 4
RESPONSES, SAMPLES = 4, 8
LABELLED = 0.25
SETTINGS = SelfTraining(rounds=3, confidence=(0.2, 0.8))
HOLDOUT = 0.3


def recipe(seed: int, holdout: float = 0.0) -> Recipe:
    """Return how every PRM is trained."""
    return Recipe(
        learning_rate=1e-3, epochs=3, micro_batch=64, batch=64, holdout=holdout, seed=seed, save_steps=100_000
    )


def rollouts(folder: Path, name: str, asked: Sequence[Any], n: int, seed: int) -> Path:
    """Sample and label responses, unless they are there."""
    out, data = folder / f"{name}.jsonl", folder / f"{name}-problems.jsonl"
    if not out.exists():
        data.write_text("".join(json.dumps({"question": p.prompt, "answer": p.answer}) + "\n" for p in asked))
        args = ["rollout", "--policy", "demo", "--data", str(data), "--n", str(n), "--label", "exact"]
        if command([*args, "--seed", str(seed), "--out", str(out)]):
            raise SystemExit("rollout failed")
    return out


def measured(folder: Path, rows: Sequence[LabelledResponse]) -> tuple[float, float, float, float]:
    """Pair accuracy on test responses, and the share of problems whose best of them is right, with its interval."""
    pair = ImplicitPRM.from_pretrained(folder)
    scores = pair.score([list(row.prompt_ids) for row in rows], [row.response_ids for row in rows])
    rewards = {id(row): score.reward for row, score in zip(rows, scores, strict=True)}
    accuracy = pair_accuracy(rows, [rewards[id(row)] for row in rows])
    best = [float(max(group, key=lambda row: rewards[id(row)]).label) for group in by_prompt(rows).values()]
    rng = np.random.default_rng(0)
    means = [float(np.mean(rng.choice(best, len(best)))) for _ in range(2000)]
    low, high = np.quantile(means, [0.025, 0.975])
    return float(accuracy or 0.0), float(np.mean(best)), float(low), float(high)


def one_seed(seed: int, work: Path) -> dict[str, Any]:
    """Train everything of one seed and measure it, unless that is done."""
    folder = work / f"seed-{seed}"
    result = folder / "result.json"
    if result.exists():
        done: dict[str, Any] = json.loads(result.read_text())
        return done
    folder.mkdir(parents=True, exist_ok=True)
    asked = [p for length, n in LENGTHS for p in problems(n, split="prm", seed=seed, length=length)]
    random.Random(f"self-training/{seed}").shuffle(asked)
    every = rollouts(folder, "all", asked, RESPONSES, seed)
    tested = rollouts(folder, "test", problems(TESTED, split="test", seed=seed, length=TEST_LENGTH), SAMPLES, seed)
    lines = every.read_text().splitlines(keepends=True)
    cut = round(LABELLED * len(asked)) * RESPONSES
    few, rest = folder / "few.jsonl", folder / "rest.jsonl"
    few.write_text("".join(lines[:cut]))
    rest.write_text("".join(lines[cut:]))
    rows = read_rollouts(tested)
    entries: list[dict[str, Any]] = []

    def add(name: str, path: Path, labels: int, **more: Any) -> None:
        accuracy, best, low, high = measured(path, rows)
        entries.append(
            {"name": name, "labels": labels, "pairs": accuracy, "best": best, "low": low, "high": high, **more}
        )
        print(json.dumps(entries[-1]), flush=True)

    for name, data in (("all", every), ("few", few)):
        if not (folder / name / "pair.json").exists():
            train(POLICY, data, folder / name, recipe(seed), resume=True)
        add(f"{name} labels", folder / name, len(data.read_text().splitlines()))
    out = folder / "self"
    card = json.loads((out / "pair.json").read_text()) if (out / "pair.json").exists() else None
    card = card or self_train(POLICY, few, rest, out, recipe(seed, HOLDOUT), SETTINGS, resume=True, log=print)
    _, held = split(read_rollouts(few), HOLDOUT)
    away = {row.prompt_ids for row in held}
    pool = [row for row in read_rollouts(rest) if row.prompt_ids not in away]
    rounds = card["self_training"]["rounds"]
    for number, figures in enumerate(rounds):
        given = rounds[number - 1]["next"] if number else []
        right = [pool[place].label is label for place, label in given]
        more = {"pseudo": len(given), "true": float(np.mean(right)) if right else None, "held": figures["accuracy"]}
        chosen = " (chosen)" if number == card["self_training"]["best"] else ""
        labels = len(few.read_text().splitlines())
        add(f"self-training, round {number}{chosen}", out / f"round-{number}", labels, **more)
    share = float(np.mean([row.label for row in rows]))
    run = {"seed": seed, "right": share, "entries": entries, "ended": rounds[-1].get("ended")}
    result.write_text(json.dumps(run))
    return run


HEAD = """# Self-training: few labels against all labels

`python benchmarks/self_training.py`, on the demo's task (constructed). {trained} problems of 2 to 4 steps,
{responses} responses each; a quarter of the problems has labels, and {holdout:.0%} of those are held out by
self-training (confidence {low:g}, {high:g}; at most {rounds} rounds). Tested on {tested} other problems of
{length} steps, {samples} samples each. Seeds and settings were fixed before the first run.

pairs: share of (right, wrong) test pairs in which the right one has more reward. best of 8: share of test
problems whose best sample by reward is right, with a bootstrap interval over problems. true: share of
pseudo-labels that are so."""


def page(runs: Sequence[dict[str, Any]]) -> str:
    """Return the report."""
    low, high = SETTINGS.confidence
    lines = [
        HEAD.format(
            trained=sum(n for _, n in LENGTHS), responses=RESPONSES, holdout=HOLDOUT, low=low, high=high,
            rounds=SETTINGS.rounds, tested=TESTED, length=TEST_LENGTH, samples=SAMPLES,
        )
    ]  # fmt: skip
    for run in runs:
        lines += [
            "",
            f"Seed {run['seed']}; {run['right']:.3f} of the test samples are right.",
            "",
            "| trained on | labels | pseudo-labels | true | held-out pairs | pairs | best of 8 | 95 % interval |",
            "|---|---:|---:|---:|---:|---:|---:|---:|",
        ]
        for one in run["entries"]:
            pseudo = str(one["pseudo"]) if one.get("pseudo") else ""
            true = f"{one['true']:.3f}" if one.get("true") is not None else ""
            held = f"{one['held']:.3f}" if "held" in one else ""
            cells = [one["name"], str(one["labels"]), pseudo, true, held, f"{one['pairs']:.3f}", f"{one['best']:.3f}"]
            lines.append(f"| {' | '.join(cells)} | [{one['low']:.3f}, {one['high']:.3f}] |")
        if run["ended"]:
            lines += ["", f"It ended: {run['ended']}."]
    return "\n".join(lines) + "\n"


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for rollouts and PRMs; a stopped run goes on")
    parser.add_argument("--out", type=Path, required=True, help="folder for report.md and report.json")
    args = parser.parse_args()
    torch.set_num_threads(1)
    runs = [one_seed(seed, args.work) for seed in SEEDS]
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "report.json").write_text(json.dumps(runs, indent=2) + "\n", encoding="utf-8")
    (args.out / "report.md").write_text(page(runs), encoding="utf-8")
    print(page(runs))


if __name__ == "__main__":
    main()
