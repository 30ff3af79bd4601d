"""Steering every token by the reward: what a token of R rows costs beyond plain sampling and beyond the weights."""

from __future__ import annotations

import statistics
from functools import partial
from typing import Any

import torch
from common import Ceilings, Machine, model, paired, ratio, weight_bytes
from searching import tokenizer_of

import prm_search as ps
from prm_search.engine.graph_step.choice import Mode
from prm_search.engine.language_model import LanguageModel


def compare(machine: Machine, shape: str, prompt: int, rows: int, tokens: int, repeats: int) -> dict[str, Any]:
    """One line of the report: milliseconds a token of all rows, plain and steered by a pair whose reference it is.

    On a GPU also without CUDA graphs, and with each model on a stream of its own.

    The prompt's share is taken out: what is timed is a response of `tokens + 1` tokens less one of a single token.
    """
    policy, prm = model(shape, 1, machine), model(shape, 2, machine)
    served = [LanguageModel.of(module, capacity=prompt + rows * (tokens + 2)) for module in (policy, prm)]
    sampler = ps.HFPolicy(policy, tokenizer_of(policy.config.vocab_size), stop_ids=[])
    pair = ps.ImplicitPRM(prm, policy)
    ids = torch.randint(11, policy.config.vocab_size, (prompt,), generator=torch.Generator().manual_seed(0)).tolist()

    def run(strategy: ps.Strategy, scorer: ps.Scorer | None, mode: Mode, streams: bool, length: int) -> None:
        for lm in served:
            lm.token_steps.set_mode(mode)
            if machine.device == "cuda":
                lm.own_stream(streams)
        rule = ps.StepRule(delimiter=None, max_tokens=length)
        ps.search([ids], policy=sampler, scorer=scorer, strategy=strategy, steps=rule, max_new_tokens=length)

    plain, steered = ps.BestOfN(rows), ps.Steer(alpha=1.0, n=rows)
    ways: dict[str, tuple[ps.Strategy, ps.Scorer | None, Mode, bool]] = {
        "plain": (plain, None, "auto", False),
        "steered": (steered, pair, "auto", False),
    }
    if machine.device == "cuda":
        ways["plain, no graph"] = plain, None, "packed", False
        ways["steered, no graph"] = steered, pair, "packed", False
        ways["steered, streams"] = steered, pair, "auto", True
    seconds = paired(
        {f"{name} {length}": partial(run, *way, length) for name, way in ways.items() for length in (1, tokens + 1)},
        repeats,
    )
    each = {
        name: [
            (long - short) / tokens
            for long, short in zip(seconds[f"{name} {tokens + 1}"], seconds[f"{name} 1"], strict=True)
        ]
        for name in ways
    }
    floors = {name: weight_bytes(policy) + (weight_bytes(prm) if way[1] is pair else 0) for name, way in ways.items()}
    bandwidth = Ceilings.measure(machine).bandwidth
    middle = {name: statistics.median(values) for name, values in each.items()}
    return {
        "shape": shape,
        "prompt": prompt,
        "rows": rows,
        "tokens": tokens,
        "ms": {name: 1e3 * value for name, value in middle.items()},
        "steered_over_plain": ratio(each["steered"], each["plain"]),
        "over_weight_floor": {name: value * bandwidth / floors[name] for name, value in middle.items()},
    }
