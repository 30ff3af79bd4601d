"""ScorerBase: the common part of all scorers that read tokens and score complete responses.

A scorer that rewards steps and not tokens (a step PRM, an outcome model, a judge, an ensemble) derives from ScorerBase:
it writes score_nodes, sets each node's number with set_step_reward, and has score() with its checks and batches.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, ClassVar

import numpy as np

from .. import checks
from ..protocols import ScorerDefaults
from ..steps import StepRule
from ..tokens import TokenText, encode_prompt
from ..tokens.pieces import text_pieces
from ..tree import Node, Prompt, SearchTree
from .responses import Response, Steps, batches, read_responses
from .scores import Scores

BATCH_TOKENS = 1 << 15


class ScorerBase(ScorerDefaults):
    """A scorer with a tokenizer.

    Args:
        name: key of its rewards in Node.rewards.
        tokenizer: of its models; None where it will be a policy's.
        eos_token_id: the end of a response given as text; None: the tokenizer's.

    Raises:
        TypeError, ValueError: name is not a non-empty string, tokenizer is none, or eos_token_id no token id.
    """

    kind: ClassVar[str] = "scorer"  # what messages call it
    rewards_tokens: ClassVar[bool] = False  # every token has a reward of its own: score() gives Scores, else StepScores

    def __init__(self, name: str, tokenizer: Any = None, eos_token_id: int | None = None) -> None:
        checks.non_empty("name", name)
        if tokenizer is not None:
            checks.tokenizer("tokenizer", tokenizer)
        if eos_token_id is not None:
            checks.integer("eos_token_id", eos_token_id, 0, "a token id >= 0, or None,")
        self.name = name
        self.tokenizer = tokenizer
        self._eos = eos_token_id
        self._token_text: TokenText | None = None

    # --- what it is ------------------------------------------------------------------------------------------------

    @property
    def context(self) -> int | None:
        """Tokens that prompt and response may have together, or None for no limit."""
        return None

    @property
    def vocab(self) -> int | None:
        """Tokens that its models know, or None where nobody can tell."""
        return None

    @property
    def eos_token_id(self) -> int | None:
        """Return what ends a response given as text."""
        return self._eos if self._eos is not None else getattr(self.tokenizer, "eos_token_id", None)

    def need_tokenizer(self) -> Any:
        """The tokenizer. Raises ValueError where there is none."""
        if self.tokenizer is None:
            raise ValueError(f"this {self.kind} has no tokenizer: pass {type(self).__name__}(..., tokenizer=...)")
        return self.tokenizer

    @property
    def token_text(self) -> TokenText:
        """Bytes of its tokens. Raises ValueError where it has no tokenizer."""
        if self._token_text is None:
            self._token_text = TokenText(self.need_tokenizer())
        return self._token_text

    def score_options(self, steps: StepRule | None, append_eos: bool) -> dict[str, Any]:
        """Return those of these arguments that its `score` takes.

        Args:
            steps: cuts responses; nothing does where whole answers are judged.
            append_eos: of scorers of tokens.
        """
        own: dict[str, Any] = {} if self.whole else {"steps": steps}
        return own | ({"append_eos": append_eos} if self.rewards_tokens else {})

    def notes_of(self, node: Node) -> tuple[str, ...]:
        """Return what a reader of a scored path should know, in sentences; nothing here."""
        return ()

    def encode_prompt(self, prompt: Prompt) -> tuple[int, ...]:
        """Token ids of a prompt, those it has or the scorer's own; see tokens.encode_prompt."""
        if prompt.token_ids is not None:
            return prompt.token_ids
        return encode_prompt(self.need_tokenizer(), prompt, f"the tokenizer of {self.kind} {self.name!r}")

    # --- scoring -----------------------------------------------------------------------------------------------------

    def unscored(self, nodes: Sequence[Node]) -> list[Node]:
        """The nodes and ancestors of theirs that it has not scored, each once, parents first."""
        if isinstance(nodes, Node):
            raise TypeError("nodes must be a list of Nodes, got one Node: wrap it in a list")
        todo: dict[Node, None] = {}
        for place, node in enumerate(nodes):
            if not isinstance(node, Node):
                raise TypeError(f"nodes[{place}] must be a Node of a SearchTree, got {type(node).__name__}")
            for part in node.path():
                if not part.scored_by(self.name):
                    todo.setdefault(part)
        return list(todo)

    def set_step_reward(self, node: Node, reward: float) -> None:
        """Record one number as a step's reward; among the tokens it stands with the last."""
        token_rewards = np.zeros(len(node.token_ids), np.float32)
        token_rewards[-1] = reward
        node.set_rewards(self.name, token_rewards, reward)

    def score_exact(self, nodes: Sequence[Node]) -> None:
        """Score nodes whose tokens and prompt are the scorer's own, whatever policy it is bound to."""
        self.score_nodes(nodes)

    def score(
        self,
        prompts: Iterable[Any],
        responses: Iterable[Any],
        *,
        steps: Steps = None,
        append_eos: bool | Sequence[bool] = True,
        batch_tokens: int = BATCH_TOKENS,
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
            append_eos: True to end a response given as text with the end of sequence; one, or one a response.
            batch_tokens: tokens handled at once; bounds the memory, changes no result.

        Returns:
            B Scores, in order. Nothing is kept: all KV is freed.

        Raises:
            ValueError: lengths disagree, something is empty, too long for the context or outside the vocabulary, or
                there is no tokenizer; which entry is said.
            TypeError: an entry is of the wrong kind; also a single string instead of a list.
        """
        return self._score_read(
            read_responses(self, prompts, responses, steps=steps, append_eos=append_eos), batch_tokens
        )

    def _score_read(self, responses: Sequence[Response], batch_tokens: int) -> list[Scores]:
        left: dict[tuple[int, ...], int] = {}  # responses of each prompt that are still to be scored
        for response in responses:
            left[response.prompt_ids] = left.get(response.prompt_ids, 0) + 1
        trees: dict[tuple[int, ...], SearchTree] = {}  # equal prompts are one tree: their KV is shared
        rewards: dict[int, np.ndarray] = {}
        try:
            for batch in batches(responses, batch_tokens):
                chains: dict[int, list[Node]] = {}
                for place in batch:
                    prompt = responses[place].prompt_ids
                    if prompt not in trees:
                        trees[prompt] = SearchTree(Prompt(token_ids=prompt))
                    chains[place] = self._plant(trees[prompt], responses[place])
                self.score_exact([node for nodes in chains.values() for node in nodes])
                for place, nodes in chains.items():
                    rewards[place] = np.concatenate([node.rewards[self.name] for node in nodes])
                    prompt = responses[place].prompt_ids
                    left[prompt] -= 1
                    if not left[prompt]:
                        self.release(trees.pop(prompt))
        finally:
            for tree in trees.values():
                self.release(tree)
        piece = self.token_text.piece
        return [
            Scores(r.token_ids, rewards[place], np.asarray(r.ends), text_pieces(r.token_ids, piece))
            for place, r in enumerate(responses)
        ]

    def _plant(self, tree: SearchTree, response: Response) -> list[Node]:
        """Nodes of a response: one a step, first to last."""
        nodes = [tree.root]
        for start, end in zip((0, *response.ends), response.ends, strict=False):
            ids = response.token_ids[start:end]
            nodes.append(tree.add(nodes[-1], ids, text=self.token_text.text_bytes(ids)))
        return nodes[1:]
