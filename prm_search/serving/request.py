"""A request's content: its body, checked against what this server serves, as prompts and Settings."""

from __future__ import annotations

import secrets
from dataclasses import dataclass, replace
from typing import Literal

from ..driver.budget import Budget
from ..driver.guidance_file import GuidanceFile, within
from ..driver.search_settings import SearchSettings
from ..steps import StepRule
from ..strategies import Beam, BestOfN, Steer
from ..tree import Prompt
from .errors import RequestError, invalid, too_large
from .limits import Limits
from .request_fields import (
    asks_logprobs,
    budget_of,
    choice,
    continues,
    named_within,
    prompts_of,
    step_rule,
    stop_strings,
)
from .schema import Body, ChatBody
from .strategy_fields import children, strategy_of

COMPLETION_TOKENS = 16  # max_tokens of /v1/completions where a request names none, as in OpenAI's API
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
    strategy, alpha = (BestOfN(n), None) if guide is None else strategy_of(guide, limits)
    if guide is not None and body.temperature == 0 and children(strategy) > 1:
        raise invalid("temperature", "at 0 every child of a step is the same: a search needs a temperature above 0")
    stream = bool(body.stream)
    rule = PLAIN_STEP if guide is None else step_rule(guide.steps, steps, limits)
    if isinstance(strategy, BestOfN) and n == strategy.n == 1 and (stream or guide is not None):
        # The same search step by step, so that it can be told so. Where a step's draws depend on where it begins, as
        # vLLM's do, that is another sample: so it is done whether they are told or not.
        strategy = Beam(1, 1, value=getattr(strategy, "value", None))
    settings = named_within(
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
            stop=stop_strings(body.stop),
            include_stop_str=bool(body.include_stop_str_in_output),
            budget=Budget(tokens=limits.sampled_tokens, seconds=limits.seconds),
        ),
    )
    if guide is not None:
        settings = replace(settings, **choice(guide, strategy), budget=budget_of(guide.budget, limits))
    return _request(body, limits, settings, guided=guide is not None, alpha=alpha)


def _tuned(body: Body, limits: Limits, tuned: GuidanceFile, steps: StepRule) -> SearchRequest:
    """Return what a body asks for that leaves the search to the server's guidance file."""
    guide = body.prm_guidance
    for option in (guide.model_extra or {}) if guide is not None else ():
        param = f"prm_guidance.{option}"
        raise RequestError(400, f"{param}: strategy 'tuned' has no options", param=param, code="unknown_parameter")
    asked = getattr(body, "max_completion_tokens", None) or body.max_tokens
    if asked is not None and asked > limits.max_tokens:
        raise invalid("max_tokens", f"{asked}: at most {limits.max_tokens} here")
    strategy, alpha = tuned.strategy, None
    if isinstance(strategy, Steer):
        alpha, strategy = strategy.alpha, BestOfN(strategy.n)
    if children(strategy) > limits.children:
        raise too_large("prm_guidance", f"{children(strategy)} children at once: at most {limits.children} here")
    draws = {name: getattr(body, name) for name in ("temperature", "top_p", "min_p")} | {
        "top_k": None if body.top_k is None else max(body.top_k, 0),
        "max_new_tokens": asked or min(tuned.draws.get("max_new_tokens", limits.max_tokens), limits.max_tokens),
    }
    own = {name: value for name, value in draws.items() if value is not None}
    if own.get("temperature") == 0 and children(strategy) > 1:
        raise invalid("temperature", "at 0 every child of a step is the same: a search needs a temperature above 0")
    settings = named_within(
        None,
        lambda: SearchSettings.make(
            strategy=strategy, steps=tuned.steps or steps, stop=stop_strings(body.stop),
            include_stop_str=bool(body.include_stop_str_in_output), **tuned.choice,
            seed=secrets.randbits(63) if body.seed is None else body.seed, budget=tuned.budget,
            **{"temperature": 1.0, **tuned.draws, **own},
        ),
    )  # fmt: skip
    settings = within(settings, Budget(tokens=limits.sampled_tokens, seconds=limits.seconds))
    return _request(body, limits, settings, guided=True, alpha=alpha)


def _request(
    body: Body, limits: Limits, settings: SearchSettings, *, guided: bool, alpha: float | None
) -> SearchRequest:
    """Return a request of these settings; the rest as its body says."""
    guide = body.prm_guidance
    return SearchRequest(
        kind="chat" if isinstance(body, ChatBody) else "text",
        model=body.model,
        prompts=prompts_of(body, limits),
        settings=settings,
        guided=guided,
        alpha=alpha,
        n=body.n or 1,
        logprobs=asks_logprobs(body),
        token_ids=bool(body.return_token_ids),
        continues=isinstance(body, ChatBody) and continues(body),
        stream=bool(body.stream),
        include_usage=body.stream_options is not None and body.stream_options.include_usage,
        progress=guide is not None and guide.progress,
        candidates=guide is not None and guide.return_candidates,
    )
