"""`generate` end to end: plain sampling, BestOfN and Beam at equal policy tokens, and what the scorer adds."""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch
from common import Machine, model, paired
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

import prm_search as ps


def _tokenizer(vocab: int) -> PreTrainedTokenizerFast:
    """A tokenizer over the whole vocabulary, whose id 10 is the delimiter."""
    words = {"\n\n" if i == 10 else f"<{i}>": i for i in range(vocab)}
    backend = Tokenizer(models.WordLevel(words, unk_token="<0>"))
    backend.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<1>", pad_token="<1>")


def measure(
    machine: Machine, shape: str, prompts: int, prompt: int, new_tokens: int, step: int, n: int, repeats: int
) -> list[dict[str, Any]]:
    """Lines of the report: seconds of each way to generate, and scorer over policy seconds inside the searches."""
    policy, prm, other = (model(shape, seed, machine) for seed in (1, 2, 3))
    tokenizer = _tokenizer(policy.config.vocab_size)
    ids = torch.randint(11, policy.config.vocab_size, (prompts, prompt), device=machine.device)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    ps.enable(policy, tokenizer)
    steps = ps.StepRule(delimiter="\n\n", max_tokens=step)
    pairs = {"shared": ps.ImplicitPRM(prm, policy), "separate": ps.ImplicitPRM(prm, other)}
    strategies = {f"best_of_{n}": ps.BestOfN(n), f"beam_{n // 4}x4": ps.Beam(n // 4, 4)}
    common = {
        "max_new_tokens": new_tokens,
        "min_new_tokens": new_tokens,
        "do_sample": True,
        "top_k": 0,
        "pad_token_id": 1,
    }

    def plain(rows: int) -> Any:
        return policy.generate(**inputs, num_return_sequences=rows, **common)

    phases: dict[str, list[dict[str, float]]] = {}
    usages: dict[str, Any] = {}

    def guided(name: str, pair: str, strategy: str) -> None:
        guidance = ps.PRMGuidance(pairs[pair], strategy=strategies[strategy], steps=steps, seed=0)
        out = policy.generate(**inputs, **common, prm_guidance=guidance, return_dict_in_generate=True)
        phases.setdefault(name, []).append(dict(out.prm[0].usage.seconds))
        usages[name] = [result.usage for result in out.prm]

    runs: dict[str, Any] = {"plain_1": lambda: plain(1), f"plain_{n}": lambda: plain(n)}
    for strategy in strategies:
        for pair in pairs:
            name = f"{strategy}/{pair}"
            runs[name] = lambda name=name, pair=pair, strategy=strategy: guided(name, pair, strategy)
    seconds = paired(runs, repeats)
    lines = []
    for name, values in seconds.items():
        line: dict[str, Any] = {"shape": shape, "way": name, "seconds": statistics.median(values)}
        if name in usages:
            share = [phase["scorer"] / phase["policy"] for phase in phases[name][-repeats:]]
            line["scorer_over_policy_seconds"] = statistics.median(share)
            for kind in ("sampled_tokens", "encoded_tokens"):
                totals: dict[str, int] = {}
                for usage in usages[name]:
                    for role, count in getattr(usage, kind).items():
                        totals[role] = totals.get(role, 0) + count
                line[kind] = totals
        lines.append(line)
    return lines


def first_step(machine: Machine, shape: str, prompt: int, step: int, n: int) -> float:
    """Seconds from the call to the first committed step of a beam search, scored by a pair with a shared reference."""
    policy, prm = model(shape, 1, machine), model(shape, 2, machine)
    pair = ps.ImplicitPRM(prm, policy)
    begin = time.perf_counter()
    seen: list[float] = []
    ps.search(
        [list(range(11, 11 + prompt))],
        policy=ps.HFPolicy(policy, _tokenizer(policy.config.vocab_size), stop_ids=[]),
        scorer=pair,
        strategy=ps.Beam(n // 4, 4),
        steps=ps.StepRule(max_tokens=step),
        max_new_tokens=step,
        on_event=lambda event: seen.append(time.perf_counter() - begin),
    )
    return seen[0]
