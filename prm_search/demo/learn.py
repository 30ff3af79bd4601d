"""How the demo's two models are trained: the policy on flawed demonstrations, the PRM on outcome labels alone."""

from __future__ import annotations

import copy
import math
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import binary_cross_entropy_with_logits
from transformers import LlamaConfig, LlamaForCausalLM

from .chains import MAX_LENGTH, Problem, answer, demonstrate, problems, stream
from .sampling import response_log_probs, sample
from .tokenizer import BOS_ID, EOS_ID, PAD_ID, TOKENS, prompt_ids, response_ids, text

Log = Callable[[str], None]


@dataclass(frozen=True)
class PolicyRecipe:
    """Curriculum, then annealing, then the gate; a policy that fails the gate trains on for another round."""

    learning_rate: float = 2e-3
    tokens_per_step: int = 2600
    advance_ratio: float = 1.6  # lengths count as learnt when the worst is below this multiple of the entropy floor
    max_curriculum_steps: int = 1600
    anneal_steps: int = 200
    gate_length: int = 8  # the length of the test problems
    gate_ratio: float = 1.15
    gate_problems: int = 1000
    extra_rounds: int = 3
    extra_steps: int = 200  # at full learning rate, before each extra round's annealing


@dataclass(frozen=True)
class PRMRecipe:
    """CE on sigmoid(beta * sum of log-ratios) against "the final answer is right"."""

    beta: float = 0.05
    learning_rate: float = 3e-3
    epochs: int = 5
    batch: int = 64
    problems: tuple[tuple[int, int], ...] = (
        (2, 300),
        (3, 650),
        (4, 650),
    )  # (length, how many): short, so many are right
    rollouts: int = 4


def new_model(seed: int) -> LlamaForCausalLM:
    """An untrained Llama of about a quarter of a million parameters."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(TOKENS),
        hidden_size=96,
        intermediate_size=288,
        num_hidden_layers=2,
        num_attention_heads=3,  # of 32 dimensions: the smallest that vLLM's CPU attention takes
        num_key_value_heads=3,
        max_position_embeddings=128,
        rope_parameters={"rope_type": "default", "rope_theta": 100.0},
        tie_word_embeddings=True,
        pad_token_id=PAD_ID,
        bos_token_id=BOS_ID,
        eos_token_id=EOS_ID,
        dtype="float32",
    )
    return LlamaForCausalLM(config)


class _Demonstrations:
    """Endless demonstrations of each length; same seed, same text."""

    def __init__(self, split: str, seed: int) -> None:
        self._streams = {n: stream(split, seed, n) for n in range(1, MAX_LENGTH + 1)}
        self._rng = random.Random(f"demonstrations/{split}/{seed}")

    def batch(self, rows: int, length: int) -> tuple[torch.Tensor, torch.Tensor, float]:
        """Prompts [rows, P], responses [rows, R], and the data's own nats per response token: the loss's floor."""
        drawn = [next(self._streams[length]) for _ in range(rows)]
        written = [demonstrate(problem, self._rng) for problem in drawn]
        prompts = torch.tensor([prompt_ids(problem.prompt) for problem in drawn])
        responses = torch.tensor([response_ids(response) for response, _ in written])
        return prompts, responses, sum(nll for _, nll in written) / responses.numel()


def _loss(model: LlamaForCausalLM, prompts: torch.Tensor, responses: torch.Tensor) -> torch.Tensor:
    return -response_log_probs(model, prompts, responses).mean()


def gate_ratio(model: LlamaForCausalLM, recipe: PolicyRecipe, seed: int) -> float:
    """Loss over entropy floor on fresh demonstrations of the test length, from the split kept for this."""
    prompts, responses, floor = _Demonstrations("gate", seed).batch(recipe.gate_problems, recipe.gate_length)
    with torch.inference_mode():
        return _loss(model, prompts, responses).item() / floor


def train_policy(seed: int, recipe: PolicyRecipe, log: Log) -> tuple[LlamaForCausalLM, dict[str, Any]]:
    """Trains the policy until it passes the gate, or until the bound on rounds.

    Returns:
        The model, and what happened: steps, the gate's ratio after each round, whether it passed.
    """
    model = new_model(seed)
    data = _Demonstrations("policy", seed)
    lengths = random.Random(f"curriculum/{seed}")
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.learning_rate, betas=(0.9, 0.98), weight_decay=0.01)
    steps = 0

    ratios_by_length = dict.fromkeys(range(1, MAX_LENGTH + 1), math.inf)  # loss over floor, smoothed

    def worst(longest: int) -> int:
        return max(range(1, longest + 1), key=ratios_by_length.__getitem__)

    def update(longest: int, scale: float) -> None:
        """One step on three lengths: the one that is learnt worst and two at random."""
        nonlocal steps
        steps += 1
        for group in optimizer.param_groups:
            group["lr"] = recipe.learning_rate * scale * min(1.0, steps / 50)
        for length in (worst(longest), lengths.randint(1, longest), lengths.randint(1, longest)):
            rows = recipe.tokens_per_step // (3 * (6 * length + 3))
            prompts, responses, floor = data.batch(rows, length)
            loss = _loss(model, prompts, responses)
            (loss / 3).backward()
            ratio, before = loss.item() / floor, ratios_by_length[length]
            ratios_by_length[length] = ratio if math.isinf(before) else 0.8 * before + 0.2 * ratio
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    longest = 2
    while longest <= MAX_LENGTH and steps < recipe.max_curriculum_steps:
        update(longest, 1.0)
        last = worst(longest)
        if steps % 50 == 0:
            log(f"  policy step {steps}: lengths to {longest}, worst {ratios_by_length[last]:.2f} x floor at {last}")
        if ratios_by_length[last] < recipe.advance_ratio:
            longest += 1
    curriculum_steps = steps

    ratios: list[float] = []
    for extra in range(recipe.extra_rounds + 1):
        for _ in range(recipe.extra_steps if extra else 0):
            update(MAX_LENGTH, 1.0)
        for k in range(recipe.anneal_steps):
            update(MAX_LENGTH, 1.0 - (k + 1) / (recipe.anneal_steps + 1))
        ratios.append(gate_ratio(model, recipe, seed))
        log(f"  policy step {steps}: annealed, {ratios[-1]:.3f} x floor at length {recipe.gate_length}")
        if ratios[-1] < recipe.gate_ratio:
            break
    passed = ratios[-1] < recipe.gate_ratio
    return model.eval(), {
        "steps": steps,
        "curriculum_steps": curriculum_steps,
        "curriculum_finished": longest > MAX_LENGTH,
        "gate_ratios": ratios,
        "gate_passed": passed,
    }


@dataclass(frozen=True)
class Rollout:
    """One sampled response, the policy's log-probs of it, and its outcome label."""

    problem: Problem
    ids: list[int]
    log_probs: list[float]
    label: bool

    def record(self) -> dict[str, Any]:
        """What ``prm-search train`` reads of it."""
        return {"prompt_ids": prompt_ids(self.problem.prompt), "response_ids": self.ids, "label": int(self.label)}


def collect_rollouts(policy: LlamaForCausalLM, seed: int, recipe: PRMRecipe) -> list[Rollout]:
    """Samples at temperature 1; the label is whether the final answer is right, nothing about steps."""
    asked = [p for length, n in recipe.problems for p in problems(n, split="prm", seed=seed, length=length)]
    drawn = sample(
        (policy,),
        [prompt_ids(p.prompt) for p in asked],
        copies=recipe.rollouts,
        generator=torch.Generator().manual_seed(seed),
    )
    rollouts = []
    for k, s in enumerate(drawn):
        problem = asked[k // recipe.rollouts]
        right = s.ids[-1] == EOS_ID and answer(text(s.ids)) == problem.answer
        rollouts.append(Rollout(problem, s.ids, s.log_probs[0], right))
    return rollouts


def train_prm(
    policy: LlamaForCausalLM, rollouts: list[Rollout], seed: int, recipe: PRMRecipe, log: Log
) -> LlamaForCausalLM:
    """A copy of the policy, trained by CE on the rollouts' outcome labels; the policy is the reference."""
    model = copy.deepcopy(policy).train()
    order = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.learning_rate, betas=(0.9, 0.98), weight_decay=0.01)
    batches = -(-len(rollouts) // recipe.batch)
    total, done = recipe.epochs * batches, 0
    for epoch in range(recipe.epochs):
        losses = 0.0
        shuffled = [rollouts[i] for i in torch.randperm(len(rollouts), generator=order).tolist()]
        for start in range(0, len(shuffled), recipe.batch):
            batch = shuffled[start : start + recipe.batch]
            rewards = recipe.beta * log_ratios(model, batch)
            labels = torch.tensor([float(r.label) for r in batch])
            loss = binary_cross_entropy_with_logits(rewards, labels)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for group in optimizer.param_groups:
                group["lr"] = recipe.learning_rate * (1 - done / total)
            optimizer.step()
            optimizer.zero_grad()
            losses, done = losses + loss.item(), done + 1
        log(f"  prm epoch {epoch + 1}: CE {losses / batches:.4f}")
    return model.eval()


def log_ratios(model: LlamaForCausalLM, batch: list[Rollout]) -> torch.Tensor:
    """Sum over each response of log pi_prm - log pi_ref, [rows]; grouped by prompt length: no prompt is padded."""
    sums: list[torch.Tensor] = [torch.empty(0)] * len(batch)
    for length in sorted({len(r.problem.ops) for r in batch}):
        rows = [i for i, r in enumerate(batch) if len(r.problem.ops) == length]
        width = max(len(batch[i].ids) for i in rows)
        prompts = torch.tensor([prompt_ids(batch[i].problem.prompt) for i in rows])
        responses = torch.tensor([batch[i].ids + [PAD_ID] * (width - len(batch[i].ids)) for i in rows])
        real = torch.tensor([[1.0] * len(batch[i].ids) + [0.0] * (width - len(batch[i].ids)) for i in rows])
        log_probs = (response_log_probs(model, prompts, responses) * real).sum(1)
        reference = torch.tensor([sum(batch[i].log_probs) for i in rows])
        for k, i in enumerate(rows):
            sums[i] = log_probs[k] - reference[k]
    return torch.stack(sums)
