"""``prm-search eval-steps``: does a scorer find the first wrong step? On data in the form of ProcessBench."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Annotated, Any

import typer

from ..evaluation.report import step_table, write_step_report
from ..evaluation.step_errors import summarise_steps
from ..evaluation.step_scores import SCORES, STEP_SCORES, Solution, score_steps
from ..values import VALUES
from . import BadInput, groups, options
from .config import Common
from .grouped import grouped
from .options import DATA, listed
from .problems import PROMPTS, read_rows
from .progress import Bar
from .records import Item, RecordFile, asked_in, digests, finished, prompt_of, reason, report

_THRESHOLD = "Thresholds"
RECORDS, FIT, RUN = "steps.jsonl", "fit.jsonl", "run.json"


@dataclass(frozen=True, kw_only=True)
class Solutions(groups.MaybeData):
    """Worked solutions."""

    data: Annotated[
        str | None,
        typer.Option(
            help='JSON Lines or a name for the package datasets, with "problem" (or prompt, question, messages), '
            '"steps", and "label", the first wrong step or -1.',
            rich_help_panel=DATA,
        ),
    ] = None
    delimiter: Annotated[
        str | None,
        typer.Option(
            help=r"Put between steps for a pair; \n and \t are read as such. Default: the pair card's, else \n\n.",
            rich_help_panel=DATA,
        ),
    ] = None
    cut: Annotated[
        bool, typer.Option("--cut", help="No end of sequence is scored after the last step.", rich_help_panel=DATA)
    ] = False

    def between(self, pair: str | None) -> str:
        """Return what separates steps. Raises BadInput where it is empty."""
        if self.delimiter is None:
            return options.card_delimiter(pair) or "\n\n"
        if not self.delimiter:
            raise BadInput("--delimiter is empty: what separates steps is needed")
        return options.unescape(self.delimiter)

    def read(self, fit: str | None) -> dict[str, list[tuple[Item, Solution]]]:
        """Solutions for each file of records. Raises BadInput as read_solutions does."""
        if self.data is None:
            raise BadInput("--data is needed: the solutions")
        sets = {RECORDS: read_solutions(self.data, **self.where(), **self.form())}
        if fit is not None:
            is_file = fit.endswith((".jsonl", ".json")) or Path(fit).is_file()
            where = self.where() | {"limit": None} | ({} if is_file else {"split": fit})
            sets[FIT] = read_solutions(fit if is_file else self.data, **where, **self.form())
        return sets


@dataclass(frozen=True, kw_only=True)
class Thresholds:
    """Scores, and the thresholds that they fall below. Raises BadInput for options that make no sense together."""

    values: Annotated[
        str | None,
        typer.Option(
            help=f"Scores of a step, of {','.join(VALUES)}. Default: {','.join(SCORES)} of a pair, "
            f"{','.join(STEP_SCORES)} of a step PRM.",
            rich_help_panel=_THRESHOLD,
        ),
    ] = None
    folds: Annotated[
        int,
        typer.Option(help="Thresholds for each come from the others; none is split.", rich_help_panel=_THRESHOLD),
    ] = 5
    seed: Annotated[int, typer.Option(help="Of dealing problems into folds.", rich_help_panel=_THRESHOLD)] = 0
    fit: Annotated[
        str | None,
        typer.Option(
            help="Other solutions to choose thresholds on, in place of folds: a file, or a split of the data set.",
            rich_help_panel=_THRESHOLD,
        ),
    ] = None
    threshold: Annotated[
        float | None,
        typer.Option(help="A threshold chosen beforehand, for one score.", rich_help_panel=_THRESHOLD),
    ] = None

    def __post_init__(self) -> None:
        options.at_least("--folds", self.folds, 2)
        for score in self.scores or ():
            options.one_of("--values", score, tuple(VALUES))
        if self.threshold is not None and (self.fit is not None or len(self.scores or ()) > 1):
            raise BadInput("--threshold is of one score: name it in --values, and leave out --fit")

    @property
    def scores(self) -> list[str] | None:
        """Names of the scores; None for those that the scorer has."""
        return None if self.values is None else listed(self.values)

    def of(self, scorer: groups.Scorer) -> list[str] | None:
        """The same where they are known before the scorer is loaded. Raises BadInput where a threshold is of several.

        Args:
            scorer: as options name it.
        """
        if self.scores is not None or scorer.scorer is not None:
            return self.scores
        self.check_one(True)
        return list(SCORES)

    def check_one(self, of_pair: bool) -> None:
        """Raises BadInput where a threshold is given beside the several scores that a pair has."""
        if self.scores is None and self.threshold is not None and of_pair:
            raise BadInput("--threshold is of one score: name it in --values, and leave out --fit")


@dataclass(frozen=True, kw_only=True)
class Output(groups.OutFolder):
    """Places of records and report."""

    title: Annotated[str, groups.TITLE] = "Step errors"
    batch: Annotated[int, groups.BATCH] = 16


@grouped
def eval_steps(
    scorer: groups.Scorer,
    place: groups.Place,
    solutions: Solutions,
    thresholds: Thresholds,
    output: Output,
    common: Common,
) -> None:
    """Find the first wrong steps of worked solutions (ProcessBench)."""
    folder = Path(output.out)
    if output.report_only:
        rebuild(folder)
        return
    scorer.need()
    between = solutions.between(scorer.card)
    scores = thresholds.of(scorer)
    sets = solutions.read(thresholds.fit)
    settings = ("eval-steps", *scorer.key(), place.dtype, between, solutions.cut, scores)
    about = {
        **scorer.about(), "data": solutions.data, "split": solutions.split, "delimiter": between,
        "template": solutions.form()["template"],
    } | ({"values": scores} if scores is not None else {})  # fmt: skip
    run = {
        "title": output.title, "about": about, "folds": thresholds.folds, "seed": thresholds.seed,
        "fit": thresholds.fit, "threshold": thresholds.threshold,
    }  # fmt: skip
    model = cache(lambda: _load(scorer, place, solutions, thresholds))
    how = {"delimiter": between, "values": scores, "append_eos": not solutions.cut, "batch": output.batch}
    for name, set_solutions in sets.items():
        _score_set(folder / name, set_solutions, settings, model, how, resume=output.resume)
    (folder / RUN).write_text(json.dumps(run, indent=2) + "\n", encoding="utf-8")
    rebuild(folder)


def _load(named: groups.Scorer, place: groups.Place, solutions: Solutions, thresholds: Thresholds) -> Any:
    """The scorer. Raises BadInput where it has no step scores, or an option is not of its kind."""
    from .models import quiet

    quiet()
    scorer = named.load(place)
    if scorer.whole:
        raise BadInput(f"--scorer {named.title}: an {scorer.kind} judges whole answers, and has no step scores")
    thresholds.check_one(scorer.rewards_tokens)
    if solutions.delimiter is not None and not scorer.rewards_tokens:
        raise BadInput(f"--delimiter is of pairs: {named.title} is a {scorer.kind}, whose format says what ends a step")
    return scorer


def _score_set(
    path: Path,
    solutions: list[tuple[Item, Solution]],
    settings: Sequence[object],
    model: Callable[[], Any],
    how: Mapping[str, Any],
    *,
    resume: bool,
) -> None:
    """Score what is not in the file yet; the model is loaded where anything is left."""
    items = [item for item, _ in solutions]
    keys = digests(items, *settings)
    with RecordFile(str(path), keys, resume=resume) as file:
        done = dict(file.done)
        try:
            if len(done) < len(keys):
                scorer = model()
                bar = Bar("solutions", len(keys) - len(done))
                bar.watch(scorer)
                flow = score_steps([solution for _, solution in solutions], scorer=scorer, done=done, **how)
                with bar:
                    for record in _named(flow, items):
                        place = record["index"]
                        done[place] = {"key": keys[place], **items[place].extra, **record}
                        file.write(done[place])
                        bar.tick()
        finally:
            report(file, len(done), len(keys))


def rebuild(folder: Path) -> None:
    """Make the report of a folder from its records, and print its table. Raises BadInput where it has none."""
    try:
        run = json.loads((folder / RUN).read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError) as error:
        raise BadInput(f"--out {folder} holds no finished evaluation of steps: {reason(error)}") from error
    fit = None if run["fit"] is None else finished(folder / FIT)
    summary = summarise_steps(
        finished(folder / RECORDS), folds=run["folds"], seed=run["seed"], fit=fit, threshold=run["threshold"]
    )
    about = run["about"] | {"thresholds": _source(run)}
    write_step_report(summary, folder, title=run["title"], about=about)
    print(step_table(summary))


def _source(run: Mapping[str, Any]) -> str:
    if run["threshold"] is not None:
        return f"{run['threshold']}, as given"
    return f"chosen on {run['fit']}" if run["fit"] is not None else f"crossed over {run['folds']} folds"


def read_solutions(
    data: str,
    config: str | None,
    split: str,
    limit: int | None,
    *,
    template: str | None,
    chat: bool,
    system: str | None,
) -> list[tuple[Item, Solution]]:
    """Solutions of a file or data set. Raises BadInput where it cannot be read, holds none, or lacks a field."""
    solutions = []
    for where, record in read_rows(data, config=config, split=split, limit=limit):
        fields = [name for name in PROMPTS if record.get(name) is not None]
        if len(fields) != 1:
            raise BadInput(f"{where}: one of {', '.join(PROMPTS)} is needed, got {fields or list(record)}")
        problem = asked_in(record, fields[0], where)
        if template is not None:
            if not isinstance(problem, str) or template.count("{}") != 1:
                raise BadInput(f"{where}: --template needs {{}} once, where the problem goes, which must be a text")
            problem = template.replace("{}", problem)
        prompt = prompt_of(problem, where, chat, system)
        steps, label = record.get("steps"), record.get("label")
        if not isinstance(steps, list):
            raise BadInput(f'{where}: "steps" must be a list of texts')
        try:
            solution = Solution(prompt, tuple(steps), label)  # type: ignore[arg-type]
        except ValueError as error:
            raise BadInput(f"{where}: {reason(error)}") from error
        extra = {"id": record["id"]} if "id" in record else {}
        solutions.append((Item(where, prompt, json.dumps([steps, label]), extra), solution))
    if not solutions:
        raise BadInput(f"{data} holds no solutions")
    return solutions


def _named(flow: Iterator[dict[str, Any]], items: list[Item]) -> Iterator[dict[str, Any]]:
    """The records; an error names the line of its solution."""
    try:
        yield from flow
    except ValueError as error:
        message = reason(error)
        match = re.match(r"solutions\[(\d+)\]: ", message)
        if match is None:
            raise
        raise BadInput(f"{items[int(match[1])].where}: {message[match.end() :]}") from error
