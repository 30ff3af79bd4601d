"""The server over the HF engine, through the real OpenAI client and through raw requests."""

from __future__ import annotations

import http.client
import json
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import openai
import pytest
from pairs import byte_tokenizer, llama
from servers import Served, serving, until

from prm_search import HFPolicy, ImplicitPRM, StepRule, search
from prm_search.demo import pair_dir
from prm_search.protocols import Request
from prm_search.serving.app import make_app
from prm_search.serving.backend import ThreadEngine
from prm_search.serving.limits import Limits
from prm_search.serving.text import whole_text
from prm_search.strategies import DVTS, Beam, BestOfN, DeepConf, Lookahead, SelfConsistency, Steer, Strategy
from prm_search.tree import Node, Prompt, SearchTree

PROMPT, OTHER = "=5a*7b+3c*9d+8?", "=2a+2b*6?"
STEPS = StepRule(delimiter=";")
BEAM: dict[str, Any] = {"strategy": "beam", "width": 2, "expansions": 2}


class Demo:
    """The shipped pair, and a server over it."""

    def __init__(self, served: Served, policy: Waiting, pair: ImplicitPRM) -> None:
        self.served, self.policy, self.pair = served, policy, pair
        self.client = served.client()

    def ask(self, prompt: Any = PROMPT, **given: Any) -> Any:
        guidance = given.pop("prm_guidance", None)
        extra = {} if guidance is None else {"prm_guidance": guidance}
        extra |= given.pop("extra_body", {})
        options = {"model": "demo", "max_tokens": 60, "seed": 3} | given
        return self.client.completions.create(prompt=prompt, extra_body=extra, **options)

    def search(self, strategy: Strategy, prompt: str = PROMPT, **given: Any) -> Any:
        options = {"steps": STEPS, "max_new_tokens": 60, "temperature": 1.0, "seed": 3} | given
        return search([prompt], policy=self.policy, scorer=self.pair, strategy=strategy, **options)[0]

    def kv(self) -> int:
        return sum(lm.tree.used for lm in {self.policy.lm, self.pair.prm, self.pair.reference})


class Waiting(HFPolicy):
    """An HFPolicy that stands still at times: how fast a machine is decides nothing.

    Attributes:
        gathering: it draws nothing before so many searches have come.
        calls: it draws for so many calls yet; None: for ever.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.gathering, self.calls = 0, None
        self.came: set[SearchTree] = set()

    def submit(self, requests: Sequence[Request]) -> None:
        self.came.update(request.node.tree for request in requests)
        super().submit(requests)

    def advance(self) -> list[tuple[Request, list[Node]]]:
        if len(self.came) < self.gathering or self.calls == 0:
            time.sleep(0.001)
            return []
        self.calls = None if self.calls is None else self.calls - 1
        return super().advance()


@pytest.fixture(scope="module")
def demo(float64_models: None) -> Iterator[Demo]:
    policy = Waiting.from_pretrained(pair_dir() / "policy")
    pair = ImplicitPRM.from_pretrained(pair_dir())
    limits = Limits(searches=40, body_bytes=20_000, max_tokens=100, children=64, patterns=True)
    app = make_app(lambda: ThreadEngine.of_hf(policy, pair), ["demo", "other-name"], limits=limits, steps=STEPS)
    with serving(app) as served:
        yield Demo(served, policy, pair)
    assert Demo(served, policy, pair).kv() == 0


def joined(stream: Any) -> tuple[str, str, list[Any]]:
    """Text, finish reason and chunks of a streamed completion."""
    chunks = list(stream)
    choices = [choice for chunk in chunks for choice in chunk.choices]
    return "".join(choice.text for choice in choices), choices[-1].finish_reason, chunks


# -- the same searches as in the library ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("guidance", "strategy"),
    [
        (BEAM, Beam(2, 2)),
        ({"strategy": "best_of_n", "n": 3, "value": "min"}, BestOfN(3, "min")),
        ({"strategy": "lookahead", "width": 2, "expansions": 2, "lookahead_steps": 2}, Lookahead(2, 2, 2)),
        ({"strategy": "dvts", "subtrees": 2, "expansions": 2}, DVTS(2, 1, 2)),
        ({"strategy": "steer", "alpha": 2.0, "n": 2}, Steer(2.0, 2)),
        ({"strategy": "self_consistency", "n": 6, "stop": "beta"}, SelfConsistency(6, "beta")),
        ({"strategy": "deep_conf", "warmup": 2, "deep_conf_budget": 5, "window": 4096}, DeepConf(2, 5, window=4096)),
    ],
)
def test_a_guided_request_is_a_search(demo: Demo, guidance: dict[str, Any], strategy: Strategy) -> None:
    expected = demo.search(strategy)
    answer = demo.ask(prm_guidance=guidance | {"return_candidates": True})
    assert answer.choices[0].text == expected.text
    (facts,) = answer.prm_search
    assert facts["stopped"] == expected.stopped
    assert facts["value"] == pytest.approx(expected.value, abs=1e-5)
    assert [each["text"] for each in facts["candidates"]] == [node.path_text() for node in expected.candidates]
    for said, node in zip(facts["candidates"], expected.candidates, strict=True):
        assert "".join(step["text"] for step in said["steps"]) == said["text"]
        assert [step["reward"] for step in said["steps"]] == pytest.approx([s.reward for s in node.path()], abs=1e-5)
        assert said["steps"][-1]["q"] == said["q"] == pytest.approx(node.q, abs=1e-5)
    usage, detail = answer.usage, answer.usage.prm_search
    assert usage.prompt_tokens == len(expected.tree.prompt_ids)
    assert usage.completion_tokens == sum(expected.usage.sampled_tokens.values())
    assert detail["sampled_tokens"] == expected.usage.sampled_tokens
    assert detail["encoded_tokens"] == expected.usage.encoded_tokens
    # How many are found cached, if any, depends on what happens to be scored together.
    assert set(detail["cached_tokens"]) <= {*expected.usage.cached_tokens, "prm"}
    assert detail["forward_calls"]["policy"] > 0


def test_steer_with_candidates_needs_no_steered_policy(demo: Demo) -> None:
    guidance = {"strategy": "steer", "below": 0.6, "candidates": 2, "confidence_of": "drawn"}
    answer = demo.ask(prm_guidance=guidance | {"return_candidates": True})
    (facts,) = answer.prm_search
    assert facts["stopped"] == "finished"
    assert answer.choices[0].text == facts["candidates"][0]["text"]
    for wrong, param in (({"alpha": 1.0}, "prm_guidance.alpha"), ({"candidates": None}, "prm_guidance.below")):
        with pytest.raises(openai.BadRequestError) as error:
            demo.ask(prm_guidance=guidance | wrong)
        assert error.value.param == param


def test_alpha_steers_any_strategy(demo: Demo) -> None:
    steered = Steer(1.5).wrap(demo.policy, demo.pair)
    options: dict[str, Any] = {"steps": STEPS, "max_new_tokens": 60, "temperature": 1.0, "seed": 3}
    (expected,) = search([PROMPT], policy=steered, scorer=demo.pair, strategy=Beam(2, 2), **options)
    assert demo.ask(prm_guidance=BEAM | {"alpha": 1.5}).choices[0].text == expected.text


def test_n_choices_are_the_best_distinct_candidates(demo: Demo) -> None:
    expected = demo.search(BestOfN(12), temperature=1.5)
    answer = demo.ask(n=3, temperature=1.5, prm_guidance={"strategy": "best_of_n", "n": 12})
    assert [choice.text for choice in answer.choices] == [node.path_text() for node in expected.candidates[:3]]
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    assert len({choice.text for choice in answer.choices}) == 3


def test_voting_and_answers(demo: Demo) -> None:
    guidance = {"strategy": "best_of_n", "n": 6, "select": "majority", "answer": "number"}
    expected = demo.search(BestOfN(6), select="majority", answer="number")
    answer = demo.ask(prm_guidance=guidance)
    assert answer.choices[0].text == expected.text
    assert answer.prm_search[0]["answer"] == expected.answer is not None


def test_budgets_cut_and_say_so(demo: Demo) -> None:
    answer = demo.ask(prm_guidance=BEAM | {"budget": {"tokens": 24}})
    assert answer.usage.completion_tokens <= 24
    assert answer.prm_search[0]["stopped"] == "tokens"
    assert answer.choices[0].finish_reason == "length"


# -- plain sampling ---------------------------------------------------------------------------------------------------


def test_a_plain_request_is_sampling_and_costs_no_scoring(demo: Demo) -> None:
    expected = demo.search(BestOfN(1))
    answer = demo.ask()
    assert answer.choices[0].text == expected.text
    assert answer.choices[0].finish_reason == "stop"
    assert set(answer.usage.prm_search["encoded_tokens"]) == {"policy"}
    assert answer.usage.completion_tokens == len(expected.token_ids)
    assert "prm_search" not in answer.model_extra
    short = demo.ask(max_tokens=5)
    assert short.choices[0].finish_reason == "length"
    assert answer.choices[0].text.startswith(short.choices[0].text)
    assert short.usage.completion_tokens == 5
    assert demo.ask(max_tokens=openai.omit).usage.completion_tokens == 16


def test_seeds_samples_and_prompts(demo: Demo) -> None:
    same = [demo.ask(temperature=1.8, n=6) for _ in range(2)]
    texts = [[choice.text for choice in answer.choices] for answer in same]
    assert texts[0] == texts[1]
    assert len(texts[0]) == 6
    assert len(set(texts[0])) > 1
    free = {demo.ask(temperature=1.8, seed=openai.omit).choices[0].text for _ in range(4)}
    assert len(free) > 1
    greedy = demo.ask(temperature=0, n=3)
    assert len(greedy.choices) == 3
    assert len({choice.text for choice in greedy.choices}) == 1
    several = demo.ask(prompt=[PROMPT, OTHER, PROMPT], temperature=1.8)
    assert [choice.index for choice in several.choices] == [0, 1, 2]
    assert several.choices[0].text == demo.ask(temperature=1.8).choices[0].text
    assert several.choices[0].text != several.choices[2].text  # equal prompts of one request draw differently
    ids = list(demo.policy.encode(Prompt(text=PROMPT)))
    assert demo.ask(prompt=[ids]).choices[0].text == demo.ask().choices[0].text


@pytest.mark.parametrize("guidance", [None, BEAM])
@pytest.mark.parametrize("stream", [False, True])
def test_stop_strings_end_a_response_and_are_no_part_of_it(demo: Demo, guidance: Any, stream: bool) -> None:
    whole = demo.ask(prm_guidance=guidance).choices[0].text
    stop = [whole[8:10], "never"]
    answer = demo.ask(prm_guidance=guidance, stop=stop, stream=stream)
    if stream:
        text, reason, _ = joined(answer)
    else:
        text, reason = answer.choices[0].text, answer.choices[0].finish_reason
    assert reason == "stop"
    assert stop[0] not in text
    if guidance is None:
        assert text == whole[: whole.index(stop[0])]


@pytest.mark.parametrize("guidance", [None, BEAM, {"strategy": "best_of_n", "n": 3}])
@pytest.mark.parametrize("stop", [False, True])
def test_log_probabilities_of_the_choice(demo: Demo, guidance: Any, stop: bool) -> None:
    whole = demo.ask(prm_guidance=guidance, logprobs=0).choices[0]
    expected = {} if guidance is None else {"strategy": "beam"} | guidance
    if guidance is not None:
        strategy = Beam(2, 2) if expected["strategy"] == "beam" else BestOfN(3)
        node = demo.search(strategy).node
        near = pytest.approx([float(each) for step in node.path() for each in step.logprobs], abs=1e-4)
        assert whole.logprobs.token_logprobs == near
    assert "".join(whole.logprobs.tokens).startswith(whole.text)
    assert whole.logprobs.top_logprobs is None
    given: dict[str, Any] = {"stop": [whole.text[9:11]]} if stop else {}
    asked = demo.ask(prm_guidance=guidance, logprobs=1, **given).choices[0]
    starts = dict(zip(asked.logprobs.text_offset, asked.logprobs.tokens, strict=True))
    assert all(asked.text[at:].startswith(token) for at, token in starts.items() if at + len(token) <= len(asked.text))
    assert all(at < len(asked.text) for at in starts) or not stop
    chunks = [chunk.choices[0] for chunk in demo.ask(prm_guidance=guidance, logprobs=1, stream=True, **given)]
    told = [chunk.logprobs for chunk in chunks if chunk.logprobs]
    for name in ("tokens", "text_offset"):
        assert [each for part in told for each in getattr(part, name)] == getattr(asked.logprobs, name)
    joined_numbers = [each for part in told for each in part.token_logprobs]
    assert joined_numbers == pytest.approx(asked.logprobs.token_logprobs, abs=1e-4)
    assert demo.ask(prm_guidance=guidance).choices[0].logprobs is None


# -- streams ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "guidance",
    [
        None, BEAM, {"strategy": "best_of_n", "n": 4}, {"strategy": "best_of_n", "n": 1}, BEAM | {"select": "majority"},
        {"strategy": "dvts", "subtrees": 2}, {"strategy": "steer", "alpha": 1.0},
    ],
)  # fmt: skip
def test_a_stream_says_what_a_whole_answer_says(demo: Demo, guidance: Any) -> None:
    for seed in range(2):
        whole = demo.ask(prm_guidance=guidance, seed=seed)
        stream = demo.ask(prm_guidance=guidance, seed=seed, stream=True, stream_options={"include_usage": True})
        text, reason, chunks = joined(stream)
        assert text == whole.choices[0].text
        assert reason == whole.choices[0].finish_reason
        assert chunks[-1].choices == []
        assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
        if guidance is not None:
            (said,), (facts,) = chunks[-2].prm_search, whole.prm_search
            near = pytest.approx(facts["value"], abs=1e-5)  # it was computed in other batches
            assert said == facts | {"value": near}


def test_steps_are_streamed_as_they_are_settled(demo: Demo) -> None:
    for guidance in (None, {"strategy": "beam", "width": 1, "expansions": 4}):
        text, _, chunks = joined(demo.ask(prm_guidance=guidance, stream=True))
        pieces = [chunk.choices[0].text for chunk in chunks if chunk.choices[0].text]
        assert len(pieces) == text.count(";") + 1
        assert "".join(pieces) == text


def test_progress_comes_as_chunks_without_choices(demo: Demo) -> None:
    stream = demo.ask(prm_guidance=BEAM | {"progress": True}, stream=True)
    text, _, chunks = joined(stream)
    told = [chunk.prm_search[0] for chunk in chunks if not chunk.choices]
    assert text == demo.ask(prm_guidance=BEAM).choices[0].text
    nodes = demo.search(Beam(2, 2)).tree.nodes[1:]
    assert sorted(step["text"] for each in told for step in each["steps"]) == sorted(node.text for node in nodes)
    assert not any(chunk.usage for chunk in chunks)


def test_several_prompts_and_choices_in_a_stream(demo: Demo) -> None:
    for guidance in (None, {"strategy": "best_of_n", "n": 4}):
        given: dict[str, Any] = {"prompt": [PROMPT, OTHER], "n": 2, "prm_guidance": guidance, "temperature": 1.5}
        whole = demo.ask(**given)
        texts = {choice.index: "" for choice in whole.choices}
        for chunk in demo.ask(**given, stream=True):
            for choice in chunk.choices:
                texts[choice.index] += choice.text
        assert texts == {choice.index: choice.text for choice in whole.choices}


# -- chat, and characters of several tokens ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def chat() -> Iterator[tuple[Served, HFPolicy]]:
    tokenizer = byte_tokenizer()
    policy = HFPolicy(llama(1), tokenizer)
    pair = ImplicitPRM(llama(2), llama(3), tokenizer=tokenizer)
    with serving(make_app(lambda: ThreadEngine.of_hf(policy, pair), ["tiny"], steps=StepRule(max_tokens=3))) as served:
        yield served, policy


def test_chat(chat: tuple[Served, HFPolicy]) -> None:
    served, policy = chat
    client = served.client()
    split = 0
    messages: list[Any] = [
        {"role": "system", "content": "Count."},
        {"role": "user", "content": [{"type": "text", "text": "one "}, {"type": "text", "text": "two"}]},
    ]
    plain = [{"role": "system", "content": "Count."}, {"role": "user", "content": "one two"}]
    for seed in range(2):
        given: dict[str, Any] = {"model": "tiny", "messages": messages, "max_completion_tokens": 24, "seed": seed}
        guided = given | {"extra_body": {"prm_guidance": {"width": 2, "expansions": 2, "return_candidates": True}}}
        for ask in (given, guided):
            whole = client.chat.completions.create(**ask)
            assert whole.usage.prompt_tokens == len(policy.encode(Prompt(messages=tuple(plain))))
            deltas = [chunk.choices[0] for chunk in client.chat.completions.create(**ask, stream=True)]
            text = whole.choices[0].message.content
            assert "".join(choice.delta.content or "" for choice in deltas) == text
            assert deltas[0].delta.role == "assistant"
            assert deltas[-1].finish_reason == whole.choices[0].finish_reason
        (facts,) = whole.prm_search
        best = facts["candidates"][0]
        assert "".join(step["text"] for step in best["steps"]) == best["text"] == text
        (result,) = search([plain], policy=policy, strategy=BestOfN(1), max_new_tokens=24, seed=seed, temperature=1.0)
        ids = result.token_ids
        split += whole_text(policy.token_text, ids) != "".join(policy.token_text.text([i]) for i in ids)
        assert client.chat.completions.create(**given).choices[0].message.content == whole_text(policy.token_text, ids)
    assert split  # characters were split over tokens, or this tests nothing


def test_log_probabilities_of_a_chat(chat: tuple[Served, HFPolicy]) -> None:
    served, _ = chat
    messages: list[Any] = [{"role": "user", "content": "one"}]
    given: dict[str, Any] = {"model": "tiny", "messages": messages, "max_tokens": 9, "seed": 1, "logprobs": True}
    given |= {"top_logprobs": 0, "extra_body": {"prm_guidance": {"width": 1}}}
    (choice,) = served.client().chat.completions.create(**given).choices
    content = choice.logprobs.content
    assert len(content) == 9
    spelled = b"".join(bytes(each.bytes) for each in content)
    assert spelled.decode("utf-8", "replace") == choice.message.content
    assert all(each.logprob <= 0 and each.top_logprobs == [] for each in content)
    chunks = list(served.client().chat.completions.create(**given, stream=True))
    told = [chunk.choices[0].logprobs for chunk in chunks if chunk.choices[0].logprobs]
    assert [each.bytes for part in told for each in part.content] == [each.bytes for each in content]
    asked = {"messages": messages, "logprobs": True, "top_logprobs": 2}
    status, _, said = served.send("/v1/chat/completions", asked)
    assert (status, json.loads(said)["error"]["param"]) == (400, "top_logprobs")


# -- what is refused --------------------------------------------------------------------------------------------------

BAD: list[tuple[dict[str, Any], int, str | None]] = [
    ({"prompt": ""}, 400, "prompt"),
    ({"prompt": []}, 400, "prompt"),
    ({"prompt": ["a", ""]}, 400, "prompt[1]"),
    ({"prompt": {"a": 1}}, 400, "prompt"),
    ({"prompt": [5, -1]}, 400, "prompt"),
    ({"prompt": [999999]}, 400, "prompt"),
    ({"prompt": [4] * 128}, 400, "prompt"),
    ({"prompt": ["="] * 41}, 413, "prompt"),
    ({"model": "gpt-4"}, 404, "model"),
    ({"model": 4}, 400, "model"),
    ({"temperature": -1}, 400, "temperature"),
    ({"temperature": 2.5}, 400, "temperature"),
    ({"temperature": "hot"}, 400, "temperature"),
    ({"top_p": 0}, 400, "top_p"),
    ({"top_k": 2**31}, 400, "top_k"),
    ({"max_tokens": 0}, 400, "max_tokens"),
    ({"max_tokens": 101}, 400, "max_tokens"),
    ({"n": 0}, 400, "n"),
    ({"n": 65}, 413, "n"),
    ({"stop": [""]}, 400, "stop"),
    ({"stop": 7}, 400, "stop"),
    ({"seed": "x"}, 400, "seed"),
    ({"stream": "yes"}, 400, "stream"),
    ({"stream_options": {"include_usage": True}}, 400, "stream_options"),
    ({"logit_bias": {"5": 1}}, 400, "logit_bias"),
    ({"logprobs": 2}, 400, "logprobs"),
    ({"logprobs": True}, 400, "logprobs"),
    ({"top_logprobs": 1}, 400, "top_logprobs"),
    ({"tools": [{"type": "function"}], "prm_guidance": {}}, 400, "tools"),
    ({"tool_choice": "required", "prm_guidance": {}}, 400, "tool_choice"),
    ({"response_format": {"type": "json_object"}, "prm_guidance": {}}, 400, "response_format"),
    ({"echo": True}, 400, "echo"),
    ({"best_of": 4}, 400, "best_of"),
    ({"suffix": "x"}, 400, "suffix"),
    ({"add_special_tokens": False}, 400, "add_special_tokens"),
    ({"cache_salt": "x"}, 400, "cache_salt"),
    ({"presence_penalty": 0.5}, 400, "presence_penalty"),
    ({"prm_guidance": 4}, 400, "prm_guidance"),
    ({"prm_guidance": {"strategy": "beams"}}, 400, "prm_guidance.strategy"),
    ({"prm_guidance": {"widht": 4}}, 400, "prm_guidance.widht"),
    ({"prm_guidance": {"strategy": "best_of_n", "width": 4}}, 400, "prm_guidance.width"),
    ({"prm_guidance": {"width": 0}}, 400, "prm_guidance.width"),
    ({"prm_guidance": {"width": 2.0}}, 400, "prm_guidance.width"),
    ({"prm_guidance": {"width": "2"}}, 400, "prm_guidance.width"),
    ({"prm_guidance": {"merge": "no"}}, 400, "prm_guidance.merge"),
    ({"prm_guidance": {"strategy": "lookahead", "reduce": "sum"}}, 400, "prm_guidance.reduce"),
    ({"prm_guidance": {"width": 65}}, 413, "prm_guidance.width"),
    ({"prm_guidance": {"width": 9, "expansions": 9}}, 413, "prm_guidance"),
    ({"prm_guidance": {"strategy": "dvts", "subtrees": 10**12}}, 413, "prm_guidance.subtrees"),
    ({"prm_guidance": {"strategy": "lookahead", "lookahead_steps": 0}}, 400, "prm_guidance.lookahead_steps"),
    ({"prm_guidance": {"strategy": "lookahead", "rollouts": 60}}, 413, "prm_guidance"),
    ({"prm_guidance": {"alpha": "x"}}, 400, "prm_guidance.alpha"),
    ({"prm_guidance": {"alpha": 1e39}}, 400, "prm_guidance.alpha"),
    ({"prm_guidance": {"value": "w"}}, 400, "prm_guidance.value"),
    ({"prm_guidance": {"select": "worst"}}, 400, "prm_guidance.select"),
    ({"prm_guidance": {"answer": "x"}}, 400, "prm_guidance.answer"),
    ({"prm_guidance": {"weight": "x"}}, 400, "prm_guidance.weight"),
    ({"prm_guidance": {"weight_temperature": 0}}, 400, "prm_guidance.weight_temperature"),
    ({"prm_guidance": {"steps": ""}}, 400, "prm_guidance.steps.delimiter"),
    ({"prm_guidance": {"steps": {"max_tokens": 0}}}, 400, "prm_guidance.steps.max_tokens"),
    ({"prm_guidance": {"steps": {"regex": "("}}}, 400, "prm_guidance.steps.regex"),
    ({"prm_guidance": {"steps": {"delim": ";"}}}, 400, "prm_guidance.steps.delim"),
    ({"prm_guidance": {"budget": {"tokens": 0}}}, 400, "prm_guidance.budget.tokens"),
    ({"prm_guidance": {"budget": {"seconds": -1}}}, 400, "prm_guidance.budget.seconds"),
    ({"prm_guidance": {"budget": {"token": 1}}}, 400, "prm_guidance.budget.token"),
    ({"prm_guidance": {}, "temperature": 0}, 400, "temperature"),
]


@pytest.mark.parametrize(("given", "status", "param"), BAD)
def test_bad_fields_are_named(demo: Demo, given: dict[str, Any], status: int, param: str | None) -> None:
    for stream in ({}, {"stream": True}):
        found, headers, body = demo.served.send("/v1/completions", {"prompt": PROMPT, "model": "demo"} | stream | given)
        assert found == status, body
        assert headers["content-type"] == "application/json"
        error = json.loads(body)["error"]
        assert set(error) == {"message", "type", "param", "code"}
        assert error["param"] == param
        assert param is not None
        assert param in error["message"] or param == "model"
        assert error["type"] == "invalid_request_error"
        if "stream" in given or "stream_options" in given:
            break


def test_the_client_raises_what_is_refused(demo: Demo) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        demo.ask(prm_guidance={"width": 0})
    assert caught.value.param == "prm_guidance.width"
    assert caught.value.code == "invalid_value"
    with pytest.raises(openai.NotFoundError):
        demo.ask(model="gpt-4")
    with pytest.raises(openai.BadRequestError, match="chat template"):
        demo.client.chat.completions.create(model="demo", messages=[{"role": "user", "content": "hi"}])
    with pytest.raises(openai.BadRequestError) as caught:
        demo.client.chat.completions.create(model="demo", messages=[{"role": "user"}])  # type: ignore[typeddict-item,list-item]
    assert caught.value.param == "messages[0].content"


@pytest.mark.parametrize(
    "body", [b"", b"{", b"null", b"[]", b"\xff\xfe", b'{"prompt": "\\ud800"}', b'"prm_guidance"', b"{" * 9000]
)
def test_what_is_no_json_object_is_a_400(demo: Demo, body: bytes) -> None:
    status, _, said = demo.served.send("/v1/completions", body)
    assert status == 400
    assert json.loads(said)["error"]["code"] == "invalid_json"


def test_large_bodies_and_unknown_routes(demo: Demo) -> None:
    big = b'{"prompt": "' + b"=" * 20_000 + b'"}'
    assert demo.served.send("/v1/completions", big)[0] == 413
    assert demo.served.send("/v1/completions", iter([big[:9000], big[9000:], b""]))[0] == 413  # in chunks, undeclared
    assert demo.served.send("/v1/embeddings", {})[0] == 404
    status, _, said = demo.served.send("/v1/completions", method="GET")
    assert status == 405
    assert json.loads(said)["error"]["code"] == "unknown_route"


# -- many at a time ---------------------------------------------------------------------------------------------------


def test_requests_are_searched_together(demo: Demo) -> None:
    def forwards() -> float:
        return demo.served.metric("prm_search_forward_calls_total", phase="policy")

    before = forwards()
    demo.ask(prm_guidance=BEAM)
    alone = forwards() - before
    demo.policy.came.clear()
    demo.policy.gathering = 8
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda seed: demo.ask(prm_guidance=BEAM, seed=seed), range(8)))
    demo.policy.gathering = 0
    together = forwards() - before - alone
    assert together < 6 * alone
    for seed, answer in enumerate(answers):
        assert answer.choices[0].text == demo.search(Beam(2, 2), seed=seed).text


def start(served: Served, body: dict[str, Any]) -> http.client.HTTPConnection:
    """Send a request without waiting for its answer."""
    connection = http.client.HTTPConnection(served.host, served.port)
    connection.request("POST", "/v1/completions", json.dumps({"max_tokens": 60, "seed": 1} | body))
    return connection


@pytest.fixture(scope="module")
def endless(demo: Demo) -> Iterator[Served]:
    """The same models, but no token ends a response."""
    policy = Waiting(demo.policy.lm, demo.policy.tokenizer, stop_ids=[])
    limits = Limits(searches=8)
    app = make_app(lambda: ThreadEngine.of_hf(policy, demo.pair), ["demo"], limits=limits, steps=STEPS)
    with serving(app) as served:
        served.policy = policy
        yield served


LONG = {"prompt": PROMPT, "max_tokens": 100, "prm_guidance": {"width": 8, "expansions": 8, "steps": {"max_tokens": 1}}}


@pytest.mark.parametrize("given", [LONG, LONG | {"stream": True}, {"prompt": PROMPT, "max_tokens": 100, "n": 64}])
def test_a_client_that_goes_away_ends_its_search(demo: Demo, endless: Served, given: dict[str, Any]) -> None:
    def counted() -> float:
        return endless.metric("prm_search_requests_total", outcome="disconnected", route="text")

    before = counted()
    endless.policy.calls = 5
    connections = [start(endless, given) for _ in range(3)]
    until(lambda: endless.service.in_flight == 3 and demo.kv() > 0)
    for connection in connections:
        connection.close()
    until(lambda: endless.service.in_flight == 0 and demo.kv() == 0)
    endless.policy.calls = None
    assert counted() - before == 3
    assert demo.ask().choices[0].text == demo.search(BestOfN(1)).text


def test_beyond_the_limit_is_a_429(demo: Demo, endless: Served) -> None:
    endless.policy.calls = 5
    connections = [start(endless, LONG | {"prompt": [PROMPT] * 4}) for _ in range(2)]
    try:
        until(lambda: endless.service.in_flight == 8)
        with pytest.raises(openai.RateLimitError) as caught:
            endless.client().completions.create(model="demo", prompt=PROMPT)
        assert int(caught.value.response.headers["retry-after"]) >= 1
        assert caught.value.code == "too_many_searches"
    finally:
        for connection in connections:
            connection.close()
    until(lambda: endless.service.in_flight == 0 and demo.kv() == 0)
    endless.policy.calls = None
    assert endless.client().completions.create(model="demo", prompt=PROMPT).choices[0].text


def test_patterns_are_taken_only_where_the_server_says_so(demo: Demo, endless: Served) -> None:
    guidance = BEAM | {"steps": {"regex": "[;,]"}}
    assert demo.ask(prm_guidance=guidance).choices[0].text == demo.ask(prm_guidance=BEAM).choices[0].text
    with pytest.raises(openai.BadRequestError) as caught:
        endless.client().completions.create(model="demo", prompt=PROMPT, extra_body={"prm_guidance": guidance})
    assert caught.value.param == "prm_guidance.steps.regex"


def test_thirty_two_at_a_time_with_some_that_go_away(demo: Demo) -> None:
    kinds: list[dict[str, Any]] = [
        {}, {"prm_guidance": BEAM}, {"prm_guidance": BEAM, "stream": True}, {"stream": True},
        {"prm_guidance": {"strategy": "steer", "alpha": 1.0}}, {"prm_guidance": {"strategy": "best_of_n", "n": 4}},
    ]  # fmt: skip
    expected = {}
    for number, kind in enumerate(kinds):
        whole = demo.ask(**{**kind, "stream": False})
        expected[number] = whole.choices[0].text
    gone = threading.Barrier(8)

    def one(place: int) -> bool:
        if place % 4 == 3:
            connection = start(demo.served, LONG | {"stream": place % 8 == 3})
            gone.wait()
            connection.close()
            return True
        number = place % len(kinds)
        answer = demo.ask(**kinds[number])
        text = joined(answer)[0] if kinds[number].get("stream") else answer.choices[0].text
        return text == expected[number]

    with ThreadPoolExecutor(32) as pool:
        assert all(pool.map(one, range(32)))
    until(lambda: demo.served.service.in_flight == 0 and demo.kv() == 0)


def test_metrics_health_and_models(demo: Demo) -> None:
    names = {"kind": "sampled", "model": "policy"}
    before = demo.served.metric("prm_search_tokens_total", **names)
    good = demo.served.metric("prm_search_requests_total", outcome="ok", route="text")
    answer = demo.ask(prm_guidance=BEAM)
    demo.served.send("/v1/completions", {"prompt": ""})
    assert demo.served.metric("prm_search_tokens_total", **names) - before == answer.usage.completion_tokens
    assert demo.served.metric("prm_search_requests_total", outcome="ok", route="text") == good + 1
    assert demo.served.metric("prm_search_requests_total", outcome="bad_request", route="text") >= 1
    assert demo.served.metric("prm_search_tokens_total", kind="cached", model="prm") > 0
    assert demo.served.metric("prm_search_phase_seconds_total", phase="scorer") > 0
    assert demo.served.metric("prm_search_searches_in_flight") == 0
    assert demo.served.send("/health", method="GET")[0] == 200
    assert [model.id for model in demo.client.models.list()] == ["demo", "other-name"]
    assert demo.client.models.retrieve("demo").max_model_len == 128
    with pytest.raises(openai.NotFoundError):
        demo.client.models.retrieve("gpt-4")
    assert demo.ask(model="other-name").model == "other-name"
    assert "/v1/chat/completions" in json.loads(demo.served.send("/openapi.json", method="GET")[2])["paths"]
