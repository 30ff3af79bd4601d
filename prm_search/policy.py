"""Policies: what samples steps. The protocols, and the bases that answer what a policy has nothing to say to."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Hashable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, Protocol, runtime_checkable

from .checks import require
from .next_token import NextToken
from .sampling import Request, Sampling
from .tree import Node, Prompt, SearchTree


class RequestFailed(RuntimeError):
    """A policy has given up on one request for good. The search that asked for it ends there; others go on."""


@runtime_checkable
class Policy(Protocol):
    """Samples steps.

    The driver calls submit and advance until its requests are answered; expand is the same for people who
    drive a search by hand. A policy counts what it did on `node.tree.meter`.

    This is the least that a policy needs. PolicyBase names all that a search may ask besides. A policy that does not
    derive from PolicyBase may have any of these members too (`PolicyBase.of` looks, once a search).
    """

    @property
    def id(self) -> Hashable:
        """Id of the model whose raw log-probabilities the nodes carry."""
        ...

    def encode(self, prompt: Prompt) -> tuple[int, ...]:
        """Token ids of a prompt. Raises ValueError where it is empty or leaves no room in the context."""
        ...

    def expand(
        self, nodes: Sequence[Node], n: int, *, sampling: Sampling, until: Literal["step", "end"] = "step"
    ) -> list[list[Node]]:
        """Draw n children of each lineage of each node and return them, one list a node."""
        ...

    def submit(self, requests: Sequence[Request]) -> None:
        """Take requests on; nothing is computed yet."""
        ...

    def advance(self) -> list[tuple[Request, list[Node]]]:
        """One forward (or one blocking round). Returns the requests that ended in it, each with the last node of
        every child's chain (twins repeated); empty where none did."""
        ...

    def interrupt(self, request: Request) -> list[Node]:
        """End a request now: what its children have drawn so far becomes nodes with finish "budget"; a child
        that has drawn nothing gives none."""
        ...

    def release(self, tree: SearchTree) -> None:
        """Forget a tree: drop its unanswered requests and free its KV."""
        ...


_TELLS_NONE = "a judge needs a policy that tells log-probabilities of the next token, and a {} does not"


class _PolicyFacts(ABC):
    """Facts that policies of both kinds may state.

    Attributes:
        id: of the model whose raw log-probabilities the nodes carry.
        context: tokens that prompt and response may have together, at which a search stops as it does at
            max_new_tokens; None for no limit.
        forward_calls: forwards run so far; None to count the calls of advance (of run, where it is asynchronous).
        alpha: strength with which every token is steered; None where it is not.
        tokenizer: its transformers tokenizer; None where it has none.
        top_tokens: most probable tokens that it can tell at each place, for Sampling.confidence_tokens and ranked
            requests; 0 where it tells none. A search that needs more is refused.
        ranks: whether it answers requests that are ranked or doubting, as all do that draw by drawing.Draw and ask it
            for its `rank`.
        names: of the policies that an Expand may ask for one of; none for a single policy.
        choice: the (below, candidates, confidence_of) by which every token is chosen; see Steer. None where it is not.
        takes_stop: whether responses end at Sampling.stop, as all do that are drawn by drawing.Draw. A search with stop
            strings is refused where they do not.
    """

    if TYPE_CHECKING:  # read-only to a type checker: a derived class may compute them, or set them as attributes

        @property
        def id(self) -> Hashable: ...
        @property
        def context(self) -> int | None: ...
        @property
        def forward_calls(self) -> int | None: ...
    else:
        context = forward_calls = None

    alpha: float | None = None
    tokenizer: Any = None
    takes_stop: bool = False
    top_tokens: int = 0
    ranks: bool = False
    names: tuple[str, ...] = ()
    choice: tuple[float | None, int | None, str] | None = None

    @property
    def models(self) -> Mapping[str, Hashable]:
        """Ids of its models by role, for usage; "policy" is the one whose id is this policy's."""
        return {"policy": self.id}

    @abstractmethod
    def encode(self, prompt: Prompt) -> tuple[int, ...]:
        """Token ids of a prompt. Raises ValueError where it is empty or leaves no room in the context."""

    @abstractmethod
    def release(self, tree: SearchTree) -> None:
        """Forget a tree: drop its unanswered requests and free its KV."""


class PolicyBase(_PolicyFacts):
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
        raise TypeError(_TELLS_NONE.format(type(getattr(self, "_policy", self)).__name__))

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


class _Completed(PolicyBase):
    """A plain Policy. What it has of the rest is used."""

    def __init__(self, policy: Policy) -> None:
        self._policy = policy
        self.alpha, self.tokenizer = getattr(policy, "alpha", None), getattr(policy, "tokenizer", None)
        self.takes_stop = getattr(policy, "takes_stop", False)
        self.top_tokens = getattr(policy, "top_tokens", 0)
        self.ranks = getattr(policy, "ranks", False)

    @property
    def id(self) -> Hashable:
        return self._policy.id

    @property
    def context(self) -> int | None:
        return getattr(self._policy, "context", None)

    @property
    def forward_calls(self) -> int | None:
        return getattr(self._policy, "forward_calls", None)

    def encode(self, prompt: Prompt) -> tuple[int, ...]:
        return self._policy.encode(prompt)

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

    def release(self, tree: SearchTree) -> None:
        self._policy.release(tree)


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


@runtime_checkable
class AsyncPolicy(Protocol):
    """Samples steps on an event loop (vLLM's AsyncLLM, an HTTP server): one task a request.

    This is the least that it needs. AsyncPolicyBase names all that a search may ask besides. A policy that does not
    derive from AsyncPolicyBase may have any of these members too; `interrupt` may be a function or a coroutine.
    """

    @property
    def id(self) -> Hashable:
        """Id of the model whose raw log-probabilities the nodes carry."""
        ...

    def encode(self, prompt: Prompt) -> tuple[int, ...]:
        """As in Policy."""
        ...

    async def run(self, request: Request) -> list[Node]:
        """The last node of every child's chain (twins repeated)."""
        ...

    def release(self, tree: SearchTree) -> None:
        """As in Policy."""
        ...


class AsyncPolicyBase(_PolicyFacts):
    """An AsyncPolicy with all that a search may ask of one. Policies of the library derive from it; others may."""

    @abstractmethod
    async def run(self, request: Request) -> list[Node]:
        """The last node of every child's chain (twins repeated)."""

    def interrupt(self, request: Request) -> bool | Awaitable[bool]:
        """Ask a running request to end soon with what it has drawn (finish "budget"); a request that has ended is left
        alone.

        Returns:
            False where that cannot be: its task is then cancelled, and what it has drawn is lost. It may be awaitable.
        """
        return False

    async def drop(self, requests: Sequence[Request]) -> None:
        """Forget requests whose tasks were cancelled while their search goes on; returns once nothing is drawn for them
        and what was drawn is counted. A policy whose cancelled `run` does that itself has nothing more to do."""

    async def next_token_logprobs(self, asks: Sequence[NextToken], words: Sequence[str]) -> list[dict[str, float]]:
        """As PolicyBase.next_token_logprobs, on the running event loop."""
        raise TypeError(_TELLS_NONE.format(type(getattr(self, "_policy", self)).__name__))

    @classmethod
    def of(cls, policy: AsyncPolicy) -> AsyncPolicyBase:
        """The policy itself, or a plain AsyncPolicy with the answers that it lacks. Raises TypeError for anything
        else."""
        if isinstance(policy, AsyncPolicyBase):
            return policy
        require("policy", policy, AsyncPolicy)
        return _CompletedAsync(policy)


class _CompletedAsync(AsyncPolicyBase):
    """A plain AsyncPolicy. What it has of the rest is used."""

    def __init__(self, policy: AsyncPolicy) -> None:
        self._policy = policy
        self.alpha, self.tokenizer = getattr(policy, "alpha", None), getattr(policy, "tokenizer", None)
        self.takes_stop = getattr(policy, "takes_stop", False)
        self.top_tokens = getattr(policy, "top_tokens", 0)
        self.ranks = getattr(policy, "ranks", False)

    @property
    def id(self) -> Hashable:
        return self._policy.id

    @property
    def context(self) -> int | None:
        return getattr(self._policy, "context", None)

    @property
    def forward_calls(self) -> int | None:
        return getattr(self._policy, "forward_calls", None)

    def encode(self, prompt: Prompt) -> tuple[int, ...]:
        return self._policy.encode(prompt)

    async def run(self, request: Request) -> list[Node]:
        return await self._policy.run(request)

    async def next_token_logprobs(self, asks: Sequence[NextToken], words: Sequence[str]) -> list[dict[str, float]]:
        own: Any = getattr(self._policy, "next_token_logprobs", super().next_token_logprobs)
        return list(await own(asks, words))

    async def interrupt(self, request: Request) -> bool:
        own: Any = getattr(self._policy, "interrupt", None)
        if own is None:
            return False
        reply = own(request)
        if inspect.isawaitable(reply):
            await reply
        return True

    def release(self, tree: SearchTree) -> None:
        self._policy.release(tree)
