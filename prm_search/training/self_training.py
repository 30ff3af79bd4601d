"""Self-training: few labelled responses and many without labels (SSRM, arXiv 2409.06903)."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from hashlib import blake2b
from os import PathLike
from pathlib import Path
from typing import Any

from .. import checks
from ..calibration import Calibration
from ..files import one_writer
from ..scorers.implicit.card import CARD
from ..scorers.implicit.implicit_prm import ImplicitPRM
from .data import LabelledResponse, read_rollouts, read_unlabelled, split
from .pair_accuracy import count_pairs, pair_accuracy
from .recipe import Recipe
from .run import Progress, train

STATE = "self_training.json"


@dataclass(frozen=True)
class SelfTraining:
    """Settings of self-training.

    Args:
        rounds: with pseudo-labels, at most; the round before them learns from the labels alone.
        confidence: (low, high): responses whose probability of being right is at least `high` are taken for right,
            those at most `low` for wrong, the others for nothing.

    Raises:
        TypeError, ValueError: a number is of the wrong kind or out of range.
    """

    rounds: int = 3
    confidence: tuple[float, float] = (0.1, 0.9)

    def __post_init__(self) -> None:
        checks.count("rounds", self.rounds)
        low, high = self.confidence
        for name, share in (("low", low), ("high", high)):
            checks.number(f"confidence: {name}", share, "a probability in (0, 1)", lambda x: 0 < x < 1)
        if not low < high:
            raise ValueError(f"confidence={self.confidence!r}: low < high is needed")


def self_train(
    model: str,
    rollouts: str | PathLike[str],
    unlabelled: str | PathLike[str],
    out: str | PathLike[str],
    recipe: Recipe | None = None,
    settings: SelfTraining | None = None,
    *,
    resume: bool = False,
    log: Callable[[str], object] | None = None,
    progress: Progress | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Train an implicit PRM on outcome labels, and then on labels that it gives itself.

    The first round trains on the labelled responses. In each further round the present pair rewards the unlabelled
    ones, and a Platt calibration on held-out labels maps rewards to probabilities. A new pair is then trained, from the
    model it all began with, on the labels and on pseudo-labels where those are confident. It ends after `rounds`, where
    no response is confident or no pseudo-label changed, or at the first round whose accuracy on held-out pairs is not
    above the best before. The best round is the result.

    SSRM (arXiv 2409.06903) finetunes a classifier of pairs of responses further in each round, at a fixed confidence.
    This one labels single responses, calibrates first, begins anew (the model is the pair's reference), and looks at
    held-out labels to stop. These serve the calibration's two numbers too.

    Args:
        model, rollouts, recipe, log, progress: see run.train; `recipe.holdout` problems are held out, once.
        unlabelled: rollouts whose labels, if any, are not read. Those to held-out problems are left out.
        out: folder; it gets a folder for each round, `self_training.json`, and the card of the best round.
        settings: see SelfTraining.
        resume: go on after what is finished in `out`.
        options: revision, delimiter, arguments: see run.train.

    Returns:
        The card, with "self_training": the figures of all rounds, and which is the best.

    Raises:
        ValueError: as run.train; the held-out problems have no right and wrong response to one problem; or it runs in
            several processes.
        OSError, ImportError: as run.train, or scikit-learn is missing.
    """
    recipe, settings = recipe or Recipe(), settings or SelfTraining()
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError("self-training runs in one process: it scores between its rounds")
    labelled = read_rollouts(rollouts)
    kept, held = split(labelled, recipe.holdout)
    if not kept or not count_pairs(held):
        raise ValueError(
            f"{os.fspath(rollouts)}: of {len(labelled)} responses, the held-out {len(held)} have {count_pairs(held)} "
            "pairs of a right and a wrong response to one problem: more labels or a larger holdout are needed"
        )
    away = {row.prompt_ids for row in held}
    pool = [row for row in read_unlabelled(unlabelled) if row.prompt_ids not in away]
    if not pool:
        raise ValueError(f"{os.fspath(unlabelled)}: all responses are to held-out problems")
    folder = Path(out)
    if (folder / CARD).exists():
        raise ValueError(f"{folder} holds a pair already: name another folder")
    folder.mkdir(parents=True, exist_ok=True)
    with one_writer(folder / "self-training"):
        run = _Run(model, folder, recipe, settings, kept, held, pool, options, log, progress)
        run.begin(resume)
        return run.all()


class _Run:
    """The rounds of one self-training, in a folder; arguments as self_train has them."""

    def __init__(
        self,
        model: str,
        folder: Path,
        recipe: Recipe,
        settings: SelfTraining,
        kept: Sequence[LabelledResponse],
        held: Sequence[LabelledResponse],
        pool: Sequence[LabelledResponse],
        options: Mapping[str, Any],
        log: Callable[[str], object] | None,
        progress: Progress | None,
    ) -> None:
        self.model, self.folder, self.recipe, self.settings = model, folder, recipe, settings
        self.kept, self.held, self.pool, self.options = kept, held, pool, options
        self.log = log or (lambda line: None)
        self.progress = progress
        self.rounds: list[dict[str, Any]] = []

    def begin(self, resume: bool) -> None:
        """Take up what is finished. Raises ValueError where that is of another run, or must not be gone on from."""
        path, digest = self.folder / STATE, self._digest()
        if path.is_file():
            state = json.loads(path.read_text(encoding="utf-8"))
            if not resume:
                raise ValueError(f"{self.folder} has rounds of a run: resume goes on with them")
            if state["settings"] != digest:
                raise ValueError(f"{self.folder} has rounds of other data or settings; resume needs the same ones")
            self.rounds = state["rounds"]
        else:
            self._save()

    def _digest(self) -> str:
        parts = [self.model, asdict(self.recipe), asdict(self.settings), dict(self.options)]
        digest = blake2b(json.dumps(parts, sort_keys=True, default=str).encode(), digest_size=16)
        for row in (*self.kept, *self.held, *self.pool):
            digest.update(json.dumps([row.prompt_ids, row.label, row.count]).encode())
            digest.update(row.response_ids.tobytes())
        return digest.hexdigest()

    def _save(self) -> None:
        _write(self.folder / STATE, {"settings": self._digest(), "rounds": self.rounds})

    def all(self) -> dict[str, Any]:
        """Run what is left, and write the card of the best round."""
        while not self._over():
            number = len(self.rounds)
            figures = self._round(number)
            self.rounds.append(figures)
            self._save()
            self.log(
                f"round {number}: {figures['right']} right and {figures['wrong']} wrong pseudo-labels, held-out pair "
                f"accuracy {figures['accuracy']:.3f}"
            )
        best = self._best()
        folder = self.folder / f"round-{best}"
        card: dict[str, Any] = json.loads((folder / CARD).read_text(encoding="utf-8"))
        card["model"] = f"./{folder.name}"
        if card["reference"] is not None and card["reference"].startswith("."):
            card["reference"] = _moved(card["reference"], folder, self.folder)
        card["self_training"] = {"settings": asdict(self.settings), "rounds": self.rounds, "best": best}
        _write(self.folder / CARD, card)
        return card

    def _best(self) -> int:
        accuracies = [figures["accuracy"] for figures in self.rounds]
        return accuracies.index(max(accuracies))

    def _over(self) -> bool:
        if not self.rounds:
            return False
        return (
            len(self.rounds) > self.settings.rounds or "ended" in self.rounds[-1] or self._best() < len(self.rounds) - 1
        )

    def _round(self, number: int) -> dict[str, Any]:
        """Train one round, and label for the next. Figures of both."""
        folder = self.folder / f"round-{number}"
        labels = self.rounds[-1]["next"] if number else []
        pseudo = [replace(self.pool[place], label=label, reference=None) for place, label in labels]
        if not (folder / CARD).exists():
            data = self.folder / f"round-{number}.jsonl"
            _write_rollouts(data, [*self.kept, *pseudo])
            begun = replace(self.recipe, holdout=0.0)  # what is held out is no longer among them
            train(
                self.model, data, folder, begun, resume=True, log=self.log, progress=self.progress, **self.options
            )  # fmt: skip
        rewards = self._rewards(folder)
        held, pool = rewards[: len(self.held)], rewards[len(self.held) :]
        figures: dict[str, Any] = {
            "accuracy": pair_accuracy(self.held, held),
            "right": sum(label for _, label in labels),
            "wrong": sum(not label for _, label in labels),
        }
        try:
            calibration = Calibration.fit(held, [row.label for row in self.held], value="q")
        except ValueError as error:  # this pair cannot tell held-out right responses from wrong ones
            return figures | {"next": [], "ended": f"held-out rewards: {error}"}
        following = self._confident([calibration(reward) for reward in pool])
        figures |= {"slope": calibration.slope, "offset": calibration.offset, "next": following}
        if not following:
            figures["ended"] = "no response is confident"
        elif following == labels:
            figures["ended"] = "no pseudo-label changed"
        return figures

    def _confident(self, probabilities: Sequence[float]) -> list[list[Any]]:
        """Places in the pool whose probability is beyond the thresholds, with their labels."""
        low, high = self.settings.confidence
        return [[place, p >= high] for place, p in enumerate(probabilities) if p >= high or p <= low]

    def _rewards(self, folder: Path) -> list[float]:
        """Rewards of the held-out responses and of the pool under the pair of a round."""
        pair = ImplicitPRM.from_pretrained(folder)
        rows = [*self.held, *self.pool]
        scores = pair.score([list(row.prompt_ids) for row in rows], [row.response_ids for row in rows])
        return [score.reward for score in scores]


def _moved(path: str, old: Path, new: Path) -> str:
    """A path relative to one folder as one relative to another, beginning with a dot."""
    moved = os.path.relpath((old / path).resolve(), new.resolve())
    return moved if moved.startswith(".") else os.path.join(".", moved)


def _write_rollouts(path: Path, rows: Sequence[LabelledResponse]) -> None:
    part = path.with_suffix(".part")
    with part.open("w", encoding="utf-8", newline="\n") as file:
        for index, row in enumerate(rows):
            record: dict[str, Any] = {
                "index": index, "prompt_ids": list(row.prompt_ids), "response_ids": row.response_ids.tolist(),
                "label": int(row.label), "count": row.count,
            }  # fmt: skip
            if row.logprobs is not None:
                record["logprobs"] = [min(float(value), 0.0) for value in row.logprobs]
            file.write(json.dumps(record) + "\n")
    os.replace(part, path)


def _write(path: Path, record: Mapping[str, Any]) -> None:
    part = Path(f"{path}.part")
    part.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    os.replace(part, path)
