"""evaluate: draw, score, choose and search, one record as each piece of it is finished."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from typing import Any

from ..answers import Answer, resolve_answer
from ..checks import require
from ..driver.budget import Budget
from ..driver.loop import Job, SearchLoop
from ..driver.participants import Participants
from ..driver.result import Result
from ..driver.search_settings import SearchSettings
from ..problems import Problem, final_answer
from ..protocols import Policy, PolicyBase, RequestFailed, Scorer, ScorerDefaults
from ..rng import child_lineage
from ..search import encode_all
from ..strategies import BestOfN
from ..tree import Node, Prompt, SearchTree
from ..usage import Meter, Usage
from .plan import Plan, Unit, own_value
from .samples import Cost, Judge, Judging, Sample, new_tokens, record_of, scorer_tokens, tokens_of

Record = dict[str, Any]


def evaluate(
    problems: Sequence[Problem],
    *,
    policy: Policy,
    scorers: Scorer | Sequence[Scorer] = (),
    plan: Plan,
    judge: Judge,
    answer: str | Answer | None = None,
    done: Mapping[int, Record] | None = None,
    batch: int = 32,
    on_result: Callable[[Unit, Result], object] | None = None,
    on_failure: Callable[[Unit, Result], object] | None = None,
) -> Iterator[Record]:
    """Answer problems by each strategy of a plan; a record is given out as soon as it is finished.

    The samples of a problem under a seed are drawn once, at the largest budget, and scored once by each scorer. Every
    strategy that votes chooses among them, at every budget. Sample k is what `search` with BestOfN draws as its k-th.
    Each search of beam or lookahead draws its own steps, within the tokens of the samples it is compared with. Every
    draw is a function of seed, prompt and place alone, so what `done` and `batch` say changes no record but its
    seconds.

    Args:
        problems: prompts and their right answers.
        policy: samples; not to be used for anything else meanwhile.
        scorers: the pairs and other scorers to compare, of distinct names, over the same samples; none where no
            strategy needs one.
        plan: see Plan.
        judge: of a complete response's text and the right answer: the answer found, and whether it is right; see
            problems.Judge. A response that was cut is wrong.
        answer: finds what a response votes for: "boxed", "####", "number", a function of its text; None for the first
            of "####", box and number that it has.
        done: records of an earlier run with the same arguments, by their index.
        batch: problems searched together.
        on_result: is called with each search that ends, samples included, before its record is given out. Use it for
            what a record does not keep, such as the tree.
        on_failure: is called with each search of which the policy gave up on a request, instead; it has no record, and
            neither have searches that its samples are the measure of. None to raise RequestFailed.

    Yields:
        Records, plain values: "index" is the place in `plan.units(len(problems), names)`, "kind", "problem" and "seed"
        are that unit's. Seconds are wall time, of forwards that searches share in equal parts. `summarise` reads them.

    Raises:
        ValueError: a prompt is empty or too long (the message names it), or scorers are missing or of one name. Raised
            before anything is sampled.
        TypeError: policy is not a Policy, or a scorer is not a Scorer.
    """
    pairs = [scorers] if isinstance(scorers, Scorer) else list(scorers)
    require("policy", policy, Policy)
    for scorer in pairs:
        require("scorers", scorer, Scorer)
    names = [scorer.name for scorer in pairs]
    check_scorers(plan, names)
    if isinstance(batch, bool) or not isinstance(batch, int) or batch < 1:
        raise ValueError(f"batch={batch!r}: an integer >= 1 is needed")
    plain_prompts = [problem.prompt for problem in problems]
    own = PolicyBase.of(policy)
    prompts = encode_all(plain_prompts, Participants(policy, own, None, None, None).encode)
    for scorer in pairs:  # whose context may be shorter
        encode_all(plain_prompts, Participants(policy, own, scorer, None, None).encode)
    extract = resolve_answer(answer) or final_answer
    judgings = {place: Judging(judge, extract, problem.answer) for place, problem in enumerate(problems)}
    by_name = {scorer.name: scorer for scorer in pairs}
    run = EvaluationPart(dict(enumerate(prompts)), judgings, policy, by_name, plan, batch, on_result, on_failure)
    units = dict(enumerate(plan.units(len(problems), names)))
    tokens = sampled_tokens(plan, units, done or {})
    return run.records({index: unit for index, unit in units.items() if index not in (done or {})}, tokens)


def check_scorers(plan: Plan, names: Sequence[str]) -> None:
    """Raises ValueError where a plan needs scorers and there are none, or two have one name."""
    if len(set(names)) < len(names):
        raise ValueError(f"scorers are named {list(names)}: each needs a name of its own (ImplicitPRM(..., name=...))")
    if plan.ranked and not names:
        raise ValueError(f"scorers is empty: {', '.join(plan.ranked)} need at least one")


#: Policy tokens of the first n samples: (problem, seed, n) -> tokens. What beam and lookahead may sample.
SampledTokens = dict[tuple[int, int | None, int], int]


def sampled_tokens(plan: Plan, units: Mapping[int, Unit], done: Mapping[int, Record]) -> SampledTokens:
    """The tokens of the samples among finished records, by the units of all records."""
    return {
        (units[index].problem, units[index].seed, n): tokens_of(record, n)
        for index, record in done.items()
        if units[index].kind == "samples"
        for n in plan.budgets
    }


@dataclass
class EvaluationPart:
    """An evaluation of some problems, or of all of them.

    Attributes:
        prompts: problem -> its prompt with token ids, and how many equal ones stand before it in the whole list.
        judgings: problem -> its rules.
        policy, plan, batch, on_result, on_failure: as of `evaluate`.
        scorers: by name.
    """

    prompts: Mapping[int, tuple[Prompt, int]]
    judgings: Mapping[int, Judging]
    policy: Policy
    scorers: Mapping[str, Scorer]
    plan: Plan
    batch: int
    on_result: Callable[[Unit, Result], object] | None = None
    on_failure: Callable[[Unit, Result], object] | None = None

    def records(self, units: Mapping[int, Unit], known: SampledTokens) -> Iterator[Record]:
        """Run units, which are in the plan's order by index.

        Args:
            units: index -> unit; a search stands behind the samples that it is compared with, or these are known.
            known: of samples that are finished already.
        """
        tokens = dict(known)
        # Units of one strategy, seed and pair run together.
        for (kind, _, cell), group in groupby(units.items(), _together):
            jobs = [self._job(index, unit, tokens) for index, unit in group if self._measured(unit, tokens)]
            scorer = None if cell is None or cell.pair is None else self.scorers[cell.pair]
            for job, result in run_searches(self.policy, scorer, jobs, self.batch):
                unit, seconds = units[job.place], job.seconds
                if result.failure is not None:
                    if self.on_failure is None:
                        raise RequestFailed(result.failure)
                    self.on_failure(unit, result)
                    continue
                head = {"index": job.place, "kind": unit.kind, "problem": unit.problem, "seed": unit.seed}
                if kind == "samples":
                    record = self._samples(unit, result, seconds)
                    for n in self.plan.budgets:
                        tokens[unit.problem, unit.seed, n] = tokens_of(record, n)
                else:
                    record = self._search(unit, job, result, seconds)
                if self.on_result is not None:
                    self.on_result(unit, result)
                yield head | record

    def _measured(self, unit: Unit, tokens: SampledTokens) -> bool:
        """Return True unless the samples that a search is to be compared with have failed."""
        if unit.kind != "search" or unit.cell is None or not self.plan.capped or self.on_failure is None:
            return True
        return (unit.problem, unit.seed, unit.cell.n) in tokens

    def _job(self, index: int, unit: Unit, tokens: SampledTokens) -> Job:
        prompt, occurrence = self.prompts[unit.problem]
        sampling, budget = self.plan.sampling(unit.seed or 0), Budget()
        if unit.kind == "search" and unit.cell is not None:
            strategy = self.plan.strategy(unit.cell)
            if self.plan.capped:
                budget = Budget(tokens=tokens[unit.problem, unit.seed, unit.cell.n])
        else:
            strategy = BestOfN(self.plan.most if unit.kind == "samples" else 1)
        settings = SearchSettings.make(
            strategy=strategy,
            steps=sampling.steps,
            max_new_tokens=sampling.max_new_tokens,
            temperature=0.0 if unit.kind == "greedy" else sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k,
            min_p=sampling.min_p,
            seed=sampling.seed,
            budget=budget,
        )
        return Job(prompt, settings, occurrence, index)

    def _samples(self, unit: Unit, result: Result, seconds: float) -> Record:
        samples, costs = read_samples(
            result, self.plan.most, policy=self.policy, scorers=self.scorers, values=self.plan.values,
            judging=self.judgings[unit.problem],
        )  # fmt: skip
        return record_of(samples, costs, self.plan, seconds=seconds, prompt_tokens=len(result.tree.prompt_ids))

    def _search(self, unit: Unit, job: Job, result: Result, seconds: float) -> Record:
        node, usage = result.node, result.usage
        answer, right = (None, False) if node is None else self.judgings[unit.problem](result.text, node.finish)
        scorer = None if unit.cell is None or unit.cell.pair is None else self.scorers[unit.cell.pair]
        return {
            **({"strategy": "greedy", "n": 1} if unit.cell is None else asdict(unit.cell)),
            "answer": answer,
            "right": right,
            "response": result.text,
            "finish": None if node is None else node.finish,
            "stopped": result.stopped,
            "search": repr(job.settings.strategy),
            "budget_tokens": job.settings.budget.tokens,
            "policy_tokens": sum(usage.sampled_tokens.values()),
            "prm_tokens": scorer_tokens(usage, () if scorer is None else scorer.models),
            "reference_tokens": usage.of_role("reference"),
            "rescored_tokens": usage.rescored_tokens,
            "rescored_cached_tokens": usage.rescored_cached_tokens,
            "seconds": seconds,
        }


def read_samples(
    result: Result,
    n: int,
    *,
    policy: Policy,
    scorers: Mapping[str, Scorer],
    values: Sequence[str],
    judging: Judging,
) -> tuple[list[Sample], dict[str, Cost]]:
    """The n whole samples of a BestOfN's result, in the order in which they were drawn, scored by each scorer.

    Args:
        result: of a search without a scorer.
        n: samples of that search.
        policy: it drew them.
        scorers: by name.
        values: names of values.VALUES.
        judging: labels them.

    Returns:
        The samples, and what it took each scorer to score them all.
    """
    tree, root = result.tree, result.tree.root
    by_lineage = {lineage: node for node in result.candidates for lineage in node.lineages}
    ends = [by_lineage[child_lineage(root.lineages[0], root.end, k)] for k in range(n)]
    costs = {name: _score(scorer, policy, tree, ends) for name, scorer in scorers.items()}
    fresh = new_tokens([(node, len(node.token_ids)) for node in end.path()] for end in ends)
    judged = {end: (text := end.path_text(), *judging(text, end.finish)) for end in dict.fromkeys(ends)}
    by_end = {end: _values(end, scorers, values) for end in judged}
    return [
        Sample(*judged[end], end.end, new, str(end.finish), by_end[end]) for end, new in zip(ends, fresh, strict=True)
    ], costs


def _values(end: Node, scorers: Mapping[str, Scorer], values: Sequence[str]) -> dict[str, dict[str, float]]:
    """A response's values under each scorer."""
    by_scorer = {}
    for name, scorer in scorers.items():
        end.tree.primary = name
        by_scorer[name] = {value: float(own_value(value, scorer)(end)) for value in values}
    return by_scorer


def _together(entry: tuple[int, Unit]) -> tuple[Any, ...]:
    """Return what the units of one batch have in common."""
    return entry[1].kind, entry[1].seed, entry[1].cell


def run_searches(
    policy: Policy, scorer: Scorer | None, jobs: Sequence[Job], batch: int
) -> Iterator[tuple[Job, Result]]:
    """Run searches, at most `batch` at a time; each with its result, as it ends."""
    if jobs:
        with SearchLoop(policy, scorer) as loop:
            yield from loop.run(jobs, batch)


def _score(scorer: Scorer, policy: Policy, tree: SearchTree, ends: Sequence[Node]) -> Cost:
    """Score the paths that end there, and say what it took."""
    ScorerDefaults.of(scorer).bind(policy)
    before = tree.meter.counts.copy()
    began = time.perf_counter()
    scorer.score_nodes(list(dict.fromkeys(ends)))
    seconds = time.perf_counter() - began
    scorer.release(tree)
    spent = Meter()
    spent.counts = tree.meter.counts - before
    return Cost.of(Usage.read(spent, scorer.models), scorer.models, seconds)
