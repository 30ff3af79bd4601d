"""evaluate: draw, score, choose and search, one record as each piece of it is finished."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
            "rescored_tokens": usage.rescored_tokens,
            "rescored_cached_tokens": usage.rescored_cached_tokens,
            "seconds": seconds,
        }


def _together(place: tuple[int, Unit]) -> tuple[Any, ...]:
    """What the units of one batch have in common."""
    return place[1].kind, place[1].seed, place[1].cell


def _searches(policy: Policy, scorer: Scorer | None, jobs: Sequence[Job], batch: int) -> Iterator[tuple[Job, Result]]:
    """Run searches, at most `batch` at a time; each with its result, as it ends."""
    if jobs:
        with SearchLoop(policy, scorer) as loop:
            yield from loop.run(jobs, batch)


def _score(scorer: Scorer, policy: Policy, tree: SearchTree, ends: Sequence[Node]) -> Cost:
    """Score the paths that end there, and say what it took."""
    ScorerDefaults.of(scorer).bind(policy)
    before = tree.meter.counts.copy()
    began = time.perf_counter()
    scorer.score_nodes(list(dict.fromkeys(ends)))
    seconds = time.perf_counter() - began
    scorer.release(tree)
    spent = Meter()
    spent.counts = tree.meter.counts - before
    usage = Usage.read(spent, scorer.models)
    return Cost(usage.of_role("prm"), usage.of_role("reference"), seconds)
