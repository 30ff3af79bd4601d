"""``prm-search train``: an implicit PRM from labelled rollouts."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from ..demo import pair_dir
from ..training.recipe import OBJECTIVES, Recipe
from . import BadInput, options
from .records import reason

_OBJECTIVE, _DATA, _OPTIMISER = "Objective", "Data", "Optimiser"


def train(
    model: Annotated[
        str,
        typer.Option(
            help="Checkpoint to begin with, which is the reference too: hub id, folder, or 'demo'.",
            rich_help_panel=options.MODELS,
        ),
    ],
    rollouts: Annotated[str, typer.Option(help="What prm-search rollout wrote.", rich_help_panel=_DATA)],
    out: Annotated[str, typer.Option(help="Folder for the pair.", rich_help_panel=options.OUTPUT)],
    revision: Annotated[str | None, typer.Option(help="Of the hub repository.", rich_help_panel=options.MODELS)] = None,
    objective: Annotated[str, typer.Option(help="ce, dpo, kto, nca or ipvrm.", rich_help_panel=_OBJECTIVE)] = "ce",
    beta: Annotated[
        float | None, typer.Option(help="Scale of the rewards. Default: 0.05, ipvrm: 10.", rich_help_panel=_OBJECTIVE)
    ] = None,
    balanced: Annotated[
        str | None,
        typer.Option(
            help="ce, kto: right and wrong count the same in the dataset, in each instance, or none. Default: ce none, "
            "kto dataset.",
            rich_help_panel=_OBJECTIVE,
        ),
    ] = None,
    margin: Annotated[float, typer.Option(help="ipvrm: of the values.", rich_help_panel=_OBJECTIVE)] = 0.0,
    problems: Annotated[int | None, typer.Option(help="Train on so many problems.", rich_help_panel=_DATA)] = None,
    per_problem: Annotated[
        int | None, typer.Option(help="Train on so many responses a problem.", rich_help_panel=_DATA)
    ] = None,
    negatives: Annotated[
        float,
        typer.Option(help="Responses to other problems, as wrong ones, for each response.", rich_help_panel=_DATA),
    ] = 0.0,
    max_length: Annotated[int, typer.Option(help="Tokens; longer rows are left out.", rich_help_panel=_DATA)] = 8192,
    holdout: Annotated[float, typer.Option(help="Share of the problems to measure on.", rich_help_panel=_DATA)] = 0.05,
    lora: Annotated[
        int | None, typer.Option(help="Rank of a LoRA adapter. Default: all weights.", rich_help_panel=_OPTIMISER)
    ] = None,
    freeze_layers: Annotated[
        int,
        typer.Option(help="Leave the embeddings and so many lowest layers as they are.", rich_help_panel=_OPTIMISER),
    ] = 0,
    pack: Annotated[
        bool,
        typer.Option(
            "--pack",
            help="Compute a problem's responses behind their one prompt, common beginnings once; batches then count "
            "problems. The loss is the same.",
            rich_help_panel=_OPTIMISER,
        ),
    ] = False,
    sampled_reference: Annotated[
        bool,
        typer.Option(
            "--sampled-reference",
            help="--model sampled the rollouts: take its log-probabilities from them, not from a pass of its own.",
            rich_help_panel=_DATA,
        ),
    ] = False,
    learning_rate: Annotated[
        float | None,
        typer.Option("--lr", help="Default: 5e-7, with --lora 1e-4.", rich_help_panel=_OPTIMISER),
    ] = None,
    epochs: Annotated[float, typer.Option(help="Passes over the data.", rich_help_panel=_OPTIMISER)] = 1.0,
    batch: Annotated[int, typer.Option(help="Items of a step, all devices.", rich_help_panel=_OPTIMISER)] = 64,
    micro_batch: Annotated[int, typer.Option(help="Items of a forward on one device.", rich_help_panel=_OPTIMISER)] = 2,
    bf16: Annotated[bool, typer.Option("--bf16", help="bfloat16 autocast.", rich_help_panel=_OPTIMISER)] = False,
    seed: Annotated[int, typer.Option(help="Of order, pairs and negatives.", rich_help_panel=_OPTIMISER)] = 0,
    arguments: Annotated[
        str | None,
        typer.Option(help="A JSON file with more of transformers' TrainingArguments.", rich_help_panel=_OPTIMISER),
    ] = None,
    delimiter: Annotated[
        str | None, typer.Option(help="Of steps, noted in the pair card.", rich_help_panel=options.OUTPUT)
    ] = None,
    save_steps: Annotated[int, typer.Option(help="Steps between checkpoints.", rich_help_panel=options.OUTPUT)] = 200,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the last checkpoint in --out.", rich_help_panel=options.OUTPUT)
    ] = False,
    debug: options.Debug = False,
) -> None:
    """Train an implicit PRM on outcome labels alone."""
    options.one_of("--objective", objective, OBJECTIVES)
    recipe = Recipe(
        objective=objective, beta=beta, balanced=balanced, margin=margin, lora=lora, learning_rate=learning_rate,
        epochs=epochs, batch=batch, micro_batch=micro_batch, max_length=max_length, negatives=negatives,
        problems=problems, per_problem=per_problem, freeze_layers=freeze_layers, pack=pack,
        sampled_reference=sampled_reference,
        holdout=holdout, seed=seed, bf16=bf16, save_steps=save_steps,
    )  # fmt: skip
    more = None if arguments is None else _arguments(arguments)

    from ..training.run import train as run
    from .models import quiet

    quiet()
    card = run(
        str(pair_dir() / "policy") if model == "demo" else model,
        rollouts,
        out,
        recipe,
        revision=revision,
        resume=resume,
        delimiter=None if delimiter is None else options.unescape(delimiter),
        arguments=more,
        log=lambda line: print(line, file=sys.stderr),
    )
    held = card["metrics"]["held_out_pair_accuracy"]
    measured = "nothing was held out to measure on" if held is None else f"held-out pair accuracy {held:.3f}"
    print(f"{out}: trained on {card['data']['items']} items; {measured}", file=sys.stderr)


def _arguments(path: str) -> dict[str, Any]:
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BadInput(f"--arguments {path} cannot be read: {reason(error)}") from error
    if not isinstance(found, dict):
        raise BadInput(f"--arguments {path}: a JSON object is needed, got {type(found).__name__}")
    return found
