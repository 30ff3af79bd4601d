"""``prm-search demo``: the main job on the shipped pair, or on a real language model."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.text import Text

from .. import __version__
from ..demo.chains import CONSTRUCTED, Problem, problems, wrong_steps
from ..driver.result import Result
from ..tree import Node
from . import BadInput, options, render
from .contest import BEAM, BUDGET, EXPANSIONS, LENGTH, SAMPLES, TITLES, WIDTH, Board, Contest
from .records import writable
from .savings import Savings


def demo(
    count: Annotated[
        int | None,
        typer.Option("--problems", help="How many; default: 50, with --model smollm2: 3; --train measures on 300."),
    ] = None,
    seed: Annotated[int, typer.Option(help="Which problems, and every draw.")] = 0,
    json_path: Annotated[
        str | None, typer.Option("--json", help="Write the figures here; - is standard output.")
    ] = None,
    model: Annotated[
        str, typer.Option(help="chains: the shipped pair on its task; smollm2: a real LM, SmolLM2-135M.")
    ] = "chains",
    data: Annotated[
        str | None, typer.Option(help='With smollm2: JSON Lines with "question" and "answer", as GSM8K has them.')
    ] = None,
    train: Annotated[
        bool, typer.Option("--train", help="Make policy and PRM from nothing first: minutes, on one core.")
    ] = False,
    out: Annotated[
        str | None, typer.Option(help="With --train: folder for them; a stage that is finished there is not repeated.")
    ] = None,
    debug: options.Debug = False,
) -> None:
    """Show the main job: search by rewards, on a pair that ships. Offline, in seconds."""
    options.one_of("--model", model, ("chains", "smollm2"))
    if count is not None:
        options.at_least("--problems", count)
    if train and out is None:
        raise BadInput("--train needs --out, a folder for the policy and the PRM")
    if out is not None and not train:
        raise BadInput("--out needs --train")
    if train and model != "chains":
        raise BadInput(f"--train makes the models of its own task, not of --model {model}")
    if json_path is not None and json_path != "-":
        writable("--json", json_path)
    os.environ["HF_HUB_OFFLINE"] = "1"
    screen = render.console(stderr=json_path == "-")
    if model == "smollm2":
        from .smollm2 import run as run_smollm2

        record = run_smollm2(3 if count is None else count, seed, data, screen)
    elif data is not None:
        raise BadInput("--data needs --model smollm2: the shipped pair knows its own task only")
    else:
        figures = None if out is None else make(Path(out), seed, 300 if count is None else count, screen)
        record = run(50 if count is None else count, seed, screen, out)
        if figures is not None:
            record["trained"] = figures
    if json_path == "-":
        print(json.dumps(record, indent=2))
    elif json_path is not None:
        Path(json_path).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def make(out: Path, seed: int, count: int, screen: Console) -> dict[str, Any]:
    """Train policy and PRM, and show the recipe's own table. Returns its figures. A finished folder is only read."""
    from ..demo import recipe
    from .models import quiet

    quiet()
    path = out / recipe.CARD
    if path.is_file():
        card = json.loads(path.read_text(encoding="utf-8"))
        if card.get("seed") != seed:
            raise BadInput(f"--out {out} holds a pair of seed {card.get('seed')}: name another folder, or that seed")
    else:
        out.mkdir(parents=True, exist_ok=True)
        card = recipe.run(seed, out, test_problems=count, log=lambda line: print(line, file=sys.stderr, flush=True))
    screen.print(Text(recipe.table(card)), soft_wrap=True)
    screen.print()
    return {"policy": card["policy"], "rollouts": card["rollouts"], **card["metrics"]}


def run(count: int, seed: int, screen: Console, folder: str | None = None) -> dict[str, Any]:
    """The demo on the pair in a folder, or the shipped one. Returns the figures, as `--json` has them."""
    asked = problems(count, split="test", seed=seed, length=LENGTH)
    screen.print(Text(CONSTRUCTED))
    screen.print(Text(f"A problem: {asked[0].prompt}   its right answer: {''.join(asked[0].steps)}", style="dim"))
    policy, pair = _load(screen, folder)

    with Board(len(asked), screen).shown() as board:
        beams, chosen = Contest(asked, policy, pair, seed, board).run()
    savings = Savings.of(beams)
    _show_tree(asked, beams, chosen, screen)
    screen.print(Text("Beam, all problems: ").append(savings.line()))
    return {
        "task": CONSTRUCTED,
        "problems": len(asked),
        "seed": seed,
        "length": LENGTH,
        "samples": SAMPLES,
        "beam": {"width": WIDTH, "expansions": EXPANSIONS, "value": BEAM.value},
        "budget_tokens": BUDGET,
        "strategies": {name: row.record() for name, row in board.rows.items()},
        "beam_scoring": savings.record(),
        "version": __version__,
    }


def _load(screen: Console, folder: str | None) -> tuple[Any, Any]:
    import torch

    from .models import DEMO, load_pair, load_policy, quiet

    torch.set_num_threads(1)  # the models are tiny: more threads only wait for each other
    with render.waiting(screen, "loading the pair"):
        quiet()
        policy = load_policy(DEMO if folder is None else os.path.join(folder, "policy"), device="cpu")
        pair = load_pair(DEMO if folder is None else folder, None, None, device="cpu")
    return policy, pair


def _show_tree(
    asked: Sequence[Problem], beams: Sequence[Result], chosen: dict[str, list[str | None]], screen: Console
) -> None:
    """One problem's beam search: the first that beam solves and the votes do not, if there is one."""

    def wins(place: int) -> int:
        right = asked[place].answer
        others = sum(chosen[name][place] != right for name in ("greedy", "majority", "weighted", "best_of_n"))
        return others if chosen["beam"][place] == right else -1

    place = max(range(len(asked)), key=lambda i: (wins(i), -i))
    problem, result = asked[place], beams[place]

    def note(node: Node) -> Text | None:
        marks = wrong_steps(problem, node.path_text())
        return Text("wrong", style="red") if marks and marks[-1] else None

    others = [TITLES[name] for name, given in chosen.items() if given[place] == problem.answer and name != "beam"]
    known = f"solves, as do {', '.join(others)}" if others else "alone solves"
    outcome = known if chosen["beam"][place] == problem.answer else "does not solve"
    screen.print()
    which = f"The search of problem {place + 1} of {len(asked)}, which beam {outcome}"
    screen.print(Text(f"{which} (it ranks a prefix by its lowest step reward):"))
    screen.print(render.tree_view(result.tree, result.node, note=note))
    screen.print(
        Text(
            render.LEGEND
            + " What the task knows and no model was told: 'wrong', a step that does not follow from the one before.",
            style="dim",
        )
    )
    said = ", ".join(f"{TITLES[name]} {given[place]}" for name, given in chosen.items())
    screen.print(Text(f"Right answer {problem.answer}; {said}."))
    screen.print()
