"""A policy and a scorer that block, driven in one thread for searches on an event loop.

All that touches the models happens in that thread, in the order in which it was asked for: requests of all searches are
decoded together, one forward a round, and their nodes are scored between two rounds.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Hashable, Mapping, Sequence
from contextlib import suppress
from queue import Empty, SimpleQueue
from typing import Any

from ..driver.measured import Measured
from ..protocols import AsyncPolicyBase, Policy, PolicyBase, Request, Scorer, ScorerDefaults
from ..tree import Node, Prompt, SearchTree


class ModelThread(Measured):
    """The thread. Make it on the event loop that is to be answered; `close` it at the end."""

    def __init__(self) -> None:
        super().__init__()
        self._loop = asyncio.get_running_loop()
        self._todo: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._busy: dict[ThreadPolicy, None] = {}  # policies with requests under way
        self._thread = threading.Thread(target=self._work, name="prm-search models", daemon=True)
        self._thread.start()

    def post(self, act: Callable[[], None]) -> None:
        """Have something done in the thread, after all that was posted before; it must not raise."""
        self._todo.put(act)

    async def call(self, act: Callable[[], Any]) -> Any:
        """Return what act() returns or raises, done in the thread."""
        future: asyncio.Future[Any] = self._loop.create_future()

        def do() -> None:
            try:
                self.answer(future, act())
            except BaseException as error:
                self.answer(future, error)

        self.post(do)
        return await future

    def answer(self, future: asyncio.Future[Any], value: Any) -> None:
        """Resolve a future from the thread; with an exception, make it raise that."""
        with suppress(RuntimeError):  # the event loop is closed: nobody waits
            self._loop.call_soon_threadsafe(_resolve, future, value)

    def close(self) -> None:
        """Let the thread end what it is doing and stop; futures that wait stay unanswered."""
        self._todo.put(None)
        self._thread.join()

    @property
    def alive(self) -> bool:
        """Return True if it runs."""
        return self._thread.is_alive()

    def busy(self, policy: ThreadPolicy, is_busy: bool) -> None:
        """Have a policy advance when nothing else is to be done, or no longer; for the thread itself."""
        if is_busy:
            self._busy[policy] = None
        else:
            self._busy.pop(policy, None)

    def _work(self) -> None:
        while True:
            try:
                act = self._todo.get(block=not self._busy)
            except Empty:
                for policy in list(self._busy):
                    policy.advance()
                continue
            if act is None:
                return
            act()


def _resolve(future: asyncio.Future[Any], value: Any) -> None:
    if future.done():
        return
    if isinstance(value, BaseException):
        future.set_exception(value)
    else:
        future.set_result(value)


class ThreadPolicy(AsyncPolicyBase):
    """An AsyncPolicy over a Policy that a ModelThread drives. Several search loops may share one.

    A search that ends, or is cancelled, releases its tree, and that drops what the policy still draws for it.
    """

    def __init__(self, thread: ModelThread, policy: Policy) -> None:
        self.base = policy
        self._policy = PolicyBase.of(policy).session()
        self.alpha, self.takes_stop = self._policy.alpha, self._policy.takes_stop
        self.top_tokens, self.ranks, self.choice = self._policy.top_tokens, self._policy.ranks, self._policy.choice
        self.names = self._policy.names
        self._thread = thread
        self._waiting: dict[Request, asyncio.Future[list[Node]]] = {}  # the thread's

    @property
    def id(self) -> Hashable:
        """Id of the policy's model."""
        return self._policy.id

    @property
    def models(self) -> Mapping[str, Hashable]:
        """See PolicyBase."""
        return self._policy.models

    @property
    def context(self) -> int | None:
        """See PolicyBase."""
        return self._policy.context

    @property
    def forward_calls(self) -> int | None:
        """See PolicyBase."""
        return self._policy.forward_calls

    def encode(self, prompt: Prompt) -> tuple[int, ...]:
        """See Policy.encode."""
        return self._policy.encode(prompt)

    async def run(self, request: Request) -> list[Node]:
        """See AsyncPolicy.run."""
        future: asyncio.Future[list[Node]] = asyncio.get_running_loop().create_future()
        self._thread.post(lambda: self._submit(request, future))
        return await future

    def interrupt(self, request: Request) -> bool:
        """See AsyncPolicyBase."""
        self._thread.post(lambda: self._interrupt(request))
        return True

    async def drop(self, requests: Sequence[Request]) -> None:
        """See AsyncPolicyBase."""
        await self._thread.call(lambda: self._drop(requests))

    def release(self, tree: SearchTree) -> None:
        """See Policy.release; done by the thread, as everything else."""
        self._thread.post(lambda: self._release(tree))

    # -- in the thread ------------------------------------------------------------------------------------------------

    def advance(self) -> None:
        """One forward; whose requests it ended is told. An error is that of every request under way."""
        try:
            with self._thread.measured("policy", self._policy):
                answered = self._policy.advance()
        except Exception as error:
            self._fail(error)
            return
        for request, children in answered:
            self._thread.answer(self._waiting.pop(request), children)
        self._settle()

    def _submit(self, request: Request, future: asyncio.Future[list[Node]]) -> None:
        if future.cancelled():
            return
        try:
            self._policy.submit([request])
        except Exception as error:
            self._thread.answer(future, error)
            return
        self._waiting[request] = future
        self._settle()

    def _interrupt(self, request: Request) -> None:
        if request not in self._waiting:
            return  # it was answered meanwhile
        try:
            children: Any = self._policy.interrupt(request)
        except Exception as error:
            children = error
        self._thread.answer(self._waiting.pop(request), children)
        self._settle()

    def _drop(self, requests: Sequence[Request]) -> None:
        self._policy.drop([request for request in requests if self._waiting.pop(request, None) is not None])
        self._settle()

    def _release(self, tree: SearchTree) -> None:
        for request in [request for request in self._waiting if request.node.tree is tree]:
            self._thread.answer(self._waiting.pop(request), asyncio.CancelledError())
        with suppress(Exception):  # of a model that has failed before; the search that met it has said so
            self._policy.release(tree)
        self._settle()

    def _fail(self, error: Exception) -> None:
        for tree in {request.node.tree for request in self._waiting}:
            with suppress(Exception):
                self._policy.release(tree)
        for future in self._waiting.values():
            self._thread.answer(future, error)
        self._waiting.clear()
        self._settle()

    def _settle(self) -> None:
        self._thread.busy(self, bool(self._waiting))


class ThreadScorer(ScorerDefaults):
    """A Scorer whose nodes a ModelThread scores.

    Args:
        thread: the thread.
        scorer: a Scorer that blocks.
        policy: whose nodes it scores; a pair is bound to it, however often it is met again in other guises.
    """

    def __init__(self, thread: ModelThread, scorer: Scorer, policy: Policy) -> None:
        self.base = ScorerDefaults.of(scorer)
        self.name, self.default_value = self.base.name, self.base.default_value
        self._thread, self._policy = thread, policy

    @property
    def models(self) -> Mapping[str, Hashable]:
        """See Scorer."""
        return self.base.models

    @property
    def policy_context(self) -> int | None:
        """See ImplicitPRM."""
        return self.base.policy_context

    @property
    def forward_calls(self) -> int:
        """Forwards of the thread's scorings so far."""
        return self._thread.forward_calls["scorer"]

    def bind(self, policy: object) -> None:
        """Bind the scorer to the policy behind all guises."""
        self.base.bind(self._policy)

    def check_prompt(self, prompt: Prompt) -> None:
        """See ScorerDefaults. In the caller's thread: it runs no model."""
        self.base.check_prompt(prompt)

    def score_nodes(self, nodes: Sequence[Node]) -> None:
        """In the caller's thread: for the model thread alone."""
        with self._thread.measured("scorer", self.base):
            self.base.score_nodes(nodes)

    async def ascore_nodes(self, nodes: Sequence[Node]) -> None:
        """Score nodes, in the thread."""
        await self._thread.call(lambda: self.score_nodes(nodes))

    def release(self, tree: SearchTree) -> None:
        """Forget a tree; done by the thread."""
        self._thread.post(lambda: self._release(tree))

    def _release(self, tree: SearchTree) -> None:
        with suppress(Exception):
            self.base.release(tree)
