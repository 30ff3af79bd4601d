"""The server under attack: what requests within the limits cost its event loop, and what is refused before it costs.

Nothing is timed. Work counts as the Python calls of one turn of the loop, and what runs in C is asked for its thread.
"""

from __future__ import annotations

import asyncio
import json
import sys
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from fakes import EOS, RULE, FakeAsyncPolicy, FakePolicy, FakeScorer, ToyLM
from fastapi import FastAPI
from hypothesis import given, strategies as st
from pairs import byte_tokenizer, metaspace_tokenizer
from pydantic import ValidationError

from prm_search.integrations.vllm.endpoint import GuidedRoutes, is_guided
from prm_search.serving.app import make_app
from prm_search.serving.backend import AsyncEngine, ThreadEngine
from prm_search.serving.errors import RequestError
from prm_search.serving.limits import Limits
from prm_search.serving.metrics import Metrics
from prm_search.serving.prompts import PromptLength
from prm_search.serving.response import dumps
from prm_search.serving.schema import ChatBody, CompletionBody
from prm_search.serving.service import Service
from prm_search.tokens import TokenText
from prm_search.tree import Prompt

TOKENIZER = byte_tokenizer()
CALLS = 20_000  # of one turn; the quadratic check of 8,000 delimiters made 64 million


class Letters:
    special = frozenset([EOS])

    @staticmethod
    def piece(token: int) -> bytes:
        return bytes([token]) if token < 256 else b""


class Policy(FakePolicy):
    """Encodes texts by a tokenizer; when told to, only once it is let go."""

    def __init__(self, tokenizer: Any = None) -> None:
        super().__init__(ToyLM("ab;"), context=4000)
        self.tokenizer = tokenizer
        self.encoded: list[tuple[Prompt, bool]] = []  # with whether a loop ran in that thread
        self.go = threading.Event()
        self.go.set()
        self.error: Exception | None = None

    def encode(self, prompt: Prompt) -> tuple[int, ...]:
        if prompt.token_ids is None:
            self.encoded.append((prompt, asyncio._get_running_loop() is not None))
            assert self.go.wait()
            if self.error is not None:
                raise self.error
            return (65,)
        return super().encode(prompt)


@asynccontextmanager
async def client(policy: Any = None, **options: Any) -> AsyncIterator[httpx.AsyncClient]:
    """A client of the app over fakes, in this event loop."""
    policy = policy or Policy()
    words: Any = Letters() if policy.tokenizer is None else TokenText(policy.tokenizer)
    app = make_app(lambda: ThreadEngine(policy, FakeScorer(), words), ["m"], steps=RULE, **options)
    async with app.router.lifespan_context(app), over(app) as asking:
        asking.app = app  # type: ignore[attr-defined]
        yield asking


@asynccontextmanager
async def over(app: Any) -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://x") as asking:
        yield asking


async def post(asking: httpx.AsyncClient, body: Any, path: str = "/v1/completions") -> httpx.Response:
    headers = {"Content-Type": "application/json"}
    content = body if isinstance(body, bytes) else json.dumps({"prompt": [65], "max_tokens": 12} | body)
    return await asyncio.create_task(asking.post(path, content=content, headers=headers))


def refusal(answer: httpx.Response) -> tuple[int, str | None]:
    return answer.status_code, answer.json()["error"]["param"]


@contextmanager
def counted_turns(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Python calls of each turn of the loop, as they come."""
    turns: list[int] = []
    run = asyncio.Handle._run

    def counted(handle: asyncio.Handle) -> None:
        turns.append(0)

        def call(frame: Any, event: str, argument: Any) -> None:
            turns[-1] += event in ("call", "c_call")

        sys.setprofile(call)
        try:
            run(handle)
        finally:
            sys.setprofile(None)

    with monkeypatch.context() as patched:
        patched.setattr(asyncio.Handle, "_run", counted)
        yield turns


MANY = [f"d{number:06}" for number in range(8000)]
HEAVY: list[tuple[dict[str, Any], tuple[int, str] | None]] = [
    ({"prm_guidance": {"steps": MANY}}, (400, "prm_guidance.steps.delimiter")),
    ({"prm_guidance": {"steps": {"delimiter": MANY}}}, (400, "prm_guidance.steps.delimiter")),
    ({"prm_guidance": {"steps": ["a" * 100_000 + "b", "a" * 100_000 + "c"]}}, (400, "prm_guidance.steps.delimiter")),
    ({"prm_guidance": {"steps": ";" * 257}}, (400, "prm_guidance.steps.delimiter")),
    ({"prm_guidance": {"steps": [";"] * 65}}, (400, "prm_guidance.steps.delimiter")),
    ({"prm_guidance": {"steps": [f"{number}" for number in range(64)]}}, None),
    ({"stop": ["a" * 200_000] * 4}, (400, "stop")),
    ({"stop": MANY}, (400, "stop")),
    ({"prm_guidance": {"steps": {"regex": "(a|b)" * 100_000}}}, (400, "prm_guidance.steps.regex")),
    ({"prm_guidance": {"steps": dict.fromkeys(MANY, 0)}}, (400, "prm_guidance.steps.d000000")),
    ({"prm_guidance": {"budget": dict.fromkeys(MANY, 0)}}, (400, "prm_guidance.budget.d000000")),
    ({"prm_guidance": dict.fromkeys(MANY, 0)}, (400, "prm_guidance.d000000")),
    ({"prm_guidance": {"width": [1] * 100_000}}, (400, "prm_guidance.width")),
    ({"prm_guidance": {"strategy": "b" * 500_000}}, (400, "prm_guidance.strategy")),
    ({"prompt": [1.5] * 100_000}, (400, "prompt")),
    ({"prompt": [[None]] * 100_000}, (400, "prompt")),
    ({"prompt": "a" * 900_000}, (400, "prompt")),
    ({"prompt": ["a", "a" * 900_000]}, (400, "prompt[1]")),
    ({"prm_guidance": {"strategy": "best_of_n", "n": 64, "steps": {"max_tokens": 1}, "return_candidates": True}}, None),
    ({"n": 60, "stream": True}, None),
]


@pytest.mark.parametrize(("body", "refused"), HEAVY)
def test_no_request_holds_the_loop(
    body: dict[str, Any], refused: tuple[int, str] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = Policy(TOKENIZER)

    async def main() -> None:
        async with client(policy, limits=Limits(patterns=True)) as asking:
            await post(asking, {})  # what is imported and compiled at first use
            with counted_turns(monkeypatch) as turns:
                answer = await post(asking, body)
        assert max(turns) < CALLS
        assert answer.status_code == 200 if refused is None else refusal(answer) == refused
        assert len(answer.content) < 2000 or refused is None
        assert not any(on_loop for _, on_loop in policy.encoded)

    asyncio.run(main())


@pytest.mark.parametrize(
    ("kind", "body"),
    [
        (CompletionBody, {"prompt": [1.5] * 9000}), (CompletionBody, {"prompt": [[1.5]] * 9000}),
        (CompletionBody, {"prompt": [[1], *[[None] * 9] * 9000]}),
        (CompletionBody, {"prompt": "a", "stop": [1] * 9000}),
        (CompletionBody, {"prompt": "a", "prm_guidance": {"steps": [1] * 9000}}),
        (ChatBody, {"messages": [{}] * 9000}), (ChatBody, {"messages": [{"role": "user", "content": [{}] * 9000}]}),
    ],
)  # fmt: skip
def test_errors_of_a_body_are_few(kind: Any, body: dict[str, Any]) -> None:
    with pytest.raises(ValidationError) as caught:
        kind.model_validate_json(json.dumps(body))
    assert caught.value.error_count() < 10


# -- prompts ----------------------------------------------------------------------------------------------------------


def test_prompts_are_tokenised_off_the_loop_and_count_as_searches() -> None:
    policy = Policy()
    policy.go.clear()

    async def main() -> None:
        async with client(policy, limits=Limits(searches=3)) as asking:
            tasks = [asyncio.create_task(post(asking, {"prompt": "a", "stream": each})) for each in (True, False)]
            while len(policy.encoded) < 2:
                await asyncio.sleep(0)
            assert (await asking.get("/health")).status_code == 200  # the loop turns while two threads tokenise
            assert (await post(asking, {"prompt": ["a", "b"]})).status_code == 429
            tasks[0].cancel()  # it goes away, and its thread is still at it
            for _ in range(10):
                await asyncio.sleep(0)
            assert (await post(asking, {"prompt": ["a", "b"]})).status_code == 429
            policy.go.set()
            assert (await tasks[1]).status_code == 200
            await asyncio.gather(*tasks, return_exceptions=True)
            while asking.app.state.service.in_flight:  # type: ignore[attr-defined]
                await asyncio.sleep(0)
            assert (await post(asking, {"prompt": ["a", "b", "a"]})).status_code == 200
        assert not any(on_loop for _, on_loop in policy.encoded)

    asyncio.run(main())
    assert not policy.trees


def test_a_prompt_that_nobody_waits_for_is_not_tokenised() -> None:
    policy = Policy()
    policy.go.clear()

    async def main() -> None:
        async with client(policy) as asking:
            task = asyncio.create_task(post(asking, {"prompt": ["a"] * 30}))
            while not policy.encoded:
                await asyncio.sleep(0)
            task.cancel()
            for _ in range(10):
                await asyncio.sleep(0)
            policy.go.set()
            while asking.app.state.service.in_flight:  # type: ignore[attr-defined]
                await asyncio.sleep(0)
        assert len(policy.encoded) < 30

    asyncio.run(main())


ERRORS = [ZeroDivisionError("division by zero"), KeyError("role"), AttributeError("x"), RecursionError(), OSError("no")]


@pytest.mark.parametrize("error", [*ERRORS, ValueError("only two roles")])
def test_a_chat_template_may_raise_anything(error: Exception) -> None:
    policy = Policy()
    policy.error = error
    chat = {"messages": [{"role": "user", "content": "a"}], "prompt": None}

    async def main() -> None:
        async with client(policy) as asking:
            for stream in (False, True):
                answer = await post(asking, chat | {"stream": stream}, "/v1/chat/completions")
                assert refusal(answer) == (400, "messages")
            if not isinstance(error, ValueError):  # of a text it is the server that is at fault
                assert (await post(asking, {"prompt": "a"})).status_code == 500

    asyncio.run(main())


LENGTHS = [
    (tokenizer, context, PromptLength(tokenizer, TokenText(tokenizer), context))
    for tokenizer in (TOKENIZER, metaspace_tokenizer()) for context in (3, 30)
]  # fmt: skip


@given(st.text(max_size=60) | st.sampled_from([" ", "\n", "<s>", "\u1112\u1161\u11ab", "the "]).map(lambda s: s * 12))
def test_what_may_fit_the_context_is_not_refused_by_its_length(text: str) -> None:
    for tokenizer, context, length in LENGTHS:
        if text and len(tokenizer(text)["input_ids"]) < context:
            length.check(Prompt(text=text), "prompt")
            length.check(Prompt(messages=({"role": "user", "content": text},)), "messages")


def test_the_bound_of_a_prompt() -> None:
    words = TokenText(TOKENIZER)
    length = PromptLength(TOKENIZER, words, 100)
    assert length.most == 100 * max(len(words.piece(token)) for token in range(len(TOKENIZER)))
    with pytest.raises(RequestError) as caught:
        length.check(
            Prompt(messages=({"role": "user", "content": "a"}, {"role": "user", "content": "é" * 5000})), "messages"
        )
    assert (caught.value.status, caught.value.param) == (400, "messages[1].content")
    length.check(Prompt(token_ids=(65,) * 5000), "prompt")  # counted as tokens, later
    assert PromptLength(TOKENIZER, words, None).most is None
    assert PromptLength(None, words, 100).most is None

    class Dropping:  # a tokenizer that has no tokens for spaces
        def __call__(self, text: str, **options: Any) -> dict[str, list[int]]:
            return {"input_ids": TOKENIZER("".join(text.split()), **options)["input_ids"]}

        def __len__(self) -> int:
            return len(TOKENIZER)

    assert PromptLength(Dropping(), words, 100).most is None


# -- bodies, behind vLLM ----------------------------------------------------------------------------------------------


class Behind:
    """The plugin's middleware before an app that keeps what reaches it."""

    def __init__(self, limit: int) -> None:
        self.reached: list[bytes] = []
        engine = AsyncEngine(FakeAsyncPolicy(), FakeScorer(), Letters())  # type: ignore[arg-type]
        self.service = Service(engine, ["m"], limits=Limits(body_bytes=limit), steps=RULE, metrics=Metrics())
        self.state = SimpleNamespace(state=SimpleNamespace(prm_search=self.service))

    async def own(self, scope: Any, receive: Any, send: Any) -> None:
        self.reached.append((await receive())["body"])
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"own"})

    async def ask(self, parts: Iterator[bytes], headers: dict[str, str]) -> tuple[int, dict[str, str], bytes]:
        sent: list[Any] = []

        async def receive() -> Any:
            part = next(parts, None)
            if part is None:
                await asyncio.sleep(3600)
            return {"type": "http.request", "body": part, "more_body": part != b""}

        async def send(message: Any) -> None:
            sent.append(message)

        raw = [(name.lower().encode(), value.encode()) for name, value in headers.items()]
        scope = {"type": "http", "method": "POST", "path": "/v1/completions", "headers": raw, "app": self.state}
        await GuidedRoutes(self.own)(scope, receive, send)
        return sent[0]["status"], {k.decode(): v.decode() for k, v in sent[0]["headers"]}, sent[-1]["body"]


def test_behind_vllm_a_body_is_counted_before_it_is_kept() -> None:
    async def main() -> None:
        behind, taken = Behind(10_000), 0

        def endless() -> Iterator[bytes]:
            nonlocal taken
            while True:
                taken += 1000
                yield b"x" * 1000

        status, headers, said = await behind.ask(endless(), {})
        assert (status, headers["connection"]) == (413, "close")
        assert json.loads(said)["error"]["code"] == "request_too_large"
        assert taken == 11_000
        taken = 0
        status, _, _ = await behind.ask(endless(), {"content-length": str(150 << 20)})
        assert (status, taken) == (413, 0)
        for guided in (b" ", b'{"prm_guidance": {}, "prompt": "'):
            parts = iter([guided, b"a" * 9_999, b"a" * 9_999, b'"}', b""])
            assert (await behind.ask(parts, {}))[0] == 413
        assert behind.reached == []
        assert await behind.ask(iter([b"a" * 9_000, b"b" * 1_000, b""]), {}) == (200, {}, b"own")
        assert behind.reached == [b"a" * 9_000 + b"b" * 1_000]
        page = behind.service.metrics.text().decode()
        assert 'prm_search_requests_total{outcome="too_large",route="text"} 4.0' in page

    asyncio.run(main())


@pytest.mark.parametrize(
    "body",
    [
        b'{"prm\\u005fguidance": {"width": 2, "expansions": 2}, "prompt": [65]}',
        b'{"\\u0070\\u0072m_guidanc\\u0065": {}, "prompt": [65]}',
        b'{"prompt": [65], "prm_guidance": null, "prm_guidance": {}}',
        b' \n{"prompt": [65], "prm_guidance": {}}\t',
    ],
)
def test_a_key_is_guided_however_it_is_spelled(body: bytes) -> None:
    async def main() -> None:
        status, _, said = await Behind(1000).ask(iter([body, b""]), {})
        assert status == 200
        assert json.loads(said)["prm_search"]

    asyncio.run(main())


@pytest.mark.parametrize(("body", "guided"), [
    ('{"prm_guidance": {}}'.encode("utf-16"), True), ('{"prm_guidance": {}}'.encode("utf-8-sig"), True),
    (b'{"prm_guidance": {}, "prm_guidance": null}', False), (b'{"a": "prm_guidance"}', False), (b"[" * 100_000, False),
    (b'{"prm_guidance": ' + b"9" * 9999 + b"}", False), (b"\xff", False), (b"", False),
])  # fmt: skip
def test_what_is_guided(body: bytes, guided: bool) -> None:
    assert is_guided(body) is guided


# -- papercuts --------------------------------------------------------------------------------------------------------

JSON = b'{"prompt": [65]}'


@pytest.mark.parametrize(("headers", "status"), [
    ({}, 200), ({"Content-Type": "application/json; charset=utf-8"}, 200), ({"Content-Type": "Application/JSON"}, 200),
    ({"Content-Type": "application/vnd.api+json"}, 200), ({"Content-Type": "application/x-www-form-urlencoded"}, 200),
    ({"Content-Type": "application/json", "Origin": "http://a"}, 200),
    ({"Content-Type": "text/plain"}, 415), ({"Content-Type": "text/plain;charset=UTF-8", "Origin": "http://a"}, 415),
    ({"Content-Type": "multipart/form-data; boundary=x"}, 415), ({"Content-Type": "application/octet-stream"}, 415),
    ({"Content-Type": "application/x-www-form-urlencoded", "Origin": "null"}, 415),
    ({"Origin": "http://a"}, 415), ({"Sec-Fetch-Site": "cross-site"}, 415),
])  # fmt: skip
def test_pages_of_other_sites_cannot_search(headers: dict[str, str], status: int) -> None:
    async def main() -> None:
        async with client() as asking:
            answer = await asking.post("/v1/completions", content=JSON, headers=headers)
            assert answer.status_code == status
            if status == 415:
                assert answer.json()["error"]["code"] == "unsupported_media_type"
        behind = Behind(1000)
        guided = JSON[:-1] + b', "prm_guidance": {}}'
        assert (await behind.ask(iter([guided, b""]), headers))[0] == status

    asyncio.run(main())


def test_methods_and_the_schema() -> None:
    async def main() -> None:
        async with client() as asking:
            for path in ("/health", "/metrics", "/v1/models", "/v1/models/m"):
                read, head = await asking.get(path), await asking.head(path)
                assert (head.status_code, head.headers["content-type"] if read.content else None) == (
                    200, read.headers["content-type"] if read.content else None,
                )  # fmt: skip
                assert head.content == b"" or path == "/metrics"
                answer = await asking.post(path)
                assert (answer.status_code, answer.headers["allow"]) == (405, "GET, HEAD")
            for path in ("/v1/completions", "/v1/chat/completions"):
                answer = await asking.get(path)
                assert (answer.status_code, answer.headers["allow"]) == (405, "POST")
            schema = (await asking.get("/openapi.json")).json()
            for path, route in schema["paths"].items():
                (operation,) = route.values()
                if path.endswith("completions"):
                    assert {"400", "401", "404", "413", "415", "429", "500", "503", "504"} <= set(
                        operation["responses"]
                    )
                    error = operation["responses"]["400"]["content"]["application/json"]["schema"]
                    assert error == {"$ref": "#/components/schemas/ErrorBody"}
            assert "ErrorBody" in schema["components"]["schemas"]

    asyncio.run(main())


@pytest.mark.parametrize("key", ["", " ", "a b", "a\n", "\x00", "tab\t"])
def test_a_key_that_opens_the_server_or_never_matches_is_refused(key: str) -> None:
    with pytest.raises(ValueError, match="api_keys: an"):
        make_app(lambda: ThreadEngine(Policy(), FakeScorer(), Letters()), ["m"], api_keys=["good", key])  # type: ignore[arg-type]


@pytest.mark.parametrize("key", ["schlüssel", "鍵", "plain", "ключ-😀"])
def test_a_key_of_any_letters_matches_as_utf_8(key: str) -> None:
    async def main() -> None:
        async with client(api_keys=["other", key]) as asking:
            for header, status in (
                (b"Bearer " + key.encode(), 200), (b"bearer " + key.encode(), 200),
                (b"Bearer " + key.encode()[:-1], 401), (b"Bearer \xff", 401), (b"Bearer ", 401),
                (key.encode(), 401), (b"", 401),
            ):  # fmt: skip
                answer = await asking.get("/v1/models", headers=[(b"Authorization", header)])
                assert answer.status_code == status, header

    asyncio.run(main())


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=20,
)


@given(VALUES)
def test_json_in_pieces_is_json(value: Any) -> None:
    assert json.loads(dumps(value)) == value


def test_an_app_without_a_service_is_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Other routes than the two pass the middleware unread."""
    app = FastAPI()

    @app.post("/v1/embeddings")
    async def own() -> str:
        return "own"

    app.add_middleware(GuidedRoutes)

    async def main() -> None:
        async with over(app) as asking:
            assert (await asking.post("/v1/embeddings", content=b"x" * 99)).json() == "own"

    asyncio.run(main())
