"""The released EurusPRM usage, for comparing with published numbers. For comparison only: use ImplicitPRM otherwise.

It follows the evaluation code of arXiv 2412.01981 and the EurusPRM model cards, whose choices differ from ours:

1. Steps are what stands between "Step k:" marks, stripped and numbered anew, "Step" inside them made lower case,
   joined by blank lines: what is scored is not what was generated. A response without a mark is one step.
2. Boundaries come from rendering and tokenising the chat anew for each number of steps, less two tokens. In ChatML,
   with a blank line and an end of turn of one token each, a step's sum so ends with the first token of the next step,
   and the first step begins with the prompt's last token.
3. The coefficient is 0.001 (training used beta = 0.05).
4. `parity=True`: padding becomes the end of sequence where a tokenizer has none, and every token equal to it is masked
   out: with Llama-3.1's tokenizer the ends of turns inside the prompt. And log-softmax is taken in the model's dtype.
   Without parity all tokens are attended to, in fp32, by this library's engine.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ...checks import number
from ...tokens.private_tokenizer import private_tokenizer
from ...triton_kernels.reference import log_softmax

if TYPE_CHECKING:
    from ...engine.language_model import LanguageModel
    from .implicit_prm import ImplicitPRM

COEFFICIENT = 0.001
_MARK = re.compile(r"Step \d+:")
_LLAMA_3 = ("<|start_header_id|>assistant<|end_header_id|>", "<|eot_id|>")  # taken off the end of partial chats


@dataclass(frozen=True, eq=False)
class EurusScores:
    """Step scores as released.

    Attributes:
        steps: S texts, as they were scored.
        accumulative: [S] fp32, coefficient * nats: sum of log-ratios up to each step's boundary.
    """

    steps: tuple[str, ...]
    accumulative: np.ndarray

    @cached_property
    def single(self) -> np.ndarray:
        """[S] fp32: differences of `accumulative`. Stage 1's card selects by their minimum."""
        return np.diff(self.accumulative, prepend=np.float32(0))


def format_steps(response: str) -> list[str]:
    """A response's steps in the released format: ["Step 1: ...", "Step 2: ..."]; empty for a blank response."""
    bodies = [body.strip() for body in _MARK.split(response)]
    return [f"Step {k}: {body.replace('Step', 'step')}" for k, body in enumerate(filter(None, bodies), 1)]


def boundaries(tokenizer: Any, query: str, steps: Sequence[str]) -> tuple[list[int], list[int]]:
    """The chat's token ids, and S + 1 boundaries in them: the first where scoring starts, then one a step.

    Args:
        tokenizer: with a chat template.
        query: what the user asks.
        steps: S texts.

    Returns:
        ids [L], and positions p: p[0] is the first token that is scored, step k's sum goes up to token p[k] + 1.
    """

    def chat(count: int) -> list[dict[str, str]]:
        answer = "\n\n".join(steps[:count])
        return [{"role": "user", "content": query}, {"role": "assistant", "content": answer}]

    rendered = tokenizer.apply_chat_template(chat(len(steps)), tokenize=True, return_dict=True)
    places = []
    for count in range(len(steps) + 1):
        text = tokenizer.apply_chat_template(chat(count), tokenize=False).strip()
        if count < len(steps):
            for suffix in _LLAMA_3:
                text = text.removesuffix(suffix)
            text += "\n\n" if count else ""
        places.append(len(tokenizer.encode(text, add_special_tokens=False)) - 2)
    return [int(i) for i in rendered["input_ids"]], places


def eurus_score(
    pair: ImplicitPRM,
    queries: Sequence[str],
    responses: Sequence[str | Sequence[str]],
    *,
    coefficient: float = COEFFICIENT,
    parity: bool = False,
) -> list[EurusScores]:
    """Score responses as the released code does; see the module for what that means.

    Args:
        pair: both models, with a tokenizer that has a chat template.
        queries: B questions.
        responses: B texts, cut and numbered by `format_steps`; or lists of steps, scored as they are.
        coefficient: stands in for beta.
        parity: reproduce the attention mask and the precision too. One plain forward a response and model.

    Raises:
        ValueError: lengths disagree, a response has no steps, the coefficient is not finite, or parity is asked of a
            pair without a reference model.
    """
    if len(queries) != len(responses):
        raise ValueError(f"queries has {len(queries)} entries and responses {len(responses)}")
    number("coefficient", coefficient, "a finite number that fp32 scores can carry", lambda value: abs(value) <= 1e30)
    tokenizer = private_tokenizer(pair.need_tokenizer())
    cut = [format_steps(r) if isinstance(r, str) else list(r) for r in responses]
    for place, steps in enumerate(cut):
        if not steps:
            raise ValueError(f"responses[{place}] is empty: at least one step is needed")
    encoded = [boundaries(tokenizer, query, steps) for query, steps in zip(queries, cut, strict=True)]
    starts = [max(places[0], 1) for _, places in encoded]
    if parity:
        ratios = [_plain_ratios(pair, ids)[start - 1 :] for (ids, _), start in zip(encoded, starts, strict=True)]
    else:
        prompts = [ids[:start] for (ids, _), start in zip(encoded, starts, strict=True)]
        answers = [ids[start:] for (ids, _), start in zip(encoded, starts, strict=True)]
        ratios = [s.token_rewards / np.float32(pair.beta) for s in pair.score(prompts, answers)]
    scores = []
    for steps, (_, places), start, ratio in zip(cut, encoded, starts, ratios, strict=True):
        sums = np.cumsum(coefficient * ratio.astype(np.float64))
        ends = [min(place + 1 - start, len(sums) - 1) for place in places[1:]]
        scores.append(EurusScores(tuple(steps), sums[ends].astype(np.float32)))
    return scores


def _plain_ratios(pair: ImplicitPRM, ids: Sequence[int]) -> np.ndarray:
    """[L - 1] log-ratios of tokens 1.. by plain forwards under the released attention mask."""
    reference = pair.reference
    if reference is None:
        raise ValueError("parity=True needs a pair with a reference model")
    tokenizer = private_tokenizer(pair.need_tokenizer())
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    return _plain_logprobs(pair.prm, ids, pad) - _plain_logprobs(reference, ids, pad)


def _plain_logprobs(lm: LanguageModel, ids: Sequence[int], pad: int | None) -> np.ndarray:
    tokens = torch.tensor([list(ids)], dtype=torch.long, device=lm.device)
    mask = torch.ones_like(tokens) if pad is None else (tokens != pad).long()
    with lm.exclusive(), torch.no_grad():
        logits = lm.module(input_ids=tokens, attention_mask=mask, use_cache=False).logits
    logprobs = log_softmax(logits[:, :-1]).gather(2, tokens[:, 1:, None].to(logits.device))
    return logprobs[0, :, 0].float().cpu().numpy()
