"""A request's content: its body, checked against what this server serves, as prompts and Settings."""

from __future__ import annotations

import dataclasses
import re
import secrets
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeVar

from ..driver.budget import Budget
from ..driver.guidance_file import GuidanceFile, within
from ..driver.search_settings import SearchSettings
from ..steps import StepRule
from ..strategies import STRATEGIES, Beam, BestOfN, Expand, Parallel, Run, Steer, Strategy
from ..tree import Prompt, SearchTree
from .errors import RequestError, invalid, too_large
from .limits import Limits as Limits
from .schema import Body, BudgetBody, ChatBody, CompletionBody, GuidanceBody, StepsBody

T = TypeVar("T")

COMPLETION_TOKENS = 16  # max_tokens of /v1/completions where a request names none, as in OpenAI's API
DELIMITERS, STOPS = 64, 16  # strings of one request: what they cost is paid at every token
LONGEST = 256  # characters of any of them
LONGEST_PATTERN = 1000
TOKENS = ("window", "top")  # options of strategies that count tokens, not children
PLAIN_STEP = StepRule(delimiter=None, max_tokens=4)  # a plain answer is streamed in pieces of so many tokens


@dataclass(frozen=True)
class SearchRequest:
    """A request.

    Attributes:
        kind: which route it came by.
        prompts: one search each.
        settings: of each search.
        guided: score with the pair; otherwise plain sampling.
        alpha: strength of steering; None for an unsteered policy.
        n: choices a prompt.
        logprobs: tell the log-probability of each token.
        token_ids: tell the ids of the prompt and of each token.
        continues: the chat's last message is the beginning of the answer.
        stream, include_usage, progress, candidates: how it is to be answered.
    """

    kind: Literal["chat", "text"]
    model: str | None
    prompts: tuple[Prompt, ...]
    settings: SearchSettings
    guided: bool
    alpha: float | None
    n: int
    logprobs: bool
    token_ids: bool
    continues: bool
    stream: bool
    include_usage: bool
    progress: bool
    candidates: bool

    @property
    def names(self) -> list[str]:
        """Return what each prompt is called in the request."""
        if self.kind == "chat":
            return ["messages"]
        return ["prompt"] if len(self.prompts) == 1 else [f"prompt[{i}]" for i in range(len(self.prompts))]

    @property
    def stop(self) -> tuple[str, ...]:
        """Strings that end a response."""
        return self.settings.sampling.stop

    @property
    def keep_stop(self) -> bool:
        """Return True if the text ends with the stop string that ended it, not before it."""
        return self.settings.sampling.include_stop_str

    @property
    def in_steps(self) -> bool:
        """Return True if steps are streamed as they are settled: one choice that no vote makes."""
        return self.stream and self.n == 1 and self.settings.select == "best"


TUNED = "tuned"  # the strategy of a server's guidance file


def make_ask(body: Body, limits: Limits, *, steps: StepRule, tuned: GuidanceFile | None = None) -> SearchRequest:
    """Return what a body asks for.

    Args:
        body: see schema.parse.
        limits: of the server.
        steps: the server's rule, for what `prm_guidance.steps` leaves open.
        tuned: by which a request is searched that brings no prm_guidance, or whose strategy is "tuned".

    Raises:
        RequestError: 400 for what cannot be, 413 for what is too much, each with the field's name.
    """
    guide = body.prm_guidance
    chat = isinstance(body, ChatBody)
    named = "max_completion_tokens" if getattr(body, "max_completion_tokens", None) is not None else "max_tokens"
    n = body.n or 1
    if n > limits.children:
        raise too_large("n", f"{n}: at most {limits.children} here")
    if tuned is not None and (guide.strategy == TUNED if guide else "prm_guidance" not in body.model_fields_set):
        return _tuned(body, limits, tuned, steps)
    tokens = getattr(body, named) or (limits.max_tokens if chat else min(COMPLETION_TOKENS, limits.max_tokens))
    if tokens > limits.max_tokens:
        raise invalid(named, f"{tokens}: at most {limits.max_tokens} here")
    strategy, alpha = (BestOfN(n), None) if guide is None else _strategy(guide, limits)
    if guide is not None and body.temperature == 0 and _children(strategy) > 1:
        raise invalid("temperature", "at 0 every child of a step is the same: a search needs a temperature above 0")
    stream = bool(body.stream)
    rule = PLAIN_STEP if guide is None else _rule(guide.steps, steps, limits)
    if isinstance(strategy, BestOfN) and n == strategy.n == 1 and (stream or guide is not None):
        # The same search step by step, so that it can be told so. Where a step's draws depend on where it begins, as
        # vLLM's do, that is another sample: so it is done whether they are told or not.
        strategy = Beam(1, 1, value=getattr(strategy, "value", None))
    settings = _within(
        None,
        lambda: SearchSettings.make(
            strategy=strategy,
            steps=rule,
            max_new_tokens=tokens,
            temperature=1.0 if body.temperature is None else body.temperature,
            top_p=1.0 if body.top_p is None else body.top_p,
            top_k=max(body.top_k or 0, 0),  # vLLM's -1 keeps all
            min_p=body.min_p or 0.0,
            seed=secrets.randbits(63) if body.seed is None else body.seed,
            stop=_stop(body.stop),
            include_stop_str=bool(body.include_stop_str_in_output),
            budget=Budget(tokens=limits.sampled_tokens, seconds=limits.seconds),
        ),
    )
    if guide is not None:
        settings = replace(settings, **_choice(guide, strategy), budget=_budget(guide.budget, limits))
    return SearchRequest(
        kind="chat" if chat else "text",
        model=body.model,
        prompts=_prompts(body, limits),
        settings=settings,
        guided=guide is not None,
        alpha=alpha,
        n=n,
        logprobs=_logprobs(body),
        token_ids=bool(body.return_token_ids),
        continues=isinstance(body, ChatBody) and _continues(body),
        stream=stream,
        include_usage=body.stream_options is not None and body.stream_options.include_usage,
        progress=guide is not None and guide.progress,
        candidates=guide is not None and guide.return_candidates,
    )


def _tuned(body: Body, limits: Limits, tuned: GuidanceFile, steps: StepRule) -> SearchRequest:
    """Return what a body asks for that leaves the search to the server's guidance file."""
    guide = body.prm_guidance
    for option in (guide.model_extra or {}) if guide is not None else ():
        param = f"prm_guidance.{option}"
        raise RequestError(400, f"{param}: strategy 'tuned' has no options", param=param, code="unknown_parameter")
    chat = isinstance(body, ChatBody)
    asked = getattr(body, "max_completion_tokens", None) or body.max_tokens
    if asked is not None and asked > limits.max_tokens:
        raise invalid("max_tokens", f"{asked}: at most {limits.max_tokens} here")
    strategy, alpha = tuned.strategy, None
    if isinstance(strategy, Steer):
        alpha, strategy = strategy.alpha, BestOfN(strategy.n)
    if _children(strategy) > limits.children:
        raise too_large("prm_guidance", f"{_children(strategy)} children at once: at most {limits.children} here")
    draws = {name: getattr(body, name) for name in ("temperature", "top_p", "min_p")} | {
        "top_k": None if body.top_k is None else max(body.top_k, 0),
        "max_new_tokens": asked or min(tuned.draws.get("max_new_tokens", limits.max_tokens), limits.max_tokens),
    }
    own = {name: value for name, value in draws.items() if value is not None}
    if own.get("temperature") == 0 and _children(strategy) > 1:
        raise invalid("temperature", "at 0 every child of a step is the same: a search needs a temperature above 0")
    settings = _within(
        None,
        lambda: SearchSettings.make(
            strategy=strategy, steps=tuned.steps or steps, stop=_stop(body.stop),
            include_stop_str=bool(body.include_stop_str_in_output), **tuned.choice,
            seed=secrets.randbits(63) if body.seed is None else body.seed, budget=tuned.budget,
            **{"temperature": 1.0, **tuned.draws, **own},
        ),
    )  # fmt: skip
    return SearchRequest(
        kind="chat" if chat else "text",
        model=body.model,
        prompts=_prompts(body, limits),
        settings=within(settings, Budget(tokens=limits.sampled_tokens, seconds=limits.seconds)),
        guided=True,
        alpha=alpha,
        n=body.n or 1,
        logprobs=_logprobs(body),
        token_ids=bool(body.return_token_ids),
        continues=isinstance(body, ChatBody) and _continues(body),
        stream=bool(body.stream),
        include_usage=body.stream_options is not None and body.stream_options.include_usage,
        progress=guide is not None and guide.progress,
        candidates=guide is not None and guide.return_candidates,
    )


def _prompts(body: Body, limits: Limits) -> tuple[Prompt, ...]:
    if isinstance(body, ChatBody):
        return (Prompt(messages=tuple(message.plain() for message in body.messages)),)
    assert isinstance(body, CompletionBody)
    prompt_value: Any = body.prompt
    several = isinstance(prompt_value, list) and bool(prompt_value) and not isinstance(prompt_value[0], int)
    prompts = prompt_value if several else [prompt_value]
    if len(prompts) > limits.searches:
        raise too_large("prompt", f"{len(prompts)} prompts: at most {limits.searches} here")
    return tuple(
        _within(f"prompt[{place}]" if several else "prompt", lambda prompt=prompt: Prompt.of(prompt))  # type: ignore[misc]
        for place, prompt in enumerate(prompts)
    )


def _continues(body: ChatBody) -> bool:
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


def _strategy(guide: GuidanceBody, limits: Limits) -> tuple[Strategy, float | None]:
    """The strategy, and the strength of steering. Steer is BestOfN over a steered policy, here as in `search`."""
    name = guide.strategy
    if name not in STRATEGIES:
        raise invalid("prm_guidance.strategy", f"{name!r} is unknown; it is one of {', '.join(STRATEGIES)}")
    made = STRATEGIES[name]
    fields, names = _fields(name)
    options = {}
    for option, value in (guide.model_extra or {}).items():
        param = f"prm_guidance.{option}"
        if option not in names:
            message = f"strategy {name!r} has no such option; it takes {', '.join(names)}"
            raise RequestError(400, f"{param}: {message}", param=param, code="unknown_parameter")
        if isinstance(value, list | dict):
            raise invalid(param, f"a {type(value).__name__} is not taken here")
        if isinstance(fields[names[option]].default, bool) and not isinstance(value, bool):
            raise invalid(param, f"true or false is needed, got {value!r:.80}")
        if isinstance(value, int) and value > limits.children and names[option] not in TOKENS:
            raise too_large(param, f"{value}: at most {limits.children} here")
        if value is not None:
            options[names[option]] = value
    strategy = _within("prm_guidance", lambda: made(**options), {own: option for option, own in names.items()})
    children = _children(strategy)
    if children > limits.children:
        raise too_large("prm_guidance", f"{children} children at once: at most {limits.children} here")
    if isinstance(strategy, Steer) and strategy.candidates is not None:
        if guide.alpha is not None:
            raise invalid("prm_guidance.alpha", "steer with candidates chooses tokens, and has no use for a strength")
        return strategy, None
    if isinstance(strategy, Steer) and strategy.below is not None:
        raise invalid("prm_guidance.below", "it needs candidates beside it here")
    if not isinstance(strategy, Steer):
        alpha = None if guide.alpha is None else _within("prm_guidance", lambda: Steer(guide.alpha)).alpha  # type: ignore[arg-type]
        return strategy, alpha
    alpha = 1.0 if guide.alpha is None else guide.alpha
    return BestOfN(strategy.n), _within("prm_guidance", lambda: Steer(alpha)).alpha


def _fields(name: str) -> tuple[dict[str, dataclasses.Field[Any]], dict[str, str]]:
    """The fields of a strategy, and what a request calls those that it may set: "lookahead_steps" is "steps"."""
    made = STRATEGIES[name]
    fields = {field.name: field for field in dataclasses.fields(made)}  # type: ignore[arg-type]
    own = [
        field_name for field_name in fields if field_name != "value" and (made is not Steer or field_name != "alpha")
    ]
    names = {
        f"{name}_{field_name}" if field_name in GuidanceBody.model_fields else field_name: field_name
        for field_name in own
    }
    return fields, names


def strategy_options(name: str) -> Iterator[tuple[str, str, Any]]:
    """The options of a strategy that a plain value can say: what a request calls each, its kind, its default.

    Args:
        name: of the strategy.

    Yields:
        (option, "bool", "number" or "text", default).
    """
    fields, names = _fields(name)
    for option, field_name in names.items():
        default, declared = fields[field_name].default, str(fields[field_name].type)
        if isinstance(default, bool):
            yield option, "bool", default
        elif isinstance(default, int | float) or (default is None and declared.startswith(("int", "float"))):
            yield option, "number", default
        elif isinstance(default, str):
            yield option, "text", default


def _children(strategy: Strategy) -> int:
    """Children that a strategy draws at once, rollouts of each included."""
    return _first(strategy.run(SearchTree(Prompt(token_ids=(0,))).root)) * getattr(strategy, "rollouts", 1)


def _first(run: Run) -> int:
    try:
        ask = next(run)
    except StopIteration:
        return 0
    finally:
        run.close()
    if isinstance(ask, Parallel):
        return sum(map(_first, ask.runs))
    assert isinstance(ask, Expand)
    return len(ask.nodes) * ask.n if isinstance(ask.n, int) else sum(ask.n)


def _rule(steps: StepsBody | str | list[str] | None, default: StepRule, limits: Limits) -> StepRule:
    if steps is None:
        return default
    if not isinstance(steps, StepsBody):
        steps = StepsBody(delimiter=steps)
    fields_set = {name: getattr(steps, name) for name in steps.model_fields_set}
    delimiters = [steps.delimiter] if isinstance(steps.delimiter, str) else steps.delimiter or ()
    _bounded("prm_guidance.steps.delimiter", delimiters, DELIMITERS)
    if steps.regex is not None and not limits.patterns:
        param = "prm_guidance.steps.regex"
        raise RequestError(400, f"{param}: this server takes no patterns", param=param, code="unsupported_parameter")
    if steps.regex is not None and len(steps.regex) > LONGEST_PATTERN:
        raise invalid("prm_guidance.steps.regex", f"{len(steps.regex)} characters: at most {LONGEST_PATTERN} here")
    if steps.regex is not None and "delimiter" not in fields_set:
        fields_set["delimiter"] = None
    return _within("prm_guidance.steps", lambda: replace(default, **fields_set))


def _choice(guide: GuidanceBody, strategy: Strategy) -> dict[str, Any]:
    """The fields of Settings that guidance alone sets, checked as Settings.make does."""
    names = ("value", "select", "answer", "weight", "weight_temperature")
    fields_set = {name: getattr(guide, name) for name in names}
    made = _within("prm_guidance", lambda: SearchSettings.make(strategy=strategy, **fields_set))
    return {name: getattr(made, name) for name in names}


def _budget(value: BudgetBody | int | None, limits: Limits) -> Budget:
    body = BudgetBody(tokens=value) if isinstance(value, int) else value or BudgetBody()
    budget = _within("prm_guidance.budget", lambda: Budget(**body.model_dump()))
    return replace(
        budget,
        tokens=min(budget.tokens or limits.sampled_tokens, limits.sampled_tokens),
        seconds=min(budget.seconds or limits.seconds, limits.seconds),
    )


def _stop(value: str | list[str] | None) -> tuple[str, ...]:
    stop = () if value is None else (value,) if isinstance(value, str) else tuple(value)
    _bounded("stop", stop, STOPS)
    if not all(stop):
        raise invalid("stop", "an empty string stops nothing")
    return stop


def _logprobs(body: Body) -> bool:
    """Return True if log-probabilities are asked for: of the tokens that were drawn, since a search keeps no others."""
    chat = isinstance(body, ChatBody)
    name = "top_logprobs" if chat else "logprobs"
    most = 0 if chat else 1  # the API's 1 is "the one that was drawn, and the likeliest"
    if (getattr(body, name) or 0) > most:
        message = f"{name}: at most {most} here: a search keeps the log-probabilities of the tokens that it draws"
        raise RequestError(400, message, param=name, code="unsupported_parameter")
    logprobs: bool | int | None = body.logprobs  # type: ignore[attr-defined]
    return logprobs is not None and logprobs is not False


def _bounded(param: str, strings: Sequence[str], most: int) -> None:
    """Refuse more strings, or longer ones, than a request may have."""
    if len(strings) > most:
        raise invalid(param, f"{len(strings)} strings: at most {most} here")
    longest = max(map(len, strings), default=0)
    if longest > LONGEST:
        raise invalid(param, f"a string of {longest} characters: at most {LONGEST} here")


def _within(param: str | None, make: Callable[[], T], names: dict[str, str] | None = None) -> T:
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
