"""``prm-search train``: an implicit PRM from labelled rollouts."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..files import parse_json
from ..models.placement import DEMO, shipped
from ..training.recipe import OBJECTIVES, Recipe
from . import BadInput, options
from .config import Common
from .grouped import grouped
from .options import ADVANCED, DATA, MODELS, OUTPUT
from .progress import Bar
from .records import reason

if TYPE_CHECKING:
    from ..training.self_training import SelfTraining

_OBJECTIVE, _OPTIMISER, _SELF = "Objective", "Optimiser", "Self-training"


@dataclass(frozen=True, kw_only=True)
class Begin:
    """The start of training."""

    model: Annotated[
        str,
        typer.Option(
            help="Checkpoint to begin with, which is the reference too: hub id, folder, or 'demo'.",
            rich_help_panel=MODELS,
        ),
    ]
    revision: Annotated[str | None, typer.Option(help="Of the hub repository.", rich_help_panel=ADVANCED)] = None
    rollouts: Annotated[str, typer.Option(help="What prm-search rollout wrote.", rich_help_panel=DATA)]

    @property
    def path(self) -> str:
        """The checkpoint."""
        return str(shipped() / "policy") if self.model == DEMO else self.model


@dataclass(frozen=True, kw_only=True)
class RecipeOptions:
    """The fields of training.Recipe, each by its name."""

    objective: Annotated[str, typer.Option(help="ce, dpo, kto, nca or ipvrm.", rich_help_panel=_OBJECTIVE)] = "ce"
    beta: Annotated[
        float | None, typer.Option(help="Scale of the rewards. Default: 0.05, ipvrm: 10.", rich_help_panel=_OBJECTIVE)
    ] = None
    balanced: Annotated[
        str | None,
        typer.Option(
            help="ce, kto: right and wrong count the same in the dataset, in each instance, or none. Default: ce none, "
            "kto dataset.",
            rich_help_panel=ADVANCED,
        ),
    ] = None
    margin: Annotated[float, typer.Option(help="ipvrm: of the values.", rich_help_panel=ADVANCED)] = 0.0
    problems: Annotated[int | None, typer.Option(help="Train on so many problems.", rich_help_panel=DATA)] = None
    per_problem: Annotated[
        int | None, typer.Option(help="Train on so many responses a problem.", rich_help_panel=DATA)
    ] = None
    negatives: Annotated[
        float,
        typer.Option(help="Responses to other problems, as wrong ones, for each response.", rich_help_panel=ADVANCED),
    ] = 0.0
    max_length: Annotated[int, typer.Option(help="Tokens; longer rows are left out.", rich_help_panel=ADVANCED)] = 8192
    holdout: Annotated[float, typer.Option(help="Share of the problems to measure on.", rich_help_panel=DATA)] = 0.05
    lora: Annotated[
        int | None, typer.Option(help="Rank of a LoRA adapter. Default: all weights.", rich_help_panel=_OPTIMISER)
    ] = None
    freeze_layers: Annotated[
        int, typer.Option(help="Leave the embeddings and so many lowest layers as they are.", rich_help_panel=ADVANCED)
    ] = 0
    pack: Annotated[
        bool,
        typer.Option(
            "--pack",
            help="Compute a problem's responses behind their one prompt, common beginnings once; batches then count "
            "problems. The loss is the same.",
            rich_help_panel=_OPTIMISER,
        ),
    ] = False
    sampled_reference: Annotated[
        bool,
        typer.Option(
            "--sampled-reference",
            help="--model sampled the rollouts: take its log-probabilities from them, not from a pass of its own.",
            rich_help_panel=ADVANCED,
        ),
    ] = False
    learning_rate: Annotated[
        float | None,
        typer.Option("--lr", help="Default: 5e-7, with --lora 1e-4.", rich_help_panel=_OPTIMISER),
    ] = None
    epochs: Annotated[float, typer.Option(help="Passes over the data.", rich_help_panel=_OPTIMISER)] = 1.0
    batch: Annotated[int, typer.Option(help="Items of a step, all devices.", rich_help_panel=_OPTIMISER)] = 64
    micro_batch: Annotated[int, typer.Option(help="Items of a forward on one device.", rich_help_panel=_OPTIMISER)] = 2
    bf16: Annotated[bool, typer.Option("--bf16", help="bfloat16 autocast.", rich_help_panel=_OPTIMISER)] = False
    seed: Annotated[int, typer.Option(help="Of order, pairs and negatives.", rich_help_panel=_OPTIMISER)] = 0
    save_steps: Annotated[int, typer.Option(help="Steps between checkpoints.", rich_help_panel=ADVANCED)] = 200

    def recipe(self) -> Recipe:
        """The Recipe. Raises ValueError as it does."""
        options.one_of("--objective", self.objective, OBJECTIVES)
        with options.named({"learning_rate": "--lr"}):
            return Recipe(**asdict(self))


@dataclass(frozen=True, kw_only=True)
class Unlabelled:
    """Responses without labels, for self-training."""

    unlabelled: Annotated[
        str | None,
        typer.Option(help="Rollouts to learn from without their labels, in rounds.", rich_help_panel=_SELF),
    ] = None
    rounds: Annotated[int | None, typer.Option(help="At most. Default: 3.", rich_help_panel=_SELF)] = None
    confidence: Annotated[
        str | None,
        typer.Option(
            metavar="LOW,HIGH",
            help="Probabilities of being right at which a response counts as wrong, and as right. Default: 0.1,0.9.",
            rich_help_panel=_SELF,
        ),
    ] = None

    def settings(self) -> SelfTraining | None:
        """Settings of self-training; None without unlabelled responses. Raises BadInput."""
        if self.unlabelled is None:
            for option, value in (("--rounds", self.rounds), ("--confidence", self.confidence)):
                if value is not None:
                    raise BadInput(f"{option} is of self-training: --unlabelled names the responses")
            return None
        from ..training.self_training import SelfTraining

        given: dict[str, Any] = {} if self.rounds is None else {"rounds": self.rounds}
        if self.confidence is not None:
            given["confidence"] = _two_numbers("--confidence", self.confidence)
        return SelfTraining(**given)


def _two_numbers(option: str, text: str) -> tuple[float, float]:
    parts = text.split(",")
    try:
        low, high = map(float, parts)
    except ValueError as error:
        raise BadInput(f"{option} {text}: two numbers with a comma between them are needed, such as 0.1,0.9") from error
    return low, high


@dataclass(frozen=True, kw_only=True)
class Result:
    """The result of training."""

    out: Annotated[str, typer.Option(help="Folder for the pair.", rich_help_panel=OUTPUT)]
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the last checkpoint in --out.", rich_help_panel=OUTPUT)
    ] = False
    delimiter: Annotated[str | None, typer.Option(help="Of steps, noted in the pair card.", rich_help_panel=OUTPUT)] = (
        None
    )
    arguments: Annotated[
        str | None,
        typer.Option(
            help="More of transformers' TrainingArguments: a JSON file, or a JSON object.", rich_help_panel=ADVANCED
        ),
    ] = None


@grouped
def train(begin: Begin, recipe: RecipeOptions, unlabelled: Unlabelled, result: Result, common: Common) -> None:
    """Train an implicit PRM on outcome labels alone."""
    chosen, rounds = recipe.recipe(), unlabelled.settings()
    how: dict[str, Any] = {
        "revision": begin.revision,
        "resume": result.resume,
        "delimiter": None if result.delimiter is None else options.unescape(result.delimiter),
        "arguments": None if result.arguments is None else _arguments(result.arguments),
    }

    from ..training.run import train as run
    from .models import quiet

    quiet()
    try:
        with Bar("loading", 1) as bar:
            how |= {"log": bar.say, "progress": bar.at}
            if rounds is None:
                card = run(begin.path, begin.rollouts, result.out, chosen, **how)
            else:
                from ..training.self_training import self_train

                source = str(unlabelled.unlabelled)
                card = self_train(begin.path, begin.rollouts, source, result.out, chosen, rounds, **how)
    except KeyboardInterrupt:
        print(_kept(Path(result.out), recipe.save_steps), file=sys.stderr)
        raise
    print(f"{result.out}: trained on {card['data']['items']} items{_measured(card)}", file=sys.stderr)


def _measured(card: Mapping[str, Any]) -> str:
    """Return the figures on held-out problems, with the number of pairs that they rest on; "" where there are none."""
    if "self_training" in card:
        rounds, best = card["self_training"]["rounds"], card["self_training"]["best"]
        accuracies = ", ".join(f"{figures['accuracy']:.3f}" for figures in rounds)
        return f" in round {best} of {len(rounds) - 1}; held-out pair accuracy by round {accuracies}"
    metrics = card["metrics"]
    pairs = metrics["held_out_pairs"]
    return f"; held-out pair accuracy {metrics['held_out_pair_accuracy']:.3f} of {pairs} pairs" if pairs else ""


def _kept(out: Path, every: int) -> str:
    """Return what is left of an interrupted run."""
    steps = [int(state.parent.name.rpartition("-")[2]) for state in out.glob("*/checkpoint-*/trainer_state.json")]
    if not steps:
        return f"{out}: no checkpoint yet; there is one every {every} steps (--save-steps)"
    return f"{out}: --resume goes on from step {max(steps)}"


def _arguments(source: str) -> dict[str, Any]:
    """TrainingArguments of a JSON file, or of the JSON object itself. Raises BadInput for anything else."""
    where = "--arguments" if source.lstrip().startswith("{") else f"--arguments {source}"
    try:
        text = source if where == "--arguments" else Path(source).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"{where} cannot be read: {reason(error)}") from error
    arguments = parse_json(text, where)
    if not isinstance(arguments, dict):
        raise BadInput(f"{where}: a JSON object is needed, got {type(arguments).__name__}")
    return arguments
