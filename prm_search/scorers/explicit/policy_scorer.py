"""PolicyScorer: the base of scorers that put questions to a policy and read words or texts out of its answers."""

from __future__ import annotations

import asyncio
from abc import abstractmethod
from collections.abc import Callable, Generator, Hashable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from os import PathLike
from typing import Any, Literal, Self

from ...checks import HoldsModels
from ...next_token import NextToken
from ...policies.hf import HFPolicy
from ...policy import AsyncPolicy, AsyncPolicyBase, PolicyBase
from ...prompt import Prompt
from ...sampling import Request, Sampling
from ...tokens import encode_text
from ...tree import Node, SearchTree
from .layouts import Messages, Spelling
from .paths import step_texts
from .questions import question_of
from .text_scorer import TextScorer

Per = Literal["step", "answer"]


@dataclass(frozen=True, eq=False)
class AskWords:
    """Work for a policy: the log-probabilities of words at some places; see PolicyBase.next_token_logprobs."""

    asks: Sequence[NextToken]
    words: Sequence[str]


@dataclass(frozen=True, eq=False)
class Drawn:
    """Answers to draw below a node: so many, to their ends."""

    node: Node
    count: int
    sampling: Sampling


@dataclass(frozen=True, eq=False)
class DrawAnswers:
    """Work for a policy: answers below nodes whose trees have the policy's token ids; see PolicyBase.expand."""

    wanted: Sequence[Drawn]


Work = AskWords | DrawAnswers
Flow = Generator[Work, Any, None]  # is sent list[dict[str, float]] for AskWords, list[list[Node]] for DrawAnswers


class PolicyScorer(HoldsModels, TextScorer):
    """A scorer that asks a policy.

    Args:
        policy: a policy of any kind. An asynchronous one works in `asearch` and `ascore_nodes`.
        name: key of the rewards in Node.rewards.
        per: "step" to reward each step, "answer" to reward finished answers on their last step and 0 elsewhere.

    Attributes:
        policy, per: as given.

    Raises:
        TypeError: policy is none.
        ValueError: per is neither.
    """

    def __init__(self, policy: Any, *, name: str, per: Per) -> None:
        self.policy: PolicyBase | AsyncPolicyBase = (
            AsyncPolicyBase.of(policy)
            if isinstance(policy, AsyncPolicy) and not hasattr(policy, "submit")
            else PolicyBase.of(policy)
        )
        super().__init__(name, Utf8Tokenizer() if self.policy.tokenizer is None else self.policy.tokenizer)
        if per not in ("step", "answer"):
            raise ValueError(f"per={per!r}: it is 'step' or 'answer'")
        self.per: Per = per
        self.whole = per == "answer"
        self._plain = Spelling(self.tokenizer).plain  # no text spells a control token of the policy's

    @classmethod
    def from_pretrained(
        cls, model: str | PathLike[str], *, options: Mapping[str, Any] | None = None, **own: Any
    ) -> Self:
        """Make one on a causal LM by hub id or path.

        Args:
            model: see HFPolicy.from_pretrained.
            options: of HFPolicy.from_pretrained: dtype, device_map, capacity, tokenizer, ...
            own: the arguments of this class.

        Raises:
            OSError, ValueError, ImportError: as HFPolicy.from_pretrained, or as this class.
        """
        return cls(HFPolicy.from_pretrained(model, **dict(options or {})), **own)

    @property
    def models(self) -> Mapping[str, Hashable]:
        """See Scorer."""
        return {"judge": self.policy.id}

    @property
    def forward_calls(self) -> int | None:
        """Forwards run so far by the policy, whoever asked for them; None where it does not count."""
        return self.policy.forward_calls

    @property
    def context(self) -> int | None:
        """Tokens of question and verdict together, in the policy's tokens."""
        return self.policy.context

    def check_prompt(self, prompt: Prompt) -> None:
        """Raise ValueError for a prompt of token ids alone: its text is needed."""
        question_of(self.name, prompt, self._plain)

    # --- scoring -----------------------------------------------------------------------------------------------------

    @abstractmethod
    def _flow(self, nodes: Sequence[Node]) -> Flow:
        """Yield work for the policy, be sent its results, and set the rewards of unscored nodes, parents first."""

    def score_nodes(self, nodes: Sequence[Node]) -> None:
        """Score nodes and their unscored ancestors; see Scorer.score_nodes.

        Raises:
            TypeError: the policy is an asynchronous one, or tells no log-probabilities.
            ValueError: a prompt is given only as token ids, or a question does not fit the policy's context.
        """
        policy = self.policy
        if isinstance(policy, AsyncPolicyBase):
            raise TypeError(
                f"{self.kind} {self.name!r} asks an asynchronous policy: use asearch, or await ascore_nodes(nodes)"
            )
        results: Any = None
        with closing(self._flow(nodes)) as flow:
            while True:
                try:
                    work = flow.send(results)
                except StopIteration:
                    return
                results = (
                    policy.next_token_logprobs(work.asks, work.words)
                    if isinstance(work, AskWords)
                    else policy.draw(_requests(work))
                )

    async def ascore_nodes(self, nodes: Sequence[Node]) -> None:
        """score_nodes beside the running event loop: on it, or for a blocking policy in a thread."""
        policy = self.policy
        if not isinstance(policy, AsyncPolicyBase):
            await asyncio.to_thread(self.score_nodes, nodes)
            return
        results: Any = None
        with closing(self._flow(nodes)) as flow:
            while True:
                try:
                    work = flow.send(results)
                except StopIteration:
                    return
                if isinstance(work, AskWords):
                    results = await policy.next_token_logprobs(work.asks, work.words)
                else:
                    results = await asyncio.gather(*map(policy.run, _requests(work)))

    def release(self, tree: SearchTree) -> None:
        """Forget a tree, and have the policy free what it encoded for it."""
        self.policy.release(tree)

    # --- texts -------------------------------------------------------------------------------------------------------

    def _question(self, tree: SearchTree) -> Messages:
        """The question of a tree, as chat messages."""
        return question_of(self.name, tree.prompt, self._plain)

    def _steps(self, node: Node) -> tuple[str, ...]:
        """The texts of a node's path, white space around each dropped, empty ones left out."""
        return tuple(self._plain(text) for part in step_texts(node) if (text := part.strip()))

    def _encode(self, text: str) -> list[int]:
        """Token ids of a text as an answer goes on with it; of a policy without a tokenizer, its bytes."""
        return encode_text(self.tokenizer, text, self.token_text)

    def _judged(self, node: Node) -> bool:
        """Return True if a node gets a number of its own: an answer that is finished, or a step that adds text."""
        if self.per == "answer":
            return node.finished
        return node.parent is not None and self._steps(node) != self._steps(node.parent)

    def _reward(self, todo: Sequence[Node], scores: Callable[[Node], float]) -> None:
        """Set the rewards of nodes, parents first: their own score, or else their parent's (of answers: 0)."""
        for node in todo:
            above = 0.0 if self.per == "answer" or node.parent is None else node.parent.reward_of(self.name)
            self.set_step_reward(node, scores(node) if self._judged(node) else above)


def _requests(work: DrawAnswers) -> list[Request]:
    return [Request.draw(one.node, one.count, one.sampling, until="end") for one in work.wanted]


class Utf8Tokenizer:
    """Bytes as tokens, for cutting texts into steps where a policy has no tokenizer; no model knows its ids."""

    all_special_ids: tuple[int, ...] = ()
    all_special_tokens: tuple[str, ...] = ()
    eos_token_id = None

    def convert_ids_to_tokens(self, token_id: int) -> bytes:
        """Return the byte."""
        return bytes([token_id])

    def __call__(self, text: str, **options: Any) -> dict[str, list[int]]:
        """Return the bytes of a text as ids."""
        return {"input_ids": list(text.encode())}


def chat_prompt(system: str | None, user: str) -> Prompt:
    """Return a system turn, if there is one, and a user's turn as a Prompt."""
    before = [] if system is None else [{"role": "system", "content": system}]
    return Prompt(messages=(*before, {"role": "user", "content": user}))
