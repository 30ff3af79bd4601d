"""``prm-search eval``: strategies against each other at equal budgets, with intervals, tests and plots."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..evaluation.plan import STRATEGIES, VOTES, WEIGHTS, Plan
from ..values import VALUES
from . import BadInput, options, render
from .eval_run import RECORDS, EvalRun, NamedModels, describe, rebuild
from .options import listed, make_steps, numbers
from .problems import function_of, read_problems
from .records import Item, RecordFile, report
from .responses import read_responses
from .rollout import make_judge

if TYPE_CHECKING:
    from ..evaluation.responses import Answered

_PLAN, _SAMPLING = "What is compared", "Sampling"


def evaluate(
    out: Annotated[
        str,
        typer.Option(
            help="Folder for records.jsonl, each record as soon as it is finished, report.md, report.json and plots.",
            rich_help_panel=options.OUTPUT,
        ),
    ],
    policy: Annotated[
        str | None,
        typer.Option(
            help="The model that samples: hub id, folder, PEFT adapter, .gguf file, or 'demo'.",
            rich_help_panel=options.MODELS,
        ),
    ] = None,
    pair: Annotated[
        list[str] | None,
        typer.Option(
            help="Folder or hub id with a pair card (pair.json), or 'demo'. May be repeated: all pairs choose among "
            "the same samples.",
            rich_help_panel=options.MODELS,
        ),
    ] = None,
    prm: options.Prm = None,
    reference: options.Reference = None,
    beta: options.Beta = None,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    engine: options.Engine = "hf",
    engine_options: options.EngineOptions = None,
    data: Annotated[
        str | None,
        typer.Option(
            help="Problems with answers: JSON Lines or a name for the package datasets, as for rollout.",
            rich_help_panel=options.DATA,
        ),
    ] = None,
    responses: Annotated[
        str | None,
        typer.Option(
            help="In place of --policy and --data: responses that exist, as rollout writes them, or problems with "
            '"responses" and "labels" or "answer".',
            rich_help_panel=options.DATA,
        ),
    ] = None,
    config: options.Config = None,
    split: options.Split = "test",
    limit: Annotated[int | None, typer.Option(help="Problems at most.", rich_help_panel=options.DATA)] = None,
    template: options.Template = None,
    chat: options.Chat = False,
    system: options.System = None,
    label: options.Label = "math",
    answer: Annotated[
        str | None,
        typer.Option(
            help="The answer in a response, which is judged and votes: boxed, ####, number or module:function. "
            "Default: what there is, in the order ####, boxed, number.",
            rich_help_panel=options.LABELS,
        ),
    ] = None,
    strategies: Annotated[
        str | None,
        typer.Option(
            help=f"Of {','.join(STRATEGIES)}. Default: all but lookahead; with --responses those that vote.",
            rich_help_panel=_PLAN,
        ),
    ] = None,
    budgets: Annotated[
        str | None,
        typer.Option(
            help="Whole samples. Default: 1,4,16; with --responses the powers of 2 that there are.",
            rich_help_panel=_PLAN,
        ),
    ] = None,
    seeds: Annotated[str | None, typer.Option(help="Of the draws. Default: 0.", rich_help_panel=_PLAN)] = None,
    values: Annotated[
        str, typer.Option(help=f"What best_of_n, weighted rank by, of {','.join(VALUES)}.", rich_help_panel=_PLAN)
    ] = "q",
    search_values: Annotated[
        str | None,
        typer.Option(help="What beam and lookahead rank by. Default: --values.", rich_help_panel=_PLAN),
    ] = None,
    weights: Annotated[
        str, typer.Option(help=f"Of weighted votes, of {','.join(WEIGHTS)}.", rich_help_panel=_PLAN)
    ] = "softmax",
    weight_temperature: Annotated[float, typer.Option(help="Of the weights.", rich_help_panel=_PLAN)] = 1.0,
    shape: Annotated[
        list[str] | None,
        typer.Option(
            help="16=2x8: beam and lookahead of budget 16 have width 2 and 8 expansions. May be repeated. Default: as "
            "square as N allows.",
            rich_help_panel=_PLAN,
        ),
    ] = None,
    uncapped: Annotated[
        bool,
        typer.Option(
            "--uncapped",
            help="Do not cut beam and lookahead at the tokens of the samples; their shape makes budgets alike.",
            rich_help_panel=_PLAN,
        ),
    ] = False,
    lookahead_steps: Annotated[int, typer.Option(help="Steps of a rollout.", rich_help_panel=_PLAN)] = 1,
    lookahead_rollouts: Annotated[int, typer.Option(help="Rollouts of a child.", rich_help_panel=_PLAN)] = 1,
    delimiter: options.Delimiter = None,
    step_tokens: options.StepTokens = None,
    step_regex: options.StepRegex = None,
    temperature: Annotated[float, typer.Option(rich_help_panel=_SAMPLING)] = 1.0,
    top_p: Annotated[float, typer.Option(rich_help_panel=_SAMPLING)] = 1.0,
    top_k: Annotated[int, typer.Option(help="0 keeps all.", rich_help_panel=_SAMPLING)] = 0,
    min_p: Annotated[float, typer.Option(rich_help_panel=_SAMPLING)] = 0.0,
    max_new_tokens: Annotated[int, typer.Option(help="Of one response.", rich_help_panel=_SAMPLING)] = 1024,
    batch: Annotated[
        int, typer.Option(help="Problems searched together; changes no answer.", rich_help_panel=options.OUTPUT)
    ] = 32,
    title: Annotated[str, typer.Option(help="Of the report.", rich_help_panel=options.OUTPUT)] = "Evaluation",
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
    """Compare strategies at equal budgets on problems with known answers."""
    folder = Path(out)
    if report_only:
        rebuild(folder)
        return
    arguments = options.engine_options(engine, engine_options)
    models = NamedModels(policy, pair or (), prm, reference, beta, device, dtype, engine, arguments)
    options.at_least("--batch", batch)
    if limit is not None:
        options.at_least("--limit", limit)
    if system is not None and not chat:
        raise BadInput("--system needs --chat")
    if (policy is None) != (responses is not None) or (data is None) != (responses is not None):
        raise BadInput("--policy and --data are needed, or else --responses")
    of_data = {"config": config, "template": template, "seeds": seeds, "search-values": search_values, "shape": shape}
    named = next((name for name, given in of_data.items() if given), None)
    if responses is not None and named is not None:
        raise BadInput(f"--{named} is for --data; --responses are taken as they are, and nothing is sampled")
    judge, extract = make_judge(label, answer if ":" not in label else None), _extractor(answer)
    items: list[Item]
    answered: list[Answered] = []
    if responses is not None:
        items, answered = read_responses(responses, chat=chat, system=system)
        items, answered = items[:limit], answered[:limit]
        most = min(len(each.responses) for each in answered)
    else:
        items = read_problems(
            str(data),
            config=config,
            split=split,
            limit=limit,
            template=None if template is None else options.unescape(template),
            chat=chat,
            system=system,
        )
        most = 16
    default = VOTES if responses is not None else [name for name in STRATEGIES if name != "lookahead"]
    plan = Plan(
        strategies=default if strategies is None else listed(strategies),
        budgets=numbers("--budgets", budgets) if budgets else _powers(most) if responses is not None else (1, 4, 16),
        seeds=(0,) if seeds is None else numbers("--seeds", seeds),
        values=listed(values),
        search_values=None if search_values is None else listed(search_values),
        weights=listed(weights),
        weight_temperature=weight_temperature,
        shapes=_shapes(shape or []),
        capped=not uncapped,
        lookahead_steps=lookahead_steps,
        lookahead_rollouts=lookahead_rollouts,
        steps=make_steps(
            delimiter, step_tokens, step_regex, default=_card_delimiter(models.pairs, delimiter, step_regex)
        ),
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        min_p=min_p,
        max_new_tokens=max_new_tokens,
    )
    if (plan.ranked or responses is not None) and not models.names:
        raise BadInput(f"a pair is needed for {', '.join(plan.ranked or plan.strategies)}: --pair, or --prm")
    run = EvalRun(items, answered, plan, judge, extract, models)
    about = {**models.card(), "data": data or responses, "label": label, "answer": answer, "plan": plan.card()}
    keys = run.keys(models.card(), dtype, label, answer, plan.card())
    about_run = {"title": title, "expected": len(keys), "about": about}
    folder.mkdir(parents=True, exist_ok=True)
    with RecordFile(str(folder / RECORDS), keys, resume=resume) as file:
        records = dict(file.done)
        try:
            if len(records) < len(keys):
                bar, tick = render.progress("records", len(keys) - len(records))
                with bar:
                    for record in run.records(dict(records), batch):
                        if not records:
                            describe(folder, about_run)
                        records[record["index"]] = record
                        file.write({"key": keys[record["index"]], **record})
                        tick()
        finally:
            report(file, len(records), len(keys))
    describe(folder, about_run)
    rebuild(folder)


def _extractor(answer: str | None) -> Any:
    return function_of("--answer", answer) if answer is not None and ":" in answer else answer


def _powers(most: int) -> list[int]:
    return [1 << i for i in range(most.bit_length())]


def _shapes(given: Sequence[str]) -> dict[int, tuple[int, int]]:
    found = {}
    for each in given:
        match = re.fullmatch(r"(\d+)=(\d+)x(\d+)", each.replace(" ", ""))
        if match is None:
            raise BadInput(f"--shape {each!r}: N=WIDTHxEXPANSIONS is needed, such as 16=2x8")
        n, width, expansions = map(int, match.groups())
        found[n] = (width, expansions)
    return found


def _card_delimiter(pairs: Sequence[str], delimiter: object, regex: object) -> str | None:
    """What ends a step according to the pairs' cards. Raises BadInput where they disagree and no option decides."""
    found = {options.card_delimiter(pair) for pair in pairs} - {None}
    if len(found) > 1 and delimiter is None and regex is None:
        raise BadInput(f"--pair: the cards end steps by {sorted(map(repr, found))}; --delimiter has to say which")
    return next(iter(found)) if len(found) == 1 else None
