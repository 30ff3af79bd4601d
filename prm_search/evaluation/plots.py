"""Plots of a summary. Importing this imports matplotlib, from the extra `bench`."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import ScalarFormatter

from .summary import Summary, SummaryRow

AXES: dict[str, tuple[str, Callable[[SummaryRow], float]]] = {
    "accuracy-policy-tokens": ("policy tokens a problem", lambda row: row.policy_tokens),
    "accuracy-total-tokens": ("policy, PRM and reference tokens a problem", lambda row: row.total_tokens),
}
MARKERS = "osv^Dp*Xh<>"


def plot(summary: Summary, folder: Path) -> list[str]:
    """Accuracy against tokens, with intervals: one PNG for each of AXES. Returns their names."""
    many = len({row.cell.pair for row in summary.rows} - {None}) > 1
    lines: dict[str, list[SummaryRow]] = defaultdict(list)
    for row in summary.rows:
        lines[row.cell.title(with_pair=many)].append(row)
    names = []
    for name, (label, tokens) in AXES.items():
        figure = Figure(figsize=(8, 5), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.add_subplot(xlabel=label, ylabel="right answers", ylim=(0, 1))
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter(ScalarFormatter())
        for index, (title, rows) in enumerate(lines.items()):
            points = sorted((tokens(row), row.accuracy, row.low, row.high) for row in rows)
            x, y, low, high = zip(*points, strict=True)
            below = [max(0.0, a - b) for a, b in zip(y, low, strict=True)]
            above = [max(0.0, b - a) for a, b in zip(y, high, strict=True)]
            axes.errorbar(
                x, y, yerr=(below, above), label=title, marker=MARKERS[index % len(MARKERS)], capsize=2, linewidth=1.2
            )
        axes.grid(alpha=0.3)
        figure.legend(loc="outside right upper", fontsize="small")
        figure.savefig(folder / f"{name}.png", dpi=120)
        names.append(f"{name}.png")
    return names
