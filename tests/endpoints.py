"""A server of OpenAI's routes for tests: what it says, what it can do and how it fails are the test's to set."""

from __future__ import annotations

import asyncio
import json
import math
import threading
from collections import deque
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from servers import serving
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from prm_search import OpenAIPolicy

STEPS = ("First we add.\n\n", "Then we see: 2 + 3 = 5.\n\n", "So it is 5.")
ANSWER = "".join(STEPS)
KNOWN = {
    "model", "messages", "prompt", "max_tokens", "max_completion_tokens", "temperature", "top_p", "n", "seed", "stop",
    "stream", "stream_options", "logprobs", "top_logprobs",
}  # fmt: skip


@dataclass
class Server:
    """A server whose model always says one answer; text that a prompt ends with is taken as said already.

    Attributes:
        answer: the answer, or one for each prompt.
        size: characters of a token.
        chunk: tokens of a chunk.
        models: what it lists; None for no such route.
        chat, completions: whether it has the routes.
        logprobs: tells tokens.
        hollow: a token in the middle of a character is told as U+FFFD, one byte each.
        tops: the likeliest tokens that it tells in every place, with their probabilities.
        keeps, names: include_stop_str_in_output, stop_reason.
        several: takes n.
        strict: refuses fields that OpenAI does not know, and max_tokens in chats.
        continues: "continue_final_message", "prefix" or None.
        trims, drops: the template drops white space, and think blocks.
        usage: completion tokens that it reports: "right", "missing", or a number.
        faults: how the next streamed requests fail: a status, "cut", "error", "hold", or None.
        poison: what a prompt must not contain; it fails with 500.
        retry_after: header of its 429.
        bodies: requests that came, with their routes.
        held: is set when a request stands still; `go` lets it go on.
        closed: is set when a client has closed a stream that had not ended.
    """

    answer: str | Mapping[str, str] = ANSWER
    size: int = 3
    chunk: int = 1
    models: list[str] | None = field(default_factory=lambda: ["m"])
    chat: bool = True
    completions: bool = True
    logprobs: bool = True
    hollow: bool = False
    tops: Mapping[str, float] = field(default_factory=dict)
    keeps: bool = False
    names: bool = False
    several: bool = True
    strict: bool = False
    continues: str | None = "continue_final_message"
    trims: bool = False
    drops: bool = False
    usage: str | int = "right"
    key: str | None = None
    faults: deque[Any] = field(default_factory=deque)
    poison: str | None = None
    retry_after: str | None = None
    bodies: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    held: threading.Event = field(default_factory=threading.Event)
    go: threading.Event = field(default_factory=threading.Event)
    closed: threading.Event = field(default_factory=threading.Event)
    streaming: int = 0
    most: int = 0  # streams at a time

    @property
    def streamed(self) -> list[dict[str, Any]]:
        """The bodies of streamed requests: those that draw."""
        return [body for _, body in self.bodies if body.get("stream")]

    @contextmanager
    def policy(self, **options: Any) -> Iterator[OpenAIPolicy]:
        """The server running, and a policy over it that does not wait between tries."""
        app = Starlette(
            routes=[
                Route("/v1/models", self._models),
                Route("/v1/completions", self._completions, methods=["POST"]),
                Route("/v1/chat/completions", self._chats, methods=["POST"]),
            ]
        )
        with serving(app) as served:  # type: ignore[arg-type]
            made = OpenAIPolicy(f"http://127.0.0.1:{served.port}/v1", "m", **{"sleep": no_wait} | options)
            try:
                yield made
            finally:
                self.go.set()
                made.close()

    async def _models(self, request: Request) -> Response:
        if self.key is not None and request.headers.get("authorization") != f"Bearer {self.key}":
            return error(401, "a key is needed")
        if self.models is None:
            return error(404, "no such route")
        return JSONResponse({"object": "list", "data": [{"id": name, "object": "model"} for name in self.models]})

    async def _completions(self, request: Request) -> Response:
        body = await request.json()
        if not self.completions:
            return error(404, "no such route")
        said = body["prompt"]
        return await self._respond("completions", body, said, len(said))

    async def _chats(self, request: Request) -> Response:
        body = await request.json()
        if not self.chat:
            return error(404, "no such route")
        if self.strict and "max_tokens" in body:
            return error(400, "Unsupported parameter: 'max_tokens'. Use 'max_completion_tokens' instead.")
        *_, last = body["messages"]
        flag = body.get("continue_final_message") or last.get("prefix")
        way = "prefix" if last.get("prefix") else "continue_final_message" if flag else None
        shown = [message["content"] for message in body["messages"]]
        if way is not None and way == self.continues:
            if self.drops and "</think>" in shown[-1]:
                shown[-1] = shown[-1].rpartition("</think>")[2].strip()
            if self.trims:
                shown[-1] = shown[-1].rstrip()
            said, extra = "|".join(shown), 0
        else:
            said, extra = "|".join([*shown, ""]), 4  # the end of the turn, and the beginning of the next
        return await self._respond("chat", body, said, len(said) + extra)

    def _rest(self, said: str) -> str:
        """The answer from where a prompt ends."""
        answers = self.answer.items() if isinstance(self.answer, Mapping) else [("", self.answer)]
        answer = next(text for prompt, text in answers if prompt in said)
        ends = (at for at in range(len(answer), 0, -1) if said.endswith(answer[:at]))
        return answer[next(ends, 0) :]

    async def _respond(self, route: str, body: dict[str, Any], said: str, prompt: int) -> Response:
        self.bodies.append((route, body))
        unknown = set(body) - KNOWN
        if self.strict and unknown:
            return error(400, f"Unrecognized request argument supplied: {sorted(unknown)[0]}")
        if self.keeps and not isinstance(body.get("include_stop_str_in_output", False), bool):
            return error(400, "include_stop_str_in_output: a boolean is needed")
        if body.get("n", 1) > 1 and not self.several:
            return error(400, "n > 1 is not supported")
        fault = self.faults.popleft() if self.faults and body.get("stream") else None
        if self.poison is not None and self.poison in said:
            fault = 500
        if isinstance(fault, int):
            return error(fault, "try again", {} if self.retry_after is None else {"retry-after": self.retry_after})
        tokens, finish, reason = self._draw(body, self._rest(said))
        if self.usage == "missing":
            usage = None
        else:
            count = (len(tokens) + (finish == "stop" and reason is None)) * body.get("n", 1)
            count = count if self.usage == "right" else self.usage
            usage = {"prompt_tokens": prompt, "completion_tokens": count, "total_tokens": prompt}
        chunks = list(self._chunks(route, body, tokens, finish, reason))
        if not body.get("stream"):
            text = "".join(text for text, _ in tokens)
            content = {"text": text} if route == "completions" else {"message": {"role": "assistant", "content": text}}
            choice = content | {"finish_reason": finish, "logprobs": self._told(route, body, tokens)}
            choice |= {"stop_reason": reason} if self.names else {}
            choices = [choice | {"index": place} for place in range(body.get("n", 1))]
            return JSONResponse(
                {"id": "x", "object": "x", "created": 0, "model": "m", "choices": choices, "usage": usage}
            )
        return StreamingResponse(self._stream(chunks, usage, fault), media_type="text/event-stream")

    def _draw(self, body: dict[str, Any], rest: str) -> tuple[list[tuple[str, bytes]], str, str | None]:
        """Tokens of an answer, why it ended, and the stop string that did so."""
        limit = body.get("max_tokens") or body.get("max_completion_tokens") or 1 << 20
        stops = body.get("stop") or []
        stops = [stops] if isinstance(stops, str) else stops
        ends = [(at + len(stop), stop) for stop in stops if (at := rest.find(stop)) >= 0]
        end, reason = min(ends, default=(len(rest), None))
        raw = rest.encode() if self.hollow else None
        cut = (
            rest[:end]
            if reason is None or (self.keeps and body.get("include_stop_str_in_output"))
            else (rest[: end - len(reason)])
        )
        if raw is not None:  # tokens of bytes: the last of a character has its text
            pieces = []
            for character in cut:
                data = character.encode()
                pieces += [("", data[i : i + 1]) for i in range(len(data) - 1)] + [(character, data[-1:])]
        else:
            pieces = [(cut[i : i + self.size], cut[i : i + self.size].encode()) for i in range(0, len(cut), self.size)]
        if len(pieces) > limit or (len(pieces) == limit and reason is None):
            return pieces[:limit], "length", None
        return pieces, "stop", reason

    def _told(self, route: str, body: dict[str, Any], tokens: list[tuple[str, bytes]]) -> Any:
        asked = body.get("logprobs")
        if not self.logprobs or asked is None or asked is False:
            return None
        count = asked if route == "completions" else body.get("top_logprobs") or 0
        tops = [(token, math.log(part)) for token, part in list(self.tops.items())[:count]]
        if route == "completions":
            return {
                "tokens": [data.decode("utf-8", "replace") for _, data in tokens],
                "token_logprobs": [-0.5] * len(tokens), "text_offset": [0] * len(tokens),
                "top_logprobs": [dict(tops)] * len(tokens) if tops else None,
            }  # fmt: skip
        return {
            "content": [
                {
                    "token": data.decode("utf-8", "replace"),
                    "bytes": list(data),
                    "logprob": -0.5,
                    "top_logprobs": [{"token": token, "logprob": value} for token, value in tops],
                }
                for _, data in tokens
            ]
        }

    def _chunks(
        self, route: str, body: dict[str, Any], tokens: list[tuple[str, bytes]], finish: str, reason: str | None
    ) -> Iterator[dict[str, Any]]:
        head = {"id": "x", "object": "x", "created": 0, "model": "m"}
        several = range(body.get("n", 1))
        for at in range(0, len(tokens), self.chunk):
            part = tokens[at : at + self.chunk]
            text = "".join(text for text, _ in part)
            content = {"text": text} if route == "completions" else {"delta": {"content": text}}
            content |= {"logprobs": self._told(route, body, part), "finish_reason": None}
            yield head | {"choices": [content | {"index": place} for place in several]}
        last: dict[str, Any] = {"text": ""} if route == "completions" else {"delta": {}}
        last |= {"finish_reason": finish} | ({"stop_reason": reason} if self.names or self.keeps else {})
        yield head | {"choices": [last | {"index": place} for place in several]}

    async def _stream(self, chunks: list[dict[str, Any]], usage: Any, fault: Any) -> AsyncIterator[str]:
        self.streaming += 1
        self.most = max(self.most, self.streaming)
        ended = False
        try:
            for place, chunk in enumerate(chunks):
                if place == 2 and fault == "cut":
                    ended = True
                    return
                if place == 2 and fault == "error":
                    yield f"data: {json.dumps({'error': {'message': 'the engine died', 'code': 500}})}\n\n"
                if place == 2 and fault == "hold":
                    self.held.set()
                    await asyncio.to_thread(self.go.wait)
                yield f"data: {json.dumps(chunk)}\n\n"
            if usage is not None:
                yield f"data: {json.dumps(chunks[0] | {'choices': [], 'usage': usage})}\n\n"
            yield "data: [DONE]\n\n"
            ended = True
        finally:
            self.streaming -= 1
            if not ended:
                self.closed.set()


async def no_wait(seconds: float) -> None:
    """In place of asyncio.sleep."""


def error(status: int, message: str, headers: dict[str, str] | None = None) -> Response:
    return JSONResponse({"error": {"message": message, "type": "x", "code": None}}, status, headers or {})
