"""OnlineUpdater: the PRM learns from the searches it scores (PRIME, arXiv 2502.01456)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from ..checks import number, shown
from ..scorers.implicit.implicit_prm import ImplicitPRM
from .data import Item, LabelledResponse, by_prompt, collate
from .logprobs import response_forward, row_logprobs
from .objectives import ce
from .pair_accuracy import pair_accuracy


@dataclass(frozen=True)
class Outcome:
    """One finished response and whether it was right.

    Attributes:
        prompt_ids, response_ids: the pair's tokens; a sampled end of sequence is one of the response's.
        label: whether the response is right.
    """

    prompt_ids: Sequence[int]
    response_ids: Sequence[int]
    label: bool


@dataclass(frozen=True)
class Update:
    """The result of one batch of outcomes.

    Attributes:
        kept: for each outcome, whether its prompt's accuracy is within the band.
        advantages: for each outcome [T] fp32 (see leave_one_out), or None where it was not kept or is alone.
        updated: whether the PRM was trained after this batch.
        loss: mean cross entropy of the outcomes that it was trained on, before; None where it was not trained.
        accuracy_before, accuracy_after: the share of their pairs of a right and a wrong response to one prompt in which
            the right one has more reward. Drift shows here. None without pairs, or where it was not trained.
    """

    kept: tuple[bool, ...]
    advantages: tuple[np.ndarray | None, ...]
    updated: bool
    loss: float | None = None
    accuracy_before: float | None = None
    accuracy_after: float | None = None


class OnlineUpdater:
    """Trains a pair's PRM on outcomes as they come in, by cross entropy, and turns its rewards into advantages.

    The reference stays what it is. A PRM that is an adapter is trained in the adapter alone. Every update forgets what
    the PRM's model has computed for searches (LanguageModel.forget), so call it between searches. A search that the
    pair is scoring would mix rewards of the new weights with rewards of the old.

    Args:
        pair: its PRM and reference are models here, and not the same weights.
        learning_rate: of AdamW. PRIME trains models of 7 billion parameters with 1e-6.
        every: batches from one update to the next; it is taught by all of them.
        micro_batch: responses of one forward.
        band: prompts whose share of right responses is not strictly between these numbers are left out; None keeps all.
            PRIME filters by 0.2 and 0.8 as well, where shares of exactly 0.2 or 0.8 stay in.
        discount: of later rewards in the advantages, in (0, 1].
        clip: norm of the gradient at most.

    Raises:
        TypeError: pair is not an ImplicitPRM.
        ValueError: the pair has no reference model, its PRM's weights are of less than 32 bits (small updates would be
            lost in rounding), or a number is out of range.
    """

    def __init__(
        self,
        pair: ImplicitPRM,
        *,
        learning_rate: float = 1e-6,
        every: int = 1,
        micro_batch: int = 8,
        band: tuple[float, float] | None = (0.2, 0.8),
        discount: float = 1.0,
        clip: float = 10.0,
    ) -> None:
        if not isinstance(pair, ImplicitPRM):
            raise TypeError(f"pair must be an ImplicitPRM, got {type(pair).__name__}")
        if pair.reference is None:
            raise ValueError("pair has no reference model: its rewards cannot be trained")
        if pair.reference is pair.prm:
            raise ValueError("pair: model and reference are the same weights, so training one would change the other")
        for name, value in (("learning_rate", learning_rate), ("clip", clip)):
            number(name, value, "a finite number > 0", lambda x: 0 < x < math.inf)
        for name, count in (("every", every), ("micro_batch", micro_batch)):
            if isinstance(count, bool) or not isinstance(count, int) or count < 1:
                raise ValueError(f"{name}={count!r}: an integer >= 1 is needed")
        number("discount", discount, "a number in (0, 1]", lambda x: 0 < x <= 1)
        if band is not None:
            if not isinstance(band, Sequence) or len(band) != 2:
                raise TypeError(f"band={shown(band)}: two shares, the first below the second, are needed, or None")
            for share in band:
                number("band", share, "two shares in [0, 1], rising,", lambda x: 0 <= x <= 1)
            if not band[0] < band[1]:
                raise ValueError(f"band={band!r}: two shares, the first below the second, are needed, or None")
        self.pair = pair
        self.every, self.micro_batch, self.band, self.discount, self.clip = every, micro_batch, band, discount, clip
        self._rows: list[LabelledResponse] = []
        self._batches = 0
        self._weights = self._trainable()
        self._optimizer = torch.optim.AdamW(self._weights, lr=learning_rate, weight_decay=0.0)

    def add(self, outcomes: Sequence[Outcome]) -> Update:
        """Take a batch of outcomes; every `every`-th call trains the PRM.

        Advantages are those of the PRM as it was before.

        Raises:
            ValueError: an outcome has no prompt or no response; or the PRM is to be trained while a search that samples
                from its model is under way. In the second case the batch was not taken: give it again.
        """
        rows = []
        for index, outcome in enumerate(outcomes):
            if len(outcome.prompt_ids) == 0 or len(outcome.response_ids) == 0:
                raise ValueError(f"outcomes[{index}]: prompt_ids and response_ids must not be empty")
            rows.append(
                LabelledResponse(tuple(outcome.prompt_ids), np.asarray(outcome.response_ids), bool(outcome.label))
            )
        inside = {prompt for prompt, group in by_prompt(rows).items() if self._within(group)}
        kept = [row for row in rows if row.prompt_ids in inside]
        reference = self.pair.reference
        assert reference is not None
        with reference.exclusive(), response_forward(reference.module):
            for row, value in zip(kept, row_logprobs(reference.module, kept), strict=True):
                row.reference = value
        advantages: dict[int, np.ndarray] = {}
        rewards = dict(zip(map(id, kept), self._token_rewards(kept), strict=True))
        for group in by_prompt(kept).values():
            if len(group) > 1:
                labels = [row.label for row in group]
                group_advantages = leave_one_out([rewards[id(row)] for row in group], labels, self.discount)
                advantages.update(zip(map(id, group), group_advantages, strict=True))
        due = self._batches + 1 >= self.every and bool(self._rows or kept)
        if due:
            self.pair.prm.forget()  # refuses while a search is under way: nothing has changed yet
        self._rows += kept
        self._batches += 1
        row_advantages = tuple(advantages.get(id(row)) for row in rows)
        inclusion = tuple(row.prompt_ids in inside for row in rows)
        if not due:
            return Update(inclusion, row_advantages, False)
        taught, self._rows, self._batches = self._rows, [], 0
        before = pair_accuracy(taught, self._sums(taught))
        loss = self._train(taught)
        self.pair.prm.forget()
        return Update(inclusion, row_advantages, True, loss, before, pair_accuracy(taught, self._sums(taught)))

    def _within(self, group: Sequence[LabelledResponse]) -> bool:
        share = sum(row.label for row in group) / len(group)
        return self.band is None or self.band[0] < share < self.band[1]

    def _trainable(self) -> list[torch.nn.Parameter]:
        """The PRM's weights: those of its adapters, or all."""
        lm = self.pair.prm
        weights = []
        for name, weight in lm.module.named_parameters():
            if lm.state is None or any(f".{adapter}." in f"{name}." for adapter in lm.state):
                if weight.dtype not in (torch.float32, torch.float64):
                    raise ValueError(f"pair: {name} is {weight.dtype}; weights that are trained must be float32")
                weights.append(weight.requires_grad_(True))
            else:
                weight.requires_grad_(False)
        return weights

    def _token_rewards(self, rows: Sequence[LabelledResponse]) -> list[np.ndarray]:
        lm = self.pair.prm
        with lm.exclusive(), response_forward(lm.module):
            values = row_logprobs(lm.module, rows)
        return [self.pair.beta * (value - np.asarray(row.reference)) for value, row in zip(values, rows, strict=True)]

    def _sums(self, rows: Sequence[LabelledResponse]) -> list[float]:
        return [float(rewards.sum()) for rewards in self._token_rewards(rows)]

    def _train(self, rows: Sequence[LabelledResponse]) -> float:
        """One step on all rows. Returns their mean loss before it."""
        lm, total = self.pair.prm, 0.0
        names = ("input_ids", "attention_mask", "response_mask")
        order = sorted(rows, key=len)
        with lm.exclusive(), response_forward(lm.module), torch.enable_grad():
            for start in range(0, len(order), self.micro_batch):
                part = order[start : start + self.micro_batch]
                batch = {k: v.to(lm.device) for k, v in collate([Item((row,), row.label) for row in part]).items()}
                logprobs = lm.module(**{name: batch[name] for name in names})
                rewards = self.pair.beta * (logprobs - batch["reference"]).sum(1)
                loss = ce(rewards, batch["label"]).sum() / len(rows)
                loss.backward()
                total += loss.item()
            torch.nn.utils.clip_grad_norm_(self._weights, self.clip)
            self._optimizer.step()
            self._optimizer.zero_grad()
        return total


def leave_one_out(
    token_rewards: Sequence[np.ndarray], labels: Sequence[bool], discount: float = 1.0
) -> list[np.ndarray]:
    """Advantages of K >= 2 responses to one prompt (arXiv 2502.01456).

        A_t^i = sum_{s >= t} discount^(s-t) * (r_s^i - mean over j != i of response j's mean token reward)
                + label_i - mean over j != i of label_j

    Args:
        token_rewards: [T_i] each, beta * nats.
        labels: K.
        discount: in (0, 1].

    Returns:
        [T_i] fp32 each.

    Raises:
        ValueError: there are fewer than two responses, or one without tokens.
    """
    if len(token_rewards) < 2 or len(labels) != len(token_rewards) or any(not len(r) for r in token_rewards):
        raise ValueError(f"{len(token_rewards)} responses, {len(labels)} labels: two at least are needed, none empty")
    means = np.array([np.mean(rewards, dtype=np.float64) for rewards in token_rewards])
    outcomes = np.array(labels, np.float64)
    others = len(means) - 1
    advantages = []
    for i, rewards in enumerate(token_rewards):
        left = np.asarray(rewards, np.float64) - (means.sum() - means[i]) / others
        returns = np.empty(len(left))
        total = 0.0
        for t in range(len(left) - 1, -1, -1):
            returns[t] = total = left[t] + discount * total
        outcome = outcomes[i] - (outcomes.sum() - outcomes[i]) / others
        advantages.append((returns + outcome).astype(np.float32))
    return advantages
