"""The FastAPI app: OpenAI's chat and completion routes over any Engine, /v1/models, /health and /metrics."""

from __future__ import annotations

import hmac
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, Request
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Receive, Scope, Send

from ..steps import StepRule
from .backend import Backend
from .errors import RequestError
from .metrics import Metrics
from .request import Limits
from .routes import ROUTES, outcome, path_of, refused, respond
from .schema import ChatBody, CompletionBody
from .service import Service

BODIES = {"chat": ChatBody, "text": CompletionBody}


def make_app(
    make_engine: Callable[[], Backend],
    models: Sequence[str],
    *,
    limits: Limits | None = None,
    steps: StepRule | None = None,
    api_keys: Sequence[str] = (),
) -> FastAPI:
    """An app that makes its engine when it starts, on its own event loop, and closes it when it ends.

    Args:
        make_engine: called once.
        models: names of the policy; see Service.
        limits: None for the defaults.
        steps: the StepRule of requests that give none; None for StepRule().
        api_keys: if any, requests of /v1 need one of them as a bearer token.

    Returns:
        the app; while it runs, `app.state.service` is its Service.
    """

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        engine = make_engine()
        app.state.service = Service(
            engine, models, limits=limits or Limits(), steps=steps or StepRule(), metrics=Metrics()
        )
        try:
            yield
        finally:
            await app.state.service.drain()
            engine.close()

    app = FastAPI(title="prm-search", lifespan=lifespan)
    for path, route in ROUTES.items():
        app.add_api_route(path, _searching(route), methods=["POST"], openapi_extra=_documented(BODIES[route]))

    @app.get("/v1/models")
    async def list_models(request: Request) -> Response:
        service: Service = request.app.state.service
        return JSONResponse({"object": "list", "data": [_card(service, name) for name in service.models]})

    @app.get("/v1/models/{name:path}")
    async def one_model(request: Request, name: str) -> Response:
        service: Service = request.app.state.service
        return JSONResponse(_card(service, name)) if name in service.models else refused(service.unknown(name))

    @app.get("/health")
    async def health(request: Request) -> Response:
        service: Service = request.app.state.service
        return Response(status_code=200 if service.engine.alive and not service.draining else 503)

    @app.get("/metrics")
    async def metrics(request: Request) -> Response:
        return Response(request.app.state.service.metrics.text(), media_type="text/plain; version=0.0.4")

    @app.exception_handler(404)
    @app.exception_handler(405)
    async def no_such_route(request: Request, error: Any) -> Response:
        said = f"{request.method} {request.url.path} is no route of this server"
        return refused(RequestError(error.status_code, said, code="unknown_route"))

    if api_keys:
        app.add_middleware(BearerKeys, keys=tuple(api_keys))
    return app


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
        scheme, _, key = request.headers.get("authorization", "").partition(" ")
        matches = [hmac.compare_digest(key.encode(), each) for each in self._keys]  # all of them: in constant time
        return scheme.lower() == "bearer" and any(matches)


def _card(service: Service, name: str) -> dict[str, Any]:
    about = {"object": "model", "created": service.started, "owned_by": "prm_search"}
    return {"id": name} | about | {"max_model_len": service.engine.context}


def _searching(route: Any) -> Callable[[Request], Any]:
    async def search(request: Request) -> Response:
        return await respond(request.app.state.service, route, request)

    return search


def _documented(body: type[Any]) -> dict[str, Any]:
    """The request's body for /docs; the route reads it itself, to word its errors as OpenAI does."""
    schema = body.model_json_schema(ref_template="#/components/schemas/{model}")
    parts = schema.pop("$defs", {})
    return {"requestBody": {"content": {"application/json": {"schema": _inlined(schema, parts)}}, "required": True}}


def _inlined(schema: Any, parts: dict[str, Any]) -> Any:
    """A JSON schema with its references replaced by what they stand for (none of these is recursive)."""
    if isinstance(schema, dict):
        if "$ref" in schema:
            return _inlined(parts[schema["$ref"].rsplit("/", 1)[1]], parts)
        return {name: _inlined(value, parts) for name, value in schema.items()}
    return [_inlined(each, parts) for each in schema] if isinstance(schema, list) else schema
