"""Worker: one process of a cluster. It holds the models, works on chunks of tasks, and sends records back."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from math import ceil
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


class Work(Protocol):
    """The models of one worker, and what is done with them."""

    @property
    def forward_calls(self) -> int:
        """Forwards run so far."""
        ...

    def encode(self, prompt: Prompt) -> tuple[int, ...]:
        """Token ids of a prompt. Raises ValueError where it is empty or too long."""
        ...

    def run(self, tasks: Sequence[Task]) -> Iterator[Entry]:
        """Work on tasks, begun in order; each record is given out as soon as it is finished."""
        ...


OpenWork = Callable[[], Work]  # loads the models


class Worker:
    """The class of the Ray actors. It starts without models; `load` brings them."""

    def __init__(self) -> None:
        self._work: Work | None = None

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

    def run(self, tasks: Sequence[Task]) -> Iterator[Message]:
        """Work on tasks; records that come close together travel together, and before an error."""
        entries: list[Entry] = []
        sent = float("-inf")
        error = None
        try:
            for entry in self._loaded.run(tasks):
                entries.append(entry)
                if time.monotonic() - sent >= GROUP_SECONDS:
                    yield Message(entries, self._loaded.forward_calls)
                    entries, sent = [], time.monotonic()
        except Exception as raised:
            error = raised
        if entries:
            yield Message(entries, self._loaded.forward_calls)
        if error is not None:
            raise error

    @property
    def _loaded(self) -> Work:
        if self._work is None:
            raise RuntimeError("this worker has no models yet: call load first")
        return self._work


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
