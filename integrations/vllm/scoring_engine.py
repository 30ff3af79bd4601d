"""Engines that answer asks: an offline LLM, an AsyncLLM, a server over HTTP. Each keeps what it knows of a search."""

from __future__ import annotations

import asyncio
import weakref
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Callable, Hashable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from prm_search.integrations.vllm.engines import EngineFacts, Ledger, OverEngine, Pump, per_engine, request_id
from prm_search.integrations.vllm.logprob_requests import Ask, LogprobAnswer, fields, read_output
from prm_search.integrations.vllm.pooling import PoolRequest, pooling_fields, pooling_task, read_pooled
from prm_search.integrations.vllm.token_trie import TokenTrie
from prm_search.tree import SearchTree

_COMPLETE = ("length", "stop")


@dataclass(frozen=True)
class Pending:
    """Answers under way.

    Attributes:
        result: waits for them and returns them in the order of the asks.
        cancel: gives them up; no error where they have come.
    """

    result: Callable[[], list[LogprobAnswer]]
    cancel: Callable[[], object]


class ScoredEngine(ABC):
    """A model that gives log-probabilities of tokens. Made once an engine, so that two scorers over it share its memo.

    Attributes:
        id: as a policy over the same engine has it.
        tokenizer: the engine's; None where it is not known.
        context: tokens of a path that it can score: one is left for the token that vLLM draws in any case.
        vocab: tokens that the model knows; None where it does not say.
        ledger: counts what the engine encodes.
        forward_calls: requests so far.
        pools: it pools, and does not generate; None where it is not known.
    """

    id: Hashable
    tokenizer: Any = None
    context: int | None = None
    vocab: int | None = None
    pools: bool | None = None

    def __init__(self, id: Hashable, ledger: Ledger) -> None:
        self.id = id
        self._memos: weakref.WeakKeyDictionary[SearchTree, dict[tuple[int, ...], TokenTrie]] = (
            weakref.WeakKeyDictionary()
        )
        self.ledger = ledger
        self.forward_calls = 0

    @staticmethod
    def of(source: Any) -> ScoredEngine | None:
        """The engine behind a vllm.LLM, an AsyncLLM, a policy over either, or a VLLMServer; None for anything else."""
        if isinstance(source, ScoredEngine):
            return source
        if isinstance(source, OverEngine):
            source = source.source
        inner = getattr(source, "llm_engine", None)
        core = inner if inner is not None else source
        if not hasattr(core, "vllm_config"):
            return None
        make: Callable[[], ScoredEngine] = partial(AsyncEngine if inner is None else OfflineEngine, core)
        return per_engine(core, "scoring", make)

    @abstractmethod
    def begin(self, asks: Sequence[Ask | PoolRequest]) -> Pending:
        """Send asks off. Raises TypeError where only ask_async serves."""

    async def ask_async(self, asks: Sequence[Ask | PoolRequest]) -> list[LogprobAnswer]:
        """Answers to asks, in order, on the running event loop."""
        return await asyncio.to_thread(lambda: self.begin(asks).result())

    def memo(self, tree: SearchTree, prompt: tuple[int, ...]) -> TokenTrie:
        """Return what is known of a tree behind a prompt in these tokens; freed by release."""
        memos = self._memos.setdefault(tree, {})
        if prompt not in memos:
            memos[prompt] = TokenTrie(tree)
        return memos[prompt]

    def release(self, tree: SearchTree) -> None:
        """Forget a tree. Its KV stays in the engine's prefix cache until that needs the room."""
        self._memos.pop(tree, None)
        self.ledger.forget(tree)


class _LocalEngine(ScoredEngine):
    """The common part of an LLM and an AsyncLLM."""

    def __init__(self, engine: Any) -> None:
        self._facts = EngineFacts.of(engine)
        super().__init__(self._facts.id, Ledger.of(engine))
        self._engine = weakref.ref(engine)
        self.tokenizer = engine.get_tokenizer()
        self.context = self._facts.context - 1
        self.vocab = self._facts.vocab
        self.pools = self._facts.pools
        self._task: str | None = None  # of pooling; asked for once
        self._facts.need_raw_logprobs()

    @property
    def engine(self) -> Any:
        """The engine. Raises RuntimeError where it is gone."""
        engine = self._engine()
        if engine is None:
            raise RuntimeError("the vLLM engine is gone: keep a reference to it while it is used")
        return engine

    def _params(self, ask: Ask | PoolRequest) -> Any:
        if isinstance(ask, PoolRequest):
            from vllm import PoolingParams

            return PoolingParams(**pooling_fields(self.engine, str(self._task)))
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        return SamplingParams(**fields(ask, v2=self._facts.v2), output_kind=RequestOutputKind.FINAL_ONLY)

    def _read(self, ask: Ask | PoolRequest, output: Any) -> LogprobAnswer:
        if isinstance(ask, PoolRequest):
            return read_pooled(ask, output)
        return read_output(ask, output, v2=self._facts.v2)


class OfflineEngine(_LocalEngine):
    """An LLM's engine, stepped together with the policies over it."""

    def begin(self, asks: Sequence[Ask | PoolRequest]) -> Pending:
        """See ScoredEngine.begin; engines in processes of their own begin to work at once."""
        pump = Pump.of(self.engine)
        if self._task is None and any(isinstance(ask, PoolRequest) for ask in asks):
            self._task = pooling_task(self.engine, self.engine.get_supported_tasks())
        outputs: dict[int, Any] = {}
        names: list[str] = []
        self.forward_calls += len(asks)

        def cancel() -> None:
            pump.abort(names)

        def result() -> list[LogprobAnswer]:
            try:
                while True:
                    with pump.lock:
                        if len(outputs) == len(asks):
                            break
                        pump.step()
            except BaseException:
                cancel()
                raise
            return [self._read(ask, outputs[place]) for place, ask in enumerate(asks)]

        try:
            for place, ask in enumerate(asks):
                names.append(pump.add(ask.token_ids, self._params(ask), partial(outputs.__setitem__, place)))
        except BaseException:
            cancel()
            raise
        return Pending(result, cancel)


class AsyncEngine(_LocalEngine):
    """An AsyncLLM, or another EngineClient."""

    def begin(self, asks: Sequence[Ask | PoolRequest]) -> Pending:
        """Raises TypeError."""
        raise TypeError("a scorer over an AsyncLLM scores on its event loop: use asearch, or await ascore_nodes(nodes)")

    async def ask_async(self, asks: Sequence[Ask | PoolRequest]) -> list[LogprobAnswer]:
        """See ScoredEngine.ask_async."""
        self.forward_calls += len(asks)
        if self._task is None and any(isinstance(ask, PoolRequest) for ask in asks):
            self._task = pooling_task(self.engine, await self.engine.get_supported_tasks())
        tasks = [asyncio.create_task(self._one(ask)) for ask in asks]
        try:
            return list(await asyncio.gather(*tasks))
        finally:
            for task in tasks:
                task.cancel()

    async def _one(self, ask: Ask | PoolRequest) -> LogprobAnswer:
        prompt = {"prompt_token_ids": list(ask.token_ids)}
        last = None
        async for output in self._send(ask, prompt):
            last = output
        if last is None or (not isinstance(ask, PoolRequest) and last.outputs[0].finish_reason not in _COMPLETE):
            raise RuntimeError("vLLM ended a request for numbers of a scorer before it was complete")
        return self._read(ask, last)

    def _send(self, ask: Ask | PoolRequest, prompt: dict[str, list[int]]) -> AsyncIterator[Any]:
        send = self.engine.encode if isinstance(ask, PoolRequest) else self.engine.generate
        outputs: AsyncIterator[Any] = send(prompt, self._params(ask), request_id())
        return outputs
