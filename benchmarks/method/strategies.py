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

COSTS = {"policy": "policy tokens", "total": "tokens of all models", "seconds": "CPU seconds"}
PLAIN = "best of n"
WHY = """## What tree search shows here

Other projects report weak gains of MCTS. Here it is well above best-of-N and well below a beam of the same tokens, for
two reasons that have nothing to do with the reward model:

* **Steps are drawn, not listed.** A node's first four draws often lack the right step (the policy writes it 40 % of the
  time where a fact is flawed), and a tree that never draws again cannot find it: without widening the same MCTS had .46
  where it then had .72 and the beam .78 (50 development problems of the shipped pair, values "min", 512 tokens; no
  exploration constant from 0 to .3, mean or max backup, one or four leaves moved the .46 by more than .02). A step that
  is drawn again must be known as the one that is there: with duplicates as children of their own nothing was ever
  finished (.00).
* **A shallow prefix is an upper bound of what follows it** under "min", so a fresh sibling looks better than a path
  that was followed. A beam compares prefixes of one depth and does not have the problem; neither do REBASE and the
  particle filter. Rollouts spend tokens on paths that are thrown away.

**AB-MCTS.** The published rule draws steps near the root until the budget is spent ("adaptive branch, steps,
published": no answer at all), and with whole answers it is no better than best-of-N. `rule="values"`, now the default,
came of 60 to 100 development problems (split "gate", the shipped pair, 512 tokens). One good child competing with a new
one directly, rather than all children pooled, brought steps from .00 to .32; priors at the nodes' own values .40; a
noise of .01 in place of .1 .53 to .68. Without taking the trend of values off it was .00 again by steps, and .45
against .56 by answers; the library's own had .60 by steps and .53 by answers on the same 100 problems, the published
rule .00 and .46. Counting a repeated step as the one that is there, which MCTS needs, cost .3, and a predictive
draw for the new child .08; both were left out. It is still behind a beam: what it learns of where to branch costs
tokens that the beam spends on children.

**Particles.** At temperature 1 a filter hardly resamples with these values (their spread within a problem is about
.25), and draws what best-of-N draws. `temperature="auto"`, a quarter of the spread, had .82 on 100 development
problems, a fixed .1 had .83, a half .74 and the whole spread .59; tempering to an effective sample size of a half, a
quarter and a tenth of the particles had .54, .76 and .82.

**Votes without a scorer** cannot help where errors are systematic: the policy is sure of its wrong results, so
confidence does not tell them apart, and an early stop only saves tokens. **A draft** that is as good as the target, as
here (64 hidden dimensions for 96; it passes the policy's gate), pays for each rejected step twice.

**More is not always better.** From 16 to 32 samples the beam, REBASE and the particle filter lose a few points: with
more candidates the step that this pair overrates most is found more often. Best-of-N and MCTS still gain.

**treequest** beside these, its own algorithms over the shipped policy and pair, 100 problems, at most 512 tokens, in
one run: [its page](../peers/treequest.md). Its best there, ToT-BFS, has .54 (385 tokens: it stops there); its MCTS .45
(c = .3) and .43 (c = 1.41) against .75 of MCTS here; its AB-MCTS-A .00 by steps and .34 with rollouts against .64 by
steps and .55 by answers; beam .81, best-of-16 .34.

Sizes and lines were fixed before the test problems were searched, but for two: at 4 and 8 samples MCTS had spent its
budget before any answer (.000), so its simulations were made to leave room for one answer; and lines with a draft,
whose answers the budget cut (.158 and .008 at 16), ask for half as many.
`AdaptiveBranch` was run again after its draws had been made faster."""
SAME = 0.02  # costs that differ by less than this share are one


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
    """Compare the lines that every one of the seeds has, and write the page."""
    every = [read(work / f"seed-{seed}") for seed in seeds]
    names = [key for key in every[0] if all(key in lines for lines in every)]
    lines = sorted((_line(every, key) for key in names), key=lambda line: (line["name"], line["size"]))
    most = max(line["size"] for line in lines if line["name"] == PLAIN and line["size"] <= lineup.EQUAL)
    plain = next(line for line in lines if (line["name"], line["size"]) == (PLAIN, most))
    tuned = [json.loads((work / f"seed-{seed}/stages/tune.json").read_text(encoding="utf-8")) for seed in seeds
             if (work / f"seed-{seed}/stages/tune.json").is_file()]  # fmt: skip
    report = {
        "seeds": list(seeds), "problems": plain["tested"] // len(seeds), "most": most,
        "lines": [line | {"right": ["".join(str(int(x)) for x in seed) for seed in line["right"]]} for line in lines],
        "limits": {cost: plain[cost] for cost in COSTS},
        "equal": {cost: equal(lines, cost, plain) for cost in COSTS},
        "picks": [note["picks"] for note in tuned],
    }  # fmt: skip
    out.mkdir(parents=True, exist_ok=True)
    (out / "strategies.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    (out / "strategies.md").write_text(_page(report, protocol, _plot(lines, out)), encoding="utf-8")
    return report


def _line(every: Sequence[Mapping[tuple[str, int], Any]], key: tuple[str, int]) -> dict[str, Any]:
    """A line at one size: outcomes of each seed's problems, and mean costs."""
    right = [[float(outcome) for outcome in lines[key]["right"]] for lines in every]
    return {
        "name": key[0], "size": key[1], **_shares(right),
        **{cost: fmean(lines[key][cost] for lines in every) for cost in COSTS},
    }  # fmt: skip


def _shares(right: list[list[float]]) -> dict[str, Any]:
    """The share of right answers, of the problems of all seeds and of each."""
    outcomes = [outcome for seed in right for outcome in seed]
    low, high = wilson(sum(outcomes), len(outcomes))
    return {
        "accuracy": fmean(outcomes), "low": low, "high": high, "tested": len(outcomes),
        "by_seed": [fmean(seed) for seed in right], "right": right,
    }  # fmt: skip


def equal(lines: Sequence[Mapping[str, Any]], cost: str, plain: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Every line at the cost of plain best-of-N, against that by a paired test; the best first.

    Between two of its sizes a line stands for their mixture: problems are given the larger size with the probability w
    at which the mean cost is the limit, so an outcome is (1 - w) times one and w times the other. A line whose largest
    size costs less stands there; one whose smallest costs more is left out. Where one size is within SAME of the limit,
    it stands alone.
    """
    limit = plain[cost]
    compared = []
    for name in dict.fromkeys(line["name"] for line in lines):
        sizes = sorted((line for line in lines if line["name"] == name), key=lambda line: line[cost])
        below = [line for line in sizes if line[cost] <= limit]
        if not below:
            continue
        small, large = below[-1], next((line for line in sizes if line[cost] > limit), None)
        w = 0.0 if large is None else (limit - small[cost]) / (large[cost] - small[cost])
        if limit - small[cost] < SAME * limit or (large is not None and large[cost] - limit < SAME * limit):
            w = float(round(w))  # it is one of the two
        other = small if large is None else large
        right = [
            [(1 - w) * x + w * y for x, y in zip(a, b, strict=True)]
            for a, b in zip(small["right"], other["right"], strict=True)
        ]
        sizes_of = {0.0: [small["size"]], 1.0: [other["size"]]}.get(w, [small["size"], other["size"]])
        mixed = {"name": name, "sizes": sizes_of, "w": w}
        mixed |= _shares(right) | {key: (1 - w) * small[key] + w * other[key] for key in COSTS}
        test = paired_bootstrap(
            [x for seed in right for x in seed], [x for seed in plain["right"] for x in seed]
        )  # fmt: skip
        mixed |= {"difference": test.difference, "d_low": test.low, "d_high": test.high}
        mixed["p"] = test.p if w in (0.0, 1.0) else test.bootstrap_p  # signs of mixtures say nothing
        compared.append({key: value for key, value in mixed.items() if key != "right"})
    return sorted(compared, key=lambda line: -line["accuracy"])


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


def _sizes(line: Mapping[str, Any]) -> str:
    """The sizes that a line is a mixture of: "8-16 samples"."""
    unit = "tokens" if line["name"] == "tune" else "samples"
    return f"{'-'.join(map(str, line['sizes']))} {unit}"


def _rows(lines: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    return [
        [
            line["name"], _sizes(line), share(line), by_seed(line["by_seed"]),
            "" if line["name"] == PLAIN
            else f"{line['difference']:+.3f} [{line['d_low']:+.3f}, {line['d_high']:+.3f}], p {p_value(line['p'])}",
            f"{line['policy']:.0f}", f"{line['total']:.0f}", f"{line['seconds']:.3f}",
        ]
        for line in lines
    ]  # fmt: skip


def _by_size(lines: Sequence[Mapping[str, Any]]) -> str:
    """Every line at every size: the share of right answers, and the three costs."""
    found = {(line["name"], line["size"]): line for line in lines if line["name"] != "tune"}
    sizes = sorted({size for _, size in found})
    rows = []
    for name in dict.fromkeys(name for name, _ in found):
        cells = []
        for size in sizes:
            line = found.get((name, size))
            cells.append(
                "" if line is None
                else f"{line['accuracy']:.3f} ({line['policy']:.0f}, {line['total']:.0f}, {line['seconds']:.3f})"
            )  # fmt: skip
        rows.append([name, *cells])
    return table(["", *[f"{size} samples" for size in sizes]], rows)


def _page(r: Mapping[str, Any], p: Protocol, plot: str | None) -> str:
    head = ["", "sizes", "right", f"seeds {', '.join(map(str, r['seeds']))}", f"against {PLAIN}", "policy tokens",
            "total tokens", "CPU seconds"]  # fmt: skip
    titles = {"policy": "At equal policy tokens", "total": "At equal tokens of all models",
              "seconds": "At equal CPU seconds"}  # fmt: skip
    units = {"policy": "{:.0f} sampled tokens", "total": "{:.0f} tokens", "seconds": "{:.3f} seconds"}
    parts = [
        f"""# All strategies on the demo's task

Made by `make report` (`benchmarks/method/report.py --part strategies`); `strategies.json` has every figure. Seeds
{", ".join(map(str, r["seeds"]))}, each with a policy, a PRM (CE) and test problems of its own, {r["problems"]} problems
a seed. Values are "{lineup.VALUE}". Every search is run at several sizes, with as many policy tokens as that many
whole samples have, and cut there. The first three tables compare at one mean cost, that of best of {r["most"]}. Between
two of its sizes a line stands for their mixture: problems are given the larger one with the probability that makes the
mean cost equal. A line whose largest size costs less stands there, and its cost says so.

Intervals are Wilson's. Differences and p are of a paired bootstrap over the problems of all seeds; p is the exact sign
test's where that is larger and the line is no mixture. No p is corrected for how many there are. Total tokens are those
that were sampled and those that the PRM and the reference read; the policy's own log-probabilities are the reference,
so only a draft's steps are read by it again. CPU seconds are process time on one thread, one batch of all problems, a
busy machine: differences below a fifth mean little. Those of "majority" and "weighted vote" are of best of n, whose
samples they share."""
    ]
    for cost, title in titles.items():
        limit = units[cost].format(r["limits"][cost])
        parts.append(f"## {title}\n\n{limit} a problem.\n\n{table(head, _rows(r['equal'][cost]))}")
    if plot:
        parts.append(f"![strategies]({plot})")
    parts.append(
        f"## Every size\n\nRight (policy tokens, total tokens, CPU seconds of a problem).\n\n{_by_size(r['lines'])}"
    )
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
