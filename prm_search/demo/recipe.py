"""The recipe of the demo pair: ``prm-search demo --train --seed 0 --out DIR``.

From nothing to a policy, a PRM and a table in a few minutes on one core:

1. The policy (a Llama of 0.24M parameters) learns flawed demonstrations of `chains`, over lengths that grow as it
   learns them, then anneals. A third of every batch goes to the length that it knows worst: given only the longest
   one, it can stay wrong at one step of one middle length for good. It passes the gate when its loss on fresh
   demonstrations *of the test length* is below 1.15 times their entropy; otherwise it trains on, at most three rounds.
   An unconverged policy makes a PRM that does not help.
2. The policy answers 1600 problems of 2 to 4 steps four times each; a response is labelled by its final answer alone.
3. The PRM starts as a copy of the policy and learns CE on sigmoid(beta * sum of log-ratios); the policy is the
   reference.
4. Both are measured on held-out problems of 8 steps; the figures go into the card ``pair.json``.

Everything follows from the seed on a given machine and torch version; the process runs on one thread. On a shared
machine set ``OMP_WAIT_POLICY=PASSIVE`` as well: spinning OpenMP threads slow everything.

The pair that ships was chosen from seeds fixed in advance by
``python -m prm_search.demo.recipe --ship DIR0 DIR1 DIR2 --out prm_search/demo/pair``: the first whose policy passed the
gate, whatever the test problems say.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import LlamaForCausalLM

from . import tokenizer
from .chains import CONSTRUCTED, DELIMITER, problems
from .learn import Log, PolicyRecipe, PRMRecipe, collect_rollouts, train_policy, train_prm
from .measure import evaluate

CARD = "pair.json"
STAGES = ("policy", "prm")
CARD_VERSION = 1
HISTORY = (
    "Not the first runs of these seeds. Seed 0 was run once with 4 heads of 24 dimensions, too small for vLLM's CPU "
    "attention (best-of-16 .380, beam 4x4 by min .807). With 3 heads of 32, and a curriculum that gave a third of "
    "every batch to the longest length instead of the one learnt worst, the seeds had .410/.850, .347/.823, .097/.117: "
    "the policy of seed 2 failed the gate (1.97 times the floor, all of it at one step of length 8). The curriculum "
    "was changed for the gate's sake, tried on the gate of seeds 101 and 102, and all three seeds were run again. "
    "What ships is of the recipe at commit 9eacc04."
)


def run(
    seed: int,
    out: Path,
    *,
    test_problems: int = 300,
    test_seed: int = 0,
    policy_recipe: PolicyRecipe | None = None,
    prm_recipe: PRMRecipe | None = None,
    log: Log = print,
) -> dict[str, Any]:
    """Trains and measures one pair and writes it to a folder; goes on after the last stage that is finished there.

    Args:
        seed: of everything but the test problems.
        out: gets ``policy/``, ``prm/`` (each with the tokenizer's files), ``rollouts.jsonl`` (``prm-search train``
            reads it as well), and at last ``pair.json``. Until then a note of each finished stage lies beside them.
        test_problems: how many held-out problems of length 8.
        test_seed: which ones.
        policy_recipe, prm_recipe: None for the recipe of the pair that ships.
        log: is called with a line now and then.

    Returns:
        The card.

    Raises:
        ValueError: the folder holds a pair, or a stage of another seed or recipe.
        OSError: it cannot be written.
    """
    if (out / CARD).exists():
        raise ValueError(f"{out} holds a pair already: name another folder")
    began = time.process_time()

    def say(line: str) -> None:
        log(f"[{time.process_time() - began:6.1f} s] {line}")

    policy_recipe, prm_recipe = policy_recipe or PolicyRecipe(), prm_recipe or PRMRecipe()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the models are tiny: more threads only wait for each other, and change the rounding
    try:
        policy, learnt = _policy(seed, out, policy_recipe, say)
        prm, drawn = _prm(policy, seed, out, prm_recipe, say)
        say(f"measuring on {test_problems} problems")
        asked = problems(test_problems, split="test", seed=test_seed, length=policy_recipe.gate_length)
        metrics = evaluate(policy, prm, prm_recipe.beta, asked, seed=seed)
    finally:
        torch.set_num_threads(threads)

    card: dict[str, Any] = {
        "format": CARD_VERSION,
        "model": "prm",
        "reference": "policy",
        "beta": prm_recipe.beta,
        "objective": "ce",
        "task": CONSTRUCTED,
        "delimiter": DELIMITER,
        "seed": seed,
        "test": {"split": "test", "seed": test_seed, "length": policy_recipe.gate_length, "problems": test_problems},
        "policy_recipe": asdict(policy_recipe),
        "prm_recipe": asdict(prm_recipe),
        "policy": learnt["policy"],
        "rollouts": drawn["rollouts"],
        "metrics": metrics,
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "cpu_seconds": {
            "policy": learnt["cpu_seconds"],
            "prm": drawn["cpu_seconds"],
            "test": metrics["cpu_seconds"],
        },
    }
    _write(out / CARD, card)
    for stage in STAGES:
        (out / f"{stage}.json").unlink()
    return card


def _policy(seed: int, out: Path, recipe: PolicyRecipe, say: Log) -> tuple[Any, dict[str, Any]]:
    """The policy, trained or read, and its stage's note."""
    settings = {"seed": seed, "recipe": asdict(recipe)}
    note = _finished(out, "policy", settings)
    if note is not None:
        say(f"seed {seed}: the policy is trained")
        return LlamaForCausalLM.from_pretrained(out / "policy").eval(), note
    say(f"seed {seed}: policy")
    began = time.process_time()
    policy, learnt = train_policy(seed, recipe, say)
    return policy, _finish(out, "policy", policy, settings, began, policy=learnt)


def _prm(policy: Any, seed: int, out: Path, recipe: PRMRecipe, say: Log) -> tuple[Any, dict[str, Any]]:
    """The same of the PRM."""
    settings = {"seed": seed, "recipe": asdict(recipe)}
    note = _finished(out, "prm", settings)
    if note is not None:
        say("the PRM is trained")
        return LlamaForCausalLM.from_pretrained(out / "prm").eval(), note
    began = time.process_time()
    rollouts = collect_rollouts(policy, seed, recipe)
    with (out / "rollouts.jsonl").open("w", encoding="utf-8", newline="\n") as file:
        for place, rollout in enumerate(rollouts):
            file.write(json.dumps({"index": place, **rollout.record()}) + "\n")
    counts = {"count": len(rollouts), "right_answer": sum(r.label for r in rollouts)}
    say(f"{counts['count']} rollouts, {counts['right_answer']} with a right answer")
    prm = train_prm(policy, rollouts, seed, recipe, say)
    return prm, _finish(out, "prm", prm, settings, began, rollouts=counts)


def _finished(out: Path, stage: str, settings: Mapping[str, Any]) -> dict[str, Any] | None:
    """The note of a stage that is finished, None if it is not. Raises ValueError where it had other settings."""
    path = out / f"{stage}.json"
    if not path.is_file():
        return None
    note: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    if note["settings"] != json.loads(json.dumps(settings)):  # tuples have become lists
        raise ValueError(f"{path}: of another seed or recipe: name another folder, or the same seed")
    return note


def _finish(
    out: Path, stage: str, model: Any, settings: Mapping[str, Any], began: float, **more: Any
) -> dict[str, Any]:
    """Writes a stage's model, then its note: a stage that has one is complete."""
    model.save_pretrained(out / stage)
    tokenizer.build().save_pretrained(out / stage)
    (out / stage / "model.safetensors").chmod(0o644)  # safetensors writes 0600; packages are for all to read
    note = {"settings": settings, **more, "cpu_seconds": round(time.process_time() - began, 1)}
    _write(out / f"{stage}.json", note)
    return note


def _write(path: Path, record: Mapping[str, Any]) -> None:
    part = path.with_suffix(".part")
    part.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    os.replace(part, path)  # whole or not at all


def table(card: dict[str, Any]) -> str:
    """The card's figures as text."""
    metrics = card["metrics"]
    lines = [f"{'strategy':<22}{'right':>7}  {'95 % interval':<16}{'all steps':>9}{'policy tokens':>15}"]
    for name, row in metrics["strategies"].items():
        interval = f"[{row['low']:.3f}, {row['high']:.3f}]"
        figures = f"{row['accuracy']:>7.3f}  {interval:<16}{row['all_steps_right']:>9.3f}{row['policy_tokens']:>15.1f}"
        lines.append(f"{name:<22}{figures}")
    rest = {k: v for k, v in metrics.items() if k not in ("strategies", "tests", "steps")}
    for part in (rest, metrics["tests"], metrics["steps"], card["policy"]):
        lines.append("  ".join(f"{k}: {v:.3g}" if isinstance(v, float) else f"{k}: {v}" for k, v in part.items()))
    return "\n".join(lines)


def ship(runs: list[Path], out: Path) -> dict[str, Any]:
    """Copies the first run whose policy passed the gate, and puts the figures of all runs into its card.

    Raises:
        ValueError: no run passed the gate.
    """
    cards = [json.loads((run / CARD).read_text()) for run in runs]
    chosen = next((k for k, card in enumerate(cards) if card["policy"]["gate_passed"]), None)
    if chosen is None:
        raise ValueError(f"runs must hold one whose policy passed the gate, got none among {', '.join(map(str, runs))}")
    shutil.copytree(runs[chosen], out, dirs_exist_ok=True, ignore=shutil.ignore_patterns("rollouts.jsonl"))
    seeds = [card["seed"] for card in cards]
    card = cards[chosen] | {
        "selection": f"The first of the seeds {seeds}, fixed in advance, whose policy passes the loss gate. "
        "Test accuracy played no part in the choice.",
        "history": HISTORY,
        "all_seeds": [{"seed": c["seed"], "policy": c["policy"], "metrics": c["metrics"]} for c in cards],
    }
    (out / CARD).write_text(json.dumps(card, indent=2) + "\n")
    return card


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m prm_search.demo.recipe", description="Chooses the pair that ships."
    )
    parser.add_argument("--ship", type=Path, nargs="+", required=True, metavar="RUN", help="folders of demo --train")
    parser.add_argument("--out", type=Path, required=True, help="folder for policy/, prm/ and pair.json")
    args = parser.parse_args()
    print(table(ship(args.ship, args.out)))


if __name__ == "__main__":
    main()
