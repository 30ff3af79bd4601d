"""generate's logits processors and stopping criteria over the rows of a search.

Both were written for one batch whose rows have one length: the left-padded prompts and what was generated after
them. The rows of a search have many lengths, so they are called on groups of equal length, each row with generate's
own padded prompt. A processor that keeps a state between calls, or counts rows, would see those groups as a batch
that changes under it: only classes that are known to do neither are served.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import numpy as np
import torch

from prm_search.engine.sampler import Sampler

if TYPE_CHECKING:
    from prm_search.engine.decoding_row import DecodingRow
    from prm_search.tree import SearchTree

# What a class needs to see, beside the scores.
NOTHING = frozenset({
    "EpsilonLogitsWarper", "EtaLogitsWarper", "InfNanRemoveLogitsProcessor", "LogitNormalization", "MinPLogitsWarper",
    "SuppressTokensLogitsProcessor", "TemperatureLogitsWarper", "TopHLogitsWarper", "TopKLogitsWarper",
    "TopPLogitsWarper", "TypicalLogitsWarper",
})  # fmt: skip
TOKENS = frozenset({
    "ExponentialDecayLengthPenalty", "ForcedBOSTokenLogitsProcessor", "ForcedEOSTokenLogitsProcessor",
    "MinLengthLogitsProcessor", "MinNewTokensLengthLogitsProcessor", "NoBadWordsLogitsProcessor",
    "NoRepeatNGramLogitsProcessor", "RepetitionPenaltyLogitsProcessor", "SequenceBiasLogitsProcessor",
    "SuppressTokensAtBeginLogitsProcessor",
})  # fmt: skip
# What the others came from, for the error.
ARGUMENTS = {
    "EncoderNoRepeatNGramLogitsProcessor": "encoder_no_repeat_ngram_size",
    "EncoderRepetitionPenaltyLogitsProcessor": "encoder_repetition_penalty",
    "PrefixConstrainedLogitsProcessor": "prefix_allowed_tokens_fn",
    "SynthIDTextWatermarkLogitsProcessor": "watermarking_config",
    "UnbatchedClassifierFreeGuidanceLogitsProcessor": "guidance_scale",
    "WatermarkLogitsProcessor": "watermarking_config",
}


@dataclass
class _Buffer:
    ids: np.ndarray  # [1, width + room]
    known: int  # response tokens that are in it


class RowIds:
    """Token ids of rows as generate lays them out.

    Args:
        input_ids: [prompts, width] int64, left-padded.

    Attributes:
        device: of input_ids.
    """

    def __init__(self, input_ids: torch.Tensor) -> None:
        self.device = input_ids.device
        self._prompts = input_ids.cpu().numpy()
        self._numbers: WeakKeyDictionary[SearchTree, int] = WeakKeyDictionary()
        self._buffers: WeakKeyDictionary[DecodingRow, _Buffer] = WeakKeyDictionary()

    def add(self, tree: SearchTree, number: int) -> None:
        """Say which prompt a tree belongs to."""
        self._numbers[tree] = number

    def number(self, row: DecodingRow) -> int:
        """The row's prompt."""
        return self._numbers[row.request.node.tree]

    def groups(self, rows: Sequence[DecodingRow]) -> list[list[int]]:
        """Places of rows of equal length."""
        by_length: dict[int, list[int]] = {}
        for place, row in enumerate(rows):
            by_length.setdefault(row.position, []).append(place)
        return list(by_length.values())

    def __call__(self, rows: Sequence[DecodingRow]) -> torch.Tensor:
        """[R, width + L] int64: the ids of rows that have drawn L response tokens each."""
        return torch.from_numpy(np.concatenate([self._ids(row) for row in rows])).to(self.device)

    def _ids(self, row: DecodingRow) -> np.ndarray:
        width, position = self._prompts.shape[1], row.position
        buffer = self._buffers.get(row)
        if buffer is None:
            buffer = self._buffers[row] = _Buffer(np.empty((1, width + position + row.left), np.int64), -1)
            buffer.ids[0, :width] = self._prompts[self.number(row)]
        if buffer.known == position - 1 and row.token is not None:
            buffer.ids[0, width + position - 1] = row.token
        elif buffer.known != position:
            buffer.ids[0, width : width + position] = row.ids()[len(row.request.node.tree.prompt_ids) :]
        buffer.known = position
        return buffer.ids[:, : width + position]


class ProcessorSampler(Sampler):
    """Draws from what generate's processors and warpers make of the logits. Some multiply scores by what depends on
    their sign, so log-probabilities would not do.

    Args:
        processors: in generate's order.
        ids: the rows' ids.
        expanded: how many rows generate made of each prompt.

    Raises:
        ValueError: a processor is not known to be free of state.
    """

    takes_logits = True

    def __init__(self, processors: Sequence[Any], ids: RowIds, expanded: int) -> None:
        names = [type(processor).__name__ for processor in processors]
        for name, processor in zip(names, processors, strict=True):
            ours = type(processor).__module__ == "transformers.generation.logits_process"
            if not ours or name not in NOTHING | TOKENS:
                _refuse(name)
        self._processors = list(processors)
        self._reads = self.reads_rows = any(name in TOKENS for name in names)
        self._ids = ids
        self._expanded = expanded

    def scores(self, logits: torch.Tensor, rows: Sequence[DecodingRow]) -> torch.Tensor:
        """See Sampler.scores; of logits, as generate calls them.

        Raises:
            ValueError: without randomness a search asks for more than one response, or a processor forbids all tokens.
        """
        if any(row.lineage and row.request.sampling.temperature == 0 for row in rows):
            raise ValueError(
                "do_sample=False draws one and the same response every time, but the strategy asks for several: pass "
                "do_sample=True (ps.enable does so by itself; custom_generate=ps.generate cannot)"
            )
        if not self._processors:
            return logits
        # None of these classes writes to the scores it is given.
        scores = logits
        if not self._reads:
            scores = self._processed(scores.new_zeros((len(rows), 1), dtype=torch.long), scores, rows)
        else:
            groups = self._ids.groups(rows)
            if len(groups) == 1:
                scores = self._processed(self._ids(rows), scores, rows)
            else:
                out = torch.empty_like(scores)
                for places in groups:
                    members = [rows[place] for place in places]
                    at = torch.tensor(places, device=scores.device)
                    out[at] = self._processed(self._ids(members), scores[at], members)
                scores = out
        if not bool((scores.amax(dim=-1) > -torch.inf).all()):
            raise ValueError("the logits processors of this call forbid every token: one at least must be allowed")
        return scores

    def _processed(self, ids: torch.Tensor, scores: torch.Tensor, rows: Sequence[DecodingRow]) -> torch.Tensor:
        ids = ids.to(scores.device)
        for processor in self._processors:
            skipped = getattr(processor, "prompt_ignore_length", None)
            if isinstance(skipped, torch.Tensor):  # padding of each row of generate's batch
                processor = copy.copy(processor)
                places = torch.tensor([self._ids.number(row) * self._expanded for row in rows], device=skipped.device)
                processor.prompt_ignore_length = skipped[places]
            scores = processor(ids, scores)
        return scores


class CriteriaStop:
    """Asks stopping criteria which rows end; an HFPolicy's `stop`.

    Args:
        criteria: called as generate does, with the ids of a group of rows of equal length and no scores.
        ids: the rows' ids.
    """

    def __init__(self, criteria: Sequence[Any], ids: RowIds) -> None:
        self._criteria = list(criteria)
        self._ids = ids

    def __call__(self, rows: Sequence[DecodingRow]) -> list[bool]:
        """Return which of the rows end with their newest token.

        Raises:
            ValueError: a criterion answers for another number of rows.
        """
        stopped = [False] * len(rows)
        for places in self._ids.groups(rows):
            ids = self._ids([rows[place] for place in places])
            done = torch.zeros(len(places), dtype=torch.bool, device=ids.device)
            for criterion in self._criteria:
                answer = torch.as_tensor(criterion(ids, None), device=ids.device)
                if answer.numel() not in (1, len(places)):
                    raise ValueError(
                        f"stopping_criteria: {type(criterion).__name__} gave {answer.numel()} answers for "
                        f"{len(places)} rows: it must answer for the rows it is called with, not for the batch"
                    )
                done |= answer.reshape(-1).bool()
            for place, stop in zip(places, done.tolist(), strict=True):
                stopped[place] = stop
        return stopped


def _refuse(name: str) -> None:
    argument = f" ({ARGUMENTS[name]})" if name in ARGUMENTS else ""
    raise ValueError(
        f"{name}{argument} cannot be used with prm_guidance: rows of a search come and go, and it is not known to do "
        f"without a state of its own. Served are {', '.join(sorted(NOTHING | TOKENS))}"
    )
