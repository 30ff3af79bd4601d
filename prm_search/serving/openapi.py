"""The routes' description in /openapi.json: their bodies and errors, which they read and word themselves."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel

from .schema import ChatBody, CompletionBody

STATUSES = {
    400: "A field is wrong, unknown inside prm_guidance, or not served; param names it.",
    401: "No API key, or a wrong one.",
    404: "Another model than the one served.",
    413: "More bytes, children, choices or prompts than are taken here.",
    415: "A body that is not declared as JSON.",
    429: "As many prompts as are taken on are being searched.",
    500: "The search failed.",
    503: "The server is shutting down.",
    504: "Time was up before anything was drawn.",
}


class Error(BaseModel):
    """See RequestError."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    """The body of every answer that is an error."""

    error: Error


def errors(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """The errors that a route may answer with, as FastAPI's `responses`."""
    return {status: {"description": STATUSES[status], "model": ErrorBody} for status in statuses}


def request_body(route: Literal["chat", "text"]) -> dict[str, Any]:
    """The body, as FastAPI's `openapi_extra`: the route reads it itself, to word its errors as OpenAI does."""
    body = ChatBody if route == "chat" else CompletionBody
    schema = body.model_json_schema(ref_template="#/components/schemas/{model}")
    parts = schema.pop("$defs", {})
    return {"requestBody": {"content": {"application/json": {"schema": _inlined(schema, parts)}}, "required": True}}


def _inlined(schema: Any, parts: dict[str, Any]) -> Any:
    """A JSON schema with its references replaced by what they stand for (none of these is recursive)."""
    if isinstance(schema, dict):
        if "$ref" in schema:
            return _inlined(parts[schema["$ref"].rsplit("/", 1)[1]], parts)
        return {name: _inlined(value, parts) for name, value in schema.items()}
    return [_inlined(item, parts) for item in schema] if isinstance(schema, list) else schema
