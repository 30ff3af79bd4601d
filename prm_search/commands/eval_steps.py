"""``prm-search eval-steps``: does a pair find the first wrong step? On data in the form of ProcessBench."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from ..evaluation.report import step_table, write_step_report
from ..evaluation.step_errors import summarise_steps
from ..evaluation.step_scores import SCORES, Solution, score_steps
from ..values import VALUES
from . import BadInput, options, render
from .options import listed
from .problems import PROMPTS, read_rows
from .records import Item, RecordFile, digests, finished, prompt_of, reason, report

_THRESHOLD = "Thresholds"
RECORDS, FIT, RUN = "steps.jsonl", "fit.jsonl", "run.json"


def eval_steps(
    out: Annotated[
        str,
        typer.Option(
            help="Folder for steps.jsonl, each record as soon as it is finished, report.md and report.json.",
            rich_help_panel=options.OUTPUT,
        ),
    ],
    pair: options.Pair = None,
    prm: options.Prm = None,
    reference: options.Reference = None,
    beta: options.Beta = None,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    data: Annotated[
        str | None,
        typer.Option(
            help='Solutions: JSON Lines or a name for the package datasets, with "problem" (or prompt, question, '
            'messages), "steps", and "label", the first wrong step or -1.',
            rich_help_panel=options.DATA,
        ),
    ] = None,
    config: options.Config = None,
    split: options.Split = "test",
    limit: Annotated[int | None, typer.Option(help="Solutions at most.", rich_help_panel=options.DATA)] = None,
    template: options.Template = None,
    chat: options.Chat = False,
    system: options.System = None,
    delimiter: Annotated[
        str | None,
        typer.Option(
            help=r"Put between steps; \n and \t are read as such. Default: the pair card's, else \n\n.",
            rich_help_panel=options.DATA,
        ),
    ] = None,
    cut: Annotated[
        bool,
        typer.Option("--cut", help="No end of sequence is scored after the last step.", rich_help_panel=options.DATA),
    ] = False,
    values: Annotated[
        str, typer.Option(help=f"Scores of a step, of {','.join(VALUES)}.", rich_help_panel=_THRESHOLD)
    ] = ",".join(SCORES),
    folds: Annotated[
        int,
        typer.Option(help="Thresholds for each come from the others; none is split.", rich_help_panel=_THRESHOLD),
    ] = 5,
    seed: Annotated[int, typer.Option(help="Of dealing problems into folds.", rich_help_panel=_THRESHOLD)] = 0,
    fit: Annotated[
        str | None,
        typer.Option(
            help="Other solutions to choose thresholds on, in place of folds: a file, or a split of the data set.",
            rich_help_panel=_THRESHOLD,
        ),
    ] = None,
    threshold: Annotated[
        float | None,
        typer.Option(help="A threshold chosen beforehand, for one score.", rich_help_panel=_THRESHOLD),
    ] = None,
    batch: Annotated[
        int, typer.Option(help="Solutions scored together; changes no score.", rich_help_panel=options.OUTPUT)
    ] = 16,
    title: Annotated[str, typer.Option(help="Of the report.", rich_help_panel=options.OUTPUT)] = "Step errors",
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the records of --out.", rich_help_panel=options.OUTPUT)
    ] = False,
    report_only: Annotated[
        bool,
        typer.Option(
            "--report-only", help="Make the report of --out again from its records.", rich_help_panel=options.OUTPUT
        ),
    ] = False,
    debug: options.Debug = False,
) -> None:
    """Find the first wrong steps of worked solutions (ProcessBench)."""
    folder = Path(out)
    if report_only:
        rebuild(folder)
        return
    options.check_models(pair, prm, reference, needed=True)
    options.at_least("--batch", batch)
    options.at_least("--folds", folds, 2)
    if data is None:
        raise BadInput("--data is needed: the solutions")
    if limit is not None:
        options.at_least("--limit", limit)
    if system is not None and not chat:
        raise BadInput("--system needs --chat")
    scores = listed(values)
    for each in scores:
        options.one_of("--values", each, tuple(VALUES))
    if threshold is not None and (fit is not None or len(scores) > 1):
        raise BadInput("--threshold is of one score: name it in --values, and leave out --fit")
    between = options.unescape(delimiter) if delimiter is not None else options.card_delimiter(pair) or "\n\n"
    if not between:
        raise BadInput("--delimiter is empty: what separates steps is needed")
    how: dict[str, Any] = {
        "template": None if template is None else options.unescape(template), "chat": chat, "system": system
    }  # fmt: skip
    sets = {RECORDS: read_solutions(data, config, split, limit, **how)}
    if fit is not None:
        is_file = fit.endswith((".jsonl", ".json")) or Path(fit).is_file()
        sets[FIT] = read_solutions(fit if is_file else data, config, split if is_file else fit, None, **how)
    settings = ("eval-steps", pair, prm, reference, beta, dtype, between, cut, scores)
    about = {
        "pair": pair or prm, "reference": reference, "beta": beta, "data": data, "split": split, "delimiter": between,
        "template": template, "values": scores,
    }  # fmt: skip
    run = {"title": title, "about": about, "folds": folds, "seed": seed, "fit": fit, "threshold": threshold}
    folder.mkdir(parents=True, exist_ok=True)
    model: Any = None
    for name, given in sets.items():
        items = [item for item, _ in given]
        keys = digests(items, *settings)
        with RecordFile(str(folder / name), keys, resume=resume) as file:
            done = dict(file.done)
            try:
                if len(done) < len(keys):
                    from .models import load_pair, quiet

                    quiet()
                    model = model or load_pair(pair, prm, reference, beta=beta, device=device, dtype=dtype)
                    bar, tick = render.progress("solutions", len(keys) - len(done))
                    with bar:
                        flow = score_steps(
                            [solution for _, solution in given],
                            scorer=model,
                            delimiter=between,
                            values=scores,
                            append_eos=not cut,
                            done=done,
                            batch=batch,
                        )
                        for record in _named(flow, items):
                            place = record["index"]
                            done[place] = {"key": keys[place], **items[place].extra, **record}
                            file.write(done[place])
                            tick()
            finally:
                report(file, len(done), len(keys))
    (folder / RUN).write_text(json.dumps(run, indent=2) + "\n", encoding="utf-8")
    rebuild(folder)


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
    found = []
    for where, record in read_rows(data, config=config, split=split, limit=limit):
        fields = [name for name in PROMPTS if record.get(name) is not None]
        if len(fields) != 1:
            raise BadInput(f"{where}: one of {', '.join(PROMPTS)} is needed, got {fields or list(record)}")
        asked = record[fields[0]]
        if template is not None:
            if not isinstance(asked, str) or template.count("{}") != 1:
                raise BadInput(f"{where}: --template needs {{}} once, where the problem goes, which must be a text")
            asked = template.replace("{}", asked)
        prompt = prompt_of(asked, where, chat, system)
        steps, label = record.get("steps"), record.get("label")
        if not isinstance(steps, list):
            raise BadInput(f'{where}: "steps" must be a list of texts')
        try:
            solution = Solution(prompt, tuple(steps), label)  # type: ignore[arg-type]
        except ValueError as error:
            raise BadInput(f"{where}: {reason(error)}") from error
        extra = {"id": record["id"]} if "id" in record else {}
        found.append((Item(where, prompt, json.dumps([steps, label]), extra), solution))
    if not found:
        raise BadInput(f"{data} holds no solutions")
    return found


def _named(flow: Iterator[dict[str, Any]], items: list[Item]) -> Iterator[dict[str, Any]]:
    """The records; an error names the line of its solution."""
    try:
        yield from flow
    except ValueError as error:
        said = reason(error)
        found = re.match(r"solutions\[(\d+)\]: ", said)
        if found is None:
            raise
        raise BadInput(f"{items[int(found[1])].where}: {said[found.end() :]}") from error
