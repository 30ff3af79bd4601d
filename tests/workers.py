"""What workers of the Ray tests load: fakes that need no torch, some of which kill their process or fail.

It is imported in workers too, by name: `cluster` puts this folder on their path.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from fakes import FakePolicy, FakeScorer, ids

from prm_search.distributed.cluster import loopback
from prm_search.protocols import Request
from prm_search.tree import Node, Prompt

POISON = ids("p")  # the prompt that kills


class Doomed(FakePolicy):
    """Kills its process by SIGKILL at a call of advance, in the one process that comes first to make `mark`."""

    def __init__(self, mark: str, at: int) -> None:
        super().__init__()
        self.mark, self.at = mark, at

    def advance(self) -> list[tuple[Request, list[Node]]]:
        if self.forward_calls + 1 == self.at:
            try:
                os.close(os.open(self.mark, os.O_CREAT | os.O_EXCL))
            except FileExistsError:
                pass
            else:
                os.kill(os.getpid(), signal.SIGKILL)
        return super().advance()


class Poisoned(FakePolicy):
    """Is killed, or raises, by whoever asks for POISON, and notes in a folder which prompts it was asked beside it."""

    def __init__(self, folder: str, error: Exception | None) -> None:
        super().__init__()
        self.folder, self.error = folder, error

    def advance(self) -> list[tuple[Request, list[Node]]]:
        prompts = sorted({request.node.tree.prompt_ids for request in self.requests})
        if POISON in prompts:
            number = len(list(Path(self.folder).iterdir()))
            Path(self.folder, f"{number}").write_text(repr(prompts))
            if self.error is not None:
                raise self.error
            os.kill(os.getpid(), signal.SIGKILL)
        return super().advance()


class Strict(FakePolicy):
    """Refuses the prompt zz."""

    def encode(self, prompt: Prompt) -> tuple[int, ...]:
        token_ids = super().encode(prompt)
        if token_ids == ids("zz"):
            raise ValueError("zz is no prompt")
        return token_ids


def killed_while_loading() -> Any:
    """A loader that never returns."""
    os.kill(os.getpid(), signal.SIGKILL)


def cannot_load(reason: str) -> Any:
    """A loader that fails as one that finds no checkpoint."""
    raise OSError(reason)


def first_letter(text: str, reference: str) -> tuple[str | None, bool]:
    """A judge."""
    answer = next((letter for letter in reversed(text) if letter in "ab"), None)
    return answer, answer == reference


def last_vote(text: str) -> str | None:
    """An answer."""
    return first_letter(text, "")[0]


def text_of(unit: Any, result: Any, policy: Any, scorers: Any) -> Any:
    """What is told of a search."""
    return result.text, type(policy).__name__, [scorer.name for scorer in scorers]


def scorer(name: str = "prm") -> FakeScorer:
    """A scorer of that name."""
    return FakeScorer(name=name)


@contextmanager
def two_machines(cpus: int, gpus: int = 0) -> Iterator[str]:
    """The address of a cluster of two logical machines on 127.0.0.1; its processes are gone at the end."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(Path(__file__).parent), prepend=os.pathsep)
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("OMP_NUM_THREADS", "1")
        import ray
        from ray.cluster_utils import Cluster

        machine = {"num_cpus": cpus, "num_gpus": gpus, "object_store_memory": 80 << 20}
        with loopback(ray):
            cluster = started(lambda: Cluster(True, head_node_args=machine | {"include_dashboard": False}))
            try:
                started(lambda: cluster.add_node(**machine))
                yield cluster.address
            finally:
                cluster.shutdown()


def started(start: Callable[[], Any], attempts: int = 5) -> Any:
    """What `start` gives: on a busy machine Ray gives its own processes up after half a minute."""
    for _ in range(attempts - 1):
        with suppress(Exception):
            return start()
    return start()
