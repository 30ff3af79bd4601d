"""Wrong requests, against the app in this process."""

from __future__ import annotations

import asyncio
import json
import math
import random
from collections.abc import Iterator, Mapping
from typing import Any

import httpx
from fakes import EOS, RULE, FakePolicy, FakeScorer
from fuzz_cases import Allowed, Case, Finding, flag, nothing, one_of, real, short, whole

from prm_search.serving.app import make_app
from prm_search.serving.backend import ThreadEngine
from prm_search.serving.limits import Limits
from prm_search.serving.schema import UNSERVED
from prm_search.strategies import STRATEGIES
from prm_search.values import VALUES


class Bytes:
    """Tokens that are bytes."""

    special = frozenset([EOS])

    @staticmethod
    def piece(token: int) -> bytes:
        return bytes([token])


class Server:
    """The app over fakes, asked on an event loop of its own."""

    def __init__(self) -> None:
        self._runner = asyncio.Runner()
        self._runner.run(self._start())

    async def _start(self) -> None:
        limits = Limits(patterns=True, body_bytes=20_000)
        app = make_app(lambda: ThreadEngine(FakePolicy(), FakeScorer(), Bytes()), ["m"], limits=limits, steps=RULE)  # type: ignore[arg-type]
        self._lifespan = app.router.lifespan_context(app)
        await self._lifespan.__aenter__()
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        self._client = httpx.AsyncClient(transport=transport, base_url="http://fuzz")

    def ask(self, path: str, content: bytes, kind: str = "application/json", method: str = "POST") -> httpx.Response:
        """The answer to a request."""
        return self._runner.run(
            self._client.request(method, path, content=content, headers={"Content-Type": kind}, timeout=60)
        )

    def close(self) -> None:
        """End it."""
        self._runner.run(self._client.aclose())
        self._runner.run(self._lifespan.__aexit__(None, None, None))
        self._runner.close()


def cases(server: Server, rng: random.Random, size: int) -> Iterator[Case]:
    """All of them."""
    for where, fields in (
        ("", TOP),
        ("prm_guidance.", GUIDE),
        ("prm_guidance.steps.", STEPS),
        ("prm_guidance.budget.", BUDGET),
    ):
        for name, allowed in fields.items():
            for given in json_pool(rng, size):
                if not allowed(given):
                    yield _case(server, "/v1/completions", where + name, given)
    for name, harmless in UNSERVED.items():
        for given in json_pool(rng, 1):
            numeric = isinstance(given, int | float)
            if not any(given == each and (numeric or type(given) is type(each)) for each in harmless):
                yield _case(server, "/v1/completions", name, given)
    for given in json_pool(rng, size):
        for name in ("messages", "messages[0]", "messages[0].content", "messages[0].role"):
            text = isinstance(given, str) and (name.endswith("content") or (name.endswith("role") and given))
            if not text and not (name.endswith("content") and given == []):
                yield _case(server, "/v1/chat/completions", name, given)
    for _ in range(10 * size):
        name = "".join(rng.choice("abcdefgh_") for _ in range(9))
        for part in ("prm_guidance.", "prm_guidance.steps.", "prm_guidance.budget."):
            yield _case(server, "/v1/completions", part + name, 1)
    yield from _garbage(server, rng, 20 * size)


def json_pool(rng: random.Random, size: int) -> Iterator[Any]:
    """Values that JSON can say."""
    yield from (
        True,
        False,
        0,
        -1,
        1.5,
        -0.5,
        1e39,
        10**30,
        2**63,
        "",
        "x",
        "1",
        "\x00",
        [],
        [1],
        ["x"],
        [None],
        [[]],
        [""],
        {},
        {"x": 1},
        {"type": "json_object"},
        [{"a": [1.5]}],
    )
    for _ in range(size):
        yield rng.choice(
            (
                lambda: rng.randint(-(10**12), -1),
                lambda: -rng.random() * 10 ** rng.randint(0, 30),
                lambda: rng.randint(3, 9) + 0.5,
                lambda: "".join(chr(rng.randint(1, 0xD7FF)) for _ in range(6)),
                lambda: [rng.random()],
                lambda: {"k": rng.random()},
            )
        )()


def _texts(given: Any) -> bool:
    texts = given if isinstance(given, list) else [given]
    return all(isinstance(each, str) and each for each in texts)


TOP: Mapping[str, Allowed] = {
    "model": nothing,
    "n": lambda given: whole(1)(given) and given <= 256,
    "max_tokens": lambda given: whole(1)(given) and given <= 4096,
    "temperature": real(lambda x: 0 <= x <= 2),
    "top_p": real(lambda x: 0 < x <= 1),
    "top_k": lambda given: whole(-1)(given) and given < 2**31,
    "min_p": real(lambda x: 0 <= x <= 1),
    "seed": lambda given: whole(-(2**63))(given) and given < 2**63,
    "stop": lambda given: _texts(given) or given == [],
    "stream": flag,
    "stream_options": lambda given: isinstance(given, dict),
    "prompt": lambda given: (_texts(given) and given != []) or given == [1],
    "prm_guidance": lambda given: given == {},
}
GUIDE: Mapping[str, Allowed] = {
    "strategy": one_of(*STRATEGIES),
    "alpha": nothing,
    "steps": lambda given: _texts(given) or given in ([], {}),
    "value": one_of(*VALUES),
    "select": one_of("best", "majority", "weighted"),
    "answer": one_of("boxed", "####", "number"),
    "weight": one_of("softmax", "sigmoid"),
    "weight_temperature": real(lambda x: 0 < x < math.inf),
    "budget": lambda given: given == {} or whole(1)(given),
    "return_candidates": flag,
    "progress": flag,
    "width": lambda given: whole(1)(given) and given <= 64,
    "expansions": lambda given: whole(1)(given) and given <= 64,
    "per_parent": lambda given: whole(1)(given) and given <= 256,
    "merge": flag,
    "n": nothing,
    "subtrees": nothing,
    "rollouts": nothing,
}
STEPS: Mapping[str, Allowed] = {
    "delimiter": lambda given: _texts(given) or given == [],
    "max_tokens": whole(1),
    "regex": lambda given: isinstance(given, str) and given != "",
    "confidence": real(lambda x: 0 <= x <= 1),
}
BUDGET: Mapping[str, Allowed] = {name: whole(1) for name in ("tokens", "nodes", "depth")} | {
    "seconds": real(lambda x: 0 < x < math.inf)
}


def _case(server: Server, path: str, name: str, given: Any) -> Case:
    chat = path.endswith("chat/completions")
    body: dict[str, Any] = {"max_tokens": 8} | (
        {"messages": [{"role": "user", "content": "a"}]} if chat else {"prompt": [65]}
    )
    at: Any = body
    parts = name.replace("[0]", ".0").split(".")
    for part in parts[:-1]:
        at = at[int(part)] if part.isdigit() else at.setdefault(part, {})
    if isinstance(at, list):
        at[int(parts[-1])] = given
    else:
        at[parts[-1]] = given
    target = path if not name.startswith("prm_guidance.") else ".".join(name.split(".")[:-1])
    return Case("http", target, name, short(given), lambda: _answer(server.ask(path, json.dumps(body).encode()), name))


def _answer(answer: httpx.Response, name: str | None) -> None:
    """Raise what an answer to a wrong request comes to."""
    if answer.status_code >= 500:
        raise Finding("traceback", f"{answer.status_code} {answer.text[:200]}")
    if answer.status_code < 400:
        if '"error"' in answer.text:  # of a stream
            raise Finding("traceback", answer.text[:200])
        raise Finding("silent", "accepted")
    try:
        error = answer.json()["error"]
        param, message = error["param"], error["message"]
    except (ValueError, KeyError, TypeError):
        raise Finding("unclear", f"{answer.status_code} {answer.text[:200]}") from None
    named = name is None or (param is not None and (param.startswith(name) or name.startswith(param)))
    raise Finding("clear" if named and message else "unclear", f"{answer.status_code} {param}: {message}")


def _garbage(server: Server, rng: random.Random, size: int) -> Iterator[Case]:
    """Bodies that are no request at all, and requests that are none of the API's."""
    whole_body = json.dumps({"prompt": [65], "prm_guidance": {"width": 2, "steps": {"delimiter": ";"}}}).encode()
    for _ in range(size):
        cut = rng.randrange(1, len(whole_body))
        for body in (whole_body[:cut], whole_body[:cut] + bytes([rng.randrange(128, 256)]) + whole_body[cut:]):
            yield Case(
                "http",
                "garbage",
                "body",
                short(body),
                lambda body=body: _answer(server.ask("/v1/completions", body), None),
            )  # type: ignore[misc]
    for kind in ("text/plain", "multipart/form-data", "application/xml", "text/html; charset=utf-8"):
        yield Case(
            "http",
            "garbage",
            "Content-Type",
            kind,
            lambda kind=kind: _answer(server.ask("/v1/completions", whole_body, kind), None),
        )  # type: ignore[misc]
    for method in ("GET", "PUT", "DELETE", "PATCH"):
        yield Case(
            "http",
            "garbage",
            "method",
            method,
            lambda method=method: _answer(server.ask("/v1/completions", b"", method=method), None),
        )  # type: ignore[misc]
    yield Case(
        "http", "garbage", "body", "30,000 bytes", lambda: _answer(server.ask("/v1/completions", b"x" * 30_000), None)
    )
    for body in (
        b"[" * 9000,
        b"9" * 9000,
        b'{"prompt": [65], "n": ' + b"9" * 9000 + b"}",
        b'{"prompt": "\\ud800"}',
        b"\x00",
        b"nul",
    ):
        yield Case(
            "http", "garbage", "body", short(body), lambda body=body: _answer(server.ask("/v1/completions", body), None)
        )  # type: ignore[misc]
