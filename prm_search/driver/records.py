"""The driver's records: a search, its runs, and what they wait for."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from ..protocols import Request, Sampling
from ..strategies.base import Expand, Run
from ..tree import Node, SearchTree
from ..values import Value
from .budget import Budget, Purse


@dataclass
class Outcome:
    """A search that ended.

    Attributes:
        tree: its tree.
        candidates: distinct finished nodes, in the strategy's order.
        stopped: why it ended: "cancelled"; "failed", where the policy gave up on a request; the budget that bit
            ("seconds", "tokens", "nodes", "depth"); "length", where every candidate is full; otherwise "finished".
    """

    tree: SearchTree
    candidates: list[Node]
    stopped: str


@dataclass(eq=False)
class Join:
    """A run that waits for parallel ones."""

    task: Task
    parts: list[Task]
    results: list[list[Node]]
    left: int
    alone: bool = False  # one run that shares the waiting run's purse and answers its Expand


@dataclass(eq=False)
class Task:
    """A generator, its purse, and what it waits for."""

    run: Run
    purse: Purse
    join: Join | None = None
    place: int = 0
    waits: Expansion | None = None


@dataclass(eq=False)
class Expansion:
    """An Expand under way."""

    task: Task
    ask: Expand
    drawn: list[list[Node]]  # one list a slot
    left: int = 0  # requests not answered
    answered: set[int] = field(default_factory=set)  # slots; of an Expand with `enough`, whose draws have one each
    passed: int = 0  # leading slots that `enough` has seen

    def decided(self) -> bool:
        """Return True if what is drawn without a gap from the first draw on is enough."""
        enough = self.ask.enough
        while enough is not None and self.passed in self.answered:
            self.passed += 1
            if any(enough(child) for child in self.drawn[self.passed - 1]):
                return True
        return False


@dataclass(eq=False)
class Search:
    """One tree's search."""

    tree: SearchTree
    sampling: Sampling
    budget: Budget
    value: Value
    deadline: float
    tasks: set[Task] = field(default_factory=set)
    requests: dict[Request, tuple[Expansion, list[int]]] = field(default_factory=dict)  # with each draw's slot
    finished: dict[Node, None] = field(default_factory=dict)
    limits: set[str] = field(default_factory=set)


def step_by_step(ask: Expand) -> Run:
    """An Expand to the end as single steps, which draw the same: for budgets that count steps."""
    ask = replace(ask, enough=None)
    ends = yield replace(ask, until="step")
    while live := [end for end in ends if not end.finished]:
        grown = yield replace(ask, nodes=live, n=1, until="step")
        went_on, grown, ends_now = set(live), iter(grown), []
        sent = next(grown, None)
        for end in ends:
            if end not in went_on:
                ends_now.append(end)
            elif sent is not None and (sent is end or sent.parent is end):
                ends_now.append(sent)
                sent = next(grown, None)
            # else the budget went to its twins
        ends = ends_now
    return ends


def chain(start: Node, end: Node) -> list[Node]:
    """The nodes below start up to end, in order."""
    nodes: list[Node] = []
    node: Node | None = end
    while node is not None and node is not start:
        nodes.append(node)
        node = node.parent
    return nodes[::-1]


def nodes_of(request: Request, children: Sequence[Node]) -> list[Node]:
    """The distinct nodes that an answer brought, parents first."""
    return list({node: None for child in children for node in chain(request.node, child)})


def set_values(value: Value, nodes: Sequence[Node]) -> None:
    """Give scored nodes their values. Raises ValueError where one is not a number."""
    for node in nodes:
        node.value = float(value(node))
        if math.isnan(node.value):
            raise ValueError(f"value: {node!r} was given NaN")
