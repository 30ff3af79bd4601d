"""The ask/tell core: order of answers, cancelling, what is settled early, misuse."""

from __future__ import annotations

import math
import random as random_module
from collections.abc import Callable, Sequence
from itertools import pairwise

import pytest
from fakes import FakeBlockingPolicy, FakeScorer, ScriptedPolicy, ToyLM, sampling, text_of
from hypothesis import given, strategies as st
from search_cases import ALL, SEEDS, answer, drive, plant, summary

from prm_search.driver.driver import Driver
from prm_search.driver.search_settings import SearchSettings
from prm_search.protocols import Request
from prm_search.strategies import Beam, BestOfN, Expand, Parallel, Strategy
from prm_search.strategies.base import Run
from prm_search.tree import Node


@given(strategy=ALL, seed=SEEDS, random=st.randoms(use_true_random=False), tokens=st.none() | st.integers(1, 120))
def test_the_order_of_answers_changes_nothing(
    strategy: Strategy, seed: int, random: random_module.Random, tokens: int | None
) -> None:
    found = []
    for pick in (lambda waiting: 0, lambda waiting: random.randrange(len(waiting)), lambda waiting: len(waiting) - 1):
        driver, trees = Driver(), [plant(1), plant(2), plant(2, 3)]
        for tree in trees:
            driver.add(tree, strategy, sampling=sampling(seed=seed, max_new_tokens=12), budget=tokens)
        outcomes = {outcome.tree: outcome for outcome in drive(driver, pick, lm=ToyLM(seed=seed))}
        found.append([summary(tree, outcomes[tree]) for tree in trees])
    assert found[0] == found[1] == found[2]


@given(strategy=ALL, seed=SEEDS, when=st.integers(0, 12))
def test_a_prompt_that_joins_late_finds_what_it_would_have_found_alone(
    strategy: Strategy, seed: int, when: int
) -> None:
    alone, late = plant(9), plant(9)
    how = sampling(seed=seed, max_new_tokens=12)
    driver = Driver()
    driver.add(alone, strategy, sampling=how)
    (expected,) = drive(driver)
    driver.add(plant(1), strategy, sampling=how)
    turns = iter(range(10**6))

    def join() -> None:
        if next(turns) == when:
            driver.add(late, strategy, sampling=how)

    outcomes = {outcome.tree: outcome for outcome in drive(driver, watch=join)}
    if late in outcomes:
        assert summary(late, outcomes[late]) == summary(alone, expected)


# -- cancelling -------------------------------------------------------------------------------------------------------


@given(strategy=ALL, seed=SEEDS, when=st.integers(0, 10))
def test_cancel_leaves_nothing(strategy: Strategy, seed: int, when: int) -> None:
    driver, policy, scorer = Driver(), FakeBlockingPolicy(), FakeScorer()
    tree, other = plant(1), plant(2)
    for each in (tree, other):
        driver.add(each, strategy, sampling=sampling(seed=seed, max_new_tokens=12))
    waiting = driver.pending()
    for _ in range(when):
        mine = [request for request in waiting if request.node.tree is tree]
        if not mine:
            break
        waiting.remove(mine[0])
        answer(driver, policy, scorer, mine[0])
        waiting += driver.pending()
    if tree not in driver.active:
        return
    dropped = driver.cancel(tree)
    assert set(dropped) == {request for request in waiting if request.node.tree is tree}
    outcome = next(outcome for outcome in driver.ended() if outcome.tree is tree)
    assert outcome.stopped == "cancelled"
    assert all(node.finished and node.value is not None and not node.rollout for node in outcome.candidates)
    assert driver.active == [other]
    assert driver.pending() == []
    assert driver.cancel(tree) == []
    for request in dropped:
        with pytest.raises(KeyError):
            driver.tell(request, [])


def test_cancel_closes_the_strategy() -> None:
    closed: list[int] = []

    class Careful:
        def run(self, root: Node) -> Run:
            def part(place: int) -> Run:
                try:
                    return (yield Expand([root], 1))
                finally:
                    closed.append(place)

            try:
                found = yield Parallel([part(1), part(2)])
                return found[0]
            finally:
                closed.append(0)

    driver, tree = Driver(), plant()
    driver.add(tree, Careful(), sampling=sampling())
    driver.cancel(tree)
    assert sorted(closed) == [0, 1, 2]


# -- what is settled early --------------------------------------------------------------------------------------------


@given(strategy=ALL, seed=SEEDS, select=st.sampled_from(["best", "majority", "weighted"]), tokens=st.none() | st.integers(5, 80))  # fmt: skip  # noqa: E501
def test_committed_steps_grow_and_begin_the_answer(
    strategy: Strategy, seed: int, select: str, tokens: int | None
) -> None:
    driver, tree = Driver(), plant(4)
    settings = SearchSettings.make(strategy=strategy, select=select)
    driver.add(tree, strategy, sampling=sampling(seed=seed), budget=tokens)
    said: list[list[int]] = []

    def watch() -> None:
        said.append([i for node in driver.committed(tree, settings.eligible) for i in node.token_ids])

    (outcome,) = drive(driver, lm=ToyLM(seed=seed, letters="ab;;."), watch=watch)
    if outcome.candidates:
        said.append(settings.choose(outcome.candidates).node.path_ids())
    for shorter, longer in pairwise(said):
        assert longer[: len(shorter)] == shorter


def test_committed_by_hand() -> None:
    script = {"": ["a;"], "a;": ["b;"], "a;b;": ["a;", "c;"], "a;b;a;": ["a."], "a;b;c;": ["a."]}
    policy, scorer = ScriptedPolicy(script), FakeScorer()
    driver, tree = Driver(), plant()
    driver.add(tree, Beam(width=2, expansions=1), sampling=sampling())
    said = []
    while driver.active:
        said.append("".join(node.text for node in driver.committed(tree)))
        for request in driver.pending():
            answer(driver, policy, scorer, request)
    assert said == ["", "a;", "a;b;", "a;b;"]  # two beams differ in the last step
    assert {text_of(node.path_ids()) for node in driver.ended()[0].candidates} == {"a;b;a;a", "a;b;c;a"}


def test_nothing_is_settled_by_a_strategy_that_does_not_say_what_is_alive() -> None:
    class Quiet:
        def run(self, root: Node) -> Run:
            nodes = yield Expand([root], 1)
            while not nodes[0].finished:
                nodes = yield Expand(nodes, 1)
            return nodes

    driver, tree = Driver(), plant()
    driver.add(tree, Quiet(), sampling=sampling())
    said: list[list[Node]] = []
    drive(driver, watch=lambda: said.append(driver.committed(tree)))
    assert said
    assert all(nodes == [] for nodes in said)


# -- misuse -----------------------------------------------------------------------------------------------------------


def asking(ask: Callable[[Node], object]) -> Strategy:
    class Asks:
        def run(self, root: Node) -> Run:
            return (yield ask(root))

    return Asks()


@pytest.mark.parametrize(
    ("ask", "error", "message"),
    [
        (lambda root: Expand([root, root]), ValueError, "too often"),
        (lambda root: Expand([plant().root]), ValueError, "another tree"),
        (lambda root: Expand([root], -1), ValueError, "n=-1"),
        (lambda root: Expand([root], [1, 2]), ValueError, "one a node"),
        (lambda root: root, TypeError, "yields Expand or Parallel, got Node"),
    ],
)
def test_strategies_that_ask_for_nonsense(ask: Callable[[Node], object], error: type, message: str) -> None:
    driver, tree = Driver(), plant()
    with pytest.raises(error, match=message):
        driver.add(tree, asking(ask), sampling=sampling())
    assert driver.active == []
    assert driver.pending() == []


def test_nothing_asked_is_nothing_sent() -> None:
    driver, tree = Driver(), plant()
    for ask in (Expand([]), Parallel([]), Expand([tree.root], 0)):
        driver.add(tree, asking(lambda root, ask=ask: ask), sampling=sampling())
        (outcome,) = driver.ended()
        assert (outcome.candidates, outcome.stopped) == ([], "finished")


def test_a_tree_is_searched_once_at_a_time() -> None:
    driver, tree = Driver(), plant()
    driver.add(tree, BestOfN(1), sampling=sampling())
    with pytest.raises(ValueError, match="already"):
        driver.add(tree, BestOfN(1), sampling=sampling())


def test_missing_children_are_an_error() -> None:
    driver, policy = Driver(), FakeBlockingPolicy()
    driver.add(plant(), BestOfN(3), sampling=sampling())
    (request,) = driver.pending()
    (children,) = policy.run([request])
    FakeScorer().score_nodes(children)
    with pytest.raises(ValueError, match="without one of them"):
        driver.tell(request, [child for child in children if request.lineages[0] not in child.lineages])


def test_nan_values_are_an_error() -> None:
    driver, policy = Driver(), FakeBlockingPolicy()
    driver.add(plant(), BestOfN(3), sampling=sampling(), value=lambda node: math.nan)
    (request,) = driver.pending()
    (children,) = policy.run([request])
    with pytest.raises(ValueError, match="NaN"):
        driver.tell(request, children)


def test_unfinished_candidates_are_an_error() -> None:
    policy = ScriptedPolicy({"": ["a;"]})
    driver = Driver()
    driver.add(plant(), asking(lambda root: Expand([root])), sampling=sampling())
    (request,) = driver.pending()
    with pytest.raises(ValueError, match="finished nodes only"):
        answer(driver, policy, FakeScorer(), request)


def test_values_are_set_on_every_node_of_a_chain() -> None:
    driver, tree = Driver(), plant()
    driver.add(tree, BestOfN(3), sampling=sampling(), value=lambda node: 10.0 + node.depth)
    drive(driver)
    assert max(node.depth for node in tree) > 1
    assert all(node.value == 10.0 + node.depth for node in tree.nodes[1:])


def test_twins_may_be_told_once_or_repeated() -> None:
    outcomes = []
    for collapse in (False, True):
        driver, policy, tree = Driver(), FakeBlockingPolicy(), plant()
        driver.add(tree, Beam(3, 3), sampling=sampling(max_new_tokens=12))
        waiting: list[Request] = []
        while driver.active:
            waiting += driver.pending()
            request = waiting.pop()
            (children,) = policy.run([request])
            told: Sequence[Node] = list(dict.fromkeys(children))[::-1] if collapse else children
            FakeScorer().score_nodes(told)
            driver.tell(request, told)
        outcomes.append(summary(tree, driver.ended()[0]))
    assert outcomes[0] == outcomes[1]
