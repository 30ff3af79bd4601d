"""AsyncSearchLoop: searches as coroutines over a policy that answers each request on its own."""

from __future__ import annotations

import asyncio
import inspect
import math
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import TypeVar

from ..protocols import AsyncPolicy, AsyncPolicyBase, Request, RequestFailed, Scorer
from ..tree import Node, Prompt
from .driver import Driver
from .participants import Participants
from .records import nodes_of, set_values
from .result import Event, Result
from .search_settings import SearchSettings

T = TypeVar("T")
MANY = 1000  # nodes of a tree
Running = dict["asyncio.Task[list[Node]]", Request]


class AsyncSearchLoop:
    """Searches prompts concurrently on the running event loop; what `asearch` is built on, and servers.

        loop = AsyncSearchLoop(policy, scorer)
        result = await loop.begin(prompt, settings).run()       # as many at a time as you like

    Nodes of all searches are scored together: by `await scorer.ascore_nodes(nodes)` where the scorer has that, else by
    score_nodes in a thread. There is one such call at a time, and no tree is released during one. Where it fails, each
    search's nodes are scored again by themselves, so that only those fail that have to.

    Args:
        policy, scorer, prover, on_event: see `asearch`.
        clock: seconds, rising; for budgets.
    """

    def __init__(
        self,
        policy: AsyncPolicy,
        scorer: Scorer | None = None,
        prover: Scorer | None = None,
        *,
        on_event: Callable[[Event], object] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        own = AsyncPolicyBase.of(policy)
        self.models: Participants[AsyncPolicyBase] = Participants(policy, own, scorer, prover, on_event)
        self.clock = clock
        self.quiet = asyncio.Lock()  # held while nodes are scored or a tree is released
        self._waiting: list[tuple[list[Node], asyncio.Future[None]]] = []
        self._scoring: asyncio.Task[None] | None = None
        self._under_way = 0
        self._since = 0.0
        self._calls: int | None = None  # the policy's count of forwards when it was last idle

    def beside(self, policy: AsyncPolicy) -> AsyncSearchLoop:
        """A loop over another policy and the same scorers: the two take turns at them, and their costs are one sum."""
        models = self.models
        loop = AsyncSearchLoop(policy, *models.scorers, on_event=models.on_event, clock=self.clock)
        loop.quiet = self.quiet
        loop.models.seconds, loop.models.forward_calls = models.seconds, models.forward_calls
        return loop

    def begin(self, prompt: Prompt, settings: SearchSettings, *, occurrence: int = 0) -> AsyncSearch:
        """A search of one prompt, to be awaited by its run(). Arguments and errors as in SearchLoop.add."""
        return AsyncSearch(self, prompt, settings, occurrence)

    async def draw(self, request: Request) -> list[Node]:
        """Have the policy answer a request, and count it."""
        models, policy = self.models, self.models.policy
        if not self._under_way:
            self._since, self._calls = time.perf_counter(), policy.forward_calls
        self._under_way += 1
        try:
            return await policy.run(request)
        finally:
            self._under_way -= 1
            if self._calls is None:
                models.forward_calls["policy"] += 1
            if not self._under_way:
                models.seconds["policy"] += time.perf_counter() - self._since
                if self._calls is not None:
                    models.forward_calls["policy"] += (policy.forward_calls or 0) - self._calls

    async def score(self, nodes: list[Node]) -> None:
        """Score nodes, in one batch with what other searches bring until the scorer is free."""
        if not nodes or not self.models.scorers:
            return
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append((nodes, done))
        if self._scoring is None or self._scoring.done():
            self._scoring = asyncio.create_task(self._score_waiting())
        await done

    async def _score_waiting(self) -> None:
        while self._waiting:
            async with self.quiet:
                batch = [(nodes, done) for nodes, done in self._waiting if not done.done()]  # less what was cancelled
                self._waiting = []
                failures = [await self._failure([node for nodes, _ in batch for node in nodes])] * len(batch)
                if len(batch) > 1 and isinstance(failures[0], Exception):  # of one of them: the others go on
                    failures = [await self._failure(nodes) for nodes, _ in batch]
            for (_, done), failed in zip(batch, failures, strict=True):
                if done.done():
                    continue
                if failed is None:
                    done.set_result(None)
                else:
                    done.set_exception(failed)
            for failed in failures:
                if isinstance(failed, asyncio.CancelledError):
                    raise failed

    async def _failure(self, nodes: list[Node]) -> BaseException | None:
        """Score nodes; what was raised meanwhile."""
        try:
            await self._score_now(nodes)
        except BaseException as error:
            return error
        return None

    async def _score_now(self, nodes: list[Node]) -> None:
        for scorer in self.models.scorers if nodes else ():
            with self.models.measured("scorer", scorer):
                await scorer.ascore_nodes(nodes)


class AsyncSearch:
    """One prompt's search; AsyncSearchLoop.begin makes it.

    Attributes:
        tree: its tree.
    """

    def __init__(self, loop: AsyncSearchLoop, prompt: Prompt, settings: SearchSettings, occurrence: int) -> None:
        self._loop = loop
        self._settings = settings
        self._driver = Driver(clock=loop.clock)
        self._running: Running = {}
        self._settled: list[Node] = []
        self.tree = loop.models.begin(self._driver, prompt, settings, occurrence)

    def committed(self) -> list[Node]:
        """The steps that the answer begins with, as far as that is settled; see Driver.committed."""
        if self._driver.active:
            self._settled = self._driver.committed(self.tree, self._settings.eligible)
        return self._settled

    def cancel(self) -> None:
        """Make run() return with what has finished. (Cancelling the task that awaits run() leaves no result.)"""
        self._driver.cancel(self.tree)
        for task in self._running:
            task.cancel()

    async def run(self) -> Result:
        """Search to the end. An error in a model, the strategy or a callback releases the tree and propagates."""
        loop, models, driver = self._loop, self._loop.models, self._driver
        try:
            while driver.active:
                self._running |= {asyncio.create_task(loop.draw(request)): request for request in driver.pending()}
                answered = await self._answers() if self._running else []
                fresh = [await self._aside(nodes_of, request, children) for request, children in answered]
                nodes = list(dict.fromkeys(node for new_nodes in fresh for node in new_nodes))
                await loop.score(nodes)
                if driver.active:  # it may be cancelled while it waits
                    await self._aside(set_values, driver.value(self.tree), nodes)
                if not driver.active:
                    break
                for (request, children), new_nodes in zip(answered, fresh, strict=True):
                    driver.tell(request, children, new_nodes)
                await self._forget(driver.given_up())
                models.report(nodes)
            (outcome,) = driver.ended()
            await self._stop()
            # Answers are read off texts and compared, by math-verify where they have to be, which takes seconds.
            selection = await asyncio.to_thread(self._settings.choose, outcome.candidates)
            async with loop.quiet:
                result = models.finish(outcome, self._settings, selection)
            self._settled = [] if result.node is None else result.node.path()
            return result
        except BaseException:
            with suppress(Exception):  # the first error is the one to report
                await asyncio.shield(asyncio.ensure_future(self._abandon()))
            raise

    async def _aside(self, act: Callable[..., T], *args: object) -> T:
        """Return act(*args), done in a thread where the tree is large. Whole responses in short steps are a million
        nodes, which would keep every other search waiting."""
        return await asyncio.to_thread(act, *args) if len(self.tree.nodes) > MANY else act(*args)

    async def _answers(self) -> list[tuple[Request, Sequence[Node]]]:
        """Wait until a request is answered or the time is up."""
        left = self._driver.seconds_left(self.tree)
        timeout = None if math.isinf(left) else max(left, 0.0)
        await asyncio.wait(self._running, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
        if not self._driver.active:
            return []
        late = set(self._driver.expired())
        await self._interrupt([task for task, request in self._running.items() if request in late])
        answered: list[tuple[Request, Sequence[Node]]] = []
        for task in [task for task in self._running if task.done()]:
            request = self._running.pop(task)
            if task.cancelled() and request not in late and self._driver.active:
                raise RuntimeError("the policy cancelled its own run(request)")
            if not task.cancelled() and isinstance(error := task.exception(), RequestFailed):
                self._driver.fail(self.tree, error)
                return []
            answered.append((request, [] if task.cancelled() else task.result()))
        return answered

    async def _interrupt(self, tasks: Sequence[asyncio.Task[list[Node]]]) -> None:
        for task in tasks:
            if not task.done():
                reply = self._loop.models.policy.interrupt(self._running[task])
                if not (await reply if inspect.isawaitable(reply) else reply):
                    task.cancel()
        if tasks:
            await asyncio.wait(tasks)

    async def _forget(self, requests: Sequence[Request]) -> None:
        """End requests that no run waits for any more."""
        if requests:
            gone = set(requests)
            await self._cancel([task for task, request in self._running.items() if request in gone])
            await self._loop.models.policy.drop(requests)

    async def _stop(self) -> None:
        await self._cancel(list(self._running))

    async def _cancel(self, tasks: Sequence[asyncio.Task[list[Node]]]) -> None:
        for task in tasks:
            del self._running[task]
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _abandon(self) -> None:
        self._driver.cancel(self.tree)
        await self._stop()
        async with self._loop.quiet:
            self._loop.models.release(self.tree)
