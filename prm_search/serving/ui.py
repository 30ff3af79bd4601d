"""/ui: a page on which a search is begun and its tree watched as it grows, over the server's own routes."""

from __future__ import annotations

from typing import Any

from starlette.requests import Request
from starlette.responses import HTMLResponse, Response

from ..answers import SELECTS
from ..strategies import STRATEGIES
from ..values import VALUES
from ..viewer.page import live_page, policy_of
from .service import Service
from .strategy_fields import strategy_options

PATH = "/ui"
ANSWERS = ("boxed", "####", "number")


def ui_settings(service: Service) -> dict[str, Any]:
    """The settings that the page's form is made of. Nothing of them is private: models are listed for who has a key."""
    tokenizer = getattr(service.engine.token_text, "tokenizer", None)
    return {
        "chat": bool(getattr(tokenizer, "chat_template", None)),
        "strategies": {
            name: {option: {"kind": kind, "default": default} for option, kind, default in strategy_options(name)}
            for name in STRATEGIES
        },
        "values": list(VALUES),
        "selects": [name for name in SELECTS if name != "best"],
        "answers": list(ANSWERS),
    }


def ui_response(service: Service) -> Response:
    """The page. It asks the server's own routes alone, and no other site may put it into a frame."""
    headers = {
        "Content-Security-Policy": policy_of("'self'") + "; frame-ancestors 'none'",
        "Referrer-Policy": "no-referrer",
        "X-Content-Type-Options": "nosniff",
        "Cache-Control": "no-cache",
    }
    return HTMLResponse(live_page(ui_settings(service)), headers=headers)


async def ui(request: Request) -> Response:
    """Answer GET /ui of an app that keeps its Service in its state."""
    return ui_response(request.app.state.service)
