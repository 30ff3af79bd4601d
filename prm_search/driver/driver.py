"""The driver's core: runs strategies by asking and telling. It holds no model and never waits.

    driver.add(tree, strategy, sampling=...)
    while driver.active:
        for request in driver.pending(): ...            # draw its children and score them
            driver.tell(request, children)
    driver.ended()

Every request resolves by itself. So trees, and the parallel runs of one tree, progress independently; only the children
of one Expand wait for each other. `loop.py` and `async_loop.py` are what puts models to it.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace

from ..protocols import Request, Sampling
from ..strategies.base import Expand, Parallel, Run, Strategy, distinct, strategy_confidence
from ..tree import Node, SearchTree
from ..values import Value
from .budget import Budget, Purse
from .records import Expansion, Join, Outcome, Search, Task, nodes_of, set_values, step_by_step

LIMITS = ("seconds", "tokens", "nodes", "depth")  # in the order in which Outcome.stopped names them


class Driver:
    """Runs the strategies of many trees.

    Args:
        clock: seconds, rising.
    """

    def __init__(self, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._searches: dict[SearchTree, Search] = {}
        self._new: list[Request] = []
        self._given_up: dict[Request, None] = {}
        self._ended: list[Outcome] = []

    @property
    def active(self) -> list[SearchTree]:
        """Trees whose search has not ended, in the order in which they were added."""
        return list(self._searches)

    def add(
        self,
        tree: SearchTree,
        strategy: Strategy,
        *,
        sampling: Sampling,
        budget: Budget | int | None = None,
        value: Value = lambda node: node.q,
    ) -> None:
        """Begin the search of a tree whose prompt has token ids. Other searches may be under way.

        Raises:
            ValueError: the tree is being searched already.
        """
        if tree in self._searches:
            raise ValueError("this tree is being searched already")
        limits = Budget.of(budget)
        tokens = strategy_confidence(strategy)
        if tokens:
            sampling = replace(sampling, confidence_tokens=tokens)
        deadline = math.inf if limits.seconds is None else self._clock() + limits.seconds
        search = Search(tree, sampling, limits, value, deadline)
        tree.seed = sampling.seed
        self._searches[tree] = search
        try:
            self._start(search, strategy.run(tree.root), Purse(limits.tokens, limits.nodes))
        except BaseException:
            self._drop(tree)
            raise

    def pending(self) -> list[Request]:
        """Requests that came up since the last call."""
        new, self._new = self._new, []
        return new

    def given_up(self) -> list[Request]:
        """Requests under way that no run waits for any more, since the last call: have the policy drop them. They count
        against a budget as if they had drawn all that they might."""
        given_up, self._given_up = list(self._given_up), {}
        return given_up

    def expired(self) -> list[Request]:
        """Requests under way whose search has no time left: interrupt them and tell what they have drawn."""
        now = self._clock()
        late = [search for search in self._searches.values() if now >= search.deadline]
        return [request for search in late for request in search.requests]

    def value(self, tree: SearchTree) -> Value:
        """Return what the nodes of a running search are ranked by."""
        return self._searches[tree].value

    def tell(self, request: Request, children: Sequence[Node], fresh: Sequence[Node] | None = None) -> None:
        """Hand in a request's scored children: the last node of every chain, twins repeated or not. Sets values.

        Args:
            request: it.
            children: of its node. One that was given up meanwhile is left alone.
            fresh: the new nodes (`nodes_of`), where the caller has given them their values (`set_values`).

        Raises:
            KeyError: the request is not under way.
            ValueError: a child is missing though nothing interrupted the request, or a value is not a number.
        """
        if request in self._given_up:
            del self._given_up[request]
            return
        search = self._searches[request.node.tree]
        expansion, slots = search.requests.pop(request)
        if fresh is None:
            fresh = nodes_of(request, children)
            set_values(search.value, fresh)
        late = self._clock() >= search.deadline
        by_lineage = {lineage: child for child in children for lineage in child.lineages}
        spent = 0
        for lineage, slot in zip(request.lineages, slots, strict=True):
            child = by_lineage.get(lineage)
            if child is not None:
                spent += child.end - request.node.end
                if late and request.until == "end":  # an interrupted chain may stop between two steps
                    self._finish(search, child, "seconds")
                if child.finished or request.until == "step":  # else its twin got further
                    expansion.drawn[slot].append(child)
                if child.finish == "budget":
                    search.limits.add("seconds" if late else "tokens")
            elif request.doubting:
                expansion.drawn[slot].append(request.node)
            elif late:
                search.limits.add("seconds")
            else:
                raise ValueError(f"the policy answered a request for {len(slots)} children without one of them")
        promised, spent = sum(request.caps), spent + request.wasted
        expansion.task.purse.spend(spent - promised, len(fresh) - len(slots))
        expansion.left -= 1
        expansion.answered.update(slots)
        if expansion.decided():
            self._give_up(search, expansion)
        if not expansion.left:
            self._resume(search, expansion.task, self._collect(search, expansion))

    def cancel(self, tree: SearchTree, stopped: str = "cancelled") -> list[Request]:
        """End a search now; its finished nodes are its candidates. Returns the requests that were under way.

        A tree that is not being searched (any more) is left alone.

        Args:
            tree: of the search.
            stopped: what its Outcome says.
        """
        if tree not in self._searches:
            return []
        search = self._drop(tree)
        candidates = [node for node in tree.nodes if node.finished and not node.rollout and node.value is not None]
        self._ended.append(Outcome(tree, candidates, stopped))
        return list(search.requests)

    def fail(self, tree: SearchTree, error: Exception) -> list[Request]:
        """End a search because a request of it was given up on, and note that in the tree; see `cancel`."""
        if tree in self._searches:
            tree.notes.append(f"a request failed: {error}")
        return self.cancel(tree, "failed")

    def seconds_left(self, tree: SearchTree) -> float:
        """Seconds until a search's time budget bites: negative once it has bitten, infinite without a time budget."""
        return self._searches[tree].deadline - self._clock()

    def ended(self) -> list[Outcome]:
        """Searches that ended since the last call."""
        ended, self._ended = self._ended, []
        return ended

    def committed(self, tree: SearchTree, eligible: Callable[[list[Node]], Sequence[Node]] = list) -> list[Node]:
        """The steps that the answer of a running search is certain to begin with: for streaming.

        Args:
            eligible: of the finished nodes so far, those that could still be chosen (default: all).

        Returns:
            The longest path that every live beam and every eligible finished node begins with; it never shrinks.
        """
        search = self._searches[tree]
        ends = list(eligible(list(search.finished)))
        for task in search.tasks:
            if task.waits is not None:
                alive = task.waits.ask.alive
                if alive is None:
                    return []
                ends += alive
        paths = [node.path() for node in distinct(ends)]
        settled: list[Node] = []
        for steps in zip(*paths, strict=False):
            if any(step.token_ids != steps[0].token_ids for step in steps):
                break
            settled.append(steps[0])
        return settled

    def _drop(self, tree: SearchTree) -> Search:
        search = self._searches.pop(tree)
        for task in search.tasks:
            task.run.close()
        self._new = [request for request in self._new if request not in search.requests]
        return search

    # -- runs ---------------------------------------------------------------------------------------------------------

    def _start(self, search: Search, run: Run, purse: Purse, join: Join | None = None, part: int = 0) -> None:
        task = Task(run, purse, join, part)
        search.tasks.add(task)
        if join is not None:
            join.parts[part] = task
        self._resume(search, task, None)

    def _resume(self, search: Search, task: Task, message: object) -> None:
        """Send a run what it waits for, and go on until it has to wait again."""
        while True:
            task.waits = None
            try:
                ask = task.run.send(message)
            except StopIteration as stop:
                search.tasks.discard(task)
                join = task.join
                if join is None:
                    return self._end(search, stop.value)
                join.results[task.place] = stop.value
                join.left -= 1
                if join.left:
                    return None
                if not join.alone:
                    join.task.purse.put_back([part.purse for part in join.parts])
                task, message = join.task, join.results[0] if join.alone else join.results
                continue
            if isinstance(ask, Parallel):
                if ask.runs:
                    return self._fork(search, task, ask.runs, task.purse.split(len(ask.runs)))
                message = []
            elif not isinstance(ask, Expand):
                raise TypeError(f"a strategy yields Expand or Parallel, got {type(ask).__name__}")
            elif ask.until == "end" and (search.budget.nodes is not None or search.budget.depth is not None):
                return self._fork(search, task, [step_by_step(ask)], [task.purse], alone=True)
            else:
                expansion = self._expand(search, task, ask)
                if expansion.left:
                    return None
                message = self._collect(search, expansion)

    def _fork(
        self, search: Search, task: Task, runs: Sequence[Run], purses: Sequence[Purse], *, alone: bool = False
    ) -> None:
        join = Join(task, [task] * len(runs), [[] for _ in runs], len(runs), alone)
        for part, (run, purse) in enumerate(zip(runs, purses, strict=True)):
            self._start(search, run, purse, join, part)

    def _end(self, search: Search, candidates: Sequence[Node]) -> None:
        del self._searches[search.tree]
        unfinished = [node for node in candidates if not node.finished and node.parent is not None]
        if unfinished:
            raise ValueError(f"a strategy returns finished nodes only, not {unfinished[0]!r}")
        finished = [node for node in distinct(candidates) if node.finished]
        full = bool(finished) and all(node.finish == "length" for node in finished)
        stopped = next((limit for limit in LIMITS if limit in search.limits), "length" if full else "finished")
        self._ended.append(Outcome(search.tree, finished, stopped))

    # -- requests -----------------------------------------------------------------------------------------------------

    def _expand(self, search: Search, task: Task, ask: Expand) -> Expansion:
        """Turn an Expand into one request a node, as far as the budget goes."""
        wanted = self._wanted(search, ask)
        places = wanted[0] if ask.enough is not None else len(ask.nodes)
        expansion = task.waits = Expansion(task, ask, [[] for _ in range(places)])
        caps = task.purse.promise(sum(wanted))
        if len(caps) < sum(wanted):
            empty = task.purse.nodes == 0
            search.limits.add("nodes" if empty else "tokens")
        sampling = search.sampling if not ask.greedy else replace(search.sampling, temperature=0.0)
        if ask.doubt is not None:
            doubt = ask.doubt
            steps = replace(sampling.steps, confidence=doubt.below, confidence_of=doubt.confidence_of)
            sampling = replace(sampling, steps=steps)
        if ask.enough is not None:  # each child answers by itself
            for slot, cap in enumerate(caps):
                self._request(search, expansion, sampling, ask.nodes[0], [1], [cap], [slot])
            return expansion
        counts: dict[Node, list[int]] = {}
        slots: dict[Node, list[int]] = {}
        node_caps: dict[Node, list[int | None]] = {}
        taken = 0
        for slot, (node, n) in enumerate(zip(ask.nodes, wanted, strict=True)):
            share = caps[taken : taken + n]
            taken += len(share)
            counts.setdefault(node, []).append(len(share))
            slots.setdefault(node, []).extend([slot] * len(share))
            node_caps.setdefault(node, []).extend(share)
        for node, shares in node_caps.items():
            if shares:
                self._request(search, expansion, sampling, node, counts[node], shares, slots[node])
        return expansion

    def _request(
        self, search: Search, expansion: Expansion, sampling: Sampling, node: Node, counts: Sequence[int],
        caps: Sequence[int | None], slots: list[int],
    ) -> None:  # fmt: skip
        """Have children of a node drawn, for these slots of an Expand."""
        ask = expansion.ask
        room = search.sampling.max_new_tokens - node.end
        limits = [room if cap is None else cap for cap in caps]
        request = Request.draw(
            node, counts, sampling, until=ask.until, caps=limits, cap_reason="budget", rollout=ask.rollout,
            merge=ask.merge, ranked=ask.ranked, floor=ask.floor, doubting=ask.doubt is not None,
        )  # fmt: skip
        request.policy, request.strict = ask.policy, expansion.task.purse.tokens is not None
        # what a cap beyond the room had set aside is of no use to the child
        expansion.task.purse.spend(sum(request.caps) - sum(limits), 0)
        search.requests[request] = (expansion, slots)
        expansion.left += 1
        self._new.append(request)

    def _give_up(self, search: Search, expansion: Expansion) -> None:
        """End an Expand with the draws that were enough: forget its later draws and its requests under way."""
        del expansion.drawn[expansion.passed :]
        waiting = set(self._new)
        gone = {request for request, (waits, _) in search.requests.items() if waits is expansion}
        for request in gone:
            del search.requests[request]
            if request in waiting:
                expansion.task.purse.spend(-sum(request.caps), -len(request.caps))
            else:
                self._given_up[request] = None
        self._new = [request for request in self._new if request not in gone]
        expansion.left = 0

    def _wanted(self, search: Search, ask: Expand) -> list[int]:
        """Children to draw for each slot, 0 where its node can have none. Finishes nodes that are full."""
        counts = [ask.n] * len(ask.nodes) if isinstance(ask.n, int) else list(ask.n)
        if ask.enough is not None and (len(counts) != 1 or ask.merge):
            raise ValueError("Expand: enough= needs one place and merge=False")
        if len(counts) != len(ask.nodes) or any(n < 0 for n in counts):
            raise ValueError(f"Expand: n={ask.n!r} for {len(ask.nodes)} nodes: numbers >= 0, one a node, are needed")
        late = self._clock() >= search.deadline
        seen: Counter[Node] = Counter()
        for slot, node in enumerate(ask.nodes):
            seen[node] += 1
            if node.tree is not search.tree or node.finished or seen[node] > node.count:
                raise ValueError(f"Expand: {node!r} is of another tree, finished, or given too often for its count")
            if not counts[slot]:
                continue
            if node.end >= search.sampling.max_new_tokens:
                counts[slot] = 0
            elif late:
                counts[slot] = 0
                search.limits.add("seconds")
            elif search.budget.depth is not None and node.depth >= search.budget.depth:
                counts[slot] = 0
                search.limits.add("depth")
        return counts

    def _collect(self, search: Search, expansion: Expansion) -> list[Node]:
        """An Expand's answer: the children of each slot, or its node where it could have none."""
        ask = expansion.ask
        wanted = [ask.n] * len(ask.nodes) if isinstance(ask.n, int) else ask.n
        drawn_lists = expansion.drawn
        if ask.enough is not None:
            drawn_lists = [[child for drawn in drawn_lists for child in drawn]]
        answer: list[Node] = []
        for node, n, drawn in zip(ask.nodes, wanted, drawn_lists, strict=True):
            if not drawn and n:
                full = node.end >= search.sampling.max_new_tokens
                self._finish(search, node, None, "length" if full else "budget")
                drawn = [node] if node.finished else []
            answer += drawn
        search.finished.update((node, None) for node in answer if node.finished)
        return answer

    def _finish(self, search: Search, node: Node, limit: str | None, finish: str = "budget") -> None:
        """Finish a node that has no children and is not the root."""
        if node.parent is not None and not node.finished and not node.children:
            node.finish = finish
            if limit is not None:
                search.limits.add(limit)
