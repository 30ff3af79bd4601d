"""Worker: one process of a cluster. It holds the models, works on chunks of tasks, and sends records back."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from math import ceil
from queue import Empty, SimpleQueue
from typing import Any, NamedTuple, Protocol

from ..tree import Prompt

PACKAGES = ("prm-search", "torch", "transformers", "numpy")  # by which records may differ
GROUP_SECONDS = 0.25  # records that are finished within this time of each other travel together


@dataclass(frozen=True)
class Task:
    """One problem for a worker.

    Attributes:
        place: the problem's number.
        wanted: indices of the records that are missing; all of them come back, in any order.
        content: the problem, as the Work reads it. Plain values: a task is sent over the network.
    """

    place: int
    wanted: tuple[int, ...]
    content: Any


@dataclass(frozen=True)
class Refusal:
    """In place of a record: the problem cannot be done, by any worker.

    Attributes:
        reason: on one line.
    """

    reason: str


@dataclass(frozen=True, slots=True)
class Entry:
    """One record of a task.

    Attributes:
        place: the task's.
        index: of the record, one of those wanted.
        record: plain values, or a Refusal, after which nothing more comes of this task.
    """

    place: int
    index: int
    record: Any


class Message(NamedTuple):
    """Records on their way to the driver, and the forwards that the worker's models have run so far."""

    entries: list[Entry]
    forwards: int


@dataclass(frozen=True)
class About:
    """A worker that is ready.

    Attributes:
        node: the address of its machine.
        pid: of its process.
    """

    node: str
    pid: int


class Feed:
    """Tasks that wait in a worker."""

    def __init__(self) -> None:
        self._tasks: deque[Task] = deque()
        self._changed = threading.Condition()

    def put(self, tasks: Iterable[Task]) -> None:
        """Add tasks behind those that wait."""
        with self._changed:
            self._tasks.extend(tasks)
            self._changed.notify()

    def take(self, most: int, *, wait: bool) -> list[Task]:
        """The first tasks, at most so many.

        Args:
            most: at least 1 where `wait` is True.
            wait: until there is one; False to return an empty list where there is none.
        """
        with self._changed:
            while wait and not self._tasks:
                self._changed.wait()
            return [self._tasks.popleft() for _ in range(min(most, len(self._tasks)))]


class Work(Protocol):
    """The models of one worker, and what is done with them."""

    @property
    def forward_calls(self) -> int:
        """Forwards run so far."""
        ...

    def encode(self, prompt: Prompt) -> tuple[int, ...]:
        """Token ids of a prompt. Raises ValueError where it is empty or too long."""
        ...

    def run(self, feed: Feed) -> Iterator[Entry]:
        """Work on tasks, begun in the order of the feed; each record is given out as soon as it is finished.

        It asks the feed for more whenever it has room, and never ends.
        """
        ...


OpenWork = Callable[[], Work]  # loads the models


class Worker:
    """The class of the Ray actors. It starts without models; `load` brings them.

    `run` and `give` are called beside each other. A run ends with an error of the Work alone. The next has another
    number, and nothing of what was given to the last one.
    """

    def __init__(self) -> None:
        self._work: Work | None = None
        self._feed = Feed()
        self._number = -1

    def load(self, open_work: OpenWork, versions: Mapping[str, str | None], gpus: float) -> About:
        """Load the models.

        Args:
            open_work: makes the Work.
            versions: of the driver's packages.
            gpus: that were asked for.

        Raises:
            ValueError: a package has another version here, or torch does not see the GPUs.
            Exception: what open_work raises.
        """
        import os

        import ray

        _same_versions(versions)
        _see_gpus(gpus, ray.get_gpu_ids())
        self._work = open_work()
        return About(ray.util.get_node_ip_address(), os.getpid())

    def encode(self, prompts: Sequence[Prompt]) -> list[tuple[int, ...]]:
        """Token ids of prompts. Raises ValueError that names the place of one that is empty or too long."""
        encoded = []
        for place, prompt in enumerate(prompts):
            try:
                encoded.append(self._loaded.encode(prompt))
            except ValueError as error:
                raise ValueError(f"problems[{place}]: {error}") from error
        return encoded

    def give(self, number: int, tasks: Sequence[Task]) -> None:
        """Tasks for the run of that number."""
        if number == self._number:
            self._feed.put(tasks)

    def run(self, number: int, tasks: Sequence[Task]) -> Iterator[Message]:
        """Work on tasks and on what is given later. Records that come close together travel together."""
        work, feed, made = self._loaded, Feed(), SimpleQueue[Entry | Exception]()
        feed.put(tasks)
        self._number, self._feed = number, feed

        def drive() -> None:
            try:
                for entry in work.run(feed):
                    made.put(entry)
                made.put(RuntimeError("the work ended by itself"))
            except BaseException as error:  # also an exit that a library asks for: the driver has to hear of it
                made.put(error if isinstance(error, Exception) else RuntimeError(repr(error)))

        threading.Thread(target=drive, daemon=True).start()
        sent = float("-inf")
        while True:
            group, error = _group(made, sent + GROUP_SECONDS)
            if group:
                yield Message(group, work.forward_calls)
                sent = time.monotonic()
            if error is not None:
                raise error

    @property
    def _loaded(self) -> Work:
        if self._work is None:
            raise RuntimeError("this worker has no models yet: call load first")
        return self._work


def _group(made: SimpleQueue[Entry | Exception], until: float) -> tuple[list[Entry], Exception | None]:
    """The next entry, those that follow until that time, and the error that ends them, where one does."""
    entries: list[Entry] = []
    following: Entry | Exception = made.get()
    while not isinstance(following, Exception):
        entries.append(following)
        try:
            following = made.get(timeout=max(0.0, until - time.monotonic()))
        except Empty:
            return entries, None
    return entries, following


def versions() -> dict[str, str | None]:
    """The versions of PACKAGES in this process; None where one is not installed."""
    return {name: _version(name) for name in PACKAGES}


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _same_versions(expected: Mapping[str, str | None]) -> None:
    here = versions()
    differing = [f"{name} {here.get(name)} here, {wanted} there" for name, wanted in expected.items()
                 if here.get(name) != wanted]  # fmt: skip
    if differing:
        raise ValueError(f"versions differ from the driver's: {'; '.join(differing)}")


def _see_gpus(wanted: float, assigned: Sequence[Any]) -> None:
    if not wanted:
        return
    import torch

    visible = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if visible < ceil(wanted):
        raise ValueError(
            f"gpus_per_worker={wanted:g}: Ray assigned GPU {', '.join(map(str, assigned)) or 'none'}, and torch sees "
            f"{visible} (torch {torch.__version__})"
        )
