"""The searches of `prm-search eval` as they are kept beside its records: trees for a page, draws for a replay."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..evaluation.plan import Plan, Unit
from ..recording import Recorder, recorded, told_by
from .eval_trees import TREES, tree_record
from .records import RecordFile

if TYPE_CHECKING:
    from ..driver.result import Result

Keep = Callable[[Unit, Mapping[str, Any]], None]


@dataclass(frozen=True)
class Tell:
    """Reads off a search what is kept of it, plain values, in the process that has the models.

    Attributes:
        plan: of the run.
        tree: keep its tree.
        draws: keep its draws and scores.
    """

    plan: Plan
    tree: bool
    draws: bool

    def __call__(self, unit: Unit, result: Result, policy: Any, scorers: Sequence[Any]) -> dict[str, Any]:
        """Return what `kept` takes."""
        told: dict[str, Any] = {}
        if self.tree:
            told["tree"] = tree_record(unit, result)
        if self.draws:
            sampling = self.plan.sampling(unit.seed or 0)
            if unit.kind == "greedy":
                sampling = replace(sampling, temperature=0.0)
            told["draws"] = recorded(result.tree, sampling, **told_by(policy, *scorers))
        return told


@contextmanager
def kept(
    folder: Path,
    units: Sequence[Unit],
    keys: Sequence[str],
    tell: Tell,
    record: str | None,
    *,
    resume: bool,
    more: bool,
) -> Iterator[Keep]:
    """A function that keeps what Tell tells of each search that ends.

    Args:
        folder: of the evaluation; trees go to `TREES` in it.
        units: of the run, in order of their indices.
        keys: of the records of the units.
        tell: tells it.
        record: the file of draws and scores, where these are told.
        resume: go on with a file of trees that exists.
        more: go on with a file of draws that exists, since records are there.

    Raises:
        BadInput, ValueError: as RecordFile does.
        OSError: as Recorder does.
    """
    places = {unit: place for place, unit in enumerate(units)}
    with ExitStack() as stack:
        trees = stack.enter_context(RecordFile(str(folder / TREES), keys, resume=resume)) if tell.tree else None
        recorder = None if record is None else stack.enter_context(Recorder(record, resume=more))

        def keep(unit: Unit, told: Mapping[str, Any]) -> None:
            place = places[unit]
            if recorder is not None:
                recorder.write(told["draws"])
            if trees is not None and place not in trees.done:  # of a run stopped between a tree and its record
                trees.write({"index": place, "key": keys[place], **told["tree"]})

        yield keep
        if trees is not None:
            trees.put_in_order()
