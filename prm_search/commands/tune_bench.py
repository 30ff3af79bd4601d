"""The models of `prm-search tune`: in this process, or in the workers of a cluster; loaded at their first use."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

from ..answers import resolve_answer
from ..problems import Problem, final_answer
from .eval_run import NamedModels
from .problems import at_lines
from .progress import Bar
from .records import Item
from .workers import Workers, absolute, sent_whole

if TYPE_CHECKING:
    from ..distributed import ClusterBench
    from ..evaluation.tuning.run import Bench


class TuneBench:
    """Opens the bench of a run when it is asked for, and closes it at the end of `with`.

    Args:
        models: the policy and the scorers.
        workers: of a cluster, or none.
        bar: shows how far the work is.
        rules: judge, answer, sampling, batch, seconds: as of evaluation.tuning.run.Bench; the answer may be a name.
    """

    def __init__(self, models: NamedModels, workers: Workers, bar: Bar, **rules: Any) -> None:
        self._models, self._workers, self._bar, self._rules = models, workers, bar, rules
        self._stack = ExitStack()
        self._bench: Bench | ClusterBench | None = None

    def __enter__(self) -> TuneBench:
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.__exit__(*error)

    @contextmanager
    def of(self, items: Sequence[Item]) -> Iterator[tuple[Bench | ClusterBench, list[Problem]]]:
        """The bench, and items as problems; what it says of a problem names the line of its item."""
        with at_lines(items):
            if self._bench is None:
                self._bench = self._here() if self._workers.ray is None else self._on_workers()
            yield self._bench, [Problem(item.prompt, str(item.response)) for item in items]

    def _here(self) -> Bench:
        from ..evaluation.tuning.run import Bench

        policy, scorers = self._models.load()
        self._bar.watch(policy, *scorers)
        named = dict(zip(self._models.names, scorers, strict=True))
        rules = self._rules | {"answer": resolve_answer(self._rules["answer"]) or final_answer}
        return Bench(policy, named, **rules)

    def _on_workers(self) -> ClusterBench:
        from ..distributed import ClusterBench

        cluster = self._stack.enter_context(self._workers.open(self._bar))
        judge, answer = self._rules["judge"], self._rules["answer"]
        sent_whole(judge, getattr(judge, "same", None), getattr(judge, "answer", None), answer)
        models = self._models.sent(cluster)
        scorers: dict[str, Callable[[], Any]] = {
            name: partial(models.load_scorer, name, absolute(name)) for name in self._models.names
        }
        bench = ClusterBench(cluster=cluster, policy=models.load_policy, scorers=scorers, **self._rules)
        return self._stack.enter_context(bench)
