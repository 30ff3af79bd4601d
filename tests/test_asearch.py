"""asearch: the same searches as coroutines."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence
from typing import Any

import pytest
from fakes import RULE, Clock, FakeAsyncPolicy, FakeAsyncScorer, FakePolicy, FakeScorer, ToyLM, fraction
from hypothesis import given, strategies as st
from search_cases import ALL, SEEDS, facts

from prm_search.driver.budget import Budget
from prm_search.driver.result import Event, Result
from prm_search.driver.search_settings import SearchSettings
from prm_search.protocols import AsyncPolicy, Request
from prm_search.search import AsyncSearchLoop, asearch, search
from prm_search.steps import StepRule
from prm_search.strategies import Beam, BestOfN, Lookahead, Steer, Strategy
from prm_search.tree import Node, Prompt, SearchTree

LONG = {"steps": RULE, "max_new_tokens": 40}


@given(
    strategy=ALL,
    seed=SEEDS,
    slowness=st.integers(0, 6),
    asynchronous=st.booleans(),
    tokens=st.none() | st.integers(1, 90),
)
def test_asearch_is_search(
    strategy: Strategy, seed: int, slowness: int, asynchronous: bool, tokens: int | None
) -> None:
    prompts = [[1], [2], [1]]
    options: dict[str, Any] = {"strategy": strategy, "seed": seed, "steps": RULE, "max_new_tokens": 10}
    options["budget"] = tokens
    expected = search(prompts, policy=FakePolicy(), scorer=FakeScorer(), **options)

    def pauses(request: Request) -> int:
        return int(fraction(seed, request.lineages) * slowness)

    policy = FakeAsyncPolicy(pauses=pauses)
    scorer = FakeAsyncScorer() if asynchronous else FakeScorer()
    found = asyncio.run(asearch(prompts, policy=policy, scorer=scorer, **options))
    assert list(map(facts, found)) == list(map(facts, expected))
    assert not policy.running
    assert not scorer.trees
    assert {result.tree for result in found} == set(policy.released)


def test_usage_and_events() -> None:
    events: list[Event] = []
    policy, scorer = FakeAsyncPolicy(), FakeAsyncScorer()
    results = asyncio.run(
        asearch([[1], [2]], policy=policy, scorer=scorer, strategy=Beam(2, 2), on_event=events.append, **LONG)
    )
    for place, result in enumerate(results):
        mine = [event for event in events if event.prompt == place]
        assert mine[-1].result is result
        assert sum(len(event.nodes) for event in mine) == len(result.tree.nodes) - 1
        encoded = len(result.tree.prompt_ids) + sum(len(node.token_ids) for node in result.tree)
        assert result.usage.encoded_tokens == {"prm": encoded, "reference": encoded}
        assert result.usage.forward_calls == {"policy": policy.calls, "scorer": scorer.calls}
        assert result.usage.seconds["policy"] > 0


def test_answers_are_read_and_large_trees_valued_beside_the_loop() -> None:
    turned, valued_at = threading.Event(), set()

    def answer(text: str) -> str:
        assert turned.wait()  # for ever, where the loop could not turn meanwhile
        return text

    def value(node: Node) -> float:
        valued_at.add(asyncio._get_running_loop() is not None)
        return node.q

    async def main() -> list[Result]:
        strategy = BestOfN(40, value=value)
        given: dict[str, Any] = {"steps": StepRule(None, max_tokens=1), "max_new_tokens": 60, "answer": answer}
        policy = FakeAsyncPolicy(ToyLM("ab"))
        task = asyncio.create_task(
            asearch([[1]], policy=policy, scorer=FakeScorer(), strategy=strategy, select="majority", **given)
        )
        while not policy.released:
            await asyncio.sleep(0)
            if valued_at:
                turned.set()
        return await task

    (result,) = asyncio.run(main())
    assert len(result.tree.nodes) > 1000
    assert valued_at == {False}
    assert result.answer


def test_searches_are_scored_together() -> None:
    policy, scorer = FakeAsyncPolicy(), FakeAsyncScorer()
    prompts = [[i] for i in range(1, 9)]
    asyncio.run(asearch(prompts, policy=policy, scorer=scorer, strategy=BestOfN(2), **LONG))
    assert policy.calls == 8
    assert scorer.calls < 8


class Slow(FakeScorer):
    """Holds its thread until it is let go."""

    def __init__(self) -> None:
        super().__init__()
        self.entered, self.go = threading.Event(), threading.Event()
        self.inside = 0
        self.released_inside = False

    def score_nodes(self, nodes: list[Node]) -> None:
        self.inside += 1
        self.entered.set()
        assert self.inside == 1, "two calls at a time"
        self.go.wait()
        super().score_nodes(nodes)
        self.inside -= 1

    def release(self, tree: SearchTree) -> None:
        self.released_inside |= self.inside > 0
        super().release(tree)


def test_a_blocking_scorer_leaves_the_event_loop_free_and_keeps_its_trees() -> None:
    scorer, policy = Slow(), FakeAsyncPolicy()

    async def main() -> None:
        task = asyncio.create_task(asearch([[1], [2]], policy=policy, scorer=scorer, strategy=Beam(2, 2), **LONG))
        while not scorer.entered.is_set():
            await asyncio.sleep(0.001)
        task.cancel()
        for _ in range(20):  # the loop runs on while the scorer does not
            await asyncio.sleep(0)
        assert not task.done()  # it waits for the scorer before it releases the trees
        scorer.go.set()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(main())
    assert not scorer.released_inside
    assert not scorer.trees
    assert not policy.running
    assert len(set(policy.released)) == 2


@pytest.mark.parametrize("after", [0, 1, 5, 20, 60])
def test_cancelling_leaves_nothing(after: int) -> None:
    policy, scorer = FakeAsyncPolicy(ToyLM("ab;")), FakeAsyncScorer()

    async def main() -> None:
        task = asyncio.create_task(asearch([[1], [2]], policy=policy, scorer=scorer, strategy=Lookahead(2, 2), **LONG))
        for _ in range(after):
            await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert len(asyncio.all_tasks()) == 1

    asyncio.run(main())
    assert not policy.running
    assert not scorer.trees


def test_loops_beside_each_other_take_turns_at_the_scorer_and_count_together() -> None:
    scorer = Slow()
    scorer.go.set()
    first, second = FakeAsyncPolicy(), FakeAsyncPolicy(ToyLM(seed=1))

    async def main() -> tuple[list[Result], AsyncSearchLoop]:
        loop = AsyncSearchLoop(first, scorer)
        other = loop.beside(second)
        settings = SearchSettings.make(strategy=Beam(2, 2), **LONG)
        runs = [each.begin(Prompt(token_ids=(i,)), settings).run() for each in (loop, other) for i in (1, 2)]
        return list(await asyncio.gather(*runs)), loop

    results, loop = asyncio.run(main())
    for lm, mine in ((ToyLM(), results[:2]), (ToyLM(seed=1), results[2:])):
        expected = search([[1], [2]], policy=FakePolicy(lm), scorer=FakeScorer(), strategy=Beam(2, 2), **LONG)
        assert list(map(facts, mine)) == list(map(facts, expected))
    assert not scorer.released_inside
    assert not scorer.trees
    assert loop.models.forward_calls == {"policy": first.calls + second.calls, "scorer": scorer.calls}


class Broken(FakeAsyncScorer):
    """Fails on the second steps of a prompt (every prompt's where none is named)."""

    def __init__(self, prompt: int | None = None) -> None:
        super().__init__()
        self.prompt = prompt

    def score_nodes(self, nodes: Sequence[Node]) -> None:
        super().score_nodes(nodes)
        mine = [node for node in nodes if self.prompt in (None, node.tree.prompt_ids[0])]
        if any(node.depth == 2 for node in mine):
            raise RuntimeError("the scorer failed")


def test_a_scorer_that_fails_on_one_search_leaves_the_others_alone() -> None:
    policy, scorer = FakeAsyncPolicy(ToyLM("ab;")), Broken(2)
    settings = SearchSettings.make(strategy=Beam(2, 2), **LONG)

    async def main() -> list[Any]:
        loop = AsyncSearchLoop(policy, scorer)
        searches = [loop.begin(Prompt(token_ids=(i,)), settings) for i in (1, 2, 3)]
        return await asyncio.gather(*(each.run() for each in searches), return_exceptions=True)

    first, failed, third = asyncio.run(main())
    assert str(failed) == "the scorer failed"
    expected = search([[1], [3]], policy=FakePolicy(ToyLM("ab;")), scorer=FakeScorer(), strategy=Beam(2, 2), **LONG)
    assert [facts(first), facts(third)] == [facts(result) for result in expected]
    assert not policy.running
    assert not scorer.trees


@pytest.mark.parametrize("what", ["policy", "scorer", "value"])
def test_errors_propagate_and_leave_nothing(what: str) -> None:
    policy = FakeAsyncPolicy(fail_at=4 if what == "policy" else None)
    scorer = Broken() if what == "scorer" else FakeAsyncScorer()

    def value(node: Node) -> float:
        if node.depth == 2:
            raise RuntimeError("the value failed")
        return node.q

    async def main() -> None:
        options = {"value": value} if what == "value" else {}
        with pytest.raises(RuntimeError, match=f"the {what} failed"):
            await asearch([[1], [2], [3]], policy=policy, scorer=scorer, strategy=Beam(2, 2), **LONG, **options)
        assert len(asyncio.all_tasks()) == 1

    asyncio.run(main())
    assert not policy.running
    assert not scorer.trees


@pytest.mark.parametrize("can_interrupt", [True, False])
def test_time_budget(can_interrupt: bool) -> None:
    clock = Clock()
    policy, scorer = FakeAsyncPolicy(ToyLM("ab;")), FakeAsyncScorer()
    if not can_interrupt:
        policy.interrupt = None  # an engine that cannot: its tasks are cancelled

    async def main() -> Result:
        loop = AsyncSearchLoop(policy, scorer, clock=clock)
        one = loop.begin(
            Prompt(token_ids=(1,)),
            SearchSettings.make(strategy=BestOfN(2), steps=RULE, budget=Budget(seconds=0.05), max_new_tokens=100_000),
        )
        task = asyncio.create_task(one.run())
        await asyncio.sleep(0.01)
        clock.now = 0.05
        return await task

    result = asyncio.run(main())
    assert result.stopped == "seconds"
    assert not policy.running
    assert bool(result.candidates) == can_interrupt
    assert all(node.finish == "budget" for node in result.candidates)


def test_a_search_can_be_followed_and_cancelled_for_what_it_has() -> None:
    policy, scorer = FakeAsyncPolicy(ToyLM("ab;;")), FakeAsyncScorer()
    options: dict[str, Any] = {"strategy": Beam(1, 3), "steps": RULE, "max_new_tokens": 60}

    async def main() -> tuple[list[Result], list[int]]:
        loop = AsyncSearchLoop(policy, scorer)
        settings = SearchSettings.make(**options)
        first, second = (loop.begin(Prompt(token_ids=(i,)), settings) for i in (1, 2))
        tasks = [asyncio.create_task(each.run()) for each in (first, second)]
        while not first.committed():
            await asyncio.sleep(0)
        first.cancel()
        results = [await task for task in tasks]
        return results, [i for node in second.committed() for i in node.token_ids]

    (cancelled, whole), said = asyncio.run(main())
    assert cancelled.stopped == "cancelled"
    assert whole.stopped == "length"
    assert said == whole.token_ids
    (alone,) = search([[2]], policy=FakePolicy(ToyLM("ab;;")), scorer=FakeScorer(), **options)
    assert facts(alone) == facts(whole)
    assert not policy.running
    assert not scorer.trees


def test_a_policy_that_cancels_its_own_requests_is_an_error() -> None:
    class Quitter(FakeAsyncPolicy):
        async def run(self, request: Request) -> list[Node]:
            raise asyncio.CancelledError

    with pytest.raises(RuntimeError, match="cancelled its own"):
        asyncio.run(asearch([[1]], policy=Quitter(), scorer=FakeScorer()))


def test_bad_input() -> None:
    def call(**options: Any) -> Any:
        return asyncio.run(
            asearch(**{"prompts": [[1]], "policy": FakeAsyncPolicy(), "scorer": FakeScorer(), **options})
        )

    assert call(prompts=[]) == []
    with pytest.raises(TypeError, match=r"pass \[prompt\]"):
        call(prompts="text")
    with pytest.raises(ValueError, match=r"prompts\[1\]: empty prompt"):
        call(prompts=[[1], ""])
    with pytest.raises(TypeError, match="policy must be a AsyncPolicy, but FakePolicy has no run"):
        call(policy=FakePolicy())
    with pytest.raises(ValueError, match="use search, not asearch"):
        call(strategy=Steer(1.0))
    with pytest.raises(ValueError, match="strategy='beams'"):
        call(strategy="beams")
    with pytest.raises(TypeError, match="widht"):
        call(widht=4)
    assert isinstance(FakeAsyncPolicy(), AsyncPolicy)
