"""The FastAPI app: OpenAI's chat and completion routes over any Engine, /v1/models, /health and /metrics."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Match

from ..driver.guidance_file import GuidanceFile
from ..steps import StepRule
from . import ui as ui_page
from .backend import Backend
from .errors import RequestError
from .keys import BearerKeys, check_key
from .limits import Limits
from .metrics import Metrics
from .openapi import STATUSES, errors, request_body
from .routes import ROUTES, refused, respond
from .service import Service


def make_app(
    make_engine: Callable[[], Backend],
    models: Sequence[str],
    *,
    limits: Limits | None = None,
    steps: StepRule | None = None,
    tuned: GuidanceFile | None = None,
    api_keys: Sequence[str] = (),
    ui: bool = True,
) -> FastAPI:
    """An app that makes its engine when it starts, on its own event loop, and closes it when it ends.

    Args:
        make_engine: called once.
        models: names of the policy; see Service.
        limits: None for the defaults.
        steps: the StepRule of requests that give none; None for StepRule().
        tuned: the guidance of requests that bring none; see Service.
        api_keys: if any, requests of /v1 need one of them as a bearer token.
        ui: serve the page /ui. It is told to all, as /health is; what it asks of /v1 needs a key as any request does.

    Returns:
        the app; while it runs, `app.state.service` is its Service.

    Raises:
        ValueError: a key is one that no request could carry; see check_key.
    """
    for key in api_keys:
        check_key("api_keys", key)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        engine = make_engine()
        app.state.service = Service(
            engine, models, limits=limits or Limits(), steps=steps or StepRule(), metrics=Metrics(), tuned=tuned
        )
        try:
            yield
        finally:
            await app.state.service.drain()
            engine.close()

    app = FastAPI(title="prm-search", lifespan=lifespan)
    for path, route in ROUTES.items():
        app.add_api_route(
            path, _searching(route), methods=["POST"], openapi_extra=request_body(route), responses=errors(*STATUSES)
        )
    if ui:
        app.add_api_route(ui_page.PATH, ui_page.ui, methods=["GET"], include_in_schema=False)
    for path, answer, responses in READS:
        app.add_api_route(path, answer, methods=["GET"], responses=responses)
        app.add_api_route(path, answer, methods=["HEAD"], include_in_schema=False)
    app.add_exception_handler(404, _no_such_route)
    app.add_exception_handler(405, _no_such_route)
    if api_keys:
        app.add_middleware(BearerKeys, keys=tuple(api_keys))
    return app


async def _list_models(request: Request) -> Response:
    service: Service = request.app.state.service
    return JSONResponse({"object": "list", "data": [_card(service, name) for name in service.models]})


async def _one_model(request: Request, name: str) -> Response:
    service: Service = request.app.state.service
    return JSONResponse(_card(service, name)) if name in service.models else refused(service.unknown(name))


async def _health(request: Request) -> Response:
    service: Service = request.app.state.service
    return Response(status_code=200 if service.engine.alive and not service.draining else 503)


async def _metrics(request: Request) -> Response:
    return Response(request.app.state.service.metrics.text(), media_type="text/plain; version=0.0.4")


READS: tuple[tuple[str, Callable[..., Any], dict[int | str, dict[str, Any]]], ...] = (
    ("/v1/models", _list_models, errors(401)),
    ("/v1/models/{name:path}", _one_model, errors(401, 404)),
    ("/health", _health, {503: {"description": "It cannot answer requests."}}),
    ("/metrics", _metrics, {}),
)


async def _no_such_route(request: Request, error: Any) -> Response:
    message = f"{request.method} {request.url.path} is no route of this server"
    headers = {}
    if error.status_code == 405:  # each route knows its own methods only
        routes = [route for route in request.app.routes if route.matches(request.scope)[0] is not Match.NONE]
        headers["Allow"] = ", ".join(sorted({method for route in routes for method in route.methods}))
    return refused(RequestError(error.status_code, message, code="unknown_route", headers=headers))


def _card(service: Service, name: str) -> dict[str, Any]:
    about = {"object": "model", "created": service.started, "owned_by": "prm_search"}
    return {"id": name} | about | {"max_model_len": service.engine.context}


def _searching(route: Any) -> Callable[[Request], Any]:
    async def search(request: Request) -> Response:
        return await respond(request.app.state.service, route, request)

    return search
