"""The page of a run, from its folder: ``python run_page.py --run FOLDER --out benchmarks/results/grade_school``."""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import events
from run import PAIR_ACCURACY, lines, measure

from prm_search.evaluation.report import grid, step_table, table
from prm_search.evaluation.step_errors import summarise_steps
from prm_search.evaluation.summary import summarise


def facts(problems: Iterable[events.Problem]) -> Counter[str]:
    """Return how often each calculation is needed."""
    return Counter(step for problem in problems for step in problem.steps)


def written(records: Sequence[dict[str, Any]]) -> Counter[str]:
    """Return how often each line was written in responses."""
    return Counter(line for record in records for line in record["response"].strip().split("\n"))


def gates(folder: Path) -> list[str]:
    """Return the section about the gate: each length that was tried."""
    rows = []
    for file in sorted(folder.glob("gate-*-rollouts.jsonl")):
        of_length = measure(lines(file))
        shares = [f"{of_length[name]:.3f}" for name in ("pass@1", "majority", "pass@n")]
        rows.append([file.name.split("-")[1], f"{of_length['problems']:.0f}", *shares])
    head = ["steps", "problems", "pass@1", "majority@8", "pass@8"]
    return ["## The gate, on a split of its own", grid(head, rows)]


def training(folder: Path) -> list[str]:
    """Return the section about fine-tuning, rollouts and the PRM."""
    policy = [each["loss"] for each in lines(folder / "policy" / "log.jsonl") if "loss" in each]
    prm = [each for each in lines(folder / "prm" / "log.jsonl") if "loss" in each]
    card = json.loads((folder / "prm" / "pair.json").read_text())
    data, steps = card["data"], card["metrics"]["steps"]
    accuracy = json.loads((folder / "vote.json").read_text())["pairs"]
    share = data["right"] / data["responses"]
    losses = ", ".join(f"{each['loss']:.3f}" for each in prm)
    return [
        "## The models",
        f"* Policy: {len(policy)} steps of fine-tuning, loss {policy[0]:.2f} to {policy[-1]:.2f} nats a token.",
        f"* Rollouts: {data['responses']} responses to {data['problems']} problems, {share:.1%} right.",
        f"* PRM: {steps} steps; loss, means of ten steps: {losses}.",
        f"* Pair accuracy on the gate's problems, of which no training saw any: **{accuracy:.3f}** (at least "
        f"{PAIR_ACCURACY} was asked).",
    ]


def recurring(folder: Path, steps: int, settings: dict[str, Any]) -> list[str]:
    """Return the section about what the test shares with training."""
    rollouts = written(lines(folder / f"prm-{steps}-rollouts.jsonl"))
    test = events.problems(settings["test"], split="test", steps=steps)
    needed = facts(test)
    total = sum(needed.values())
    seen = [sum(count for fact, count in needed.items() if rollouts[fact] >= least) for least in (1, 12, 36)]
    others = {p.question for p in events.problems(settings["rollouts"], split="prm", steps=steps)}
    assert not others & {problem.question for problem in test}
    return [
        "## What the test shares with training",
        "No question of the test is in the PRM's rollouts or in the policy's data, but **its calculations recur**: of "
        f"the {total} that the test needs, of {len(needed)} kinds, {seen[0] / total:.1%} were written in the rollouts, "
        f"{seen[1] / total:.1%} at least 12 times and {seen[2] / total:.1%} at least 36 times. Its sentences are of "
        "the same few kinds too. So this measures a reward on new texts and numbers made of known facts, not on "
        "new facts or new kinds of stories.",
    ]


def votes(folder: Path) -> list[str]:
    """Return the section about the vote's temperature."""
    vote = json.loads((folder / "vote.json").read_text())
    rows = [[temperature, f"{right / vote['problems']:.3f}"] for temperature, right in vote["right"].items()]
    return [
        "## Temperature of the weighted vote, chosen on the gate's problems",
        grid(["temperature", "right"], rows),
        f"Chosen: {vote['temperature']:g}, before the test was run.",
    ]


def page(folder: Path) -> str:
    """Return the page."""
    settings = json.loads((folder / "settings.json").read_text())
    gate = json.loads((folder / "gate.json").read_text())
    steps = gate["steps"]
    records = lines(folder / "eval" / "records.jsonl")
    summary = summarise(records)
    samples = settings["samples"]
    parts = [
        f"# Word problems of {steps} steps, SmolLM2-135M",
        "Made by `examples/grade_school/run_page.py` from the records of a run of "
        "[the recipe](../../../examples/grade_school/README.md). "
        f"One seed of the draws, {settings['seed']}, fixed beforehand; {summary.problems} test problems, {samples} "
        "samples each.",
        "## The test",
        table(summary),
        "Columns as in [evaluation](../../../docs/evaluation.md). The beam is not capped problem by problem: its shape "
        "makes its policy tokens those of the samples, on average.",
        *gates(folder),
        *training(folder),
        *votes(folder),
        *recurring(folder, steps, settings),
    ]
    if (folder / "steps" / "steps.jsonl").exists():
        errors = summarise_steps(lines(folder / "steps" / "steps.jsonl"))
        counts = f"{errors.erroneous} distinct responses with a wrong line, {errors.correct} without."
        parts += ["## Wrong lines, found in the gate's responses", counts, step_table(errors)]
    listed = (f"* {name.replace('_', ' ')}: {value}" for name, value in settings.items())
    parts += ["## Settings", "\n".join(listed)]
    return "\n\n".join(parts) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    """Write report.md and report.json. Returns the exit status."""
    command = argparse.ArgumentParser(description="Make the page of a run.")
    command.add_argument("--run", type=Path, required=True, help="folder of run.py")
    command.add_argument("--out", type=Path, required=True, help="folder for report.md and report.json")
    chosen = command.parse_args(arguments)
    try:
        text = page(chosen.run)
        figures = json.loads((chosen.run / "eval" / "report.json").read_text())
    except OSError as error:
        command.error(f"--run {chosen.run} is no finished run: {error}")
    chosen.out.mkdir(parents=True, exist_ok=True)
    (chosen.out / "report.md").write_text(text, encoding="utf-8")
    del figures["about"]  # folders of this machine
    plain = json.dumps(figures, indent=2).replace(str(chosen.run / "prm"), "prm")
    (chosen.out / "report.json").write_text(plain + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
