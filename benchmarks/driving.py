"""The driver's own time: every strategy over models that answer at once. No torch.

python benchmarks/driving.py --out benchmarks/results/driving

A "draw" is a child that the policy was asked for. Counted is what happens in the driver and in the strategy: taking a
search on, asking for its requests, handing their children in. Making the children, which is the policy's and the
scorer's work, is not.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prm_search.driver.driver import Driver
from prm_search.driver.records import nodes_of
from prm_search.protocols import Request, Sampling, Segment, commit
from prm_search.steps import StepRule
from prm_search.strategies import (
    DVTS,
    MCTS,
    AdaptiveBranch,
    Beam,
    BestOfN,
    Lookahead,
    ParticleFilter,
    Rebase,
    SelfConsistency,
    Strategy,
)
from prm_search.tree import Node, Prompt, SearchTree

DEPTH, STEP, KINDS = 8, 4, 5  # steps of an answer, tokens of a step, distinct steps that may follow a node
SAMPLING = Sampling(StepRule(), max_new_tokens=STEP * DEPTH)

CROWD = 64  # draws a prompt, about, where prompts are many

#: name -> a strategy of a given size: about that many draws a prompt.
SIZED: dict[str, Callable[[int], Strategy]] = {
    "best_of_n": BestOfN,
    "beam 16 x 4": lambda draws: Beam(16, 4),
    "beam": lambda draws: Beam(max(1, draws // (4 * DEPTH)), 4),
    "lookahead": lambda draws: Lookahead(max(1, draws // (8 * DEPTH)), 4),
    "lookahead greedy": lambda draws: Lookahead(max(1, draws // (8 * DEPTH)), 4, greedy=True),
    "dvts": lambda draws: DVTS(max(1, draws // (4 * DEPTH)), 1, 4),
    "particle_filter": lambda draws: ParticleFilter(max(1, draws // DEPTH), temperature=0.3, ess=1.0),
    "particle gibbs": lambda draws: ParticleFilter(max(2, draws // (4 * DEPTH)), temperature=0.3, sweeps=4),
    "mcts puct": lambda draws: MCTS(draws // 4),
    "mcts uct": lambda draws: MCTS(draws // 4, rule="uct", leaves=1),
    "mcts rest": lambda draws: MCTS(draws // 4, rule="rest", value=_score, end_gate=1.0),
    "mcts rollouts": lambda draws: MCTS(draws // 8, rollout_steps=2),
    "rebase": lambda draws: Rebase(max(1, draws // DEPTH)),
    "adaptive_branch step": lambda draws: AdaptiveBranch(draws, until="step"),
    "adaptive_branch end": lambda draws: AdaptiveBranch(draws),
    "adaptive_branch beta": lambda draws: AdaptiveBranch(draws, prior="beta"),
    "adaptive_branch published": lambda draws: AdaptiveBranch(draws, rule="published"),
    "self_consistency": SelfConsistency,
}


def _fraction(*words: object) -> float:
    """A number in [0, 1) that is a function of the words alone."""
    return int.from_bytes(hashlib.blake2b(repr(words).encode(), digest_size=8).digest(), "little") / 2**64


def _score(node: Node) -> float:
    """A value in [0, 1) of a prefix: a pseudo-random walk, so that a good prefix has good continuations."""
    parent = node.parent
    if parent is None or parent.parent is None:
        return _fraction(node.token_ids)
    return 0.8 * (parent.value or 0.0) + 0.2 * _fraction(node.token_ids, parent.token_ids)


class Models:
    """A policy and a scorer that answer a request at once: steps of STEP tokens, of KINDS kinds, DEPTH in an answer."""

    def __init__(self, distinct: bool = False) -> None:
        self.distinct, self.draws = distinct, 0

    def children(self, request: Request) -> list[Node]:
        """The last node of each child's chain, in the tree."""
        self.draws += len(request.lineages)
        return [nodes[-1] for nodes in commit(request, [self._chain(request, x) for x in request.lineages], "fake")]

    def _chain(self, request: Request, lineage: int) -> list[Segment]:
        depth, end = request.node.depth, DEPTH if request.until == "end" else request.node.depth + 1
        segments = []
        while depth < end:
            depth += 1
            mixed = (lineage ^ (depth * 0x9E3779B97F4A7C15)) & (2**64 - 1)
            kind = mixed if self.distinct else mixed % KINDS
            finish = "stop" if depth == DEPTH else "step"
            segments.append(Segment([depth, kind % 2**31, 1, 2], [-1.0] * STEP, "", finish))
        return segments


@dataclass
class Measured:
    """A run of a strategy over some prompts.

    Attributes:
        draws: children asked for.
        nodes: nodes of all trees.
        seconds: of CPU, in the driver and the strategy.
    """

    draws: int
    nodes: int
    seconds: float

    @property
    def microseconds(self) -> float:
        """Of a draw."""
        return 1e6 * self.seconds / self.draws


def drive(
    strategy: Strategy,
    prompts: int,
    *,
    distinct: bool = False,
    around: Callable[[Callable[[], Any]], Any] | None = None,
) -> Measured:
    """Search for all prompts at once, and say what the driver took.

    Args:
        strategy: for each of them.
        prompts: how many.
        distinct: no two children are equal.
        around: calls each piece of the driver's work; a count of what it does, for instance.
    """
    driver, models = Driver(), Models(distinct)
    seconds = 0.0

    def timed(work: Callable[[], Any]) -> Any:
        nonlocal seconds
        began = time.thread_time()
        result = work() if around is None else around(work)
        seconds += time.thread_time() - began
        return result

    trees = [SearchTree(Prompt(token_ids=(5, place))) for place in range(prompts)]
    for tree in trees:
        timed(lambda tree=tree: driver.add(tree, strategy, sampling=SAMPLING, value=_score))
    waiting: Sequence[Request] = timed(driver.pending)
    while waiting:
        answers = [(request, models.children(request)) for request in waiting]
        for request, children in answers:
            fresh = nodes_of(request, children)
            for node in fresh:  # values are the scorer's work
                node.value = _score(node)
            timed(lambda r=request, c=children, f=fresh: driver.tell(r, c, f))
        waiting = timed(driver.pending)
    ended = timed(driver.ended)
    if len(ended) < prompts or not all(outcome.candidates for outcome in ended):
        raise RuntimeError(f"{strategy!r} left searches without an answer")
    return Measured(models.draws, sum(len(tree.nodes) for tree in trees), seconds)


def lines(sizes: Sequence[int], prompts: Sequence[int], repeats: int) -> list[dict[str, Any]]:
    """Microseconds of a draw: each strategy at growing sizes for one prompt, and for few and for many prompts."""
    table = []
    for name, make in SIZED.items():
        if name == "beam 16 x 4":
            crowds = [(64 * DEPTH, count) for count in prompts]
        else:
            crowds = [*((size, 1) for size in sizes), *((CROWD, count) for count in (min(prompts), max(prompts)))]
        for size, count in crowds:
            times = repeats if count == 1 else 1
            runs = [drive(make(size), count, distinct=name.startswith("adaptive")) for _ in range(times)]
            line = {
                "strategy": name, "config": repr(make(size)), "prompts": count, "draws": runs[0].draws,
                "nodes": runs[0].nodes, "us_per_draw": round(statistics.median(r.microseconds for r in runs), 2),
            }  # fmt: skip
            print(f"{name:22} {count:5} prompts {line['draws']:7} draws {line['us_per_draw']:8.2f} us", file=sys.stderr)
            table.append(line)
    return table


def markdown(table: Sequence[dict[str, Any]]) -> str:
    """The lines as a page."""
    rows = "".join(
        f"| {each['strategy']} | {each['prompts']} | {each['draws']} | {each['nodes']} | {each['us_per_draw']:.1f} |\n"
        for each in table
    )
    head = "# The driver's own time\n\nMade by `benchmarks/driving.py`: driver and strategy alone, over models that "
    head += "answer at once; CPU time.\n\n| strategy | prompts | draws | nodes | us a draw |\n"
    return head + "| --- | ---: | ---: | ---: | ---: |\n" + rows


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, help="folder for driving.json and driving.md")
    parser.add_argument("--sizes", default="128,512,2048,4000", help="draws a prompt, about")
    parser.add_argument("--prompts", default="30,100,300,1000", help="of Beam(16, 4); others: least, most")
    parser.add_argument("--repeats", type=int, default=3)
    given = parser.parse_args()
    sizes, prompts = ([int(word) for word in text.split(",")] for text in (given.sizes, given.prompts))
    table = lines(sizes, prompts, given.repeats)
    if given.out is None:
        print(markdown(table))
        return
    given.out.mkdir(parents=True, exist_ok=True)
    (given.out / "driving.json").write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")
    (given.out / "driving.md").write_text(markdown(table), encoding="utf-8")


if __name__ == "__main__":
    main()
