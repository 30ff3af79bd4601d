"""Training of the demo's policy: on flawed demonstrations of `chains`, until its loss passes a gate.

The lengths grow as it learns them, then it anneals. A third of every batch goes to the length that it knows worst:
given only the longest one, it can stay wrong at one step of one middle length for good. It passes the gate when its
loss on fresh demonstrations *of the test length* is below 1.15 times their entropy; otherwise it trains on, at most
three rounds.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from .chains import MAX_LENGTH, demonstrate, stream
from .tokenizer import BOS_ID, EOS_ID, PAD_ID, TOKENS, prompt_ids, response_ids

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


WIDTH = 96  # of hidden states
HEAD = 32  # dimensions: the smallest that vLLM's CPU attention takes


def new_model(seed: int, width: int = WIDTH) -> LlamaForCausalLM:
    """An untrained Llama; of the default width it has about a quarter of a million parameters."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(TOKENS),
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=2,
        num_attention_heads=width // HEAD,
        num_key_value_heads=width // HEAD,
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


def response_log_probs(model: PreTrainedModel, prompts: torch.Tensor, responses: torch.Tensor) -> torch.Tensor:
    """Log-probability of each response token, with gradients.

    Args:
        model: a causal LM.
        prompts: [rows, P] token ids, all of one length.
        responses: [rows, R] token ids.

    Returns:
        [rows, R] float32, nats.
    """
    width = responses.shape[1]
    logits = model(input_ids=torch.cat([prompts, responses], 1), use_cache=False, logits_to_keep=width + 1).logits
    return logits[:, :-1].float().log_softmax(-1).gather(2, responses[:, :, None]).squeeze(2)


def _loss(model: LlamaForCausalLM, prompts: torch.Tensor, responses: torch.Tensor) -> torch.Tensor:
    return -response_log_probs(model, prompts, responses).mean()


def gate_ratio(model: LlamaForCausalLM, recipe: PolicyRecipe, seed: int) -> float:
    """Loss over entropy floor on fresh demonstrations of the test length, from the split kept for this."""
    prompts, responses, floor = _Demonstrations("gate", seed).batch(recipe.gate_problems, recipe.gate_length)
    with torch.inference_mode():
        return _loss(model, prompts, responses).item() / floor


def train_policy(
    seed: int, recipe: PolicyRecipe, log: Log, *, width: int = WIDTH
) -> tuple[LlamaForCausalLM, dict[str, Any]]:
    """Train the policy until it passes the gate, or until the bound on rounds.

    Args:
        seed: of weights and data.
        recipe: rates and lengths of training.
        log: is called with a line now and then.
        width: of hidden states, a multiple of HEAD.

    Returns:
        The model, and what happened: steps, the gate's ratio after each round, whether it passed.
    """
    model = new_model(seed, width)
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
