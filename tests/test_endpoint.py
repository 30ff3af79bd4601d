"""OpenAIPolicy over a server of the tests' own: what it asks for, where steps end, and what it makes of failures."""

from __future__ import annotations

import asyncio
import math
from typing import Any

import openai
import pytest
from endpoints import ANSWER, STEPS, Server

from prm_search import Backoff, Budget, OpenAIPolicy, Sampling, SearchTree, StepRule, asearch, search
from prm_search.driver.loop import SearchLoop
from prm_search.driver.search_settings import SearchSettings
from prm_search.next_token import NextToken
from prm_search.policies.endpoint.aligned import TokenAligner, spread
from prm_search.policies.endpoint.client import ServerToken
from prm_search.policies.endpoint.retry import described, http_library, passes, retry_after
from prm_search.protocols import RequestFailed
from prm_search.strategies import Beam, BestOfN
from prm_search.tree import Prompt

CHAT = [{"role": "user", "content": "2 + 3?"}]
GREEDY: dict[str, Any] = {"strategy": Beam(1, 1, value=lambda node: 0.0), "temperature": 0.0, "max_new_tokens": 200}


def answer_of(policy: OpenAIPolicy, prompt: Any = "Q:", **given: Any) -> Any:
    (result,) = search([prompt], policy=policy, **{**GREEDY, **given})
    return result


def steps_of(result: Any) -> list[str]:
    return [node.text for node in result.node.path()]


# -- where steps end --------------------------------------------------------------------------------------------------

KINDS = {
    "plain": {},
    "keeps": {"keeps": True},
    "names": {"names": True},
    "one choice": {"several": False},
    "no tokens": {"logprobs": False},
    "no tokens, keeps": {"logprobs": False, "keeps": True},
    "no tokens, large chunks": {"logprobs": False, "chunk": 7},
    "large chunks": {"chunk": 7},
    "single characters": {"size": 1},
    "long tokens": {"size": 40},
    "bytes": {"hollow": True},
}


@pytest.mark.parametrize("prompt", ["Q:", CHAT], ids=["text", "chat"])
@pytest.mark.parametrize("kind", KINDS)
def test_steps_end_where_the_rule_says(kind: str, prompt: Any) -> None:
    server = Server(**KINDS[kind])
    with server.policy() as policy:
        result = answer_of(policy, prompt)
    assert result.text == ANSWER
    assert result.node.finish == "stop"
    steps = steps_of(result)
    if server.size == 3 and server.chunk == 1:
        # A token that spells more than the delimiter belongs to the step whole, as it does on every engine.
        cut = server.logprobs and not server.keeps and not server.names
        assert [step.strip() for step in steps] == [step.strip() for step in STEPS] or cut
    if server.size == 1 or not server.logprobs or server.keeps or server.names:
        assert [step for step in steps if step] == list(STEPS)
    assert "".join(steps) == ANSWER


def test_a_token_is_never_split_where_the_server_tells_tokens() -> None:
    with Server(size=5).policy() as policy:
        steps = steps_of(answer_of(policy))
    tokens = [ANSWER[i : i + 5] for i in range(0, len(ANSWER), 5)]
    expected, text = [], ""
    for token in tokens:
        text += token
        if "\n\n" in text:
            expected.append(text)
            text = ""
    assert [step for step in steps if step] == [*expected, text]


def test_what_a_server_leaves_to_it_is_found_here() -> None:
    rule = StepRule(delimiter=[":", ".", "=", "+", "\n\n", "!"])
    for server in (Server(size=1, keeps=True), Server(size=1, names=True), Server(size=1), Server(logprobs=False)):
        with server.policy() as policy:
            result = answer_of(policy, steps=rule)
            local = rule.ends(list(ANSWER.encode()), lambda byte: bytes([byte]))
        starts = [0, *local]
        expected = [ANSWER[a:b] for a, b in zip(starts, local, strict=False)]
        assert [step for step in steps_of(result) if step] == expected
        assert all(len(body.get("stop", ())) <= 4 for body in server.streamed)
        assert any("stop" in body for body in server.streamed) == (server.keeps or server.names)


def test_patterns_and_leading_delimiters_end_steps_as_they_do_on_every_engine() -> None:
    rule = StepRule(delimiter=None, regex=r"\d+ = \d+\.")
    with Server(size=1).policy() as policy:
        assert steps_of(answer_of(policy, steps=rule))[0] == STEPS[0] + "Then we see: 2 + 3 = 5."
    with Server(answer="\n\nOne.\n\n\n\nTwo.", size=1, keeps=True).policy() as policy:
        assert [step for step in steps_of(answer_of(policy)) if step] == ["\n\nOne.\n\n", "\n\nTwo."]


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("kind", ["plain", "keeps", "names", "no tokens"])
def test_stop_strings_end_a_response_kept_or_not(kind: str, keep: bool) -> None:
    server = Server(**{"size": 1, **KINDS[kind]})
    with server.policy() as policy:
        result = answer_of(policy, stop=["3 =", "never"], include_stop_str=keep)
    assert result.text == ANSWER[: ANSWER.index("3 =")] + ("3 =" if keep else "")
    assert result.node.finish == "stop"


def test_characters_that_tokens_split_stay_whole() -> None:
    answer = "naïve → café 😀.\n\nüber"
    for prompt in ("Q:", CHAT):
        with Server(answer=answer, hollow=True).policy() as policy:
            result = answer_of(policy, prompt)
            assert result.text == answer
            assert len(result.token_ids) == len(answer.encode()) + 1  # and the end of sequence
            assert answer_of(policy, prompt, max_new_tokens=5).text == "naïv"  # i with two dots is two tokens


def test_caps_cut_a_step_and_a_response() -> None:
    for server in (Server(), Server(logprobs=False), Server(logprobs=False, keeps=True)):
        with server.policy() as policy:
            result = answer_of(policy, steps=StepRule(None, max_tokens=2), max_new_tokens=7)
        assert [len(node.token_ids) for node in result.node.path()] == [2, 2, 2, 1]
        assert (result.text, result.node.finish, result.stopped) == (ANSWER[:21], "length", "length")
        assert all(body["max_tokens"] <= 2 for body in server.streamed)


def test_log_probabilities_are_the_servers() -> None:
    with Server().policy() as policy:
        node, *_, last = answer_of(policy).node.path()
    assert node.logprobs is not None
    assert set(node.logprobs.tolist()) == {-0.5}
    assert last.logprobs is None  # of the end of sequence the server tells none
    tree = SearchTree(Prompt(text="Q:"))
    with Server(logprobs=False).policy() as policy, pytest.raises(RequestFailed, match="confidence"):
        policy.expand([tree.root], 1, sampling=Sampling(StepRule(confidence=0.5)))


TOPS = {" Yes": 0.5, "yes": 0.25, "No": 0.125}


@pytest.mark.parametrize("prompt", ["Q:", CHAT], ids=["text", "chat"])
def test_likeliest_tokens_give_confidences_and_ends_of_steps(prompt: Any) -> None:
    with Server(tops=TOPS).policy() as policy:
        assert policy.top_tokens == 3
        result = answer_of(policy, prompt, confidence_tokens=2, max_new_tokens=7)
        for node in result.node.path():
            assert node.confidences == pytest.approx([-math.log(0.5 * 0.25) / 2] * len(node.token_ids))
        unsure = answer_of(policy, prompt, steps=StepRule(None, confidence=0.6), max_new_tokens=4)
        assert [len(node.token_ids) for node in unsure.node.path()] == [1, 1, 1, 1]
        sure = answer_of(policy, prompt, steps=StepRule(None, confidence=0.4), max_new_tokens=4)
        assert [len(node.token_ids) for node in sure.node.path()] == [4]
    with Server().policy() as policy, pytest.raises(ValueError, match="confidence_tokens=2"):
        answer_of(policy, prompt, confidence_tokens=2)


@pytest.mark.parametrize("prompt", [Prompt(text="Q:"), Prompt(messages=tuple(CHAT))], ids=["text", "chat"])
def test_judges_are_told_how_probable_words_are(prompt: Prompt) -> None:
    server = Server(tops=TOPS)
    tree = SearchTree(prompt)
    with server.policy() as policy:
        asked = len(server.bodies)
        asks = [NextToken(tree, prompt, "Right?"), NextToken(tree, prompt, "Right?"), NextToken(tree, prompt)]
        told = policy.next_token_logprobs(asks, ["yes", "no", "maybe"])
        assert len(server.bodies) - asked == 2  # equal texts are asked once
        assert told == [{"yes": pytest.approx(math.log(0.75)), "no": pytest.approx(math.log(0.125))}] * 3
        assert tree.meter.counts["encoded", policy.id] > 0
    with Server().policy() as policy, pytest.raises(TypeError, match="tells no log-probabilities"):
        policy.next_token_logprobs(asks, ["yes"])


# -- what is asked for ------------------------------------------------------------------------------------------------


def test_children_of_a_node_are_choices_of_one_request() -> None:
    server = Server(keeps=True)
    options: dict[str, Any] = {"temperature": 0.5, "max_new_tokens": 200, "seed": 4}
    with server.policy() as policy:
        (result,) = search(["Q:"], policy=policy, strategy=BestOfN(5), **options)
        assert [node.count for node in result.candidates] == [5]
        (body,) = server.streamed
        assert body["n"] == 5
        search(["Q:"], policy=policy, strategy=BestOfN(5), **options)
        assert server.streamed[1]["seed"] == body["seed"]
        search(["Q:"], policy=policy, strategy=BestOfN(5), **{**options, "seed": 5})
        assert server.streamed[2]["seed"] != body["seed"]
    alone = Server(several=False)
    with alone.policy(seeds=False) as policy:
        search(["Q:"], policy=policy, strategy=BestOfN(5), **options)
    assert [body.get("n", 1) for body in alone.streamed] == [1] * 5
    assert not any("seed" in body for body in alone.streamed)


def test_a_strict_server_is_sent_nothing_that_it_does_not_know() -> None:
    server = Server(strict=True, completions=False, continues="prefix")
    with server.policy() as policy:
        assert policy.facts.limit_field == "max_completion_tokens"
        server.bodies.clear()
        assert answer_of(policy, CHAT).text == ANSWER
    assert all("max_tokens" not in body and "top_k" not in body for body in server.streamed)
    assert server.streamed[-1]["messages"][-1]["prefix"] is True


def test_no_more_requests_than_allowed_are_under_way() -> None:
    server = Server(several=False)
    with server.policy(concurrency=3) as policy:
        search(["Q:"], policy=policy, strategy=BestOfN(12), temperature=1.0)
    assert len(server.streamed) == 12
    assert server.most <= 3


# -- what a server can do ---------------------------------------------------------------------------------------------


def test_what_a_server_can_do_is_found_out_once() -> None:
    server = Server(keeps=True)
    with server.policy() as policy:
        facts, asked = policy.facts, len(server.bodies)
        assert facts.completions is not None
        assert facts.completions.keeps
        assert (facts.continues, facts.trims, facts.drops_thoughts, facts.n) == (
            "continue_final_message", False, False, True,
        )  # fmt: skip
        assert str(facts) == (
            "completions by text, with log-probabilities; "
            "chat continued by continue_final_message, with log-probabilities"
        )
        answer_of(policy)
        assert len(server.bodies) - asked == len(server.streamed)


def test_a_chat_that_cannot_be_continued_is_refused() -> None:
    with Server(continues=None).policy() as policy:
        assert answer_of(policy).text == ANSWER  # by completions
        with pytest.raises(ValueError, match=r"prompts\[0\]: .*neither continue_final_message nor prefix"):
            answer_of(policy, CHAT)
    for server in (Server(continues=None, completions=False), Server(continues="prefix", usage="missing")):
        refused = pytest.raises(ValueError, match="neither continue_final_message nor prefix")
        with refused, server.policy(mode="chat"):
            pass
    with Server(continues="prefix", usage="missing").policy(mode="chat", continuation="prefix") as policy:
        assert answer_of(policy, CHAT).text == ANSWER


def test_a_template_that_drops_white_space_is_seen_and_lived_with() -> None:
    server = Server(trims=True, completions=False, size=1)
    with server.policy() as policy:
        assert policy.facts.trims
        assert "drops white space" in str(policy.facts)
        result = answer_of(policy, CHAT)
    assert [step for step in steps_of(result) if step] == list(STEPS)
    with Server(trims=True, completions=False, logprobs=False).policy() as policy:
        assert answer_of(policy, CHAT).text == ANSWER


def test_a_template_that_drops_thoughts_fails_by_name() -> None:
    with Server(answer="<think>\n\nHm.\n\n</think>\n\nSo 5.\n\nYes.", drops=True, size=1).policy() as policy:
        result = answer_of(policy, CHAT)
        assert result.stopped == "failed"
        assert "drops <think> blocks" in result.failure
        assert answer_of(policy).text.endswith("Yes.")


def test_prompts_that_the_server_has_no_route_for_are_refused() -> None:
    with Server(chat=False).policy() as policy:
        with pytest.raises(ValueError, match="only /completions"):
            answer_of(policy, CHAT)
        with pytest.raises(ValueError, match="is sent text"):
            answer_of(policy, [1, 2, 3])
    with Server(completions=False).policy() as policy, pytest.raises(ValueError, match="takes chat messages"):
        answer_of(policy)


@pytest.mark.parametrize(
    ("server", "options", "message"),
    [
        (Server(models=["other"]), {}, "model='m': .* does not have it; it has other"),
        (Server(key="secret"), {"api_key": "wrong"}, "api_key: .* refuses it: HTTP 401"),
        (Server(completions=False), {"mode": "completions"}, "has no such route: HTTP 404"),
        (Server(completions=False, chat=False), {}, "takes neither completions"),
        (Server(), {"mode": "text"}, "mode='text': one of auto, completions, chat"),
        (Server(), {"concurrency": 0}, "concurrency"),
        (Server(), {"timeout": 0}, "timeout"),
        (Server(), {"continuation": "yes"}, "continuation"),
    ],
)
def test_what_cannot_be_is_refused_when_the_policy_is_made(
    server: Server, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message), server.policy(**options):
        pass


def test_a_server_that_is_not_there_is_named() -> None:
    with pytest.raises(ConnectionError, match=r"http://127\.0\.0\.1:1/v1 cannot be reached"):
        OpenAIPolicy("http://127.0.0.1:1/v1", "m", backoff=Backoff(tries=1))
    with pytest.raises(TypeError, match="backoff must be a Backoff"):
        OpenAIPolicy("http://127.0.0.1:1/v1", "m", backoff=3)  # type: ignore[arg-type]


# -- failures ---------------------------------------------------------------------------------------------------------


def test_what_passes_is_tried_again() -> None:
    waits: list[float] = []

    async def sleep(seconds: float) -> None:
        waits.append(seconds)

    for fault in (429, 500, 503, "cut", "error"):
        server = Server(keeps=True)
        with server.policy(sleep=sleep) as policy:
            server.faults.extend([fault, fault])
            result = answer_of(policy)
        assert result.text == ANSWER
        assert len(server.streamed) == len(STEPS) + 2
        dropped = {"cut": 4, "error": 4}.get(str(fault), 0)  # two tokens of each try came
        assert result.usage.sampled_tokens["policy"] == len(result.token_ids) + dropped
    assert len(waits) == 10
    assert all(0.25 <= first <= 0.5 <= second <= 1 for first, second in zip(waits[::2], waits[1::2], strict=True))


def test_a_server_that_says_when_is_obeyed() -> None:
    waits: list[float] = []

    async def sleep(seconds: float) -> None:
        waits.append(seconds)

    server = Server(retry_after="7")
    with server.policy(sleep=sleep, backoff=Backoff(longest=30)) as policy:
        server.faults.extend([429, 429])
        assert answer_of(policy).text == ANSWER
        server.retry_after = "3600"
        server.faults.append(429)
        assert answer_of(policy).text == ANSWER
    assert waits == [7.0, 7.0, 30.0]


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_request_that_fails_ends_no_other_search(asynchronous: bool) -> None:
    server = Server(keeps=True, poison="bad")
    prompts = ["Q1:", "bad:", "Q3:"]
    with server.policy(backoff=Backoff(tries=3)) as policy:
        if asynchronous:

            async def go() -> Any:
                try:
                    return await asearch(prompts, policy=policy, **GREEDY)
                finally:
                    await policy.aclose()

            results = asyncio.run(go())
        else:
            results = search(prompts, policy=policy, **GREEDY)
    assert [result.stopped for result in results] == ["finished", "failed", "finished"]
    assert [result.text for result in results] == [ANSWER, "", ANSWER]
    assert "HTTP 500: try again" in results[1].failure
    assert [body["prompt"] for body in server.streamed].count("bad:") == 3


def test_what_would_fail_again_is_not_tried_again() -> None:
    server = Server()
    with server.policy() as policy:
        server.faults.append(400)
        assert answer_of(policy).stopped == "failed"
        assert len(server.streamed) == 1
        tree = SearchTree(Prompt(text="Q:"))
        server.faults.append(400)
        with pytest.raises(RequestFailed, match="HTTP 400"):
            policy.expand([tree.root], 2, sampling=Sampling(StepRule()))


def test_what_a_request_drew_before_it_was_given_up_is_counted() -> None:
    server = Server(keeps=True)
    with server.policy(backoff=Backoff(tries=1)) as policy:
        server.faults.append("cut")
        result = answer_of(policy)
    assert result.stopped == "failed"
    assert "the stream ended before its answers did" in result.failure
    assert result.usage.sampled_tokens == {"policy": 2}


@pytest.mark.parametrize("count", [0, -3, 10**9, "missing"])
def test_wrong_counts_are_not_believed(count: Any) -> None:
    with Server(logprobs=False, usage=count, completions=True, chat=False).policy() as policy:
        result = answer_of(policy)
        cut = answer_of(policy, max_new_tokens=7)
    assert result.text == ANSWER
    # By the chunks: of 3 characters each, one more where a step ends in its middle.
    assert len(ANSWER) // 3 <= len(result.token_ids) <= len(ANSWER) // 3 + 5
    assert len(cut.token_ids) == 7
    assert any("the server's count" in note for note in result.usage.notes)
    if count == 10**9:
        assert any("impossible" in note for note in result.usage.notes)


def test_a_cancelled_search_closes_its_connection() -> None:
    server = Server()
    with server.policy() as policy:
        server.faults.append("hold")

        async def go() -> None:
            task = asyncio.create_task(asearch(["Q:"], policy=policy, **GREEDY))
            await asyncio.to_thread(server.held.wait)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            await policy.aclose()

        asyncio.run(go())
        server.go.set()
        server.closed.wait()
        assert not policy._running


def test_time_that_is_up_keeps_what_was_drawn() -> None:
    now = [0.0]
    server = Server()
    with server.policy() as policy, SearchLoop(policy, clock=lambda: now[0]) as loop:
        server.faults.append("hold")
        settings = SearchSettings.make(**GREEDY, budget=Budget(seconds=1))
        loop.add(Prompt(text="Q:"), settings)
        loop.step()
        server.held.wait()
        now[0] = 2.0
        results = []
        while not results:
            results = loop.step()
        server.go.set()
    (result,) = results
    assert result.stopped == "seconds"
    assert ANSWER.startswith(result.text)
    assert result.node.finish == "budget"


def test_errors_that_pass() -> None:
    httpx = http_library()
    request = httpx.Request("POST", "http://x/v1")
    assert passes(openai.APITimeoutError(request))
    assert passes(openai.APIConnectionError(request=request))
    assert passes(httpx.RemoteProtocolError("cut"))
    assert not passes(ValueError())

    def status(code: int, **headers: str) -> openai.APIStatusError:
        return openai.APIStatusError("no", response=httpx.Response(code, headers=headers, request=request), body=None)

    assert [code for code in (400, 401, 404, 408, 409, 422, 429, 500, 529) if passes(status(code))] == [
        408, 409, 429, 500, 529,
    ]  # fmt: skip
    assert retry_after(status(429, **{"retry-after": "2"})) == 2
    assert retry_after(status(429, **{"retry-after-ms": "250"})) == 0.25
    assert retry_after(status(429, **{"retry-after": "Wed, 21 Oct 2015 07:28:00 GMT"})) == 0
    assert retry_after(status(429, **{"retry-after": "soon"})) is None
    assert retry_after(status(429)) is None
    assert described(status(500)) == "HTTP 500: no"
    with pytest.raises(ValueError, match="tries"):
        Backoff(tries=0)
    with pytest.raises(ValueError, match="longest"):
        Backoff(longest=float("inf"))


# -- text and tokens --------------------------------------------------------------------------------------------------


def told(*tokens: bytes | None) -> list[ServerToken]:
    return [ServerToken(token, -float(place)) for place, token in enumerate(tokens)]


@pytest.mark.parametrize(
    ("text", "tokens", "pieces"),
    [
        ("ab cd", [b"ab", b" cd"], [b"ab", b" cd"]),
        ("ab", [b" ab"], [b"ab"]),  # the space before the first word
        ("é!", [None, None, b"!"], [b"", "é".encode(), b"!"]),
        ("é!", [b"\xc3", b"\xa9", b"!"], [b"", "é".encode(), b"!"]),
        ("end", [b"end", b"<eos>"], [b"end", b""]),
        ("a\n", [b"a", b"\n\nb"], [b"a", b"\n"]),  # cut by a stop string
        ("Hello there", ["ĠHello".encode(), "Ġthere".encode()], [b"Hello ", b"there"]),
        ("left", [], [b"left"]),
    ],
)
def test_a_text_is_cut_into_its_tokens(text: str, tokens: list[bytes | None], pieces: list[bytes]) -> None:
    aligner = TokenAligner()
    aligner.feed(text, told(*tokens))
    cut = aligner.take(last=True)
    assert b"".join(data for data, _ in cut) == text.encode()
    assert [len(data) > 0 for data, _ in cut] == [len(piece) > 0 for piece in pieces]
    if tokens and tokens[0] != "ĠHello".encode():
        assert [data for data, _ in cut] == pieces


def test_text_that_comes_behind_its_tokens_is_waited_for() -> None:
    aligner = TokenAligner()
    aligner.feed("", told(b"ab", b"cd"))
    assert aligner.take() == []
    aligner.feed("abc", [])
    assert [data for data, _ in aligner.take()] == [b"ab"]
    aligner.feed("d", [])
    assert [data for data, _ in aligner.take()] == [b"cd"]


def test_tokens_that_spell_nothing_of_the_text_share_it() -> None:
    aligner = TokenAligner()
    pieces = []
    for character in "abcdefghijklmnopqrstuvwxyz" * 2:
        aligner.feed(character, told("Ġ?".encode()))
        pieces += aligner.take()
    pieces += aligner.take(last=True)
    assert b"".join(data for data, _ in pieces) == b"abcdefghijklmnopqrstuvwxyz" * 2
    assert len(pieces) == 52


@pytest.mark.parametrize(
    ("text", "count", "ends", "pieces"),
    [
        ("abcdef", 3, [], ["ab", "cd", "ef"]),
        ("abcdef", 1, [2, 4], ["ab", "cd", "ef"]),
        ("abcdef", 4, [1], ["a", "bc", "de", "f"]),
        ("ab", 4, [], ["", "a", "", "b"]),
        ("abcdef", 3, [6], ["ab", "cd", "ef"]),
    ],
)
def test_a_text_is_spread_over_a_count_of_tokens(text: str, count: int, ends: list[int], pieces: list[str]) -> None:
    cut = spread(text, count, ends)
    assert b"".join(cut).decode() == text
    assert len(cut) == max(count, len(pieces))
    places = [sum(map(len, cut[:place])) for place in range(len(cut) + 1)]
    assert set(ends) <= set(places)
    assert sorted(map(len, cut)) == sorted(map(len, pieces))
