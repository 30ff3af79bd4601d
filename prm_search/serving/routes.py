"""The two routes that search, as functions from a request to a response: a FastAPI app or a vLLM plugin calls them."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Awaitable
from typing import Literal, TypeVar

from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from .errors import RequestError, too_large
from .response import dumps, events, whole
from .schema import parse
from .service import Job, Service
from .upstream import unguided

T = TypeVar("T")
logger = logging.getLogger(__name__)

Route = Literal["chat", "text"]
FROM_BROWSERS = ("origin", "sec-fetch-site")  # headers
ROUTES: dict[str, Route] = {"/v1/chat/completions": "chat", "/v1/completions": "text"}


def path_of(scope: Scope) -> str:
    """A request's path, without what a proxy or a mount puts before the app's own."""
    path, root = scope["path"], scope.get("root_path", "")
    return path[len(root) :] if root and path.startswith(root + "/") else path  # as Starlette's router takes it


async def respond(service: Service, route: Route, request: Request, body: bytes | None = None) -> Response:
    """The response to a request of /v1/chat/completions ("chat") or /v1/completions ("text").

    Never raises: what is wrong is said in OpenAI's error schema. A client that goes away ends its search.

    Args:
        service: what answers.
        route: which of the two.
        request: the request.
        body: its body, where it has been read.
    """
    began = time.perf_counter()
    job: Job | None = None
    try:
        need_json(request)
        body = await read_body(request, service.limits.body_bytes) if body is None else body
        upstream = service.engine.upstream
        if upstream is not None and (fields := unguided(body)) is not None:
            service.need_model(fields.get("model"))
            passed = await upstream.pass_on(route, fields)
            await _end(service, route, "passed", None)
            return passed
        job = service.open(parse(route, body))
        if job.ask.stream:
            await _unless_gone(request, job.begun())
            return EventStream(job, route, began)
        results = await _unless_gone(request, job.results())
        answer = await asyncio.to_thread(lambda: dumps(whole(job, results)))
    except (ClientDisconnect, asyncio.CancelledError) as gone:
        await _end(service, route, "disconnected", job)
        if isinstance(gone, asyncio.CancelledError):
            raise
        return Response(status_code=499)
    except RequestError as error:
        await _end(service, route, outcome(error), job)
        return refused(error)
    except Exception as error:
        logger.exception("a request failed")
        await _end(service, route, "error", job)
        return refused(RequestError(500, f"{type(error).__name__}: {error}", code="internal_error"))
    await _end(service, route, "ok", job, began)
    return Response(answer, media_type="application/json")


def need_json(request: Request) -> None:
    """Refuse (415) what a page of another site can make a browser send: a body that does not say it is JSON.

    A body without a type, or with the one that curl gives to all, passes where no browser sent it.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind == "application/json" or kind.endswith("+json"):
        return
    if kind in ("", "application/x-www-form-urlencoded") and not any(map(request.headers.get, FROM_BROWSERS)):
        return
    raise RequestError(415, f"Content-Type: application/json is needed, got {kind!r}", code="unsupported_media_type")


async def read_body(request: Request, limit: int) -> bytes:
    """A request's body. Raises RequestError (413) as soon as it is known to be larger than the limit, in bytes."""
    body = bytearray()
    declared = request.headers.get("content-length", "")
    if declared.isdigit() and int(declared) > limit:
        raise too_large(None, f"the body has {declared} bytes: at most {limit} here")
    async for part in request.stream():
        body += part
        if len(body) > limit:
            error = too_large(None, f"the body has more than the {limit} bytes that are taken here")
            error.headers["Connection"] = "close"  # or the rest, which may have no end, would be read all the same
            raise error
    return bytes(body)


def refused(error: RequestError) -> JSONResponse:
    """An error as a response."""
    return JSONResponse(error.body(), status_code=error.status, headers=error.headers)


def outcome(error: RequestError) -> str:
    """An error's label in the metrics."""
    names = {401: "unauthorized", 413: "too_large", 429: "too_many", 503: "shutting_down", 504: "timeout"}
    return names.get(error.status, "bad_request" if error.status < 500 else "error")


class EventStream(StreamingResponse):
    """A job's answer as server-sent events. However it ends, also before it began, the job is closed."""

    def __init__(self, job: Job, route: Route, began: float) -> None:
        super().__init__(self._events(), media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        self._job, self._route, self._began = job, route, began
        self._outcome = "disconnected"

    async def _events(self) -> AsyncIterator[str]:
        failed = False
        async for event, ok in events(self._job):
            failed |= not ok
            yield event
        self._outcome = "error" if failed else "ok"

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        except ClientDisconnect:
            pass
        finally:
            began = self._began if self._outcome == "ok" else None
            await _end(self._job.service, self._route, self._outcome, self._job, began)


async def _end(service: Service, route: Route, how: str, job: Job | None, began: float | None = None) -> None:
    """Close a job and count its request."""
    service.metrics.requests.labels(route, how).inc()
    if began is not None:
        service.metrics.seconds.labels(route).observe(time.perf_counter() - began)
    if job is not None:
        await asyncio.shield(asyncio.ensure_future(job.close()))


async def _unless_gone(request: Request, work: Awaitable[T]) -> T:
    """The result of some work. Raises ClientDisconnect, and drops the work, where the client goes away first."""
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_gone(request))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientDisconnect
        return task.result()
    finally:
        task.cancel()
        gone.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
