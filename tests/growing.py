"""Requests whose rows grow together: what they draw, and what it costs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
from models import tiny
from pairs import byte_tokenizer

import prm_search as ps
from prm_search.engine.language_model import LanguageModel
from prm_search.sampling import Request, Sampling
from prm_search.tree import Prompt, SearchTree

TOKENIZER = byte_tokenizer()
RULE = ps.StepRule(delimiter=[chr(i) for i in range(33, 127, 3)], max_tokens=5)
PROMPT = tuple(range(40, 80))  # longer than a prefix that is read once for its family


def policy_of(capacity: int, name: str = "llama", **options: Any) -> ps.HFPolicy:
    lm = LanguageModel(tiny(name).double(), None, capacity=capacity)
    return ps.HFPolicy(lm, TOKENIZER, **{"stop_ids": [90, 91, 92], **options})


def decoded(
    policy: ps.HFPolicy, between: Callable[[int], object] = lambda turn: None, rows: int = 6, tokens: int = 24
) -> tuple[list[Any], Counter[Any]]:
    """Chains of two requests, the second step by step, below one prompt. The caller acts between rounds."""
    tree = SearchTree(Prompt(token_ids=PROMPT))
    sampling = Sampling(RULE, max_new_tokens=tokens)
    policy.submit([Request.draw(tree.root, rows, sampling, until="end", merge=False)])
    policy.submit([Request.draw(tree.root, 3, sampling, until="step", merge=False)])
    answers: dict[Request, Any] = {}
    turn, left = 0, 2
    while left:
        for request, nodes in policy.advance():
            answers[request] = nodes
            left -= 1
            for node in nodes:
                if request.until == "step" and not node.finished and node.depth < 3:
                    policy.submit([Request.draw(node, 2, sampling, until="step", merge=False)])
                    left += 1
        between(turn)
        turn += 1
    chains = [
        (tuple(node.path_ids()), node.finish, [part.logprobs for part in node.path()])
        for nodes in answers.values()
        for node in nodes
    ]
    counts = tree.meter.counts.copy()
    policy.release(tree)
    assert policy.lm.tree.used == 0
    assert not policy.lm.tree.growing
    return sorted(chains, key=lambda chain: chain[:2]), counts


def check(one: list[Any], other: list[Any]) -> None:
    assert [chain[:2] for chain in one] == [chain[:2] for chain in other]
    for a, b in zip(one, other, strict=True):
        np.testing.assert_allclose(np.concatenate(a[2]), np.concatenate(b[2]), atol=1e-6)
