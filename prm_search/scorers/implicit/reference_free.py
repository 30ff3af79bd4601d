"""Scoring without a reference model: a constant stands in for its log-probabilities. An option, never a default.

A pair's reward is a difference of two log-probabilities that fall with length alike, so q neither rises nor falls with
length by itself. Without a reference it is a raw log-probability: every token costs something, prefixes of different
length no longer compare, and a search prefers whatever is short. `ConstantReference` controls for length:

    r_t = beta * (log pi_phi(y_t | x, y_<t) - b)        q_t = beta * (log pi_phi(y_<=t | x) - b * t)

with b, in nats a token, the log-probability of an average token. What follows from it:

- b = 0 is the raw log-probability. The lower b, the more a longer prefix is worth.
- With b as `ConstantReference.fit` finds it, the rewards of the calibration responses sum to 0: a prefix whose tokens
  are as probable as theirs has q = 0 at any length, and q says how much more probable than usual a prefix is.
- The mean reward of a token, `value="prefix_mean"` in a search, is beta * (mean log-probability - b): it ranks the same
  whatever b is, so it is the choice where nothing can be calibrated.
- A constant knows nothing of which tokens are easy. Rewards of single tokens and steps show how usual they are, not
  whether they are right; use this to rank whole answers or long prefixes. (In arXiv 2412.01981's ablation best-of-64
  over whole responses loses nothing on average without the reference; that says nothing about steps.)
- Steering is refused: a constant cancels in the softmax, and what is left is no log-ratio.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class ConstantReference:
    """`reference=ConstantReference(b)`: every token has this log-probability under the missing reference.

    Args:
        logprob: b, nats a token, <= 0.

    Raises:
        ValueError: logprob is positive or not finite.
    """

    logprob: float

    def __post_init__(self) -> None:
        if not (np.isfinite(self.logprob) and self.logprob <= 0):
            raise ValueError(f"logprob={self.logprob!r}: a log-probability is needed, finite and <= 0 nats")

    @classmethod
    def fit(
        cls, model: Any, prompts: Sequence[Any], responses: Sequence[Any], *, tokenizer: Any = None, **options: Any
    ) -> ConstantReference:
        """The mean log-probability of a response token under the model: b = sum of log pi_phi / number of tokens.

        Args:
            model: the PRM, as ImplicitPRM takes it.
            prompts, responses: answers as the policy gives them, right and wrong, as ImplicitPRM.score takes them;
                some dozens of them are enough.
            tokenizer: the PRM's.
            options: of ImplicitPRM.score.

        Raises:
            ValueError: there are no responses; or as ImplicitPRM and ImplicitPRM.score.
        """
        from .implicit_prm import ImplicitPRM

        raw = ImplicitPRM(model, cls(0.0), tokenizer=tokenizer, beta=1.0)
        scores = raw.score(prompts, responses, **options)
        if not scores:
            raise ValueError("responses is empty: a calibration needs some")
        return cls(sum(s.reward for s in scores) / sum(len(s.token_ids) for s in scores))
