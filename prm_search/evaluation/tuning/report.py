"""tune.json, tune.md and plots: what was tried, what was picked, and what held up."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..report import PLOTS_NEED, grid, versus
from .confirm import Line, Verdict, lines_of
from .guidance import plain_config
from .pick import Table

METHOD = """\
* Half of the problems, told by a hash of the prompt, are for choosing, the other half for confirming. Whole samples of
  a problem are drawn once; every vote, value, temperature and smaller number chooses among the first of them, and every
  choice of a search among its one tree's answers.
* **Race**: after a quarter, a half and three quarters of the problems for choosing, a search is dropped whose every way
  to choose is behind: the best so far of the configurations that cost no more is right where it is wrong more often
  than the reverse, with p of at most .01 by the exact sign test, and it is right no more often than that one in any bin
  of difficulty. Whole samples are never dropped, and the problems for confirming are not looked at. `--no-race` tries
  everything on all problems.
* A token budget cuts every search; n whole samples have as many tokens on average. Of a budget of seconds, what took
  longer on average is left out.
* **By difficulty**: the mean value of the first 4 whole answers tells how hard a problem is; bins are its quantiles. A
  strategy for each bin is used where, chosen on one half of the problems for choosing and judged on the other, and the
  reverse, it is right more often than one strategy for all, chosen alike (arXiv 2408.03314, section 3.2).
* What was picked is compared with plain best-of-N, under the value that served that best, on the problems for
  confirming: a paired bootstrap, with the exact sign test's p where that is larger. Where the interval of the
  difference is not above 0, or p is above .05, the guidance file says plain best-of-N.
* Temperatures of weighted votes, ParticleFilter and Rebase are multiples of the values' spread within a problem. They
  stand for beta, another one of which changes nothing else.
* **seconds**: wall time of a problem, of forwards that searches share in equal parts; of some of the samples that were
  drawn together, their share.
"""


DroppedLines = Sequence[tuple[int, Line]]  # problems that a config was tried on before it was dropped, and its figures


def card(
    table: Table, verdicts: Sequence[Verdict], about: Mapping[str, Any], dropped: DroppedLines = ()
) -> dict[str, Any]:
    """Everything, as plain values."""
    return {
        "about": dict(about),
        "tried": [_plain_line(line) for line in lines_of(table)],
        "dropped": [{"problems": problems, **_plain_line(line)} for problems, line in dropped],
        "verdicts": [
            {
                "budget": asdict(verdict.contest.limit), "sentence": verdict.sentence, "beats": verdict.beats,
                "plain": _plain_line(verdict.plain), "picked": _plain_line(verdict.picked),
                "comparison": asdict(verdict.comparison), "cross_validated": dict(verdict.contest.judged),
                "chosen": plain_config(verdict.chosen),
            }
            for verdict in verdicts
        ],
    }  # fmt: skip


def _plain_line(line: Line) -> dict[str, Any]:
    figures = {"accuracy": line.accuracy, "low": line.low, "high": line.high, **line.costs}
    return {"title": line.config.title(), **plain_config(line.config), **figures}


def write_tuning(
    folder: Path,
    table: Table,
    verdicts: Sequence[Verdict],
    about: Mapping[str, Any],
    *,
    title: str,
    dropped: DroppedLines = (),
) -> str:
    """Write tune.json, tune.md and, where matplotlib is installed, two plots. Returns the table of the page."""
    plain = card(table, verdicts, about, dropped)
    (folder / "tune.json").write_text(json.dumps(plain, indent=1) + "\n", encoding="utf-8")
    try:
        from .plots import plot
    except ImportError as error:
        pictures, remark = [], f"There are no plots: {error}. {PLOTS_NEED}."
    else:
        pictures, remark = plot(lines_of(table), folder), ""
    shown = verdict_table(verdicts)
    sentences = "\n".join(f"* {verdict.sentence}." for verdict in verdicts)
    parts = [
        f"# {title}", "\n".join(f"* {name}: {value}" for name, value in about.items()), "## On held-out problems",
        sentences, shown, "## What was tried", best_table(table), *_dropped(dropped),
        *(f"![{Path(p).stem}]({p})" for p in pictures), remark, "## How it was done", METHOD,
    ]  # fmt: skip
    page = "\n\n".join(part.strip("\n") for part in parts if part) + "\n"
    (folder / "tune.md").write_text(page, encoding="utf-8")
    return shown


def verdict_table(verdicts: Sequence[Verdict]) -> str:
    """The contestants on the problems for confirming."""
    head = ["budget", "", "right", "95 % interval", "vs best of n", "policy tokens", "PRM tokens", "seconds"]
    rows = []
    for verdict in verdicts:
        for line in (verdict.plain, verdict.picked):
            own = line is verdict.picked
            rows.append([
                verdict.contest.limit.title, line.config.title(with_scorer=False), f"{line.accuracy:.3f}",
                f"[{line.low:.3f}, {line.high:.3f}]", versus(verdict.comparison) if own else "",
                f"{line.costs['policy_tokens']:.0f}", f"{line.costs['prm_tokens']:.0f}", f"{line.costs['seconds']:.3f}",
            ])  # fmt: skip
            if verdict.contest.pick.config == verdict.contest.plain:
                break
    return grid(head, rows, left=2)


def _dropped(dropped: DroppedLines) -> list[str]:
    """The section of what was dropped; empty where nothing was."""
    if not dropped:
        return []
    rows = [
        [str(line.config.tokens), line.config.title(), str(problems), f"{line.accuracy:.3f}"]
        for problems, line in dropped
    ]
    return ["## Dropped on the way", grid(["made for", "", "problems", "right on them"], rows, left=2)]


def best_table(table: Table) -> str:
    """Each kind's best at each budget, on the problems for choosing: a maximum over several, so it flatters."""
    lines: dict[tuple[int, str], Line] = {}
    counts: dict[tuple[int, str], int] = {}
    for line in lines_of(table):
        key = line.config.tokens, line.config.family
        counts[key] = counts.get(key, 0) + 1
        if key not in lines or line.accuracy > lines[key].accuracy:
            lines[key] = line
    rows = [
        [
            str(tokens), family, str(counts[tokens, family]), line.config.title(), f"{line.accuracy:.3f}",
            f"{line.costs['policy_tokens']:.0f}", f"{line.costs['prm_tokens']:.0f}", f"{line.costs['seconds']:.3f}",
        ]
        for (tokens, family), line in sorted(lines.items(), key=lambda item: (item[0][0], -item[1].accuracy))
    ]  # fmt: skip
    head = ["made for", "kind", "tried", "its best", "right", "policy tokens", "PRM tokens", "seconds"]
    return grid(head, rows, left=2)
