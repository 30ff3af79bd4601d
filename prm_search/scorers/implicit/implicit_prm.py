"""ImplicitPRM: two causal LMs whose log-ratio is a reward for every token.

The reward of token t is `beta * (log pi_phi(y_t | x, y_<t) - log pi_ref(y_t | x, y_<t))`; its sum q_t is the value of
the prefix (arXiv 2412.01981, Proposition 3.1 and eq. 2-3).
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from typing import Any

import numpy as np

from ...checks import integer, number
from ...engine.adapters import AUTO
from ...engine.language_model import LanguageModel
from ...engine.node_logprobs import logprobs_under
from ...tokens import TokenizerMatch
from ...tree import Node, SearchTree
from ..pair import BETA, Pair
from ..retokenise import PathReader, RetokenisedTree, score_paths
from ..scores import Scores
from .card import resolve

__all__ = ["ConstantReference", "ImplicitPRM", "Scores"]


@dataclass(frozen=True)
class ConstantReference:
    """`reference=ConstantReference(b)`: every token has this log-probability under the missing reference.

    Args:
        logprob: b, nats a token, <= 0 (and above -1e6, so that rewards are numbers in fp32).

    Raises:
        TypeError: logprob is not a number.
        ValueError: logprob is positive or not finite.
    """

    logprob: float

    def __post_init__(self) -> None:
        number("logprob", self.logprob, "a log-probability, finite and <= 0 nats,", lambda value: True)
        if not -1e6 <= self.logprob <= 0:
            raise ValueError(f"logprob={self.logprob!r}: a log-probability is needed, finite and <= 0 nats")

    @classmethod
    def fit(
        cls, model: Any, prompts: Sequence[Any], responses: Sequence[Any], *, tokenizer: Any = None, **options: Any
    ) -> ConstantReference:
        """The mean log-probability of a response token under the model: b = sum of log pi_phi / number of tokens.

        Args:
            model: the PRM, as ImplicitPRM takes it.
            prompts, responses: answers as the policy gives them, right and wrong, as ImplicitPRM.score takes them;
                some dozens of them are enough.
            tokenizer: the PRM's.
            options: of ImplicitPRM.score.

        Raises:
            ValueError: there are no responses; or as ImplicitPRM and ImplicitPRM.score.
        """
        raw = ImplicitPRM(model, cls(0.0), tokenizer=tokenizer, beta=1.0)
        scores = raw.score(prompts, responses, **options)
        if not scores:
            raise ValueError("responses is empty: a calibration needs some")
        return cls(sum(s.reward for s in scores) / sum(len(s.token_ids) for s in scores))


class ImplicitPRM(Pair):
    """A pair: the trained reward LM, the reference it started from, and beta. Also a Scorer for `search`.

    Models that are the same weights are run once, whatever parts they play: a pair whose reference is the policy, named
    or passed, scores with one model, and the reference's half of every sampled token is known from drawing it.

    A policy with the same vocabulary is scored token by token. With another vocabulary the pair works in its inexact
    mode: it renders the prompt itself and re-tokenises each path's text (see retokenise); `Node.rewards` then speaks of
    the pair's own tokens, `Node.reward_ids`. With the same vocabulary but another chat template only the prompt is
    rendered anew. Either needs prompts as text or messages, and rules out steering and `reference="policy"`.

    Args:
        model: the trained model: a causal LM in eval mode, also wrapped by PEFT or torch.compile; a LanguageModel; or
            an HFPolicy, for its model.
        reference: the model that the PRM was initialised from, in the same forms; "policy" for the policy of the
            search, also one that is no transformers model (its nodes then carry the log-probabilities); a
            ConstantReference for none; or None for the base weights of a model with an adapter.
        tokenizer: of both models; None takes a policy's.
        beta: > 0, rewards a nat. Rescaling changes no ranking by q, but softmax and sigmoid weights.
        name: key of the rewards in Node.rewards.
        adapter: which weights of a model with adapters: "auto" (a PeftModel's active ones), a name, or None.
        capacity: tokens of KV to hold in each model; None: as LanguageModel.
        eos_token_id: the end of a response given as text; None: the tokenizer's.

    Attributes:
        beta, name, tokenizer: as given.
        prm: the trained LanguageModel.

    Raises:
        TypeError: model or reference is no causal LM.
        ValueError: beta is not a finite number > 0, the reference is missing, or a model is not served exactly.

    Warns:
        UserWarning: model and reference are the same weights, so that every reward is 0.
    """

    def __init__(
        self,
        model: Any,
        reference: Any = None,
        *,
        tokenizer: Any = None,
        beta: float = BETA,
        name: str = "prm",
        adapter: str | None = AUTO,
        capacity: int | None = None,
        eos_token_id: int | None = None,
    ) -> None:
        if isinstance(model, str | PathLike):
            raise TypeError(
                f"model={model!r}: a model is needed; ImplicitPRM.from_pretrained loads one by name or path"
            )
        own = tokenizer if tokenizer is not None else getattr(model, "tokenizer", None)
        super().__init__(beta=beta, name=name, tokenizer=own, eos_token_id=eos_token_id)
        if capacity is not None:
            integer("capacity", capacity, 1, "a number of tokens >= 1, or None,")
        self.prm: LanguageModel = _language_model("model", model, adapter, capacity)
        self._reference: LanguageModel | None = None
        self._reader: PathReader | None = None  # None: the policy's tokens serve
        self._readers: dict[Hashable, PathReader | None] = {}  # by the id of each policy met so far
        self._trees: weakref.WeakKeyDictionary[SearchTree, RetokenisedTree | None] = weakref.WeakKeyDictionary()
        if reference is None:
            if self.prm.state is None:
                raise ValueError(
                    "reference is missing: pass the model that the PRM was initialised from, 'policy', or a "
                    "ConstantReference to do without one"
                )
            self._reference = LanguageModel.of(self.prm.module, adapter=None, capacity=capacity)
        elif isinstance(reference, ConstantReference):
            self._constant = float(reference.logprob)
        elif isinstance(reference, str | PathLike):
            if reference != "policy":
                raise ValueError(
                    f"reference={reference!r}: a model or 'policy' is needed here; ImplicitPRM.from_pretrained loads "
                    "by name or path"
                )
        else:
            other = getattr(reference, "tokenizer", None)
            if other is not None and self.tokenizer is not None and not TokenizerMatch.of(self.tokenizer, other).tokens:
                raise ValueError("reference has another vocabulary than the model: a pair needs one vocabulary")
            # The module that the PRM's adapter was put into, passed by itself, means its own weights.
            bare = None if reference is self.prm.module else AUTO
            self._reference = _language_model("reference", reference, bare, capacity)
            self._warn_if_same(self._reference)
        if eos_token_id is not None and eos_token_id >= self.vocab:
            raise ValueError(f"eos_token_id={eos_token_id}: the models have the tokens 0 to {self.vocab - 1}")

    @classmethod
    def from_pretrained(
        cls,
        model: str | PathLike[str],
        reference: Any = None,
        *,
        name: str = "prm",
        capacity: int | None = None,
        eos_token_id: int | None = None,
        **options: Any,
    ) -> ImplicitPRM:
        """Load a pair by hub id or path.

        A folder or hub repository with a card, `pair.json`, is a pair by itself: the card names model and reference
        (relative to itself where such a folder is there) and beta. A PEFT adapter's reference is its base, adapter
        off, unless another is named. Models that are the same checkpoint are loaded and run once.

        Args:
            model: hub id, folder (checkpoint, PEFT adapter or pair card), or GGUF file of the PRM.
            reference: hub id or path of the reference; "policy" for the policy of the search (a folder of that name is
                "./policy"); a module, HFPolicy or LanguageModel; a ConstantReference; None for what card or adapter
                say.
            name, eos_token_id: see ImplicitPRM.
            capacity: of both models; see ImplicitPRM.
            options: see card.resolve: beta, tokenizer, base, revision, gguf_file, reference_revision,
                reference_gguf_file, and what models.loading.load takes.

        Raises:
            OSError, ImportError: see models.loading.load.
            ValueError: the card is not one; the reference is missing, or has another vocabulary; or see load.

        Warns:
            UserWarning: model and reference are the same checkpoint.
        """
        parts = resolve(model, reference, capacity=capacity, **options)
        return cls(
            parts.model,
            parts.reference,
            tokenizer=parts.tokenizer,
            beta=parts.beta,
            name=name,
            capacity=capacity,
            eos_token_id=eos_token_id,
        )

    # --- what it is ------------------------------------------------------------------------------------------------

    @property
    def reference(self) -> LanguageModel | None:
        """The reference LanguageModel; None for a constant, or for a policy that has no model here."""
        if self._constant is not None:
            return None
        return self._reference or _model_of(self._policy)

    @property
    def forward_calls(self) -> int:
        """Forwards run so far by its models, whoever asked for them."""
        return sum(lm.forwards for lm in self._lms())

    @property
    def context(self) -> int | None:
        """Tokens that prompt and response may have together, or None where the models do not say."""
        limits = [limit for lm in self._lms() for limit in (lm.context, lm.tree.capacity) if limit is not None]
        return min(limits, default=None)

    @property
    def policy_context(self) -> int | None:
        """The same in tokens of the policy it is bound to; None where it reads their text in tokens of its own."""
        return self.context if self._reader is None else None

    @property
    def vocab(self) -> int:
        """Tokens that all of its models know, embeddings' padding included."""
        return min(lm.head.vocab for lm in self._lms())

    def _lms(self) -> list[LanguageModel]:
        """The distinct models it runs."""
        return list(dict.fromkeys(lm for lm in (self.prm, self.reference) if lm is not None))

    # --- with a policy -----------------------------------------------------------------------------------------------

    def bind(self, policy: Any) -> None:
        """Meet the policy whose nodes are to be scored; `search` does it. One policy at a time.

        Raises:
            ValueError: the reference is the policy, and it has another vocabulary than the pair.
        """
        if policy is self._policy:
            return
        fit = self.match(policy)
        if not fit.tokens and self.follows_policy:
            raise ValueError("reference='policy': the policy has another vocabulary than the pair's model")
        if self.follows_policy and _model_of(policy) is not None:
            self._warn_if_same(_model_of(policy))
        self._reader = None if fit.prompts else PathReader(self.tokenizer, self.eos_token_id, policy, fit, self.name)
        self._readers[getattr(policy, "id", None)] = self._reader
        self._policy = policy

    def _warn_if_same(self, reference: LanguageModel | None) -> None:
        if reference is self.prm:
            warnings.warn(
                "model and reference are the same weights, so every reward is 0 (for an adapter on its base, leave "
                "the reference out)",
                UserWarning,
                stacklevel=3,
            )

    def steering_models(self) -> tuple[LanguageModel, LanguageModel]:
        """The trained model and the reference, for a policy that adds their log-ratio to its logits.

        Raises:
            ValueError: there is no reference model, or prompts or tokens are not the policy's.
        """
        if self._constant is not None:
            raise ValueError("steering needs a reference model: a ConstantReference cancels in the softmax")
        if self._reader is not None:
            raise ValueError(
                "steering needs a pair with the policy's vocabulary and chat template (tokenizer=policy.tokenizer says "
                "that the pair takes the policy's prompts as they are)"
            )
        if self.reference is None:
            raise ValueError("reference='policy' needs a policy with a model of its own, and a bind(policy) before")
        return self.prm, self.reference

    # --- scoring -----------------------------------------------------------------------------------------------------

    def score_nodes(self, nodes: Sequence[Node]) -> None:
        """Score nodes and their unscored ancestors; see Scorer.score_nodes. One packed forward a model.

        Raises:
            ValueError: a prompt is given only as token ids of a policy with another vocabulary; or a path exceeds a
                model's context.
        """
        todo = self.unscored(nodes)
        own = [(mine, node) for node in todo if (mine := self._own_tree(node)) is not None]
        if own:
            for (_, node), (ratios, grown, ids) in zip(own, score_paths(own, self._constant), strict=True):
                node.set_rewards(self.name, self.beta * ratios, self.beta * grown, ids)
                node.tree.vocabularies[self.name] = self.token_text
        self.score_exact([node for node in todo if self._own_tree(node) is None])

    def score_exact(self, nodes: Sequence[Node]) -> None:
        """Score unscored nodes by the very tokens and prompt they carry, each after its parent."""
        if not nodes:
            return
        for node in nodes:
            prompt = node.tree.prompt
            if prompt.token_ids is None:
                node.tree.prompt = prompt.with_ids(self.encode_prompt(prompt))
        self.refuse_strangers(nodes)
        known = logprobs_under(self._lms(), nodes)
        for node, mine, theirs in zip(nodes, known[self.prm], self._theirs(nodes, known), strict=True):
            self.reward(node, mine, theirs)

    def _theirs(
        self, nodes: Sequence[Node], known: Mapping[LanguageModel, list[np.ndarray]]
    ) -> Sequence[np.ndarray | float]:
        """The reference's log-probabilities of nodes."""
        if self._constant is not None:
            return [self._constant] * len(nodes)
        return self.policy_logprobs(nodes) if self.reference is None else known[self.reference]

    def _own_tree(self, node: Node) -> RetokenisedTree | None:
        """A node's tree in the pair's own tokens; None where the policy's serve. Settled when a tree is first scored,
        by the policy that sampled the node: another may have been bound since."""
        tree = node.tree
        if tree not in self._trees:
            reader = self._readers.get(node.sampler, self._reader)
            prompt = None if reader is None else reader.prompt(tree)
            if reader is None or prompt is None:
                self._trees[tree] = None
            else:
                self.refuse_prompt()
                lms = [self.prm] if self._reference is None else [self.prm, self._reference]
                self._trees[tree] = RetokenisedTree(tree, prompt, reader.path, lms)
        return self._trees[tree]

    def release(self, tree: SearchTree) -> None:
        """Forget a tree and free its KV in every model of the pair."""
        own = self._trees.pop(tree, None)
        if own is not None:
            own.free()
        for lm in self._lms():
            lm.release(tree)


def _model_of(model: Any) -> LanguageModel | None:
    """The LanguageModel that something is or, as a policy, has."""
    lm = model if isinstance(model, LanguageModel) else getattr(model, "lm", None)
    return lm if isinstance(lm, LanguageModel) else None


def _language_model(name: str, model: Any, adapter: str | None, capacity: int | None) -> LanguageModel:
    try:
        return _model_of(model) or LanguageModel.of(model, adapter=adapter, capacity=capacity)
    except TypeError as error:
        raise TypeError(f"{name}: {error}") from error
