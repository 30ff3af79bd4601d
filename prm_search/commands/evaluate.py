"""``prm-search eval``: strategies against each other at equal budgets, with intervals, tests and plots."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..evaluation.plan import OWN, PLANNED, STRATEGIES, VOTES, WEIGHTS, Plan
from . import BadInput, groups, options
from .config import Common
from .eval_kept import Tell, kept
from .eval_run import RECORDS, EvalRun, NamedModels, describe, rebuild
from .eval_trees import trees_page
from .grouped import grouped
from .options import ADVANCED, DATA, MODELS, OUTPUT, PAIR_HELP, listed, numbers
from .problems import answer_of, make_judge
from .progress import Bar
from .records import Item, RecordFile, report, writable
from .responses import read_responses
from .workers import Failures, Workers

if TYPE_CHECKING:
    from ..evaluation.responses import Answered

_PLAN = "What is compared"


@dataclass(frozen=True, kw_only=True)
class Pairs(groups.TwoModels):
    """The pairs and other scorers that are compared."""

    pair: Annotated[
        list[str] | None,
        typer.Option(help=f"{PAIR_HELP} Repeated: all choose among the same samples.", rich_help_panel=MODELS),
    ] = None
    scorer: Annotated[
        list[str] | None,
        typer.Option(help=f"{options.SCORER_HELP} May be repeated, as --pair.", rich_help_panel=MODELS),
    ] = None
    prm_format: Annotated[
        list[str] | None,
        typer.Option(
            help=f"{options.FORMAT_HELP} Repeated: one for each --scorer.", rich_help_panel=MODELS, show_default="auto"
        ),
    ] = None

    def scorers(self) -> list[tuple[str, str | None]]:
        """Each --scorer with what it is. Raises BadInput for a format that is unknown, or of nothing."""
        named, given = self.scorer or [], self.prm_format or []
        for name in given:
            options.check_scorer(next(iter(named), None), name)
        if len(given) not in (0, 1, len(named)):
            raise BadInput(f"--prm-format: {len(given)} for {len(named)} --scorer; one for all, or one for each")
        formats = given if len(given) > 1 else [next(iter(given), None)] * len(named)
        return list(zip(named, formats, strict=True))


@dataclass(frozen=True, kw_only=True)
class Problems(groups.MaybeData):
    """The questions: problems, or responses that exist."""

    responses: Annotated[
        str | None,
        typer.Option(
            help="In place of --policy and --data: responses that exist, as rollout writes them, or problems with "
            '"responses" and "labels" or "answer".',
            rich_help_panel=DATA,
        ),
    ] = None

    def read(self) -> tuple[list[Item], list[Answered]]:
        """The problems, and the same with their responses where those exist. Raises BadInput as their readers do."""
        if self.responses is None:
            return self.problems(str(self.data)), []
        items, answered = read_responses(self.responses, chat=self.chat, system=self.system)
        return items[: self.limit], answered[: self.limit]


@dataclass(frozen=True, kw_only=True)
class Compared:
    """The fields of evaluation.Plan, as options."""

    strategies: Annotated[
        str | None,
        typer.Option(
            help=f"Of {','.join(STRATEGIES)}. Default: all but lookahead; with --responses those that vote.",
            rich_help_panel=_PLAN,
        ),
    ] = None
    budgets: Annotated[
        str | None,
        typer.Option(
            help="Whole samples. Default: 1,4,16; with --responses the powers of 2 that there are.",
            rich_help_panel=_PLAN,
        ),
    ] = None
    seeds: Annotated[str | None, typer.Option(help="Of the draws. Default: 0.", rich_help_panel=_PLAN)] = None
    values: Annotated[
        str | None,
        typer.Option(
            help=f"What best_of_n, weighted rank by, of {','.join(PLANNED)}. Default: q; with --scorer own, what each "
            "is meant for.",
            rich_help_panel=_PLAN,
        ),
    ] = None
    search_values: Annotated[
        str | None,
        typer.Option(help="What beam and lookahead rank by. Default: --values.", rich_help_panel=ADVANCED),
    ] = None
    weights: Annotated[
        str, typer.Option(help=f"Of weighted votes, of {','.join(WEIGHTS)}.", rich_help_panel=ADVANCED)
    ] = "softmax"
    weight_temperature: Annotated[float, typer.Option(help="Of the weights.", rich_help_panel=ADVANCED)] = 1.0
    shape: Annotated[
        list[str] | None,
        typer.Option(
            help="16=2x8: beam and lookahead of budget 16 have width 2 and 8 expansions. May be repeated. Default: as "
            "square as N allows.",
            rich_help_panel=ADVANCED,
        ),
    ] = None
    uncapped: Annotated[
        bool,
        typer.Option(
            "--uncapped",
            help="Do not cut beam and lookahead at the tokens of the samples; their shape makes budgets alike.",
            rich_help_panel=ADVANCED,
        ),
    ] = False
    lookahead_steps: Annotated[int, typer.Option(help="Steps of a rollout.", rich_help_panel=ADVANCED)] = 1
    lookahead_rollouts: Annotated[int, typer.Option(help="Rollouts of a child.", rich_help_panel=ADVANCED)] = 1

    def plan(self, answered: Sequence[Answered], own: bool, **sampling: Any) -> Plan:
        """The Plan. Raises BadInput or ValueError naming the option.

        Args:
            answered: responses that exist, which change its defaults.
            own: scorers have values of their own, which are the default.
            sampling: further fields.
        """
        strategies: Sequence[str] = [name for name in STRATEGIES if name != "lookahead"]
        budgets: Sequence[int] = (1, 4, 16)
        if answered:
            strategies, budgets = VOTES, _powers(min(len(problem.responses) for problem in answered))
        return Plan(
            strategies=strategies if self.strategies is None else listed(self.strategies),
            budgets=numbers("--budgets", self.budgets) if self.budgets else budgets,
            seeds=(0,) if self.seeds is None else numbers("--seeds", self.seeds),
            values=[OWN if own else "q"] if self.values is None else listed(self.values),
            search_values=None if self.search_values is None else listed(self.search_values),
            weights=listed(self.weights),
            weight_temperature=self.weight_temperature,
            shapes=_shapes(self.shape or []),
            capped=not self.uncapped,
            lookahead_steps=self.lookahead_steps,
            lookahead_rollouts=self.lookahead_rollouts,
            **sampling,
        )


@dataclass(frozen=True, kw_only=True)
class Output(groups.OutFolder):
    """Places of records, report and page."""

    html: Annotated[
        str | None,
        typer.Option(help="A page of the search trees, which are kept in the folder, too.", rich_help_panel=OUTPUT),
    ] = None


@dataclass(frozen=True, kw_only=True)
class Recorded:
    """Draws and scores on disk."""

    record: Annotated[
        str | None, typer.Option(help="Write every draw and score here, for --replay.", rich_help_panel=OUTPUT)
    ] = None
    replay: Annotated[
        str | None,
        typer.Option(
            help="In place of --policy, and of scorers unless named: answer from such a file, without a model.",
            rich_help_panel=MODELS,
        ),
    ] = None


@grouped
def evaluate(
    policy: groups.MaybePolicy,
    pairs: Pairs,
    place: groups.Place,
    problems: Problems,
    labels: groups.Labels,
    compared: Compared,
    steps: groups.Steps,
    draws: groups.Draws,
    workers: Workers,
    recorded: Recorded,
    output: Output,
    common: Common,
) -> None:
    """Compare strategies at equal budgets on problems with known answers."""
    folder = Path(output.out)
    if output.html is not None:
        writable("--html", output.html)
    if output.report_only:
        _report(folder, output.html)
        return
    models = NamedModels(
        policy.policy, pairs.pair or (), pairs.prm, pairs.reference, pairs.beta, place.device, place.dtype, policy,
        pairs.scorers(), recorded.replay,
    )  # fmt: skip
    _check_source(policy, problems, compared, recorded, workers)
    if output.html is not None and problems.responses is not None:
        raise BadInput("--html shows searches: there are none with --responses")
    label, answer = labels.label, labels.answer
    judge = make_judge(label, answer if ":" not in label else None)
    items, answered = problems.read()
    rule = steps.rule(card_delimiters(models.cards, steps.delimiter, steps.step_regex))
    plan = compared.plan(answered, bool(models.scorers), steps=rule, **draws.fields())
    if (plan.ranked or problems.responses is not None) and not models.names:
        raise BadInput(f"a pair is needed for {', '.join(plan.ranked or plan.strategies)}: --pair, --prm or --scorer")
    if answered and compared.budgets is None:
        _say_what_limits(items, answered, plan)
    run = EvalRun(items, answered, plan, judge, answer_of(answer), models, recorded.record)
    card = {**models.about(), "data": problems.data or problems.responses}
    about = {**card, "label": label, "answer": answer, "plan": plan.card()}
    keys = run.keys(models.card(), place.dtype, label, answer, plan.card())
    about_run = {"title": output.title, "expected": len(keys), "about": about}
    failures = _record(run, keys, folder, about_run, output, workers)
    _report(folder, output.html)
    failures.check()


def _record(
    run: EvalRun, keys: Sequence[str], folder: Path, about: dict[str, Any], output: Output, workers: Workers
) -> Failures:
    """Run what is missing, each record on disk before the next one is made. Returns the problems that failed."""
    tell = Tell(run.plan, tree=output.html is not None, draws=run.record is not None)
    with RecordFile(str(folder / RECORDS), keys, resume=output.resume) as file, ExitStack() as stack:
        records = dict(file.done)
        keep = None
        if tell.tree or tell.draws:
            keep = stack.enter_context(
                kept(folder, run.units, keys, tell, run.record, resume=output.resume, more=bool(records))
            )
        bar = Bar("records", len(keys) - len(records))
        failures = Failures(run.items, bar)
        try:
            if len(records) < len(keys):
                flow = run.records_of(workers, dict(records), output.batch, failures, tell, keep)
                with bar:
                    for record in flow:
                        if not records:
                            describe(folder, about)
                        records[record["index"]] = record
                        file.write({"key": keys[record["index"]], **record})
                        bar.tick()
            file.put_in_order()
        finally:
            report(file, len(records), len(keys))
        if failures.places:
            about["about"]["failed"] = failures.names
        describe(folder, about)
    return failures


def _report(folder: Path, html: str | None) -> None:
    """Make the report of a folder from its records, and the page of its trees where one is asked for."""
    about = rebuild(folder)
    if html is not None:
        trees_page(folder, html, about["title"], about["expected"])


def _check_source(
    policy: groups.MaybePolicy, problems: Problems, compared: Compared, recorded: Recorded, workers: Workers
) -> None:
    """Raises BadInput where neither problems nor responses are given, or an option is of the other kind."""
    existing = problems.responses is not None
    sources = [policy.policy is not None, recorded.replay is not None, existing]
    if sum(sources) != 1 or (problems.data is None) != existing:
        raise BadInput("--policy and --data are needed, or --replay and --data, or else --responses")
    if recorded.record is not None:
        writable("--record", recorded.record)
    for option, file in (("record", recorded.record), ("replay", recorded.replay)):
        if file is not None and existing:
            raise BadInput(f"--{option} is of searches: there are none with --responses")
    if recorded.replay is not None and workers.ray is not None:
        raise BadInput("--replay needs no model, and so no workers: leave --ray out")
    of_data = {
        "data-config": problems.data_config, "template": problems.template, "seeds": compared.seeds,
        "search-values": compared.search_values, "shape": compared.shape,
    }  # fmt: skip
    named = next((name for name, value in of_data.items() if value), None)
    if existing and named is not None:
        raise BadInput(f"--{named} is for --data; --responses are taken as they are, and nothing is sampled")


def _say_what_limits(items: Sequence[Item], answered: Sequence[Answered], plan: Plan) -> None:
    """Say which problem has so few responses that budgets others could have are left out."""
    counts = [len(problem.responses) for problem in answered]
    fewest = counts.index(min(counts))
    if _powers(max(counts)) != _powers(counts[fewest]):
        print(
            f"prm-search: budgets go to {plan.most}, since {items[fewest].where} has {counts[fewest]} responses and "
            f"others have up to {max(counts)}; --budgets says otherwise, --limit or a shorter file leaves it out",
            file=sys.stderr,
        )


def _powers(most: int) -> list[int]:
    return [1 << i for i in range(most.bit_length())]


def _shapes(texts: Sequence[str]) -> dict[int, tuple[int, int]]:
    shapes = {}
    for text in texts:
        match = re.fullmatch(r"(\d{1,9})=(\d{1,9})x(\d{1,9})", text.replace(" ", ""))
        if match is None:
            raise BadInput(f"--shape {text!r:.80}: N=WIDTHxEXPANSIONS is needed, such as 16=2x8")
        n, width, expansions = map(int, match.groups())
        shapes[n] = (width, expansions)
    return shapes


def card_delimiters(pairs: Sequence[str], delimiter: object, regex: object) -> str | None:
    """Return what ends a step by the pairs' cards. Raises BadInput where they disagree and no option decides."""
    delimiters = {options.card_delimiter(pair) for pair in pairs} - {None}
    if len(delimiters) > 1 and delimiter is None and regex is None:
        raise BadInput(f"--pair: the cards end steps by {sorted(map(repr, delimiters))}; --delimiter has to say which")
    return next(iter(delimiters)) if len(delimiters) == 1 else None
