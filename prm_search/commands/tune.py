"""``prm-search tune``: which strategy, which budget? Tries, picks, confirms, and writes guidance.yaml."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from ..answers.functions import whole_name
from . import BadInput, groups
from .config import Common
from .eval_run import NamedModels
from .evaluate import Pairs, card_delimiters
from .grouped import grouped
from .options import SAMPLING
from .problems import answer_of, make_judge
from .tried import Tried
from .tune_run import TuneRun
from .workers import Workers


@dataclass(frozen=True, kw_only=True)
class Draws(groups.Draws):
    """Options of how tokens are drawn."""

    seed: Annotated[int, typer.Option(help="Of every draw.", rich_help_panel=SAMPLING)] = 0


@grouped
def tune(
    policy: groups.Policy,
    pairs: Pairs,
    place: groups.Place,
    data: groups.Data,
    labels: groups.Labels,
    tried: Tried,
    steps: groups.Steps,
    draws: Draws,
    workers: Workers,
    output: groups.OutFolder,
    common: Common,
) -> None:
    """Find the strategy for a budget, on problems with known answers, and write it to guidance.yaml."""
    models = NamedModels(
        policy.policy, pairs.pair or (), pairs.prm, pairs.reference, pairs.beta, place.device, place.dtype, policy,
        pairs.scorers(),
    )  # fmt: skip
    if not models.names:
        raise BadInput("a reward model is needed: --pair, --prm or --scorer")
    if tried.budget is not None:
        tried.grid(tried.tokens)
    label, answer = labels.label, labels.answer
    run = TuneRun(
        folder=Path(output.out),
        items=data.problems(data.data),
        tried=tried,
        models=models,
        workers=workers,
        judge=make_judge(label, answer if ":" not in label else None),
        answer=answer_of(answer),
        answer_name=None if answer is None else whole_name(answer),
        rule=steps.rule(card_delimiters(models.cards, steps.delimiter, steps.step_regex)),
        draws=draws.fields(),
        seed=draws.seed,
        settings=[label, answer, tried.budget, tried.budget_seconds, tried.strategies, tried.values, tried.alphas],
        resume=output.resume,
        batch=output.batch,
        title=output.title if output.title != "Evaluation" else "Which strategy, which budget?",
    )
    if output.report_only:
        run.report()
    else:
        run.go()
