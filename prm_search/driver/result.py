"""Results of a search: a Result for each prompt, and Events on the way."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ..answers import Selection
from ..tree import Node, SearchTree
from ..usage import Usage
from ..viewer.notebook import notebook_html
from ..viewer.page_tree import PageTree, costs_of


@dataclass
class Result:
    """One prompt's answer and everything that was tried for it.

    Attributes:
        candidates: distinct finished nodes: the chosen one, then complete responses by value, then cut ones. A node
            drawn several times has that `count`.
        tree: every step, with its tokens, rewards and value.
        usage: what it cost.
        stopped: why the search ended: "finished"; "length", where every candidate is full; "tokens", "nodes",
            "depth" or "seconds", where that budget cut something; "cancelled"; "failed", where the policy gave up on a
            request (`failure` says why).
        selection: the vote behind the choice; None where there are no candidates (a budget or a cancel came first).
    """

    candidates: list[Node]
    tree: SearchTree
    usage: Usage
    stopped: str
    selection: Selection | None = None

    @property
    def node(self) -> Node | None:
        """End of the chosen path; None where there are no candidates."""
        return None if self.selection is None else self.selection.node

    @property
    def text(self) -> str:
        """The chosen response, without special tokens; empty without candidates."""
        return "" if self.node is None else self.node.path_text()

    @property
    def token_ids(self) -> list[int]:
        """The chosen response's tokens, the end of sequence included."""
        return [] if self.node is None else self.node.path_ids()

    @property
    def answer(self) -> str | None:
        """Return what `answer=` found in the chosen response."""
        return None if self.selection is None else self.selection.answer

    @property
    def value(self) -> float | None:
        """Value of the chosen path, in the unit of the rewards (beta * nats)."""
        return None if self.node is None else self.node.value

    @property
    def failure(self) -> str | None:
        """Reason why the policy gave up on a request; None for a search that did not fail."""
        return self.tree.notes[-1] if self.stopped == "failed" else None

    @property
    def log_z(self) -> float | None:
        """Estimate of log sum_y policy(y) exp(value(y) / temperature), nats, of a ParticleFilter; else None."""
        return self.tree.log_z

    def _repr_html_(self) -> str:
        """The answer and its tree, as notebooks show a result."""
        facts = [("stopped", self.stopped)]
        if self.answer is not None:
            facts.insert(0, ("answer", self.answer))
        page = PageTree.of(self.tree, "Search", chosen=self.node, facts=facts, usage=costs_of(self.usage))
        return notebook_html(page, self.text, facts)

    def __repr__(self) -> str:
        value = "None" if self.value is None else f"{self.value:.4g}"
        text = self.text if len(self.text) <= 60 else self.text[:57] + "..."
        return f"Result(text={text!r}, answer={self.answer!r}, value={value}, stopped={self.stopped!r})"


@dataclass(frozen=True)
class Event:
    """Progress of a search.

    Attributes:
        kind: "steps" (nodes were drawn and scored) or "done".
        prompt: number of the prompt, in the order in which they were added.
        tree: its tree.
        nodes: the new nodes of "steps", parents first.
        result: the result of "done".
    """

    kind: Literal["steps", "done"]
    prompt: int
    tree: SearchTree
    nodes: tuple[Node, ...] = ()
    result: Result | None = None
