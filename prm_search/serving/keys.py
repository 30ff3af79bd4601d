"""API keys: which a server takes, and the middleware that asks for them."""

from __future__ import annotations

import hmac
from collections.abc import Sequence

from starlette.requests import Request
from starlette.types import ASGIApp, Receive, Scope, Send

from .errors import RequestError
from .routes import ROUTES, outcome, path_of, refused


def check_key(name: str, key: str) -> None:
    """Check an API key where a server starts: an empty one would open it to all, and spaces are cut from headers.

    Args:
        name: of the argument.
        key: the key. Its characters outside ASCII count as UTF-8.

    Raises:
        ValueError: it is empty, or holds spaces or control characters.
    """
    if not key:
        raise ValueError(f"{name}: an empty API key would let everybody in; leave it out for a server without keys")
    if any(character.isspace() or not character.isprintable() for character in key):
        raise ValueError(f"{name}: an API key holds no spaces and no control characters")


class BearerKeys:
    """Middleware: requests of /v1 carry one of these keys."""

    def __init__(self, app: ASGIApp, keys: Sequence[str]) -> None:
        self._app, self._keys = app, [key.encode() for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or answer 401."""
        if scope["type"] != "http" or not path_of(scope).startswith("/v1") or self._allowed(Request(scope)):
            await self._app(scope, receive, send)
            return
        error = RequestError(
            401, "an API key is needed: Authorization: Bearer KEY", code="invalid_api_key",
            headers={"WWW-Authenticate": "Bearer"},
        )  # fmt: skip
        route = ROUTES.get(path_of(scope))
        if route is not None:
            scope["app"].state.service.metrics.requests.labels(route, outcome(error)).inc()
        await refused(error)(scope, receive, send)

    def _allowed(self, request: Request) -> bool:
        header = request.headers.get("authorization", "").encode("latin-1")  # the bytes that came
        scheme, _, key = header.partition(b" ")
        matches = [hmac.compare_digest(key, known) for known in self._keys]  # all of them: in constant time
        return scheme.lower() == b"bearer" and any(matches)
