"""Continuous decoding of many rows over one or several LanguageModels: a row that ends makes room for a waiting one.

A row draws one child. It grows a branch in each model: the policy's, and those of models that steer it. Rows of one
node share its KV and its next-token distribution; each token is encoded once a model. What a token does to all rows is
done to arrays (`RowTable`, `Growth`); a row's object is touched when its step may end.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from math import exp

import numpy as np
import torch

from ..drawing import Tokens, nodes_of
from ..sampling import Request
from ..tree import Node, SearchTree
from ..triton_kernels.reference import log_softmax
from .confidence import confidence_columns, ranked_tokens
from .decoding_row import DecodingRow
from .growth import Growth
from .kv_tree import Branch
from .language_model import LanguageModel
from .node_logprobs import node_logprobs
from .pending import Pending
from .row_table import RowTable
from .sampler import Sampler
from .to_device import to_device
from .to_host import begin_copy, to_host

# Combines the rows' logits (log-probabilities, for a Sampler that takes these) under each model, [R, V] each, into the
# scores to draw from, [R, V].
Combine = Callable[[Sequence[torch.Tensor], Sequence[DecodingRow]], torch.Tensor]


AHEAD_ON = frozenset(("cuda",))


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

    Attributes:
        ahead: launch the next forward from tokens that are on the device still, while the host books them. A row that
            has ended wastes a column of work (`Encoder.wasted`); no draw changes. On where all models are on a device
            of AHEAD_ON: a CPU computes nothing meanwhile, and pays for what is wasted.
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
        self.ahead = all(lm.device.type in AHEAD_ON for lm in lms)
        self.combine = combine
        self.sampler = sampler
        self.tokens = tokens
        self.stop_ids = stop_ids
        self.max_rows = max_rows
        self.stop = stop
        self._own_draw = type(sampler).draw is not Sampler.draw
        own = self._own_draw or type(sampler).scores is not Sampler.scores
        self._normalised = own and not (sampler.takes_logits and not self._own_draw)
        self._jobs: dict[Request, list[DecodingRow]] = {}
        self._open: dict[Request, int] = {}  # rows of a job that are not done
        self._waiting: deque[DecodingRow] = deque()
        self._table = RowTable(len(lms), stop_ids, watch=stop is not None or (own and sampler.reads_rows))
        self._growths = [Growth(lm.tree) for lm in lms]
        self._flight: tuple[list[Pending[torch.Tensor]], np.ndarray, int] | None = (
            None  # ahead: a line each row, of so many
        )
        self._newest = np.zeros(0, np.int64)  # of the table's rows: drawn, not encoded yet

    @property
    def busy(self) -> bool:
        """Return True if any row is waiting or under way."""
        return bool(self._waiting or self._table.rows)

    def submit(self, requests: Sequence[Request]) -> None:
        """Queue the rows of these requests."""
        for request in requests:
            rows = self._jobs[request] = DecodingRow.of(request, self.tokens, self.stop_ids)
            self._open[request] = len(rows)
            self._waiting.extend(rows)

    def advance(self) -> list[tuple[Request, list[Node]]]:
        """One forward a model: encode each row's last token (and the nodes of new rows), draw the next.

        Returns:
            requests whose last row ended, with the last node of each child's chain.
        """
        self._admit()
        if not self._table.rows:
            return []
        self._book(self._draw())
        if all(self._open.values()):
            return []
        ended = [request for request, rows in self._open.items() if not rows]
        return [(request, self._finish(request)) for request in ended]

    def interrupt(self, request: Request) -> list[Node]:
        """End a request now; see Policy.interrupt."""
        self._forget([request])
        for row in self._jobs[request]:
            row.interrupt()
        return self._finish(request)

    def drop(self, requests: Sequence[Request]) -> None:
        """Forget requests, but count what was drawn for them; those that are answered already are no error."""
        self._forget(requests)
        for request in requests:
            self._open.pop(request, None)
            job = self._jobs.pop(request, [])
            request.node.tree.meter.add("sampled", self.lms[0].id, sum(row.sampled for row in job))
            for row in job:
                for lm, branches in zip(self.lms, row.branches, strict=False):
                    for branch in reversed(branches):
                        lm.tree.release(branch)

    def release(self, tree: SearchTree) -> None:
        """Drop a tree's requests and free its KV in every model."""
        self.drop([request for request in self._jobs if request.node.tree is tree])
        for lm in self.lms:
            lm.release(tree)

    # --- one round -------------------------------------------------------------------------------------------------

    def _admit(self) -> None:
        """Let waiting rows in while there is room for them and for the KV they may come to need."""
        rows = self._table.rows
        if not self._waiting or len(rows) >= self.max_rows:
            return
        room = min(lm.tree.capacity for lm in self.lms)
        load = sum(map(self._table.most, range(len(rows))))
        nodes = {row.request.node for row in rows}
        load += sum(len(node.tree.prompt_ids) + node.end for node in nodes)
        new: list[DecodingRow] = []
        while self._waiting and len(rows) + len(new) < self.max_rows:
            row = self._waiting[0]
            node = row.request.node
            load += self._weight(row) + (0 if node in nodes else len(node.tree.prompt_ids) + node.end)
            if (rows or new) and load > room:
                break
            if node not in nodes:
                nodes.add(node)
                self._read(node)
            new.append(self._waiting.popleft())
        self._table.add(new)

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

    def _draw(self) -> np.ndarray:
        """Draw a token for each row: [C, R], the columns of `_columns`. Rows that begin have their branches then."""
        rows, grown = self._table.rows, len(self._growths[0])
        places: dict[Node, int] = {}
        at: list[int] = []
        for row in rows[grown:]:
            node = self.lms[0].memo(row.request.node.tree).first(row.request.node)
            at.append(grown + places.setdefault(node, len(places)))  # twins of different requests are one
        nodes = [[lm.memo(node.tree).branch(node) for node in places] for lm in self.lms]
        parents = [[branches[place - grown] for place in at] for branches in nodes]
        begun: list[Pending[torch.Tensor]] = []
        try:
            tables = self._tables(nodes, np.concatenate([np.arange(grown), np.array(at, np.int64)]), begun)
            columns = self._columns(tables, grown)
            if self.ahead and self._table.unwatched:
                return self._read_ahead(columns, parents)
            numbers = self._checked(to_host(columns))
        except BaseException:
            for pending in reversed(begun):
                pending.undo()
            raise
        self._begin_rows(parents)
        return numbers

    def _tables(
        self, nodes: Sequence[Sequence[Branch]], index: np.ndarray, begun: list[Pending[torch.Tensor]]
    ) -> list[torch.Tensor]:
        """Logits of all rows under each model, [R, V] each: of their newest tokens, or of the nodes that they begin at.

        Args:
            nodes: for each model, those of rows that begin.
            index: the line of each row among the rows that grow and the nodes.
            begun: takes the calls that are under way.
        """
        flight, self._flight = self._flight, None
        if flight is not None:
            begun += flight[0]
            index = np.concatenate([flight[1], index[len(flight[1]) :] - len(flight[1]) + flight[2]])
        for lm, growth, branches in zip(self.lms, self._growths, nodes, strict=True):
            if flight is None:  # every model's forward is launched before the first is waited for
                begun.append(lm.begin_round(growth, self._newest, branches))
            elif branches:
                begun.append(lm.begin_extend(branches, [()] * len(branches), want="logits"))  # type: ignore[arg-type]
        models = len(self.lms)
        parts = [pending.result() for pending in begun]
        tables = [torch.cat(parts[k::models]) if len(parts) > models else parts[k] for k in range(models)]
        if len(index) != len(tables[0]) or (index != np.arange(len(index))).any():
            (on,) = to_device([index], tables[0].device)
            tables = [table.index_select(0, on.to(table.device)) for table in tables]
        return tables

    def _begin_rows(self, parents: Sequence[Sequence[Branch]]) -> None:
        """Let rows that begin grow, each behind its node's branch in each model."""
        for lm, growth, branches in zip(self.lms, self._growths, parents, strict=True):
            with lm.tree.lock:
                growth.add(branches)

    def _read_ahead(self, columns: list[torch.Tensor], parents: Sequence[Sequence[Branch]]) -> np.ndarray:
        """Launch the next forward from the tokens on the device, then read them. The host knows them before the trees'
        locks are let go, so that nobody finds a slot whose token is not known."""
        grown = len(self._growths[0])
        with ExitStack() as locks:
            for lm in sorted(self.lms, key=id):
                locks.enter_context(lm.tree.lock)
            self._begin_rows(parents)
            copied = begin_copy(columns)
            begun: list[Pending[torch.Tensor]] = []
            try:
                for lm, growth in zip(self.lms, self._growths, strict=True):
                    pending = lm.begin_ahead(growth, columns[0])
                    if pending is None:
                        break
                    begun.append(pending)
                numbers = self._checked(copied())
            except BaseException:
                for pending in reversed(begun):
                    pending.undo()
                for lm, growth in zip(self.lms, self._growths, strict=True):
                    for branches in growth.remove(range(grown, len(growth))):
                        for branch in reversed(branches):
                            lm.tree.release(branch)
                raise
            everyone = range(len(self._table.rows))
            for lm, growth in zip(self.lms[: len(begun)], self._growths, strict=False):
                growth.name(numbers[0].astype(np.int64))
                if len(begun) < len(self.lms):
                    lm.waste(growth, everyone)
            if len(begun) == len(self.lms):
                self._flight = begun, np.arange(len(everyone)), len(everyone)
        return numbers

    def _checked(self, columns: np.ndarray) -> np.ndarray:
        """The columns, if all log-probabilities in them are numbers."""
        for k, lm in enumerate(self.lms):
            if np.isnan(columns[1 + k]).any():
                raise lm.not_numbers()
        return columns

    def _columns(self, tables: list[torch.Tensor], grown: int) -> list[torch.Tensor]:
        """The numbers that the host waits for: C columns [R] on one device.

        The rows' tokens, their log-prob under each model, and the confidence_columns where a row asks for them.

        Args:
            tables: logits of the rows under each model, [R, V] each.
            grown: rows that have drawn before.
        """
        rows = self._table.rows
        asks = any(one.confidence_tokens or one.steps.confidence is not None for one in self._table.samplings)
        if self._normalised:
            tables = [log_softmax(table) for table in tables]
        scores = self.combine(tables, rows) if self.combine else tables[0]
        known = False
        if self._own_draw:
            tokens = torch.as_tensor(self.sampler.draw(scores, rows), device=scores.device)
        else:
            drawn, known = self.sampler.sample(scores, self._table)
            tokens = drawn.tokens
        if any(row.request.ranked for row in rows[grown:]):
            tokens, known = ranked_tokens(tokens, tables[0], rows), False
        columns = [tokens]
        for table in tables:
            if known and self.combine is None:
                columns.append(drawn.logprobs)
                continue
            inside = tokens.to(table.device).clamp(max=table.shape[1] - 1)
            chosen = table.gather(1, inside[:, None]).squeeze(1)
            columns.append((chosen if self._normalised else chosen - table.logsumexp(-1)).to(tokens.device))
        if asks:
            normal = tables[0] if self._normalised else log_softmax(tables[0])
            columns += [column.to(tokens.device) for column in confidence_columns(normal, rows)]
        return columns

    # --- what was drawn --------------------------------------------------------------------------------------------

    def _book(self, columns: np.ndarray) -> None:
        """Record a token for each row, end what ends, and let rows go that are done."""
        table, rows, models = self._table, self._table.rows, len(self.lms)
        tokens = columns[0].astype(np.int64)
        self._check(int(tokens.max()))
        values = np.zeros((len(rows), models + 1))
        values[:, :models] = columns[1 : 1 + models].T
        more = len(columns) > 1 + models
        if more:
            values[:, -1] = columns[-1]
        self._newest = tokens
        told = []
        for place in table.book(tokens, values).tolist():
            row = rows[place]
            table.catch_up(place, newest=False)
            before = row.fresh
            top = exp(columns[1 + models, place]) if more else 1.0
            ended = row.cut_before(top, exp(values[place, 0]))
            if row.fresh and not before:
                self._cut(place)
            if ended:
                continue
            row.read(int(tokens[place]), values[place].tolist())
            told.append(place)
        stopped = [False] * len(told) if self.stop is None or not told else self.stop([rows[place] for place in told])
        for place, stop in zip(told, stopped, strict=True):
            row = rows[place]
            row.settle(bool(stop))
            table.settled(place)
            if row.fresh:
                self._cut(place)
        self._let_go([place for place, row in enumerate(rows) if row.done])

    def _check(self, highest: int) -> None:
        for lm in self.lms:
            if highest >= lm.head.vocab:
                raise ValueError(
                    f"the policy drew token {highest}, but {lm.id} has {lm.head.vocab} tokens: a pair that steers "
                    "needs all of the policy's tokens"
                )

    def _cut(self, place: int) -> None:
        """End a row's step behind what it has drawn."""
        drawn = self._table.rows[place].drawn
        for lm, growth in zip(self.lms, self._growths, strict=True):
            with lm.tree.lock:
                growth.cut(place, drawn)

    def _let_go(self, places: Sequence[int]) -> None:
        """Take rows out of the tables, with their branches."""
        if not places:
            return
        table, gone = self._table, set(places)
        rows = [table.rows[place] for place in places]
        kept = np.array([place for place in range(len(table.rows)) if place not in gone], np.int64)
        table.keep(kept)
        begun = [place for place in places if place < len(self._growths[0])]
        if self._flight is not None:
            for lm, growth in zip(self.lms, self._growths, strict=True):
                lm.waste(growth, begun)
            pending, lines, count = self._flight
            self._flight = (pending, lines[kept[kept < len(lines)]], count) if len(kept) else None
        self._newest = self._newest[kept[kept < len(self._newest)]]
        for lm, growth in zip(self.lms, self._growths, strict=True):
            with lm.tree.lock:
                for row, branches in zip(rows, growth.remove(begun), strict=False):
                    for spare in reversed(branches[len(row.chain) :]):
                        lm.tree.release(spare)
                    row.branches.append(branches[: len(row.chain)])
        for row in rows:
            self._open[row.request] -= 1

    # --- the end of a request --------------------------------------------------------------------------------------

    def _finish(self, request: Request) -> list[Node]:
        """Put what was drawn into the tree, and its branches into the memos."""
        job = self._jobs.pop(request)
        del self._open[request]
        made = nodes_of(request, job, self.lms[0].id)
        for row, nodes in made:
            for k, lm in enumerate(self.lms):
                for node, branch, scored in zip(nodes, row.branches[k], row.scored, strict=True):
                    # The last token of a row has not been encoded: it is, should the node be expanded.
                    branch.token_ids.extend(node.token_ids[len(branch.token_ids) :])
                    lm.memo(node.tree).adopt(node, branch, np.asarray(scored[k], np.float32))
        return [nodes[-1] for _, nodes in made]

    def _forget(self, requests: Sequence[Request]) -> None:
        """Take the rows of requests out of wherever they are."""
        gone = {id(row) for request in requests for row in self._jobs.get(request, ())}
        if gone:
            self._let_go([place for place, row in enumerate(self._table.rows) if id(row) in gone])
            self._waiting = deque(row for row in self._waiting if id(row) not in gone)
