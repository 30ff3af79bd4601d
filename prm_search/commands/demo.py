"""``prm-search demo``: the main job on the shipped pair, or on a real language model."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.text import Text

from .. import __version__
from ..demo.chains import CONSTRUCTED, problems
from ..demo.comparison import EXPANSIONS, LENGTH, SAMPLES, VALUE, WIDTH, compare, figures
from ..driver.result import Result
from ..evaluation import Unit
from ..evaluation.plan import OWN
from . import BadInput, demo_screen, options, render
from .grouped import grouped
from .records import writable


@dataclass(frozen=True, kw_only=True)
class Shown:
    """The task, and where figures go. Raises BadInput for a number out of range."""

    count: Annotated[
        int | None,
        typer.Option("--problems", help="How many; default: 50, with --train 300, with --model smollm2 3."),
    ] = None
    seed: Annotated[int, typer.Option(help="Which problems, and every draw.")] = 0
    json_path: Annotated[str | None, typer.Option("--json", help="Write the figures here; - is standard output.")] = (
        None
    )
    model: Annotated[
        str, typer.Option(help="chains: the shipped pair on its task; smollm2: a real LM, SmolLM2-135M.")
    ] = "chains"
    data: Annotated[
        str | None, typer.Option(help='With smollm2: JSON Lines with "question" and "answer", as GSM8K has them.')
    ] = None

    def __post_init__(self) -> None:
        options.one_of("--model", self.model, ("chains", "smollm2"))
        if self.count is not None:
            options.at_least("--problems", self.count)
        if self.json_path is not None and self.json_path != "-":
            writable("--json", self.json_path)

    def problems(self, default: int) -> int:
        """Return how many problems."""
        return default if self.count is None else self.count


@dataclass(frozen=True, kw_only=True)
class Rewards:
    """Models in place of those that ship. Raises BadInput for options that make no sense together."""

    train: Annotated[
        bool, typer.Option("--train", help="Make policy and PRM from nothing first: minutes, on one core.")
    ] = False
    out: Annotated[
        str | None, typer.Option(help="With --train: folder for them; a stage that is finished there is not repeated.")
    ] = None
    scorer: Annotated[
        str | None,
        typer.Option(help="In place of the pair: a step PRM, outcome model or pair: hub id, folder or JSON."),
    ] = None
    prm_format: Annotated[str | None, typer.Option(help=options.FORMAT_HELP, show_default="auto")] = None

    def __post_init__(self) -> None:
        if self.train and self.out is None:
            raise BadInput("--train needs --out, a folder for the policy and the PRM")
        if self.out is not None and not self.train:
            raise BadInput("--out needs --train")
        options.check_scorer(self.scorer, self.prm_format)
        if self.train and self.scorer is not None:
            raise BadInput("--scorer is in place of the pair that --train makes: give one of them")

    @property
    def named(self) -> tuple[str, str | None] | None:
        """The reward model in place of the pair, and what it is."""
        return None if self.scorer is None else (self.scorer, self.prm_format)


@grouped
def demo(shown: Shown, rewards: Rewards, debug: options.Debug = False) -> None:
    """Show the main job: search by rewards, on a pair that ships. Offline, in seconds."""
    if rewards.train and shown.model != "chains":
        raise BadInput(f"--train makes the models of its own task, not of --model {shown.model}")
    os.environ["HF_HUB_OFFLINE"] = "1"
    screen = render.console(stderr=shown.json_path == "-")
    if shown.model == "smollm2":
        from .smollm2 import run as run_smollm2

        record = run_smollm2(shown.problems(3), shown.seed, shown.data, screen, rewards.named)
    elif shown.data is not None:
        raise BadInput("--data needs --model smollm2: the shipped pair knows its own task only")
    else:
        trained = None if rewards.out is None else make_pair(Path(rewards.out), shown.seed)
        count = shown.problems(50 if trained is None else 300)
        record = run(count, shown.seed, screen, rewards.out, rewards.named)
        if trained is not None:
            record["trained"] = trained
    if shown.json_path == "-":
        print(json.dumps(record, indent=2))
    elif shown.json_path is not None:
        Path(shown.json_path).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def make_pair(out: Path, seed: int) -> dict[str, Any]:
    """Train policy and PRM. Returns what the card says of that. A finished folder is only read."""
    from ..demo import make
    from .models import quiet

    quiet()
    path = out / make.CARD
    if path.is_file():
        card = json.loads(path.read_text(encoding="utf-8"))
        if card.get("seed") != seed:
            raise BadInput(f"--out {out} holds a pair of seed {card.get('seed')}: name another folder, or that seed")
    else:
        out.mkdir(parents=True, exist_ok=True)
        card = make.make(seed, out, log=lambda line: print(line, file=sys.stderr, flush=True))
    return {name: card[name] for name in ("seed", "policy", "rollouts", "prm_recipe")}


def run(
    count: int,
    seed: int,
    screen: Console,
    folder: str | None = None,
    named: tuple[str, str | None] | None = None,
) -> dict[str, Any]:
    """The demo on the pair in a folder, or the shipped one. Returns the figures, as `--json` has them.

    Args:
        count: problems.
        seed: of the problems and every draw.
        screen: where to show it.
        folder: of policy and pair; None for those that ship.
        named: a reward model and what it is, in place of the pair; see models.load_scorer.
    """
    test_problems = problems(count, split="test", seed=seed, length=LENGTH)
    screen.print(Text(demo_screen.SENTENCE, style="bold"))
    screen.print(Text(CONSTRUCTED))
    policy, scorer = _load(screen, folder, named)

    results: dict[str, dict[int, Result]] = {"greedy": {}, "search": {}}

    def keep(unit: Unit, result: Result) -> None:
        if unit.kind in results:
            results[unit.kind][unit.problem] = result

    board = demo_screen.Board(len(test_problems), screen)
    with board.shown():
        for record in compare(test_problems, policy, scorer, seed, on_result=keep):
            board.add(record)
    saved = savings([record for record in board.records if record["kind"] == "search"])
    scores = render.step_range(scorer)
    demo_screen.show(screen, test_problems, results["greedy"], results["search"], board, saved, scores)
    own = {} if named is None else {"scorer": named[0], "format": named[1]}
    return own | {
        "task": CONSTRUCTED,
        "problems": len(test_problems),
        "seed": seed,
        "length": LENGTH,
        "samples": SAMPLES,
        "beam": {"width": WIDTH, "expansions": EXPANSIONS, "value": VALUE if scorer.rewards_tokens else OWN},
        "strategies": {name: figures(row) for name, row in board.rows.items()},
        "beam_scoring": saved,
        "version": __version__,
    }


def savings(searches: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    """Return what scoring trees once saved, from records of searches: sums over them, as `--json` has it."""

    def total(name: str) -> int:
        return sum(record[name] for record in searches)

    return {
        "encoded": total("prm_tokens"),
        "reencoding_every_step": total("rescored_tokens"),
        "reencoding_with_cached_prompt": total("rescored_cached_tokens"),
        "reference": total("reference_tokens"),
    }


def _load(screen: Console, folder: str | None, named: tuple[str, str | None] | None) -> tuple[Any, Any]:
    import torch

    from .models import DEMO, load_pair, load_policy, load_scorer, quiet

    torch.set_num_threads(1)  # the models are tiny: more threads only wait for each other
    with render.waiting(screen, "loading the pair"):
        quiet()
        policy = load_policy(DEMO if folder is None else os.path.join(folder, "policy"), device="cpu")
        if named is not None:
            return policy, load_scorer(*named, device="cpu")
        return policy, load_pair(DEMO if folder is None else folder, None, None, device="cpu")
