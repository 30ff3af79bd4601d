"""The endpoint plugin `prm_search`: vLLM's server answers chat and completion requests with prm_guidance by search.

Everything else goes to vLLM's own routes as it came. vLLM loads the plugin where VLLM_PLUGINS names it.
"""

from __future__ import annotations

import asyncio
import copy
import json
import os
from functools import partial
from typing import Any

from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from prm_search.scorers.kinds import AUTO
from prm_search.serving.backend import AsyncEngine
from prm_search.serving.config import ServeConfig
from prm_search.serving.errors import RequestError
from prm_search.serving.metrics import Metrics
from prm_search.serving.routes import ROUTES, outcome, path_of, read_body, refused, respond
from prm_search.serving.service import Service
from prm_search.serving.ui import PATH, ui_response

NAME = "prm_search"


class PRMSearchEndpoint:
    """The endpoint that vLLM makes of the entry point; see vllm.plugins.endpoint_plugins.interface.EndpointPlugin."""

    name = NAME
    required_tasks = ("generate",)

    def attach_router(self, app: Any) -> None:
        """Put GuidedRoutes before vLLM's routes, and behind its middleware: API keys are checked before."""
        app.add_middleware(GuidedRoutes)
        app.router.routes.append(Route(PATH, ui, methods=["GET"]))

    async def init_state(self, engine_client: Any, state: Any, args: Any) -> None:
        """Load the scorer and make the service, over the server's own engine.

        Raises:
            ValueError, OSError: the configuration makes no sense, or the scorer cannot be loaded. The server then ends.
        """
        from prometheus_client import REGISTRY

        from prm_search.integrations.vllm.engines import can_steer
        from prm_search.integrations.vllm.policy import AsyncVLLMPolicy

        config = ServeConfig.find(os.environ, getattr(args, "additional_config", None))
        tokenizer = chat_tokenizer(engine_client.get_tokenizer(), args)
        policy = AsyncVLLMPolicy(engine_client, tokenizer=tokenizer)

        def steered(alpha: float) -> AsyncVLLMPolicy:
            return AsyncVLLMPolicy(engine_client, tokenizer=tokenizer, alpha=alpha)

        scorer = await asyncio.to_thread(load_scorer, config)
        names = args.served_model_name or [args.model]
        state.prm_search_ui = config.ui
        state.prm_search = Service(
            AsyncEngine(policy, scorer, policy.token_text, steered if can_steer(engine_client) else None),
            [names] if isinstance(names, str) else names,
            limits=config.limits,
            steps=config.steps,
            metrics=Metrics(REGISTRY),  # which vLLM's /metrics tells
            tuned=config.tuned(),
        )


async def ui(request: Request) -> Response:
    """The page /ui, unless the configuration has it switched off."""
    state = request.app.state
    if not state.prm_search_ui:
        return refused(RequestError(404, f"{PATH} is switched off on this server", code="unknown_route"))
    return ui_response(state.prm_search)


def chat_tokenizer(tokenizer: Any, args: Any) -> Any:
    """The server's tokenizer, rendering chats as its own routes do: with --chat-template and
    --default-chat-template-kwargs."""
    template, options = args.chat_template, getattr(args, "default_chat_template_kwargs", None)
    if template is None and not options:
        return tokenizer
    own = copy.copy(tokenizer)
    if template is not None:
        from vllm.entrypoints.chat_utils import load_chat_template

        own.chat_template = load_chat_template(template)
    if options:
        own.apply_chat_template = partial(own.apply_chat_template, **options)
    return own


def load_scorer(config: ServeConfig) -> Any:
    """The scorer that a configuration names: models in this process, or vLLM servers by their URLs."""
    if config.prm is not None and _is_url(config.prm):
        from prm_search.integrations.vllm.scorer import VLLMImplicitPRM

        if config.reference is None:
            raise ValueError("reference is needed beside the URL of a prm: a URL, or 'policy'")
        reference = _server(config.reference) if _is_url(config.reference) else config.reference
        beta: dict[str, Any] = {} if config.beta is None else {"beta": config.beta}
        return VLLMImplicitPRM(_server(config.prm), reference, **beta)
    from prm_search.models.placement import DEMO, placement, shipped

    if config.scorer is not None and _is_url(config.scorer):
        return _step_prm_behind(config.scorer, config.format)
    where = placement(config.device, config.dtype)
    if config.scorer is not None:
        from prm_search.scorers.load import load_scorer as load

        return load(
            str(shipped()) if config.scorer == DEMO else config.scorer, config.format or AUTO, too_long="keep", **where
        )
    from prm_search.scorers.implicit.implicit_prm import ImplicitPRM

    model = config.prm if config.pair is None else str(shipped()) if config.pair == DEMO else config.pair
    return ImplicitPRM.from_pretrained(str(model), config.reference, beta=config.beta, **where)


def _step_prm_behind(url: str, format: str | None) -> Any:
    """A step PRM on another vLLM server, with the tokenizer of the model that it says it serves."""
    from transformers import AutoTokenizer

    from prm_search.integrations.vllm.step_prm import VLLMStepPRM

    if format in (None, AUTO):
        raise ValueError(f"scorer={url!r}: format is needed beside the URL of a step PRM")
    server = _server(url)
    return VLLMStepPRM(server, AutoTokenizer.from_pretrained(server.root), format=str(format), too_long="keep")


def _is_url(name: str) -> bool:
    return name.startswith(("http://", "https://"))


def _server(url: str) -> Any:
    from prm_search.integrations.vllm.server import VLLMServer

    address, _, model = url.partition("#")
    return VLLMServer(address, model=model or None, api_key=os.environ.get("PRM_SEARCH_PAIR_API_KEY"))


class GuidedRoutes:
    """Middleware: answers requests of the two routes whose body has prm_guidance, and lets all others pass.

    Bodies of either kind may have as many bytes as the limits say: whether one is guided is known at its end.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer, or pass on."""
        route = ROUTES.get(path_of(scope)) if scope["type"] == "http" and scope["method"] == "POST" else None
        if route is None:
            await self._app(scope, receive, send)
            return
        service: Service = scope["app"].state.prm_search
        request = Request(scope, receive)
        try:
            body = await read_body(request, service.limits.body_bytes)
        except ClientDisconnect:
            return
        except RequestError as error:
            service.metrics.requests.labels(route, outcome(error)).inc()
            await refused(error)(scope, receive, send)
            return
        if await asyncio.to_thread(is_guided, body):
            await (await respond(service, route, request, body))(scope, receive, send)
            return
        unread: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

        async def again() -> Message:
            return unread.pop() if unread else await receive()

        await self._app(scope, again, send)


def is_guided(body: bytes) -> bool:
    """Return True for a JSON object with prm_guidance, however its key is spelled. Refusing other text is vLLM's."""
    try:
        fields = json.loads(body)
    except (ValueError, RecursionError):
        return False
    return isinstance(fields, dict) and fields.get("prm_guidance") is not None
