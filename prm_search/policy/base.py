"""PolicyBase, BlockingPolicy: policies that a loop calls, with all that a search may ask of one."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, Literal

from ..checks import require
from ..next_token import NextToken
from ..sampling import Request, Sampling
from ..tree import Node, SearchTree
from .facts import TELLS_NONE, PolicyFacts, StatedFacts
from .protocols import Policy, RequestFailed


class PolicyBase(PolicyFacts):
    """A Policy with all that a search may ask of one. Policies of the library derive from it; others may.

    A derived class writes id, encode, submit, advance, interrupt and release, and overrides what it knows better.
    """

    @abstractmethod
    def submit(self, requests: Sequence[Request]) -> None:
        """Take requests on; see Policy."""

    @abstractmethod
    def advance(self) -> list[tuple[Request, list[Node]]]:
        """One forward, or one blocking round; see Policy."""

    @abstractmethod
    def interrupt(self, request: Request) -> list[Node]:
        """End a request now; see Policy."""

    def failures(self) -> list[tuple[Request, RequestFailed]]:
        """Requests of this session that have been given up on since the last call. None is answered any more."""
        return []

    def session(self) -> PolicyBase:
        """The same policy for one more loop, with requests of its own. A policy without sessions gives itself, and
        serves one loop at a time."""
        return self

    def steered(
        self, pair: Any, alpha: float, below: float | None = None, candidates: int | None = None,
        confidence_of: str = "top",
    ) -> PolicyBase:  # fmt: skip
        """Return a policy that draws from this one's logits + alpha * the pair's log-ratio; the rest as in Steer.

        Raises:
            TypeError: it cannot be steered token by token.
        """
        raise TypeError(f"Steered wraps an HFPolicy, got {type(self).__name__}")

    def next_token_logprobs(self, asks: Sequence[NextToken], words: Sequence[str]) -> list[dict[str, float]]:
        """Log-probabilities that the next token spells each of some words, as judges ask for them.

        A token spells a word by its text, in any case and with any white space around it; those of a word's tokens are
        summed (next_token.word_ids, or next_token.read_words of texts). Tokens count on the meter of the ask's tree,
        and what is kept of them goes with `release` of that tree.

        Args:
            asks: N places; see NextToken.
            words: see next_token.check_words.

        Returns:
            N dicts, word -> nats, before temperature. A word is left out where the model's answer does not tell, as an
            endpoint does that shows the most probable tokens only.

        Raises:
            TypeError: this policy cannot tell.
            ValueError: a word is no token, or a text does not fit the context.
        """
        raise TypeError(TELLS_NONE.format(type(getattr(self, "_policy", self)).__name__))

    def drop(self, requests: Sequence[Request]) -> None:
        """Forget unanswered requests of this session: after an error, or because a search has enough without them. What
        they have drawn counts as sampled."""
        for request in requests:
            self.interrupt(request)

    def expand(
        self, nodes: Sequence[Node], n: int, *, sampling: Sampling, until: Literal["step", "end"] = "step"
    ) -> list[list[Node]]:
        """Draw n children of each lineage of each node and return them, one list a node (twins repeated).

        Raises:
            RequestFailed: a request was given up on.
        """
        for node in nodes:
            if node.tree.prompt.token_ids is None:
                node.tree.prompt = node.tree.prompt.with_ids(self.encode(node.tree.prompt))
        return self.draw([Request.draw(node, n, sampling, until=until) for node in nodes])

    def draw(self, requests: Sequence[Request]) -> list[list[Node]]:
        """Draw what requests ask for, in a session of their own, and return the last nodes of each (twins repeated).

        Raises:
            RequestFailed: a request was given up on.
        """
        own = self.session()
        answers: dict[Request, list[Node]] = {}
        try:
            own.submit(requests)
            while len(answers) < len(requests):
                answers.update(own.advance())
                for _, error in own.failures():
                    raise error
        except BaseException:
            own.drop([request for request in requests if request not in answers])
            raise
        return [answers[request] for request in requests]

    @classmethod
    def of(cls, policy: Policy) -> PolicyBase:
        """The policy itself, or a plain Policy with the answers that it lacks. Raises TypeError for anything else."""
        if isinstance(policy, PolicyBase):
            return policy
        require("policy", policy, Policy)
        return _Completed(policy)


class _Completed(StatedFacts, PolicyBase):
    """A plain Policy. What it has of the rest is used."""

    def submit(self, requests: Sequence[Request]) -> None:
        self._policy.submit(requests)

    def advance(self) -> list[tuple[Request, list[Node]]]:
        return self._policy.advance()

    def interrupt(self, request: Request) -> list[Node]:
        return self._policy.interrupt(request)

    def failures(self) -> list[tuple[Request, RequestFailed]]:
        own = getattr(self._policy, "failures", super().failures)
        failed: list[tuple[Request, RequestFailed]] = own()
        return failed

    def drop(self, requests: Sequence[Request]) -> None:
        own: Any = getattr(self._policy, "drop", super().drop)
        own(requests)

    def session(self) -> PolicyBase:
        own = getattr(self._policy, "session", None)
        return self if own is None else PolicyBase.of(own())

    def next_token_logprobs(self, asks: Sequence[NextToken], words: Sequence[str]) -> list[dict[str, float]]:
        own: Any = getattr(self._policy, "next_token_logprobs", super().next_token_logprobs)
        return list(own(asks, words))


class BlockingPolicy(PolicyBase):
    """Base of policies that answer a whole batch of requests in one call: derive, call super().__init__(), write `run`.

    It supplies submit, advance, interrupt and release; id and encode remain the subclass's.
    """

    def __init__(self) -> None:
        self._waiting: list[Request] = []

    @abstractmethod
    def run(self, requests: Sequence[Request]) -> list[list[Node]]:
        """Answer requests: for each, the last node of every child's chain (twins repeated), in child order."""

    def submit(self, requests: Sequence[Request]) -> None:
        """Take requests on; the next advance answers them."""
        self._waiting.extend(requests)

    def advance(self) -> list[tuple[Request, list[Node]]]:
        """Answer everything that waits, in one round."""
        requests, self._waiting = self._waiting, []
        return list(zip(requests, self.run(requests), strict=True)) if requests else []

    def interrupt(self, request: Request) -> list[Node]:
        """Drop a request; between two rounds none has drawn anything."""
        self._waiting.remove(request)
        return []

    def expand(
        self, nodes: Sequence[Node], n: int, *, sampling: Sampling, until: Literal["step", "end"] = "step"
    ) -> list[list[Node]]:
        """Draw n children of each lineage of each node, in one round; what waits is left alone."""
        return self.run([Request.draw(node, n, sampling, until=until) for node in nodes])

    def release(self, tree: SearchTree) -> None:
        """Drop a tree's waiting requests. A policy that caches anything for a tree frees it here too."""
        self._waiting = [request for request in self._waiting if request.node.tree is not tree]
