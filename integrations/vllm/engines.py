"""Facts about a vLLM engine: its limits, and the tokens of a search that it has encoded. Imports no vLLM."""

from __future__ import annotations

import itertools
import os
import threading
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from prm_search.engine.prefixes import Prefixes, common
from prm_search.tree import Node, SearchTree

_ids = itertools.count(1)
_made: weakref.WeakKeyDictionary[Any, dict[str, Any]] = weakref.WeakKeyDictionary()
_lock = threading.RLock()
_request_ids = itertools.count(1)

T = TypeVar("T")


def per_engine(engine: Any, kind: str, make: Callable[[], T]) -> T:
    """Return what an engine has one of, making it at the first call. It goes with the engine.

    Args:
        engine: an LLMEngine or an AsyncLLM.
        kind: the name of what is made.
        make: makes it; what it gives must not refer to the engine, but weakly.
    """
    with _lock:
        made: dict[str, Any] = _made.setdefault(engine, {})
        if kind not in made:
            made[kind] = make()
        member: T = made[kind]
        return member


@dataclass(frozen=True)
class EngineFacts:
    """A vLLM engine's description of itself.

    Attributes:
        id: of the engine, equal for everything made from it: a pair and a policy over one engine know each other by it.
        context: tokens that prompt and response may have together.
        vocab: tokens that the model knows.
        top: most probable tokens that it tells of at each place, at most.
        block: tokens of a block of its KV cache.
        cpu: whether it runs on a CPU.
        chunked: whether a prompt may be split over several forwards.
        v2: whether it runs Model Runner V2.
        logprobs_mode: what its log-probabilities are of.
        pools: whether it pools, and does not generate.
    """

    id: Hashable
    context: int
    vocab: int
    top: int
    block: int
    cpu: bool
    chunked: bool
    v2: bool
    logprobs_mode: str
    pools: bool = False

    @classmethod
    def of(cls, engine: Any) -> EngineFacts:
        """Facts of an LLMEngine or an AsyncLLM, the same object each time."""
        return per_engine(engine, "facts", lambda: cls._read(engine))

    @classmethod
    def _read(cls, engine: Any) -> EngineFacts:
        config = engine.vllm_config
        model = config.model_config
        vocab = int(model.get_vocab_size())
        top = int(model.max_logprobs)
        return cls(
            id=f"vllm:{model.model}#{os.getpid()}.{next(_ids)}",
            context=int(model.max_model_len),
            vocab=vocab,
            top=vocab if top < 0 else min(top, vocab),
            block=int(config.cache_config.block_size),
            cpu=config.device_config.device_type == "cpu",
            chunked=bool(config.scheduler_config.enable_chunked_prefill),
            v2=bool(config.use_v2_model_runner),
            logprobs_mode=str(getattr(model.logprobs_mode, "value", model.logprobs_mode)),
            pools=getattr(model, "runner_type", "generate") == "pooling",
        )

    def need_raw_logprobs(self) -> None:
        """Raises ValueError where the engine's log-probabilities are not those of the model."""
        if self.logprobs_mode != "raw_logprobs":
            raise ValueError(
                f"the engine has logprobs_mode={self.logprobs_mode!r}, and the model's own log-probabilities are "
                "needed: start it with logprobs_mode='raw_logprobs', vLLM's default"
            )


class OverEngine(ABC):
    """An object that works by a vllm.LLM or an AsyncLLM."""

    @property
    @abstractmethod
    def source(self) -> Any:
        """The LLM or AsyncLLM."""


PROCESSOR = "ImplicitPRMLogitsProcessor"


def can_steer(engine: Any) -> bool:
    """Return True if an engine was given our logits processor, by name or as a class."""
    processors = getattr(engine.vllm_config.model_config, "logits_processors", None) or ()
    names = [processor if isinstance(processor, str) else processor.__name__ for processor in processors]
    return any(name.rpartition(":")[2] == PROCESSOR for name in names)


def stop_ids(engine: Any, tokenizer: Any) -> frozenset[int]:
    """Tokens that end a response: the eos ids of the model's generation config, else the tokenizer's."""
    eos = engine.vllm_config.model_config.try_get_generation_config().get("eos_token_id")
    if eos is None:
        eos = getattr(tokenizer, "eos_token_id", None)
    if eos is None:
        return frozenset()
    return frozenset([int(eos)] if isinstance(eos, int) else map(int, eos))


def request_id() -> str:
    """An id that no other request of this or another process has."""
    return f"prm-search-{os.getpid()}-{next(_request_ids)}"


class Pump:
    """The step loop of an offline LLMEngine, shared by whatever has requests in it.

    An LLMEngine hands the outputs of all its requests to whoever steps it, and is not thread-safe. So policies, their
    sessions and scorers over one LLM share its pump: each output goes to the function its request was added with.

    Attributes:
        lock: held while the engine is touched; reentrant.
    """

    def __init__(self, engine: Any) -> None:
        self._engine = weakref.ref(engine)
        self.lock = threading.RLock()
        self._takers: dict[str, Callable[[Any], object]] = {}

    @classmethod
    def of(cls, engine: Any) -> Pump:
        """The one pump of an engine."""
        return per_engine(engine, "pump", lambda: cls(engine))

    @property
    def engine(self) -> Any:
        """The engine. Raises RuntimeError where it is gone."""
        engine = self._engine()
        if engine is None:
            raise RuntimeError("the vLLM engine is gone: keep a reference to the LLM while it is used")
        return engine

    def add(self, token_ids: Sequence[int], params: Any, take: Callable[[Any], object]) -> str:
        """Queue a request; `take` is called with each of its outputs, under the lock. Returns its id."""
        with self.lock:
            name = request_id()
            self.engine.add_request(name, {"prompt_token_ids": list(token_ids)}, params)
            self._takers[name] = take
            return name

    def step(self) -> None:
        """One step of the engine."""
        with self.lock:
            for output in self.engine.step():
                take = self._takers.get(output.request_id)
                if take is None:
                    continue
                if output.finished:
                    del self._takers[output.request_id]
                take(output)

    def abort(self, names: Sequence[str]) -> None:
        """End requests; those that have ended are no error."""
        with self.lock:
            live = [name for name in names if self._takers.pop(name, None) is not None]
            if live:
                self.engine.abort_request(live)


class Ledger:
    """The tokens of its trees that an engine has encoded before, so that usage tells new work from repeated work.

    vLLM caches whole blocks only, so the tail of a path is encoded again for every request that goes on from it.

    Args:
        model: id of the engine, for the trees' meters.
    """

    def __init__(self, model: Hashable) -> None:
        self._model = model
        self._seen: weakref.WeakKeyDictionary[SearchTree, dict[Node, int]] = weakref.WeakKeyDictionary()
        self._texts: weakref.WeakKeyDictionary[SearchTree, Prefixes[None]] = weakref.WeakKeyDictionary()

    @classmethod
    def of(cls, engine: Any) -> Ledger:
        """The one ledger of an LLMEngine or an AsyncLLM."""
        return per_engine(engine, "ledger", lambda: cls(EngineFacts.of(engine).id))

    def encoded(self, node: Node, tokens: int, cached: int) -> None:
        """Count a request's prompt.

        Args:
            node: whose path it was, after the tree's prompt.
            tokens: of it, all together.
            cached: of these, found in the prefix cache.
        """
        tree = node.tree
        nodes = [tree.root, *node.path()]
        seen = self._seen.setdefault(tree, {})
        path = sum(len(part.token_ids) for part in nodes)
        sizes = [tokens - path if part is tree.root else len(part.token_ids) for part in nodes]
        new = sum(size - seen.get(part, 0) for part, size in zip(nodes, sizes, strict=True))
        seen.update(zip(nodes, sizes, strict=True))
        first = min(new, tokens - cached)
        tree.meter.add("encoded", self._model, first)
        tree.meter.add("reencoded", self._model, tokens - cached - first)
        tree.meter.add("cached", self._model, cached)

    def repeated(self, tree: SearchTree, tokens: int, cached: int) -> None:
        """Count a prompt of tokens that were all encoded before."""
        tree.meter.add("reencoded", self._model, tokens - cached)
        tree.meter.add("cached", self._model, cached)

    def asked(self, tree: SearchTree, ids: tuple[int, ...], cached: int, drawn: tuple[int, ...] = ()) -> None:
        """Count a text that is asked about beside the tree's nodes.

        Args:
            tree: whose meter counts it.
            ids: its tokens.
            cached: of these, found in the prefix cache.
            drawn: a prompt and what was drawn after it, by this engine: encoded before but for the last token.
        """
        texts = self._texts.setdefault(tree, Prefixes())
        new = len(ids) - max(texts.nearest(ids)[0], common(ids, drawn[:-1]))
        texts.add(ids, None)
        first = min(new, len(ids) - cached)
        tree.meter.add("encoded", self._model, first)
        tree.meter.add("reencoded", self._model, len(ids) - cached - first)
        tree.meter.add("cached", self._model, cached)

    def drawn(self, nodes: Sequence[Node], tokens: int) -> None:
        """Count the tokens one child drew: each but the last was encoded to draw the next.

        Args:
            nodes: the child's chain.
            tokens: drawn, those of no node too.
        """
        tree = nodes[0].tree
        seen = self._seen.setdefault(tree, {})
        for node in nodes[:-1]:
            seen[node] = len(node.token_ids)
        last = nodes[-1]
        seen[last] = max(seen.get(last, 0), len(last.token_ids) - 1)
        tree.meter.add("encoded", self._model, tokens - 1)

    def forget(self, tree: SearchTree) -> None:
        """Drop a tree."""
        self._seen.pop(tree, None)
        self._texts.pop(tree, None)
