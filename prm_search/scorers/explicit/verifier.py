"""GenerativeVerifier: a language model that writes a critique first, and is then asked for a verdict in one word."""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ...checks import count, integer
from ...next_token import NextToken
from ...prompt import Prompt
from ...sampling import Sampling
from ...tree import Node, SearchTree
from .policy_scorer import AskWords, DrawAnswers, Drawn, Flow, PolicyScorer
from .verifier_formats import VERIFIER_FORMATS, VerifierFormat

Key = tuple[str, ...]  # texts of the steps that are judged


@dataclass(frozen=True)
class Critique:
    """One sample of a verifier.

    Attributes:
        text: what it wrote, up to the verdict.
        score: the verdict's expected value; the middle of the values where the policy shows none of the words.
        verdict: the word that was more probable.
    """

    text: str
    score: float
    verdict: str


@dataclass(frozen=True, eq=False)
class _Round:
    """A question to the verifier: the samples of one key that are asked the same, in a tree of their own."""

    key: tuple[SearchTree, Key]
    samples: list[int]
    start: Node


class GenerativeVerifier(PolicyScorer):
    """A generative verifier: `samples` critiques of a step or an answer, each followed by the question for its verdict.

    The score is the mean over critiques of sum_w p(w) v(w) / sum_w p(w): of yes and no the mean P(yes). "think_prm" is
    ThinkPRM's form (arXiv 2504.16828), one critique of the whole answer, and "think_prm_steps" of each prefix.
    "gen_prm" is GenPRM's (arXiv 2504.00891) without code: a conversation of a turn a step, each sample with its own
    earlier critiques. Nothing that a model writes is ever executed.

    Where these differ from the published code: a verdict word counts in any case. GenPRM's verdict is read at its place
    and not drawn; the more probable one stands in the conversation.

    A critique's tokens are drawn by the policy and not encoded again for the verdict; samples of one question share its
    KV. They count on the tree of the search, "sampled" too.

    Args:
        policy: draws critiques and tells words: an HFPolicy, a VLLMPolicy, an endpoint's.
        format: a name of `VERIFIER_FORMATS`, or a VerifierFormat.
        samples: critiques of each step or answer.
        seed: of the draws.
        name: key of the scores in Node.rewards.

    Raises:
        TypeError: policy is none, or format neither a name nor a VerifierFormat.
        ValueError: the format is unknown, a number is out of range, or the policy takes no stop strings.
    """

    kind = "verifier"
    one_piece = False  # a verifier reads an answer step by step

    def __init__(
        self,
        policy: Any,
        *,
        format: str | VerifierFormat = "think_prm",
        samples: int = 4,
        seed: int = 0,
        name: str = "verifier",
    ) -> None:
        self.format = resolve_verifier_format(format)
        super().__init__(policy, name=name, per=self.format.per)
        count("samples", samples)
        integer("seed", seed, -(1 << 63), "a 64-bit integer", (1 << 64) - 1)
        if self.format.stop and not self.policy.takes_stop:
            raise ValueError(f"policy: format={self.format.name!r} ends critiques by stop strings, and it takes none")
        self.samples, self.seed = samples, seed
        self.default_value = self.format.aggregate
        values = self.format.words.values()
        self.reward_range = min(values), max(values)
        self._critiques: weakref.WeakKeyDictionary[SearchTree, dict[Key, tuple[Critique, ...]]] = (
            weakref.WeakKeyDictionary()
        )

    def critiques(self, node: Node) -> tuple[Critique, ...]:
        """Return the critiques that a node's score was made of; they are kept as long as the tree is.

        Raises:
            ValueError: the node got none of its own.
        """
        critiques = self._critiques.get(node.tree, {}).get(self._key(node))
        if critiques is None:
            raise ValueError(f"{node!r} has no critiques by {self.name!r}")
        return critiques

    def _flow(self, nodes: Sequence[Node]) -> Flow:
        todo = self.unscored(nodes)
        wanted: dict[tuple[SearchTree, Key], None] = {}
        for node in todo:
            if self._judged(node):
                wanted.update(dict.fromkeys(self._needed(node)))
        while wanted:
            ready = [key for key in wanted if self._has_earlier(key)]
            yield from self._ask(ready)
            for key in ready:
                del wanted[key]

        def score(node: Node) -> float:
            critiques = self._critiques[node.tree][self._key(node)]
            return math.fsum(critique.score for critique in critiques) / len(critiques)

        self._reward(todo, score)

    def _key(self, node: Node) -> Key:
        return self._steps(node) or ("",)

    def _needed(self, node: Node) -> Iterator[tuple[SearchTree, Key]]:
        """Return what has to be judged for a node: itself, and for a conversation each step before."""
        known, key = self._critiques.setdefault(node.tree, {}), self._key(node)
        for length in range(len(key) if self.format.later is None else 1, len(key) + 1):
            if key[:length] not in known:
                yield node.tree, key[:length]

    def _has_earlier(self, wanted: tuple[SearchTree, Key]) -> bool:
        """Return True if the turns before are there."""
        tree, key = wanted
        return self.format.later is None or len(key) == 1 or key[:-1] in self._critiques[tree]

    def _ask(self, keys: Sequence[tuple[SearchTree, Key]]) -> Flow:
        """Draw and judge critiques of these, all together."""
        rounds: list[_Round] = []
        try:
            for key in keys:
                rounds += self._rounds(key)
            drawings = [Drawn(one.start, len(one.samples), self._sampling(one)) for one in rounds]
            drawn = yield DrawAnswers(drawings)
            ends = [end for answers in drawn for end in answers]
            asks = {end: NextToken(end.tree, end.tree.prompt, self.format.closing, end) for end in ends}
            told = yield AskWords(list(asks.values()), list(self.format.words))
            critiques = {
                end: self._critique(ask, logprobs)
                for (end, ask), logprobs in zip(asks.items(), told, strict=True)
            }  # fmt: skip
            samples: dict[tuple[SearchTree, Key], dict[int, Critique]] = {}
            for one, answers in zip(rounds, drawn, strict=True):
                own = samples.setdefault(one.key, {})
                own.update(zip(one.samples, (critiques[end] for end in answers), strict=True))
            for (tree, steps), own in samples.items():
                self._critiques[tree][steps] = tuple(own[place] for place in range(self.samples))
        finally:
            for one in rounds:
                self.policy.release(one.start.tree)

    def _rounds(self, key: tuple[SearchTree, Key]) -> list[_Round]:
        """Trees for the samples of a key: those that are asked the same are drawn below one node."""
        tree, steps = key
        question = self._question(tree)
        groups: dict[str, tuple[Prompt, list[int]]] = {}
        for sample in range(self.samples):
            prompt = self.format.prompt(question, steps, self._earlier(tree, steps, sample))
            groups.setdefault(repr(prompt.messages), (prompt, []))[1].append(sample)
        rounds = []
        for prompt, samples in groups.values():
            own = SearchTree(prompt.with_ids(self.policy.encode(prompt)))
            own.meter = tree.meter
            opening = self.format.begin(len(steps))
            ids = self._encode(opening)
            start = own.add(own.root, ids, text=opening) if ids else own.root
            rounds.append(_Round(key, samples, start))
        return rounds

    def _earlier(self, tree: SearchTree, steps: Key, sample: int) -> list[str]:
        """A sample's own answers about the steps before the last, whole."""
        if self.format.later is None:
            return []
        known = self._critiques[tree]
        before = [known[steps[:length]][sample] for length in range(1, len(steps))]
        return [f"{one.text}{one.verdict}{self.format.behind}" for one in before]

    def _sampling(self, one: _Round) -> Sampling:
        """Return how the critiques of a round are drawn: as the format says, within the policy's context."""
        begun = len(one.start.token_ids)
        tokens, context = begun + self.format.max_new_tokens, self.policy.context
        if context is not None:
            tokens = min(tokens, context - len(one.start.tree.prompt_ids) - len(self._encode(self.format.closing)) - 2)
        if tokens <= begun:
            asked = len(one.start.tree.prompt_ids)
            raise ValueError(
                f"{self.name!r}: a question of {asked} tokens leaves no room for a critique in the policy's context of "
                f"{context}"
            )
        return self.format.sampling(len(one.key[1]), self.seed, tokens)

    def _critique(self, ask: NextToken, logprobs: Mapping[str, float]) -> Critique:
        words = self.format.words
        shares = {word: math.exp(value) for word, value in logprobs.items()}
        total = math.fsum(shares.values())
        if math.isnan(total):
            raise ValueError(f"{self.policy.id} gives probabilities that are not numbers")
        middle = (min(words.values()) + max(words.values())) / 2
        score = math.fsum(share * words[word] for word, share in shares.items()) / total if total else middle
        verdict = max(shares, key=lambda word: shares[word]) if total else min(words, key=lambda w: words[w])
        return Critique(ask.text, score, verdict)


def resolve_verifier_format(format: str | VerifierFormat) -> VerifierFormat:
    """Return a format, or the one of this name.

    Raises:
        ValueError: no format has this name.
        TypeError: it is neither.
    """
    if isinstance(format, VerifierFormat):
        return format
    if not isinstance(format, str):
        raise TypeError(f"format must be a name or a VerifierFormat, got {type(format).__name__}")
    if format not in VERIFIER_FORMATS:
        raise ValueError(f"format={format!r} is unknown; it is one of {', '.join(sorted(VERIFIER_FORMATS))}")
    return VERIFIER_FORMATS[format]
