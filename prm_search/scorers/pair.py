"""Pair: the common part of implicit PRMs, in this process or behind an engine of their own."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from .. import checks
from ..tokens import TokenizerMatch
from ..tree import Node, SearchTree
from .base import BATCH_TOKENS, ScorerBase
from .responses import Response, Steps, read_responses
from .scores import Scores

BETA = 0.05  # what the released pairs were trained with; a card says otherwise


class Weights(Protocol):
    """A model of a pair, in this process or an engine of its own."""

    @property
    def id(self) -> Hashable:
        """Return what nodes that it sampled carry as their sampler."""


class Pair(checks.HoldsModels, ScorerBase):
    """A trained model, the reference that it started from, and beta; r_t = beta * (log pi_phi(y_t) - log pi_ref(y_t)).

    Subclasses run the models. The reference may be missing: a constant stands in for it, or it is the policy, known
    from `bind`.

    Args:
        beta: > 0, rewards a nat.
        name, tokenizer, eos_token_id: see ScorerBase.

    Raises:
        ValueError: beta is not a number from 1e-30 to 1e30.
    """

    kind = "pair"
    rewards_tokens = True
    prm: Weights

    def __init__(self, *, beta: float, name: str, tokenizer: Any, eos_token_id: int | None = None) -> None:
        super().__init__(name, tokenizer, eos_token_id)
        try:
            checks.beta("beta", beta)
        except TypeError as error:
            raise ValueError(str(error)) from None
        self.beta = float(beta)
        self._constant: float | None = None
        self._reference: Weights | None = None
        self._policy: Any = None

    @property
    def models(self) -> Mapping[str, Hashable]:
        """Ids of its models by role; no "reference" where a constant stands in for it."""
        ids: dict[str, Hashable] = {"prm": self.prm.id}
        if self._constant is None:
            ids["reference"] = self.reference_id
        return ids

    @property
    def reference_id(self) -> Hashable:
        """Id of the reference: a node sampled by the model with this id carries its half of the reward. None where
        a constant stands in for it."""
        if self._constant is not None:
            return None
        return self._reference.id if self._reference is not None else getattr(self._policy, "id", "policy")

    @property
    @abstractmethod
    def vocab(self) -> int:
        """Tokens that all of its models know, embeddings' padding included."""

    @property
    def follows_policy(self) -> bool:
        """Return True if the reference is the policy, whichever that is."""
        return self._reference is None and self._constant is None

    def match(self, policy: Any) -> TokenizerMatch:
        """Return what its tokenizer and a policy's have in common; without one of its own it takes the policy's."""
        other = getattr(policy, "tokenizer", None)
        if self.tokenizer is None:
            if getattr(other, "text_only", False):
                raise ValueError(
                    f"{self.kind} {self.name!r} has no tokenizer, and the policy's server gives text: pass tokenizer="
                )
            self.tokenizer = other
        return TokenizerMatch(True, True) if other is None else TokenizerMatch.of(self.tokenizer, other)

    # --- scoring -----------------------------------------------------------------------------------------------------

    def policy_logprobs(self, nodes: Sequence[Node]) -> list[np.ndarray]:
        """The policy's log-probabilities that nodes carry, [T] nats each: the reference's half under "policy".

        Raises:
            ValueError: a node carries none, or is another policy's.
        """
        self.refuse_strangers(nodes)
        known = [node.logprobs for node in nodes if node.logprobs is not None]
        if len(known) < len(nodes):
            raise ValueError(
                "reference='policy': the policy has no model here that could score nodes, and a node carries no "
                "log-probabilities of its own (they are Node.logprobs, or logprobs= of score)"
            )
        return known

    def refuse_strangers(self, nodes: Sequence[Node]) -> None:
        """Raise ValueError where the reference is the policy, and a node was sampled by another."""
        samplers = {node.sampler for node in nodes} - {None, self.reference_id}
        if samplers and self.follows_policy and self._policy is not None:
            raise ValueError(f"reference='policy': the policy is {self.reference_id!r}, nodes come from {samplers}")

    def refuse_prompt(self) -> None:
        """Raise ValueError where the reference is the policy, and the pair would have to render a prompt of its own."""
        if self.follows_policy:
            raise ValueError(
                "reference='policy': the pair's chat template renders this prompt in another way than the policy's "
                "(tokenizer=policy.tokenizer says that the pair takes the policy's prompts as they are)"
            )

    def reward(self, node: Node, mine: np.ndarray, theirs: np.ndarray | float) -> None:
        """Set a node's rewards from log-probabilities of its tokens.

        Args:
            node: its parent has been scored.
            mine, theirs: [T] nats, under the trained model and the reference.

        Raises:
            ValueError: both hold a token impossible.
        """
        node.set_rewards(self.name, self.beta * log_ratio(node.token_ids, mine, theirs))

    def score(
        self,
        prompts: Iterable[Any],
        responses: Iterable[Any],
        *,
        steps: Steps = None,
        append_eos: bool | Sequence[bool] = True,
        logprobs: Sequence[Any] | None = None,
        batch_tokens: int = BATCH_TOKENS,
    ) -> list[Scores]:
        """Rewards of complete responses; see ScorerBase.score.

        Args:
            prompts, responses, steps, append_eos, batch_tokens: see ScorerBase.score.
            logprobs: [T] log-probabilities of each response's tokens under the reference where they are known (nats,
                before temperature), for instance from sampling: the reference is then not run.

        Raises:
            TypeError, ValueError: see ScorerBase.score; or a log-probability is not finite, or lies above 0.
        """
        read = read_responses(self, prompts, responses, steps=steps, append_eos=append_eos, logprobs=logprobs)
        return self._score_read(read, batch_tokens)

    def _plant(self, tree: SearchTree, response: Response) -> list[Node]:
        """One node: every token has a reward of its own."""
        sampler = None if response.logprobs is None else self.reference_id
        return [tree.add(tree.root, response.token_ids, logprobs=response.logprobs, sampler=sampler)]


def log_ratio(token_ids: Sequence[int], mine: np.ndarray, theirs: np.ndarray | float) -> np.ndarray:
    """[T] nats: mine - theirs, log-probabilities of these T tokens. Raises ValueError where both are -inf."""
    with np.errstate(invalid="ignore"):
        ratio = np.asarray(mine - theirs)
    if np.isnan(ratio).any():
        token = token_ids[int(np.isnan(ratio).argmax())]
        raise ValueError(f"token {token} has no reward: its log-probability is -inf under model and reference")
    return ratio
