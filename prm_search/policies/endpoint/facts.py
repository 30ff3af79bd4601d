"""Facts about a server, found out once by a few requests of a token or two."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from ...prompt import Prompt
from ...tokens import encode_prompt
from .client import Counts, Endpoint, Route, deltas
from .retry import described, http_library

Continuation = Literal["continue_final_message", "prefix"]
TOPS = (20, 5)  # likeliest tokens that are asked for; OpenAI's completions tell 5 at most
_TEXT = "One, two,"
_QUESTION = {"role": "user", "content": "Count."}
_PART = "One, two."


@dataclass(frozen=True)
class RouteFacts:
    """Facts about one route.

    Attributes:
        logprobs: it tells tokens and their log-probabilities.
        tops: how many of the likeliest tokens it tells at each place, at most.
        keeps: it keeps stop strings in the text where `include_stop_str_in_output` asks for that.
        names: it names the stop string that ended a choice (`stop_reason`).
    """

    logprobs: bool = False
    tops: int = 0
    keeps: bool = False
    names: bool = False

    def __str__(self) -> str:
        return ("with" if self.logprobs else "without") + " log-probabilities"


@dataclass(frozen=True)
class ServerFacts:
    """Facts about a server.

    Attributes:
        ids: it takes token ids for a prompt and returns those of its answer, and they are the tokenizer's.
        completions, chat: its routes; None for one that it does not have, or that was not asked.
        continues: the field by which a chat goes on with a partial answer; None where there is none.
        trims: the chat template drops white space at the end of the partial answer.
        drops_thoughts: it drops <think> blocks of it.
        n: several choices of one request.
        limit_field: the chat route's name for the tokens of an answer at most.
        context: tokens that prompt and answer may have together; None where it does not say.
        reasons: why something that was asked for is not there, by what it is.
    """

    ids: bool = False
    completions: RouteFacts | None = None
    chat: RouteFacts | None = None
    continues: Continuation | None = None
    trims: bool = False
    drops_thoughts: bool = False
    n: bool = True
    limit_field: Literal["max_tokens", "max_completion_tokens"] = "max_tokens"
    context: int | None = None
    reasons: tuple[tuple[str, str], ...] = ()

    def reason(self, what: str) -> str:
        """Return why something is not there."""
        return dict(self.reasons).get(what, "not asked")

    def __str__(self) -> str:
        parts = []
        if self.ids:
            parts.append("completions by token ids")
        elif self.completions is not None:
            parts.append(f"completions by text, {self.completions}")
        if self.chat is not None:
            how = "not continued" if self.continues is None else f"continued by {self.continues}"
            dropped = ["white space at its end"] * self.trims + ["<think> blocks"] * self.drops_thoughts
            loss = f" (its template drops {' and '.join(dropped)})" if dropped else ""
            parts.append(f"chat {how}{loss}, {self.chat}")
        if not self.n:
            parts.append("one choice a request")
        return "; ".join(parts) or "nothing"


class Probe:
    """Asks a server what it can do.

    Args:
        endpoint: the server.
        tokenizer: the model's, for token ids; None without one.
        continuation: the field by which a chat goes on, where the user knows it; "auto" to find out.
    """

    def __init__(self, endpoint: Endpoint, tokenizer: Any, continuation: Continuation | Literal["auto"]) -> None:
        self._endpoint, self._tokenizer, self._continuation = endpoint, tokenizer, continuation
        self._reasons: dict[str, str] = {}
        self._refused: dict[str, bool] = {}  # because of a field, so that another request may be taken

    async def run(self, routes: Sequence[Route]) -> ServerFacts:
        """Find out.

        Args:
            routes: that may be used.

        Raises:
            ConnectionError: the server cannot be reached.
            ValueError: it refuses the key, does not have the model, or its tokens are not the tokenizer's.
        """
        facts = ServerFacts(context=await self._context())
        if "completions" in routes:
            if self._tokenizer is not None:
                facts = replace(facts, ids=await self._ids())
            if facts.ids:
                # By their ids: of several tokens with one text a server would tell one.
                kept = await self._route("completions", return_tokens_as_token_ids=True)
                facts = replace(facts, completions=kept or RouteFacts(logprobs=True))
            else:
                facts = replace(facts, completions=await self._route("completions"), context=None)
        if "chat" in routes and not (self._tokenizer is not None and facts.completions is not None):
            facts = await self._chat(facts)
        if facts.ids or facts.completions or facts.chat:
            route: Route = "completions" if facts.completions else "chat"
            facts = replace(facts, n=await self._several(route, facts))
        self._reasons.pop("", None)
        return replace(facts, reasons=tuple(self._reasons.items()))

    # -- one thing each -----------------------------------------------------------------------------------------------

    async def _context(self) -> int | None:
        """The model's context. Raises where the server, its key or the model is not there."""
        endpoint = self._endpoint
        try:
            models = await endpoint.models()
        except Exception as error:
            self._refuse(error)
            return None  # a server without a list
        names = [str(model.id) for model in models]
        if names and endpoint.model not in names:
            shown = ", ".join(names[:5]) + (" ..." if len(names) > 5 else "")
            raise ValueError(f"model={endpoint.model!r}: {endpoint.base_url} does not have it; it has {shown}")
        context = next((getattr(m, "max_model_len", None) for m in models if str(m.id) == endpoint.model), None)
        return context if isinstance(context, int) and not isinstance(context, bool) and context > 0 else None

    async def _ids(self) -> bool:
        """Token ids in and out, which have to be the tokenizer's."""
        ids = list(encode_prompt(self._tokenizer, Prompt(text=_TEXT)))
        body = {"max_tokens": 4, "temperature": 0, "return_token_ids": True}
        choices = []
        for prompt in (_TEXT, ids):
            answer = await self._try("ids", "completions", {"prompt": prompt, **body})
            if answer is None:
                return False
            choices += list(answer.choices or ())[:1]
            told = getattr(choices[-1], "prompt_token_ids", None) if choices else None
            self._check(ids, told)
        if len(choices) < 2 or not getattr(choices[1], "token_ids", None):
            self._reasons["ids"] = "it returns no token ids"
            return False
        return True

    def _check(self, ids: Sequence[int], told: Sequence[int] | None) -> None:
        """Raise ValueError where a text has other tokens at the server than here."""
        special = set(self._tokenizer.all_special_ids)
        own, theirs = ([i for i in some if i not in special] for some in (ids, told or ()))
        if told is not None and own != theirs:
            model = self._endpoint.model
            raise ValueError(
                f"tokenizer: its tokens are not those of {model!r}: {_TEXT!r} is {own} here, and {theirs} there"
            )

    async def _route(self, route: Route, **own: Any) -> RouteFacts | None:
        """A route as it is for text: log-probabilities and stop strings; None where the server does not have it."""
        content: dict[str, Any] = {"prompt": _TEXT} if route == "completions" else {"messages": [_QUESTION]}
        body: dict[str, Any] = {**content, **own, "temperature": 0}
        body[self._limit(route)] = 8
        for count in (*TOPS, 0, None):
            asks = {"logprobs": count} if route == "completions" else {"logprobs": True, "top_logprobs": count}
            answer = await self._try(route, route, body if count is None else {**body, **asks})
            if answer is not None or not self._refused.get(route):
                break
        if answer is None:
            return None
        self._reasons.pop(route, None)
        delta = next(iter(deltas(route, answer)), None)
        tops = min((len(token.tops) for token in delta.tokens), default=0) if delta and delta.tokens else 0
        facts = RouteFacts(bool(delta and delta.tokens), min(tops, count or 0))
        # A server that knows the field takes true and refuses what is no boolean; others take or refuse both.
        kept = {**body, self._limit(route): 1, "stop": ["\n\n"]}
        takes = await self._try("stop strings", route, {**kept, "include_stop_str_in_output": True})
        if takes is not None and await self._try("", route, {**kept, "include_stop_str_in_output": [0]}) is None:
            return replace(facts, keeps=True)
        if delta is None or not delta.text.strip():
            return facts
        stop = delta.text.strip()[0]
        answer = await self._try("stop strings", route, {**body, self._limit(route): 8, "stop": [stop]})
        delta = None if answer is None else next(iter(deltas(route, answer)), None)
        return replace(facts, names=delta is not None and delta.finish == "stop" and delta.stop_reason == stop)

    async def _several(self, route: Route, facts: ServerFacts) -> bool:
        """Several choices a request."""
        content: dict[str, Any] = {"prompt": _TEXT} if route == "completions" else {"messages": [_QUESTION]}
        limit = facts.limit_field if route == "chat" else "max_tokens"
        answer = await self._try("n", route, {**content, limit: 1, "n": 2, "temperature": 1})
        return answer is not None and len(answer.choices or ()) == 2

    async def _chat(self, facts: ServerFacts) -> ServerFacts:
        """The chat route, and how an answer of its is continued."""
        chat = await self._route("chat")
        if chat is None and "max_completion_tokens" in self._reasons.get("chat", ""):
            facts = replace(facts, limit_field="max_completion_tokens")
            self._limits = facts.limit_field
            chat = await self._route("chat")
        if chat is None:
            return facts
        facts = replace(facts, chat=chat)
        if self._continuation != "auto":
            facts = replace(facts, continues=self._continuation)
        else:
            anew = await self._prompt_tokens(_PART, None)
            for way in ("continue_final_message", "prefix"):
                tokens = await self._prompt_tokens(_PART, way)
                if anew is not None and tokens is not None and tokens < anew:
                    facts = replace(facts, continues=way)
                    break
            else:
                self._reasons.setdefault(
                    "continues", "the prompt of a partial answer is as long as that of a new one: it is ignored"
                    if anew is not None else "the server counts no prompt tokens, by which this is seen",
                )  # fmt: skip
                return facts
        bare = await self._prompt_tokens(_PART, facts.continues)
        spaced = await self._prompt_tokens(_PART + "\n\n\n\n", facts.continues)
        thought = await self._prompt_tokens("<think>\nThree, four, five.\n</think>\n\n" + _PART, facts.continues)
        return replace(
            facts, trims=bare is not None and spaced == bare, drops_thoughts=bare is not None and thought == bare
        )

    async def _prompt_tokens(self, part: str, way: str | None) -> int | None:
        """Tokens of the prompt that a partial answer makes; None where the server refuses, or does not count."""
        last: dict[str, Any] = {"role": "assistant", "content": part}
        if way == "prefix":
            last["prefix"] = True
        own = {"add_generation_prompt": False, "continue_final_message": True}
        own = own if way == "continue_final_message" else {}
        body = {"messages": [_QUESTION, last], self._limit("chat"): 1, "temperature": 0, **own}
        answer = await self._try("continues", "chat", body)
        return None if answer is None else Counts.of(getattr(answer, "usage", None)).prompt

    # -- asking -------------------------------------------------------------------------------------------------------

    _limits: str = "max_tokens"

    def _limit(self, route: Route) -> str:
        return self._limits if route == "chat" else "max_tokens"

    async def _try(self, what: str, route: Route, body: dict[str, Any]) -> Any:
        """The response; None, with the reason kept, where the server does not take the request."""
        try:
            return await self._endpoint.ask(route, body)
        except Exception as error:
            self._refuse(error)
            self._reasons[what] = described(error)
            self._refused[what] = getattr(error, "status_code", None) in (400, 422)
            return None

    def _refuse(self, error: Exception) -> None:
        """Raise what no other request would change."""
        import openai

        where = self._endpoint.base_url
        if isinstance(error, openai.AuthenticationError | openai.PermissionDeniedError):
            raise ValueError(f"api_key: {where} refuses it: {described(error)}") from error
        if isinstance(error, openai.APIConnectionError | http_library().TransportError):
            raise ConnectionError(f"{where} cannot be reached: {described(error)}") from error
        if isinstance(error, openai.RateLimitError | openai.InternalServerError):
            raise ConnectionError(f"{where} does not answer: {described(error)}") from error
        if not isinstance(error, openai.APIError):
            raise error
