"""Votes over rollouts, scored in packs: ``python score.py --pair PRM --rollouts F --out FOLDER``.

`prm-search eval` scores a problem at a time, as its searches go; where the responses exist, many problems' trees of
tokens make one forward, and the reference's half is in the rollouts. It makes records of the form that eval makes, with
majority, best-of-n and the weighted vote, and their report. Stopped, it goes on.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from prm_search.evaluation.plan import Plan
from prm_search.evaluation.report import write_report
from prm_search.evaluation.samples import Cost, Sample, record_of

TOGETHER = 16  # problems of a forward


def lines(path: Path) -> list[dict[str, Any]]:
    """Return the records of a JSON Lines file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def groups(records: Iterable[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """Return the responses of each problem, in the order of draws."""
    by_problem: dict[int, list[dict[str, Any]]] = {}
    for record in sorted(records, key=lambda each: each["index"]):
        by_problem.setdefault(record["problem"], []).append(record)
    return list(by_problem.values())


def complete(file: Path) -> list[list[dict[str, Any]]]:
    """Return the responses of the problems that have all of theirs, as many as the first one has."""
    of_problems = groups(lines(file))
    return [group for group in of_problems if len(group) == len(of_problems[0])]


def score(pair: Path, of_problems: Sequence[Sequence[dict[str, Any]]], out: Path) -> None:
    """Append the rewards of each problem's responses to a JSON Lines file, those that it lacks."""
    import torch
    from transformers import AutoModelForCausalLM

    from prm_search.training.data import LabelledResponse
    from prm_search.training.logprobs import response_forward, row_logprobs

    done = {record["problem"] for record in lines(out)} if out.exists() else set()
    left = [group for group in of_problems if group[0]["problem"] not in done]
    beta = json.loads((pair / "pair.json").read_text(encoding="utf-8"))["beta"]
    module = AutoModelForCausalLM.from_pretrained(pair, dtype=torch.float32)
    with response_forward(module), out.open("a", encoding="utf-8") as file:
        for start in range(0, len(left), TOGETHER):
            some = left[start : start + TOGETHER]
            rows = [
                LabelledResponse(tuple(each["prompt_ids"]), each["response_ids"], bool(each["label"]))
                for group in some
                for each in group
            ]
            logprobs = iter(row_logprobs(module, rows, pack=1 << 20))
            for group in some:
                q = [beta * float((next(logprobs) - each["logprobs"]).sum()) for each in group]
                file.write(json.dumps({"problem": group[0]["problem"], "q": q}) + "\n")
            file.flush()


def new_tokens(group: Sequence[dict[str, Any]]) -> Iterator[int]:
    """Yield how many tokens of each response no earlier one begins with."""
    seen: set[tuple[int, ...]] = set()
    for each in group:
        ids = tuple(each["response_ids"])
        begins = {ids[:end] for end in range(1, len(ids) + 1)}
        yield len(begins - seen)
        seen |= begins


def records(
    of_problems: Sequence[Sequence[dict[str, Any]]], scores: Path, temperature: float = 1.0, seed: int = 0
) -> list[dict[str, Any]]:
    """Return a record a problem, as `prm-search eval` has them."""
    rewards = {record["problem"]: record["q"] for record in lines(scores)}
    n = len(of_problems[0])
    plan = Plan(("majority", "best_of_n", "weighted"), [n], [seed], weight_temperature=temperature)
    made = []
    for place, group in enumerate(of_problems):
        samples = [
            Sample(
                each["response"], each["answer"], bool(each["label"]), len(each["response_ids"]), fresh, each["finish"],
                {"prm": {"q": q}},
            )
            for each, fresh, q in zip(group, new_tokens(group), rewards[group[0]["problem"]], strict=True)
        ]  # fmt: skip
        prompt = len(group[0]["prompt_ids"])
        cost = Cost(prompt + sum(sample.new_tokens for sample in samples), 0, 0.0)
        record = record_of(samples, {"prm": cost}, plan, prompt_tokens=prompt)
        made.append({"index": place, "kind": "samples", "problem": group[0]["problem"], "seed": seed, **record})
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    """Write scores.jsonl, records.jsonl, report.md and report.json. Returns the exit status."""
    command = argparse.ArgumentParser(description="Votes over rollouts, scored in packs.")
    for name, what in (("pair", "folder"), ("rollouts", "of the pair's reference"), ("out", "folder")):
        command.add_argument(f"--{name}", type=Path, required=True, help=what)
    command.add_argument("--temperature", type=float, default=1.0, help="of the weighted vote")
    command.add_argument("--seed", type=int, default=0, help="of the rollouts, for the report")
    chosen = command.parse_args(arguments)
    chosen.out.mkdir(parents=True, exist_ok=True)
    of_problems = complete(chosen.rollouts)
    score(chosen.pair, of_problems, chosen.out / "scores.jsonl")
    made = records(of_problems, chosen.out / "scores.jsonl", chosen.temperature, chosen.seed)
    (chosen.out / "records.jsonl").write_text("".join(json.dumps(each) + "\n" for each in made), encoding="utf-8")
    write_report(made, chosen.out)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
