"""Step search over vLLM: what is asked of an engine and what is made of its tokens, on a fake engine. Needs no vLLM."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence
from typing import Any

import pytest
from fake_vllm import FakeAsyncLLM, FakeEngine, FakeLLM, install
from fakes import RULE, Clock, FakeScorer, ToyLM, children_of, finish, ids, sampling
from hypothesis import HealthCheck, given, settings, strategies as st

from prm_search.driver.budget import Budget
from prm_search.driver.loop import SearchLoop
from prm_search.driver.search_settings import SearchSettings
from prm_search.integrations.vllm import AsyncVLLMPolicy, VLLMPolicy
from prm_search.integrations.vllm.drawing import EngineRow
from prm_search.protocols import AsyncPolicy, Policy, Request, Sampling
from prm_search.search import asearch, search
from prm_search.steps import StepRule
from prm_search.strategies import Beam, BestOfN, Lookahead
from prm_search.tree import Node, Prompt, SearchTree


@pytest.fixture(autouse=True)
def _vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch)


def policies(engine: FakeEngine, **options: Any) -> tuple[VLLMPolicy, AsyncVLLMPolicy]:
    return VLLMPolicy(FakeLLM(engine), **options), AsyncVLLMPolicy(FakeAsyncLLM(engine), **options)


def plant(text: str, grown: str = "") -> Node:
    """The node at which a path's drawing begins."""
    tree = SearchTree(Prompt(token_ids=ids(text)))
    return tree.add(tree.root, ids(grown)) if grown else tree.root


def steps_of(children: list[Node], top: Node) -> list[list[tuple[Any, ...]]]:
    """Tokens, finish, text and log-probs of each child's chain."""
    found = []
    for child in children:
        chain = child.path()[top.depth :]
        found.append([(n.token_ids, n.finish, n.text, [round(float(x), 5) for x in n.logprobs]) for n in chain])
    return found


def expected(lm: ToyLM, request: Request) -> list[Node]:
    """The same draws by the fakes' own decoder, token by token."""
    children = children_of(request)
    for child in children:
        while not child.done:
            child.step(lm)
    return finish(request, children, "toy")


RULES = st.builds(
    StepRule,
    delimiter=st.sampled_from([None, ";", ";;", "a;", (";", "bb")]),
    max_tokens=st.none() | st.integers(1, 6),
    regex=st.none() | st.sampled_from(["b;?a", ";+a", "ab$"]),
    confidence=st.none() | st.sampled_from([0.3, 0.5]),
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rule=RULES,
    lm=st.builds(
        ToyLM, letters=st.sampled_from(["ab;.", "a;;b", "a;"]), order=st.integers(1, 4), seed=st.integers(0, 99)
    ),
    grown=st.sampled_from(["", ";", "ab", "b;", "a"]),
    until=st.sampled_from(["step", "end"]),
    room=st.integers(1, 20),
    caps=st.lists(st.integers(1, 12), min_size=1, max_size=3),
    burst=st.integers(1, 4),
)
def test_steps_are_those_of_the_matcher_whatever_the_engine_hands_over_at_once(
    rule: StepRule, lm: ToyLM, grown: str, until: Any, room: int, caps: list[int], burst: int
) -> None:
    how = sampling(steps=rule, temperature=0.0, max_new_tokens=len(grown) + room)

    def request() -> Request:
        node = plant("abc", grown)
        return Request.draw(node, len(caps), how, until=until, caps=caps, cap_reason="budget", merge=False)

    reference = request()
    wanted = steps_of(expected(lm, reference), reference.node)
    engine = FakeEngine(lm, burst=burst)
    sync, asynchronous = policies(engine)
    first, second = request(), request()
    sync.submit([first])
    answered: list[tuple[Request, list[Node]]] = []
    while not answered:
        answered = sync.advance()
    assert answered[0][0] is first
    assert steps_of(answered[0][1], first.node) == wanted
    assert steps_of(asyncio.run(asynchronous.run(second)), second.node) == wanted
    assert not engine.running


def test_a_stop_condition_of_ones_own_ends_a_response() -> None:
    asked: list[int] = []

    def stop(rows: Sequence[EngineRow]) -> list[bool]:
        (row,) = rows
        asked.append(row.drawn)
        return [row.request.node.tree.prompt_ids == ids("abc") and row.drawn == 3]

    lm = ToyLM("ab")
    for policy in policies(FakeEngine(lm, burst=2), stop=stop):
        request = Request.draw(plant("abc"), 2, sampling(max_new_tokens=20), merge=False)
        if isinstance(policy, AsyncVLLMPolicy):
            children = asyncio.run(policy.run(request))
        else:
            policy.submit([request])
            answered: list[Any] = []
            while not answered:
                answered = policy.advance()
            ((_, children),) = answered
        assert [(child.finish, len(child.token_ids)) for child in children] == [("stop", 3), ("stop", 3)]
    assert sorted(asked) == [1] * 4 + [2] * 4 + [3] * 4


def test_steering_is_the_processors_and_every_child_asks_for_it() -> None:
    class ImplicitPRMLogitsProcessor:
        pass

    with pytest.raises(ValueError, match="without ImplicitPRMLogitsProcessor"):
        AsyncVLLMPolicy(FakeAsyncLLM(FakeEngine(logits_processors=["some.module:Other"])), alpha=1.0)
    for processor in (
        "prm_search.integrations.vllm.logits_processor:ImplicitPRMLogitsProcessor",
        ImplicitPRMLogitsProcessor,
    ):
        engine = FakeEngine(logits_processors=[processor])
        with pytest.raises(ValueError, match="alpha=nan"):
            AsyncVLLMPolicy(FakeAsyncLLM(engine), alpha=float("nan"))
        policy = AsyncVLLMPolicy(FakeAsyncLLM(engine), alpha=0.5)
        asyncio.run(policy.run(Request.draw(plant("abc"), 3, sampling())))
        assert [params.extra_args for _, _, params in engine.log] == [{"prm_alpha": 0.5}] * 3
    engine = FakeEngine()
    asyncio.run(AsyncVLLMPolicy(FakeAsyncLLM(engine)).run(Request.draw(plant("abc"), 2, sampling())))
    assert [params.extra_args for _, _, params in engine.log] == [None, None]


def test_they_are_policies() -> None:
    sync, asynchronous = policies(FakeEngine())
    assert isinstance(sync, Policy)
    assert isinstance(asynchronous, AsyncPolicy)


def test_one_id_for_an_engine_and_another_for_each_other() -> None:
    engine, other = FakeEngine(), FakeEngine()
    assert VLLMPolicy(FakeLLM(engine)).id == VLLMPolicy(FakeLLM(engine)).session().id
    assert VLLMPolicy(FakeLLM(engine)).id != VLLMPolicy(FakeLLM(other)).id


def test_a_request_a_child_with_its_own_cap_and_seed() -> None:
    engine = FakeEngine()
    sync, _ = policies(engine)
    request = Request.draw(plant("abc"), 3, sampling(max_new_tokens=20), caps=[2, 9, 4])
    sync.submit([request])
    asked = [params for _, _, params in engine.log]
    assert [params.max_tokens for params in asked] == [2, 6, 4]  # RULE's steps are 6 tokens at most
    assert len({params.seed for params in asked}) == 3
    assert all(0 <= params.seed < 2**63 for params in asked)
    assert all(params.stop_token_ids == [0] and params.ignore_eos and not params.detokenize for params in asked)


def test_seeds_depend_on_the_draw_and_on_nothing_else() -> None:
    def seeds(*texts: str, how: Sampling) -> dict[str, list[int]]:
        engine = FakeEngine()
        sync, _ = policies(engine)
        for text in texts:
            sync.submit([Request.draw(plant(text), 2, how)])
        drawn = [params.seed for _, _, params in engine.log]
        return {text: drawn[2 * i : 2 * i + 2] for i, text in enumerate(texts)}

    one = seeds("abc", "b", how=sampling(seed=3))
    assert one == seeds("b", "abc", how=sampling(seed=3))
    assert one["abc"] != seeds("abc", how=sampling(seed=4))["abc"]
    assert seeds("abc", how=sampling(temperature=0.0)) == {"abc": [None, None]}


def test_a_lineage_that_goes_on_draws_with_a_new_seed() -> None:
    engine = FakeEngine(ToyLM(letters="ab;"))
    sync, _ = policies(engine)
    (child,) = sync.expand([plant("abc")], 1, sampling=sampling())[0]
    sync.expand([child], 1, sampling=sampling())
    first, second = (params.seed for _, _, params in engine.log)
    assert child.lineages == (0,)
    assert first != second


@pytest.mark.parametrize(
    ("device", "chunked", "v2", "safe"),
    [("cpu", True, False, False), ("cpu", False, False, True), ("cuda", True, False, True)],
)
def test_no_seed_where_it_could_kill_the_engine(device: str, chunked: bool, v2: bool, safe: bool) -> None:
    engine = FakeEngine(device=device, chunked=chunked, v2=v2)
    sync, _ = policies(engine)
    sync.submit([Request.draw(plant("abc"), 1, sampling())])
    assert (engine.log[0][2].seed is not None) is safe
    assert sync.seeds is safe
    if not safe:
        with pytest.raises(ValueError, match="enable_chunked_prefill=False"):
            VLLMPolicy(FakeLLM(engine), seeds=True)
    assert VLLMPolicy(FakeLLM(engine), seeds=False).seeds is False


def test_a_search_is_the_same_by_both_policies_and_by_any_burst() -> None:
    def facts(results: list[Any]) -> Any:
        return [
            (r.text, r.value, r.stopped, sorted((n.path_ids(), n.count, n.finish) for n in r.tree.nodes[1:]))
            for r in results
        ]

    prompts = [[97, 98], [98], [97, 98]]
    for strategy in (Beam(width=3, expansions=2), BestOfN(4), Lookahead(width=2, expansions=2)):
        options: dict[str, Any] = {"scorer": FakeScorer(), "strategy": strategy, "steps": RULE, "max_new_tokens": 15}
        found = []
        for burst in (1, 3):
            found.append(facts(search(prompts, policy=policies(FakeEngine(burst=burst))[0], **options)))
            found.append(facts(asyncio.run(asearch(prompts, policy=policies(FakeEngine(burst=burst))[1], **options))))
        assert all(each == found[0] for each in found)


def test_usage_counts_what_the_engine_did() -> None:
    engine = FakeEngine(block=4)
    sync, _ = policies(engine)
    (result,) = search(
        [list(ids("abcabcab"))], policy=sync, strategy=Beam(width=2, expansions=2), steps=RULE, max_new_tokens=12
    )
    usage = result.usage
    prompts = sum(tokens for tokens, _, _ in engine.log)
    cached = sum(cached for _, cached, _ in engine.log)
    assert cached > 0
    assert usage.cached_tokens["policy"] == cached
    sampled = usage.sampled_tokens["policy"]
    assert sampled == sum(len(n.token_ids) * n.count for n in result.tree.nodes)
    # Every prompt token that was not cached, and every drawn token but the last of each request.
    assert usage.encoded_tokens["policy"] + usage.reencoded_tokens["policy"] == prompts - cached + sampled - len(
        engine.log
    )
    # Once for each token: all of the prompt, and each node less its last token where nothing went on from it.
    tree = result.tree
    once = len(tree.prompt_ids) + sum(len(n.token_ids) - (not n.children) for n in tree.nodes[1:])
    twins = sum((n.count - 1) * (len(n.token_ids) - 1) for n in tree.nodes[1:])
    assert usage.encoded_tokens["policy"] == once + twins


def test_tokens_beyond_a_step_are_dropped_and_counted_as_sampled() -> None:
    engine = FakeEngine(ToyLM(letters="a;"), burst=64)
    sync, _ = policies(engine)
    rule = StepRule(delimiter=";", max_tokens=None)
    (child,) = sync.expand([plant("b")], 1, sampling=sampling(steps=rule, max_new_tokens=100))[0]
    counts = child.tree.meter.counts
    assert len(child.token_ids) < 64
    assert counts["sampled", sync.id] == 64
    assert counts["encoded", sync.id] == len(child.tree.prompt_ids) + 63


@pytest.mark.parametrize("tokens", [1, 7, 20, 33])
def test_a_token_budget_holds(tokens: int) -> None:
    for burst in (1, 4):
        sync, _ = policies(FakeEngine(burst=burst))
        (result,) = search(["ab"], policy=sync, strategy=Beam(width=3, expansions=2), steps=RULE, budget=tokens)
        assert sum(len(n.token_ids) * n.count for n in result.tree.nodes) <= tokens


def test_a_time_budget_interrupts_and_keeps_what_was_drawn() -> None:
    engine = FakeEngine(ToyLM(letters="ab"))
    sync, _ = policies(engine)
    clock = Clock()
    with SearchLoop(sync, clock=clock) as loop:
        loop.add(
            Prompt(token_ids=(97,)),
            SearchSettings.make(strategy=BestOfN(2), steps=RULE, budget=Budget(seconds=5), max_new_tokens=200),
        )
        for _ in range(9):
            assert not loop.step()
        clock.now = 6.0
        (result,) = loop.step()
    assert result.stopped == "seconds"
    assert {(node.end, node.finish) for node in result.candidates} == {(10, "budget")}
    assert not engine.running


def test_an_interrupted_run_keeps_what_was_drawn() -> None:
    engine = FakeEngine(ToyLM(letters="ab"))
    _, policy = policies(engine)

    async def main() -> list[Node]:
        request = Request.draw(plant("a"), 2, sampling(max_new_tokens=500), until="end")
        task = asyncio.create_task(policy.run(request))
        while engine.steps < 20:
            await asyncio.sleep(0)
        policy.interrupt(request)
        policy.interrupt(request)  # twice is no error
        return await task

    children = asyncio.run(main())
    assert len(children) == 2
    assert all(child.finish == "budget" and 5 < child.end < 500 for child in children)
    assert not engine.running
    assert len(engine.aborted) == 2


def test_a_cancelled_run_aborts_its_requests() -> None:
    engine = FakeEngine(ToyLM(letters="ab"))
    _, policy = policies(engine)

    async def main() -> None:
        task = asyncio.create_task(policy.run(Request.draw(plant("a"), 3, sampling(max_new_tokens=500), until="end")))
        while engine.steps < 5:
            await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(main())
    assert not engine.running
    assert len(engine.aborted) == 3


@pytest.mark.parametrize("kind", [0, 1])
def test_a_request_that_the_engine_gives_up_is_an_error_and_leaves_nothing(kind: int) -> None:
    engine = FakeEngine(fail_at=1)
    policy = policies(engine)[kind]

    def run() -> None:
        if isinstance(policy, VLLMPolicy):
            search(["a"], policy=policy, strategy=BestOfN(3), steps=RULE)
        else:
            asyncio.run(asearch(["a"], policy=policy, strategy=BestOfN(3), steps=RULE))

    with pytest.raises(RuntimeError, match="abort"):
        run()
    assert not engine.running


def test_the_end_of_the_context_is_a_length() -> None:
    engine = FakeEngine(ToyLM(letters="ab"), context=10)
    sync, _ = policies(engine)
    (child,) = sync.expand([plant("abc")], 1, sampling=sampling(max_new_tokens=100), until="end")[0]
    assert (child.finish, child.end) == ("length", 7)
    assert sync.context == 10
    with pytest.raises(ValueError, match="context of 10 leaves no room"):
        search(["a" * 10], policy=sync)


def test_searches_share_an_engine_from_several_threads() -> None:
    engine = FakeEngine()
    sync, _ = policies(engine)
    options: dict[str, Any] = {
        "strategy": Beam(width=2, expansions=2),
        "steps": RULE,
        "max_new_tokens": 15,
        "scorer": FakeScorer(),
    }
    alone = [search([[97, i]], policy=sync, **options)[0] for i in range(97, 101)]
    found: dict[int, Any] = {}

    def work(i: int) -> None:
        (found[i],) = search([[97, i]], policy=sync, **{**options, "scorer": FakeScorer()})

    threads = [threading.Thread(target=work, args=(i,)) for i in range(97, 101)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [found[i].token_ids for i in range(97, 101)] == [result.token_ids for result in alone]
    assert not engine.running


def test_what_cannot_be_served_is_refused_by_name() -> None:
    engine = FakeEngine()
    with pytest.raises(TypeError, match="AsyncVLLMPolicy takes an AsyncLLM"):
        VLLMPolicy(FakeAsyncLLM(engine))
    with pytest.raises(TypeError, match="VLLMPolicy takes an LLM"):
        AsyncVLLMPolicy(FakeLLM(engine))
    with pytest.raises(TypeError, match="tokenizer must be a transformers tokenizer, got int"):
        VLLMPolicy(FakeLLM(engine), tokenizer=3)
    with pytest.raises(ValueError, match="logprobs_mode='processed_logprobs'"):
        VLLMPolicy(FakeLLM(FakeEngine(logprobs_mode="processed_logprobs")))
    sync, _ = policies(engine)
    with pytest.raises(ValueError, match=r"temperature=2\.5"):
        search(["a"], policy=sync, temperature=2.5)
    with pytest.raises(ValueError, match="outside the vocabulary of 128"):
        search([[500]], policy=sync)
    with pytest.raises(ValueError, match="empty prompt"):
        search([""], policy=sync)
    assert not engine.log
