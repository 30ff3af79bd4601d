"""Budgets of tokens, nodes, depth and seconds."""

from __future__ import annotations

import math

import pytest
from fakes import Clock, FakePolicy, FakeScorer, ScriptedPolicy, ToyLM, ids, sampling
from hypothesis import given, strategies as st
from search_cases import ALL, SEEDS, answer, drawn_paths, drive, plant

from prm_search.driver.budget import Budget, Purse, share
from prm_search.driver.driver import Driver
from prm_search.protocols import Request, Segment, commit
from prm_search.strategies import DVTS, Beam, BestOfN, Expand, Lookahead, Parallel, Steer, Strategy
from prm_search.strategies.base import Run
from prm_search.tree import Node

# -- budgets ----------------------------------------------------------------------------------------------------------

LIMITS = st.builds(
    Budget,
    tokens=st.none() | st.integers(1, 60),
    nodes=st.none() | st.integers(1, 20),
    depth=st.none() | st.integers(1, 3),
)


@given(strategy=ALL, seed=SEEDS, budget=LIMITS, room=st.integers(1, 16))
def test_budgets_are_never_exceeded(strategy: Strategy, seed: int, budget: Budget, room: int) -> None:
    driver, tree = Driver(), plant(7)

    def check() -> None:
        spent = tree.meter.counts["sampled", "toy"]
        assert budget.tokens is None or spent <= budget.tokens
        assert budget.nodes is None or len(tree.nodes) - 1 <= budget.nodes

    driver.add(tree, strategy, sampling=sampling(seed=seed, max_new_tokens=room), budget=budget)
    (outcome,) = drive(driver, lm=ToyLM(seed=seed), watch=check)
    check()
    assert max(node.depth for node in tree) <= (budget.depth or math.inf)
    assert max(node.end for node in tree) <= room
    limits = {name for name in ("tokens", "nodes", "depth") if getattr(budget, name) is not None}
    assert outcome.stopped in {"finished", "length"} | limits
    assert all(node.finished and node.value is not None for node in outcome.candidates)
    assert outcome.candidates or limits
    if outcome.stopped in ("finished", "length"):
        assert not any(node.finish == "budget" for node in tree)


@given(strategy=ALL, seed=SEEDS, tokens=st.integers(1, 60))
def test_a_token_budget_that_bites_says_so(strategy: Strategy, seed: int, tokens: int) -> None:
    free, limited = plant(7), plant(7)
    outcomes = []
    for tree, budget in ((free, None), (limited, tokens)):
        driver = Driver()
        driver.add(tree, strategy, sampling=sampling(seed=seed, max_new_tokens=12), budget=budget)
        outcomes += drive(driver)
    if free.meter.counts["sampled", "toy"] > tokens:
        assert outcomes[1].stopped == "tokens"
        assert limited.meter.counts["sampled", "toy"] <= tokens
    elif outcomes[1].stopped != "tokens":
        assert drawn_paths(free) == drawn_paths(limited)


def test_caps_are_even_and_remainders_go_to_the_first_children() -> None:
    driver = Driver()
    driver.add(plant(), BestOfN(4), sampling=sampling(), budget=10)
    (request,) = driver.pending()
    assert request.caps == (3, 3, 2, 2)
    assert request.cap_reasons == ("budget",) * 4
    driver = Driver()
    driver.add(plant(), BestOfN(4), sampling=sampling(max_new_tokens=3), budget=14)
    (request,) = driver.pending()
    assert request.caps == (3, 3, 3, 3)
    assert request.cap_reasons == ("length",) * 4  # the cap is the room that there is
    driver = Driver()
    driver.add(plant(), BestOfN(4), sampling=sampling(), budget=3)
    (request,) = driver.pending()
    assert request.caps == (1, 1, 1)


def test_unused_promises_come_back() -> None:
    # 4 x 1 token of 40 are spent, so the next two children may have 36 between them
    policy = ScriptedPolicy({"": ["a", "b", "c", "d"], "a": ["a."], "b": ["a."], "c": ["a."], "d": ["a."]})
    driver, scorer = Driver(), FakeScorer()
    driver.add(plant(), Beam(width=2, expansions=2), sampling=sampling(max_new_tokens=100), budget=40)
    (request,) = driver.pending()
    assert request.caps == (10,) * 4
    answer(driver, policy, scorer, request)
    requests = driver.pending()
    assert [cap for request in requests for cap in request.caps] == [9] * 4


def test_parallel_runs_share_evenly_and_give_back() -> None:
    seen: list[tuple[int, ...]] = []

    class Three:
        def run(self, root: Node) -> Run:
            def part() -> Run:
                return (yield Expand([root], 1, until="end"))

            found = yield Parallel([part() for _ in range(3)])
            again = yield Expand([root], 1, until="end")
            return [*(node for nodes in found for node in nodes), *again]

    policy = ScriptedPolicy({"": ["a."]})
    driver, scorer = Driver(), FakeScorer()
    driver.add(plant(), Three(), sampling=sampling(max_new_tokens=100), budget=20)
    requests = driver.pending()
    seen = [request.caps for request in requests]
    assert seen == [(7,), (7,), (6,)]
    for request in reversed(requests):
        answer(driver, policy, scorer, request)
    (last,) = driver.pending()
    assert last.caps == (14,)  # three times two tokens are spent


def test_nodes_without_budget_are_finished_in_their_own_place() -> None:
    sent: list[list[Node]] = []

    class Twice:
        def run(self, root: Node) -> Run:
            first = yield Expand([root], 3)
            second = yield Expand(first, 1)
            sent.append(second)
            return second

    policy = ScriptedPolicy({"": ["a;", "b;", "c;"], "a;": ["d."]})
    driver = Driver()
    tree = plant()
    driver.add(tree, Twice(), sampling=sampling(max_new_tokens=100), budget=Budget(nodes=4))
    for _ in range(2):
        (request,) = driver.pending()
        answer(driver, policy, FakeScorer(), request)
    (outcome,) = driver.ended()
    assert [(node.path_text(), node.finish) for node in sent[0]] == [
        ("a;d", "stop"),
        ("b;", "budget"),
        ("c;", "budget"),
    ]
    assert outcome.stopped == "nodes"
    assert outcome.candidates == sent[0]


def test_whole_answers_under_a_node_budget_keep_draw_order() -> None:
    # four draws make three nodes; the one node that is left goes to the first of the twins
    policy, scorer, driver = ScriptedPolicy({"": ["a;", "a;", "c.", "b;"], "a;": ["d."]}), FakeScorer(), Driver()
    driver.add(plant(), BestOfN(4), sampling=sampling(), budget=Budget(nodes=4))
    for _ in range(2):
        (request,) = driver.pending()
        answer(driver, policy, scorer, request)
    (outcome,) = driver.ended()
    assert [(node.path_text(), node.finish) for node in outcome.candidates] == [
        ("a;d", "stop"), ("c", "stop"), ("b;", "budget"),
    ]  # fmt: skip
    assert outcome.stopped == "nodes"


def test_a_node_that_has_children_is_not_finished_by_a_budget() -> None:
    sent: list[list[Node]] = []

    class Again:
        def run(self, root: Node) -> Run:
            first = yield Expand([root], 1)
            second = yield Expand(first, 1)
            sent.append((yield Expand(first, 1)))
            return second

    policy = ScriptedPolicy({"": ["a;"], "a;": ["d."]})
    driver = Driver()
    driver.add(plant(), Again(), sampling=sampling(), budget=Budget(nodes=2))
    for _ in range(2):
        (request,) = driver.pending()
        answer(driver, policy, FakeScorer(), request)
    assert sent == [[]]
    assert [node.finish for node in driver.ended()[0].candidates] == ["stop"]


@pytest.mark.parametrize(
    ("bad", "name"),
    [
        ({"tokens": 0}, "tokens=0"), ({"nodes": -1}, "nodes=-1"), ({"depth": 1.5}, "depth=1.5"),
        ({"tokens": True}, "tokens=True"), ({"seconds": 0}, "seconds=0"), ({"seconds": math.nan}, "seconds=nan"),
        ({"seconds": math.inf}, "seconds=inf"),
    ],
)  # fmt: skip
def test_bad_budgets(bad: dict[str, float], name: str) -> None:
    with pytest.raises(ValueError, match=name):
        Budget(**bad)


def test_budget_of() -> None:
    assert Budget.of(None) == Budget()
    assert Budget.of(7) == Budget(tokens=7)
    assert Budget.of(Budget(depth=2)) == Budget(depth=2)
    with pytest.raises(ValueError, match="tokens=0"):
        Budget.of(0)
    with pytest.raises(TypeError, match="budget must be"):
        Budget.of("10")


@given(amount=st.integers(0, 1000), parts=st.integers(1, 40))
def test_share(amount: int, parts: int) -> None:
    shares = share(amount, parts)
    assert sum(shares) == amount
    assert max(shares) - min(shares) <= 1
    assert shares == sorted(shares, reverse=True)
    purse = Purse(amount, None)
    split = purse.split(parts)
    assert [part.tokens for part in split] == shares
    assert purse.tokens == 0
    purse.put_back(split)
    assert purse == Purse(amount, None)


# -- time -------------------------------------------------------------------------------------------------------------


@given(strategy=ALL, seed=SEEDS, stop_at=st.integers(0, 30))
def test_time_runs_out_between_forwards(strategy: Strategy, seed: int, stop_at: int) -> None:
    clock, tree, policy, scorer = Clock(), plant(3), FakePolicy(ToyLM(seed=seed)), FakeScorer()
    driver = Driver(clock=clock)
    driver.add(tree, strategy, sampling=sampling(seed=seed, max_new_tokens=12), budget=Budget(seconds=1))
    under_way: set[Request] = set()
    for forward in range(1000):
        new = driver.pending()
        policy.submit(new)
        under_way.update(new)
        if not driver.active:
            break
        if forward == stop_at:
            clock.now = 1.0
        answers = policy.advance()
        under_way.difference_update(request for request, _ in answers)
        for request in driver.expired():
            if request in under_way:
                answers.append((request, policy.interrupt(request)))
                under_way.discard(request)
        for request, children in answers:
            scorer.score_nodes(children)
            driver.tell(request, children)
    (outcome,) = driver.ended()
    assert not under_way
    assert not policy.requests
    assert policy.forward_calls <= stop_at + 1  # nothing was drawn after the time
    assert all(node.finished and node.value is not None for node in outcome.candidates)
    # One forward was made, so there is something; but Steer's first may say only that the policy is unsure.
    assert outcome.candidates or isinstance(strategy, Steer)
    if any(node.finish == "budget" for node in tree):
        assert outcome.stopped == "seconds"


def test_no_time_at_all() -> None:
    clock = Clock()
    driver = Driver(clock=clock)
    for strategy in (BestOfN(2), Beam(2, 2), DVTS(2), Lookahead(2, 2)):
        tree = plant()

        class Late:
            def run(self, root: Node, strategy: Strategy = strategy) -> Run:
                clock.now += 10
                return (yield from strategy.run(root))

        driver.add(tree, Late(), sampling=sampling(), budget=Budget(seconds=1))
        (outcome,) = driver.ended()
        assert (outcome.candidates, outcome.stopped, len(tree.nodes)) == ([], "seconds", 1)
        assert tree.root.finish is None


def test_chains_that_are_interrupted_between_two_steps() -> None:
    clock, tree = Clock(), plant()
    driver = Driver(clock=clock)
    driver.add(tree, BestOfN(3), sampling=sampling(), budget=Budget(seconds=1))
    (request,) = driver.pending()
    clock.now = 1
    step, rest, other = (Segment(list(ids(text)), [-1.0] * 2, text, "step") for text in ("a;", "b;", "c;"))
    rest.finish = "budget"
    children = [nodes[-1] for nodes in commit(request, [[step], [step, rest], [other]], "toy")]
    FakeScorer().score_nodes(children)
    driver.tell(request, children)
    (outcome,) = driver.ended()
    # the first chain stands where its twin went on; the third is finished where it stands
    assert [(node.path_text(), node.finish) for node in outcome.candidates] == [("a;b;", "budget"), ("c;", "budget")]
    assert outcome.stopped == "seconds"


def test_seconds_left() -> None:
    clock = Clock()
    driver, timed, untimed = Driver(clock=clock), plant(), plant()
    driver.add(timed, BestOfN(1), sampling=sampling(), budget=Budget(seconds=2))
    driver.add(untimed, BestOfN(1), sampling=sampling())
    clock.now = 1.5
    assert driver.seconds_left(timed) == 0.5
    assert driver.seconds_left(untimed) == math.inf
    assert driver.expired() == []
    clock.now = 2
    assert [request.node.tree for request in driver.expired()] == [timed]
