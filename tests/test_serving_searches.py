"""The server's parts on fakes: text in portions, models in a thread, answers whole and streamed, limits, errors."""

from __future__ import annotations

import asyncio
import json
import math
import threading
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import asdict, replace
from types import SimpleNamespace
from typing import Any

import pytest
from fakes import EOS, RULE, Clock, FakePolicy, FakeScorer, Spelling, ToyLM
from hypothesis import given, settings, strategies as st
from search_cases import ALL, SEEDS
from soak import examples

from prm_search.protocols import Request
from prm_search.search import search
from prm_search.serving.backend import ThreadEngine
from prm_search.serving.errors import RequestError
from prm_search.serving.keys import BearerKeys
from prm_search.serving.limits import Limits
from prm_search.serving.metrics import Metrics
from prm_search.serving.response import events, whole
from prm_search.serving.schema import GuidanceBody, parse
from prm_search.serving.service import Job, Service
from prm_search.serving.text import TextStream, whole_text
from prm_search.strategies import STRATEGIES, Beam, BestOfN, ByDifficulty, DeepConf, Strategy
from prm_search.tree import Node

# Two tokens are halves of characters: "ab" spells "é", a half alone is no character.
HALVES = Spelling({ord("a"): b"\xc3", ord("b"): b"\xa9", ord(";"): b";", EOS: b"<eos>"})
PIECES = [b"a", b"b", b"ab", b"\xc3", b"\xa9", "é".encode(), b"ba", b"<s>", "\ufffd".encode(), b""]
TABLE: Any = Spelling(dict(enumerate(PIECES)), frozenset([7]))
TOKENS = st.lists(st.integers(0, len(PIECES) - 1), max_size=24)
STOPS = st.lists(st.text("abé", min_size=1, max_size=4), max_size=3)


def first_completed(text: str, stop: Sequence[str]) -> str:
    """The text before the stop string whose last character comes first; of two, the longer."""
    for end in range(1, len(text) + 1):
        done = [each for each in stop if text[:end].endswith(each)]
        if done:
            return text[: end - max(map(len, done))]
    return text


@given(tokens=TOKENS, stop=STOPS, cuts=st.lists(st.integers(0, 24)))
def test_portions_of_text_joined_are_the_whole(tokens: list[int], stop: list[str], cuts: list[int]) -> None:
    spelled = b"".join(PIECES[i] for i in tokens if i != 7).decode("utf-8", "replace")
    expected = first_completed(spelled, stop)
    assert whole_text(TABLE, tokens, stop) == expected
    stream, at, said = TextStream(TABLE, stop), 0, ""
    for cut in [*sorted(cuts), len(tokens)]:
        said += stream.feed(tokens[at:cut])
        assert expected.startswith(said)
        at = max(at, cut)
    assert said + stream.end() == expected


def guidance(strategy: Strategy) -> dict[str, Any]:
    """How a request writes a strategy."""
    name = next(name for name, kind in STRATEGIES.items() if type(strategy) is kind)
    taken = GuidanceBody.model_fields.keys() - {"value"}  # fields of prm_guidance that have these names, too
    fields = {key: value for key, value in asdict(strategy).items() if value != ()}
    if name == "steer":  # with candidates, as the strategies here: it steers by no strength
        del fields["alpha"]
    return {"strategy": name} | {f"{name}_{key}" if key in taken else key: value for key, value in fields.items()}


def body(**given: Any) -> bytes:
    return json.dumps({"prompt": [65], "max_tokens": 12, "temperature": 1.0, "seed": 0} | given).encode()


def with_service(
    work: Callable[[Service], Awaitable[Any]],
    policy: FakePolicy | None = None,
    scorer: FakeScorer | None = None,
    limits: Limits | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> Any:
    """Run a coroutine over a service on fakes; afterwards nothing may be left of any search."""
    policy, scorer = policy or FakePolicy(), scorer or FakeScorer()

    async def main() -> Any:
        engine = ThreadEngine(policy, scorer, HALVES, clock=clock)  # type: ignore[arg-type]
        service = Service(engine, ["fake"], limits=limits or Limits(), steps=RULE, metrics=Metrics())
        try:
            result = await work(service)
            await service.drain()
            return result
        finally:
            engine.close()

    found = asyncio.run(main())
    assert not policy.trees
    assert not policy.requests
    assert not scorer.trees
    return found


async def answer(service: Service, given: bytes) -> dict[str, Any]:
    job = service.open(parse("text", given))
    try:
        return whole(job, await job.results())
    finally:
        await job.close()


async def stream(service: Service, given: bytes) -> list[dict[str, Any]]:
    job = service.open(parse("text", given))
    try:
        told = [event async for event, _ in events(job)]
    finally:
        await job.close()
    assert told[-1] == "data: [DONE]\n\n"
    return [json.loads(each.removeprefix("data: ")) for each in told[:-1]]


# A request cannot write a choice by difficulty: a server has that by --guidance.
@settings(max_examples=examples(60))
@given(strategy=ALL.filter(lambda each: not isinstance(each, ByDifficulty)), seed=SEEDS,
       select=st.sampled_from(["best", "majority"]), tokens=st.none() | st.integers(1, 60))  # fmt: skip
def test_streamed_whole_and_searched_are_the_same(
    strategy: Strategy, seed: int, select: str, tokens: int | None
) -> None:
    options: dict[str, Any] = {"select": select, "budget": tokens}
    if select == "majority":
        options["answer"] = "number"
    (expected,) = search(
        [[65]], policy=FakePolicy(), scorer=FakeScorer(), strategy=strategy, steps=RULE, max_new_tokens=12, seed=seed,
        temperature=1.0, **options,
    )  # fmt: skip
    asked = {"prm_guidance": guidance(strategy) | options, "seed": seed}

    async def both(service: Service) -> None:
        said = await answer(service, body(**asked))
        assert said["choices"][0]["text"] == whole_text(HALVES, expected.token_ids)  # type: ignore[arg-type]
        assert said["prm_search"] == [{"stopped": expected.stopped, "value": expected.value, "answer": expected.answer}]
        assert said["usage"]["prm_search"]["sampled_tokens"] == expected.usage.sampled_tokens
        assert said["usage"]["prm_search"]["encoded_tokens"] == expected.usage.encoded_tokens
        chunks = await stream(service, body(**asked, stream=True))
        assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == said["choices"][0]["text"]
        assert chunks[-1]["choices"][0]["finish_reason"] == said["choices"][0]["finish_reason"]
        assert [chunk["choices"][0]["finish_reason"] for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)

    with_service(both)


def test_null_is_what_an_option_says_where_it_may_be_none() -> None:
    """`consensus` has a number by default, and None switches it off."""
    strategy = DeepConf(warmup=1, budget=2, window=1, top=1, consensus=None, wave=1)
    drawn = search(
        [[65]], policy=FakePolicy(), scorer=FakeScorer(), strategy=strategy, steps=RULE, max_new_tokens=12, seed=1,
        temperature=1.0,
    )[0].usage.sampled_tokens  # fmt: skip

    async def both(service: Service) -> None:
        for guided in (guidance(strategy), guidance(replace(strategy, consensus=0.95))):
            said = await answer(service, body(prm_guidance=guided, seed=1))
            usage = said["usage"]["prm_search"]["sampled_tokens"]
            assert (usage == drawn) == (guided["consensus"] is None)

    with_service(both)


@settings(max_examples=40)
@given(strategy=st.one_of(st.builds(Beam, st.integers(1, 3), st.integers(1, 3)), st.builds(BestOfN, st.integers(1, 5))),
       seed=SEEDS, several=st.booleans())  # fmt: skip
def test_the_tree_grows_in_a_stream_as_it_is_searched(strategy: Strategy, seed: int, several: bool) -> None:
    prompts = [[65], [66]] if several else [[65]]
    expected = search(
        prompts, policy=FakePolicy(), scorer=FakeScorer(), strategy=strategy, steps=RULE, max_new_tokens=12, seed=seed,
        temperature=1.0,
    )  # fmt: skip
    asked = {"prm_guidance": guidance(strategy) | {"progress": True}, "seed": seed, "prompt": prompts, "stream": True}

    async def grow(service: Service) -> None:
        chunks = await stream(service, body(**asked))
        trees: list[dict[int, dict[str, Any]]] = [{0: {"path": ""}} for _ in prompts]
        usages: list[Any] = [None for _ in prompts]
        for facts in (chunk["prm_search"][0] for chunk in chunks if not chunk["choices"]):
            tree = trees[facts["prompt"]]
            usages[facts["prompt"]] = facts["usage"]
            for step in facts["steps"]:
                tree[step["id"]] = step | {"path": tree[step["parent"]]["path"] + step["text"]}  # parents come first
        for number, result in enumerate(expected):
            grown, usage = trees[number], usages[number]
            told = {
                (step["path"], step["depth"], step["tokens"], step["reward"], step["q"], step["value"], step["count"],
                 step["finish"], step["rollout"]): step["rewards"]
                for step in grown.values() if "id" in step
            }  # fmt: skip
            assert told == {
                (node.path_text(), node.depth, len(node.token_ids), node.reward, node.q, node.value, node.count,
                 node.finish, node.rollout): {"prm": node.reward}
                for node in result.tree.nodes[1:]
            }  # fmt: skip
            for kind in ("sampled_tokens", "encoded_tokens", "cached_tokens", "reencoded_tokens"):
                assert usage[kind] == getattr(result.usage, kind)
            assert set(usage["seconds"]) == {"policy", "scorer"}
        ends = [chunk for chunk in chunks if chunk["choices"] and "prm_search" in chunk]
        for chunk in ends:
            number = chunk["choices"][0]["index"]
            path = chunk["prm_search"][0]["path"]
            assert "".join(trees[number][each]["text"] for each in path) == expected[number].text

    with_service(grow)


class Gathered(FakePolicy):
    """Draws nothing before so many searches are there, nor while one of them is between two steps: how fast a loaded
    machine scores changes no count. Searches that a service ran one after another would wait here for ever."""

    def __init__(self, searches: int) -> None:
        super().__init__()
        self.searches = searches

    def advance(self) -> list[tuple[Request, list[Node]]]:
        drawing = {request.node.tree for request in self.requests}
        if drawing >= self.trees and (self.forward_calls or len(self.trees) == self.searches):
            return super().advance()
        time.sleep(0.001)
        return []


def test_searches_share_forwards_and_draw_as_if_alone() -> None:
    async def alone(service: Service) -> list[Any]:
        return [(await answer(service, body(seed=seed, prm_guidance={})))["choices"] for seed in range(6)]

    async def together(service: Service) -> list[Any]:
        kinds = [body(seed=seed, prm_guidance={}) for seed in range(6)] + [body(seed=seed) for seed in range(3)]
        said = await asyncio.gather(*(answer(service, kind) for kind in kinds))
        return [each["choices"] for each in said[:6]]

    one, many = FakePolicy(), Gathered(9)
    assert with_service(alone, one) == with_service(together, many)
    assert many.forward_calls < one.forward_calls / 4  # of six, where these share them with three more


@pytest.mark.parametrize("what", ["policy", "scorer"])
def test_an_error_in_a_model_is_told_and_the_server_goes_on(what: str) -> None:
    policy = FakePolicy(ToyLM("ab;"), fail_at=5 if what == "policy" else None)
    scorer = FakeScorer(fail_at=1 if what == "scorer" else None)

    async def work(service: Service) -> None:
        with pytest.raises(RequestError, match=f"the {what} failed") as caught:
            await answer(service, body(prm_guidance={}))
        assert caught.value.status == 500
        assert (await answer(service, body(prm_guidance={})))["choices"]

    with_service(work, policy, scorer)


def test_a_value_that_a_model_refuses_is_no_fault_of_the_request() -> None:
    def refuse(prompt: Any, path: Any) -> float:
        raise ValueError("no reward")

    async def work(service: Service) -> None:
        with pytest.raises(RequestError, match="no reward") as caught:
            await answer(service, body(prm_guidance={}))
        assert caught.value.status == 500

    with_service(work, scorer=FakeScorer(refuse))


def test_an_error_in_a_stream_is_an_event() -> None:
    async def work(service: Service) -> None:
        (last,) = (await stream(service, body(prm_guidance={}, stream=True)))[-1:]
        assert last["error"]["type"] == "server_error"
        assert "the policy failed" in last["error"]["message"]

    with_service(work, FakePolicy(ToyLM("ab;"), fail_at=9))


class Held(FakePolicy):
    """Draws nothing until it is let go."""

    def __init__(self) -> None:
        super().__init__(ToyLM("ab;"))
        self.go = threading.Event()

    def advance(self) -> list[tuple[Request, list[Node]]]:
        return super().advance() if self.go.wait(0.001) else []


class Overtaken(FakePolicy):
    """Draws a few tokens; then no time is left, and it draws no more."""

    def __init__(self, clock: Clock) -> None:
        super().__init__(ToyLM("ab;"))
        self.clock = clock

    def advance(self) -> list[tuple[Request, list[Node]]]:
        if self.forward_calls == 20:
            self.clock.now = 1.0
            time.sleep(0.001)
            return []
        return super().advance()


def test_time_runs_out() -> None:
    clock = Clock()

    async def partial(service: Service) -> None:
        asked = body(max_tokens=4000, prm_guidance={"strategy": "best_of_n", "n": 2, "budget": {"seconds": 0.2}})
        said = await answer(service, asked)
        assert said["prm_search"][0]["stopped"] == "seconds"
        assert said["choices"][0]["finish_reason"] == "length"
        assert said["choices"][0]["text"]

    async def nothing(service: Service) -> None:
        with pytest.raises(RequestError) as caught:
            await answer(service, body(prm_guidance={}))
        assert caught.value.status == 504

    with_service(partial, Overtaken(clock), clock=clock)
    with_service(nothing, Held(), limits=Limits(seconds=0.05))


def test_what_is_not_finite_is_null() -> None:
    scorer = FakeScorer(lambda prompt, path: -math.inf if path[-1] == EOS else 1.0)
    asked = body(prm_guidance={"strategy": "best_of_n", "n": 2, "return_candidates": True, "progress": True})

    async def work(service: Service) -> None:
        said = await answer(service, asked)
        ended = [each for each in said["prm_search"][0]["candidates"] if each["finish_reason"] == "stop"]
        assert ended
        assert all(each["value"] is each["q"] is each["steps"][-1]["reward"] is None for each in ended)
        assert "Infinity" not in json.dumps(await stream(service, asked[:-1] + b', "stream": true}'))

    with_service(work, scorer=scorer)


def test_limits_and_the_end() -> None:
    policy = Held()

    async def work(service: Service) -> None:
        tasks = [asyncio.create_task(answer(service, body(prm_guidance={}))) for _ in range(2)]
        await asyncio.sleep(0)
        assert service.in_flight == 2
        with pytest.raises(RequestError) as caught:
            await answer(service, body())
        assert caught.value.status == 429
        tasks[0].cancel()
        with pytest.raises(asyncio.CancelledError):
            await tasks[0]
        assert service.in_flight == 1
        await service.drain()
        with pytest.raises(RequestError, match="shutting down"):
            await tasks[1]
        with pytest.raises(RequestError, match="shutting down"):
            await answer(service, body())

    with_service(work, policy, limits=Limits(searches=2))


def test_a_job_that_is_closed_at_once_leaves_nothing() -> None:
    async def work(service: Service) -> None:
        job: Job = service.open(parse("text", body(prm_guidance={})))
        await job.close()
        assert service.in_flight == 0
        assert not service.engine.loop(guided=True, alpha=None).models._numbers

    with_service(work)


def test_what_this_policy_cannot_do_is_refused() -> None:
    async def work(service: Service) -> None:
        for asked, param in (({"stop": "x"}, "stop"), ({"prm_guidance": {"alpha": 1.0}}, "prm_guidance.alpha")):
            with pytest.raises(RequestError) as caught:
                await answer(service, body(**asked))
            assert (caught.value.status, caught.value.param) == (400, param)
        assert service.in_flight == 0

    policy = FakePolicy()
    policy.takes_stop = False  # type: ignore[misc]
    with_service(work, policy)


@pytest.mark.parametrize(("path", "root", "guarded"), [
    ("/v1/models", "", True), ("/v1", "", True), ("/v1/", "", True), ("/api/v1/completions", "/api", True),
    ("/v1/models", "/v", True), ("/health", "", False), ("/api/health", "/api", False),
])  # fmt: skip
@pytest.mark.parametrize(("header", "allowed"), [(None, False), (b"Bearer wrong", False), (b"bearer key", True)])
def test_keys_guard_the_api_wherever_it_is_mounted(
    path: str, root: str, guarded: bool, header: bytes | None, allowed: bool
) -> None:
    reached, sent = [], []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        reached.append(scope["path"])

    async def send(message: Any) -> None:
        sent.append(message)

    headers = [] if header is None else [(b"authorization", header)]
    state = SimpleNamespace(state=SimpleNamespace(service=SimpleNamespace(metrics=Metrics())))
    scope = {"type": "http", "method": "GET", "path": path, "root_path": root, "headers": headers, "app": state}
    asyncio.run(BearerKeys(app, ["other", "key"])(scope, None, send))  # type: ignore[arg-type]
    assert bool(reached) == (allowed or not guarded)
    assert bool(reached) or sent[0]["status"] == 401
