"""Crew over a Ray of the tests' own, in this process: deaths and errors without any process that could be late."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
from fakes import FakePolicy, ids, sampling
from workers import POISON, Strict, first_letter

from prm_search.distributed import FailedProblems
from prm_search.distributed.crew import Crew
from prm_search.distributed.rollout import RolloutWork
from prm_search.distributed.runs import distribute, encoded
from prm_search.distributed.worker import About, Message, Task, Worker
from prm_search.tree import Prompt


class RayError(Exception):
    """Stands for a death."""


class RayTaskError(RayError):
    """Stands for an error in a worker."""

    def __init__(self, cause: Exception) -> None:
        self.cause = cause


class Messages:
    """A stream of a worker's messages; each is computed when it is asked for."""

    def __init__(self, run: Iterator[Message]) -> None:
        self.run = run

    def __next__(self) -> Any:
        def get() -> Message:
            try:
                return next(self.run)
            except ConnectionError:
                raise RayError("Worker exit detail: killed. Some common causes") from None
            except Exception as error:
                raise RayTaskError(error) from error

        return get


class Actor:
    """A Worker in this process. What `remote` returns is called by `get`."""

    def __init__(self) -> None:
        self.worker = Worker()

    def __getattr__(self, name: str) -> Any:
        def remote(*arguments: Any) -> Any:
            if name == "load":
                self.worker._work = arguments[0]()
                return lambda: About("here", 1)
            if name == "run":
                return Messages(self.worker.run(*arguments))
            if name == "encode":
                return partial(encode, self.worker, *arguments)
            answer = getattr(self.worker, name)(*arguments)
            return lambda: answer

        return SimpleNamespace(remote=remote, options=lambda **options: SimpleNamespace(remote=remote))


def encode(worker: Worker, prompts: Any) -> Any:
    try:
        return worker.encode(prompts)
    except ValueError as error:
        raise RayTaskError(error) from error


class Deadly(FakePolicy):
    """Raises at POISON: a ConnectionError stands for the death of the process."""

    def __init__(self, error: Exception) -> None:
        super().__init__()
        self.error = error

    def advance(self) -> Any:
        if any(request.node.tree.prompt_ids == POISON for request in self.requests):
            raise self.error
        return super().advance()


@pytest.fixture
def starts(monkeypatch: pytest.MonkeyPatch) -> list[Actor]:
    """The workers that were started."""
    made: list[Actor] = []

    def start() -> Actor:
        made.append(Actor())
        return made[-1]

    ray = SimpleNamespace(
        remote=lambda kind: SimpleNamespace(options=lambda **options: SimpleNamespace(remote=start)),
        wait=lambda references, **options: (references, []), get=lambda reference: reference(), kill=lambda actor: None,
        exceptions=SimpleNamespace(RayError=RayError, RayTaskError=RayTaskError),
    )  # fmt: skip
    monkeypatch.setattr("prm_search.distributed.crew.import_ray", lambda: ray)
    return made


@pytest.mark.parametrize(
    ("prompts", "error", "workers"),
    [
        ("p", ConnectionError("dead"), 4),
        ("p x p y p", ConnectionError("dead"), 9),  # as many deaths in a row as would have a worker not replaced
        ("x p y z ab q", RuntimeError("the device is gone"), 4),
        ("x p y z ab q", ValueError("no such letter"), 1),  # after which the worker goes on
        ("x y", ConnectionError("dead"), 1),
    ],
)
def test_only_what_kills_or_fails_fails_and_it_alone(starts, prompts, error, workers):
    cluster: Any = SimpleNamespace(workers=1, gpus_per_worker=0, forward_calls=0, notice=lambda line: None)
    asked = [Prompt(token_ids=ids(text)) for text in prompts.split()]
    bad = {place for place, prompt in enumerate(asked) if prompt.token_ids == POISON}
    found, failures = [], []
    open_work = partial(RolloutWork, partial(Deadly, error), 2, sampling(seed=1), first_letter, 4)
    with Crew(cluster, open_work) as crew:
        prompts_of = enumerate(encoded(crew, asked))
        tasks = {place: Task(place, (2 * place, 2 * place + 1), (*prompt, "b")) for place, prompt in prompts_of}
        try:
            for index, _ in distribute(crew, cluster, tasks, 4, None):
                found.append(index)
        except FailedProblems as raised:
            failures = [failure.place for failure in raised.failures]
    assert sorted(found) == [i for i in range(2 * len(asked)) if i // 2 not in bad]
    assert set(failures) == bad
    assert len(failures) == len(bad)
    assert len(starts) == workers


def test_prompts_are_encoded_between_runs_of_one_crew_and_again_where_the_worker_died(starts):
    notices: list[str] = []
    cluster: Any = SimpleNamespace(workers=1, gpus_per_worker=0, forward_calls=0, notice=notices.append)
    open_work = partial(RolloutWork, Strict, 1, sampling(seed=1), first_letter, 2)
    with Crew(cluster, open_work) as crew:
        for texts in ("x y", "z"):
            asked = [Prompt(token_ids=ids(text)) for text in texts.split()]
            prompts = encoded(crew, asked)
            assert [prompt.token_ids for prompt, _ in prompts] == [prompt.token_ids for prompt in asked]
            tasks = {place: Task(place, (place,), (*prompt, "b")) for place, prompt in enumerate(prompts)}
            assert sorted(index for index, _ in distribute(crew, cluster, tasks, 2, None)) == list(tasks)
        assert len(starts) == 1

        def die(prompts: Any) -> Any:
            raise RayError("Worker exit detail: killed. Some common causes")

        starts[0].worker.encode = die
        assert crew.encode([Prompt(token_ids=ids("x"))]) == [ids("x")]
        assert len(starts) == 2
        with pytest.raises(ValueError, match=r"^problems\[1\]: zz is no prompt$"):
            crew.encode([Prompt(token_ids=ids(text)) for text in ("x", "zz")])
