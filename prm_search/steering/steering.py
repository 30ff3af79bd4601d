"""Steering: the log-ratio of a pair for many requests that grow a token at a time in somebody else's decode loop.

`Steered` is for a loop of our own. Here another engine (vLLM) samples. Each request is a `Stream`, whose tokens are
handed over as they come. Every call of `steer` runs one packed forward a model for any mixture of new, continuing and
returning requests.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..engine.kv_tree import Branch
from ..engine.language_model import LanguageModel
from ..engine.module_run import own_modes
from ..engine.pending import Pending
from ..engine.prompts import SharedPrompts
from ..triton_kernels.reference import guide_by_ratio, log_softmax
from ..usage import Meter
from .kl_bound import bounded_alpha

Rows = Sequence[tuple[int, "Stream"]]


class Stream:
    """One request. Made by `Steering.open`.

    Attributes:
        prompt: its token ids.
        output: tokens sampled so far. The owner's own list: it grows between calls, and is never written here.
        alpha: strength of the steering; 0 to observe only.
        max_kl: nats that KL(steered || policy) may reach at a token; inf for no bound.
        first: output tokens there were when the stream was opened.
        log_ratios: log pi_phi - log pi_ref of output tokens from `first` on, nats, where observed: NaN for a token that
            both models rule out.
        fault: why it goes on unguided; None while it is steered.
    """

    __slots__ = (
        "_branches", "_table", "alpha", "fault", "first", "log_ratios", "max_kl", "observed", "output", "prompt",
    )  # fmt: skip

    def __init__(
        self, prompt: tuple[int, ...], output: Sequence[int], alpha: float, max_kl: float, observed: bool
    ) -> None:
        self.prompt = prompt
        self.output = output
        self.alpha = alpha
        self.max_kl = max_kl
        self.observed = observed
        self.first = len(output)
        self.log_ratios: list[float] = []
        self.fault: str | None = None
        self._branches: list[Branch] = []
        # Log-ratios [R, V], the stream's row of them, and the output token that they are for.
        self._table: tuple[Tensor, int, int] | None = None


class Steering:
    """The log-ratios of one pair for the requests of one engine.

    Each token is encoded once a model; requests with the same prompt share its KV, and requests whose prompts begin
    alike share that beginning. KV is a cache: beyond the models' capacity the least recently used is evicted and
    encoded again on need.

    A request that cannot be steered (a path beyond a model's context, an unknown token, NaN) goes on unguided, with one
    warning. Its failure leaves the other requests as they are.

    Args:
        prm, reference: the models; None for the policy itself, whose logits then stand for that half.
        warn: what is done with a warning.

    Attributes:
        meter: tokens encoded, by model id.

    Raises:
        ValueError: no model is given.
    """

    def __init__(
        self,
        prm: LanguageModel | None,
        reference: LanguageModel | None,
        *,
        warn: Callable[[str], None] | None = None,
    ) -> None:
        self._halves = (prm, reference)
        self._lms = list(dict.fromkeys(lm for lm in self._halves if lm is not None))
        if not self._lms:
            raise ValueError("prm and reference are both the policy: their log-ratio is 0")
        self.meter = Meter()
        self._prompts = [SharedPrompts(lm.tree, self.meter) for lm in self._lms]
        for lm in self._lms:
            lm.runner.taped = True
        self._warn = warn or (lambda message: warnings.warn(message, RuntimeWarning, stacklevel=2))
        self._thrashed = False

    @property
    def vocab(self) -> int:
        """Tokens that all of its models know."""
        return min(lm.head.vocab for lm in self._lms)

    @property
    def context(self) -> int:
        """Tokens that prompt and response may have together."""
        return min(limit for lm in self._lms for limit in (lm.context, lm.tree.capacity) if limit is not None)

    @property
    def live(self) -> int:
        """Distinct prompts that hold or may hold KV; 0 when every stream is closed."""
        return max(len(prompts) for prompts in self._prompts)

    def open(
        self,
        prompt: Sequence[int],
        output: Sequence[int] = (),
        *,
        alpha: float = 1.0,
        max_kl: float = math.inf,
        observed: bool = False,
    ) -> Stream:
        """Take a request on; nothing is encoded before it is first steered.

        Args:
            prompt: token ids.
            output: tokens sampled so far: the list that further ones will be appended to.
            alpha: strength, finite; 0 only observes.
            max_kl: see Stream.
            observed: whether the log-ratios of its tokens are wanted.

        Returns:
            the stream, with `fault` set (and warned of) where it cannot be steered.
        """
        stream = Stream(tuple(prompt), output, alpha, max_kl, observed)
        fault = self._obstacle(stream)
        if fault is not None:
            self.give_up(stream, fault)
        else:
            self._plant(stream)
        return stream

    def close(self, stream: Stream) -> None:
        """The request has left: note its last token, and free its KV."""
        if stream.fault is None:
            try:
                self._note([stream])
            except Exception as error:  # a request that is over must not take the engine with it
                self.give_up(stream, f"{type(error).__name__}: {error}")
        self._free(stream)

    def give_up(self, stream: Stream, reason: str) -> None:
        """Let a request go on unguided."""
        if stream.fault is None:
            stream.fault = reason
            self._warn(f"a request goes on unguided after {len(stream.output)} tokens: {reason}")
        self._free(stream)

    def steer(self, logits: Tensor, streams: Mapping[int, Stream]) -> None:
        """Add alpha * log-ratio to rows of next-token logits, in place; what streams have read since is encoded first.

        Rows of other requests, -inf entries and columns that a model lacks stay bit for bit.

        Args:
            logits: [N, V] floating, before temperature.
            streams: row of logits -> the stream whose next token it is for.
        """
        rows = []
        for row, stream in streams.items():
            if stream.fault is None and (fault := self._obstacle(stream)) is not None:
                self.give_up(stream, fault)
            if stream.fault is None:
                rows.append((row, stream))
        if rows:
            with torch.no_grad():
                self._attempt(logits, rows)

    def _attempt(self, logits: Tensor, rows: Rows) -> None:
        """Steer rows together; should that fail, halves of them, until the one that it fails for is alone."""
        try:
            self._steer(logits, rows)
        except Exception as error:  # whatever it is, the engine and its other requests go on
            if len(rows) == 1:
                self.give_up(rows[0][1], f"{type(error).__name__}: {error}")
                return
            half = len(rows) // 2
            self._attempt(logits, rows[:half])
            self._attempt(logits, rows[half:])

    def _steer(self, logits: Tensor, rows: Rows) -> None:
        from ..triton_kernels import guide_logits

        streams = [stream for _, stream in rows]
        for stream in streams:
            if any(len(stream.output) < len(branch.token_ids) for branch in stream._branches):  # it was rewound
                self._free(stream)
                self._plant(stream)
                del stream.log_ratios[max(0, len(stream.output) - stream.first) :]
        self._note(streams)
        begun: list[Pending[Any]] = []  # every model's forward is launched before the first is waited for
        with own_modes(self._lms[0].device.type):
            for i, lm in enumerate(self._lms):
                branches = [stream._branches[i] for stream in streams]
                # What an earlier attempt appended stays, so that a row is never encoded twice.
                new = [s.output[len(branch.token_ids) :] for s, branch in zip(streams, branches, strict=True)]
                begun.append(lm.begin_extend(branches, new, want="log_softmax"))
        tables = {lm: pending.result().to(logits.device) for lm, pending in zip(self._lms, begun, strict=True)}
        every = [row for row, _ in rows] == list(range(len(logits)))
        mine = logits if every else logits[torch.tensor([row for row, _ in rows], device=logits.device)]
        prm, reference = (log_softmax(mine) if lm is None else tables[lm] for lm in self._halves)
        alpha = torch.tensor([stream.alpha for stream in streams], dtype=torch.float32, device=logits.device)
        bounded = [i for i, stream in enumerate(streams) if stream.alpha and stream.max_kl < math.inf]
        observed = [i for i, stream in enumerate(streams) if stream.observed]
        if bounded:
            at = torch.tensor(bounded, device=logits.device)
            kl = torch.tensor([streams[i].max_kl for i in bounded], device=logits.device)
            alpha[at] = bounded_alpha(mine[at], _ratio(prm[at], reference[at]), alpha[at], kl)
        if observed:
            at = torch.tensor(observed, device=logits.device)
            seen = _ratio(prm[at], reference[at])
        if mine.is_cuda:
            guided = guide_logits(mine, prm, reference, alpha)  # in one pass, and a log-softmax is its own
        else:
            guided = guide_by_ratio(mine, _ratio(prm, reference)[:, : mine.shape[1]], alpha)
        if every:
            logits.copy_(guided)
        else:
            logits[torch.tensor([row for row, _ in rows], device=logits.device)] = guided
        for row, i in enumerate(observed):
            streams[i]._table = seen, row, len(streams[i].output)
        self._watch()

    def _note(self, streams: Sequence[Stream]) -> None:
        """Look up the log-ratio of each token that was sampled from the table of an earlier call."""
        by_table: dict[int, tuple[Tensor, list[tuple[Stream, int, int]]]] = {}
        for stream in streams:
            if stream._table is None or len(stream.output) <= stream._table[2]:
                continue
            table, row, at = stream._table
            if 0 <= stream.output[at] < table.shape[1]:
                by_table.setdefault(id(table), (table, []))[1].append((stream, row, at))
        for table, entries in by_table.values():
            index = torch.tensor([(row, stream.output[at]) for stream, row, at in entries], device=table.device)
            values = table[index[:, 0], index[:, 1]].tolist()
            for (stream, _, at), value in zip(entries, values, strict=True):
                stream.log_ratios += [math.nan] * (at - stream.first - len(stream.log_ratios))
                stream.log_ratios.append(value)
                stream._table = None

    def _obstacle(self, stream: Stream) -> str | None:
        """Why a stream cannot be steered on; None if it can."""
        if not stream.prompt:
            return "its prompt has no token ids"
        length = len(stream.prompt) + len(stream.output)
        if length > self.context:
            return f"{length} tokens exceed the pair's context, or its KV capacity, of {self.context}"
        read = len(stream._branches[-1].token_ids) if stream._branches else 0
        ids = stream.output[read:] if stream._branches else (*stream.prompt, *stream.output)
        if len(ids) and not (min(ids) >= 0 and max(ids) < self.vocab):
            wrong = next(i for i in ids if not 0 <= i < self.vocab)
            return f"token id {wrong} lies outside the pair's vocabulary of {self.vocab}"
        return None

    def _plant(self, stream: Stream) -> None:
        if not self.live:  # nobody is steered meanwhile, so weights may have changed
            for lm in self._lms:
                lm.refresh()
        stream._branches = [prompts.open(stream.prompt) for prompts in self._prompts]

    def _free(self, stream: Stream) -> None:
        branches, stream._branches, stream._table = stream._branches, [], None
        for prompts, branch in zip(self._prompts, branches, strict=False):
            prompts.close(branch, stream.prompt)

    def _watch(self) -> None:
        """Say so, once, when requests push one another's KV out."""
        if self._thrashed:
            return
        counts = self.meter.counts
        for lm in self._lms:
            again, once = counts["reencoded", lm.id], counts["encoded", lm.id]
            if again > 4096 and again > once // 2:
                self._thrashed = True
                self._warn(
                    f"{again} tokens were encoded again after their KV was evicted: a capacity above "
                    f"{lm.tree.capacity} tokens would save that"
                )
                return


def _ratio(prm: Tensor, reference: Tensor) -> Tensor:
    """[B, W] log-ratio in nats of two tables of log-probabilities, over the narrower width."""
    width = min(prm.shape[1], reference.shape[1])
    return prm[:, :width] - reference[:, :width]
