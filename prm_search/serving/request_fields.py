"""Fields of a request's body that are no strategy, checked one by one."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, TypeVar

from ..driver.budget import Budget
from ..driver.search_settings import SearchSettings
from ..steps import StepRule
from ..strategies import Strategy
from ..tree import Prompt
from .errors import RequestError, invalid, too_large
from .limits import Limits
from .schema import Body, BudgetBody, ChatBody, CompletionBody, GuidanceBody, StepsBody

T = TypeVar("T")

DELIMITERS, STOPS = 64, 16  # strings of one request: what they cost is paid at every token
LONGEST = 256  # characters of any of them
LONGEST_PATTERN = 1000


def prompts_of(body: Body, limits: Limits) -> tuple[Prompt, ...]:
    if isinstance(body, ChatBody):
        return (Prompt(messages=tuple(message.plain() for message in body.messages)),)
    assert isinstance(body, CompletionBody)
    prompt_value: Any = body.prompt
    several = isinstance(prompt_value, list) and bool(prompt_value) and not isinstance(prompt_value[0], int)
    prompts = prompt_value if several else [prompt_value]
    if len(prompts) > limits.searches:
        raise too_large("prompt", f"{len(prompts)} prompts: at most {limits.searches} here")
    return tuple(
        named_within(f"prompt[{place}]" if several else "prompt", lambda prompt=prompt: Prompt.of(prompt))  # type: ignore[misc]
        for place, prompt in enumerate(prompts)
    )


def continues(body: ChatBody) -> bool:
    """Return True if the last message is the beginning of the answer, as vLLM's field says it."""
    if not body.continue_final_message:
        if body.add_generation_prompt is False:
            message = "add_generation_prompt: false goes with continue_final_message here"
            raise RequestError(400, message, param="add_generation_prompt", code="unsupported_parameter")
        return False
    name = "continue_final_message"
    if body.add_generation_prompt:
        raise invalid(name, "with add_generation_prompt: true: a chat is continued, or answered anew")
    if body.messages[-1].role != "assistant":
        raise invalid(name, f"the last message is the {body.messages[-1].role}'s, not the assistant's")
    if body.prm_guidance is not None:
        message = f"{name} is not served with prm_guidance: a search rewards an answer from its first token"
        raise RequestError(400, message, param=name, code="unsupported_parameter")
    return True


def step_rule(steps: StepsBody | str | list[str] | None, default: StepRule, limits: Limits) -> StepRule:
    if steps is None:
        return default
    if not isinstance(steps, StepsBody):
        steps = StepsBody(delimiter=steps)
    fields_set = {name: getattr(steps, name) for name in steps.model_fields_set}
    delimiters = [steps.delimiter] if isinstance(steps.delimiter, str) else steps.delimiter or ()
    bounded("prm_guidance.steps.delimiter", delimiters, DELIMITERS)
    if steps.regex is not None and not limits.patterns:
        param = "prm_guidance.steps.regex"
        raise RequestError(400, f"{param}: this server takes no patterns", param=param, code="unsupported_parameter")
    if steps.regex is not None and len(steps.regex) > LONGEST_PATTERN:
        raise invalid("prm_guidance.steps.regex", f"{len(steps.regex)} characters: at most {LONGEST_PATTERN} here")
    if steps.regex is not None and "delimiter" not in fields_set:
        fields_set["delimiter"] = None
    return named_within("prm_guidance.steps", lambda: replace(default, **fields_set))


def choice(guide: GuidanceBody, strategy: Strategy) -> dict[str, Any]:
    """The fields of Settings that guidance alone sets, checked as Settings.make does."""
    names = ("value", "select", "answer", "weight", "weight_temperature")
    fields_set = {name: getattr(guide, name) for name in names}
    made = named_within("prm_guidance", lambda: SearchSettings.make(strategy=strategy, **fields_set))
    return {name: getattr(made, name) for name in names}


def budget_of(value: BudgetBody | int | None, limits: Limits) -> Budget:
    body = BudgetBody(tokens=value) if isinstance(value, int) else value or BudgetBody()
    budget = named_within("prm_guidance.budget", lambda: Budget(**body.model_dump()))
    return replace(
        budget,
        tokens=min(budget.tokens or limits.sampled_tokens, limits.sampled_tokens),
        seconds=min(budget.seconds or limits.seconds, limits.seconds),
    )


def stop_strings(value: str | list[str] | None) -> tuple[str, ...]:
    stop = () if value is None else (value,) if isinstance(value, str) else tuple(value)
    bounded("stop", stop, STOPS)
    if not all(stop):
        raise invalid("stop", "an empty string stops nothing")
    return stop


def asks_logprobs(body: Body) -> bool:
    """Return True if log-probabilities are asked for: of the tokens that were drawn, since a search keeps no others."""
    chat = isinstance(body, ChatBody)
    name = "top_logprobs" if chat else "logprobs"
    most = 0 if chat else 1  # the API's 1 is "the one that was drawn, and the likeliest"
    if (getattr(body, name) or 0) > most:
        message = f"{name}: at most {most} here: a search keeps the log-probabilities of the tokens that it draws"
        raise RequestError(400, message, param=name, code="unsupported_parameter")
    logprobs: bool | int | None = body.logprobs  # type: ignore[attr-defined]
    return logprobs is not None and logprobs is not False


def bounded(param: str, strings: Sequence[str], most: int) -> None:
    """Refuse more strings, or longer ones, than a request may have."""
    if len(strings) > most:
        raise invalid(param, f"{len(strings)} strings: at most {most} here")
    longest = max(map(len, strings), default=0)
    if longest > LONGEST:
        raise invalid(param, f"a string of {longest} characters: at most {LONGEST} here")


def named_within(param: str | None, make: Callable[[], T], names: dict[str, str] | None = None) -> T:
    """Return what make() returns; its ValueError or TypeError as the error of a field, which such messages begin with.

    Args:
        param: where in the request its arguments come from; None for the top.
        make: builds something from arguments.
        names: argument -> field, where they differ.
    """
    try:
        return make()
    except (ValueError, TypeError) as error:
        message = str(error)
        match = re.match(r"(?:budget: )?([a-z_]+)=", message)
        own = None if match is None else (names or {}).get(match[1], match[1])
        path = ".".join(part for part in (param, own) if part) or None
        message = message if match is None else f"{path}={message[match.end() :]}"
        message = f"{path}: {message}" if path is not None and match is None else message
        raise RequestError(400, message, param=path, code="invalid_value") from error
