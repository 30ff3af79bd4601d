"""Requests of OpenAI's chat and completion routes with `prm_guidance`, as pydantic models.

Strict inside prm_guidance. Of OpenAI's and vLLM's other fields, those that change nothing here are let pass, and those
that would have an effect elsewhere are refused by name instead of being ignored.
"""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
from types import MappingProxyType
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from .errors import RequestError, invalid

# Fields that are not served, with the values that ask for nothing. null is always one.
UNSERVED: Mapping[str, tuple[Any, ...]] = MappingProxyType(
    {
        "allowed_token_ids": ([],), "audio": (), "bad_words": ([],), "best_of": (1,),
        "cache_salt": (), "chat_template": (), "chat_template_kwargs": ({},),
        "documents": ([],), "ec_transfer_params": (), "echo": (False,), "frequency_penalty": (0,),
        "function_call": ("none",), "functions": ([],), "guided_choice": (), "guided_grammar": (), "guided_json": (),
        "guided_regex": (), "ignore_eos": (False,), "kv_transfer_params": (),
        "length_penalty": (1,), "logit_bias": ({},), "logits_processors": ([],), "logprob_token_ids": ([],),
        "min_tokens": (0,), "modalities": (["text"],), "prediction": (), "presence_penalty": (0,),
        "priority": (0,), "prompt_embeds": (), "prompt_logprobs": (), "reasoning_effort": (),
        "repetition_detection": (), "repetition_penalty": (1,), "response_format": ({"type": "text"},),
        "return_mm_kwargs": (False,), "return_prompt_text": (False,),
        "return_token_offsets": (False,), "return_tokens_as_token_ids": (False,), "skip_special_tokens": (True,),
        "stop_token_ids": ([],), "structured_outputs": (), "suffix": ("",), "thinking_token_budget": (),
        "tool_choice": ("none", "auto"), "tools": ([],), "top_logprobs": (0,), "truncate_prompt_tokens": (),
        "use_beam_search": (False,), "vllm_xargs": ({},), "watermarking": (), "web_search_options": (),
    }
)  # fmt: skip


# Lists end at the first wrong item: the errors of a million of them would hold the server for seconds.
Strings = Annotated[list[str], Field(fail_fast=True)]
Ids = Annotated[list[int], Field(fail_fast=True)]


class Closed(BaseModel):
    """A part of a request in which a field that is unknown is an error; `parse` names it."""

    model_config = ConfigDict(strict=True, extra="allow")


class StepsBody(Closed):
    """A StepRule; a field that is absent takes the server's default."""

    delimiter: str | Strings | None = None
    max_tokens: int | None = None
    regex: str | None = None
    confidence: float | None = None
    confidence_of: str = "top"


class BudgetBody(Closed):
    """A Budget, within the server's limits."""

    tokens: int | None = None
    nodes: int | None = None
    depth: int | None = None
    seconds: float | None = None


class GuidanceBody(BaseModel):
    """`prm_guidance`. What a strategy has for options (width, expansions, n, ...) stands beside these fields."""

    model_config = ConfigDict(strict=True, extra="allow")

    strategy: str = "beam"
    alpha: float | None = None
    steps: StepsBody | str | Strings | None = None
    value: str | None = None
    select: str | None = None
    answer: str | None = None
    weight: str = "softmax"
    weight_temperature: float = 1.0
    budget: BudgetBody | int | None = None
    return_candidates: bool = False
    progress: bool = False


class StreamOptions(BaseModel):
    """Of a streamed answer."""

    model_config = ConfigDict(strict=True, extra="allow")

    include_usage: bool = False


class Body(BaseModel):
    """The body of both routes."""

    model_config = ConfigDict(strict=True, extra="allow")

    model: str | None = None
    n: int | None = Field(default=None, ge=1)
    max_tokens: int | None = Field(default=None, ge=1)
    temperature: float | None = Field(default=None, ge=0, le=2)
    top_p: float | None = Field(default=None, gt=0, le=1)
    top_k: int | None = Field(default=None, ge=-1, lt=2**31)
    min_p: float | None = Field(default=None, ge=0, le=1)
    seed: int | None = Field(default=None, ge=-(2**63), lt=2**63)
    stop: str | Strings | None = None
    include_stop_str_in_output: bool | None = None
    return_token_ids: bool | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    prm_guidance: GuidanceBody | None = None


class TextPart(BaseModel):
    """A part of a message's content; other types than text are not served."""

    model_config = ConfigDict(strict=True, extra="allow")

    type: Literal["text"]
    text: str


class Message(BaseModel):
    """A chat message. Its other fields are the chat template's business."""

    model_config = ConfigDict(strict=True, extra="allow")

    role: Annotated[str, Field(min_length=1)]
    content: str | Annotated[list[TextPart], Field(fail_fast=True)]

    def plain(self) -> dict[str, Any]:
        """For a chat template: content as one string."""
        content = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": self.role, "content": content} | (self.model_extra or {})


class ChatBody(Body):
    """A request of /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1, fail_fast=True)]
    logprobs: bool | None = None
    top_logprobs: int | None = Field(default=None, ge=0)
    max_completion_tokens: int | None = Field(default=None, ge=1)
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None


class CompletionBody(Body):
    """A request of /v1/completions."""

    logprobs: int | None = Field(default=None, ge=0)
    prompt: str | Strings | Ids | Annotated[list[Ids], Field(fail_fast=True)]


def parse(kind: Literal["chat", "text"], body_json: bytes) -> Body:
    """A request from JSON.

    Raises:
        RequestError: 400 with the field's name: a field is of the wrong kind or out of range, unknown inside
            prm_guidance, or not served.
    """
    try:
        body = (ChatBody if kind == "chat" else CompletionBody).model_validate_json(body_json)
    except ValidationError as error:
        raise _named(error) from error
    refused = {**UNSERVED, "add_special_tokens": (kind == "text",)}  # as each route does without being asked
    for name, value in (body.model_extra or {}).items():
        if value is not None and name in refused and not any(_same(value, allowed) for allowed in refused[name]):
            raise RequestError(400, f"{name} is not served here", param=name, code="unsupported_parameter")
    guide = body.prm_guidance
    for part, part_body in () if guide is None else (("steps", guide.steps), ("budget", guide.budget)):
        if isinstance(part_body, Closed) and part_body.model_extra:
            param = f"prm_guidance.{part}.{next(iter(part_body.model_extra)):.80}"
            raise RequestError(400, f"{param} is unknown", param=param, code="unknown_parameter")
    if body.stream_options is not None and not body.stream:
        raise invalid("stream_options", "only with stream: true")
    return body


def _same(value: Any, other: Any) -> bool:
    return value == other and isinstance(value, bool) == isinstance(other, bool)


def _named(error: ValidationError) -> RequestError:
    """The first thing that is wrong, with its path in the request."""
    first = error.errors(include_url=False, include_context=False)[0]
    if not first["loc"]:
        kind = type(first["input"]).__name__
        wrong = first["msg"] if first["type"] == "json_invalid" else f"a JSON object is needed, not {kind}"
        return RequestError(400, f"the body: {wrong}", code="invalid_json")
    param, kinds = "", {"str", "int", "StepsBody", "BudgetBody"}  # pydantic names the arm of a union in the path
    for part in first["loc"]:
        if isinstance(part, int):
            param += f"[{part}]"
        elif part not in kinds and not part.startswith("list["):
            param += f".{part}" if param else part
    message = first["msg"][:1].lower() + first["msg"][1:]
    if first["type"] == "missing":
        return RequestError(400, f"{param} is needed", param=param, code="missing_required_parameter")
    return invalid(param, f"{message}, got {reprlib.repr(first['input'])}")
