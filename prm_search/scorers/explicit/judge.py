"""Judge: any language model asked for a verdict in one word, on each step or on whole answers."""

from __future__ import annotations

import math
import weakref
from collections.abc import Mapping, Sequence
from typing import Any

from ...next_token import NextToken
from ...tree import Node, SearchTree
from .judge_formats import JUDGE_FORMATS, JudgeFormat
from .policy_scorer import AskWords, Flow, PolicyScorer

UNLED = 0.01  # probability of all verdict words together below which a note says that they were not expected


class Judge(PolicyScorer):
    """A language model as a judge: a prompt, and the probabilities of verdict words as its next token.

    The score is the expected value of the word, sum_w p(w) v(w) / sum_w p(w): with {"yes": 1, "no": 0} the probability
    of yes against no, with grades the expected grade. One token is looked at and none is drawn, so a verdict costs the
    tokens of its prompt that no earlier verdict of the tree had: on an HFPolicy what prompts begin with in common is
    encoded once, on vLLM the prefix cache has it. A token spells a word in any case and with white space around it.

    An endpoint shows its most probable tokens only; a word that is not among them counts as impossible. Where none of
    the words is shown, the score is the middle of their values and a note is made in `tree.notes`. So is one where they
    have less than 1 % of the probability together: the prompt does not lead to them then.

    Args:
        policy: what is asked: an HFPolicy, a VLLMPolicy, an endpoint's. It may be the search's own.
        format: a name of `JUDGE_FORMATS`, or a JudgeFormat.
        name: key of the scores in Node.rewards.

    Raises:
        TypeError: policy is none, or format neither a name nor a JudgeFormat.
        ValueError: the format is unknown.
    """

    kind = "judge"

    def __init__(self, policy: Any, *, format: str | JudgeFormat = "step_yes_no", name: str = "judge") -> None:
        self.format = resolve_judge_format(format)
        super().__init__(policy, name=name, per=self.format.per)
        self.default_value = self.format.aggregate
        self.reward_range = self.format.low, self.format.high
        self._scores: weakref.WeakKeyDictionary[SearchTree, dict[tuple[str, ...], float]] = weakref.WeakKeyDictionary()

    def _flow(self, nodes: Sequence[Node]) -> Flow:
        todo = self.unscored(nodes)
        keys = {node: self._key(node) for node in todo if self._judged(node)}
        fresh: dict[tuple[SearchTree, tuple[str, ...]], NextToken] = {}
        for node, key in keys.items():
            if key not in self._known(node.tree):
                prompt = self.format.prompt(self._question(node.tree), key)
                fresh.setdefault((node.tree, key), NextToken(node.tree, prompt, self.format.answer))
        if fresh:
            answers = yield AskWords(list(fresh.values()), list(self.format.words))
            scores = [self._read(tree, answer) for (tree, _), answer in zip(fresh, answers, strict=True)]
            for (tree, key), score in zip(fresh, scores, strict=True):
                self._known(tree)[key] = score
        self._reward(todo, lambda node: self._known(node.tree)[keys[node]])

    def _key(self, node: Node) -> tuple[str, ...]:
        """The texts that the verdict is on: the steps up to it, or the whole answer."""
        return (self._plain(node.path_text()),) if self.whole else self._steps(node)

    def _known(self, tree: SearchTree) -> dict[tuple[str, ...], float]:
        return self._scores.setdefault(tree, {})

    def _read(self, tree: SearchTree, logprobs: Mapping[str, float]) -> float:
        """The score of a verdict, from the log-probabilities of its words, nats."""
        shares = {word: math.exp(value) for word, value in logprobs.items()}
        total = math.fsum(shares.values())
        if math.isnan(total):
            raise ValueError(f"{self.policy.id} gives probabilities that are not numbers")
        if total < UNLED:
            note = (
                f"{self.name}: verdict words had less than {UNLED:.0%} of the probability at some places: does the "
                "prompt lead to one of them?"
            )
            if note not in tree.notes:
                tree.notes.append(note)
        if not total:
            return (self.format.low + self.format.high) / 2
        return math.fsum(share * self.format.words[word] for word, share in shares.items()) / total

    def release(self, tree: SearchTree) -> None:
        """Forget a tree, and have the policy free what it encoded for it."""
        self._scores.pop(tree, None)
        super().release(tree)


def resolve_judge_format(format: str | JudgeFormat) -> JudgeFormat:
    """Return a format, or the one of this name.

    Raises:
        ValueError: no format has this name.
        TypeError: it is neither.
    """
    if isinstance(format, JudgeFormat):
        return format
    if not isinstance(format, str):
        raise TypeError(f"format must be a name or a JudgeFormat, got {type(format).__name__}")
    if format not in JUDGE_FORMATS:
        raise ValueError(f"format={format!r} is unknown; it is one of {', '.join(sorted(JUDGE_FORMATS))}")
    return JUDGE_FORMATS[format]
