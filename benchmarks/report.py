"""One report of every benchmark: JSON, Markdown and (with matplotlib) a plot, under benchmarks/results/<device>/.

python benchmarks/report.py                       # everything that this machine is meant for
python benchmarks/report.py --suite kernels,engine --quick
python benchmarks/report.py --suite gpu --minutes 8
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import best_of
import decoding
import gpu_run
import host
import ops
import scoring
import searching
import steering
import step_prms
import torch
from common import Ceilings, Machine
from render import markdown, plot


def run_scoring(machine: Machine, quick: bool) -> list[dict[str, Any]]:
    """S swept, because the rivals that re-encode grow with it."""
    every = list(scoring.RIVALS)
    if machine.device == "cuda":
        lines = [("0.5b", 512, 16, 64, s, every, 3) for s in (5, 20, 50)]
        lines += [("1.5b", 512, 16, 64, s, every, 3) for s in (5, 20, 50)]
        lines += [("7b", 512, 16, 64, s, every, 3 if s < 50 else 1) for s in (5, 20, 50)]
        lines += [("7b", 512, 256, 64, 20, [], 3)]  # does it fit?
    else:  # the rivals' hours are why long searches take fewer rounds
        lines = [("small", 150, 8, 50, s, every, rounds) for s, rounds in ((5, 3), (10, 3), (20, 2), (40, 1))]
        lines += [("smollm2", 150, 4, 16, s, every, 1) for s in (5, 10)]
    if quick:
        lines = [("small", 100, 8, 20, 3, every, 1)]
    return [
        scoring.compare(machine, shape, prompt, beams, length, steps, rounds, methods)
        for shape, prompt, beams, length, steps, methods, rounds in progress("scoring", lines)
    ]


def run_decoding(machine: Machine, quick: bool) -> list[dict[str, Any]]:
    """Equal rows: four siblings a parent, as a beam search decodes, and the worst case of no sibling at all."""
    shapes = ["1.5b", "7b"] if machine.device == "cuda" else ["small", "smollm2"]
    lines = [(shape, 550, rows, families) for shape in shapes for rows, families in ((16, 4), (16, 16), (64, 16))]
    if machine.device == "cpu":
        lines.remove(("smollm2", 550, 64, 16))
    if quick:
        lines = [("small", 150, 16, 4)]
    return [
        decoding.compare(machine, shape, context, rows, families, tokens=24, repeats=1 if quick else 3)
        for shape, context, rows, families in progress("decoding", lines)
    ]


def run_steering(machine: Machine, quick: bool) -> list[dict[str, Any]]:
    """A token at a time, through two models."""
    shapes = ["1.5b", "7b"] if machine.device == "cuda" else ["small", "smollm2"]
    lines = [("small", 60, 16, 4)] if quick else [(shape, 512, 16, 16) for shape in shapes]
    return [
        steering.compare(machine, shape, prompt, rows, tokens, repeats=1 if quick else 3)
        for shape, prompt, rows, tokens in progress("steering", lines)
    ]


def run_memory(machine: Machine, quick: bool) -> list[dict[str, Any]]:
    """Counts: the capacities that the sharing of a tree decides. They take no time and no GPU."""
    lines = [("7b", 512, 16, 64, 10), ("7b", 1024, 64, 100, 20), ("7b", 512, 256, 64, 20), ("1.5b", 512, 256, 64, 20)]
    return [scoring.held(*line) for line in lines]


def run_searching(machine: Machine, quick: bool) -> list[dict[str, Any]]:
    """`generate` plain and searched for."""
    if machine.device == "cuda":
        lines = [("1.5b", 1, 512, 640, 64, 16), ("7b", 1, 512, 640, 64, 16)]
    else:
        lines = [("small", 2, 150, 200, 25, 16), ("smollm2", 1, 150, 75, 25, 8)]
    if quick:
        lines = [("small", 1, 60, 30, 15, 8)]
    found = []
    for shape, prompts, prompt, new, step, n in progress("searching", lines):
        rounds = 1 if quick or (machine.device, shape) == ("cpu", "smollm2") else 3
        found += searching.measure(machine, shape, prompts, prompt, new, step, n, repeats=rounds)
    return found


def run_best_of(machine: Machine, quick: bool) -> list[dict[str, Any]]:
    """No scorer: what a search costs beyond sampling; one thread on a CPU, whose process time is compared."""
    shape, pairs = ("1.5b", 3) if machine.device == "cuda" else ("small", 9)
    lines = [("small", 16, 8, 4, 1)] if quick else [(shape, 64, tokens, 8, pairs) for tokens in (80, 160)]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return [best_of.compare(machine, *line) for line in progress("best_of", lines)]
    finally:
        torch.set_num_threads(threads)


def run_step_prms(machine: Machine, quick: bool) -> list[dict[str, Any]]:
    """S swept, because re-encoding grows with it."""
    shape, prompt, length = ("1.5b", 512, 64) if machine.device == "cuda" else ("small", 150, 25)
    lines = [(shape, prompt, length, steps, rounds) for steps, rounds in ((5, 3), (10, 3), (20, 3), (40, 1))]
    if quick:
        lines = [("small", 30, 8, 3, 1)]
    return [step_prms.compare(machine, *line) for line in progress("step_prms", lines)]


def run_host(machine: Machine, quick: bool) -> list[dict[str, Any]]:
    """The decode loop's share of the host, on one thread; the last line's vocabulary makes the draw the most of it."""
    lines = [(16, 128, 16, 1)] if quick else [(rows, 128, 64, 7) for rows in (16, 64, 256)] + [(64, 32000, 64, 3)]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return [host.compare(*line) for line in progress("host", lines)]
    finally:
        torch.set_num_threads(threads)


def run_ops(machine: Machine, quick: bool) -> list[dict[str, Any]]:
    """Every op alone."""
    print("ops: every op at every shape", file=sys.stderr, flush=True)
    return ops.lines(machine, quick)


def run_vllm_searching(machine: Machine, quick: bool) -> list[dict[str, Any]]:
    """S swept, because what vLLM does by itself grows with it."""
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    import vllm_searching

    shape = "1.5b" if machine.device == "cuda" else "small"
    given = (
        (shape, 512, 4, 4, 64, (5, 10, 20), 3) if machine.device == "cuda" else (shape, 150, 2, 4, 16, (4, 8, 16), 2)
    )
    if quick:
        given = ("small", 60, 2, 2, 8, (2, 4), 1)
    print(f"vllm_searching: {given}", file=sys.stderr, flush=True)
    return vllm_searching.compare(machine, *given)


def run_vllm_steering(machine: Machine, quick: bool) -> list[dict[str, Any]]:
    """One engine, four ways in turn, a token at a time."""
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    import vllm_steering

    given = ("1.5b", 512, (1, 8, 32), 64, 3) if machine.device == "cuda" else ("small", 64, (1, 8, 32), 16, 3)
    if quick:
        given = ("small", 16, (1, 4), 4, 1)
    print(f"vllm_steering: {given}", file=sys.stderr, flush=True)
    return vllm_steering.compare(machine, *given)


Table = Callable[[Machine, bool], list[dict[str, Any]]]
SUITES: dict[str, dict[str, Table]] = {
    "host": {"host": run_host},
    "kernels": {"ops": run_ops},
    "engine": {"scoring": run_scoring, "decoding": run_decoding, "steering": run_steering, "memory": run_memory},
    "search": {"searching": run_searching, "best_of": run_best_of},
    "step-prms": {"step_prms": run_step_prms},
    "vllm": {"vllm_searching": run_vllm_searching},
    "vllm-steering": {"vllm_steering": run_vllm_steering},
}
BY_DEFAULT = [suite for suite in SUITES if not suite.startswith("vllm")]  # which has an environment of its own


def run_gpu(report: dict[str, Any], folder: Path, minutes: float) -> None:
    """The stages of gpu_run; the report is written after each, and the lines as they come."""

    def finished(lines: list[dict[str, Any]]) -> None:
        report["suites"]["gpu"] = gpu_run.tables(lines)
        report["stages"] = [line for line in lines if "stage" in line or "failed" in line or "skipped" in line]
        write(report, folder)

    lines = gpu_run.run(folder, minutes, finished)
    for line in lines:
        if "stage" in line:
            print(json.dumps(line))


def write(report: dict[str, Any], folder: Path) -> None:
    """Replace report.json and report.md. Called after every table: what is finished is kept."""
    (folder / "report.json").write_text(json.dumps(report, indent=1) + "\n")
    (folder / "report.md").write_text(markdown(report))


def progress(name: str, lines: list[Any]) -> Any:
    """The lines, told on stderr as they are taken."""
    for i, line in enumerate(lines, 1):
        print(f"{name} {i}/{len(lines)}: {line}", file=sys.stderr, flush=True)
        yield line


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = ", ".join([*SUITES, "gpu"])
    parser.add_argument("--suite", default=",".join(BY_DEFAULT), help=f"comma-separated, of {names}")
    parser.add_argument(
        "--minutes", type=float, default=8.0, help="of the gpu suite, which ends by itself (default: 8)"
    )
    parser.add_argument("--quick", action="store_true", help="one small line of each suite, once: does it run?")
    parser.add_argument("--threads", type=int, default=None, help="CPU threads (default: torch's)")
    parser.add_argument("--out", type=Path, default=None, help="folder (default: benchmarks/results/<device>)")
    given = parser.parse_args()
    chosen = given.suite.split(",")
    if unknown := [name for name in chosen if name not in [*SUITES, "gpu"]]:
        parser.error(f"unknown suite {unknown[0]!r}; there are {names}")
    if not 0 < given.minutes < float("inf"):
        parser.error(f"--minutes {given.minutes}: a number above 0 is needed")
    if given.threads:
        torch.set_num_threads(given.threads)
    machine = Machine.here()
    folder = given.out or Path(__file__).parent / "results" / _slug(machine)
    folder.mkdir(parents=True, exist_ok=True)
    stamp = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d")
    report: dict[str, Any] = {"date": stamp, "machine": asdict(machine), "quick": given.quick, "suites": {}}
    if set(chosen) & {"kernels", "engine"}:
        report["ceilings"] = asdict(Ceilings.measure(machine))
    for suite in chosen:
        if suite == "gpu":
            run_gpu(report, folder, given.minutes)
            continue
        tables = report["suites"][suite] = {}
        for name, table in SUITES[suite].items():
            tables[name] = table(machine, given.quick)
            write(report, folder)
    drawn = plot(report, folder / "scoring.png")
    print(f"{folder}/report.json, report.md{', scoring.png' if drawn else ' (no plot)'}")


def _slug(machine: Machine) -> str:
    return "cpu" if machine.device == "cpu" else machine.name.lower().replace(" ", "-")


if __name__ == "__main__":
    main()
