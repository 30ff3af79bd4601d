"""OutcomeRM: a reward model that judges whole answers, as sequence classifiers on a causal LM's body are published."""

from __future__ import annotations

import weakref
from collections.abc import Hashable, Iterable, Mapping, Sequence
from os import PathLike
from typing import Any

import numpy as np
import torch

from ...engine.adapters import AUTO
from ...engine.language_model import LanguageModel
from ...models.checkpoint import Checkpoint
from ...models.heads import read_tensors, tensor_files
from ...models.loading import hub_options, load
from ...tree import Node, Prompt, SearchTree
from ..base import BATCH_TOKENS, ScorerBase
from .layouts import Spelling, chat_ids, keeps_answers, needs_template
from .paths import KVPath, PathTree, read_ends
from .questions import question_of
from .readings import Squash, TensorHead
from .step_scores import StepScores, score_texts

HEAD = "score"


class OutcomeRM(ScorerBase):
    """A reward model of whole answers: the row of the last token of question and answer, in the model's chat template.

    For best-of-n and votes. Only finished answers have a reward, the model's number, on their last step; steps before
    it have 0, so a strategy that ranks unfinished prefixes learns nothing from it. The question has to be given as text
    or chat messages.

    Args:
        model: a causal LM of transformers whose body is the reward model's, in eval mode; or a LanguageModel.
        tokenizer: its tokenizer, with a chat template.
        tensors: the head's weights, "score.weight" and perhaps "score.bias" (`from_pretrained` finds them): one output
            is the reward as it is, of two the second one's probability.
        name: key of the rewards in Node.rewards.
        adapter: which weights of a model with adapters; see ImplicitPRM.
        capacity: tokens of KV to hold; None: as LanguageModel.

    Raises:
        TypeError: model is not a causal LM.
        ValueError: the head or the chat template is missing, or does not fit.
    """

    kind = "outcome model"
    whole = True

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        tensors: Mapping[str, torch.Tensor],
        name: str = "rm",
        adapter: str | None = AUTO,
        capacity: int | None = None,
    ) -> None:
        super().__init__(name, tokenizer)
        self.rm = LanguageModel.of(model, adapter=adapter, capacity=capacity)
        needs_template(self.need_tokenizer())
        keeps_answers(tokenizer)
        weight = tensors.get(f"{HEAD}.weight")
        if weight is None or weight.ndim != 2 or weight.shape[0] not in (1, 2):
            shape = "nothing" if weight is None else list(weight.shape)
            raise ValueError(f"{HEAD}.weight is {shape}: an outcome model has a head of one output, or of two classes")
        self.reward_range = (0.0, 1.0) if weight.shape[0] == 2 else None
        squash: Squash = "second" if weight.shape[0] == 2 else "none"
        self._read = TensorHead((HEAD,), squash).reader(self.rm.head, tensors, tokenizer, self.rm.config.hidden_size)
        self._spelling = Spelling(tokenizer)
        self._trees: weakref.WeakKeyDictionary[SearchTree, PathTree] = weakref.WeakKeyDictionary()

    @classmethod
    def from_pretrained(
        cls, model: str | PathLike[str], *, name: str = "rm", capacity: int | None = None, **options: Any
    ) -> OutcomeRM:
        """Load an outcome model by hub id or path, its body by transformers' own classes; no remote code runs.

        Args:
            model: hub id or folder.
            name, capacity: see OutcomeRM.
            options: for loading; see StepPRM.from_pretrained.

        Raises:
            OSError: there is no such model.
            ValueError: it has no head of one or two outputs.
        """
        source = Checkpoint.of(model, options.get("revision"))
        files = tensor_files(source, hub_options(options))
        names = [tensor for tensor in files if tensor.startswith(f"{HEAD}.")]
        loaded = load(source, capacity=capacity, heads=(f"{HEAD}.",), **options)
        return cls(loaded.lm, loaded.tokenizer, tensors=read_tensors(files, names), name=name)

    @property
    def models(self) -> Mapping[str, Hashable]:
        """See Scorer."""
        return {"rm": self.rm.id}

    @property
    def forward_calls(self) -> int:
        """Forwards run so far by its model, whoever asked for them."""
        return self.rm.forwards

    @property
    def context(self) -> int | None:
        """Tokens of question and answer together, in its own tokens."""
        limits = (self.rm.context, self.rm.tree.capacity)
        return min((limit for limit in limits if limit is not None), default=None)

    @property
    def vocab(self) -> int | None:
        """See ScorerBase."""
        return self.rm.head.vocab

    def check_prompt(self, prompt: Prompt) -> None:
        """Raise ValueError where a prompt is given only as token ids, or leaves no room for an answer."""
        question = question_of(self.name, prompt, self._spelling.plain)
        tokens = len(chat_ids(self.tokenizer, [*question, {"role": "assistant", "content": "a"}]))
        if self.context is not None and tokens > self.context:
            raise ValueError(f"the prompt has {tokens} tokens with an answer, and {self.name!r} reads {self.context}")

    def score_nodes(self, nodes: Sequence[Node]) -> None:
        """Score nodes and their unscored ancestors; see Scorer.score_nodes. One packed forward.

        Raises:
            ValueError: a prompt is given only as token ids, or an answer is too long.
        """
        todo = self.unscored(nodes)
        fresh: dict[KVPath, Node] = {}
        ends = [node for node in todo if node.finished]
        try:
            for node in ends:
                paths = self._tree(node.tree)
                path = paths.grow(node, paths.whole(node), after=node.tree.root)
                if path.score is None:
                    fresh.setdefault(path, node)
            if fresh:
                rows = read_ends(self.rm, [(node, path) for path, node in fresh.items()])
                with torch.no_grad():
                    scores = self._read(rows).double().cpu().numpy()
                if np.isnan(scores).any():
                    raise ValueError(f"{self.rm.id} gives rewards that are not numbers")
                for path, score in zip(fresh, scores, strict=True):
                    path.score = float(score)
        except BaseException:
            for node in ends:
                self._tree(node.tree).drop([node])
            raise
        for node in todo:
            self.set_step_reward(node, self._tree(node.tree).of(node).score or 0.0 if node.finished else 0.0)

    def _tree(self, tree: SearchTree) -> PathTree:
        """The paths of a search tree; made on first use."""
        paths = self._trees.get(tree)
        if paths is None:
            plain = self._spelling.plain
            question = question_of(self.name, tree.prompt, plain)
            paths = self._trees[tree] = PathTree(
                tree,
                self.rm,
                lambda texts: chat_ids(
                    self.tokenizer, [*question, {"role": "assistant", "content": plain("".join(texts))}]
                ),
                keeps_end=False,
            )
        return paths

    def score(  # type: ignore[override]  # a number an answer, and text: ids would mean nothing to it
        self, prompts: Iterable[Any], responses: Iterable[Any], *, batch_tokens: int = BATCH_TOKENS
    ) -> list[StepScores]:
        """Rewards of complete responses, as strings.

        Args:
            prompts: B prompts: strings, lists of chat messages, or Prompts with either.
            responses: B strings.
            batch_tokens: tokens handled at once, about; bounds the memory, changes no result.

        Returns:
            B StepScores, whose `reward` is the model's. Nothing is kept: all KV is freed.

        Raises:
            ValueError, TypeError: as ScorerBase.score, of text.
        """
        return score_texts(self, prompts, responses, steps=None, batch_tokens=batch_tokens, whole=True)

    def release(self, tree: SearchTree) -> None:
        """Forget a tree and free its KV."""
        paths = self._trees.pop(tree, None)
        if paths is not None:
            paths.free()
