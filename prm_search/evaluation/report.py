"""write_report: a summary as report.md, report.json and plots."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from .statistics import RESAMPLES, Comparison
from .step_errors import StepSummary
from .summary import Summary, SummaryRow, summarise

METHOD = f"""\
* **right**: share of right final answers over all problems and seeds, with Wilson's 95 % interval. Where a problem was
  answered under several seeds, n in Wilson's formula is the effective sample size: answers over the design effect with
  problems as clusters, at least the number of problems.
* **policy tokens**: sampled, pruned steps and rollouts included. **PRM**, **ref. tokens**: encoded by either model to
  score them; 0 for a reference that is the policy, whose log-probabilities come from sampling. Means of a problem.
  **total** is their sum. **seconds**: wall time of all problems; forwards that several searches share count in equal
  parts. With a star: n samples of more that were drawn together, the part that those n have in the tokens of all; drawn
  alone they take longer, since a larger batch takes little longer than a small one.
* Budget N: majority, best_of_n and weighted choose among the first N samples of a problem; beam and lookahead may
  sample as many tokens as those N samples took on that problem and seed; without a cap (`capped` in the plan is false)
  what their shape takes, which policy tokens tells. **cut**: share of answers whose search that limit cut.
* **at length**: share of the answers that ended at the length limit; such a response has given no answer and is
  wrong.
* **to oracle**: what a perfect choice would add. Of a vote: the share with a right one among the N samples, minus its
  accuracy; of a search, which draws its own: pass@N minus its accuracy, and a search can be beyond it. pass@k is the
  unbiased estimate of Chen et al. 2021 (arXiv 2107.03374) from all samples of a problem and seed; its interval is a
  percentile bootstrap over problems.
* **vs majority**, **vs best_of_n**: difference of the accuracies at the same budget, by a paired bootstrap: problems
  are resampled {RESAMPLES:,} times with both of their figures, each the mean of its seeds; 95 % percentile interval,
  and as two-sided p the larger of the one that inverts it and the exact sign test's over the problems that differ
  (with few problems the bootstrap's is too small). best_of_n is that of the same pair; of several values, the one
  that is right most often. The p are not corrected for how many there are.
* A majority vote sees no rewards: it breaks ties by draw order.
"""


PLOTS_NEED = "Plots need matplotlib: pip install 'prm-search[bench]'"


def write_report(
    records: Iterable[Mapping[str, Any]],
    out: str | Path,
    *,
    title: str = "Evaluation",
    about: Mapping[str, Any] | None = None,
    expected: int | None = None,
) -> Summary:
    """Write report.md, report.json and, where matplotlib is installed, two plots into a folder, from records alone.

    Args:
        records: of evaluate, or of score_samples.
        out: the folder; made where it is missing.
        title: of the page.
        about: what was evaluated, plain values: named in the page and kept in report.json.
        expected: records of the whole run, so that the page can say what is missing.

    Returns:
        The summary.

    Raises:
        ValueError: there are no records.
    """
    kept = list(records)
    summary = summarise(kept)
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    try:
        from .plots import plot
    except ImportError as error:
        plots, remark = [], f"There are no plots: {error}. {PLOTS_NEED}."
    else:
        plots, remark = plot(summary, folder), ""
    missing = None if expected is None else expected - len(kept)
    card = {"title": title, "about": dict(about or {}), "records": len(kept), "missing": missing, **summary.card()}
    (folder / "report.json").write_text(json.dumps(card, indent=2) + "\n", encoding="utf-8")
    page = markdown(summary, title=title, about=about, missing=missing, plots=plots, remark=remark)
    (folder / "report.md").write_text(page, encoding="utf-8")
    return summary


STEP_METHOD = f"""\
* The first step whose score is below the threshold is said to be the first wrong one; none where no score is. **F1** is
  the harmonic mean of the accuracies on solutions with an error and on correct ones (ProcessBench, arXiv 2412.06559).
  Its interval is a percentile bootstrap of {RESAMPLES:,} resamples over problems, thresholds held fixed.
* No threshold comes from the solutions that it is reported on. Of folds, each is judged by the threshold with the best
  F1 on the others; all solutions to a problem are in one fold.
* **AUC**: chance that a right step has a higher score than a first wrong one, ties half, over the steps up to the first
  error.
* **lowest is first**: share of the solutions with an error whose lowest score is at the first wrong step, with Wilson's
  95 % interval. **chance**: the same for a step picked at random.
* Scores are values of the prefix that a step ends: last is the step's own reward, q the sum so far, prefix_mean q over
  the tokens so far.
"""


def write_step_report(
    summary: StepSummary, out: str | Path, *, title: str = "Step errors", about: Mapping[str, Any] | None = None
) -> None:
    """Write report.md and report.json of step errors into a folder, which is made where it is missing.

    Args:
        summary: see summarise_steps.
        out, title, about: as of write_report.
    """
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    card = {"title": title, "about": dict(about or {}), **summary.card()}
    (folder / "report.json").write_text(json.dumps(card, indent=2) + "\n", encoding="utf-8")
    crossed = f"Thresholds crossed over {summary.folds} folds." if summary.folds else "Thresholds chosen elsewhere."
    parts = [f"# {title}", f"{summary.erroneous} solutions with an error, {summary.correct} without. {crossed}"]
    if about:
        parts.append("\n".join(f"* {name}: {_plain(value)}" for name, value in about.items()))
    parts += [step_table(summary), "## How it was computed", STEP_METHOD]
    page = "\n\n".join(part.strip("\n") for part in parts) + "\n"
    (folder / "report.md").write_text(page, encoding="utf-8")


def step_table(summary: StepSummary) -> str:
    """The rows of step errors, as a table in Markdown."""
    head = ["score", "F1", "95 % interval", "with an error", "correct", "AUC", "lowest is first", "95 % interval"]
    rows = [
        [
            row.value,
            f"{row.f1:.3f}",
            _interval(row.f1_low, row.f1_high),
            f"{row.error_accuracy:.3f}",
            f"{row.correct_accuracy:.3f}",
            f"{row.auc:.3f}",
            f"{row.lowest_is_first:.3f}",
            _interval(row.lowest_low, row.lowest_high),
        ]
        for row in summary.rows
    ]
    rows.append(["chance", *[""] * 5, f"{summary.chance:.3f}", ""])
    return grid(head, rows, left=1)


def markdown(
    summary: Summary,
    *,
    title: str = "Evaluation",
    about: Mapping[str, Any] | None = None,
    missing: int | None = None,
    plots: Sequence[str] = (),
    remark: str = "",
) -> str:
    """The page. Arguments as of write_report; `plots` are file names."""
    seeds = ", ".join(map(str, summary.seeds)) or "none"
    parts = [f"# {title}", f"{summary.problems} problems; seeds {seeds}."]
    if missing:
        parts.append(f"**Unfinished**: {missing} records are missing.")
    if about:
        parts.append("\n".join(f"* {name}: {_plain(value)}" for name, value in about.items()))
    if summary.full_samples:
        parts.append(
            f"**{summary.full_samples} of {summary.samples} samples** ended at the length limit, without an answer: "
            "they do not vote and are wrong. A larger limit may change the table."
        )
    parts.append(table(summary))
    if summary.pass_at:
        rows = [
            [str(estimate.k), f"{estimate.mean:.3f}", _interval(estimate.low, estimate.high)]
            for estimate in summary.pass_at
        ]
        parts.append(grid(["k", "pass@k", "95 % interval"], rows))
    parts += [f"![{Path(name).stem.replace('-', ' ')}]({name})" for name in plots]
    if remark:
        parts.append(remark)
    parts += ["## How it was computed", METHOD]
    return "\n\n".join(part.strip("\n") for part in parts) + "\n"


def table(summary: Summary) -> str:
    """The rows, as a table in Markdown."""
    many = len({row.cell.pair for row in summary.rows} - {None}) > 1
    searched = any(row.against_best_of_n for row in summary.rows)
    head = ["strategy", "N", "right", "95 % interval", "vs majority", *(["vs best_of_n"] if searched else [])]
    head += ["to oracle", "policy tokens", "PRM tokens", "ref. tokens", "total", "seconds", "cut", "at length"]
    return grid(head, [_cells(row, many, searched) for row in summary.rows], left=1)


def _cells(row: SummaryRow, many: bool, searched: bool) -> list[str]:
    return [
        row.cell.title(with_pair=many),
        str(row.cell.n),
        f"{row.accuracy:.3f}",
        _interval(row.low, row.high),
        versus(row.against_majority),
        *([versus(row.against_best_of_n)] if searched else []),
        "" if row.oracle_gap is None else f"{row.oracle_gap:+.3f}",
        f"{row.policy_tokens:.1f}",
        f"{row.prm_tokens:.1f}",
        f"{row.reference_tokens:.1f}",
        f"{row.total_tokens:.1f}",
        f"{row.seconds:.1f}{'*' if row.shared else ''}",
        f"{row.cut:.0%}" if row.cut else "",
        f"{row.full:.0%}" if row.full else "",
    ]


def versus(comparison: Comparison | None) -> str:
    """A comparison in a table: difference, interval, p."""
    if comparison is None:
        return ""
    p = "p < .001" if comparison.p < 0.001 else f"p = {comparison.p:.3f}"
    return f"{comparison.difference:+.3f} {_interval(comparison.low, comparison.high, sign=True)}, {p}"


def grid(head: Sequence[str], rows: Sequence[Sequence[str]], *, left: int = 0) -> str:
    """A table in Markdown; the first `left` columns are aligned to the left."""
    lines = [head, ["---" if i < left else "---:" for i in range(len(head))], *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def _interval(low: float, high: float, *, sign: bool = False) -> str:
    return f"[{low:+.3f}, {high:+.3f}]" if sign else f"[{low:.3f}, {high:.3f}]"


def _plain(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_plain(item)}" for name, item in value.items()) or "none"
    if isinstance(value, list | tuple):
        return ", ".join(map(_plain, value)) or "none"
    return "none" if value is None else str(value)
