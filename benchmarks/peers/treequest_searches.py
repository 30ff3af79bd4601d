"""treequest's own searches beside ours: the shipped policy and pair, the same problems, tokens and seed, in one run.

    python benchmarks/peers/treequest_searches.py --out benchmarks/results/peers

treequest is installed beside the package (into --target) and its algorithms run unmodified, by ask and tell. A strategy
here does what they ask: it draws one child of the node that a trial names, and tells its score. So the same driver
counts the tokens of both, and cuts both at the same budget. treequest wants scores in [0, 1]: exp(min(v, 0)) of the
value v that our searches rank by. It knows no finished node; one that it expands stays as it is, for nothing. With
"rollouts" a step's score is that of an answer which goes on from it; its tokens count. The answer is the best complete
one by value, for all.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import torch  # noqa: E402 - after the number of threads is set
from common import Machine  # noqa: E402 - a script beside it

import prm_search as ps  # noqa: E402
from prm_search.demo import chains, pair_dir  # noqa: E402
from prm_search.evaluation.statistics import paired_bootstrap, wilson  # noqa: E402
from prm_search.strategies import Expand, Run, Strategy  # noqa: E402
from prm_search.tree import Node  # noqa: E402

VERSION = "0.3.3"
LENGTH, VALUE = 8, "min"
TRIALS = 400  # of a problem, at most: trials at finished nodes cost no token


def install(target: Path) -> None:
    """Put treequest into a folder of its own, and on the path."""
    if not (target / "treequest").is_dir():
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--target", str(target)]
        subprocess.run([*command, f"treequest=={VERSION}"], check=True)
    sys.path.append(str(target))


@dataclass(frozen=True)
class Theirs:
    """A treequest algorithm as a strategy.

    Attributes:
        make: makes the algorithm.
        rollouts: whether a step's score is that of an answer that goes on from it.
    """

    make: Callable[[], Any]
    rollouts: bool = False

    def run(self, root: Node) -> Run:
        """Ask the algorithm for a node, draw a child of it, and tell its score, until the budget ends."""
        algorithm = self.make()
        state, ends = algorithm.init_tree(), dict[Node, None]()
        for _ in range(TRIALS):
            state, (trial,) = algorithm.ask_batch(state, 1, ["step"])
            node = state.tree.get_node(trial.node_to_expand).state or root
            told = scored = node
            if not node.finished:
                drawn = yield Expand([node], 1, until="end" if self.rollouts else "step", merge=False, alive=[root])
                if not drawn or drawn[0] is node:
                    break  # the budget has ended
                scored = drawn[0]
                told = scored.path()[node.depth]  # the first new step
                if scored.finished:
                    ends[scored] = None
            state = algorithm.tell(state, trial.trial_id, (told, math.exp(min(scored.value or 0.0, 0.0))))
        return list(ends)


def searches(budget: int) -> dict[str, Strategy]:
    """Name -> strategy, theirs and then ours."""
    from treequest import ABMCTSA, StandardMCTS, TreeOfThoughtsBFSAlgo
    from treequest.algos.best_first_search import BestFirstSearchAlgo

    samples = budget // (4 * LENGTH)
    return {
        "treequest ToT-BFS(3, 5)": Theirs(TreeOfThoughtsBFSAlgo),
        "treequest best-first(2)": Theirs(BestFirstSearchAlgo),
        "treequest MCTS, c 1.41": Theirs(StandardMCTS),
        "treequest MCTS, c .3": Theirs(lambda: StandardMCTS(exploration_weight=0.3)),
        "treequest MCTS, c .3, 4 children": Theirs(lambda: StandardMCTS(exploration_weight=0.3, samples_per_action=4)),
        "treequest MCTS, c .3, rollouts": Theirs(lambda: StandardMCTS(exploration_weight=0.3), rollouts=True),
        "treequest AB-MCTS-A": Theirs(ABMCTSA),
        "treequest AB-MCTS-A, beta": Theirs(lambda: ABMCTSA(dist_type="beta")),
        "treequest AB-MCTS-A, rollouts": Theirs(ABMCTSA, rollouts=True),
        "best of n": ps.BestOfN(samples),
        "beam": ps.Beam(4, max(1, samples // 4)),
        "rebase": ps.Rebase(samples),
        "particle filter, auto": ps.ParticleFilter(samples, temperature="auto"),
        "mcts, puct": ps.MCTS(2 * samples),
        "adaptive branch, steps": ps.AdaptiveBranch(2 * LENGTH * samples, until="step"),
        "adaptive branch, answers": ps.AdaptiveBranch(4 * samples),
    }


def line_of(name: str, strategy: Strategy, asked: list[chains.Problem], budget: int, seed: int) -> dict[str, Any]:
    """One search of all problems."""
    folder = pair_dir()
    pair, policy = ps.ImplicitPRM.from_pretrained(folder), ps.HFPolicy.from_pretrained(folder / "policy")
    results = ps.search(
        [problem.prompt for problem in asked], policy=policy, scorer=pair, strategy=strategy, value=VALUE,
        steps=ps.StepRule(chains.DELIMITER, max_tokens=8), max_new_tokens=48, temperature=1.0, seed=seed,
        budget=ps.Budget(tokens=budget),
    )  # fmt: skip
    right = [
        result.node is not None and result.node.finish == "stop" and chains.answer(result.text) == problem.answer
        for problem, result in zip(asked, results, strict=True)
    ]
    low, high = wilson(sum(right), len(right))
    return {
        "name": name, "accuracy": sum(right) / len(right), "low": low, "high": high, "right": right,
        "policy_tokens": sum(sum(result.usage.sampled_tokens.values()) for result in results) / len(asked),
        "prm_tokens": sum(result.usage.of_role("prm") for result in results) / len(asked),
        "answers": sum(len(result.candidates) for result in results) / len(asked),
    }  # fmt: skip


def page(record: dict[str, Any]) -> str:
    """The record as Markdown."""
    lines = sorted(record["lines"], key=lambda line: -line["accuracy"])
    theirs = [line for line in lines if line["name"].startswith("treequest")]
    rows = []
    for line in lines:
        test = paired_bootstrap([float(x) for x in line["right"]], [float(x) for x in theirs[0]["right"]])
        rows.append(
            f"| {line['name']} | {line['accuracy']:.3f} [{line['low']:.3f}, {line['high']:.3f}] "
            f"| {test.difference:+.3f} [{test.low:+.3f}, {test.high:+.3f}] | {line['policy_tokens']:.0f} "
            f"| {line['prm_tokens']:.0f} | {line['answers']:.1f} |"
        )
    head = f"| | right | against {theirs[0]['name']} | policy tokens | PRM tokens | answers |"
    return (
        f"# treequest {record['treequest']} beside prm_search\n\n`python benchmarks/peers/treequest_searches.py`: "
        f'{record["problems"]} test problems of {LENGTH} steps, the shipped policy and pair, values by "{VALUE}", at '
        f"most {record['budget']} policy tokens a problem, one run. Steps are drawn one at a time for treequest, and "
        "each of its scores is exp(min(value, 0)). Differences are of a paired bootstrap over the problems, Wilson "
        "intervals, not corrected for how many there are. PRM tokens are this package's for all: each token once.\n\n"
        + "\n".join([head, "|---|---:|---:|---:|---:|---:|", *rows])
        + "\n"
    )


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--problems", type=int, default=100)
    parser.add_argument("--budget", type=int, default=512, help="policy tokens of a problem")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--split", default="test", help="of the problems: test, or gate for development")
    parser.add_argument("--target", type=Path, default=Path(".peers"), help="where treequest is installed")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    install(arguments.target.resolve())
    torch.set_num_threads(1)
    asked = chains.problems(arguments.problems, split=arguments.split, seed=arguments.seed, length=LENGTH)
    lines = []
    for name, strategy in searches(arguments.budget).items():
        lines.append(line_of(name, strategy, asked, arguments.budget, arguments.seed))
        print(json.dumps({key: value for key, value in lines[-1].items() if key != "right"}), flush=True)
    record = {
        "treequest": VERSION, "problems": len(asked), "budget": arguments.budget, "seed": arguments.seed,
        "versions": Machine.here().versions, "lines": lines,
    }  # fmt: skip
    if arguments.out is not None:
        arguments.out.mkdir(parents=True, exist_ok=True)
        (arguments.out / "treequest.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        (arguments.out / "treequest.md").write_text(page(record), encoding="utf-8")


if __name__ == "__main__":
    main()
