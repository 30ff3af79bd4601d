"""Steering of a policy by a pair, token by token: the scores that a decode loop draws from."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..engine.decoding_row import DecodingRow
from ..engine.sampler import Sampler
from ..triton_kernels import guide_logits


class TokenChoice:
    """Scores to draw from, of the policy's, the PRM's and the reference's next-token distributions; see Steer.

    Args:
        parts: places of the PRM's and of the reference's distribution among the tables.
        alpha: strength of steering; of no use with candidates.
        below: act only where the policy is less sure than this probability; None for everywhere.
        candidates: take the one with the largest log-ratio among so many of the policy's most probable tokens. All have
            the same prefix, so it is the one with the largest q. None steers by alpha.
        confidence_of: the probability that `below` is compared with: "top" or "drawn".
        sampler: draws the token that confidence_of="drawn" speaks of.
    """

    def __init__(
        self,
        parts: tuple[int, int],
        alpha: float,
        below: float | None = None,
        candidates: int | None = None,
        confidence_of: str = "top",
        *,
        sampler: Sampler,
    ) -> None:
        self._parts, self._alpha, self._sampler = parts, alpha, sampler
        self._below, self._candidates, self._confidence_of = below, candidates, confidence_of

    def __call__(self, tables: Sequence[torch.Tensor], rows: Sequence[DecodingRow]) -> torch.Tensor:
        """Scores [R, V] from each row's logits, or log-softmax, under each model, [R, V] each."""
        policy = tables[0]
        prm, reference = (tables[place].to(policy.device) for place in self._parts)
        if self._candidates is None:
            scores = guide_logits(policy, prm, reference, torch.full((len(rows),), self._alpha, device=policy.device))
        else:
            scores = self._chosen(policy, prm, reference, self._candidates)
        if self._below is None:
            return scores
        if self._confidence_of == "top":
            sure = policy.max(dim=-1, keepdim=True).values
        else:
            # Draws are functions of their place: where the policy is sure, the loop draws this token again.
            drawn = torch.as_tensor(self._sampler.draw(policy, rows), device=policy.device)
            sure = policy.gather(1, drawn[:, None])
        sure = sure - policy.logsumexp(dim=-1, keepdim=True)
        return torch.where(sure.exp() < self._below, scores, policy)

    @staticmethod
    def _chosen(policy: torch.Tensor, prm: torch.Tensor, reference: torch.Tensor, candidates: int) -> torch.Tensor:
        """0 at the chosen token of each row, -inf elsewhere."""
        width = min(table.shape[1] for table in (policy, prm, reference))  # of padded vocabularies
        best = policy[:, :width].topk(min(candidates, width), dim=-1).indices
        ratio = (prm.gather(1, best) - reference.gather(1, best)).nan_to_num(nan=-torch.inf, neginf=-torch.inf)
        chosen = best.gather(1, ratio.argmax(dim=-1, keepdim=True))
        return torch.full_like(policy, -torch.inf).scatter(1, chosen, 0.0)
