"""Plots of the report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from protocol import Protocol

NAMES = {"majority": "majority", "best_of_n": "best of n, PRM", "weighted": "weighted vote, PRM"}


def plot(report: Mapping[str, Any], protocol: Protocol, out: Path) -> list[str]:
    """Writes them. Returns their names; none without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return []
    made = []

    def save(figure: Any, name: str) -> None:
        figure.savefig(out / name, dpi=110)
        made.append(name)

    figure = Figure(figsize=(6, 3.6), layout="constrained")
    axes = figure.subplots()
    for name, points in report["curves"].items():
        _line(axes, [each["policy_tokens"] for each in points], points, NAMES[name])
    for each in report["main"]:
        if each["line"].startswith("beam"):
            label = f"step beam, by {each['line'].split()[1]}"
            _line(axes, [each["policy_tokens"]], [each], label, marker="*", size=11)
    axes.set_xscale("log", base=2)
    _finish(axes, "policy tokens of a problem")
    save(figure, "accuracy.png")

    figure = Figure(figsize=(6, 3.6), layout="constrained")
    axes = figure.subplots()
    for shift, (part, label) in enumerate(
        (("best", f"best of {protocol.samples}"), ("vote", "weighted"), ("beam", "beam"))
    ):
        points = [each[part] for each in report["objectives"]]
        places = [k + 0.25 * (shift - 1) for k in range(len(points))]
        heights = [each["accuracy"] for each in points]
        axes.bar(places, heights, 0.23, yerr=_errors(points), capsize=2, label=label)
    axes.axhline(report["main"][0]["accuracy"], color="grey", linestyle="--", label="majority")
    axes.set_xticks(
        range(len(report["objectives"])), [each["pair"].replace(" ", "\n", 2) for each in report["objectives"]]
    )
    _finish(axes, "objective")
    save(figure, "objectives.png")

    figure = Figure(figsize=(6, 3.6), layout="constrained")
    axes = figure.subplots()
    for problems in protocol.sweep_problems:
        points = [each for each in report["sweep"] if each["problems"] == problems]
        _line(axes, [each["responses"] for each in points], points, f"{problems} problems")
    axes.axhline(report["main"][0]["accuracy"], color="grey", linestyle="--", label="majority")
    axes.set_xscale("log", base=2)
    _finish(axes, "responses to each problem")
    save(figure, "sweep.png")
    return made


def _errors(points: Sequence[Mapping[str, Any]]) -> list[list[float]]:
    low = [each["accuracy"] - each["low"] for each in points]
    return [low, [each["high"] - each["accuracy"] for each in points]]


def _line(
    axes: Any,
    places: Sequence[float],
    points: Sequence[Mapping[str, Any]],
    label: str,
    marker: str = "o",
    size: int = 4,
) -> None:
    heights = [each["accuracy"] for each in points]
    axes.errorbar(places, heights, _errors(points), marker=marker, markersize=size, capsize=2, label=label)


def _finish(axes: Any, below: str) -> None:
    axes.set_xlabel(below)
    axes.set_ylabel("right answers")
    axes.set_ylim(0, 1)
    axes.grid(alpha=0.3)
    axes.figure.legend(loc="outside upper center", ncols=5, fontsize=8)
