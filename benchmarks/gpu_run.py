"""The run of a machine with a GPU, for a few minutes: correctness first, then speed, written line by line.

Each stage is a process of its own with a limit of its own, so none can stop the next; what was written stays. Without a
GPU it is a rehearsal: everything but the launches, at small shapes.

python benchmarks/report.py --suite gpu --minutes 8
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from common import Machine

HERE = Path(__file__).parent
TESTS = HERE.parent / "tests"
Line = dict[str, Any]
Job = Callable[[], Line | list[Line]]


@dataclass(frozen=True)
class Stage:
    """A part of the run.

    Attributes:
        name: in the lines.
        share: of the whole time that it may take; what a stage leaves is the later ones'.
        commands: run beside one another.
    """

    name: str
    share: float
    commands: tuple[tuple[str, ...], ...]


def stages(lines: Path) -> list[Stage]:
    """The stages in order. Both files of tests compile the same kernels, so they run together and share a cache."""
    many = torch.cuda.is_available() and importlib.util.find_spec("xdist") is not None  # else the tests only skip
    workers = ("-n", "6") if many else ()
    pytest = (sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "gpu", *workers)
    tests = tuple((*pytest, str(TESTS / name)) for name in ("test_kernels_numerics.py", "test_gpu_engine.py"))
    tables = {"ops": 0.15, "decoding": 0.15, "scoring": 0.15, "host": 0.05, "searching": 0.15}
    timed = [
        Stage(name, share, ((sys.executable, str(Path(__file__)), name, "--lines", str(lines)),))
        for name, share in tables.items()
    ]
    return [Stage("correctness", 0.35, tests), *timed]


def run(folder: Path, minutes: float, finished: Callable[[list[Line]], object] = lambda lines: None) -> list[Line]:
    """All stages, in at most so many minutes.

    Args:
        folder: lines.jsonl goes there, a line for each stage and for each measurement.
        minutes: after them nothing runs any more.
        finished: called with all lines after each stage.

    Returns:
        the lines.
    """
    path, begin = folder / "lines.jsonl", time.monotonic()
    path.write_text("")
    whole = 60 * minutes
    spare = 0.0
    for stage in stages(path):
        limit = min(stage.share * whole + spare, whole - (time.monotonic() - begin))
        started = time.monotonic()
        ends = _together(stage, limit, folder)
        took = time.monotonic() - started
        spare = max(0.0, limit - took)
        append(path, {"stage": stage.name, "seconds": round(took, 1), "limit": round(limit, 1), "ends": ends})
        finished(read(path))
    return read(path)


def _together(stage: Stage, limit: float, folder: Path) -> list[Line]:
    """Run a stage's commands beside one another; those that are not done at the limit are killed."""
    if limit < 1:
        return [{"skipped": "no time was left"}]
    end, started = time.monotonic() + limit, []
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    environment["PRM_SEARCH_UNTIL"] = str(time.time() + limit)
    for number, command in enumerate(stage.commands):
        log = folder / f"{stage.name}{number or ''}.log"
        with log.open("w") as out:
            process = subprocess.Popen(
                command, stdout=out, stderr=subprocess.STDOUT, env=environment, cwd=HERE.parent, start_new_session=True
            )
        started.append((process, log))
    ends: list[Line] = []
    for process, log in started:
        try:
            code: int | None = process.wait(timeout=max(0.1, end - time.monotonic()))
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, 9)  # its workers too
            process.wait()
            code = None
        last = [line for line in log.read_text(errors="replace").splitlines() if line.strip()][-3:]
        ends.append({"code": code, "log": log.name, "last": last})
    return ends


# --- the measurements, each table in a process of its own -----------------------------------------------------------


@dataclass(frozen=True)
class Sizes:
    """Measurements of one kind of machine.

    Attributes:
        shapes: of the models; see common.SHAPES.
        quick: whether ops take their smallest shapes.
        repeats: of an op.
        decoding: (context, rows, families) of each line, and the tokens that each decodes.
        scoring: (prompt, beams, length), and the numbers of steps.
        host: rows of each line, tokens, and pairs.
        searching: (prompts, prompt, new tokens, tokens of a step, n).
    """

    shapes: tuple[str, ...]
    quick: bool
    repeats: int
    decoding: tuple[tuple[tuple[int, int, int], ...], int]
    scoring: tuple[tuple[int, int, int], tuple[int, ...]]
    host: tuple[tuple[int, ...], int, int]
    searching: tuple[int, int, int, int, int]


SIZES = {
    "cuda": Sizes(
        ("1.5b", "7b"), False, 20, (((550, 16, 4), (550, 64, 16), (4096, 64, 1)), 24), ((512, 16, 64), (5, 20)),
        ((16, 64, 256), 64, 3), (1, 512, 256, 64, 16),
    ),
    "cpu": Sizes(
        ("small",), True, 1, (((80, 8, 2), (80, 4, 1)), 2), ((60, 4, 8), (2,)), ((8,), 4, 1), (1, 40, 16, 8, 8)
    ),
}  # fmt: skip
# What a search costs beside plain sampling of as many rows; then the other ways to search; then what they replace.
SEARCHES = (("plain", "beam/shared"), ("best_of", "beam/separate"), ("beam/full_text",))


def jobs(table: str, machine: Machine) -> Iterator[Job]:
    """The measurements of a table, those that answer most first; small ones where there is no GPU."""
    sizes = SIZES[machine.device]
    if table == "ops":
        import attending
        import cases
        import heads

        for case in itertools.chain(heads.cases(machine, sizes.quick), attending.cases(machine, sizes.quick)):
            yield partial(cases.measure, case, machine, sizes.repeats)
    elif table == "decoding":
        import decoding

        lines, tokens = sizes.decoding
        for line, shape in itertools.product(lines, sizes.shapes):
            yield partial(decoding.compare, machine, shape, *line, tokens=tokens, repeats=1)
    elif table == "scoring":
        import scoring

        size, counts = sizes.scoring
        for shape, steps in itertools.product(sizes.shapes, counts):
            yield partial(scoring.compare, machine, shape, *size, steps, 1, ["dynamic_cache"])
    elif table == "host":
        import host

        torch.set_num_threads(1)  # process time is of all threads
        every_rows, tokens, pairs = sizes.host
        for rows in every_rows:
            yield partial(host.compare, rows, 128, tokens, pairs)
    else:
        import searching

        for ways, shape in itertools.product(SEARCHES, sizes.shapes):
            yield partial(searching.measure, machine, shape, *sizes.searching, repeats=1, only=ways)


def measure(table: str, path: Path) -> None:
    """Append a table's lines. One that fails is a line with the reason; when the time is up the rest are not begun."""
    machine, until = Machine.here(), float(os.environ.get("PRM_SEARCH_UNTIL", "inf"))
    for job in jobs(table, machine):
        if time.time() > until:
            append(path, {"table": table, "skipped": "no time was left"})
            return
        begin = time.perf_counter()
        try:
            made = job()
        except Exception as problem:
            append(path, {"table": table, "failed": f"{type(problem).__name__}: {problem}"[:400]})
            continue
        took = round(time.perf_counter() - begin, 1)
        for line in made if isinstance(made, list) else [made]:
            append(path, {"table": table, "took": took, "line": line})
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def append(path: Path, line: Line) -> None:
    """Write a line, at once."""
    with path.open("a") as out:
        out.write(json.dumps(line) + "\n")


def read(path: Path) -> list[Line]:
    """The lines; one that a killed process left half written is left out."""
    lines = []
    for text in path.read_text().splitlines():
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            continue
    return lines


def tables(lines: Iterable[Line]) -> dict[str, list[Line]]:
    """The measurements by table, for the report."""
    found: dict[str, list[Line]] = {}
    for line in lines:
        if "line" in line:
            found.setdefault(line["table"], []).append(line["line"])
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", choices=["ops", "decoding", "scoring", "host", "searching"])
    parser.add_argument("--lines", type=Path, required=True)
    given = parser.parse_args()
    measure(given.table, given.lines)
