"""score: the rewards of responses that exist, by the workers of a cluster."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

from ..checks import count
from ..prompt import Prompt
from ..steps import StepRule
from .cluster import Cluster
from .crew import Crew
from .evaluate import forwards
from .loading import Load, scorer_loader
from .runs import OnFailure, check_open, distribute
from .worker import Entry, Feed, OpenWork, Refusal, Task

_PLACE = re.compile(r"^(prompts|responses)\[0\]:? ")


def score(
    prompts: Sequence[Any],
    responses: Sequence[Any],
    *,
    cluster: Cluster,
    scorer: str | Load,
    steps: StepRule | None = None,
    append_eos: bool = True,
    done: Collection[int] = (),
    batch: int = 16,
    on_failure: OnFailure | None = None,
) -> Iterator[tuple[int, Any]]:
    """`scorer.score` by the workers of a cluster: places and their Scores, in the order in which they arrive.

    Args:
        prompts, responses, steps, append_eos: as of ScorerBase.score; one prompt a response. What the scorer's own
            `score` does not take is left out.
        cluster: is open.
        scorer: a hub id or folder (see scorers.load.load_scorer), or a function without arguments that loads any scorer
            with a `score` in the worker that calls it.
        done: places that are not wanted.
        batch: responses scored together; changes no score beyond its last digits.
        on_failure: called with each response that cannot be scored; None to raise FailedProblems once all others are.

    Raises:
        ClusterError: a worker cannot load the scorer, or all workers were lost too often.
        ValueError: there are more prompts than responses, or fewer; batch is below 1.
        TypeError: scorer is a model, or a prompt is of the wrong kind.
    """
    count("batch", batch)
    check_open(cluster)
    if len(prompts) != len(responses):
        raise ValueError(f"{len(prompts)} prompts for {len(responses)} responses: one each is needed")
    tasks = {
        place: Task(place, (place,), (Prompt.of(prompt), response))
        for place, (prompt, response) in enumerate(zip(prompts, responses, strict=True))
        if place not in done
    }
    open_work = partial(ScoreWork, scorer_loader(scorer), steps, append_eos, batch)
    return _score(tasks, cluster, open_work, batch, on_failure)


def _score(
    tasks: Mapping[int, Task], cluster: Cluster, open_work: OpenWork, batch: int, on_failure: OnFailure | None
) -> Iterator[tuple[int, Any]]:
    with Crew(cluster, open_work) as crew:
        yield from distribute(crew, cluster, tasks, batch, on_failure)


class ScoreWork:
    """A scorer in a worker; see worker.Work."""

    def __init__(self, load: Load, steps: StepRule | None, append_eos: bool, batch: int) -> None:
        self._scorer = load()
        self._how = self._scorer.score_options(steps, append_eos)
        self._batch = batch

    @property
    def forward_calls(self) -> int:
        """Forwards of the scorer."""
        return forwards(self._scorer)

    def encode(self, prompt: Prompt) -> tuple[int, ...]:
        """Token ids by the scorer; a run does not ask."""
        return tuple(self._scorer.encode_prompt(prompt))

    def run(self, feed: Feed) -> Iterator[Entry]:
        """The scores of tasks, `batch` at a time; a content is a prompt and a response."""
        while True:
            tasks = feed.take(self._batch, wait=True)
            try:
                results = self._scores(tasks)
            except ValueError:
                results = list(map(self._one, tasks))
            for task, result in zip(tasks, results, strict=True):
                yield Entry(task.place, task.place, result)

    def _scores(self, tasks: Sequence[Task]) -> list[Any]:
        prompts, responses = zip(*(task.content for task in tasks), strict=True)
        scores: list[Any] = self._scorer.score(prompts, responses, **self._how)
        return scores

    def _one(self, task: Task) -> Any:
        try:
            return self._scores([task])[0]
        except ValueError as error:
            return Refusal(_PLACE.sub("", " ".join(str(error).split())))
