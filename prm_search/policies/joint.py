"""Policies made of several: JointPolicy, their common part; PolicyPool, where each request names one."""

from __future__ import annotations

import copy
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

from ..checks import require
from ..policy import Policy, PolicyBase, RequestFailed
from ..sampling import Request
from ..tree import Node, Prompt, SearchTree


class JointPolicy(PolicyBase):
    """A policy made of others that have one vocabulary. The first of them encodes prompts and lends its name.

    Args:
        parts: the policies by role, the leading one first.

    Raises:
        TypeError: one of them is no Policy.
        ValueError: there is none, two are one model, or their tokenizers differ.
    """

    def __init__(self, parts: Mapping[str, Policy]) -> None:
        if not parts:
            raise ValueError("policies: at least one is needed")
        for role, policy in parts.items():
            require(role, policy, Policy)
        self.parts = {role: PolicyBase.of(policy) for role, policy in parts.items()}
        self.lead = next(iter(self.parts.values()))
        for role, policy in self.parts.items():
            if not _same_tokens(self.lead.tokenizer, policy.tokenizer):
                raise ValueError(
                    f"{role} has another tokenizer than {next(iter(parts))}: their tokens have to be the same"
                )
        by_model: dict[Hashable, str] = {}
        for role, policy in self.parts.items():
            if policy.id in by_model:
                raise ValueError(f"{by_model[policy.id]} and {role} are one model: a node could not say which drew it")
            by_model[policy.id] = role
        every = self.parts.values()
        self.tokenizer = self.lead.tokenizer
        self.takes_stop = all(policy.takes_stop for policy in every)
        self.ranks = all(policy.ranks for policy in every)
        self.top_tokens = min(policy.top_tokens for policy in every)
        leading = next(iter(parts.values()))
        for name in ("lm", "token_text"):  # a pair whose reference is the policy reads them
            if hasattr(leading, name):
                setattr(self, name, getattr(leading, name))

    @property
    def id(self) -> Hashable:
        """Id of the leading policy's model. Each node says which model sampled it."""
        return self.lead.id

    @property
    def models(self) -> Mapping[str, Hashable]:
        """Ids by role, for usage; the leading policy is "policy"."""
        roles = {role: policy.id for role, policy in self.parts.items() if policy is not self.lead}
        return {"policy": self.id, **roles}

    @property
    def context(self) -> int | None:
        """Tokens that prompt and response may have together in every one of them."""
        return min((policy.context for policy in self.parts.values() if policy.context is not None), default=None)

    @property
    def forward_calls(self) -> int | None:
        """Forwards of all of them together; None where one does not count its own."""
        calls = [policy.forward_calls for policy in self.parts.values()]
        return None if None in calls else sum(call for call in calls if call is not None)

    def session(self) -> Any:
        """The same policies with requests of its own; see Policy."""
        own = copy.copy(self)
        own.parts = {role: policy.session() for role, policy in self.parts.items()}
        own.lead = next(iter(own.parts.values()))
        own._begin()
        return own

    def _begin(self) -> None:
        """Forget all requests: this is a new session."""

    def encode(self, prompt: Prompt) -> tuple[int, ...]:
        """Token ids of a prompt, as the leading policy has it."""
        ids = self.lead.encode(prompt)
        for policy in self.parts.values():
            if policy is not self.lead:
                policy.encode(prompt.with_ids(ids))  # refuses what has no room
        return ids

    def failures(self) -> list[tuple[Request, RequestFailed]]:
        """Requests given up on by one of them; see PolicyBase.failures."""
        failed = [failure for policy in self.parts.values() for failure in policy.failures()]
        return [(self._asker(request), error) for request, error in failed]

    def _asker(self, request: Request) -> Request:
        """The request of this policy's own for which one of the others was asked this."""
        return request

    def release(self, tree: SearchTree) -> None:
        """Forget a tree in all of them."""
        for policy in self.parts.values():
            policy.release(tree)


class PolicyPool(JointPolicy):
    """Several policies for one search. A strategy's Expand says which of them draws: AdaptiveBranch(policies=).

    Each is counted by its name in `Result.usage`, but the first, which is "policy" there and draws where nothing is
    said. A scorer reuses a policy's log-probabilities only for the steps that this policy drew.

    Args:
        policies: by name. They have one vocabulary.

    Raises:
        TypeError, ValueError: see JointPolicy.
    """

    def __init__(self, policies: Mapping[str, Policy]) -> None:
        if not isinstance(policies, Mapping):
            raise TypeError(f"policies must be a mapping of names to policies, got {type(policies).__name__}")
        super().__init__(policies)
        self.names = tuple(policies)
        self._begin()

    def _begin(self) -> None:
        self._asked: dict[Request, PolicyBase] = {}

    def submit(self, requests: Sequence[Request]) -> None:
        """See Policy.submit. Raises ValueError where a request names a policy that is not one of these."""
        groups: dict[str, list[Request]] = {}
        for request in requests:
            name = next(iter(self.parts)) if request.policy is None else request.policy
            if name not in self.parts:
                raise ValueError(f"policy={name!r} is none of this pool, which has {', '.join(self.parts)}")
            groups.setdefault(name, []).append(request)
        for name, group in groups.items():
            self.parts[name].submit(group)
            self._asked.update(dict.fromkeys(group, self.parts[name]))

    def advance(self) -> list[tuple[Request, list[Node]]]:
        """One forward of each that has requests; see Policy.advance."""
        answered: list[tuple[Request, list[Node]]] = []
        for policy in dict.fromkeys(self._asked.values()):
            answered += policy.advance()
        for request, _ in answered:
            del self._asked[request]
        return answered

    def interrupt(self, request: Request) -> list[Node]:
        """See Policy.interrupt."""
        return self._asked.pop(request).interrupt(request)

    def drop(self, requests: Sequence[Request]) -> None:
        """Forget unanswered requests; see PolicyBase.drop."""
        for request in requests:
            policy = self._asked.pop(request, None)
            if policy is not None:
                policy.drop([request])

    def release(self, tree: SearchTree) -> None:
        """Forget a tree in all of them."""
        self._asked = {request: policy for request, policy in self._asked.items() if request.node.tree is not tree}
        super().release(tree)


def _same_tokens(one: Any, other: Any) -> bool:
    """Return True if two tokenizers have one vocabulary, or one of the policies has no tokenizer to compare."""
    if one is None or other is None or one is other:
        return True
    return bool(one.get_vocab() == other.get_vocab())
