"""What tests of searches share: generators of strategies, a driver driven by hand, what to compare of trees."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from fakes import RULE, FakeBlockingPolicy, FakePolicy, FakeScorer, ScriptedPolicy, ToyLM, step_scores
from hypothesis import strategies as st

from prm_search.driver.driver import Driver
from prm_search.driver.records import Outcome, chain
from prm_search.driver.result import Result
from prm_search.protocols import Request
from prm_search.search import search
from prm_search.strategies import (
    DVTS,
    MCTS,
    AdaptiveBranch,
    Beam,
    BestOfN,
    ByDifficulty,
    DeepConf,
    Lookahead,
    ParticleFilter,
    Rebase,
    SelfConsistency,
    Steer,
    Strategy,
)
from prm_search.tree import Node, Prompt, SearchTree

small = st.integers(1, 3)
cap = st.none() | small
merging = st.booleans()
BEAMS = st.builds(Beam, width=small, expansions=small, per_parent=cap, merge=merging)
BY_DIFFICULTY = st.builds(
    lambda probe, threshold, hard, easy: ByDifficulty(probe, (threshold,), (hard, easy)),
    small,
    st.sampled_from([-1.0, 0.0, 1.0]),
    BEAMS,
    st.one_of(st.builds(BestOfN, n=st.integers(1, 6)), st.builds(DVTS, subtrees=small, width=small, expansions=small)),
)
DVTSS = st.builds(DVTS, subtrees=small, width=small, expansions=small, per_parent=cap, merge=merging)
ALL = st.one_of(
    st.builds(BestOfN, n=st.integers(1, 6)),
    BEAMS,
    BY_DIFFICULTY,
    DVTSS,
    st.builds(
        Lookahead,
        width=small,
        expansions=small,
        steps=small,
        rollouts=small,
        reduce=st.sampled_from(["mean", "max", "policy"]),
        per_parent=cap,
        merge=merging,
    ),
    st.builds(
        ParticleFilter,
        particles=st.integers(2, 5),
        temperature=st.sampled_from([0.1, 1.0, "auto"]),
        resample=st.sampled_from(["systematic", "multinomial", "residual", "stratified"]),
        ess=st.sampled_from([0.0, 0.5, 1.0]),
        sweeps=small,
        merge=merging,
    ),
    st.builds(
        MCTS,
        simulations=st.integers(1, 8),
        expansions=small,
        rule=st.sampled_from(["puct", "uct"]),
        exploration=st.none() | st.sampled_from([0.0, 2.0]),
        backup=st.sampled_from(["mean", "max"]),
        rollout_steps=st.integers(0, 2),
        leaves=small,
        merge=merging,
    ),
    st.builds(
        AdaptiveBranch,
        draws=st.integers(1, 8),
        prior=st.sampled_from(["gaussian", "beta"]),
        until=st.sampled_from(["end", "step"]),
        batch=small,
        rule=st.sampled_from(["values", "published"]),
    ),
    st.builds(Rebase, width=st.integers(1, 6), temperature=st.sampled_from([0.05, 1.0]), merge=merging),
    st.builds(
        SelfConsistency,
        n=st.integers(1, 8),
        stop=st.sampled_from([None, "adaptive", "beta"]),
        weight=st.sampled_from([None, "confidence"]),
        keep=st.sampled_from([0.5, 1.0]),
        measure=st.sampled_from(["group", "tail"]),
        window=small,
        top=small,
    ),
    st.builds(
        Steer,
        n=small,
        below=st.none() | st.sampled_from([0.3, 0.6]),
        candidates=st.integers(2, 3),
        confidence_of=st.sampled_from(["top", "drawn"]),
    ),
    # One at a time: of several at once, those that are given up have drawn more or less by then.
    st.builds(
        DeepConf,
        warmup=small,
        budget=st.integers(3, 6),
        keep=st.sampled_from([0.1, 0.9]),
        window=small,
        top=small,
        consensus=st.none() | st.just(0.6),
        wave=st.just(1),
    ),
)
SEEDS = st.integers(0, 2**32)


def drawn_paths(tree: SearchTree) -> Counter[tuple[int, ...]]:
    """How often each path was drawn, whether on one node or on several."""
    counts: Counter[tuple[int, ...]] = Counter()
    for node in tree.nodes[1:]:
        counts[tuple(node.path_ids())] += node.count
    return counts


Pick = Callable[[list[Request]], int]


def plant(*ids: int) -> SearchTree:
    return SearchTree(Prompt(token_ids=ids or (5,)))


def answer(driver: Driver, policy: FakeBlockingPolicy, scorer: FakeScorer, request: Request) -> list[Node]:
    (children,) = policy.run([request])
    scorer.score_nodes([node for child in children for node in chain(request.node, child)])
    driver.tell(request, children)
    return children


def drive(
    driver: Driver,
    pick: Pick = lambda waiting: 0,
    *,
    lm: ToyLM | None = None,
    watch: Callable[[], object] = lambda: None,
) -> list[Outcome]:
    """Answer requests one at a time, in the order that pick says, until every search has ended."""
    policy, scorer = FakeBlockingPolicy(lm or ToyLM()), FakeScorer()
    waiting: list[Request] = []
    while driver.active:
        waiting += driver.pending()
        watch()
        answer(driver, policy, scorer, waiting.pop(pick(waiting)))
    return driver.ended()


def summary(tree: SearchTree, outcome: Outcome) -> object:
    """All that must not depend on timing."""
    ends = [(node.path_ids(), node.value, node.finish, node.lineages) for node in outcome.candidates]
    return outcome.stopped, ends, drawn_paths(tree)


def look(prompts: Any, policy: Any = None, scorer: Any = None, **options: Any) -> list[Result]:
    options = {"steps": RULE, "max_new_tokens": 12, **options}
    return search(prompts, policy=policy or FakePolicy(), scorer=scorer or FakeScorer(), **options)


def facts(result: Result) -> object:
    """All that must not depend on batching, or on timing."""
    ends = [(node.path_ids(), node.value, node.count, node.finish) for node in result.candidates]
    drawn, sampled = drawn_paths(result.tree), result.usage.sampled_tokens
    return result.token_ids, result.value, result.stopped, result.tree.prompt, drawn, sampled, ends


LETTERS = {"a": 0.0, "b": 1.0, "c": 2.0, "d": 3.0, "e": -4.0}


def play(
    script: Mapping[str, Sequence[str]], strategy: Strategy, scores: Mapping[str, float] = LETTERS, **options: object
) -> tuple[Result, ScriptedPolicy]:
    policy = ScriptedPolicy(script)
    (result,) = search(
        ["?"], policy=policy, scorer=FakeScorer(step_scores(scores)), strategy=strategy, steps=RULE, **options
    )
    return result, policy


def texts(nodes: Sequence[Node]) -> list[str]:
    return [node.path_text() for node in nodes]


def nodes_by_text(result: Result) -> dict[str, Node]:
    return {node.path_text(): node for node in result.tree.nodes[1:]}
