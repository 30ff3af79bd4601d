"""OpenAIPolicy over `prm-search serve`: trees as the local policy's, a server in front of another, and the commands."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from endpoints import ANSWER, Server
from exact import exact
from pairs import byte_tokenizer, llama
from servers import Served, serving

from prm_search import HFPolicy, ImplicitPRM, OpenAIPolicy, StepRule, asearch, search
from prm_search.cli import main
from prm_search.demo import pair_dir
from prm_search.serving.app import make_app
from prm_search.serving.backend import AsyncEngine, ThreadEngine
from prm_search.serving.upstream import Upstream
from prm_search.strategies import Beam, BestOfN
from prm_search.tree import SearchTree

PROMPTS = ["=5a*7b+3c*9d+8?", "=2a+2b*6?"]
STEPS = StepRule(delimiter=";")
CHAT = [{"role": "user", "content": "one two"}]


@pytest.fixture(scope="module")
def local(float64_models: None) -> tuple[HFPolicy, ImplicitPRM]:
    return HFPolicy.from_pretrained(pair_dir() / "policy"), ImplicitPRM.from_pretrained(pair_dir())


@pytest.fixture(scope="module")
def served(local: tuple[HFPolicy, ImplicitPRM]) -> Iterator[Served]:
    policy, pair = local
    with serving(make_app(lambda: ThreadEngine.of_hf(policy, pair), ["demo"], steps=STEPS)) as running:
        yield running


@pytest.fixture(scope="module")
def chatty() -> HFPolicy:
    """A random model with a chat template, which hardly ever ends an answer."""
    return HFPolicy(exact(llama(1)), byte_tokenizer())


@pytest.fixture(scope="module")
def chat_server(chatty: HFPolicy) -> Iterator[Served]:
    pair = ImplicitPRM(exact(llama(2)), chatty, tokenizer=chatty.tokenizer)
    with serving(make_app(lambda: ThreadEngine.of_hf(chatty, pair), ["tiny"])) as running:
        yield running


def over(served: Served, model: str = "demo", **options: Any) -> OpenAIPolicy:
    return OpenAIPolicy(f"http://{served.host}:{served.port}/v1", model, **options)


def shape(tree: SearchTree, ids: bool = False) -> list[Any]:
    return [
        (node.depth, node.text, node.finish, node.count, node.token_ids if ids else len(node.token_ids))
        for node in tree.nodes
    ]


@pytest.mark.parametrize("ids", [True, False], ids=["token ids", "text"])
@pytest.mark.parametrize("strategy", [Beam(2, 2), BestOfN(2)])
def test_at_temperature_0_the_tree_is_the_local_policys(
    local: tuple[HFPolicy, ImplicitPRM], served: Served, ids: bool, strategy: Any
) -> None:
    policy, pair = local
    options: dict[str, Any] = {"scorer": pair, "strategy": strategy, "steps": STEPS, "temperature": 0.0}
    remote = over(served, **({"tokenizer": policy.tokenizer} if ids else {"mode": "completions"}))
    expected = search(PROMPTS, policy=policy, max_new_tokens=60, **options)
    results = search(PROMPTS, policy=remote, max_new_tokens=60, **options)

    async def go() -> Any:
        try:
            return await asearch(PROMPTS, policy=remote, max_new_tokens=60, **options)
        finally:
            await remote.aclose()

    assert remote.facts.ids == ids
    for result, again, wanted in zip(results, asyncio.run(go()), expected, strict=True):
        assert shape(result.tree, ids) == shape(wanted.tree, ids) == shape(again.tree, ids)
        # As text the pair reads it in its own tokens, which come out as the same ones here.
        assert [node.q for node in result.tree.nodes] == pytest.approx([node.q for node in wanted.tree.nodes], abs=1e-5)
        assert result.usage.sampled_tokens == wanted.usage.sampled_tokens
        assert any("the server's count" in note for note in result.usage.notes) != ids
        logprobs = [node.logprobs for node in wanted.tree.nodes[1:]]
        for node, known in zip(result.tree.nodes[1:], logprobs, strict=True):
            assert node.logprobs == pytest.approx(known, abs=1e-5)
    remote.close()


def test_the_servers_log_probabilities_are_the_references_half(
    local: tuple[HFPolicy, ImplicitPRM], served: Served
) -> None:
    policy, _ = local
    pair = ImplicitPRM.from_pretrained(pair_dir(), "policy")
    options: dict[str, Any] = {"strategy": Beam(2, 2), "steps": STEPS, "temperature": 0.0, "max_new_tokens": 60}
    remote = over(served, tokenizer=policy.tokenizer)
    (result,) = search(PROMPTS[:1], policy=remote, scorer=pair, **options)
    (wanted,) = search(PROMPTS[:1], policy=policy, scorer=ImplicitPRM.from_pretrained(pair_dir()), **options)
    assert [node.q for node in result.tree.nodes] == pytest.approx([node.q for node in wanted.tree.nodes], abs=1e-5)
    assert "reference" not in result.usage.encoded_tokens
    remote.close()


def test_draws_are_repeated_and_budgets_kept(local: tuple[HFPolicy, ImplicitPRM], served: Served) -> None:
    policy, pair = local
    remote = over(served, tokenizer=policy.tokenizer)
    options: dict[str, Any] = {"scorer": pair, "strategy": Beam(3, 3), "steps": STEPS, "max_new_tokens": 60}
    options["temperature"] = 1.5
    first, second = (search(PROMPTS, policy=remote, seed=7, **options) for _ in range(2))
    assert [shape(result.tree, True) for result in first] == [shape(result.tree, True) for result in second]
    assert any(len(node.children) > 1 for node in first[0].tree.nodes)  # seeds make children differ
    (short,) = search(PROMPTS[:1], policy=remote, budget=40, **options)
    assert sum(len(node.token_ids) * node.count for node in short.tree.nodes) <= 40
    remote.close()


def test_a_chat_is_continued_by_our_server(chatty: HFPolicy, chat_server: Served) -> None:
    options: dict[str, Any] = {"strategy": Beam(1, 1, value=lambda node: 0.0), "temperature": 0.0, "max_new_tokens": 12}
    rule = StepRule(None, max_tokens=5)
    (expected,) = search([CHAT], policy=chatty, steps=rule, **options)
    part = [*CHAT, {"role": "assistant", "content": "three  four"}]
    fields = {"continue_final_message": True, "return_token_ids": True}
    answer = chat_server.client().chat.completions.create(model="tiny", messages=part, max_tokens=1, extra_body=fields)
    text = chatty.tokenizer.apply_chat_template(CHAT, add_generation_prompt=True, tokenize=False) + "three  four"
    assert answer.choices[0].prompt_token_ids == chatty.tokenizer(text, add_special_tokens=False)["input_ids"]
    remote = over(chat_server, "tiny", mode="chat")
    assert (remote.facts.continues, remote.facts.trims) == ("continue_final_message", False)
    (result,) = search([CHAT], policy=remote, steps=rule, **options)
    assert [len(node.token_ids) for node in result.node.path()] == [5, 5, 2]
    remote.close()
    exact_ids = over(chat_server, "tiny", tokenizer=chatty.tokenizer)
    (same,) = search([CHAT], policy=exact_ids, steps=rule, **options)
    assert shape(same.tree, True) == shape(expected.tree, True)
    exact_ids.close()


def test_a_tokenizer_of_another_model_is_refused(served: Served) -> None:
    with pytest.raises(ValueError, match="tokenizer: its tokens are not those of 'demo'"):
        over(served, tokenizer=byte_tokenizer())


# -- what our server has for it ---------------------------------------------------------------------------------------


def test_ids_and_stop_strings_of_a_plain_answer(chat_server: Served, chatty: HFPolicy) -> None:
    client = chat_server.client()
    options: dict[str, Any] = {"model": "tiny", "prompt": "one", "max_tokens": 20, "temperature": 0}
    plain = client.completions.create(**options, extra_body={"return_token_ids": True}).choices[0]
    assert chatty.token_text.text(plain.token_ids) == plain.text
    assert tuple(plain.prompt_token_ids) == tuple(chatty.tokenizer("one")["input_ids"])
    assert plain.stop_reason is None
    stop = next(character for character in plain.text[2:] if character.isascii() and character not in plain.text[:2])
    kept = {"include_stop_str_in_output": True, "return_token_ids": True}
    answer = client.completions.create(**options, stop=[stop], logprobs=0, extra_body=kept).choices[0]
    assert answer.text == plain.text[: plain.text.index(stop) + len(stop)]
    assert (answer.finish_reason, answer.stop_reason) == ("stop", stop)
    assert len(answer.logprobs.tokens) == len(answer.token_ids)
    chunks = list(client.completions.create(**options, stop=[stop], logprobs=0, stream=True, extra_body=kept))
    told = [choice for chunk in chunks for choice in chunk.choices]
    assert "".join(choice.text for choice in told) == answer.text
    assert [token for choice in told for token in choice.token_ids] == answer.token_ids
    assert told[-1].stop_reason == stop


@pytest.mark.parametrize(
    ("messages", "fields", "param"),
    [
        (CHAT, {"continue_final_message": True}, "continue_final_message"),
        (CHAT, {"add_generation_prompt": False}, "add_generation_prompt"),
        (
            [*CHAT, {"role": "assistant", "content": "three"}],
            {"continue_final_message": True, "add_generation_prompt": True},
            "continue_final_message",
        ),
        (
            [*CHAT, {"role": "assistant", "content": "three"}],
            {"continue_final_message": True, "prm_guidance": {}},
            "continue_final_message",
        ),
        (CHAT, {"tools": [{"type": "function"}], "prm_guidance": {}}, "tools"),
        (CHAT, {"response_format": {"type": "json_object"}, "prm_guidance": {}}, "response_format"),
    ],
)
def test_what_cannot_be_is_refused_by_name(chat_server: Served, messages: Any, fields: Any, param: str) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        chat_server.client().chat.completions.create(model="tiny", messages=messages, max_tokens=4, extra_body=fields)
    assert refused.value.param == param


# -- a server in front of a server ------------------------------------------------------------------------------------


@pytest.fixture
def front(local: tuple[HFPolicy, ImplicitPRM], served: Served) -> Iterator[Served]:
    policy, pair = local
    remote = over(served, tokenizer=policy.tokenizer)
    engine = lambda: AsyncEngine(remote, pair, remote.token_text, upstream=Upstream(remote.endpoint))  # noqa: E731
    with serving(make_app(engine, ["front"], steps=STEPS)) as running:
        yield running
    remote.close()


def test_a_server_in_front_guides_and_hands_on_the_rest(
    local: tuple[HFPolicy, ImplicitPRM], served: Served, front: Served
) -> None:
    policy, pair = local
    client = front.client()
    options: dict[str, Any] = {"model": "front", "prompt": PROMPTS[0], "max_tokens": 60, "temperature": 0}
    guided = client.completions.create(
        **options, logprobs=0, extra_body={"prm_guidance": {"width": 1, "expansions": 1}}
    )
    (expected,) = search(
        PROMPTS[:1], policy=policy, scorer=pair, strategy=Beam(1, 1), steps=STEPS, max_new_tokens=60, temperature=0.0
    )
    assert guided.choices[0].text == expected.text
    assert guided.choices[0].logprobs.token_logprobs == pytest.approx(
        [value for node in expected.node.path() for value in node.logprobs], abs=1e-5
    )
    plain = client.completions.create(**options)
    assert plain.choices[0].text == expected.text
    assert plain.model == "demo"  # the other server's own answer
    parts = client.completions.create(**options, stream=True)
    assert "".join(choice.text for part in parts for choice in part.choices) == expected.text
    with pytest.raises(openai.BadRequestError) as refused:  # by the server behind
        client.completions.create(**options, extra_body={"logit_bias": {"1": 2}})
    assert refused.value.param == "logit_bias"
    with pytest.raises(openai.BadRequestError) as steered:
        client.completions.create(**{**options, "temperature": 1}, extra_body={"prm_guidance": {"alpha": 1.0}})
    assert "behind a server" in str(steered.value)
    with pytest.raises(openai.NotFoundError):
        client.completions.create(**{**options, "model": "other"})


def test_tools_reach_the_server_behind() -> None:
    behind = Server()
    tools = [{"type": "function", "function": {"name": "add", "parameters": {}}}]
    pair = ImplicitPRM.from_pretrained(pair_dir())
    with behind.policy() as remote:
        engine = lambda: AsyncEngine(remote, pair, remote.token_text, upstream=Upstream(remote.endpoint))  # noqa: E731
        with serving(make_app(engine, ["front"])) as running:
            client = running.client()
            answer = client.chat.completions.create(
                model="front", messages=CHAT, tools=tools, response_format={"type": "json_object"}
            )
            assert answer.choices[0].message.content == ANSWER
            _, body = behind.bodies[-1]
            assert (body["tools"], body["response_format"], body["model"]) == (tools, {"type": "json_object"}, "m")
            behind.poison = "one two"
            with pytest.raises(openai.InternalServerError):
                client.chat.completions.create(model="front", messages=CHAT)
            with pytest.raises(openai.InternalServerError, match=r"a request failed: .*HTTP 500"):
                client.chat.completions.create(
                    model="front", messages=CHAT, extra_body={"prm_guidance": {"width": 1, "expansions": 1}}
                )


# -- commands ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def no_client_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


def test_generate_over_a_server(served: Served, capsys: pytest.CaptureFixture[str], no_client_key: None) -> None:
    url = f"http://{served.host}:{served.port}/v1"
    words = ["--pair", "demo", "--prompt", PROMPTS[0], "--strategy", "beam", "--width", "1", "--expansions", "1"]
    words += ["--temperature", "0", "--json"]
    assert main(["generate", "--policy", "demo", *words]) == 0
    expected = json.loads(capsys.readouterr().out)
    options = json.dumps({"tokenizer": str(pair_dir() / "policy"), "concurrency": 4})
    words += ["--policy", "openai:demo", "--base-url", url]
    assert main(["generate", *words, "--engine-options", options]) == 0
    out, err = capsys.readouterr()
    record = json.loads(out)
    assert record["text"] == expected["text"]
    assert f"prm-search: {url}, demo: completions by token ids" in err


def test_what_failed_is_left_for_the_next_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], no_client_key: None
) -> None:
    behind = Server(poison="bad")
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("Q1:\nbad:\nQ3:\n")
    problems = tmp_path / "problems.jsonl"
    problems.write_text("".join(json.dumps({"prompt": p, "answer": "5"}) + "\n" for p in ("Q1:", "bad:", "Q3:")))
    with behind.policy() as remote:
        common = ["--policy", "openai:m", "--base-url", remote.endpoint.base_url]
        common += ["--engine-options", json.dumps({"backoff": {"tries": 1}})]
        sampled = [*common, "--strategy", "best_of_n", "--n", "1", "--prompts-file", str(prompts)]
        sampled += ["--out", str(tmp_path / "out.jsonl")]
        assert main(["generate", *sampled]) == 2
        assert f"prm-search: 1 of 3 failed: {prompts}, line 2\n" in capsys.readouterr().err
        assert len((tmp_path / "out.jsonl").read_text().splitlines()) == 2
        rollouts = [*common, "--data", str(problems), "--n", "2", "--out", str(tmp_path / "rollouts.jsonl")]
        assert main(["rollout", *rollouts]) == 2
        assert f"prm-search: 1 of 3 failed: {problems}, line 2\n" in capsys.readouterr().err
        compared = [*common, "--data", str(problems), "--strategies", "majority", "--budgets", "1,2"]
        compared += ["--out", str(tmp_path / "eval")]
        assert main(["eval", *compared]) == 2
        assert f"prm-search: 1 of 3 failed: {problems}, line 2\n" in capsys.readouterr().err
        behind.poison = None
        for command, words in (("generate", sampled), ("rollout", rollouts), ("eval", compared)):
            assert main([command, *words, "--resume"]) == 0
    assert len((tmp_path / "out.jsonl").read_text().splitlines()) == 3
    assert len((tmp_path / "rollouts.jsonl").read_text().splitlines()) == 6
    assert len((tmp_path / "eval" / "records.jsonl").read_text().splitlines()) == 3


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--policy", "demo", "--base-url", "http://127.0.0.1:1/v1"], "--base-url needs --policy openai:MODEL"),
        (["--policy", "openai:m", "--engine", "vllm"], "--engine vllm: --policy openai:MODEL runs behind its server"),
        (["--policy", "openai:", "--base-url", "http://127.0.0.1:1/v1"], "the server's name for the model is needed"),
        (
            ["--policy", "openai:m", "--base-url", "http://127.0.0.1:1/v1", "--engine-options", '{"speed": 1}'],
            "--engine-options: speed is unknown",
        ),
        (
            ["--policy", "openai:m", "--base-url", "http://127.0.0.1:1/v1", "--engine-options", '{"mode": "talk"}'],
            "mode='talk': one of auto, completions, chat",
        ),
        (
            [
                "--policy",
                "openai:m",
                "--base-url",
                "http://127.0.0.1:1/v1",
                "--engine-options",
                '{"backoff": {"tries": 1}}',
            ],
            "http://127.0.0.1:1/v1 cannot be reached",
        ),
    ],
)
def test_bad_command_lines(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", *words, "--strategy", "best_of_n", "--n", "1", "--prompt", "x"]) == 2
    assert message in capsys.readouterr().err
