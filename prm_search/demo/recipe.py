"""The recipe of the demo pair: ``python -m prm_search.demo.recipe --seed 0 --out DIR``.

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

The pair that ships was chosen from seeds fixed in advance with ``--ship DIR0 DIR1 DIR2 --out prm_search/demo/pair``:
the first whose policy passed the gate, whatever the test problems say.
"""

from __future__ import annotations

import argparse
import json
import platform
import shutil
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import transformers

from prm_search.demo import tokenizer
from prm_search.demo.chains import CONSTRUCTED, DELIMITER, problems
from prm_search.demo.learn import PolicyRecipe, PRMRecipe, collect_rollouts, train_policy, train_prm
from prm_search.demo.measure import evaluate

CARD = "pair.json"
CARD_VERSION = 1
HISTORY = (
    "Not the first runs of these seeds. Seed 0 was run once with 4 heads of 24 dimensions, too small for vLLM's CPU "
    "attention (best-of-16 .380, beam 4x4 by min .807). With 3 heads of 32, and a curriculum that gave a third of "
    "every batch to the longest length instead of the one learnt worst, the seeds had .410/.850, .347/.823, .097/.117: "
    "the policy of seed 2 failed the gate (1.97 times the floor, all of it at one step of length 8). The curriculum "
    "was changed for the gate's sake, tried on the gate of seeds 101 and 102, and all three seeds were run again."
)


def run(seed: int, out: Path, *, test_problems: int = 300, test_seed: int = 0) -> dict[str, Any]:
    """Trains and measures one pair and writes it to a folder.

    Args:
        seed: of everything but the test problems.
        out: gets ``policy/``, ``prm/`` (each with the tokenizer's files) and ``pair.json``.
        test_problems: how many held-out problems of length 8.
        test_seed: which ones.

    Returns:
        The card.
    """
    torch.set_num_threads(1)
    policy_recipe, prm_recipe = PolicyRecipe(), PRMRecipe()
    began = time.process_time()

    def log(line: str) -> None:
        print(f"[{time.process_time() - began:6.1f} s] {line}", flush=True)

    log(f"seed {seed}: policy")
    policy, learnt = train_policy(seed, policy_recipe, log)
    policy_seconds = time.process_time() - began
    rollouts = collect_rollouts(policy, seed, prm_recipe)
    positives = sum(r.label for r in rollouts)
    log(f"{len(rollouts)} rollouts, {positives} with a right answer")
    prm = train_prm(policy, rollouts, seed, prm_recipe, log)
    prm_seconds = time.process_time() - began - policy_seconds
    log("measuring")
    asked = problems(test_problems, split="test", seed=test_seed, length=policy_recipe.gate_length)
    metrics = evaluate(policy, prm, prm_recipe.beta, asked, seed=seed)

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
        "policy": learnt,
        "rollouts": {"count": len(rollouts), "right_answer": positives},
        "metrics": metrics,
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "cpu_seconds": {
            "policy": round(policy_seconds, 1),
            "prm": round(prm_seconds, 1),
            "test": metrics["cpu_seconds"],
        },
    }
    words = tokenizer.build()
    for name, model in (("policy", policy), ("prm", prm)):
        model.save_pretrained(out / name)
        words.save_pretrained(out / name)
        (out / name / "model.safetensors").chmod(0o644)  # safetensors writes 0600; packages are for all to read
    (out / CARD).write_text(json.dumps(card, indent=2) + "\n")
    log("done")
    return card


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
    shutil.copytree(runs[chosen], out, dirs_exist_ok=True)
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
    parser = argparse.ArgumentParser(prog="python -m prm_search.demo.recipe", description="Makes the demo pair.")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True, help="folder for policy/, prm/ and pair.json")
    parser.add_argument("--test-problems", type=int, default=300)
    parser.add_argument("--ship", type=Path, nargs="+", metavar="RUN", help="train nothing: choose among these runs")
    args = parser.parse_args()
    print(table(ship(args.ship, args.out) if args.ship else run(args.seed, args.out, test_problems=args.test_problems)))


if __name__ == "__main__":
    main()
