"""report.json, report.md and plots of finished seeds."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from figures import compared, located, measure, pooled
from page import markdown
from plots import plot
from protocol import NEGATIVES, POLICY, WITHOUT, Protocol

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
             "vote": pooled(seeds, f"weighted {n} q ({name})"), "beam": pooled(seeds, f"beam q ({name})"),
             "steps": located(seeds, name),
             "against_majority": compared(seeds, f"best_of_n {n} q ({name})", majority),
             "beam_against_best": compared(seeds, f"beam q ({name})", f"best_of_n {n} q ({name})")}
            for name in [*OBJECTIVES, NEGATIVES, ones[1]]
        ],
        "one_response": [pooled(seeds, f"best_of_n {n} q ({name})") for name in ["ce", *ones]],
        "one_response_beam": compared(seeds, f"beam q ({ones[1]})", "beam q (ce)"),
        "sweep": [
            {"problems": problems, "responses": responses, **pooled(seeds, f"best_of_n {n} q ({name})")}
            for problems in p.sweep_problems
            for responses in p.sweep_responses
            if (name := "ce" if (problems, responses) == (p.problems, p.responses) else f"ce {problems} x {responses}")
            in seeds[0].training
        ],
        "reference": [
            {"train": "with", "infer": "with", **pooled(seeds, best), "beam": pooled(seeds, "beam q (ce)")},
            {"train": "with", "infer": "without", **pooled(seeds, f"best_of_n {n} q ({WITHOUT})"),
             "beam": pooled(seeds, f"beam q ({WITHOUT})")},
            {"train": "untrained", "infer": "without", **pooled(seeds, f"best_of_n {n} q ({POLICY})"), "beam": None},
        ],
        "reference_beam": compared(seeds, f"beam q ({WITHOUT})", "beam q (ce)"),
        "steps": [located(seeds, name) for name in ("ce", POLICY)],
        "versions": {name: version(name) for name in ("prm-search", "torch", "transformers", "accelerate")}
        | {"python": platform.python_version()},
    }  # fmt: skip
    report = rounded(report)
    out.mkdir(parents=True, exist_ok=True)
    (out / "report.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    (out / "report.md").write_text(markdown(report, p, plot(report, p, out)), encoding="utf-8")
    return report


def rounded(given: Any) -> Any:
    """Floats with the digits that mean something."""
    if isinstance(given, float):
        return float(f"{given:.5g}")
    if isinstance(given, Mapping):
        return {name: rounded(value) for name, value in given.items()}
    return [rounded(each) for each in given] if isinstance(given, list | tuple) else given
