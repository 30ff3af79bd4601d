"""The report's measurements, all of them fixed before the reported seeds were run. No model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from prm_search.training.recipe import OBJECTIVES, Recipe

NEGATIVES = "ce with negatives"
WITHOUT = "ce, no reference"
POLICY = "log p of the policy"


@dataclass(frozen=True)
class Run:
    """One PRM of a seed.

    Attributes:
        name: in tables.
        rollouts: which file of rollouts it learns from.
        recipe: everything else.
        beams: values by which step beams are run with it; none: it only ranks samples.
    """

    name: str
    rollouts: str
    recipe: Recipe
    beams: tuple[str, ...] = ()


@dataclass(frozen=True)
class Protocol:
    """Sizes of everything.

    Attributes:
        seeds: each has a policy, rollouts, PRMs and test problems of its own.
        development: the seed that rates and epochs were chosen on.
        lengths: (steps, problems) of the rollouts' problems; they are shuffled.
        responses: to each of them.
        single: the same for the file of one response to each of many problems.
        sweep_problems, sweep_responses: numbers of problems, and of responses to each, of the sweep.
        rate, epochs: of every objective: learning rate, and passes over its items.
        negatives: responses to other problems for each response, of the run that has them.
        least_steps: of a run on few responses: it makes more passes.
        test_problems, test_length, samples: held-out problems, their steps, and the samples of each.
        beam_problems: so many of them for the beams of objectives other than CE.
        width, expansions: of step beams: width * expansions = samples, so both may sample as many tokens.
        tokens_per_step: of the task; the beams' budget follows.
        strategy_problems: so many test problems for the comparison of all strategies (see lineup).
        strategy_sizes: sizes of every strategy, in whole samples; None for those of lineup.
        tuned_on: problems of the split "gate" on which `tune` chooses.
        strategy_budgets: of tune, in policy tokens; None for those of lineup.
    """

    seeds: tuple[int, ...] = (11, 12, 13)
    development: int = 101
    lengths: tuple[tuple[int, int], ...] = ((2, 300), (3, 650), (4, 650))
    responses: int = 4
    single: tuple[tuple[int, int], ...] = ((2, 300), (3, 3050), (4, 3050))
    sweep_problems: tuple[int, ...] = (100, 400, 1600)
    sweep_responses: tuple[int, ...] = (1, 4, 16)
    rate: float = 1e-3
    negatives: float = 0.5
    epochs: float = 3.0
    least_steps: int = 100
    batch: int = 64
    test_problems: int = 200
    test_length: int = 8
    samples: int = 16
    beam_problems: int = 100
    width: int = 4
    expansions: int = 4
    tokens_per_step: int = 4
    strategy_problems: int = 40
    strategy_sizes: tuple[int, ...] | None = None
    tuned_on: int = 32
    strategy_budgets: tuple[int, ...] | None = None

    @property
    def problems(self) -> int:
        """Problems with rollouts."""
        return sum(count for _, count in self.lengths)

    @property
    def budget(self) -> int:
        """Policy tokens of a problem: those of its samples."""
        return self.samples * self.test_length * self.tokens_per_step

    @property
    def arguments(self) -> dict[str, Any]:
        """Of transformers.TrainingArguments, the same for all runs."""
        return {"adam_beta2": 0.98, "weight_decay": 0.01, "logging_steps": 50}

    def runs(self, seed: int) -> list[Run]:
        """The PRMs of a seed: the objectives on the same rollouts, one response a problem, the sweep."""

        def recipe(objective: str, rows: int, **given: Any) -> Recipe:
            epochs = max(self.epochs, self.least_steps * self.batch / rows)
            return Recipe(
                objective=objective, learning_rate=self.rate, epochs=epochs, batch=self.batch,
                micro_batch=self.batch, holdout=0.0, seed=seed, save_steps=100_000, **given,
            )  # fmt: skip

        every = self.problems * self.responses
        found = [
            Run(name, "rollouts", recipe(name, every), ("q", "min") if name == "ce" else ("q",)) for name in OBJECTIVES
        ]
        found.append(Run(NEGATIVES, "rollouts", recipe("ce", every, negatives=self.negatives), ("q",)))
        many = sum(count for _, count in self.single)
        found.append(Run(f"ce {many} x 1", "single", recipe("ce", many), ("q",)))
        for problems in self.sweep_problems:
            for responses in self.sweep_responses:
                if (problems, responses) == (self.problems, self.responses):
                    continue  # that is "ce"
                few = problems < self.problems
                if not few and responses > self.responses:
                    continue  # as many rollouts as all others together
                given = {"problems": problems, "per_problem": responses}
                name = f"ce {problems} x {responses}"
                found.append(Run(name, "sweep" if few else "rollouts", recipe("ce", problems * responses, **given)))
        return found


QUICK = Protocol(
    seeds=(1,), lengths=((2, 24), (3, 16)), responses=2, single=((2, 40), (3, 40)), sweep_problems=(8, 40),
    sweep_responses=(1, 2), least_steps=2, batch=16, test_problems=4, samples=4, beam_problems=2, width=2, expansions=2,
    strategy_problems=2, strategy_sizes=(4,), tuned_on=4, strategy_budgets=(64,),
)  # fmt: skip
