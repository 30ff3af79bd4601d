"""The comparison of all strategies: strategies.json, strategies.md and a plot, from the stages' files. No model."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import lineup
from page import by_seed, p_value, share, table
from protocol import Protocol

from prm_search.evaluation.statistics import paired_bootstrap, wilson

COSTS = {"policy": "policy tokens", "total": "tokens of both models", "seconds": "CPU seconds"}
PLAIN = "best of n"
WHY = """## What tree search shows here

Other projects report weak gains of MCTS. Here it is well above best-of-N and well below a beam of the same tokens, for
two reasons that have nothing to do with the reward model:

* **Steps are drawn, not listed.** A node's first four draws often lack the right step (the policy writes it 40 % of the
  time where a fact is flawed), and a tree that never draws again cannot find it: without widening the same MCTS had .46
  where it now has .72 and the beam .78 (50 development problems of the shipped pair, values "min", 512 tokens; no
  exploration constant from 0 to .3, mean or max backup, one or four leaves moved the .46 by more than .02). A step that
  is drawn again must be known as the one that is there: with duplicates as children of their own nothing was ever
  finished (.00).
* **A shallow prefix is an upper bound of what follows it** under "min", so a fresh sibling looks better than a path
  that was followed. A beam compares prefixes of one depth and does not have the problem; neither do REBASE and the
  particle filter. Rollouts spend tokens on paths that are thrown away.

`AdaptiveBranch` draws whole answers (as published) or steps; with a budget of a few answers it learns too little of
where to branch, and step by step it stays near the root until the budget is spent. A particle filter at temperature 1
hardly resamples with these values (their spread within a problem is about .25): its temperature has to be of their
size, which `tune` sees to.

For comparison, told by the issue that asked for this page and not measured again: treequest's own algorithms over an
earlier policy and pair of this task, 40 problems, at most 512 policy tokens: MCTS .525 with c = .3 and .325 with
c = 1.41, AB-MCTS-A .05 to .08 step by step and .25 to .28 with rollouts, ToT-BFS and best-first .525."""
ROOM = 1.2  # of what best of 16 took: so much a line may take


def read(folder: Path) -> dict[tuple[str, int], dict[str, Any]]:
    """A seed's lines: (name, size) -> outcomes and costs of each problem; those of tune by their budget in tokens."""
    lines = {}
    for path in sorted((folder / "stages").glob("strategy-*.json")):
        size = int(path.stem.rpartition("-")[2])
        for name, way in json.loads(path.read_text(encoding="utf-8"))["ways"].items():
            total = [sum(costs) for costs in zip(way["policy_tokens"], way["prm_tokens"], way["reference_tokens"],
                                                 strict=True)]  # fmt: skip
            lines[name, size] = {
                "right": way["right"], "policy": fmean(way["policy_tokens"]), "total": fmean(total),
                "seconds": way["seconds"],
            }  # fmt: skip
    return lines


def write_strategies(work: Path, out: Path, protocol: Protocol, seeds: Sequence[int]) -> dict[str, Any]:
    """Compares the lines that every one of the seeds has, and writes the page."""
    every = [read(work / f"seed-{seed}") for seed in seeds]
    names = [key for key in every[0] if all(key in lines for lines in every)]
    most = max(size for name, size in names if name == PLAIN)
    lines = [_line(every, key) for key in names]
    limits = {cost: ROOM * next(line[cost] for line in lines if (line["name"], line["size"]) == (PLAIN, most))
              for cost in COSTS}  # fmt: skip
    tuned = [json.loads((work / f"seed-{seed}/stages/tune.json").read_text(encoding="utf-8")) for seed in seeds
             if (work / f"seed-{seed}/stages/tune.json").is_file()]  # fmt: skip
    report = {
        "seeds": list(seeds), "problems": len(every[0][PLAIN, most]["right"]), "lines": lines, "limits": limits,
        "equal": {cost: _equal(every, lines, cost, limits[cost], most) for cost in COSTS},
        "picks": [note["picks"] for note in tuned],
    }  # fmt: skip
    out.mkdir(parents=True, exist_ok=True)
    (out / "strategies.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    (out / "strategies.md").write_text(_page(report, protocol, _plot(lines, out)), encoding="utf-8")
    return report


def _line(every: Sequence[Mapping[tuple[str, int], Any]], key: tuple[str, int]) -> dict[str, Any]:
    right = [outcome for lines in every for outcome in lines[key]["right"]]
    low, high = wilson(sum(right), len(right))
    return {
        "name": key[0], "size": key[1], "accuracy": fmean(right), "low": low, "high": high, "tested": len(right),
        "by_seed": [fmean(lines[key]["right"]) for lines in every],
        **{cost: fmean(lines[key][cost] for lines in every) for cost in COSTS},
    }  # fmt: skip


def _equal(
    every: Sequence[Mapping[tuple[str, int], Any]], lines: Sequence[Mapping[str, Any]], cost: str, limit: float,
    most: int,
) -> list[dict[str, Any]]:  # fmt: skip
    """Each line at its largest size within a limit of the cost, against best of n by a paired test."""
    kept: dict[str, Mapping[str, Any]] = {}
    for line in lines:
        if line[cost] <= limit and (line["name"] not in kept or line["size"] > kept[line["name"]]["size"]):
            kept[line["name"]] = line
    plain = [seed[PLAIN, most]["right"] for seed in every]
    found = []
    for line in sorted(kept.values(), key=lambda line: -line["accuracy"]):
        mine = [seed[line["name"], line["size"]]["right"] for seed in every]
        a = [x for one, other in zip(mine, plain, strict=True) for x in one[: len(other)]]
        b = [x for one, other in zip(mine, plain, strict=True) for x in other[: len(one)]]
        test = paired_bootstrap(a, b)
        found.append(dict(line) | {"difference": test.difference, "d_low": test.low, "d_high": test.high, "p": test.p})
    return found


def _plot(lines: Sequence[Mapping[str, Any]], out: Path) -> str | None:
    """Accuracy against each cost. Returns its name; None without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return None
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    for axes, (cost, label) in zip(figure.subplots(1, 3, sharey=True), COSTS.items(), strict=True):
        for place, name in enumerate(dict.fromkeys(line["name"] for line in lines)):
            points = sorted((line[cost], line["accuracy"]) for line in lines if line["name"] == name)
            marker = "os^vD*"[place // 10]
            axes.plot(*zip(*points, strict=True), marker=marker, markersize=4, color=f"C{place % 10}",
                      label=name if cost == "policy" else None)  # fmt: skip
        axes.set_xscale("log", base=2)
        axes.set_xlabel(f"{label} of a problem")
        axes.grid(alpha=0.3)
    figure.axes[0].set_ylabel("right answers")
    figure.legend(loc="outside right upper", fontsize=7)
    figure.savefig(out / "strategies.png", dpi=110)
    return "strategies.png"


def _rows(lines: Sequence[Mapping[str, Any]], p: Protocol) -> list[list[str]]:
    def size(line: Mapping[str, Any]) -> str:
        return f"{line['size']} tokens" if line["name"] == "tune" else f"{line['size']} samples"

    return [
        [
            line["name"], size(line), share(line), by_seed(line["by_seed"]),
            "" if line["name"] == PLAIN
            else f"{line['difference']:+.3f} [{line['d_low']:+.3f}, {line['d_high']:+.3f}], p {p_value(line['p'])}",
            f"{line['policy']:.0f}", f"{line['total']:.0f}", f"{line['seconds']:.3f}",
        ]
        for line in lines
    ]  # fmt: skip


def _page(r: Mapping[str, Any], p: Protocol, plot: str | None) -> str:
    head = ["", "made for", "right", f"seeds {', '.join(map(str, r['seeds']))}", f"against {PLAIN}", "policy tokens",
            "total tokens", "CPU seconds"]  # fmt: skip
    titles = {"policy": "At equal policy tokens", "total": "At equal tokens of both models",
              "seconds": "At equal CPU seconds"}  # fmt: skip
    parts = [
        f"""# All strategies on the demo's task

Made by `make report` (`benchmarks/method/report.py --part strategies`); `strategies.json` has every figure. Seeds
{", ".join(map(str, r["seeds"]))}, each with a policy, a PRM (CE) and test problems of its own; {r["problems"]} problems
a seed at the larger size. Values are "{lineup.VALUE}"; searches may sample what {" or ".join(map(str, lineup.SIZES))}
whole samples have, and are cut there. In each table a line stands at its largest size whose mean cost is within
{ROOM:g} times that of best of 16. Intervals are Wilson's; differences and p are of a paired bootstrap over the
problems of all seeds, with the exact sign test's p where that is larger. No p is corrected for how many there are.
Total tokens are those that the policy sampled and the PRM read; the policy's own log-probabilities are the reference.
CPU seconds are process time on one thread, batches of 50 problems, a busy machine: differences below a fifth mean
little."""
    ]
    parts += [f"## {titles[cost]}\n\n{table(head, _rows(r['equal'][cost], p))}" for cost in COSTS]
    if plot:
        parts.append(f"![strategies]({plot})")
    picks = [
        [str(seed), str(one["budget"]), one["title"], f"{max(one['judged'].values()):.3f}"]
        for seed, found in zip(r["seeds"], r["picks"], strict=False) for one in found
    ]  # fmt: skip
    if picks:
        parts.append(
            f"""## What `tune` picks

On {p.tuned_on} other problems of each seed (split "gate"), among all configurations of `lineup.grid()`; the lines
"tune" above are these on the test problems.

{table(["seed", "budget", "pick", "right where it was chosen (2 folds)"], picks)}"""
        )
    parts.append(WHY)
    return "\n\n".join(part.strip("\n") for part in parts) + "\n"
