"""Continuous decoding of many rows over one or several LanguageModels: a row that ends makes room for a waiting one.

A row draws one child. It holds a branch in each model: the policy's, and those of models that steer it. Rows of one
node share its KV and its next-token distribution; each token is encoded once a model.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from math import exp

import numpy as np
import torch

from ..drawing import Tokens, nodes_of
from ..sampling import Request
from ..tree import Node, SearchTree
from .confidence import confidence_columns, ranked_tokens
from .decoding_row import DecodingRow
from .language_model import LanguageModel
from .node_logprobs import node_logprobs
from .sampler import Sampler
from .to_device import to_device

# Combines the rows' log-softmax under each model, [R, V] each, into the scores to draw from, [R, V].
Combine = Callable[[Sequence[torch.Tensor], Sequence[DecodingRow]], torch.Tensor]


class Decoder:
    """The decode loop behind HFPolicy.

    Args:
        lms: the policy's model first, then models whose distributions `combine` needs.
        combine: how scores come from their distributions; None: the policy's own.
        sampler: draws tokens.
        tokens: the policy's vocabulary.
        stop_ids: tokens that end a response.
        max_rows: rows decoded at once.
        stop: further stop condition: which of these rows, each with a new token, end here. Asked once a round.
    """

    def __init__(
        self,
        lms: Sequence[LanguageModel],
        *,
        combine: Combine | None,
        sampler: Sampler,
        tokens: Tokens,
        stop_ids: frozenset[int],
        max_rows: int,
        stop: Callable[[Sequence[DecodingRow]], Sequence[bool]] | None = None,
    ) -> None:
        self.lms = lms
        self.combine = combine
        self.sampler = sampler
        self.tokens = tokens
        self.stop_ids = stop_ids
        self.max_rows = max_rows
        self.stop = stop
        self._jobs: dict[Request, list[DecodingRow]] = {}
        self._waiting: deque[DecodingRow] = deque()
        self._active: list[DecodingRow] = []

    @property
    def busy(self) -> bool:
        """Return True if any row is waiting or under way."""
        return bool(self._waiting or self._active)

    def submit(self, requests: Sequence[Request]) -> None:
        """Queue the rows of these requests."""
        for request in requests:
            rows = self._jobs[request] = DecodingRow.of(request, self.tokens, self.stop_ids)
            self._waiting.extend(rows)

    def advance(self) -> list[tuple[Request, list[Node]]]:
        """One forward a model: encode each row's last token (and the nodes of new rows), draw the next.

        Returns:
            requests whose last row ended, with the last node of each child's chain.
        """
        self._admit()
        rows = self._active
        if not rows:
            return []
        logprobs, index = self._distributions()
        (at,) = to_device([np.array([index[id(row)] for row in rows])], logprobs[0].device)
        spread = [table.index_select(0, at.to(table.device)) for table in logprobs]
        scores = self.combine(spread, rows) if self.combine else spread[0]
        tokens = torch.as_tensor(self.sampler.draw(scores, rows), device=scores.device)
        tokens = ranked_tokens(tokens, spread[0], rows)
        readings = self._read_drawn(tokens, spread, confidence_columns(spread[0], rows))
        drawn = [row for row, reading in zip(rows, readings, strict=True) if self._record(row, reading)]
        stopped = [False] * len(drawn) if self.stop is None or not drawn else self.stop(drawn)
        for row, stop in zip(drawn, stopped, strict=True):
            row.settle(bool(stop))
        self._active = [row for row in self._active if not row.done]
        ended = [request for request, job in self._jobs.items() if all(row.done for row in job)]
        return [(request, self._finish(request, self._jobs.pop(request))) for request in ended]

    def interrupt(self, request: Request) -> list[Node]:
        """End a request now; see Policy.interrupt."""
        job = self._jobs.pop(request)
        self._forget(job)
        for row in job:
            row.interrupt()
        return self._finish(request, job)

    def drop(self, requests: Sequence[Request]) -> None:
        """Forget requests and what was drawn for them; those that are answered already are no error."""
        for request in requests:
            job = self._jobs.pop(request, [])
            self._forget(job)
            for row in job:
                self._drop(row)

    def release(self, tree: SearchTree) -> None:
        """Drop a tree's requests and free its KV in every model."""
        self.drop([request for request in self._jobs if request.node.tree is tree])
        for lm in self.lms:
            lm.release(tree)

    # --- one round -------------------------------------------------------------------------------------------------

    def _admit(self) -> None:
        """Let waiting rows in while there is room for them and for the KV they may come to need."""
        room = min(lm.tree.capacity for lm in self.lms)
        load = sum(self._weight(row) for row in self._active)
        nodes = {row.request.node for row in self._active}
        load += sum(len(node.tree.prompt_ids) + node.end for node in nodes)
        while self._waiting and len(self._active) < self.max_rows:
            row = self._waiting[0]
            node = row.request.node
            load += self._weight(row) + (0 if node in nodes else len(node.tree.prompt_ids) + node.end)
            if self._active and load > room:
                break
            if node not in nodes:
                nodes.add(node)
                self._read(node)
            self._active.append(self._waiting.popleft())

    def _read(self, node: Node) -> None:
        """Score a path that was built by hand while it is encoded: a scorer on the same model may want it later."""
        for lm in self.lms:
            memo = lm.memo(node.tree)
            if not all(memo.knows(part) for part in node.path()):
                node_logprobs(lm, [node])

    @staticmethod
    def _weight(row: DecodingRow) -> int:
        longest = row.request.sampling.steps.max_tokens
        if row.request.until == "step" and longest is not None:
            return min(row.left, longest)
        return row.left

    def _distributions(self) -> tuple[list[torch.Tensor], dict[int, int]]:
        """Next-token log-softmax under each model, and which line of it each active row reads."""
        index: dict[int, int] = {}
        nodes: dict[Node, int] = {}
        ids: list[Sequence[int]] = []
        continued: list[DecodingRow] = []
        for row in self._active:
            if row.token is not None:
                index[id(row)] = len(ids)
                ids.append([row.token])
                continued.append(row)
        for row in self._active:
            if row.token is None:
                node = self.lms[0].memo(row.request.node.tree).first(row.request.node)
                if node not in nodes:  # twins, drawn by different requests, have one distribution
                    nodes[node] = len(ids)
                    ids.append(())
                index[id(row)] = nodes[node]
        begun = []  # every model's forward is launched before the first is waited for
        for k, lm in enumerate(self.lms):
            branches = [row.branches[-1][k] for row in continued] + [lm.memo(node.tree).branch(node) for node in nodes]
            begun.append(lm.begin_extend(branches, ids, want="log_softmax"))
        return [pending.result() for pending in begun], index  # type: ignore[misc]

    def _read_drawn(
        self, tokens: torch.Tensor, tables: Sequence[torch.Tensor], more: Sequence[torch.Tensor]
    ) -> list[list[float]]:
        """Each row's token, its log-prob under each model and `more`: what the host waits for, in one transfer."""
        columns = [tokens]
        for table in tables:
            inside = tokens.to(table.device).clamp(max=table.shape[1] - 1)
            columns.append(table.gather(1, inside[:, None]).squeeze(1).to(tokens.device))
        columns += [column.to(tokens.device) for column in more]
        drawn: list[list[float]] = torch.stack([column.double() for column in columns], dim=1).tolist()
        highest = int(max(token for token, *_ in drawn))
        for lm, table in zip(self.lms, tables, strict=True):
            if highest >= table.shape[1]:
                raise ValueError(
                    f"the policy drew token {highest}, but {lm.id} has {table.shape[1]} tokens: a pair that steers "
                    "needs all of the policy's tokens"
                )
        return drawn

    def _record(self, row: DecodingRow, reading: Sequence[float]) -> bool:
        """Record a drawn token, unless the row's step and the row end before it; return True if it is recorded.

        Args:
            row: the row that drew it.
            reading: the token, its log-prob under each model, and the confidence_columns.
        """
        token, values, more = int(reading[0]), reading[1 : 1 + len(self.lms)], reading[1 + len(self.lms) :]
        top, confidence = more or (0.0, None)
        if row.cut_before(exp(top), exp(values[0])):
            return False
        if row.fresh:
            self._open(row)
        row.record(token, values[0], confidence)
        for k, value in enumerate(values):
            row.scored[-1][k].append(value)
        row.token = token
        return True

    def _open(self, row: DecodingRow) -> None:
        """Start a step: an empty fork, in each model, of what the row has read so far."""
        if row.branches:
            above = row.branches[-1]
        else:
            node = row.request.node
            above = [lm.memo(node.tree).branch(node) for lm in self.lms]
        row.branches.append([lm.tree.fork(branch) for lm, branch in zip(self.lms, above, strict=True)])
        row.scored.append([[] for _ in self.lms])

    # --- the end of a request --------------------------------------------------------------------------------------

    def _finish(self, request: Request, job: Sequence[DecodingRow]) -> list[Node]:
        """Put what was drawn into the tree, and its branches into the memos."""
        made = nodes_of(request, job, self.lms[0].id)
        for row, nodes in made:
            for node, branches, scored in zip(nodes, row.branches, row.scored, strict=True):
                for lm, branch, values in zip(self.lms, branches, scored, strict=True):
                    # The last token of a row has not been encoded: it is, should the node be expanded.
                    branch.token_ids.extend(node.token_ids[len(branch.token_ids) :])
                    lm.memo(node.tree).adopt(node, branch, np.asarray(values, np.float32))
        return [nodes[-1] for _, nodes in made]

    def _forget(self, job: Sequence[DecodingRow]) -> None:
        gone = {id(row) for row in job}
        self._active = [row for row in self._active if id(row) not in gone]
        self._waiting = deque(row for row in self._waiting if id(row) not in gone)

    def _drop(self, row: DecodingRow) -> None:
        for branches in row.branches:
            for lm, branch in zip(self.lms, branches, strict=True):
                lm.tree.release(branch)
