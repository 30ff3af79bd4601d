"""VLLMPolicy and AsyncVLLMPolicy: sample steps from a vLLM engine, token ids in and token ids out."""

from __future__ import annotations

import asyncio
import copy
from collections.abc import Callable, Hashable, Iterable, Sequence
from contextlib import aclosing
from functools import partial
from typing import Any

from prm_search.checks import HoldsModels, flag, function, strength, token_set, tokenizer as check_tokenizer
from prm_search.integrations.vllm.drawing import Drawing, EngineRow
from prm_search.integrations.vllm.engines import (
    PROCESSOR,
    EngineFacts,
    Ledger,
    OverEngine,
    Pump,
    can_steer,
    request_id,
    stop_ids as eos_of,
)
from prm_search.integrations.vllm.next_token import NextTokenRound
from prm_search.integrations.vllm.scoring_engine import ScoredEngine
from prm_search.next_token import NextToken
from prm_search.policy import AsyncPolicyBase, PolicyBase
from prm_search.sampling import Request
from prm_search.tokens import TokenText, encode_prompt
from prm_search.tree import Node, Prompt, SearchTree

Stop = Callable[[Sequence[EngineRow]], Sequence[bool]]


class _Base(HoldsModels, OverEngine):
    """The common part of both policies."""

    takes_stop = True
    ranks = True

    def __init__(
        self, engine: Any, tokenizer: Any, stop_ids: Iterable[int] | None, stop: Stop | None, seeds: bool | None
    ) -> None:
        self.tokenizer = engine.get_tokenizer() if tokenizer is None else tokenizer
        check_tokenizer("tokenizer", self.tokenizer)
        self.facts = EngineFacts.of(engine)
        self.facts.need_raw_logprobs()
        self.top_tokens = self.facts.top
        if seeds is not None:
            flag("seeds", seeds)
        if seeds and not self._seeds_are_safe:
            raise ValueError(
                "seeds=True: on a CPU a seeded request whose prompt is split over two forwards kills vLLM's engine: "
                "start it with enable_chunked_prefill=False"
            )
        self.seeds = self._seeds_are_safe if seeds is None else bool(seeds)
        self.token_text = TokenText(self.tokenizer)
        if stop_ids is None:  # vLLM refuses ids beyond its vocabulary, which no draw brings either
            self.stop_ids = frozenset(i for i in eos_of(engine, self.tokenizer) if 0 <= i < self.facts.vocab)
        else:
            self.stop_ids = token_set("stop_ids", stop_ids, self.facts.vocab)
        if stop is not None:
            function("stop", stop, "a function of rows, or None,")
        self._stop = stop
        self.alpha: float | None = None
        self._ledger = Ledger.of(engine)

    @property
    def _seeds_are_safe(self) -> bool:
        return not (self.facts.cpu and self.facts.chunked and not self.facts.v2)

    @property
    def id(self) -> Hashable:
        """Id of the engine whose raw log-probabilities the nodes carry."""
        return self.facts.id

    @property
    def context(self) -> int:
        """Tokens that prompt and response may have together."""
        return self.facts.context

    def encode(self, prompt: Prompt) -> tuple[int, ...]:
        """Token ids of a prompt: as given, by the chat template for messages, else the tokenizer's own encoding.

        Raises:
            ValueError: the prompt is empty, has ids outside the vocabulary, or leaves no room in the context.
        """
        ids = encode_prompt(self.tokenizer, prompt, "the policy's tokenizer")
        if min(ids) < 0 or max(ids) >= self.facts.vocab:
            raise ValueError(f"prompt ids {min(ids)}..{max(ids)} lie outside the vocabulary of {self.facts.vocab}")
        if len(ids) >= self.context:
            raise ValueError(
                f"the prompt has {len(ids)} tokens; the context of {self.context} leaves no room for a response"
            )
        return ids

    def _next_token(self, asks: Sequence[NextToken], words: Sequence[str]) -> tuple[ScoredEngine, NextTokenRound]:
        engine = ScoredEngine.of(self)
        if engine is None:
            raise TypeError(f"{type(self.source).__name__} is no vLLM engine")
        return engine, NextTokenRound(asks, words, self.token_text, self.facts.vocab, engine.context)

    def _drawing(self, request: Request) -> Drawing:
        return Drawing(
            request,
            facts=self.facts,
            text=self.token_text,
            stop_ids=self.stop_ids,
            stop=self._stop,
            alpha=self.alpha,
            seeded=self.seeds,
            ledger=self._ledger,
        )


class VLLMPolicy(_Base, PolicyBase):
    """Samples steps from vLLM's offline `LLM`.

    Every child is a request of its own, with its own cap and seed; vLLM's prefix cache shares the prompt and path
    between them. A child that ends its step makes room at once, and its search goes on without waiting for others.

    Args:
        llm: a vllm.LLM for a causal LM, with its prefix cache on. Keep a reference to it.
        tokenizer: a transformers tokenizer; None for the engine's.
        stop_ids: tokens that end a response; None: the eos ids of the generation config, else the tokenizer's.
        stop: further stop condition: which of these rows, each with a new token, end with it.
        seeds: give each child a seed made of the search's seed, its prompt and its place, so that draws do not depend
            on what else the engine does. None: where that is safe, which on a CPU needs enable_chunked_prefill=False.
            Without it draws come from the engine's own random state.

    Attributes:
        facts: what the engine says of itself.
        tokenizer, stop_ids, seeds: as given or found.

    Raises:
        TypeError: llm is no LLM, or the tokenizer no transformers tokenizer.
        ValueError: seeds=True where that is not safe, or the engine's log-probabilities are not raw.
    """

    def __init__(
        self,
        llm: Any,
        *,
        tokenizer: Any = None,
        stop_ids: Iterable[int] | None = None,
        stop: Stop | None = None,
        seeds: bool | None = None,
    ) -> None:
        engine = getattr(llm, "llm_engine", None)
        if engine is None:
            raise TypeError(f"llm must be a vllm.LLM, got {type(llm).__name__} (AsyncVLLMPolicy takes an AsyncLLM)")
        super().__init__(engine, tokenizer, stop_ids, stop, seeds)
        self.llm = llm
        self._pump = Pump.of(engine)
        self._jobs: dict[Request, tuple[Drawing, list[str]]] = {}

    @property
    def source(self) -> Any:
        """The LLM."""
        return self.llm

    def next_token_logprobs(self, asks: Sequence[NextToken], words: Sequence[str]) -> list[dict[str, float]]:
        """See PolicyBase.next_token_logprobs. Requests read the prefix cache, so a text costs what it adds to those
        before it, and the tail of a block."""
        engine, questions = self._next_token(asks, words)
        return questions.read(engine.begin(questions.requests).result(), self._ledger)

    def session(self) -> VLLMPolicy:
        """This policy with requests of its own; see Policy. Searches may share an engine, also from several threads."""
        own = copy.copy(self)
        own._jobs = {}
        return own

    def submit(self, requests: Sequence[Request]) -> None:
        """Queue a vLLM request a child.

        Raises:
            ValueError: the temperature is above 2, which vLLM refuses.
        """
        with self._pump.lock:  # another session's step would hand over tokens before a request's name is known
            for request in requests:
                drawing = self._drawing(request)
                names: list[str] = []
                self._jobs[request] = (drawing, names)
                for row in drawing.rows:
                    take = partial(self._take, drawing, row, names, len(names))
                    names.append(self._pump.add(drawing.token_ids, drawing.params(row), take))

    def _take(self, drawing: Drawing, row: EngineRow, names: list[str], place: int, output: Any) -> None:
        drawing.take(row, output)
        if row.done and not output.finished:
            self._pump.abort([names[place]])

    def advance(self) -> list[tuple[Request, list[Node]]]:
        """One step of the engine; see Policy.advance."""
        with self._pump.lock:
            ended = self._ended()
            if not ended and self._jobs:  # another session's step may have ended some
                self._pump.step()
                ended = self._ended()
            answered = []
            for request in ended:
                drawing, names = self._jobs.pop(request)
                self._pump.abort(names)  # none is left, unless the engine gave one of them up
                answered.append((request, drawing.finish()))
            return answered

    def _ended(self) -> list[Request]:
        return [request for request, (drawing, _) in self._jobs.items() if drawing.done]

    def interrupt(self, request: Request) -> list[Node]:
        """See Policy.interrupt."""
        with self._pump.lock:
            drawing, names = self._jobs.pop(request)
            self._pump.abort(names)
            return drawing.interrupt()

    def release(self, tree: SearchTree) -> None:
        """Drop a tree's requests. Its KV stays in the engine's prefix cache until that needs the room."""
        self.drop([request for request in self._jobs if request.node.tree is tree])
        self._ledger.forget(tree)

    def drop(self, requests: Sequence[Request]) -> None:
        """Forget unanswered requests; see PolicyBase.drop."""
        with self._pump.lock:
            for request in requests:
                if request in self._jobs:
                    drawing, names = self._jobs.pop(request)
                    self._pump.abort(names)
                    drawing.drop()


class AsyncVLLMPolicy(_Base, AsyncPolicyBase):
    """Samples steps from vLLM's `AsyncLLM`, also a server's: for `asearch` and AsyncSearchLoop.

    Args:
        engine: an AsyncLLM (an EngineClient) for a causal LM, with its prefix cache on.
        tokenizer, stop_ids, stop, seeds: see VLLMPolicy.
        alpha: have the engine's own logits processor steer every token, with this strength.

    Attributes:
        engine: as given.
        facts, tokenizer, stop_ids, seeds: see VLLMPolicy.

    Raises:
        TypeError, ValueError: as VLLMPolicy; or alpha is not in [-1e6, 1e6], or the engine runs without the processor.
    """

    def __init__(
        self,
        engine: Any,
        *,
        tokenizer: Any = None,
        stop_ids: Iterable[int] | None = None,
        stop: Stop | None = None,
        seeds: bool | None = None,
        alpha: float | None = None,
    ) -> None:
        if hasattr(engine, "llm_engine") or not hasattr(engine, "generate"):
            raise TypeError(f"engine must be a vLLM AsyncLLM, got {type(engine).__name__} (VLLMPolicy takes an LLM)")
        super().__init__(engine, tokenizer, stop_ids, stop, seeds)
        if alpha is not None:
            strength("alpha", alpha)
            if not can_steer(engine):
                raise ValueError(f"alpha={alpha!r}: the engine runs without {PROCESSOR} (logits_processors=)")
            self.alpha = float(alpha)
        self.engine = engine
        self._running: dict[Request, list[asyncio.Task[None]]] = {}
        self._interrupted: set[Request] = set()

    @property
    def source(self) -> Any:
        """The AsyncLLM."""
        return self.engine

    async def next_token_logprobs(self, asks: Sequence[NextToken], words: Sequence[str]) -> list[dict[str, float]]:
        """See VLLMPolicy.next_token_logprobs."""
        engine, questions = self._next_token(asks, words)
        return questions.read(await engine.ask_async(questions.requests), self._ledger)

    async def run(self, request: Request) -> list[Node]:
        """The last node of every child's chain (twins repeated); see AsyncPolicy.run.

        Raises:
            ValueError: the temperature is above 2, which vLLM refuses.
        """
        drawing = self._drawing(request)
        tasks = self._running[request] = [asyncio.create_task(self._draw(drawing, row)) for row in drawing.rows]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            del self._running[request]
            interrupted = request in self._interrupted
            self._interrupted.discard(request)
            if not (interrupted or drawing.done):
                drawing.drop()
        failed = next((error for task in tasks if not task.cancelled() and (error := task.exception())), None)
        if failed is not None:
            raise failed
        if interrupted:
            return drawing.interrupt()
        if not drawing.done:
            raise RuntimeError("vLLM ended a request before its step was complete")
        return drawing.finish()

    async def _draw(self, drawing: Drawing, row: EngineRow) -> None:
        outputs = self.engine.generate({"prompt_token_ids": drawing.token_ids}, drawing.params(row), request_id())
        async with aclosing(outputs):  # closed early it aborts the request
            async for output in outputs:
                drawing.take(row, output)
                if drawing.failed is not None:
                    raise RuntimeError(drawing.failed)
                if row.done and not output.finished:
                    break

    def interrupt(self, request: Request) -> bool:
        """Make a running request end now with what its children have drawn; see AsyncPolicyBase.interrupt."""
        tasks = self._running.get(request, ())
        if tasks:
            self._interrupted.add(request)
        for task in tasks:
            task.cancel()
        return True

    def release(self, tree: SearchTree) -> None:
        """Forget a tree. Its KV stays in the engine's prefix cache until that needs the room."""
        self._ledger.forget(tree)
