"""Steering every token by the reward: what a token of R rows costs beyond plain sampling and beyond the weights."""

from __future__ import annotations

import statistics
from functools import partial
from typing import Any

import torch
from common import Ceilings, Machine, model, paired, ratio, weight_bytes
from searching import tokenizer_of

import prm_search as ps
from prm_search.engine.language_model import LanguageModel


def compare(machine: Machine, shape: str, prompt: int, rows: int, tokens: int, repeats: int) -> dict[str, Any]:
    """One line of the report: milliseconds a token of all rows, plain and steered by a pair whose reference it is.

    The prompt's share is taken out: what is timed is a response of `tokens + 1` tokens less one of a single token.
    """
    policy, prm = model(shape, 1, machine), model(shape, 2, machine)
    served = [LanguageModel.of(module, capacity=prompt + rows * (tokens + 2)) for module in (policy, prm)]
    sampler = ps.HFPolicy(policy, tokenizer_of(policy.config.vocab_size), stop_ids=[])
    pair = ps.ImplicitPRM(prm, policy)
    ids = torch.randint(11, policy.config.vocab_size, (prompt,), generator=torch.Generator().manual_seed(0)).tolist()

    def run(strategy: ps.Strategy, scorer: ps.Scorer | None, length: int) -> None:
        rule = ps.StepRule(delimiter=None, max_tokens=length)
        ps.search([ids], policy=sampler, scorer=scorer, strategy=strategy, steps=rule, max_new_tokens=length)

    ways: dict[str, tuple[ps.Strategy, ps.Scorer | None]] = {
        "plain": (ps.BestOfN(rows), None),
        "steered": (ps.Steer(alpha=1.0, n=rows), pair),
    }
    seconds = paired(
        {
            f"{name} {length}": partial(run, strategy, scorer, length)
            for name, (strategy, scorer) in ways.items()
            for length in (1, tokens + 1)
        },
        repeats,
    )
    each = {
        name: [
            (long - short) / tokens
            for long, short in zip(seconds[f"{name} {tokens + 1}"], seconds[f"{name} 1"], strict=True)
        ]
        for name in ways
    }
    floors = {"plain": weight_bytes(policy), "steered": weight_bytes(policy) + weight_bytes(prm)}
    bandwidth = Ceilings.measure(machine).bandwidth
    middle = {name: statistics.median(values) for name, values in each.items()}
    del served
    return {
        "shape": shape,
        "prompt": prompt,
        "rows": rows,
        "tokens": tokens,
        "ms": {name: 1e3 * value for name, value in middle.items()},
        "steered_over_plain": ratio(each["steered"], each["plain"]),
        "over_weight_floor": {name: value * bandwidth / floors[name] for name, value in middle.items()},
    }
