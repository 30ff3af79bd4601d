"""SearchLoop: the driver with models to it, one forward at a time. Prompts may be added and cancelled at any time."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import islice
from types import TracebackType
from typing import TypeVar

from ..protocols import Policy, PolicyBase, Request, Scorer
from ..tree import Node, Prompt, SearchTree
from .driver import Driver
from .participants import Participants, new_nodes
from .result import Event, Result
from .search_settings import SearchSettings


@dataclass(eq=False)
class Job:
    """A search for SearchLoop.run.

    Attributes:
        prompt, settings, occurrence: see SearchLoop.add.
        place: the caller's number for it.
        seconds: its share of the loop's wall time so far.
    """

    prompt: Prompt
    settings: SearchSettings
    occurrence: int = 0
    place: int = 0
    seconds: float = field(default=0.0, init=False)


AnyJob = TypeVar("AnyJob", bound=Job)


class SearchLoop:
    """Searches many prompts with one policy; what `search` is built on, and servers over blocking engines.

        with SearchLoop(policy, scorer) as loop:
            loop.add(prompt, settings)
            while loop.active:
                for result in loop.step(): ...

    An error in a model, a strategy or a callback releases every tree and propagates. Not thread-safe.

    Args:
        policy, scorer, prover, on_event: see `search`.
        clock: seconds, rising; for budgets.
    """

    def __init__(
        self,
        policy: Policy,
        scorer: Scorer | None = None,
        prover: Scorer | None = None,
        *,
        on_event: Callable[[Event], object] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        own = PolicyBase.of(policy).session()
        self.models: Participants[PolicyBase] = Participants(policy, own, scorer, prover, on_event)
        self._driver = Driver(clock=clock)
        self._settings: dict[SearchTree, SearchSettings] = {}
        self._submitted: set[Request] = set()
        self._results: list[Result] = []

    @property
    def active(self) -> bool:
        """Return True if a search is under way, or has ended without step having said so."""
        return bool(self._settings or self._results)

    def add(self, prompt: Prompt, settings: SearchSettings, *, occurrence: int = 0) -> SearchTree:
        """Begin a search; its first tokens are drawn by the next step. Other searches are not disturbed by an error.

        Args:
            prompt: the policy encodes it where it has no token ids yet.
            settings: see Settings.make.
            occurrence: see SearchTree.

        Raises:
            ValueError: the prompt is empty or too long, or the settings do not suit the models.
        """
        tree = self.models.begin(self._driver, prompt, settings, occurrence)
        self._settings[tree] = settings
        return tree

    def step(self) -> list[Result]:
        """One forward of the policy and the scoring of what it ended. Returns the results of searches that ended."""
        try:
            answered = self._draw()
            nodes = new_nodes(answered)
            self.models.score(nodes)
            for request, children in answered:
                self._driver.tell(request, children)
            self._forget(self._driver.given_up())
            self.models.report(nodes)
            self._collect()
        except BaseException:
            self._abandon()
            raise
        results, self._results = self._results, []
        return results

    def run(
        self, jobs: Iterable[AnyJob], batch: int, begun: Callable[[AnyJob, SearchTree], object] | None = None
    ) -> Iterator[tuple[AnyJob, Result]]:
        """Run searches, at most `batch` at a time; each is given out with its result as it ends.

        Args:
            jobs: are begun in order; the next is asked for when there is room for it.
            batch: searches under way at most, >= 1; changes no result.
            begun: called with each job and its tree before anything is drawn for it.

        Raises:
            ValueError: other searches of this loop are under way, or see `add`.
        """
        if self.active:
            raise ValueError("run: other searches of this loop are under way")
        waiting, running = iter(jobs), dict[SearchTree, AnyJob]()
        while True:
            for job in islice(waiting, batch - len(running)):
                tree = self.add(job.prompt, job.settings, occurrence=job.occurrence)
                running[tree] = job
                if begun is not None:
                    begun(job, tree)
            if not running:
                return
            before = time.perf_counter()
            results = self.step()
            share = (time.perf_counter() - before) / len(running)
            for job in running.values():
                job.seconds += share
            for result in results:
                yield running.pop(result.tree), result

    def cancel(self, tree: SearchTree) -> Result | None:
        """End a search now. Returns the result of its finished nodes, or None for a search that has ended already."""
        if tree not in self._settings:
            return None
        self._submitted.difference_update(self._driver.cancel(tree))
        self._collect()
        result = next(result for result in self._results if result.tree is tree)
        self._results.remove(result)
        return result

    def committed(self, tree: SearchTree) -> list[Node]:
        """The steps that the answer of a running search will begin with, none of one that has ended; see
        Driver.committed."""
        if tree not in self._driver.active:
            return []
        return self._driver.committed(tree, self._settings[tree].eligible)

    def close(self) -> None:
        """Drop every search that is under way."""
        trees, self._settings = list(self._settings), {}
        self._submitted.clear()
        for tree in trees:
            self._driver.cancel(tree)
        self._driver.ended()
        self.models.release(*trees)

    def __enter__(self) -> SearchLoop:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.close()
        else:
            self._abandon()

    def _draw(self) -> list[tuple[Request, Sequence[Node]]]:
        policy = self.models.policy
        new = self._driver.pending()
        if new:
            policy.submit(new)
            self._submitted.update(new)
        answered: list[tuple[Request, Sequence[Node]]] = []
        if self._submitted:
            with self.models.measured("policy", policy):
                answered += policy.advance()
        if any(request not in self._submitted for request, _ in answered):
            raise RuntimeError(
                "the policy answered a request of another search: a policy without session() serves one loop at a time"
            )
        self._submitted.difference_update(request for request, _ in answered)
        failed = policy.failures()
        for request, error in failed:
            self._submitted.difference_update(self._driver.fail(request.node.tree, error))
        if failed:
            alive = set(self._driver.active)
            answered = [(request, children) for request, children in answered if request.node.tree in alive]
        for request in self._driver.expired():
            if request in self._submitted:
                answered.append((request, policy.interrupt(request)))
                self._submitted.discard(request)
        return answered

    def _forget(self, requests: Sequence[Request]) -> None:
        """Have the policy drop requests that no run waits for any more."""
        if requests:
            self.models.policy.drop(requests)
            self._submitted.difference_update(requests)

    def _collect(self) -> None:
        for outcome in self._driver.ended():
            self._results.append(self.models.finish(outcome, self._settings.pop(outcome.tree)))

    def _abandon(self) -> None:
        """Close because of an error, which is the one to report."""
        with suppress(Exception):
            self.close()
