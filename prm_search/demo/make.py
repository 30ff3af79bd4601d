"""Make the demo's pair from nothing: ``prm-search demo --train --seed 0 --out DIR``, minutes on one core.

1. The policy (a Llama of 0.24M parameters) learns flawed demonstrations of `chains` until its loss on fresh ones of
   the test length passes a gate: see `learn`. An unconverged policy makes a PRM that does not help.
2. `sample_rollouts`: the policy answers 1600 problems of 2 to 4 steps four times each; a response is labelled by its
   final answer alone.
3. `train`: the PRM starts as a copy of the policy, which is its reference, and learns CE on
   sigmoid(beta * sum of log-ratios). Rate and epochs are those of benchmarks/method, chosen on a seed of its own.

The same seed gives the same weights on one machine with one version of torch and transformers. What ships is chosen by
``python -m prm_search.demo.make --ship DIR0 DIR1 DIR2 --out prm_search/demo/pair``: the first of the seeds 0, 1, 2
whose policy passes the gate, whatever the test problems say.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import transformers

from ..evaluation import summarise
from ..policies.hf import HFPolicy
from ..protocols import Sampling
from ..scorers.implicit.implicit_prm import ImplicitPRM
from ..steps import StepRule
from ..training.recipe import Recipe
from ..training.rollouts import sample_rollouts
from ..training.run import train
from . import chains, comparison, tokenizer
from .learn import Log, PolicyRecipe, train_policy

CARD, ROLLOUTS = "pair.json", "rollouts.jsonl"
LENGTHS = ((2, 300), (3, 650), (4, 650))  # (steps, problems) of the rollouts: short, so that many are right
RESPONSES = 4  # to each problem
ARGUMENTS = {"adam_beta2": 0.98, "weight_decay": 0.01, "logging_steps": 50}  # of transformers.TrainingArguments
TESTED = 300  # problems that the runs which may ship are measured on
SEEDS = (0, 1, 2)  # of the runs which may ship, fixed before any was made
SELECTION = (
    "The first of the seeds {seeds}, fixed in advance, whose policy passes the loss gate. Test accuracy played no part "
    "in the choice. The PRM's learning rate and epochs were chosen on another seed (benchmarks/method)."
)


def prm_recipe(seed: int) -> Recipe:
    """Return how the PRM is trained: as the report's CE."""
    return Recipe(
        objective="ce", learning_rate=1e-3, epochs=3, micro_batch=64, holdout=0.0, seed=seed, save_steps=100_000
    )


def make(seed: int, out: Path, *, log: Log = print) -> dict[str, Any]:
    """Make a pair in a folder; goes on after the last stage that is finished there.

    Args:
        seed: of everything.
        out: gets ``policy/``, ``prm/``, ``rollouts.jsonl`` and at last the card ``pair.json``, which makes it a pair.
        log: is called with a line now and then.

    Returns:
        The card.

    Raises:
        ValueError: the folder holds a pair, or a stage of another seed or recipe.
        OSError: it cannot be written.
        ImportError: accelerate is missing.
    """
    if (out / CARD).exists():
        raise ValueError(f"{out} holds a pair already: name another folder")
    began = time.process_time()

    def say(line: str) -> None:
        log(f"[{time.process_time() - began:6.1f} s] {line}")

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the models are tiny: more threads only wait for each other, and change the rounding
    try:
        note = _policy(seed, out, say)
        _rollouts(seed, out, say)
        prm = _prm(seed, out, say)
    finally:
        torch.set_num_threads(threads)
    card: dict[str, Any] = {
        "format": 1,
        "model": "prm",
        "reference": "./policy",
        "beta": prm["beta"],
        "delimiter": chains.DELIMITER,
        "objective": prm["objective"],
        "task": chains.CONSTRUCTED,
        "seed": seed,
        "policy_recipe": note["settings"]["recipe"],
        "policy": note["policy"],
        "prm_recipe": prm["recipe"],
        "prm_arguments": ARGUMENTS,
        "rollouts": {"lengths": LENGTHS, "per_problem": RESPONSES, **prm["data"]},
        "versions": {
            "python": platform.python_version(), "torch": torch.__version__, "transformers": transformers.__version__
        },
    }  # fmt: skip
    _write(out / CARD, card)
    (out / "policy.json").unlink()
    return card


def _policy(seed: int, out: Path, say: Log) -> dict[str, Any]:
    """Train the policy, unless it is there. Returns its stage's note: settings, and what happened."""
    recipe, path = PolicyRecipe(), out / "policy.json"
    settings = {"seed": seed, "recipe": asdict(recipe)}
    if path.is_file():
        note: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if note["settings"] != settings:
            raise ValueError(f"{path}: of another seed or recipe: name another folder, or the same seed")
        say(f"seed {seed}: the policy is trained")
        return note
    say(f"seed {seed}: policy")
    policy, learnt = train_policy(seed, recipe, say)
    policy.save_pretrained(out / "policy")
    tokenizer.build().save_pretrained(out / "policy")
    note = {"settings": settings, "policy": learnt}
    _write(path, note)  # last: a stage that has its note is complete
    return note


def _rollouts(seed: int, out: Path, say: Log) -> None:
    """Sample and label the rollouts, unless they are there."""
    path, part = out / ROLLOUTS, out / f"{ROLLOUTS}.part"
    if path.is_file():
        return
    problems = [
        problem for length, n in LENGTHS for problem in chains.problems(n, split="prm", seed=seed, length=length)
    ]
    policy = HFPolicy.from_pretrained(out / "policy")
    sampling = Sampling(StepRule(chains.DELIMITER), max_new_tokens=48, seed=seed)
    right = 0
    with part.open("w", encoding="utf-8", newline="\n") as file:
        for rollout in sample_rollouts(
            comparison.as_problems(problems), policy=policy, n=RESPONSES, sampling=sampling, label=comparison.judge
        ):
            index = rollout.problem * RESPONSES + rollout.sample
            file.write(json.dumps({"index": index, **rollout.record()}) + "\n")
            right += rollout.label
    os.replace(part, path)
    say(f"{RESPONSES * len(problems)} rollouts, {right} with a right answer")


def _prm(seed: int, out: Path, say: Log) -> dict[str, Any]:
    """Train the PRM, unless it is there. Returns the card that `train` made."""
    path = out / "prm" / CARD
    if not path.is_file():
        policy = str(out / "policy")
        train(policy, out / ROLLOUTS, out / "prm", prm_recipe(seed), resume=True, arguments=ARGUMENTS, log=say)
    card: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return card


def _write(path: Path, record: Mapping[str, Any]) -> None:
    part = path.with_suffix(".part")
    part.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    os.replace(part, path)  # whole or not at all


def measure(folder: Path, count: int = TESTED) -> dict[str, Any]:
    """Return the figures of `prm-search demo --problems COUNT` for the pair in a folder, as a card has them."""
    policy = HFPolicy.from_pretrained(folder / "policy")
    pair = ImplicitPRM.from_pretrained(folder)
    problems = chains.problems(count, split="test", length=comparison.LENGTH)
    return comparison.card(summarise(comparison.compare(problems, policy, pair, seed=0)))


def ship(runs: Sequence[Path], out: Path, count: int = TESTED) -> dict[str, Any]:
    """Copy the first run whose policy passed the gate, and put the figures of all runs into its card.

    Raises:
        ValueError: no run passed the gate.
    """
    cards = [json.loads((run / CARD).read_text(encoding="utf-8")) for run in runs]
    chosen = next((place for place, card in enumerate(cards) if card["policy"]["gate_passed"]), None)
    if chosen is None:
        raise ValueError(f"runs must hold one whose policy passed the gate, got none among {', '.join(map(str, runs))}")
    for stage in ("policy", "prm"):
        kept = shutil.ignore_patterns(CARD, "log.jsonl")
        shutil.copytree(runs[chosen] / stage, out / stage, dirs_exist_ok=True, ignore=kept)
        (out / stage / "model.safetensors").chmod(0o644)  # safetensors writes 0600; packages are for all to read
        for file in ("tokenizer.json", "tokenizer_config.json"):  # the policy's, without traces of where it lay
            shutil.copy(runs[chosen] / "policy" / file, out / stage / file)
    card: dict[str, Any] = cards[chosen] | {
        "selection": SELECTION.format(seeds=list(SEEDS)),
        "all_seeds": [
            {"seed": seed_card["seed"], "policy": seed_card["policy"], "metrics": measure(run, count)}
            for seed_card, run in zip(cards, runs, strict=True)
        ],
    }
    _write(out / CARD, card)
    return card


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m prm_search.demo.make", description="Choose the pair that ships.")
    parser.add_argument("--ship", type=Path, nargs="+", required=True, metavar="RUN", help="folders of demo --train")
    parser.add_argument("--out", type=Path, required=True, help="folder for policy/, prm/ and pair.json")
    args = parser.parse_args()
    print(json.dumps(ship(args.ship, args.out), indent=2))


if __name__ == "__main__":
    main()
