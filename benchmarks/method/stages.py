"""The stages of one seed: policy, rollouts, PRMs, samples, their log-probabilities, beams. What is finished is kept."""

from __future__ import annotations

import json
import os
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import lineup
import numpy as np
import torch
from lineup import Entry
from protocol import WITHOUT, Protocol, Run
from transformers import AutoModelForCausalLM

from prm_search import Beam, Budget, ConstantReference, DraftPolicy, ImplicitPRM, StepRule, search
from prm_search.cli import main as command
from prm_search.commands.models import load_pair, load_policy
from prm_search.demo import tokenizer
from prm_search.demo.chains import DELIMITER, Problem, answer, problems
from prm_search.demo.comparison import as_problems, judge
from prm_search.demo.learn import PolicyRecipe, train_policy
from prm_search.evaluation.tuning.guidance import plain_config, read_config
from prm_search.evaluation.tuning.pick import Table, pick_within
from prm_search.evaluation.tuning.run import Bench
from prm_search.evaluation.tuning.trials import Trial
from prm_search.protocols import Sampling
from prm_search.scorers.implicit.card import CARD
from prm_search.strategies import BestOfN
from prm_search.training.data import read_rollouts
from prm_search.training.logprobs import response_forward, row_logprobs
from prm_search.training.run import train

Log = Callable[[str], object]
CHUNK = 50  # problems of one record of beams
DRAFT_WIDTH = 64  # of the draft's hidden states; the policy's are 96 wide


class Seed:
    """Everything of one seed, in a folder of its own.

    Args:
        seed: of policy, rollouts, training and test problems.
        folder: where its stages lie.
        protocol: the sizes.
        recipe: of the policy.
        log: is called with a line now and then.
    """

    def __init__(self, seed: int, folder: Path, protocol: Protocol, recipe: PolicyRecipe, log: Log) -> None:
        self.seed, self.folder, self.protocol, self.recipe = seed, folder, protocol, recipe
        began = time.process_time()
        self.log = lambda line: log(f"[seed {seed}, {time.process_time() - began:6.1f} s] {line}")
        folder.mkdir(parents=True, exist_ok=True)

    def run(self) -> None:
        """All stages that are not finished."""
        self.policy()
        self.asked = self.test_problems()
        for name, n, asked in self.rollout_files():
            self.rollouts(name, n, asked)
        self.log_probs("policy", self.folder / "policy")
        for each in self.protocol.runs(self.seed):
            self.prm(each)
            self.log_probs(each.name, self.path(each))
        for each in self.protocol.runs(self.seed):
            for value in each.beams:
                self.beams(each.name, self.path(each), value)
        self.beams(WITHOUT, self.path(self.protocol.runs(self.seed)[0]), "q")

    def path(self, run: Run) -> Path:
        """A PRM's folder."""
        return self.folder / "prms" / run.name.replace(" ", "-")

    # -- stages --------------------------------------------------------------------------------------------------------

    def policy(self) -> None:
        """Train the policy until its loss passes the gate."""
        with self._stage("policy", asdict(self.recipe)) as note:
            if note is None:
                return
            model, learnt = train_policy(self.seed, self.recipe, self.log)
            model.save_pretrained(self.folder / "policy")
            tokenizer.build().save_pretrained(self.folder / "policy")
            note |= learnt

    def rollout_files(self) -> Iterator[tuple[str, int, list[Problem]]]:
        """Name, responses a problem, and problems of each file of samples."""
        p = self.protocol
        trained = self.mixed("prm", self.seed, p.lengths)
        yield "rollouts", p.responses, trained
        yield "sweep", max(p.sweep_responses), trained[: max(n for n in p.sweep_problems if n < p.problems)]
        yield "single", 1, self.mixed("prm", self.seed + 1000, p.single)
        yield "samples", p.samples, self.test_problems()

    def test_problems(self) -> list[Problem]:
        """Held-out problems: of a split that no model was trained or gated on."""
        p = self.protocol
        return problems(p.test_problems, split="test", seed=self.seed, length=p.test_length)

    def mixed(self, split: str, seed: int, lengths: tuple[tuple[int, int], ...]) -> list[Problem]:
        """Problems of several lengths in random order, so that the first k are a fair draw of them."""
        found = [each for length, n in lengths for each in problems(n, split=split, seed=seed, length=length)]
        random.Random(f"method/{seed}").shuffle(found)
        return found

    def rollouts(self, name: str, n: int, asked: list[Problem]) -> None:
        """`prm-search rollout`, as a user would."""
        out = self.folder / f"{name}.jsonl"
        with self._stage(name, [n, len(asked)]) as note:
            if note is None:
                return
            data = self.folder / f"{name}-problems.jsonl"
            lines = (json.dumps({"prompt": each.prompt, "answer": each.answer}) + "\n" for each in asked)
            data.write_text("".join(lines), encoding="utf-8")
            args = [
                "rollout",
                "--policy",
                str(self.folder / "policy"),
                "--data",
                str(data),
                "--out",
                str(out),
                "--resume",
            ]
            args += ["--n", str(n), "--label", "exact", "--answer", "prm_search.demo.chains:answer"]
            args += ["--max-new-tokens", "48", "--seed", str(self.seed), "--batch", "64"]
            if command(args):
                raise RuntimeError(f"prm-search {' '.join(args)} failed")
            rows = read_rollouts(out)
            note |= {"responses": len(rows), "right": sum(row.label for row in rows)}

    def prm(self, run: Run) -> None:
        """`prm-search train`'s function: a PRM of one recipe."""
        with self._stage(f"prm {run.name}", asdict(run.recipe)) as note:
            if note is None:
                return
            card = self.path(run) / CARD
            if not card.is_file():  # it is there where the run was stopped before it had filed its note
                train(
                    str(self.folder / "policy"),
                    self.folder / f"{run.rollouts}.jsonl",
                    self.path(run),
                    run.recipe,
                    resume=True,
                    delimiter=DELIMITER,
                    arguments=self.protocol.arguments,
                )
            made = json.loads(card.read_text(encoding="utf-8"))
            note |= {"data": made["data"], "metrics": made["metrics"]}

    def log_probs(self, name: str, model: Path) -> None:
        """Log-probabilities of all samples' tokens under a model: everything about samples is read off these."""
        path = self.folder / f"logprobs-{model.name}.npz"
        with self._stage(f"logprobs {name}", model.name) as note:
            if note is None:
                return
            rows = read_rollouts(self.folder / "samples.jsonl")
            lm = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
            with response_forward(lm):
                values = row_logprobs(lm, rows)
            part = path.with_suffix(".part.npz")
            np.savez(part, logprobs=np.concatenate(values))
            os.replace(part, path)

    def beams(self, name: str, model: Path, value: str) -> None:
        """Step beams with a PRM, within the policy tokens of the samples."""
        p = self.protocol
        with self._stage(f"beam {name} {value}", None) as note:
            if note is None:
                return
            policy = load_policy(str(self.folder / "policy"), device="cpu")
            pair: ImplicitPRM = load_pair(str(model), None, None, device="cpu")
            if name == WITHOUT:
                few = read_rollouts(self.folder / "rollouts.jsonl")[:256]
                responses = [row.response_ids.tolist() for row in few]
                lm = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
                constant = ConstantReference.fit(
                    lm, [row.prompt_ids for row in few], responses, tokenizer=tokenizer.build()
                )
                pair = ImplicitPRM.from_pretrained(model, constant)
                note["constant"] = constant.logprob
            asked = self.asked if name == "ce" else self.asked[: p.beam_problems]
            right: list[bool] = []
            tokens: list[int] = []
            for place in range(0, len(asked), CHUNK):
                chunk = asked[place : place + CHUNK]
                results = search(
                    [each.prompt for each in chunk], policy=policy, scorer=pair,
                    strategy=Beam(p.width, p.expansions, value=value), steps=StepRule(DELIMITER, max_tokens=8),
                    max_new_tokens=48, temperature=1.0, seed=self.seed, budget=Budget(tokens=p.budget),
                )  # fmt: skip
                for each, result in zip(chunk, results, strict=True):
                    ended = result.node is not None and result.node.finish == "stop"
                    right.append(ended and answer(result.text) == each.answer)
                    tokens.append(result.usage.sampled_tokens["policy"])
            note |= {"right": right, "policy_tokens": tokens}

    # -- all strategies -----------------------------------------------------------------------------------------------

    def strategies(self) -> None:
        """Everything that the comparison of strategies needs: policy, one PRM, every line, and what tune finds."""
        p = self.protocol
        self.policy()
        self.rollouts(*next(self.rollout_files()))
        run = p.runs(self.seed)[0]
        self.prm(run)
        self.asked = self.test_problems()
        tokens, sizes = p.test_length * p.tokens_per_step, p.strategy_sizes or lineup.SIZES
        for entry in lineup.entries(tokens, p.test_length, sizes):
            self.line(entry, self.path(run))
        self.tuned(self.path(run))
        self.draft()
        for entry in lineup.drafted(tokens, sizes):
            self.line(entry, self.path(run))

    def draft(self) -> None:
        """Train the draft: a narrower policy, by the policy's recipe."""
        with self._stage("draft", [asdict(self.recipe), DRAFT_WIDTH]) as note:
            if note is None:
                return
            model, learnt = train_policy(self.seed, self.recipe, self.log, width=DRAFT_WIDTH)
            model.save_pretrained(self.folder / "draft")
            tokenizer.build().save_pretrained(self.folder / "draft")
            note |= learnt | {"parameters": model.num_parameters()}

    def bench(self, model: Path, *, draft: bool = False) -> Bench:
        """The models of the comparison, ready to search."""
        sampling = Sampling(StepRule(DELIMITER, max_tokens=8), max_new_tokens=48, temperature=1.0, seed=self.seed)
        policy = load_policy(str(self.folder / "policy"), device="cpu")
        pair = load_pair(str(model), None, None, device="cpu")
        if draft:
            small = load_policy(str(self.folder / "draft"), device="cpu")
            both = DraftPolicy(small, policy, pair, lineup.ACCEPT)
            return Bench(both, {"prm": pair}, judge, answer, sampling, batch=CHUNK)
        return Bench(policy, {"prm": pair}, judge, answer, sampling, batch=CHUNK)

    def line(self, entry: Entry, model: Path) -> None:
        """One line at one size: outcomes, tokens, and CPU seconds of a problem."""
        asked = self.asked[: min(lineup.PROBLEMS, self.protocol.strategy_problems)]
        settings = [repr(entry.trial), len(asked)]
        with self._stage(f"strategy {entry.name.replace(',', '')} {entry.size}", settings) as note:
            if note is None:
                return
            bench = self.bench(model, draft=entry.draft)
            began = time.process_time()
            records = sorted(bench.records([entry.trial], as_problems(asked)), key=lambda r: r["problem"])
            seconds = (time.process_time() - began) / len(records)
            note["ways"] = {
                name: {key: [record["ways"][way][key] for record in records] for key in records[0]["ways"][way]}
                | {"seconds": seconds}
                for way, name in enumerate(entry.names)
            }

    def tuned(self, model: Path) -> None:
        """The picks of `tune` for each budget on other problems, and how they do on the test problems."""
        p = self.protocol
        grid = lineup.grid() if p.strategy_budgets is None else replace(lineup.grid(), budgets=p.strategy_budgets)
        other = as_problems(problems(p.tuned_on, split="gate", seed=self.seed, length=p.test_length))
        with self._stage("tune", [repr(grid), len(other)]) as note:
            if note is not None:
                bench = self.bench(model)
                scale = bench.scale(other, grid.values)
                trials = grid.trials(scale, ["prm"])
                table = Table.of(trials, bench.records(trials, other), len(other))
                note["scale"], note["tried"] = scale.card(), len(table.configs)
                note["picks"] = []
                for budget in grid.budgets:
                    choice, judged = pick_within(table, scale, tokens=budget)
                    note["picks"].append({"budget": budget, "title": choice.config.title(), "judged": judged,
                                          "config": plain_config(choice.config)})  # fmt: skip
        picks = json.loads((self.folder / "stages" / "tune.json").read_text(encoding="utf-8"))["picks"]
        for found in picks:
            config = read_config(found["config"])
            whole = isinstance(config.strategy, BestOfN)
            trial = Trial(
                config.strategy, None if whole else "prm", None if whole else config.value,
                None if whole else config.tokens, (config,),
            )  # fmt: skip
            self.line(Entry("tune", found["budget"], trial, ("tune",)), model)

    def _stage(self, name: str, settings: Any) -> Stage:
        return Stage(self.folder / "stages" / f"{name.replace(' ', '-')}.json", name, settings, self.log)


class Stage:
    """`with Stage(...) as note:` gives None where the stage is finished, else a dict, which is filed at its end.

    Raises:
        ValueError: it was finished with other settings.
    """

    def __init__(self, path: Path, name: str, settings: Any, log: Log) -> None:
        self.path, self.name, self.log = path, name, log
        self.settings = json.loads(json.dumps(settings))
        self.note: dict[str, Any] = {}
        self.began = time.process_time()

    def __enter__(self) -> dict[str, Any] | None:
        if self.path.is_file():
            if json.loads(self.path.read_text(encoding="utf-8"))["settings"] != self.settings:
                raise ValueError(f"{self.path}: of other settings; name another --work")
            self.began = -1.0
            return None
        self.began = time.process_time()
        return self.note

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        if kind is not None or self.began < 0:
            return
        spent = round(time.process_time() - self.began, 1)
        self.path.parent.mkdir(exist_ok=True)
        part = self.path.with_suffix(".part")
        part.write_text(
            json.dumps({"settings": self.settings, **self.note, "cpu_seconds": spent}) + "\n", encoding="utf-8"
        )
        os.replace(part, self.path)  # whole or not at all
        self.log(f"{self.name}: {spent} s")
