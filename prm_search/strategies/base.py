"""The requests that a strategy may make. A strategy is a frozen config whose `run` is a generator: it yields requests,
gets the scored children back, and returns its candidates. It never sees a model, a budget or a batch."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Protocol, runtime_checkable

import numpy as np

from ..checks import count
from ..rng import strategy_uniforms
from ..sampling import Doubt, Floor
from ..tree import Node, SearchTree


@dataclass(frozen=True)
class Expand:
    """Draw children for each of these slots; the driver sends back the flat list of scored children, slot by slot.

    Lists of nodes are lists of draws: a node that was drawn twice (merged duplicates) stands in them twice. Each place
    that such a node is given here continues one of its lineages, in their order. So a strategy that just sorts and cuts
    such lists does the same whether duplicates are merged or not. A cut that keeps some of a node's places continues
    that many of its lineages.

    Where the budget or the length leaves a node without a child, the driver finishes that node and sends it back in its
    own place. So a strategy meets budgets only as finished nodes. One that has children already, and the root, send
    back nothing instead.

    Args:
        nodes: unfinished nodes of one tree, none more often than its count.
        n: children for each place (one number, or one a place).
        until: "step" draws one step; "end" goes on to the end of the response, still cut into steps, and sends
            back the last node of each chain.
        rollout: mark the children as rollouts (see Node.rollout).
        merge: count equal children of a node on one node.
        greedy: take the most probable token each time, whatever the search's temperature.
        policy: which policy of a PolicyPool draws; None for the first.
        ranked: draw nothing: the children are the n most probable next tokens, in their order, a step each.
        doubt: end steps before tokens of which the policy is unsure, whatever the search's StepRule says of that. A
            node whose next token is one is sent back itself, in its place, unfinished.
        floor: ends a child that the policy is not sure enough of, while it is drawn (finish "weak").
        enough: called with each child in the order of the draws, once it and all before it are drawn. Where it returns
            True the answer ends there, and what is still drawn is given up. It is a hint that saves tokens: where a
            budget has an answer drawn step by step, all children come. So a strategy has to cut the answer by the same
            rule. One place only, without merging.
        alive: the nodes that any unfinished candidate of this run will descend from; what they share is settled and
            can be streamed. None says nothing, and nothing is streamed before the end.
    """

    nodes: Sequence[Node]
    n: int | Sequence[int] = 1
    until: Literal["step", "end"] = "step"
    rollout: bool = False
    merge: bool = True
    alive: Sequence[Node] | None = None
    greedy: bool = False
    policy: str | None = None
    ranked: bool = False
    doubt: Doubt | None = None
    floor: Floor | None = None
    enough: Callable[[Node], bool] | None = None


@dataclass(frozen=True)
class Parallel:
    """Independent sub-searches of one tree; the driver sends back the list of their results, in order.

    The rest of a token or node budget is split evenly between the runs (remainders to the first), so that runs do not
    depend on each other's speed. Tokens and nodes that a run leaves over go back when all have ended. For the same
    reason runs may share only nodes that each of them expands in its first request.
    """

    runs: Sequence[Run]


Run = Generator[Expand | Parallel, Any, list[Node]]


@runtime_checkable
class Strategy(Protocol):
    """The object is config; the caller owns all state.

    An attribute `value` (a Value or None) is optional: what the driver sets Node.value to where `search(value=)` does
    not say. So are `select`, the choice among candidates where the call names none (else "best"), and
    `confidence_tokens`, which a strategy that reads Node.confidences has set.
    """

    def run(self, root: Node) -> Run:
        """Search below root. Yields Expand (gets list[Node]) or Parallel (gets list[list[Node]]) and returns the
        candidates, in an order that depends on the draws alone. Candidates are all finished nodes that were sent, or at
        least all that could be chosen."""
        ...


class OwnNumbers:
    """Uniform numbers that a strategy draws for itself: a function of the search's seed and its tree alone.

    Args:
        tree: of the search.
        purpose: which of the strategy's sequences.
    """

    AHEAD: ClassVar[int] = 16  # numbers that are drawn together: one at a time they cost as much each

    def __init__(self, tree: SearchTree, purpose: int = 0) -> None:
        self._tree, self._purpose, self._used = tree, purpose, 0
        self._ahead = np.empty(0)

    def __call__(self, n: int) -> np.ndarray:
        """Return the next n numbers, [n] float64 in [0, 1)."""
        if n > len(self._ahead):
            more = max(n, self.AHEAD)
            self._ahead = strategy_uniforms(self._tree.seed, self._tree.stream, self._purpose, self._used, more)
        numbers, self._ahead = self._ahead[:n], self._ahead[n:]
        self._used += n
        return numbers


def at_least(name: str, value: object, least: int = 1) -> None:
    """Check a strategy's number. Raises ValueError naming it unless it is an integer from `least` to checks.MANY."""
    count(name, value, least)


def strategy_confidence(strategy: Strategy) -> int:
    """Return the Sampling.confidence_tokens that a strategy needs, 0 for one that reads no confidences."""
    tokens: int = getattr(strategy, "confidence_tokens", 0)
    return tokens


def distinct(nodes: Sequence[Node]) -> list[Node]:
    """The nodes without repetitions, in order of first appearance."""
    return list(dict.fromkeys(nodes))
