"""report.json, report.md and plots of finished seeds."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from figures import POLICY, WITHOUT, Measured, compared, located, measure, pooled
from plots import plot
from protocol import Protocol

from prm_search.demo.chains import CONSTRUCTED
from prm_search.training.recipe import OBJECTIVES


def write_report(work: Path, out: Path, protocol: Protocol) -> dict[str, Any]:
    """Measures, writes and returns everything."""
    p = protocol
    seeds = [measure(work / f"seed-{seed}", seed, p) for seed in p.seeds]
    n = p.samples
    best, vote, majority = f"best_of_n {n} q (ce)", f"weighted {n} q (ce)", f"majority {n}"
    curve = [k for k in (1, 2, 4, 8, 16, 32, 64) if k <= n]
    many = sum(count for _, count in p.single)
    ones = [f"ce {p.problems} x 1", f"ce {many} x 1"]

    def lines(names: Sequence[str]) -> list[dict[str, Any]]:
        return [pooled(seeds, name) for name in names]

    report: dict[str, Any] = {
        "task": CONSTRUCTED,
        "protocol": asdict(p),
        "seeds": {
            str(seed): {"policy": each.policy, "rates": each.rates, "training": each.training,
                        "cpu_seconds": round(each.cpu_seconds, 1)}
            for seed, each in zip(p.seeds, seeds, strict=True)
        },
        "rates": {name: [each.rates[name] for each in seeds] for name in seeds[0].rates},
        "main": lines([majority, best, f"best_of_n {n} min (ce)", vote, f"best_of_n {n} q ({POLICY})",
                       "beam min (ce)", "beam q (ce)"]),
        "tests": [
            compared(seeds, best, majority), compared(seeds, vote, majority),
            compared(seeds, "beam min (ce)", best), compared(seeds, "beam q (ce)", best),
        ],
        "curves": {
            name: lines([f"{name} {k}{tail}" for k in curve])
            for name, tail in (("majority", ""), ("best_of_n", " q (ce)"), ("weighted", " q (ce)"))
        },
        "objectives": [
            {"pair": name, "best": pooled(seeds, f"best_of_n {n} q ({name})"),
             "vote": pooled(seeds, f"weighted {n} q ({name})"), "beam": pooled(seeds, f"beam min ({name})"),
             "steps": located(seeds, name),
             "against_majority": compared(seeds, f"best_of_n {n} q ({name})", majority),
             "beam_against_best": compared(seeds, f"beam min ({name})", f"best_of_n {n} q ({name})")}
            for name in [*OBJECTIVES, ones[1]]
        ],
        "one_response": [pooled(seeds, f"best_of_n {n} q ({name})") for name in ["ce", *ones]],
        "sweep": [
            {"problems": problems, "responses": responses, **pooled(seeds, f"best_of_n {n} q ({name})")}
            for problems in p.sweep_problems
            for responses in p.sweep_responses
            if (name := "ce" if (problems, responses) == (p.problems, p.responses) else f"ce {problems} x {responses}")
            in seeds[0].training
        ],
        "reference": [
            {"train": "with", "infer": "with", **pooled(seeds, best)},
            {"train": "with", "infer": "without", **pooled(seeds, f"best_of_n {n} q ({WITHOUT})")},
            {"train": "untrained", "infer": "without", **pooled(seeds, f"best_of_n {n} q ({POLICY})")},
        ],
        "steps": [located(seeds, name) for name in ("ce", POLICY)],
        "versions": {name: version(name) for name in ("prm-search", "torch", "transformers", "accelerate")}
        | {"python": platform.python_version()},
    }  # fmt: skip
    out.mkdir(parents=True, exist_ok=True)
    (out / "report.json").write_text(json.dumps(rounded(report), indent=1) + "\n", encoding="utf-8")
    (out / "report.md").write_text(markdown(report, p, plot(report, p, out)), encoding="utf-8")
    return report


def rounded(given: Any) -> Any:
    """Floats with the digits that mean something."""
    if isinstance(given, float):
        return float(f"{given:.5g}")
    if isinstance(given, Mapping):
        return {name: rounded(value) for name, value in given.items()}
    return [rounded(each) for each in given] if isinstance(given, list | tuple) else given


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; all columns but the first are numbers."""
    rule = ["---", *["---:"] * (len(head) - 1)]
    return "".join("| " + " | ".join(line) + " |\n" for line in (head, rule, *rows))


def share(each: Mapping[str, Any]) -> str:
    """".412 [.37, .45]"."""
    return f"{each['accuracy']:.3f} [{each['low']:.3f}, {each['high']:.3f}]"


def by_seed(values: Sequence[float]) -> str:
    """Each seed's figure."""
    return " / ".join(f"{value:.3f}" for value in values)


def p_value(p: float) -> str:
    """A p-value of 10 000 resamples: it cannot be below 0.0002."""
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def markdown(r: Mapping[str, Any], p: Protocol, plots: Sequence[str]) -> str:
    """The page."""
    n = p.samples
    seeds = ", ".join(map(str, p.seeds))
    tests = {(t["a"], t["b"]): t for t in r["tests"]}

    def figure(name: str) -> str:
        return f"![{name.split('.')[0]}]({name})\n\n" if name in plots else ""

    main = [[each["line"], share(each), by_seed(each["by_seed"]), f"{each['policy_tokens']:.0f}"] for each in r["main"]]
    compare = [
        [f"{a} - {b}", f"{t['difference']:+.3f} [{t['low']:+.3f}, {t['high']:+.3f}]", p_value(t["p"]),
         " / ".join(f"{s['difference']:+.3f} ({p_value(s['p'])})" for s in t["by_seed"])]
        for (a, b), t in tests.items()
    ]  # fmt: skip
    objectives = [
        [o["pair"], share(o["best"]), share(o["vote"]), share(o["beam"]), f"{o['steps']['f1']:.3f}",
         p_value(o["against_majority"]["p"]), p_value(o["beam_against_best"]["p"])]
        for o in r["objectives"]
    ]  # fmt: skip
    sweep = [
        [str(problems)]
        + [
            next((share(s) for s in r["sweep"] if (s["problems"], s["responses"]) == (problems, k)), "")
            for k in p.sweep_responses
        ]
        for problems in p.sweep_problems
    ]
    steps = [
        [s["pair"], f"{s['f1']:.3f} ({by_seed(s['f1_by_seed'])})", f"{s['first_wrong']:.3f}", f"{s['all_right']:.3f}",
         f"{s['lowest_is_an_error']:.3f}", f"{s['single_error_found']:.3f}"]
        for s in r["steps"]
    ]  # fmt: skip
    chance = r["steps"][0]["chance"]
    steps.append(
        ["chance", f"{chance['f1']:.3f}", "", "", f"{chance['lowest_is_an_error']:.3f}",
         f"{chance['single_error_found']:.3f}"]
    )  # fmt: skip
    training = r["seeds"][str(p.seeds[0])]["training"]
    recipes = [
        [name, str(note["data"]["responses"]), str(note["data"]["items"]), str(note["metrics"]["steps"])]
        for name, note in training.items()
    ]
    gates = " / ".join(f"{s['policy']['gate_ratios'][-1]:.3f}" for s in r["seeds"].values())
    cpu = " / ".join(f"{s['cpu_seconds'] / 60:.1f}" for s in r["seeds"].values())
    rates = table(["", *[f"seed {s}" for s in p.seeds]],
                  [[name, *[f"{value:.3f}" for value in values]] for name, values in r["rates"].items()])  # fmt: skip
    return f"""# The method on the demo's task

Made by `make report`; `report.json` has every figure. {r["task"]}

Each of the seeds {seeds} has a policy, rollouts, PRMs and {p.test_problems} test problems of its own; intervals are
Wilson's, 95 %, over the problems of all seeds; p is of a paired bootstrap over problems (10 000 resamples, two-sided).
"right" is a right final answer; chance is 0.1. The protocol is at the end.

{rates}
## Search and votes with an implicit PRM (CE)

Majority, best-of-{n} and the weighted vote (softmax of q) choose among the same {n} samples; the beam
({p.width} x {p.expansions}) may sample {p.budget} tokens, as many as the samples have.

{table(["", "right", f"seeds {seeds}", "policy tokens"], main)}
{table(["difference", "of the shares", "p", f"seeds {seeds} (p)"], compare)}
{figure("accuracy.png")}## Objectives, on the same rollouts

{p.problems} problems x {p.responses} responses; the last line has one response to each of as many problems as the others
have responses. Beams rank by the lowest step reward, on {p.beam_problems} problems a seed for all but ce. F1: see below.

{table(["objective", f"best-of-{n}", "weighted vote", "beam", "F1 of steps", "p, best-of against majority",
        "p, beam against best-of"], objectives)}
{figure("objectives.png")}## Problems x responses (CE, best-of-{n})

{table(["problems", *[f"{k} responses" for k in p.sweep_responses]], sweep)}
{figure("sweep.png")}## Without the reference (best-of-{n})

{table(["training / scoring", "right", f"seeds {seeds}"],
       [[f"{x['train']} reference / {x['infer']}" if x["train"] != "untrained" else "the policy's own log p", share(x),
         by_seed(x["by_seed"])] for x in r["reference"]])}
The layout is that of the paper's ablation. All test responses have the same length, so it does not matter which constant
stands in for the reference; training without one was not run.

## Finding the step that is wrong

One response with a wrong step and, where there is one, one without for each problem; F1 is ProcessBench's (the harmonic
mean of "first wrong step found exactly" and "right response let pass"): the first step whose reward is below a threshold,
which is fitted on the problems of the other parity. A step counts as wrong if it does not follow from the one before it.
Chance: the same with all step rewards shuffled, and the share of wrong steps.

{table(["step reward of", "F1 (seeds)", "first wrong step found", "right let pass", "lowest step is wrong",
        "the only error found"], steps)}
## Protocol

* Seeds {seeds} were fixed before any of them was run, and none was left out or run again. A policy passes the gate when
  its loss on fresh demonstrations of the test length is below 1.15 times their entropy: {gates}.
* Learning rates and epochs were chosen on seed 101, which is not reported, on problems of the split "gate": rates
  {", ".join(f"{name} {rate:g}" for name, rate in p.rates.items())}; {p.epochs["ce"]:g} epochs, at least {p.least_steps}
  steps; AdamW, linear decay, batch {p.batch}; beta 0.05, ipvrm 10. Everything else is the default of
  `prm-search train`.
* Rollouts are of problems with 2 to 4 steps, tests of {p.test_length}: a PRM trained on long ones, of which few are right, is
  worse on this task. Responses are sampled at temperature 1 by `prm-search rollout`, PRMs trained by `prm-search train`,
  on outcome labels alone.
* The task was made for this: with random instead of systematic errors majority voting is hard to beat.

Items of each run (seed {p.seeds[0]}; dpo and nca have pairs):

{table(["run", "responses", "items", "steps"], recipes)}
CPU minutes of each seed, one thread: {cpu}. Versions: {", ".join(f"{k} {v}" for k, v in r["versions"].items())}.
"""
