"""ImplicitPRM: two causal LMs whose log-ratio is a reward for every token.

The reward of token t is `beta * (log pi_phi(y_t | x, y_<t) - log pi_ref(y_t | x, y_<t))`; its sum q_t is the value of
the prefix (arXiv 2412.01981, Proposition 3.1 and eq. 2-3).
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np

from .engine.adapters import AUTO
from .engine.language_model import LanguageModel
from .engine.memo import node_logprobs
from .policy import encode_prompt
from .tree import Node, SearchTree


class ImplicitPRM:
    """A pair: the trained reward LM, the reference it started from, and beta. Also a Scorer for `search`."""

    def __init__(
        self,
        model: Any,
        reference: Any = None,
        *,
        tokenizer: Any = None,
        beta: float = 0.05,
        name: str = "prm",
        adapter: str | None = AUTO,
        capacity: int | None = None,
    ) -> None:
        if not (np.isfinite(beta) and beta > 0):
            raise ValueError(f"beta={beta!r}: a finite number > 0 is needed")
        self.beta = float(beta)
        self.name = name
        self.tokenizer = tokenizer
        self.prm = LanguageModel.of(model, adapter=adapter, capacity=capacity)
        self._policy: Any = None
        self._reference: LanguageModel | None = None
        if reference is None:
            if self.prm.state is None:
                raise ValueError("reference is missing: the model the PRM was initialised from, or 'policy'")
            reference = LanguageModel.of(self.prm.module, adapter=None, capacity=capacity)
        if isinstance(reference, str):
            if reference != "policy":
                raise ValueError(f"reference={reference!r}: a model or 'policy' here; from_pretrained loads by name")
        else:
            self._reference = LanguageModel.of(getattr(reference, "lm", reference), capacity=capacity)

    def bind(self, policy: Any) -> None:
        """Meet the policy whose nodes are to be scored."""
        self._policy = policy

    def steering_models(self) -> tuple[LanguageModel, LanguageModel]:
        reference = self._reference or getattr(self._policy, "lm", None)
        if reference is None:
            raise ValueError("reference='policy' needs a policy with a model of its own")
        return self.prm, reference

    @property
    def models(self) -> Mapping[str, Hashable]:
        reference = self._reference.id if self._reference is not None else getattr(self._policy, "id", "policy")
        return {"prm": self.prm.id, "reference": reference}

    def score_nodes(self, nodes: Sequence[Node]) -> None:
        """See Scorer.score_nodes."""
        todo: dict[Node, None] = {}
        for node in nodes:
            for part in node.path():
                if not part.scored_by(self.name):
                    todo.setdefault(part)
        if not todo:
            return
        new = list(todo)
        trained = node_logprobs(self.prm, new)
        base = self._reference_logprobs(new)
        for node, mine, theirs in zip(new, trained, base, strict=True):
            node.set_rewards(self.name, self.beta * (mine - theirs))

    def _reference_logprobs(self, nodes: Sequence[Node]) -> list[np.ndarray]:
        if self._reference is not None:
            return node_logprobs(self._reference, nodes)
        lm = getattr(self._policy, "lm", None)
        if lm is not None:
            return node_logprobs(lm, nodes)
        if any(node.logprobs is None for node in nodes):
            raise ValueError("reference='policy' needs nodes that carry their policy's log-probabilities")
        return [node.logprobs for node in nodes]

    def release(self, tree: SearchTree) -> None:
        """Forget a tree and free its KV."""
        self.prm.release(tree)
        if self._reference is not None:
            self._reference.release(tree)
