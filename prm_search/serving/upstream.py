"""Requests without prm_guidance, handed on to the server behind the policy: with tools, formats, whatever it takes."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Any, Literal

from starlette.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from .errors import RequestError

if TYPE_CHECKING:
    from ..policies.endpoint.client import Endpoint

_PATHS = {"chat": "/chat/completions", "text": "/completions"}
_HEADERS = ("content-type", "retry-after", "retry-after-ms", "x-request-id")  # of its answers that are handed back


def unguided(body: bytes) -> dict[str, Any] | None:
    """A request's fields, where it asks for no search; None for others, and for what is no JSON object."""
    try:
        fields = json.loads(body)
    except (ValueError, RecursionError):
        return None
    return fields if isinstance(fields, dict) and fields.get("prm_guidance") is None else None


class Upstream:
    """The server behind the policy.

    Args:
        endpoint: its address, model and key. As many requests at a time are handed on as searches make.
    """

    def __init__(self, endpoint: Endpoint) -> None:
        self._endpoint = endpoint

    async def pass_on(self, route: Literal["chat", "text"], fields: dict[str, Any]) -> Response:
        """The server's own answer to a request, streamed where it streams. A client that goes away ends it there too.

        Args:
            route: which of the two.
            fields: of the request; the model's name is replaced by the server's own.

        Raises:
            RequestError: the server cannot be reached.
        """
        from ..policies.endpoint.retry import described, http_library

        own = {name: value for name, value in fields.items() if name != "prm_guidance"} | {
            "model": self._endpoint.model
        }
        try:
            answer = await self._endpoint.forward(_PATHS[route], json.dumps(own).encode())
        except http_library().TransportError as error:
            message = f"the server behind this one cannot be reached: {described(error)}"
            raise RequestError(502, message, code="upstream_failed") from error
        headers = {name: answer.headers[name] for name in _HEADERS if name in answer.headers}
        return _Passed(answer, headers)

    async def close(self) -> None:
        """Close its connections."""
        await self._endpoint.close()


class _Passed(StreamingResponse):
    """An answer on its way through. However it ends, the other connection is closed."""

    def __init__(self, answer: Any, headers: dict[str, str]) -> None:
        super().__init__(self._parts(answer), status_code=answer.status_code, headers=headers)
        self._answer = answer

    @staticmethod
    async def _parts(answer: Any) -> AsyncIterator[bytes]:
        async for part in answer.aiter_bytes():
            yield part

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            await self._answer.aclose()
