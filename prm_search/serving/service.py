"""The searches of a server: taken on within limits, run together, given up when nobody waits for them any more."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from time import time
from uuid import uuid4

from ..driver.async_loop import AsyncSearch
from ..driver.guidance_file import GuidanceFile
from ..driver.result import Event, Result
from ..prompt import numbered
from ..steps import StepRule
from ..usage import Usage
from .backend import Backend
from .errors import RequestError
from .limits import Limits
from .metrics import Metrics
from .prompts import continued, encode
from .request import SearchRequest, make_ask
from .schema import Body

GRACE = 5.0  # seconds that clients get at the end
logger = logging.getLogger(__name__)


class Service:
    """The service that answers requests, whatever engine samples.

    Args:
        engine: the models.
        models: names by which requests may call the policy; the first is the one that answers carry.
        limits: see Limits.
        steps: the StepRule of requests that give none.
        tuned: the guidance of requests that bring none; None to sample for them plainly.
        metrics: counts what happens.
    """

    def __init__(
        self,
        engine: Backend,
        models: Sequence[str],
        *,
        limits: Limits,
        steps: StepRule,
        metrics: Metrics,
        tuned: GuidanceFile | None = None,
    ) -> None:
        self.tuned = tuned
        self.engine, self.models, self.limits, self.steps, self.metrics = engine, tuple(models), limits, steps, metrics
        self.started = int(time())
        self.jobs: set[Job] = set()
        self.draining = False
        metrics.watch(engine)

    def open(self, body: Body) -> Job:
        """Take a request on. Its prompts are tokenised and then searched; see Job.begun.

        Raises:
            RequestError: it cannot be served, or not now.
        """
        ask = make_ask(body, self.limits, steps=self.steps, tuned=self.tuned)
        self.need_model(ask.model)
        if self.draining:
            raise RequestError(503, "the server is shutting down", code="shutting_down")
        if self.in_flight + len(ask.prompts) > self.limits.searches:
            raise RequestError(
                429, f"{self.in_flight} searches are under way, and at most {self.limits.searches} are taken on",
                code="too_many_searches", headers={"Retry-After": "1"},
            )  # fmt: skip
        return Job(self, ask)

    def need_model(self, name: object) -> None:
        """Raises RequestError where a request names a model that is not served."""
        if name is not None and name not in self.models:
            raise self.unknown(str(name))

    def unknown(self, name: str) -> RequestError:
        """Return what to say to somebody who asks for another model."""
        message = f"the model {name!r} is not served here; it is {self.models[0]!r}"
        return RequestError(404, message, param="model", code="model_not_found")

    @property
    def in_flight(self) -> int:
        """Prompts being searched."""
        return sum(len(job.ask.prompts) for job in self.jobs)

    async def drain(self) -> None:
        """Take nothing on any more, and end what is under way with an error, which clients get some seconds to read."""
        self.draining = True
        for job in list(self.jobs):
            job.fail(RequestError(503, "the server is shutting down", code="shutting_down"))
        with suppress(TimeoutError):
            async with asyncio.timeout(GRACE):
                while self.jobs:
                    await asyncio.sleep(0.01)


class Job:
    """One request's searches. `close` it in any case.

    Attributes:
        ask: the request.
        id, created: for the answer.
        events: what happens, as (number of the prompt, Event or the exception that ended its search).
        searches: one a prompt.
    """

    def __init__(self, service: Service, ask: SearchRequest) -> None:
        self.service, self.ask = service, ask
        self.id = f"{'chatcmpl' if ask.kind == 'chat' else 'cmpl'}-{uuid4().hex}"
        self.created = int(time())
        self.events: asyncio.Queue[tuple[int, Event | BaseException]] = asyncio.Queue()
        self._results: list[Result | None] = [None] * len(ask.prompts)
        self._costs = [dict(costs) for costs in service.engine.costs()]
        self.searches: list[AsyncSearch] = []
        self._tasks: list[asyncio.Task[Result]] = []
        self._closed = False
        self._failed: RequestError | None = None
        engine = service.engine
        self._loop = engine.loop(guided=ask.guided, alpha=ask.alpha)
        if ask.stop and not self._loop.models.policy.takes_stop:
            message = "stop: this engine takes no stop strings for a search"
            raise RequestError(400, message, param="stop", code="unsupported_parameter")
        for prompt, name in zip(ask.prompts, ask.names, strict=True):
            engine.prompt_length.check(prompt, name)
        encode_one = self._loop.models.encode
        if ask.continues:
            encode_one = partial(continued, encode_one, engine.tokenizer)
        self._encoding = engine.encoders.submit(encode, encode_one, ask.prompts, ask.names, lambda: not self._closed)
        self._beginning = asyncio.create_task(self._begin())
        service.jobs.add(self)
        service.metrics.in_flight.set(service.in_flight)

    async def begun(self) -> None:
        """Wait until the prompts are tokenised and the searches under way.

        Raises:
            RequestError: a prompt cannot be searched.
        """
        await asyncio.wait([self._beginning])
        if self._beginning.cancelled():
            raise self._failed or asyncio.CancelledError
        error = self._beginning.exception()
        if error is not None:
            raise failure(error)

    async def _begin(self) -> None:
        engine, ask = self.service.engine, self.ask
        prompts = await asyncio.wrap_future(self._encoding)
        for number, (prompt, occurrence) in enumerate(numbered(prompts)):
            search = self._loop.begin(prompt, ask.settings, occurrence=occurrence)
            engine.follow(search.tree, partial(self._heard, number))
            self.searches.append(search)
        for number, search in enumerate(self.searches):
            task = asyncio.create_task(search.run())
            task.add_done_callback(partial(self._ended, number))
            self._tasks.append(task)

    def _heard(self, number: int, event: Event) -> None:
        if event.result is not None:
            self._results[number] = event.result
            self.service.metrics.add(event.result.usage)
        self.events.put_nowait((number, event))

    def _ended(self, number: int, task: asyncio.Task[Result]) -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            self.events.put_nowait((number, error))

    def fail(self, error: RequestError) -> None:
        """End it with an error."""
        self._failed = error
        self._beginning.cancel()
        self.events.put_nowait((0, error))

    async def results(self) -> list[Result]:
        """A result a prompt, when all are there.

        Raises:
            RequestError: a search failed, or ended before there was any answer.
        """
        await self.begun()
        while None in self._results:
            _, event = await self.events.get()
            if isinstance(event, BaseException):
                raise failure(event)
        return [answered(result) for result in self._results if result is not None]

    def usage_so_far(self, number: int) -> Usage:
        """Return what one prompt's search has cost, and what the engine has spent meanwhile, for others too."""
        usage = self._loop.models.usage(self.searches[number].tree)
        usage.seconds, usage.forward_calls = self._spent()
        return usage

    @property
    def usage(self) -> Usage:
        """Return the joint cost of the ended searches, with what the engine spent meanwhile, for others too."""
        total = sum((result.usage for result in self._results if result is not None), Usage())
        total.seconds, total.forward_calls = self._spent()
        return total

    def _spent(self) -> tuple[dict[str, float], dict[str, int]]:
        """The engine's seconds and forwards since the request came."""
        seconds, calls = (
            {phase: now[phase] - before.get(phase, 0) for phase in list(now)}
            for now, before in zip(self.service.engine.costs(), self._costs, strict=True)
        )
        return seconds, {phase: int(count) for phase, count in calls.items()}

    async def close(self) -> None:
        """Give up the searches that have not ended; every model forgets them."""
        self._closed = True
        await asyncio.shield(asyncio.ensure_future(self._give_up()))

    async def _give_up(self) -> None:
        try:
            self._encoding.cancel()
            self._beginning.cancel()
            # A prompt that a thread is at counts until it is done, or clients that go away could bring any number.
            await asyncio.gather(asyncio.wrap_future(self._encoding), self._beginning, return_exceptions=True)
            await asyncio.sleep(0)  # a task that never began could not clean up after itself
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)
        finally:
            self.service.jobs.discard(self)
            self.service.metrics.in_flight.set(self.service.in_flight)


def answered(result: Result) -> Result:
    """The result, if it has an answer. Raises RequestError (504 where time ran out) otherwise."""
    if result.node is not None:
        return result
    if result.failure is not None:
        raise RequestError(502, result.failure, code="upstream_failed")
    if result.stopped == "seconds":
        raise RequestError(504, "time was up before anything was drawn", code="timeout")
    raise RequestError(500, f"the search ended without an answer ({result.stopped})", code="no_answer")


def failure(error: BaseException) -> RequestError:
    """Return the answer to an error in a search: the server's, since requests are checked before searches begin."""
    if isinstance(error, RequestError):
        return error
    logger.error("a search failed", exc_info=error)
    return RequestError(500, f"the search failed: {type(error).__name__}: {error}", code="search_failed")
