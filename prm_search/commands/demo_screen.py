"""The demo's screens: a problem with its plain and its searched answer, the table, where to go next; then the tree."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from ..demo.chains import DELIMITER, Problem, answer, wrong_steps
from ..demo.comparison import SAMPLES, TITLES
from ..driver.result import Result
from ..evaluation import SummaryRow, summarise
from ..tree import Node
from . import render

SENTENCE = "prm_search samples reasoning steps, scores each at the price of encoding it once, and keeps the good ones."
NEXT = (
    (
        "prm-search generate --policy demo --pair demo --prompt '=5a*7b+3c*9?'",
        "your own prompt; --tree shows its search",
    ),
    ("docs/scoring.md", "which reward model do you have?"),
    ("docs/tutorial.md", "train one from right and wrong answers alone"),
    ("docs/search.md", "strategies, steps, budgets, in Python"),
)


class Board:
    """The table, filled while the strategies run."""

    def __init__(self, total: int, console: Console) -> None:
        self.total = total
        self.records: list[Mapping[str, Any]] = []
        self.rows: dict[str, SummaryRow] = {}
        self._live = Live(self.table(), console=console, auto_refresh=console.is_terminal, transient=True)

    @contextmanager
    def shown(self) -> Iterator[None]:
        """Show the table on a terminal while the strategies run. It is gone when they have."""
        if not self._live.console.is_terminal:
            yield
            return
        with self._live:
            yield

    def add(self, record: Mapping[str, Any]) -> None:
        """A record is finished; its strategies have a row when it was their last."""
        self.records.append(record)
        if any(self._finished(name) == self.total and name not in self.rows for name in TITLES):
            lines = {row.cell.strategy: row for row in summarise(self.records).rows}
            self.rows = {name: lines[name] for name in TITLES if self._finished(name) == self.total}
        self._live.update(self.table(), refresh=self._live.console.is_terminal)

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

    def table(self) -> Table:
        """Return a row for each strategy; how far it is, where it still runs."""
        table = Table(
            caption=f"{self.total} held-out problems. Tokens: means. Beam may sample what the {SAMPLES} took.",
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


def show(
    screen: Console,
    problems: Sequence[Problem],
    plain: Mapping[int, Result],
    searched: Mapping[int, Result],
    board: Board,
    saved: Mapping[str, int],
    scores: tuple[float, float] | None = None,
) -> None:
    """Print all that the demo has to show.

    Args:
        screen: where to.
        problems: all.
        plain, searched: greedy's and beam's results by problem.
        board: the finished table.
        saved: tokens that scoring trees once saved; see render.savings.
        scores: see render.tree_view.
    """
    place = interesting(problems, board)
    problem = problems[place]
    screen.print()
    screen.print(Text(f"Problem {place + 1} of {len(problems)}, {_outcome(problem, board.answers(place))}:"))
    columns = Table.grid(padding=(0, 2))
    columns.add_row(Text("the problem", style="dim"), Text(problem.prompt), Text(f"right answer {problem.answer}"))
    for title, result in ((TITLES["greedy"], plain[place]), (TITLES["beam"], searched[place])):
        columns.add_row(Text(title, style="dim"), steps(problem, result.text), _verdict(problem, result.text))
    screen.print(columns)
    screen.print()
    screen.print(board.table())
    screen.print(Text("Beam, all problems: ").append(render.savings(saved)))
    screen.print(Text("Where to go next:", style="bold"))
    ways = Table.grid(padding=(0, 2))
    for way, purpose in NEXT:
        ways.add_row(Text(f"  {way}"), Text(purpose, style="dim"))
    screen.print(ways)
    _show_tree(screen, problem, searched[place], scores)


def interesting(problems: Sequence[Problem], board: Board) -> int:
    """Return the place of the first problem that beam solves and most others do not, if there is one."""

    def wins(place: int) -> int:
        right, chosen = problems[place].answer, board.answers(place)
        beam = chosen.pop("beam")
        return sum(each != right for each in chosen.values()) if beam == right else -1

    return max(range(len(problems)), key=lambda place: (wins(place), -place))


def steps(problem: Problem, text: str) -> Text:
    """Return a response whose wrong steps are red."""
    styled = Text()
    written = text.strip().removesuffix(DELIMITER).split(DELIMITER)
    for place, (step, wrong) in enumerate(zip(written, wrong_steps(problem, text), strict=True)):
        styled.append(DELIMITER if place else "").append(render.visible(step), style="red" if wrong else "")
    return styled


def _verdict(problem: Problem, text: str) -> Text:
    final = answer(text)
    right = final == problem.answer
    return Text(f"{final or 'none'}, {'right' if right else 'wrong'}", style="green" if right else "red")


def _outcome(problem: Problem, chosen: Mapping[str, str | None]) -> str:
    if chosen["beam"] != problem.answer:
        return "which beam does not solve"
    solved = [TITLES[name] for name, each in chosen.items() if each == problem.answer and name != "beam"]
    return f"which beam solves, as do {', '.join(solved)}" if solved else "which beam alone solves"


def _show_tree(screen: Console, problem: Problem, result: Result, scores: tuple[float, float] | None) -> None:
    def note(node: Node) -> Text | None:
        marks = wrong_steps(problem, node.path_text())
        return Text("wrong", style="red") if marks and marks[-1] else None

    screen.print()
    how = "its lowest step reward" if scores is None else "the value that its scorer is meant for"
    screen.print(Text(f"The search of that problem (it ranks a prefix by {how}):"))
    screen.print(render.tree_view(result.tree, result.node, note=note, scores=scores))
    screen.print(
        Text(
            (render.LEGEND if scores is None else render.STEP_LEGEND)
            + " What the task knows and no model was told: 'wrong', a step that does not follow from the one before.",
            style="dim",
        )
    )
