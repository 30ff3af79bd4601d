"""The driver's own work for every strategy: what it does for a draw does not grow with the search."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType, ModuleType
from typing import Any

import pytest

from prm_search.strategies import Expand

SMALL, LARGE = 160, 640  # draws, about
FOLDERS = (f"{Path('prm_search', 'strategies')}", f"{Path('prm_search', 'driver')}")


def driving_module() -> ModuleType:
    """benchmarks/driving.py, which needs no sibling."""
    path = Path(__file__).parent.parent / "benchmarks" / "driving.py"
    spec = importlib.util.spec_from_file_location("driving", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["driving"] = module
    spec.loader.exec_module(module)
    return module


driving = driving_module()


class Lines:
    """Counts the lines of strategies and driver that are run, each turn of a loop again."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, work: Callable[[], Any]) -> Any:
        def line(frame: FrameType, event: str, argument: object) -> Any:
            self.count += event == "line"
            return line

        def call(frame: FrameType, event: str, argument: object) -> Any:
            return line if any(folder in frame.f_code.co_filename for folder in FOLDERS) else None

        before = sys.gettrace()
        sys.settrace(call)
        try:
            return work()
        finally:
            sys.settrace(before)


def lines_a_draw(name: str, draws: int) -> float:
    lines = Lines()
    run = driving.drive(driving.SIZED[name](draws), 1, distinct=name.startswith("adaptive"), around=lines)
    return lines.count / run.draws


@pytest.mark.parametrize("name", sorted(driving.SIZED))
def test_what_a_draw_takes_does_not_grow_with_the_search(name: str) -> None:
    small, large = lines_a_draw(name, SMALL), lines_a_draw(name, LARGE)
    assert large < 1.7 * small + 20, f"{small:.0f} lines a draw at {SMALL} draws, {large:.0f} at {LARGE}"


def test_a_thousand_simulations_take_a_few_hundred_lines_each() -> None:
    lines = Lines()
    run = driving.drive(driving.MCTS(1000), 1, around=lines)
    assert run.draws >= 3000
    assert lines.count / run.draws < 250


WALK = """
def walk(nodes):
    for node in nodes:
        node.finished
"""


def test_a_walk_over_everything_at_each_draw_would_be_seen() -> None:
    space: dict[str, Any] = {}
    exec(compile(WALK, str(Path("prm_search", "strategies", "walk.py")), "exec"), space)

    class Walking(driving.BestOfN):
        def run(self, root: Any) -> Any:
            ends: list[Any] = []
            for _ in range(self.n):
                ends += yield Expand([root], 1, until="end")
                space["walk"](ends)
            return ends

    def measure(n: int) -> float:
        lines = Lines()
        run = driving.drive(Walking(n), 1, around=lines)
        return lines.count / run.draws

    assert measure(LARGE) > 1.7 * measure(SMALL) + 20


def test_many_prompts_take_no_more_for_a_draw_than_few() -> None:
    def measure(prompts: int) -> float:
        lines = Lines()
        run = driving.drive(driving.Beam(4, 4), prompts, around=lines)
        return lines.count / run.draws

    assert measure(120) < 1.1 * measure(10) + 2
