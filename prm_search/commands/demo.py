"""``prm-search demo``: the main job on the shipped pair, or on a real language model."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from .. import __version__
from ..demo.chains import CONSTRUCTED, Problem, problems, wrong_steps
from ..demo.comparison import EXPANSIONS, LENGTH, SAMPLES, TITLES, VALUE, WIDTH, compare, figures
from ..driver.result import Result
from ..evaluation import SummaryRow, Unit, summarise
from ..tree import Node
from . import BadInput, options, render
from .records import writable


def demo(
    count: Annotated[
        int | None,
        typer.Option("--problems", help="How many; default: 50, with --train 300, with --model smollm2 3."),
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
        trained = None if out is None else make_pair(Path(out), seed)
        default = 50 if trained is None else 300
        record = run(default if count is None else count, seed, screen, out)
        if trained is not None:
            record["trained"] = trained
    if json_path == "-":
        print(json.dumps(record, indent=2))
    elif json_path is not None:
        Path(json_path).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


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


def run(count: int, seed: int, screen: Console, folder: str | None = None) -> dict[str, Any]:
    """The demo on the pair in a folder, or the shipped one. Returns the figures, as `--json` has them."""
    test_problems = problems(count, split="test", seed=seed, length=LENGTH)
    screen.print(Text(CONSTRUCTED))
    screen.print(
        Text(f"A problem: {test_problems[0].prompt}   its right answer: {''.join(test_problems[0].steps)}", style="dim")
    )
    policy, pair = _load(screen, folder)

    beams: dict[int, Result] = {}

    def keep(unit: Unit, result: Result) -> None:
        if unit.kind == "search":
            beams[unit.problem] = result

    board = Board(len(test_problems), screen)
    with board.shown():
        for record in compare(test_problems, policy, pair, seed, on_result=keep):
            board.add(record)
    _show_tree(test_problems, beams, board, screen)
    saved = savings([record for record in board.records if record["kind"] == "search"])
    screen.print(Text("Beam, all problems: ").append(render.savings(saved)))
    return {
        "task": CONSTRUCTED,
        "problems": len(test_problems),
        "seed": seed,
        "length": LENGTH,
        "samples": SAMPLES,
        "beam": {"width": WIDTH, "expansions": EXPANSIONS, "value": VALUE},
        "strategies": {name: figures(row) for name, row in board.rows.items()},
        "beam_scoring": saved,
        "version": __version__,
    }


class Board:
    """The table, filled while the strategies run."""

    def __init__(self, total: int, console: Console) -> None:
        self.total = total
        self.records: list[Mapping[str, Any]] = []
        self.rows: dict[str, SummaryRow] = {}
        self._live = Live(self._table(), console=console, auto_refresh=console.is_terminal)

    @contextmanager
    def shown(self) -> Iterator[None]:
        """Live on a terminal; elsewhere the final table is printed, once, at the end."""
        with self._live:
            yield

    def add(self, record: Mapping[str, Any]) -> None:
        """A record is finished; its strategies have a row when it was their last."""
        self.records.append(record)
        if any(self._finished(name) == self.total and name not in self.rows for name in TITLES):
            lines = {row.cell.strategy: row for row in summarise(self.records).rows}
            self.rows = {name: lines[name] for name in TITLES if self._finished(name) == self.total}
        self._live.update(self._table(), refresh=self._live.console.is_terminal)

    def answers(self, problem: int) -> dict[str, str | None]:
        """Return what each strategy answered to a problem."""
        chosen: dict[str, str | None] = {}
        for record in self.records:
            if record["problem"] == problem:
                for choice in record.get("chosen", [record]):
                    chosen[choice["strategy"]] = choice["answer"]
        return {name: chosen[name] for name in TITLES}

    def _finished(self, name: str) -> int:
        """Problems that are done under a strategy."""
        if name in ("greedy", "beam"):
            return sum(record.get("strategy") == name for record in self.records)
        return sum(record["kind"] == "samples" for record in self.records)

    def _table(self) -> Table:
        table = Table(
            caption=f"{self.total} held-out problems. Tokens: mean of a problem; the beam samples at most what the "
            f"{SAMPLES} answers took.",
            caption_justify="left",
        )
        table.add_column("strategy")
        for title in ("right", "95 % interval", "policy tokens", "PRM tokens", "ref. tokens", "seconds"):
            table.add_column(title, justify="right")
        best = max((row.accuracy for row in self.rows.values()), default=0.0)
        for name, title in TITLES.items():
            row = self.rows.get(name)
            if row is None:
                done = self._finished(name)
                table.add_row(title, f"{done}/{self.total}" if done else "", style="dim")
                continue
            table.add_row(
                title,
                f"{row.accuracy:.3f}",
                f"[{row.low:.3f}, {row.high:.3f}]",
                f"{row.policy_tokens:.1f}",
                f"{row.prm_tokens:.1f}",
                f"{row.reference_tokens:.1f}",
                f"{row.seconds:.1f}",
                style="bold green" if row.accuracy == best else None,
            )
        return table


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


def _load(screen: Console, folder: str | None) -> tuple[Any, Any]:
    import torch

    from .models import DEMO, load_pair, load_policy, quiet

    torch.set_num_threads(1)  # the models are tiny: more threads only wait for each other
    with render.waiting(screen, "loading the pair"):
        quiet()
        policy = load_policy(DEMO if folder is None else os.path.join(folder, "policy"), device="cpu")
        pair = load_pair(DEMO if folder is None else folder, None, None, device="cpu")
    return policy, pair


def _show_tree(test_problems: Sequence[Problem], beams: Mapping[int, Result], board: Board, screen: Console) -> None:
    """One problem's beam search: the first that beam solves and the votes do not, if there is one."""

    def wins(place: int) -> int:
        right, chosen = test_problems[place].answer, board.answers(place)
        beam = chosen.pop("beam")
        return sum(answer != right for answer in chosen.values()) if beam == right else -1

    place = max(range(len(test_problems)), key=lambda i: (wins(i), -i))
    problem, result, chosen = test_problems[place], beams[place], board.answers(place)

    def note(node: Node) -> Text | None:
        marks = wrong_steps(problem, node.path_text())
        return Text("wrong", style="red") if marks and marks[-1] else None

    solved = [TITLES[name] for name, answer in chosen.items() if answer == problem.answer and name != "beam"]
    known = f"solves, as do {', '.join(solved)}" if solved else "alone solves"
    outcome = known if chosen["beam"] == problem.answer else "does not solve"
    screen.print()
    which = f"The search of problem {place + 1} of {len(test_problems)}, which beam {outcome}"
    screen.print(Text(f"{which} (it ranks a prefix by its lowest step reward):"))
    screen.print(render.tree_view(result.tree, result.node, note=note))
    screen.print(
        Text(
            render.LEGEND
            + " What the task knows and no model was told: 'wrong', a step that does not follow from the one before.",
            style="dim",
        )
    )
    answers = ", ".join(f"{TITLES[name]} {answer}" for name, answer in chosen.items())
    screen.print(Text(f"Right answer {problem.answer}; {answers}."))
    screen.print()
