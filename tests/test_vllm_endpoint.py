"""vLLM's own server with the plugin, started by `prm-search serve --engine vllm`, through the OpenAI client;
and as a model of a pair, by its token-in/token-out route."""

from __future__ import annotations

import http.client
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm")

import numpy as np
import openai
import torch
from pairs import CHATML, byte_tokenizer, llama, naive_logprobs, naive_rewards
from servers import Served, until
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.entrypoints.openai.completion.protocol import CompletionRequest

from prm_search.integrations.vllm import VLLMImplicitPRM, VLLMServer, VLLMStepPRM
from prm_search.next_token import NextToken
from prm_search.policies.endpoint.policy import OpenAIPolicy
from prm_search.policies.hf import HFPolicy
from prm_search.scorers.explicit.step_prm import StepPRM
from prm_search.scorers.implicit.implicit_prm import ImplicitPRM
from prm_search.search import search
from prm_search.serving.schema import UNSERVED, ChatBody, CompletionBody
from prm_search.steps import StepRule
from prm_search.strategies import Beam
from prm_search.tree import Prompt, SearchTree

pytestmark = pytest.mark.vllm

CHAT: dict[str, Any] = {"model": "tiny", "messages": [{"role": "user", "content": "one two"}], "max_tokens": 24}
BEAM = {"width": 2, "expansions": 2, "steps": {"max_tokens": 4}}
SHAPE = {"hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random models that end no response by themselves: a policy, which is the reference too, and a PRM."""
    root = tmp_path_factory.mktemp("models")
    for name, seed in (("policy", 1), ("prm", 2)):
        llama(seed, **SHAPE).save_pretrained(root / name)
        byte_tokenizer().save_pretrained(root / name)
    return root


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[Served]:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    words = ["--engine", "vllm", "--policy", str(folder / "policy"), "--prm", str(folder / "prm")]
    words += ["--reference", str(folder / "policy"), "--port", str(port), "--served-model-name", "tiny"]
    words += ["--dtype", "float32", "--max-searches", "8", "--step-tokens", "4"]
    own = ["--logits-processors", "prm_search.integrations.vllm.logits_processor:ImplicitPRMLogitsProcessor"]
    own += ["--additional-config", json.dumps({"prm_search": {"model": str(folder / "prm"), "reference": "policy"}})]
    own += ["--enable-scale-out", "--enable-prompt-tokens-details"]  # what scoring for others needs
    own += ["--enforce-eager", "--max-model-len", "512", "--max-num-seqs", "64", "--block-size", "32"]
    code = "import sys; from prm_search.cli import main; sys.exit(main())"
    environment = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", "PRM_SEARCH_API_KEY": "key"}
    log = folder / "log"
    with log.open("w") as out:
        process = subprocess.Popen(
            [sys.executable, "-P", "-c", code, "serve", *words, "--", *own],
            stdout=out, stderr=subprocess.STDOUT, env=os.environ | environment,
        )  # fmt: skip
    served = Served(port)
    try:
        while not _answers(served):
            assert process.poll() is None, log.read_text()[-4000:]
            time.sleep(0.5)
        yield served
        process.terminate()
        assert process.wait() is not None
    finally:
        process.kill()
        process.wait()


def _answers(served: Served) -> bool:
    try:
        return served.send("/health", method="GET")[0] == 200
    except OSError:
        return False


# What asks for nothing that a search would not do, or only for what concerns media, tools or vLLM's own books.
HARMLESS = {
    "include_reasoning", "media_io_kwargs", "mm_payload", "mm_processor_kwargs", "parallel_tool_calls", "request_id",
    "routed_experts_prompt_start", "session_id", "spaces_between_special_tokens", "stream_interval", "truncation_side",
    "user",
}  # fmt: skip


@pytest.mark.parametrize(("theirs", "ours"), [(ChatCompletionRequest, ChatBody), (CompletionRequest, CompletionBody)])
def test_every_field_of_vllms_requests_is_served_refused_or_harmless(theirs: Any, ours: Any) -> None:
    for name, field in theirs.model_fields.items():
        if name in UNSERVED:  # and what a client sends that spells all defaults out is let pass
            default = field.get_default(call_default_factory=True)
            assert default is None or default in UNSERVED[name], name
        else:
            assert name in HARMLESS | set(ours.model_fields) | {"add_special_tokens"}, name


def test_guided_plain_and_bad_requests(server: Served, folder: Path) -> None:
    client = server.client(api_key="key")
    with pytest.raises(openai.AuthenticationError):
        server.client(api_key="wrong").chat.completions.create(**CHAT, extra_body={"prm_guidance": BEAM})

    plain = client.chat.completions.create(**CHAT, temperature=0)
    assert plain.usage.completion_tokens == 24
    assert "prm_search" not in plain.usage.model_extra
    chunks = list(client.chat.completions.create(**CHAT, temperature=0, stream=True))
    told = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert told == plain.choices[0].message.content

    guided = client.chat.completions.create(**CHAT, extra_body={"prm_guidance": BEAM | {"return_candidates": True}})
    (facts,) = guided.prm_search
    best = facts["candidates"][0]
    assert guided.choices[0].message.content == best["text"]
    assert guided.choices[0].finish_reason == "length"
    assert best["value"] == max(each["value"] for each in facts["candidates"])
    assert best["q"] == pytest.approx(sum(step["reward"] for step in best["steps"]), abs=1e-6)
    assert guided.usage.completion_tokens == guided.usage.prm_search["sampled_tokens"]["policy"] >= 24 * 2
    assert guided.usage.prompt_tokens == plain.usage.prompt_tokens
    assert guided.usage.prm_search["cached_tokens"]["prm"] > 0

    letter = next(each for each in told[2:] if each.isascii() and each.isalnum())
    one = {"prm_guidance": {"strategy": "best_of_n", "n": 1}}
    answer = client.chat.completions.create(**CHAT, temperature=0, extra_body=one).choices[0]
    assert answer.message.content.startswith(told)  # vLLM leaves out a last character that is not complete
    answer = client.chat.completions.create(**CHAT, temperature=0, stop=[letter], extra_body=one).choices[0]
    assert (answer.message.content, answer.finish_reason) == (told.partition(letter)[0], "stop")

    for body, status, param in (
        ({"prm_guidance": {"widht": 1}}, 400, "prm_guidance.widht"),
        ({"prm_guidance": {"alpha": "x"}}, 400, "prm_guidance.alpha"),
        ({"prm_guidance": {}, "temperature": 2.5}, 400, "temperature"),
        ({"prm_guidance": {"width": 100, "expansions": 100}}, 413, "prm_guidance"),
        ({"prm_guidance": {}, "model": "other"}, 404, "model"),
        ({"prm_guidance": {}, "tools": [{"type": "function"}]}, 400, "tools"),
    ):
        found, _, said = server.send("/v1/chat/completions", CHAT | body, _headers())
        assert (found, json.loads(said)["error"]["param"]) == (status, param)
    assert server.send("/v1/chat/completions", b"{", _headers())[0] == 400  # vLLM's own


def test_rewards_are_those_of_the_tokens_that_were_drawn(server: Served) -> None:
    client = server.client(api_key="key")
    prompt = byte_tokenizer()("Count to three.")["input_ids"]
    model, reference = llama(2, **SHAPE), llama(1, **SHAPE)
    # Steered with strength 1 from the reference, which the policy is, the most probable tokens are the PRM's.
    for greedy, guidance in (
        (reference, {"strategy": "best_of_n", "n": 1}),
        (model, {"strategy": "steer", "alpha": 1.0}),
    ):
        answer = client.completions.create(
            model="tiny", prompt=prompt, max_tokens=6, temperature=0, extra_body={"prm_guidance": guidance}
        )
        ids = list(prompt)
        for _ in range(6):
            with torch.no_grad():
                ids.append(int(greedy(torch.tensor([ids])).logits[0, -1].argmax()))
        expected = naive_rewards(model, reference, prompt, ids[len(prompt) :], 0.05)
        assert answer.prm_search[0]["value"] == pytest.approx(float(expected.sum()), abs=1e-3)


def test_streams(server: Served) -> None:
    client = server.client(api_key="key")
    stream = client.chat.completions.create(
        **CHAT, stream=True, stream_options={"include_usage": True},
        extra_body={"prm_guidance": BEAM | {"width": 1, "progress": True, "return_candidates": True}},
    )  # fmt: skip
    chunks = list(stream)
    deltas = [chunk.choices[0].delta.content for chunk in chunks if chunk.choices and chunk.choices[0].delta.content]
    final = next(chunk for chunk in chunks if chunk.choices and chunk.choices[0].finish_reason)
    assert len(deltas) > 2
    assert "".join(deltas) == final.prm_search[0]["candidates"][0]["text"]
    assert any(not chunk.choices and "prm_search" in chunk.model_extra for chunk in chunks)
    assert chunks[-1].usage.completion_tokens > 24


def test_it_scores_for_others_by_its_token_route(server: Served) -> None:
    pytest.importorskip("httpx")
    url, tokenizer = f"http://{server.host}:{server.port}", byte_tokenizer()
    with pytest.raises(ValueError, match="401"):
        VLLMServer(url)
    with pytest.raises(ValueError, match="serves tiny"):
        VLLMServer(url, model="another", api_key="key")
    behind, policy = VLLMServer(url, api_key="key"), HFPolicy(llama(2, **SHAPE), tokenizer)
    assert behind.context == 511
    pair = VLLMImplicitPRM(behind, "policy", beta=0.05)
    exact = ImplicitPRM(llama(1, **SHAPE), llama(2, **SHAPE), tokenizer=tokenizer, beta=0.05, name="exact")
    ids = [5 + 7 * i % 300 for i in range(40)]
    # As in test_vllm_search.py: a step that begins with a block, and one that reaches beyond its end and comes twice.
    options: dict[str, Any] = {
        "steps": StepRule(delimiter=None, max_tokens=6),
        "max_new_tokens": 48,
        "temperature": 1.0,
        "strategy": Beam(width=4, expansions=2),
    }
    for _ in range(2):
        for result in search([ids, ids[:38]], policy=policy, scorer=pair, prover=exact, value="q", **options):
            for node in result.tree.nodes[1:]:
                np.testing.assert_allclose(node.rewards["prm"], node.rewards["exact"], rtol=0, atol=exact.beta * 1e-3)
            assert result.usage.cached_tokens["prm"] > 0
    behind.close()


def test_a_step_prm_that_reads_words_behind_the_server(server: Served) -> None:
    pytest.importorskip("httpx")
    tokenizer = byte_tokenizer(template=CHATML)
    behind = VLLMServer(f"http://{server.host}:{server.port}", api_key="key")
    assert behind.root.endswith("policy")
    prm = VLLMStepPRM(behind, tokenizer, format="rlhflow")
    own = StepPRM(llama(1, **SHAPE), tokenizer, format="rlhflow")
    trees = []
    for scorer in (prm, own):
        tree = SearchTree(Prompt(text="What is two plus three, in words?"))
        first = [tree.add(tree.root, [7], text=text) for text in ("It is five.", "It is six, I think.")]
        nodes = [*first, tree.add(first[0], [7], text="So five."), tree.add(first[0], [7], text="So four.")]
        for node in nodes:
            scorer.score_nodes([node])
        trees.append([node.reward for node in nodes])
    np.testing.assert_allclose(trees[0], trees[1], rtol=0, atol=1e-3)
    behind.close()


def test_a_client_that_goes_away_ends_its_search(server: Served) -> None:
    long = CHAT | {"max_tokens": 400, "prm_guidance": BEAM | {"width": 4, "expansions": 4}}
    connections = []
    for stream in (False, True):
        connection = http.client.HTTPConnection(server.host, server.port)
        connection.request("POST", "/v1/chat/completions", json.dumps(long | {"stream": stream}), _headers())
        connections.append(connection)
    until(lambda: server.metric("prm_search_searches_in_flight") == 2)
    for connection in connections:
        connection.close()
    until(lambda: server.metric("prm_search_searches_in_flight") == 0)
    assert server.metric("prm_search_requests_total", outcome="disconnected", route="chat") == 2
    until(lambda: server.metric("vllm:num_requests_running", engine="0", model_name="tiny") == 0)
    client = server.client(api_key="key")
    assert client.chat.completions.create(**CHAT, extra_body={"prm_guidance": BEAM}).choices[0].message.content


def _headers() -> dict[str, str]:
    return {"Content-Type": "application/json", "Authorization": "Bearer key"}


# -- as a policy behind a server --------------------------------------------------------------------------------------


@pytest.mark.parametrize("ids", [True, False], ids=["token ids", "chat"])
def test_the_server_is_a_policy(server: Served, folder: Path, ids: bool) -> None:
    tokenizer = byte_tokenizer()
    # Seeded requests whose prompts are split over two forwards kill vLLM's engine on a CPU.
    options: dict[str, Any] = {"tokenizer": tokenizer} if ids else {"mode": "chat"}
    url = f"http://127.0.0.1:{server.port}/v1"
    policy = OpenAIPolicy(url, "tiny", api_key="key", seeds=False, **options)
    try:
        assert policy.facts.ids == ids
        assert policy.facts.n
        route = policy.facts.completions if ids else policy.facts.chat
        assert route is not None
        assert (route.logprobs, route.tops, route.keeps) == (True, 20, True)
        assert ids or policy.facts.continues == "continue_final_message"
        rule = StepRule(delimiter=["a", "e", "1", " ", "x", "="], max_tokens=6)
        pair = ImplicitPRM.from_pretrained(folder / "prm", folder / "policy")
        (result,) = search(
            [CHAT["messages"]], policy=policy, scorer=pair, strategy=Beam(2, 2), steps=rule, max_new_tokens=16
        )
        path = result.node.path()
        tokens = result.token_ids
        assert rule.ends(tokens, policy.token_text.piece) == [node.end for node in path]
        assert all(len(node.token_ids) <= 6 for node in path)
        assert len(tokens) <= 16
        if ids:
            model = HFPolicy.from_pretrained(folder / "policy")
            prompt = result.tree.prompt_ids
            assert prompt == model.encode(result.tree.prompt)
            told = np.concatenate([node.logprobs for node in path])
            assert told == pytest.approx(naive_logprobs(model.lm.module, prompt, tokens), abs=1e-3)
            tree = SearchTree(Prompt(messages=tuple(CHAT["messages"])))
            (words,) = policy.next_token_logprobs([NextToken(tree, tree.prompt)], ["a", "b", "c"])
            assert all(value <= 0 for value in words.values())
        assert result.usage.encoded_tokens["policy"] > 0
    finally:
        policy.close()
