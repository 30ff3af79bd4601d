"""HFPolicy: sample steps from a transformers model. Steered: the same, with a pair's log-ratio added to each token."""

from __future__ import annotations

import copy
from collections.abc import Callable, Hashable, Iterable, Sequence
from os import PathLike
from typing import Any, Protocol, runtime_checkable

import torch

from ..checks import HoldsModels, function, integer, strength, token_set, tokenizer as check_tokenizer
from ..engine.adapters import AUTO
from ..engine.decoder import Decoder
from ..engine.decoding_row import DecodingRow
from ..engine.language_model import LanguageModel
from ..engine.next_words import TextEnd, next_logprobs
from ..engine.sampler import Sampler
from ..next_token import NextToken, answer_ids, check_words, word_ids
from ..policy import PolicyBase
from ..sampling import Request
from ..tokens import TokenText, encode_prompt
from ..tree import Node, Prompt, SearchTree
from .token_choice import TokenChoice


class HFPolicy(HoldsModels, PolicyBase):
    """A transformers causal LM that samples steps.

    The model's KV is kept in a tree: children of one node share their prefix, and each token is encoded once. Rows are
    decoded continuously, so a row that ends its step makes room for a waiting one.

    Args:
        model: a causal LM in eval mode, also wrapped by PEFT or torch.compile, or a LanguageModel.
        tokenizer: its tokenizer.
        adapter: which weights of a model with adapters: "auto" (a PeftModel's active ones), a name, or None.
        max_rows: children decoded at once.
        capacity: tokens of KV to hold; None: as LanguageModel.
        stop_ids: tokens that end a response; None: the eos ids of the generation config, else the tokenizer's.
        sampler: turns log-probabilities into tokens.
        stop: further stop condition: which of the rows being decoded end with the token each has just been given.

    Attributes:
        lm: the LanguageModel.
        tokenizer: as given.
        context: tokens that prompt and response may have together, or None where the model does not say.

    Raises:
        TypeError, ValueError: see LanguageModel.of; or max_rows < 1, a stop id lies outside the vocabulary, or an
            argument is of the wrong kind.
    """

    takes_stop = True
    ranks = True

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        adapter: str | None = AUTO,
        max_rows: int = 128,
        capacity: int | None = None,
        stop_ids: Iterable[int] | None = None,
        sampler: Sampler | None = None,
        stop: Callable[[Sequence[DecodingRow]], Sequence[bool]] | None = None,
    ) -> None:
        integer("max_rows", max_rows, 1, "a number of rows >= 1")
        if sampler is not None and not isinstance(sampler, Sampler):
            raise TypeError(f"sampler must be a Sampler or None, got {type(sampler).__name__}")
        if stop is not None:
            function("stop", stop, "a function of rows, or None,")
        check_tokenizer("tokenizer", tokenizer)
        self.lm = LanguageModel.of(model, adapter=adapter, capacity=capacity)
        self.tokenizer = tokenizer
        self.token_text = TokenText(tokenizer)
        vocab = self.lm.head.vocab
        if stop_ids is None:
            self.stop_ids = frozenset(i for i in _stop_ids(self.lm, tokenizer) if 0 <= i < vocab)
        else:
            self.stop_ids = token_set("stop_ids", stop_ids, vocab)
        self.top_tokens = vocab
        self.max_rows = max_rows
        self.sampler = sampler or Sampler()
        self._stop = stop
        self._decoder = self._make_decoder()

    @classmethod
    def from_pretrained(
        cls,
        model: str | PathLike[str],
        *,
        tokenizer: Any = None,
        max_rows: int = 128,
        capacity: int | None = None,
        stop_ids: Iterable[int] | None = None,
        sampler: Sampler | None = None,
        stop: Callable[[Sequence[DecodingRow]], Sequence[bool]] | None = None,
        **options: Any,
    ) -> HFPolicy:
        """Load a policy by name. A checkpoint that a pair has loaded, or will load, is shared with it.

        Args:
            model: hub id, folder of a checkpoint or of a PEFT adapter, or path of a GGUF file.
            tokenizer: a tokenizer, or where to load it from; None for the model's own.
            max_rows, capacity, stop_ids, sampler, stop: see HFPolicy.
            options: see loading.load: revision, gguf_file, dtype, device_map, ...

        Raises:
            OSError, ValueError, ImportError: see loading.load; or the model comes without a tokenizer.
        """
        from ..models.loading import load

        lm, loaded_tokenizer = load(model, tokenizer=tokenizer, capacity=capacity, **options)
        if loaded_tokenizer is None:
            raise ValueError(f"{str(model)!r} comes without a tokenizer: pass tokenizer=")
        return cls(lm, loaded_tokenizer, max_rows=max_rows, stop_ids=stop_ids, sampler=sampler, stop=stop)

    def _make_decoder(self) -> Decoder:
        return self._decoder_over([self.lm])

    def _decoder_over(
        self,
        lms: Sequence[LanguageModel],
        combine: Callable[[Sequence[torch.Tensor], Sequence[DecodingRow]], torch.Tensor] | None = None,
    ) -> Decoder:
        return Decoder(
            lms,
            combine=combine,
            sampler=self.sampler,
            tokens=self.token_text,
            stop_ids=self.stop_ids,
            max_rows=self.max_rows,
            stop=self._stop,
        )

    @property
    def id(self) -> Hashable:
        """Id of the model whose raw log-probabilities the nodes carry."""
        return self.lm.id

    @property
    def context(self) -> int | None:
        """Tokens of the longest path, or None where the model's config does not say."""
        return min(self.lm.context or self.lm.tree.capacity, self.lm.tree.capacity)

    @property
    def forward_calls(self) -> int:
        """Forwards run so far by this policy's model."""
        return self.lm.forwards

    def session(self) -> HFPolicy:
        """This policy with a decode loop of its own over the same KV; see Policy. Every search begins with one, so that
        searches may share a policy, also from several threads."""
        own = copy.copy(self)
        own._decoder = own._make_decoder()
        return own

    def encode(self, prompt: Prompt) -> tuple[int, ...]:
        """Token ids of a prompt: as given, by the chat template for messages, else the tokenizer's own encoding.

        Raises:
            ValueError: the prompt is empty, has ids outside the vocabulary, or leaves no room in the context.
        """
        ids = encode_prompt(self.tokenizer, prompt, "the policy's tokenizer")
        if min(ids) < 0 or max(ids) >= self.lm.head.vocab:
            raise ValueError(f"prompt ids {min(ids)}..{max(ids)} lie outside the vocabulary of {self.lm.head.vocab}")
        limit = self.context
        if limit is not None and len(ids) >= limit:
            raise ValueError(f"the prompt has {len(ids)} tokens; the context of {limit} leaves no room for a response")
        return ids

    def submit(self, requests: Sequence[Request]) -> None:
        """See Policy.submit."""
        self._decoder.submit(requests)

    def advance(self) -> list[tuple[Request, list[Node]]]:
        """One forward; see Policy.advance."""
        return self._decoder.advance()

    def interrupt(self, request: Request) -> list[Node]:
        """See Policy.interrupt."""
        return self._decoder.interrupt(request)

    def drop(self, requests: Sequence[Request]) -> None:
        """Forget unanswered requests; see PolicyBase.drop."""
        self._decoder.drop(requests)

    def steered(
        self, pair: Any, alpha: float, below: float | None = None, candidates: int | None = None,
        confidence_of: str = "top",
    ) -> Steered:  # fmt: skip
        """Return the policy steered by a pair; see Steered."""
        return Steered(self, pair, alpha, below=below, candidates=candidates, confidence_of=confidence_of)

    def next_token_logprobs(self, asks: Sequence[NextToken], words: Sequence[str]) -> list[dict[str, float]]:
        """See PolicyBase.next_token_logprobs. One packed forward; what texts of a tree begin with in common, a drawn
        answer too, is encoded once."""
        ids = word_ids(self.token_text, check_words(words), self.lm.head.vocab)
        ends = [self._end(ask) for ask in asks]
        if not ends:
            return []
        table = next_logprobs(self.lm, ends, list(ids.values())).double().tolist()
        return [dict(zip(ids, row, strict=True)) for row in table]

    def _end(self, ask: NextToken) -> TextEnd:
        prompt = self.encode(ask.prompt)
        text = (*prompt, *answer_ids(ask, self.token_text))
        drawn = ask.drawn
        if drawn is None or drawn.tree.prompt.token_ids != prompt:
            return TextEnd(ask.tree, text)
        return TextEnd(ask.tree, text, self.lm.memo(drawn.tree).branch(drawn))

    def release(self, tree: SearchTree) -> None:
        """Drop a tree's requests and free its KV."""
        self._decoder.release(tree)


@runtime_checkable
class SteeringPair(Protocol):
    """The part of an ImplicitPRM that Steered uses."""

    def bind(self, policy: Any, /) -> None:
        """Meet the policy; see ImplicitPRM.bind."""
        ...

    def steering_models(self) -> tuple[LanguageModel, LanguageModel]:
        """The PRM's model and the reference's."""
        ...


class Steered(HFPolicy):
    """A policy whose every token is drawn from logits + alpha * (log pi_phi - log pi_ref), before temperature.

    All models advance incrementally, one packed forward each a round; a model that plays two parts runs once. The
    nodes carry the policy's own raw log-probabilities, and the pair's are in its memo, so scoring costs nothing more.

    Args:
        policy: an HFPolicy.
        pair: an ImplicitPRM with the policy's tokens.
        alpha: strength; 0 leaves the policy as it is. beta plays no part.
        below, candidates, confidence_of: as in Steer, which checks them.

    Raises:
        TypeError: policy is not an HFPolicy, pair not an ImplicitPRM, or alpha no number.
        ValueError: alpha is not in [-1e6, 1e6], or the pair has another tokenizer or no reference.
    """

    alpha: float

    def __init__(
        self, policy: HFPolicy, pair: SteeringPair, alpha: float, *, below: float | None = None,
        candidates: int | None = None, confidence_of: str = "top",
    ) -> None:  # fmt: skip
        if not isinstance(policy, HFPolicy):
            raise TypeError(f"policy: Steered wraps an HFPolicy, got {type(policy).__name__}")
        if not isinstance(pair, SteeringPair):  # scorers of whole steps have no number for a token
            raise TypeError(f"pair must be an ImplicitPRM, got {type(pair).__name__}")
        strength("alpha", alpha)
        pair.bind(policy)
        self.pair = pair
        self.alpha = float(alpha)
        plain = below is None and candidates is None
        self.choice = None if plain else (below, candidates, confidence_of)
        self._parts = pair.steering_models()
        super().__init__(
            policy.lm,
            policy.tokenizer,
            max_rows=policy.max_rows,
            stop_ids=policy.stop_ids,
            sampler=policy.sampler,
            stop=policy._stop,
        )

    def _make_decoder(self) -> Decoder:
        prm, reference = self._parts
        lms = list(dict.fromkeys((self.lm, prm, reference)))
        at = (lms.index(prm), lms.index(reference))
        # not self: the models would stay until a garbage collection
        return self._decoder_over(lms, TokenChoice(at, self.alpha, *(self.choice or ()), sampler=self.sampler))


def _stop_ids(lm: LanguageModel, tokenizer: Any) -> list[int]:
    config = getattr(lm.module, "generation_config", None)
    eos_ids = getattr(config, "eos_token_id", None)
    if eos_ids is None:
        eos_ids = tokenizer.eos_token_id
    if eos_ids is None:
        return []
    return [int(eos_ids)] if isinstance(eos_ids, int) else [int(i) for i in eos_ids]
