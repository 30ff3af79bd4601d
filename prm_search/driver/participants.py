"""Models: the policy, scorer and prover of a search as its loops see them: what they cost and how they are left."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Generic, Literal, TypeVar

from ..answers import Selection
from ..checks import function, require
from ..protocols import AsyncPolicyBase, PolicyBase, Request, Scorer, ScorerDefaults
from ..strategies import Steer
from ..tree import Node, Prompt, SearchTree
from ..usage import Usage
from ..values import Advantage, Value, q, resolve_value
from .driver import Driver
from .measured import Measured
from .records import Outcome, nodes_of
from .result import Event, Result
from .search_settings import SearchSettings

P = TypeVar("P", PolicyBase, AsyncPolicyBase)


class Participants(Measured, Generic[P]):
    """A policy and up to two scorers.

    Args:
        given: the policy as it was given: scorers meet it so.
        policy: what samples steps for this loop: a session of it.
        scorer: rewards them; None for no rewards (all values 0).
        prover: a second scorer, whose rewards a value may read (values.Advantage).
        on_event: called with every Event.

    Raises:
        TypeError: one of them lacks a method of its protocol.
        ValueError: a prover without a scorer, or of the scorer's name.
    """

    def __init__(
        self,
        user_policy: object,
        policy: P,
        scorer: Scorer | None,
        prover: Scorer | None,
        on_event: Callable[[Event], object] | None,
    ) -> None:
        super().__init__()
        for name, model in (("scorer", scorer), ("prover", prover)):
            if model is not None:
                require(name, model, Scorer)
        if prover is not None and scorer is None:
            raise ValueError("prover= needs scorer= beside it")
        if prover is not None and scorer is not None and prover.name == scorer.name:
            raise ValueError(f"prover and scorer are both named {scorer.name!r}; give one of them another name")
        self.scorers = [ScorerDefaults.of(model) for model in (scorer, prover) if model is not None]
        for wrapped in self.scorers:
            wrapped.bind(user_policy)  # a pair whose reference is the policy learns here which that is
        self.policy: P = policy
        if on_event is not None:
            function("on_event", on_event, "a function of an Event, or None,")
        self.on_event = on_event
        self._numbers: dict[SearchTree, int] = {}
        self._added = 0

    # -- a tree's beginning and end -----------------------------------------------------------------------------------

    def begin(self, driver: Driver, prompt: Prompt, settings: SearchSettings, occurrence: int) -> SearchTree:
        """Plant a tree for a prompt and start its search. Raises ValueError where prompt or settings do not fit."""
        strategy = settings.strategy.over(self.policy) if isinstance(settings.strategy, Steer) else settings.strategy
        if isinstance(strategy, Steer) and not self.scorers:
            raise ValueError("strategy=Steer(...) needs scorer=, which chooses among the candidates")
        if settings.sampling.stop and not self.policy.takes_stop:
            raise ValueError(f"stop={settings.sampling.stop!r}: this policy takes no stop strings")
        wanted, known = settings.sampling.confidence_tokens, self.policy.top_tokens
        if wanted > known:
            tells = "no probable tokens beside the drawn one" if known < 1 else f"{known} most probable tokens at most"
            raise ValueError(f"confidence_tokens={wanted}: this policy tells {tells}")
        unknown = [name for name in getattr(strategy, "policies", ()) if name not in self.policy.names]
        if unknown:
            raise ValueError(f"policies={unknown[0]!r}: the search's policy is no PolicyPool with one of that name")
        tree = SearchTree(self.encode(prompt), occurrence=occurrence)
        tree.answer = settings.answer
        if self.scorers:
            tree.primary = self.scorers[0].name
        context = min(self._contexts().values(), default=None)
        settings = settings.within(None if context is None else context - len(tree.prompt_ids))
        self._numbers[tree] = self._added
        self._added += 1
        driver.add(tree, strategy, sampling=settings.sampling, budget=settings.budget, value=self._value(settings))
        return tree

    def finish(self, outcome: Outcome, settings: SearchSettings, selection: Selection | None = None) -> Result:
        """The result of a search that ended; every model forgets its tree.

        Args:
            outcome: how it ended.
            settings: its own.
            selection: what `settings.choose` said of its candidates; None where it has not been asked.
        """
        try:
            selection = selection or settings.choose(outcome.candidates)
            candidates = settings.rank(outcome.candidates, None if selection is None else selection.node)
            result = Result(candidates, outcome.tree, self.usage(outcome.tree), outcome.stopped, selection)
            self.event("done", outcome.tree, result=result)
        finally:
            self.release(outcome.tree)
        return result

    def release(self, *trees: SearchTree) -> None:
        """Make every model forget these trees. Where that fails, all are still tried and the first error is raised."""
        failed: Exception | None = None
        for tree in trees:
            self._numbers.pop(tree, None)
            for release in (self.policy.release, *(scorer.release for scorer in self.scorers)):
                try:
                    release(tree)
                except Exception as error:
                    failed = failed or error
        if failed is not None:
            raise failed

    def encode(self, prompt: Prompt) -> Prompt:
        """The prompt with the policy's token ids. Raises ValueError where it is empty, leaves no room, or cannot be
        scored."""
        for scorer in self.scorers:
            scorer.check_prompt(prompt)
        ids = self.policy.encode(prompt)
        for name, limit in self._contexts().items():
            if len(ids) >= limit:
                raise ValueError(
                    f"the prompt has {len(ids)} tokens; the {name}'s context of {limit} leaves no room for a response"
                )
        return prompt.with_ids(ids)

    def _contexts(self) -> dict[str, int]:
        """Tokens that prompt and response may have together, in the policy's tokens, for each model that says so."""
        limits = {"policy": self.policy.context}
        limits |= {scorer.name: scorer.policy_context for scorer in self.scorers}
        return {name: limit for name, limit in limits.items() if limit is not None}

    def _value(self, settings: SearchSettings) -> Value:
        chosen = settings.value if settings.value is not None else getattr(settings.strategy, "value", None)
        if isinstance(chosen, str) and not self.scorers:
            raise ValueError(f"value={chosen!r} needs scorer=: without one there are no rewards")
        if chosen is not None:
            return resolve_value(chosen)
        if not self.scorers:
            return _nothing
        value = resolve_value(q if self.scorers[0].default_value is None else self.scorers[0].default_value)
        return value if len(self.scorers) == 1 else Advantage(prover=self.scorers[1].name, value=value)

    def score(self, nodes: Sequence[Node]) -> None:
        """Score nodes, by the scorer and then by the prover."""
        for scorer in self.scorers if nodes else ():
            with self.measured("scorer", scorer):
                scorer.score_nodes(nodes)

    # -- what happens and what it costs -------------------------------------------------------------------------------

    def event(
        self, kind: Literal["steps", "done"], tree: SearchTree, nodes: Sequence[Node] = (), result: Result | None = None
    ) -> None:
        """Tell the caller."""
        if self.on_event is not None and tree in self._numbers:
            self.on_event(Event(kind, self._numbers[tree], tree, tuple(nodes), result))

    def report(self, nodes: Sequence[Node]) -> None:
        """Tell the caller of new nodes."""
        of_tree: dict[SearchTree, list[Node]] = {}
        for node in nodes if self.on_event is not None else ():
            of_tree.setdefault(node.tree, []).append(node)
        for tree, fresh in of_tree.items():
            self.event("steps", tree, fresh)

    def usage(self, tree: SearchTree) -> Usage:
        """A tree's token counts by role, and the whole batch's forwards and seconds so far."""
        roles: dict[str, Hashable] = dict(self.policy.models)
        for index, scorer in enumerate(self.scorers):
            for role, model in scorer.models.items():
                roles[role if index == 0 else f"{scorer.name}.{role}"] = model
        usage = Usage.read(tree.meter, roles)
        if self.scorers:
            prompt = len(tree.prompt_ids)
            ends = [node.end for node in tree.nodes[1:] if node.scored_by(self.scorers[0].name)]
            usage.rescored_tokens = sum(prompt + end for end in ends)
            usage.rescored_cached_tokens = prompt + sum(ends) if ends else 0
        self.read_batch(usage)
        return usage

    def read_batch(self, usage: Usage) -> None:
        """Write the batch's forwards and seconds so far into a usage."""
        usage.forward_calls, usage.seconds = dict(self.forward_calls), dict(self.seconds)


def new_nodes(answered: Sequence[tuple[Request, Sequence[Node]]]) -> list[Node]:
    """The distinct nodes that these answers brought, parents first."""
    return list(dict.fromkeys(node for request, children in answered for node in nodes_of(request, children)))


def _nothing(node: Node) -> float:
    """The value of every node of a search without a scorer."""
    return 0.0
