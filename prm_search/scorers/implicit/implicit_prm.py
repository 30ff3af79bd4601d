"""ImplicitPRM: two causal LMs whose log-ratio is a reward for every token.

The reward of token t is `beta * (log pi_phi(y_t | x, y_<t) - log pi_ref(y_t | x, y_<t))`; its sum q_t is the value of
the prefix (arXiv 2412.01981, Proposition 3.1 and eq. 2-3).
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Hashable, Iterable, Mapping, Sequence
from os import PathLike
from typing import Any

import numpy as np

from ...engine.adapters import AUTO
from ...engine.language_model import LanguageModel
from ...engine.node_logprobs import logprobs_under
from ...policies.hf import encode_prompt
from ...steps import StepRule
from ...tokens import TokenText
from ...tree import Node, SearchTree
from ..retokenise import PathReader, RetokenisedTree, TokenizerMatch, score_paths
from .reference_free import ConstantReference
from .scores import Scores

__all__ = ["ConstantReference", "ImplicitPRM", "Scores"]


class ImplicitPRM:
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
        beta: float = 0.05,
        name: str = "prm",
        adapter: str | None = AUTO,
        capacity: int | None = None,
        eos_token_id: int | None = None,
    ) -> None:
        if isinstance(beta, bool) or not isinstance(beta, int | float | np.number) or not (0 < beta < float("inf")):
            raise ValueError(f"beta={beta!r}: a finite number > 0 is needed")
        if not isinstance(name, str) or not name:
            raise ValueError(f"name={name!r}: a non-empty string is needed")
        if isinstance(model, str | PathLike):
            raise TypeError(
                f"model={model!r}: a model is needed; ImplicitPRM.from_pretrained loads one by name or path"
            )
        self.beta = float(beta)
        self.name = name
        self.tokenizer = tokenizer if tokenizer is not None else getattr(model, "tokenizer", None)
        self.prm = _language_model(model, adapter, capacity)
        self._eos = eos_token_id
        self._constant: float | None = None
        self._reference: LanguageModel | None = None
        self._policy: Any = None
        self._reader: PathReader | None = None  # None: the policy's tokens serve
        self._readers: dict[Hashable, PathReader | None] = {}  # by the id of each policy met so far
        self._trees: weakref.WeakKeyDictionary[SearchTree, RetokenisedTree | None] = weakref.WeakKeyDictionary()
        self._token_text: TokenText | None = None
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
            self._reference = _language_model(reference, bare, capacity)
            self._warn_if_same(self._reference)

    @classmethod
    def from_pretrained(cls, model: str | PathLike[str], reference: Any = None, **options: Any) -> ImplicitPRM:
        """Load a pair by hub id or path; see pair_card.load_pair, which takes the same arguments."""
        from .card import load_pair

        return load_pair(model, reference, pair=cls, **options)

    # --- what it is ------------------------------------------------------------------------------------------------

    @property
    def models(self) -> Mapping[str, Hashable]:
        """Ids of its models by role; no "reference" where a constant stands in for it."""
        ids: dict[str, Hashable] = {"prm": self.prm.id}
        if self._constant is None:
            ids["reference"] = self.reference_id
        return ids

    @property
    def reference(self) -> LanguageModel | None:
        """The reference LanguageModel; None for a constant, or for a policy that has no model here."""
        if self._constant is not None:
            return None
        return self._reference or _model_of(self._policy)

    @property
    def reference_id(self) -> Hashable:
        """Id of the reference: a node sampled by the model with this id carries its half of the reward. None where
        a constant stands in for it."""
        if self._constant is not None:
            return None
        return self._reference.id if self._reference is not None else getattr(self._policy, "id", "policy")

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
    def eos_token_id(self) -> int | None:
        """What ends a response given as text, and what a policy's end of sequence becomes in the inexact mode."""
        return self._eos if self._eos is not None else getattr(self.tokenizer, "eos_token_id", None)

    @property
    def vocab(self) -> int:
        """Tokens that all of its models know, embeddings' padding included."""
        return min(lm.head.vocab for lm in self._lms())

    def need_tokenizer(self) -> Any:
        """The tokenizer. Raises ValueError where there is none."""
        if self.tokenizer is None:
            raise ValueError("this pair has no tokenizer: pass ImplicitPRM(..., tokenizer=...)")
        return self.tokenizer

    @property
    def token_text(self) -> TokenText:
        """Bytes of its tokens. Raises ValueError where it has no tokenizer."""
        if self._token_text is None:
            self._token_text = TokenText(self.need_tokenizer())
        return self._token_text

    def _lms(self) -> list[LanguageModel]:
        """The distinct models it runs."""
        found = (self.prm, self.reference)
        return list(dict.fromkeys(lm for lm in found if lm is not None))

    # --- with a policy -----------------------------------------------------------------------------------------------

    def bind(self, policy: Any) -> None:
        """Meet the policy whose nodes are to be scored; `search` does it. One policy at a time.

        Raises:
            ValueError: the reference is the policy, and it has another vocabulary than the pair.
        """
        other = getattr(policy, "tokenizer", None)
        if self.tokenizer is None:
            self.tokenizer = other
        fit = TokenizerMatch(True, True) if other is None else self._fit(policy, other)
        if not fit.tokens and self._follows_policy:
            raise ValueError("reference='policy': the policy has another vocabulary than the pair's model")
        if self._follows_policy and _model_of(policy) is not None and policy is not self._policy:
            self._warn_if_same(_model_of(policy))
        if policy is not self._policy:
            self._reader = None if fit.prompts else PathReader(self.tokenizer, self.eos_token_id, policy, fit)
            self._readers[getattr(policy, "id", None)] = self._reader
        self._policy = policy

    def _fit(self, policy: Any, tokenizer: Any) -> TokenizerMatch:
        if policy is self._policy:
            return TokenizerMatch(True, True) if self._reader is None else self._reader.fit
        return TokenizerMatch.of(self.tokenizer, tokenizer)

    @property
    def _follows_policy(self) -> bool:
        return self._reference is None and self._constant is None

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
        todo: dict[Node, None] = {}
        for node in nodes:
            for part in node.path():
                if not part.scored_by(self.name):
                    todo.setdefault(part)
        own = [(mine, node) for node in todo if (mine := self._own_tree(node)) is not None]
        if own:
            for (_, node), (ratios, grown, ids) in zip(own, score_paths(own, self._constant), strict=True):
                node.set_rewards(self.name, self.beta * ratios, self.beta * grown, ids)
        self.score_exact([node for node in todo if self._own_tree(node) is None])

    def score_exact(self, nodes: Sequence[Node]) -> None:
        """Score unscored nodes by the very tokens and prompt they carry, each after its parent."""
        if not nodes:
            return
        for node in nodes:
            prompt = node.tree.prompt
            if prompt.token_ids is None:
                node.tree.prompt = prompt.with_ids(encode_prompt(self.need_tokenizer(), prompt))
        self._refuse_strangers(nodes)
        known = logprobs_under(self._lms(), nodes)
        for node, mine, theirs in zip(nodes, known[self.prm], self._reference_logprobs(nodes, known), strict=True):
            with np.errstate(invalid="ignore"):
                ratio = mine - theirs
            if np.isnan(ratio).any():
                token = node.token_ids[int(np.isnan(ratio).argmax())]
                raise ValueError(f"token {token} has no reward: its log-probability is -inf under model and reference")
            node.set_rewards(self.name, self.beta * ratio)

    def _own_tree(self, node: Node) -> RetokenisedTree | None:
        """A node's tree in the pair's own tokens; None where the policy's serve. Settled when a tree is first scored,
        by the policy that sampled the node: another may have been bound since."""
        tree = node.tree
        if tree not in self._trees:
            reader = self._readers.get(node.sampler, self._reader)
            prompt = None if reader is None else reader.prompt(tree)
            if reader is None or prompt is None:
                self._trees[tree] = None
            elif self._follows_policy:
                raise ValueError(
                    "reference='policy': the pair's chat template renders this prompt in another way than the policy's "
                    "(tokenizer=policy.tokenizer says that the pair takes the policy's prompts as they are)"
                )
            else:
                lms = [self.prm] if self._reference is None else [self.prm, self._reference]
                self._trees[tree] = RetokenisedTree(tree, prompt, reader.path, lms)
        return self._trees[tree]

    def _refuse_strangers(self, nodes: Sequence[Node]) -> None:
        """Raise where the reference is the policy, and a node was sampled by another."""
        samplers = {node.sampler for node in nodes} - {None, self.reference_id}
        if samplers and self._constant is None and self._follows_policy and self._policy is not None:
            raise ValueError(f"reference='policy': the policy is {self.reference_id!r}, nodes come from {samplers}")

    def _reference_logprobs(
        self, nodes: Sequence[Node], known: Mapping[LanguageModel, list[np.ndarray]]
    ) -> Sequence[np.ndarray | float]:
        if self._constant is not None:
            return [self._constant] * len(nodes)
        if self.reference is not None:
            return known[self.reference]
        own = [node.logprobs for node in nodes if node.logprobs is not None]
        if len(own) < len(nodes):
            raise ValueError(
                "reference='policy': the policy has no model here that could score nodes, and a node carries no "
                "log-probabilities of its own (they are Node.logprobs, or logprobs= of score)"
            )
        return own

    def score(
        self,
        prompts: Iterable[Any],
        responses: Iterable[Any],
        *,
        steps: StepRule | Sequence[Sequence[int]] | None = None,
        append_eos: bool | Sequence[bool] = True,
        logprobs: Sequence[Any] | None = None,
        batch_tokens: int = 1 << 15,
    ) -> list[Scores]:
        """Rewards of complete responses.

        A sampled end of sequence is part of a response: a search scores it, and training does. So it has to be here: a
        response given as token ids is scored as it is, one given as text gets the tokenizer's end of sequence
        (`eos_token_id`) unless it has it already. Switch that off for responses that were cut.

        Args:
            prompts: B prompts: strings, lists of chat messages, token ids, or Prompts. Equal ones share their KV.
            responses: B responses: strings or token ids (lists, arrays, tensors).
            steps: where steps end; None for StepRule(), as in search. Or for each response its rising token counts up
                to each step's end, the last of which is all of them.
            append_eos: whether a response given as text ends with the end of sequence; one, or one a response.
            logprobs: [T] log-probabilities of each response's tokens under the reference where they are known (nats,
                before temperature), for instance from sampling: the reference is then not run.
            batch_tokens: tokens handled at once; bounds the memory, changes no result.

        Returns:
            B Scores, in order. Nothing is kept: all KV is freed.

        Raises:
            ValueError: lengths disagree, something is empty, too long for the context or outside the vocabulary, or
                there is no tokenizer; which entry is said.
            TypeError: an entry is of the wrong kind; also a single string instead of a list.
        """
        from ..scoring import score_responses

        return score_responses(
            self, prompts, responses, steps=steps, append_eos=append_eos, logprobs=logprobs, batch_tokens=batch_tokens
        )

    def release(self, tree: SearchTree) -> None:
        """Forget a tree and free its KV in every model of the pair."""
        own = self._trees.pop(tree, None)
        if own is not None:
            own.free()
        for lm in self._lms():
            lm.release(tree)


def _model_of(given: Any) -> LanguageModel | None:
    """The LanguageModel that something is or, as a policy, has."""
    lm = given if isinstance(given, LanguageModel) else getattr(given, "lm", None)
    return lm if isinstance(lm, LanguageModel) else None


def _language_model(given: Any, adapter: str | None, capacity: int | None) -> LanguageModel:
    return _model_of(given) or LanguageModel.of(given, adapter=adapter, capacity=capacity)
