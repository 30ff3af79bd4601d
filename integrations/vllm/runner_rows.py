"""The request in each row of the logits, as each of vLLM's two model runners tells it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from prm_search.integrations.vllm.steering_config import RequestOptions
from prm_search.integrations.vllm.worker import Guide, Guided

if TYPE_CHECKING:
    from vllm.sampling_params import SamplingParams
    from vllm.v1.sample.logits_processor import BatchUpdate
    from vllm.v1.worker.gpu.sample.logits_processor import LogitsContext, LogitsProcRequestState

# What V1 has done to the logits by the processor's turn beyond setting some to -inf, and what Model Runner V2 has.
BIASED_V1 = ("logit_bias",)
BIASED_V2 = ("logit_bias", "repetition_penalty", "presence_penalty", "frequency_penalty")

_LINGER = 64  # steps without a row, after which V2's slot is taken for left


class BatchRows:
    """V1: a persistent batch. Row i of the logits is batch index i, and each change of the batch is told.

    Output lists are the runner's own: they have grown by the sampled token when the next step begins.
    """

    def __init__(self, guide: Guide) -> None:
        self.guide = guide
        self.requests: dict[int, Guided] = {}

    def update(self, change: BatchUpdate | None) -> None:
        """Follow additions, removals and moves. See vLLM's BatchUpdate: added or moved ones replace what was there."""
        if change is None:
            return
        from vllm.v1.sample.logits_processor import MoveDirectionality

        rows, left = self.requests, [self.requests.pop(index, None) for index in change.removed]
        for index, params, prompt, output in change.added:
            left.append(rows.pop(index, None))
            options = self.guide.options(params)
            if options is not None:
                rows[index] = self.guide.begin(options, params, prompt, output)
        for source, target, direction in change.moved:
            moved, other = rows.pop(source, None), rows.pop(target, None)
            if moved is not None:
                rows[target] = moved
            if direction == MoveDirectionality.SWAP:
                if other is not None:
                    rows[source] = other
            else:
                left.append(other)
        for guided in left:  # last, so that a new child of the same prompt finds its KV
            if guided is not None:
                self.guide.end(guided)

    def rows(self) -> dict[int, Guided]:
        """Row of the logits -> request."""
        for guided in self.requests.values():
            output = guided.stream.output
            if output and output[-1] == -1:
                self.guide.give_up(
                    guided,
                    "async scheduling has not told its last token, which it does only for processors that are given "
                    "by logits_processors= or --logits-processors",
                )
        return self.requests


@dataclass(eq=False)
class _Slot:
    options: RequestOptions
    params: SamplingParams
    guided: Guided | None = None
    output: list[int] = field(default_factory=list)
    seen: int = 0


class Slots:
    """Model Runner V2: a request keeps a slot, rows are listed anew each step, and nobody tells when it leaves.

    Token ids are read back from the device: the last one of each row at every step, all of them when a request is first
    seen. A request whose slot had no row for a step has left if its tokens say so, and is taken for left after
    `_LINGER` steps or when the slot is given away; should it come back, it is read anew.
    """

    def __init__(self, guide: Guide, states: LogitsProcRequestState) -> None:
        self.guide = guide
        self.states = states
        self.slots: dict[int, _Slot] = {}
        self.steps = 0

    def add(self, slot: int, params: SamplingParams) -> bool:
        """A request takes a slot; whether it is to be steered or observed."""
        options = self.guide.options(params)
        before = self.slots.pop(slot, None)
        if options is not None:
            self.slots[slot] = _Slot(options, params, seen=self.steps)
        if before is not None and before.guided is not None:
            self._catch_up(slot, before)  # the device still holds the former one's tokens
            self.guide.end(before.guided)
        return options is not None

    def step(self) -> None:
        """A step begins: end requests that have left."""
        self.steps += 1
        for slot, held in self.slots.items():
            absent = self.steps - 1 - held.seen
            if held.guided is None or not absent:
                continue
            if absent == 1:
                self._catch_up(slot, held)
            if absent > _LINGER or self.guide.over(held.guided):
                self.guide.end(held.guided)
                held.guided = None

    def rows(self, ctx: LogitsContext) -> dict[int, Guided]:
        """Row of the logits -> request, with what it has read by now. Half-prefilled requests have none: what is
        sampled for them is thrown away."""
        ready_rows: list[tuple[int, int, _Slot, int]] = []
        lengths = ctx.seq_lens_upper_bound_np.tolist()  # exact without speculative decoding
        for row, slot in enumerate(ctx.idx_mapping_np.tolist()):
            held = self.slots.get(slot)
            if held is not None:
                held.seen = self.steps
                if lengths[row] >= int(self.states.prefill_len.np[slot]):
                    ready_rows.append((row, slot, held, lengths[row]))
        if not ready_rows:
            return {}
        fed = ctx.input_ids[torch.tensor([row for row, *_ in ready_rows], device=ctx.input_ids.device)].tolist()
        rows: dict[int, Guided] = {}
        for (row, slot, held, length), token in zip(ready_rows, fed, strict=True):
            rows[row] = self._read(slot, held, length, token)
        return rows

    def _read(self, slot: int, held: _Slot, length: int, last: int) -> Guided:
        """Bring a request's tokens up to date: `length` of them, the last one known."""
        if held.guided is None:
            prompt = int(self.states.prompt_len.np[slot])
            ids = self._ids(slot, 0, length)
            held.output = ids[prompt:]
            held.guided = self.guide.begin(held.options, held.params, ids[:prompt], held.output)
            return held.guided
        prompt = len(held.guided.stream.prompt)
        if length - prompt == len(held.output) + 1:
            held.output.append(last)
        elif length - prompt != len(held.output):
            del held.output[max(0, length - prompt) :]
            held.output += self._ids(slot, prompt + len(held.output), length)
        return held.guided

    def _catch_up(self, slot: int, held: _Slot) -> None:
        """Read the token that was sampled for a request in its last step."""
        if held.guided is not None:
            start = len(held.guided.stream.prompt) + len(held.output)
            held.output += self._ids(slot, start, int(self.states.total_len.gpu[slot]))

    def _ids(self, slot: int, start: int, end: int) -> list[int]:
        return self.states.all_token_ids.gpu[slot, start:end].tolist()
