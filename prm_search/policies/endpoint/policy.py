"""OpenAIPolicy: sample steps from a model behind an OpenAI-compatible server."""

from __future__ import annotations

import asyncio
import copy
import json
from collections.abc import Awaitable, Callable, Hashable, Iterable, Mapping, Sequence
from functools import partial
from queue import Empty, SimpleQueue
from typing import Any, Literal

from ...checks import HoldsModels, flag, integer, is_one_of, non_empty, number, token_set, tokenizer as check_tokenizer
from ...next_token import NextToken, answer_ids
from ...policy import PolicyBase, RequestFailed
from ...sampling import Request
from ...tokens import TokenText, encode_prompt
from ...tree import Node, Prompt, SearchTree
from .client import Endpoint, Route
from .drawing import Drawing, Way, continued
from .facts import Continuation, Probe, ServerFacts
from .loop_thread import LoopThread, Work
from .next_token import ask_words
from .prompts import Prompts
from .retry import Backoff
from .vocabulary import EOS, TextVocabulary

Mode = Literal["auto", "completions", "chat"]
MODES = ("auto", "completions", "chat")
CONTINUATIONS = ("auto", "continue_final_message", "prefix")
WAIT = 0.05  # seconds for which advance waits for an answer, before the driver looks at its clock


class OpenAIPolicy(HoldsModels, PolicyBase):
    """A model behind an OpenAI-compatible server, for `search` and `asearch` alike.

    The children of a node are choices of one request. Answers are streamed, and the step rule's own matcher decides
    where a step ends: stop strings are sent where that saves tokens, and the connection is closed where the server
    would write on. What the server can do is found out once, when the policy is made, by a few requests of some tokens.

    With the model's tokenizer and a server that takes and returns token ids (vLLM, `prm-search serve`), what is sampled
    is what is scored. Otherwise paths are text: their tokens are numbers of pieces of text, which scorers read in
    tokens of their own, and as many as the server counts.

    A request that fails is tried again (`backoff`). One that is given up ends its own prompt's search (`stopped` is
    "failed"), and no other.

    Args:
        base_url: up to and with `/v1`; None for OPENAI_BASE_URL, else OpenAI's own.
        model: as the server calls it.
        api_key: None for OPENAI_API_KEY, else none.
        mode: "completions" or "chat", the route; "auto" takes completions where a prompt can be written for it (a text,
            or chat messages that `tokenizer` renders), and else chat.
        tokenizer: the model's own; a transformers tokenizer, or where to load it from. None for text in and out.
        continuation: how the server continues a partial answer in a chat: "continue_final_message" (vLLM), "prefix"
            (DeepSeek, Mistral), "auto" to find out.
        concurrency: requests at a time, of all searches together.
        timeout: seconds without a byte, after which a request is tried again.
        backoff: see Backoff.
        seeds: give each request a seed made of the search's seed and its place. (vLLM on a CPU dies of one whose prompt
            is split over two forwards: start it with --no-enable-chunked-prefill, or say False.)
        max_stops: stop strings that one request may have; what is beyond is found here.
        stop_ids: with token ids: what ends a response; None for the tokenizer's end of sequence. What the server says
            ended an answer ends it in any case.
        headers: of every request.
        sleep: waits some seconds between tries, as asyncio.sleep.

    Attributes:
        facts: what the server can do.
        tokenizer: the model's, or numbers of pieces of text.

    Raises:
        ImportError: the package openai is missing: pip install 'prm-search[openai]'.
        ConnectionError: the server cannot be reached.
        ValueError, TypeError: an argument is none; the server refuses the key, lacks the model or the mode's route,
            cannot continue a partial answer in the mode "chat", or has other tokens than the tokenizer.
    """

    takes_stop = True

    def __init__(
        self,
        base_url: str | None,
        model: str,
        *,
        api_key: str | None = None,
        mode: Mode = "auto",
        tokenizer: Any = None,
        continuation: Continuation | Literal["auto"] = "auto",
        concurrency: int = 32,
        timeout: float = 600.0,
        backoff: Backoff | None = None,
        seeds: bool = True,
        max_stops: int = 4,
        stop_ids: Iterable[int] | None = None,
        headers: Mapping[str, str] | None = None,
        sleep: Callable[[float], Awaitable[Any]] = asyncio.sleep,
    ) -> None:
        non_empty("model", model)
        for name, word, allowed in (("mode", mode, MODES), ("continuation", continuation, CONTINUATIONS)):
            if not is_one_of(word, allowed):
                raise ValueError(f"{name}={word!r}: one of {', '.join(allowed)} is needed")
        integer("concurrency", concurrency, 1, "a number of requests >= 1")
        integer("max_stops", max_stops, 0, "a number of strings >= 0")
        number("timeout", timeout, "seconds > 0", lambda seconds: 0 < seconds < float("inf"))
        flag("seeds", seeds)
        if backoff is not None and not isinstance(backoff, Backoff):
            raise TypeError(f"backoff must be a Backoff or None, got {type(backoff).__name__}")
        own = _loaded(tokenizer)
        self.mode, self.seeds, self.max_stops = mode, seeds, max_stops
        self.endpoint = Endpoint(
            base_url, model, api_key=api_key, concurrency=concurrency, timeout=float(timeout),
            backoff=backoff or Backoff(), sleep=sleep, headers=headers,
        )  # fmt: skip
        self._thread = LoopThread(f"prm-search {model}")
        routes: list[Route] = ["completions", "chat"] if mode == "auto" else [mode]
        self.facts: ServerFacts = self._thread.run(Probe(self.endpoint, own, continuation).run(routes))
        self._prompts = Prompts(self.facts, mode, f"{self.endpoint.base_url}, {model!r}", own)
        self._vocabulary = TextVocabulary()
        self.tokenizer: Any = own if self.facts.ids else self._vocabulary
        self.token_text = TokenText(self.tokenizer)
        if not self.facts.ids:
            self.stop_ids = frozenset([EOS])
        elif stop_ids is None:
            self.stop_ids = frozenset([] if own.eos_token_id is None else [int(own.eos_token_id)])
        else:
            self.stop_ids = token_set("stop_ids", stop_ids, len(own))
        told = [route.tops for route in (self.facts.completions, self.facts.chat) if route is not None]
        self.top_tokens = min(told)
        self._jobs: dict[Request, tuple[Drawing, Work[None]]] = {}
        self._answers: SimpleQueue[Request] = SimpleQueue()
        self._failures: list[tuple[Request, RequestFailed]] = []
        self._running: dict[Request, asyncio.Task[None]] = {}
        self._interrupted: set[Request] = set()

    # -- what it is ---------------------------------------------------------------------------------------------------

    @property
    def id(self) -> Hashable:
        """Id of the model whose raw log-probabilities the nodes carry."""
        return f"{self.endpoint.base_url} {self.endpoint.model}"

    @property
    def context(self) -> int | None:
        """Tokens that prompt and response may have together; None for a server that gives text, or does not say."""
        return self.facts.context if self.facts.ids else None

    @property
    def forward_calls(self) -> int:
        """HTTP requests so far, tries counted, of all sessions together."""
        return self.endpoint.calls

    def encode(self, prompt: Prompt) -> tuple[int, ...]:
        """Token ids of a prompt: the model's, or for a server that gives text the numbers of its bytes.

        Raises:
            ValueError: the prompt is empty, leaves no room in the context, or cannot be written for this server.
        """
        if self.facts.ids:
            ids = encode_prompt(self.tokenizer, prompt, "the policy's tokenizer")
            if self.context is not None and len(ids) >= self.context:
                raise ValueError(
                    f"the prompt has {len(ids)} tokens; the context of {self.context} leaves no room for a response"
                )
            return ids
        _, text = self._prompts.write(prompt)
        if text is None:
            text = json.dumps([dict(message) for message in prompt.messages or ()], ensure_ascii=False)
        return self._vocabulary.bytes_ids(text.encode("utf-8", "replace"))

    def _drawing(self, request: Request) -> Drawing:
        facts, text = self.facts, None
        route: Route = "completions"
        if not facts.ids:
            route, text = self._prompts.write(request.node.tree.prompt)
        known = facts.completions if route == "completions" else facts.chat
        assert known is not None
        return Drawing(
            request,
            endpoint=self.endpoint,
            facts=facts,
            way=Way(route, facts.ids, known.logprobs, known.keeps or known.names, known.keeps),
            written=text,
            text=self.token_text,
            vocabulary=self._vocabulary,
            stop_ids=self.stop_ids,
            seeds=self.seeds,
            max_stops=self.max_stops,
            id=self.id,
        )

    def next_token_logprobs(self, asks: Sequence[NextToken], words: Sequence[str]) -> list[dict[str, float]]:
        """See PolicyBase.next_token_logprobs. A word that none of the likeliest tokens spells is left out.

        Raises:
            TypeError: the server tells no likeliest tokens.
            ValueError: a prompt cannot be written for this server.
            RequestFailed: it refused, or failed as often as it was tried.
        """
        if not self.top_tokens:
            raise TypeError(f"{self.endpoint.base_url} tells no log-probabilities of likeliest tokens")
        return self._thread.run(
            ask_words(asks, words, endpoint=self.endpoint, facts=self.facts, content=self._asked, model=str(self.id))
        )

    def _asked(self, ask: NextToken) -> tuple[Route, dict[str, Any]]:
        if self.facts.ids:
            return "completions", {"prompt": [*self.encode(ask.prompt), *answer_ids(ask, self.token_text)]}
        route, text = self._prompts.write(ask.prompt)
        if text is not None:
            return route, {"prompt": text + ask.text}
        return route, continued(self.facts, ask.prompt, ask.text)[0]

    # -- on the running event loop ------------------------------------------------------------------------------------

    async def run(self, request: Request) -> list[Node]:
        """The last node of every child's chain (twins repeated); see AsyncPolicy.run.

        Raises:
            RequestFailed: the server refused, or failed as often as it was tried.
        """
        drawing = self._drawing(request)
        task = self._running[request] = asyncio.create_task(drawing.draw())
        try:
            await asyncio.wait([task])
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            del self._running[request]
            interrupted = request in self._interrupted
            self._interrupted.discard(request)
            if not interrupted and (task.cancelled() or task.exception() is not None):
                drawing.drop()
        if interrupted:
            return drawing.interrupt()
        task.result()
        return drawing.finish()

    async def aclose(self) -> None:
        """Close the connections of the running event loop."""
        await self.endpoint.close()

    def close(self) -> None:
        """Close the connections of searches that block, and end their thread."""
        self._thread.run(self.endpoint.close())
        self._thread.close()

    # -- for callers that block ---------------------------------------------------------------------------------------

    def session(self) -> OpenAIPolicy:
        """This policy with requests of its own; see Policy. Searches may share a server, also from several threads."""
        own = copy.copy(self)
        own._jobs, own._answers, own._failures = {}, SimpleQueue(), []
        return own

    def submit(self, requests: Sequence[Request]) -> None:
        """Send requests; `concurrency` of them are under way at a time."""
        for request in requests:
            drawing = self._drawing(request)
            work = self._thread.start(drawing.draw())
            self._jobs[request] = drawing, work
            work.future.add_done_callback(partial(_answered, self._answers, request))

    def advance(self) -> list[tuple[Request, list[Node]]]:
        """Wait a moment for answers, and return those that there are; see Policy.advance."""
        answered: list[tuple[Request, list[Node]]] = []
        wait: float | None = WAIT
        while self._jobs:
            try:
                request = self._answers.get(block=wait is not None, timeout=wait)
            except Empty:
                break
            wait = None
            if request not in self._jobs:
                continue  # it has been dropped
            drawing, work = self._jobs.pop(request)
            error = work.future.exception()
            if error is None:
                answered.append((request, drawing.finish()))
            elif isinstance(error, RequestFailed):
                drawing.drop()
                self._failures.append((request, error))
            else:
                raise error
        return answered

    def failures(self) -> list[tuple[Request, RequestFailed]]:
        """Requests that have been given up on since the last call; see PolicyBase.failures."""
        failed, self._failures = self._failures, []
        return failed

    def interrupt(self, request: Request) -> list[Node]:
        """End a request now; see Policy.interrupt. One of `run` ends soon: `run` returns what it has drawn."""
        if request in self._jobs:
            return self._end(request).interrupt()
        if request in self._running:
            self._interrupted.add(request)
            self._running[request].cancel()
        return []

    def _end(self, request: Request) -> Drawing:
        """Cancel a request, and wait until nothing is written to its drawing any more."""
        drawing, work = self._jobs.pop(request)
        self._thread.run(work.stop())
        return drawing

    def drop(self, requests: Sequence[Request]) -> None:
        """Forget unanswered requests; see PolicyBase.drop."""
        for request in requests:
            if request in self._jobs:
                self._end(request).drop()

    def release(self, tree: SearchTree) -> None:
        """Drop a tree's requests."""
        self.drop([request for request in self._jobs if request.node.tree is tree])


def _answered(answers: SimpleQueue[Request], request: Request, future: object) -> None:
    answers.put(request)


def _loaded(tokenizer: Any) -> Any:
    """A tokenizer, loaded where it is named; None without one."""
    if tokenizer is None:
        return None
    if not isinstance(tokenizer, str) and not hasattr(tokenizer, "__fspath__"):
        check_tokenizer("tokenizer", tokenizer)
        return tokenizer
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tokenizer)
