"""Plots of what was tried. Importing this imports matplotlib, from the extra `bench`."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import ScalarFormatter

from ..plots import MARKERS
from .confirm import Line

AXES: dict[str, tuple[str, Callable[[Line], float]]] = {
    "accuracy-tokens": ("policy tokens of a problem", lambda line: line.costs["policy_tokens"]),
    "accuracy-seconds": ("seconds of a problem", lambda line: line.costs["seconds"]),
}


def plot(lines: Sequence[Line], folder: Path) -> list[str]:
    """Accuracy against tokens and against seconds, a point a config, each kind's best joined. Returns the names."""
    kinds: dict[str, list[Line]] = defaultdict(list)
    for line in lines:
        kinds[line.config.family].append(line)
    names = []
    for name, (label, cost) in AXES.items():
        figure = Figure(figsize=(8, 5), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.add_subplot(xlabel=label, ylabel="right answers", ylim=(0, 1))
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter(ScalarFormatter())
        for index, (kind, points) in enumerate(kinds.items()):
            color, marker = f"C{index % 10}", MARKERS[index % len(MARKERS)]
            axes.scatter([cost(p) for p in points], [p.accuracy for p in points], s=9, color=color, alpha=0.35)
            by_size: dict[int, Line] = {}
            for point in points:
                size = point.config.tokens
                if size not in by_size or point.accuracy > by_size[size].accuracy:
                    by_size[size] = point
            best = sorted((cost(p), p.accuracy) for p in by_size.values())
            axes.plot(*zip(*best, strict=True), label=kind, color=color, marker=marker, linewidth=1.2)
        axes.grid(alpha=0.3)
        figure.legend(loc="outside right upper", fontsize="small")
        figure.savefig(folder / f"{name}.png", dpi=110)
        names.append(f"{name}.png")
    return names
