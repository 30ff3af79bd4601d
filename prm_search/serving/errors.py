"""Errors as OpenAI's API words them."""

from __future__ import annotations

from typing import Any

LONGEST = 1000  # characters of a message


class RequestError(Exception):
    """A request that is answered with an error.

    Args:
        status: of the HTTP response.
        message: for people; cut where it repeats a very long value.
        param: the field that is at fault, as a path: "prm_guidance.width"; None where it is none.
        code: for programs: "invalid_value", "model_not_found", ...
        headers: of the HTTP response.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        message = message if len(message) <= LONGEST else f"{message[:LONGEST]}..."
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.headers = headers or {}

    def body(self) -> dict[str, Any]:
        """{"error": {"message", "type", "param", "code"}}."""
        kind = "rate_limit_error" if self.status == 429 else "server_error" if self.status >= 500 else None
        error = {"message": self.message, "type": kind or "invalid_request_error", "param": self.param}
        return {"error": error | {"code": self.code}}


def invalid(param: str | None, message: str) -> RequestError:
    """A field has a value that cannot be used."""
    return RequestError(400, message if param is None else f"{param}: {message}", param=param, code="invalid_value")


def too_large(param: str | None, message: str) -> RequestError:
    """A request that is larger than this server takes on."""
    full_message = message if param is None else f"{param}: {message}"
    return RequestError(413, full_message, param=param, code="request_too_large")
