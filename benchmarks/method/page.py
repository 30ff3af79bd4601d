"""The report's page, from report.json's figures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from protocol import Protocol


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; all columns but the first are numbers."""
    rule = ["---", *["---:"] * (len(head) - 1)]
    return "".join("| " + " | ".join(line) + " |\n" for line in (head, rule, *rows))


def share(each: Mapping[str, Any]) -> str:
    """A share of right answers and its interval."""
    return f"{each['accuracy']:.3f} [{each['low']:.3f}, {each['high']:.3f}]"


def by_seed(values: Sequence[float]) -> str:
    """Each seed's figure."""
    return " / ".join(f"{value:.3f}" for value in values)


def p_value(p: float) -> str:
    """A p-value of 10 000 resamples: it cannot be below 0.0002."""
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def versus(t: Mapping[str, Any]) -> str:
    """A paired difference with its interval, and p."""
    return f"{t['difference']:+.3f} [{t['low']:+.3f}, {t['high']:+.3f}], p {p_value(t['p'])}"


def markdown(r: Mapping[str, Any], p: Protocol, plots: Sequence[str]) -> str:
    """The page."""
    parts = [_head(r, p), _main(r, p), _objectives(r, p), _sweep(r, p), _reference(r, p), _steps(r), _protocol(r, p)]
    for place, name in ((1, "accuracy.png"), (2, "objectives.png"), (3, "sweep.png")):
        if name in plots:
            parts[place] = parts[place].rstrip("\n") + f"\n\n![{name.removesuffix('.png')}]({name})\n"
    return "\n\n".join(part.strip("\n") for part in parts) + "\n"


def _seeds(p: Protocol) -> str:
    return ", ".join(map(str, p.seeds))


def _head(r: Mapping[str, Any], p: Protocol) -> str:
    rates = table(
        ["", *[f"seed {seed}" for seed in p.seeds]],
        [[name, *[f"{value:.3f}" for value in values]] for name, values in r["rates"].items()],
    )
    return f"""# The method on the demo's task

Made by `make report`; `report.json` has every figure. {r["task"]}

Each of the seeds {_seeds(p)} has a policy, rollouts, PRMs and {p.test_problems} test problems of its own. Intervals are
Wilson's, 95 %, over the problems of all seeds; p is of a paired bootstrap over problems (10 000 resamples, two-sided).
Both take the models of the {len(p.seeds)} seeds as given: how much a figure moves when everything is trained anew, only
the columns of seeds show. No p is corrected for how many there are.
"Right" is a right final answer; a guess is right once in ten times. The protocol is at the end.

Of single samples:

{rates}"""


def _differences(t: Mapping[str, Any]) -> str:
    return " / ".join(f"{each['difference']:+.3f} (p {p_value(each['p'])})" for each in t["by_seed"])


def _main(r: Mapping[str, Any], p: Protocol) -> str:
    lines = [
        [each["line"], share(each), by_seed(each["by_seed"]), f"{each['policy_tokens']:.0f}"] for each in r["main"]
    ]
    tests = [
        [
            f"{t['a']} against {t['b']}",
            f"{t['difference']:+.3f} [{t['low']:+.3f}, {t['high']:+.3f}]",
            p_value(t["p"]),
            _differences(t),
        ]
        for t in r["tests"]
    ]
    return f"""## Votes and search with an implicit PRM (CE)

Majority, best-of-{p.samples} and the weighted vote (softmax of q) choose among the same {p.samples} samples. The beam
({p.width} x {p.expansions}) may sample {p.budget} tokens, as many as the samples have. In brackets: the pair.

{table(["", "right", f"seeds {_seeds(p)}", "policy tokens"], lines)}
{table(["", "difference of the shares", "p", f"seeds {_seeds(p)}"], tests)}"""


def _objectives(r: Mapping[str, Any], p: Protocol) -> str:
    lines = [
        [
            each["pair"],
            share(each["best"]),
            share(each["vote"]),
            share(each["beam"]),
            f"{each['steps']['f1']:.3f}",
            f"{each['steps']['lowest_is_wrong']:.3f}",
            p_value(each["against_majority"]["p"]),
            p_value(each["beam_against_best"]["p"]),
        ]
        for each in r["objectives"]
    ]
    head = ["objective", f"best of {p.samples}", "weighted vote", "beam by q", "F1 of steps", "lowest step is wrong"]
    head += ["p: best of n, majority", "p: beam, best of n"]
    one = table(
        ["CE on problems x responses", f"best of {p.samples}"],
        [
            [each["line"].partition("(ce ")[2].rstrip(")") or f"{p.problems} x {p.responses}", share(each)]
            for each in r["one_response"]
        ],
    )
    return f"""## Objectives on the same rollouts

{p.problems} problems x {p.responses} responses. "With negatives": {p.negatives:g} responses to other problems for each
response, as wrong ones (RRM). The last line has one response to each of as many problems as the others have responses.
Beams are run on {p.beam_problems} problems a seed (ce: on all). The columns about steps are explained below.

{table(head, lines)}
One response a problem, with the same problems and with the same number of responses:

{one}
The beam by q of the last line against that of ce, on the {r["one_response_beam"]["problems"]} problems that both were
run on: a difference of {versus(r["one_response_beam"])}; seeds {_seeds(p)}: {_differences(r["one_response_beam"])}."""


def _sweep(r: Mapping[str, Any], p: Protocol) -> str:
    cells = {(each["problems"], each["responses"]): share(each) for each in r["sweep"]}
    lines = [[str(n), *[cells.get((n, k), "not run") for k in p.sweep_responses]] for n in p.sweep_problems]
    return f"""## Problems x responses (CE, best of {p.samples})

{table(["problems", *[f"{k} response" + "s" * (k > 1) for k in p.sweep_responses]], lines)}
The diagonals have the same number of responses. Runs on few responses make more passes over them, {p.least_steps} steps
at least (the protocol has the numbers)."""


def _reference(r: Mapping[str, Any], p: Protocol) -> str:
    lines = [
        [
            "the policy's own log p" if each["train"] == "untrained" else f"with / {each['infer']}",
            share(each),
            by_seed(each["by_seed"]),
            "not run" if each["beam"] is None else share(each["beam"]),
        ]
        for each in r["reference"]
    ]
    lengths = r["main"][0]["policy_tokens"] / p.samples
    return f"""## Without the reference (CE)

{table(["training / scoring", f"best of {p.samples}", f"seeds {_seeds(p)}", "beam by q"], lines)}
The layout is that of the paper's ablation (arXiv 2412.01981, table 5). Nearly all test responses have the
{p.test_length * p.tokens_per_step} tokens of a well-formed one ({lengths:.1f} on average), so for best-of-n it hardly
matters which constant stands in for the reference, and 0 does; the beam's is fitted on rollouts
(`ConstantReference.fit`), and it is run on {p.beam_problems} problems a seed; on those, it differs from the beam with
the reference by {versus(r["reference_beam"])}. Steps are equally long too, which is what a
constant asks for. Training without a reference was not run."""


def _steps(r: Mapping[str, Any]) -> str:
    lines = [
        [
            each["pair"],
            f"{each['f1']:.3f} ({by_seed(each['f1_by_seed'])})",
            *(
                f"{each[name]:.3f}"
                for name in ("first_wrong", "right_passed", "auc", "lowest_is_wrong", "only_error_found")
            ),
        ]
        for each in r["steps"]
    ]
    chance = [f"{r['steps'][0]['chance'][name]:.3f}" for name in ("f1", "lowest_is_wrong", "only_error_found")]
    lines.append(["chance", chance[0], "", "", "0.500", *chance[1:]])
    head = ["step reward of", "F1 (seeds)", "first wrong step found", "right response let pass", "AUC of steps"]
    return f"""## Finding the step that is wrong

For each problem one response with a wrong step and, where there is one among the samples, one without:
{r["steps"][0]["responses"]} responses. F1 is ProcessBench's (arXiv 2412.06559), the harmonic mean of "first wrong step
found exactly" and "right response let pass", for the rule "the first step whose reward is below a threshold"; each
fifth of the problems is judged by the threshold that is best on the others (`prm_search.evaluation.step_errors`). A
step is wrong if it does not follow from the one before it. "Lowest step is wrong" asks whether the step with the least
reward is any of the wrong ones, of which there are often several; "the only error found" the same of responses with
one. Chance: F1 with the rewards of all steps shuffled, and a step picked at random.

{table([*head, "lowest step is wrong", "the only error found"], lines)}"""


def _protocol(r: Mapping[str, Any], p: Protocol) -> str:
    gates = " / ".join(f"{each['policy']['gate_ratios'][-1]:.3f}" for each in r["seeds"].values())
    minutes = " / ".join(f"{each['cpu_seconds'] / 60:.1f}" for each in r["seeds"].values())
    runs = [
        [name, str(note["data"]["responses"]), str(note["data"]["items"]), str(note["metrics"]["steps"])]
        for name, note in r["seeds"][str(p.seeds[0])]["training"].items()
    ]
    many = sum(count for _, count in p.single)
    versions = ", ".join(f"{name} {number}" for name, number in r["versions"].items())
    return f"""## Protocol

* The seeds {_seeds(p)} were fixed before any of them was run; none was left out or run again. A policy passes the gate
  when its loss on fresh demonstrations of the test length is below 1.15 times their entropy; it was
  {gates} times.
* The learning rate was chosen on seed {p.development}, which is not reported, with problems of the split "gate" (see
  [development.md](development.md)): {p.rate:g} for all objectives. {p.epochs:g} epochs, but at least {p.least_steps}
  steps; AdamW, linear decay, batch {p.batch}; beta 0.05, ipvrm 10. The rest is as `prm-search train` has it.
* Rollouts are of problems with 2 to 4 steps, tests of problems with {p.test_length}: too few long answers are right to
  learn from. Samples are drawn at temperature 1 by `prm-search rollout`, PRMs trained by `prm-search train` on outcome
  labels alone.
* Every run was made once, stage by stage, from copies of these scripts, while code around them was still being changed;
  the tables are the final code's. Two things were added to the report after the other figures of seed 11 had been
  seen, and nothing was taken out: the run with negatives, and the beam without the reference. Two paired tests of runs
  that were there were added when all figures were known: the beam of ce against that without the reference, and against
  that of {many} x 1.
* The task was made for this: with random errors in the place of systematic ones, majority voting is hard to beat.

Seed {p.seeds[0]}'s runs (dpo and nca have pairs of responses as items):

{table(["run", "responses", "items", "steps"], runs)}
CPU minutes of the seeds, on one thread: {minutes}. Versions: {versions}.
"""
