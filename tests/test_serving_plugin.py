"""The vLLM endpoint plugin over fakes: what is guided is searched, and everything else reaches the routes untouched."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import Any

import pytest
from fakes import RULE, FakeAsyncPolicy, FakePolicy, FakeScorer, Spelling
from fastapi import FastAPI, Request
from fastapi.responses import StreamingResponse
from pairs import byte_tokenizer
from servers import Served, serving

from prm_search.integrations.vllm.endpoint import PRMSearchEndpoint, chat_tokenizer
from prm_search.search import search
from prm_search.serving.backend import AsyncEngine
from prm_search.serving.limits import Limits
from prm_search.serving.metrics import Metrics
from prm_search.serving.service import Service
from prm_search.strategies import Beam
from prm_search.tokens import encode_prompt
from prm_search.tree import Prompt

LIMIT = 320_000  # bytes of a body


@pytest.fixture(scope="module")
def core() -> Iterator[Served]:
    """A server with routes of its own that say what they got, and the plugin."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        policy = FakeAsyncPolicy()
        policy.takes_stop = False  # type: ignore[misc]
        engine = AsyncEngine(policy, FakeScorer(), Spelling())  # type: ignore[arg-type]
        limits = Limits(body_bytes=LIMIT)
        app.state.prm_search_ui = True
        app.state.prm_search = app.state.service = Service(engine, ["m"], limits=limits, steps=RULE, metrics=Metrics())
        app.state.prm_search.state_of_app = app.state
        yield

    app = FastAPI(lifespan=lifespan)

    @app.post("/v1/completions")
    @app.post("/v1/chat/completions")
    @app.post("/v1/embeddings")
    async def own(request: Request) -> Any:
        body = await request.body()
        if b'"stream": true' in body:
            return StreamingResponse(iter([b"one ", b"two"]))
        return {"own": body.decode("utf-8", "replace"), "length": len(body)}

    PRMSearchEndpoint().attach_router(app)
    with serving(app) as served:
        yield served


@pytest.mark.parametrize(
    "body",
    [
        b'{"prompt": "a"}', b"", b"{", b"\xff", b'{"prompt": "say prm_guidance"}', b'{"prm_guidance": null}',
        b'["prm_guidance"]', b'{"a": {"prm_guidance": {}}}', b"x" * 300_000, b'"prm_guidance',
        b'{"prm_guidance": ' + b"[" * 100_000,
    ],
)  # fmt: skip
def test_what_is_not_guided_reaches_the_route_as_it_came(core: Served, body: bytes) -> None:
    for path in ("/v1/completions", "/v1/chat/completions"):
        status, _, said = core.send(path, body)
        assert status == 200
        assert json.loads(said) == {"own": body.decode("utf-8", "replace"), "length": len(body)}
    chunked = core.send("/v1/completions", iter([body[:3], body[3:], b""]))
    assert json.loads(chunked[2])["length"] == len(body)


PASSED: list[dict[str, Any]] = [
    {"tools": [{"type": "function", "function": {"name": "f"}}]}, {"tool_choice": "required"}, {"top_logprobs": 5},
    {"response_format": {"type": "json_schema", "json_schema": {"name": "s", "schema": {}}}},
    {"parallel_tool_calls": True}, {"logprobs": True}, {"logprobs": 5},
]  # fmt: skip


@pytest.mark.parametrize("given", PASSED)
def test_tools_formats_and_log_probabilities_are_vllms_where_a_request_is_not_guided(
    core: Served, given: dict[str, Any]
) -> None:
    message = {"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]}
    body = json.dumps({"messages": [{"role": "user", "content": "a"}, message]} | given).encode()
    assert json.loads(core.send("/v1/chat/completions", body)[2])["own"] == body.decode()
    (name,) = given
    guided = {"prompt": [65], "prm_guidance": {}} | given
    status, _, said = core.send("/v1/completions", guided)
    if name != "parallel_tool_calls":  # which asks for nothing without tools
        assert (status, json.loads(said)["error"]["param"]) == (400, name)


def test_other_routes_and_streams_pass(core: Served) -> None:
    assert "own" in json.loads(core.send("/v1/embeddings", {"prm_guidance": {}})[2])
    assert core.send("/v1/completions", {"stream": True})[2] == b"one two"
    assert core.send("/v1/completions", method="GET")[0] == 405


def test_the_page_is_served_unless_it_is_switched_off(core: Served) -> None:
    assert core.send("/ui", method="GET")[0] == 200
    state = core.service.state_of_app  # type: ignore[attr-defined]
    state.prm_search_ui = False
    assert core.send("/ui", method="GET")[0] == 404
    state.prm_search_ui = True


def test_what_is_guided_is_searched(core: Served) -> None:
    (expected,) = search(
        [[65]], policy=FakePolicy(), scorer=FakeScorer(), strategy=Beam(2, 2), steps=RULE, max_new_tokens=12, seed=4,
        temperature=1.0,
    )  # fmt: skip
    asked = {"prompt": [65], "max_tokens": 12, "seed": 4, "prm_guidance": {"width": 2, "expansions": 2}}
    status, _, said = core.send("/v1/completions", asked)
    assert status == 200
    answer = json.loads(said)
    assert answer["choices"][0]["text"] == expected.text
    assert answer["usage"]["completion_tokens"] == sum(expected.usage.sampled_tokens.values())
    events = core.send("/v1/completions", asked | {"stream": True})[2].decode().strip().split("\n\n")
    chunks = [json.loads(event.removeprefix("data: ")) for event in events[:-1]]
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == expected.text


def test_bad_guidance_is_refused_by_name(core: Served) -> None:
    for guidance, param in (
        ({"widht": 1}, "prm_guidance.widht"),
        ({"alpha": 1.0}, "prm_guidance.alpha"),
        (4, "prm_guidance"),
    ):
        status, _, said = core.send("/v1/completions", {"prompt": [65], "prm_guidance": guidance})
        assert (status, json.loads(said)["error"]["param"]) == (400, param)


def test_chats_are_rendered_with_the_servers_options() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}{% if think %}!{% endif %}"
    chat = Prompt(messages=({"role": "user", "content": "a"},))
    plain, mark = encode_prompt(tokenizer, chat), tokenizer("!", add_special_tokens=False)["input_ids"]
    assert chat_tokenizer(tokenizer, SimpleNamespace(chat_template=None)) is tokenizer
    args = SimpleNamespace(chat_template=None, default_chat_template_kwargs={"think": True})
    assert encode_prompt(chat_tokenizer(tokenizer, args), chat) == (*plain, *mark)
    assert encode_prompt(tokenizer, chat) == plain
