"""Node and SearchTree: the plain records of one search. No torch, no model.

A node is one step. The root is the prompt and holds no tokens of its own; a path is root to node. Token ids
are the truth and text is a rendering of them, so what was sampled is what is scored.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from ..prompt import Prompt, plain_ids
from ..rng import stream
from ..tokens.pieces import POLICY, Pieces, Vocabulary
from ..usage import Meter
from .checks import FINISHES, check_tree
from .step import Step


class Node(Step):
    """One step of a search tree.

    Attributes:
        parent, children: the tree; the root's parent is None.
        token_ids: the step's tokens, in the policy's vocabulary; empty for the root.
        text: their decoding, without special tokens; U+FFFD where a character begins in an earlier step or ends in a
            later one (`path_text` shows it whole).
        text_bytes: the bytes they add to the text, which may begin or end inside a character. Nothing behind the stop
            string that ended the response is of them.
        hidden: bytes at the path's end that are not shown: of the stop string that ended it, unless that is kept.
        logprobs: [T] fp32, nats: raw (before temperature and every processor) log-probabilities of the tokens
            under the policy that sampled them; None for nodes built by hand.
        confidences: [T] fp32, nats: each token's confidence, minus the mean log-probability of the k most probable
            tokens at its place (DeepConf, arXiv 2508.15260, section 2), raw as in logprobs; high where the policy is
            sure. k is Sampling.confidence_tokens; with k = 1, exp(-confidence) is the most probable token's
            probability, as exp(logprob) is the drawn one's. None where they were not asked for.
        sampler: id of the model that sampled the tokens; a scorer whose model has this id reads logprobs.
        rewards: pair name -> [T] fp32 token rewards, in beta * nats (see set_rewards).
        reward_ids: pair name -> the tokens that its rewards speak of, for a pair with another tokenizer only.
        value: the number a strategy ranks the node by; None until scored.
        finish: "step" (a StepRule ended it), "stop" (end of sequence or a stop condition), "length" (the
            response or the context is full), "budget" (the search's budget ended it), "weak" (it was ended while it
            was drawn, because the policy was not sure enough: DeepConf), None for the root.
        depth: steps from the root.
        lineages: the random streams that reached this node, one per merged duplicate.
        drawn: children already drawn from each lineage; the next draw goes on from there.
        rollout: drawn to look ahead and not (yet) taken into the search.
        index: place in `tree.nodes`.
        weight: what the node's draws together weigh in a weighted vote, where the strategy says so (ParticleFilter,
            SelfConsistency); None leaves it to the values.
    """

    __slots__ = ("__weakref__", "children", "depth", "end", "index", "parent", "start", "tree")

    def __init__(self, tree: SearchTree, parent: Node | None, token_ids: Sequence[int]) -> None:
        super().__init__(token_ids)
        self.tree = tree
        self.parent = parent
        self.children: list[Node] = []
        self.depth: int = 0 if parent is None else parent.depth + 1
        self.start: int = 0 if parent is None else parent.end  # response tokens before this node
        self.end: int = self.start + len(self.token_ids)  # ... and up to its end
        self.index = -1

    def set_rewards(
        self,
        name: str,
        token_rewards: np.ndarray,
        reward: float | None = None,
        token_ids: Sequence[int] | None = None,
    ) -> None:
        """Record a pair's token rewards of this step; the parent must have been scored by it before.

        Args:
            name: the pair's name.
            token_rewards: [T] fp32, beta * nats. T differs from len(token_ids) only for a pair with another
                tokenizer, which reports its own tokens.
            reward: the step's reward where it is not the sum of token_rewards (that same case).
            token_ids: that pair's own tokens, one a reward.

        Raises:
            ValueError: the parent has no rewards of this pair yet.
        """
        parent_q = 0.0
        if self.parent is not None and self.parent.parent is not None:
            if name not in self.parent._q:
                raise ValueError(f"score a node's parent before the node: {name!r} has not scored the parent")
            parent_q = self.parent._q[name]
        rewards = np.asarray(token_rewards, dtype=np.float32)
        self.rewards[name] = rewards
        if token_ids is not None:
            self.reward_ids[name] = tuple(token_ids)
        self._reward[name] = float(rewards.sum(dtype=np.float64)) if reward is None else float(reward)
        self._q[name] = parent_q + self._reward[name]

    def reward_of(self, name: str) -> float:
        """Step reward under the named pair, beta * nats. Raises KeyError where the pair has not scored the node."""
        return 0.0 if self.parent is None else self._reward[name]

    def q_of(self, name: str) -> float:
        """Sum of token rewards from the first response token to this node's end, under the named pair."""
        return 0.0 if self.parent is None else self._q[name]

    def scored_by(self, name: str) -> bool:
        """Return True if the named pair has scored this node (the root needs no scoring)."""
        return self.parent is None or name in self._q

    @property
    def token_rewards(self) -> np.ndarray:
        """[T] fp32 token rewards of the primary pair, beta * nats."""
        if self.parent is None:
            return np.zeros(0, np.float32)
        return self.rewards[self.tree.primary]

    @property
    def reward(self) -> float:
        """Step reward of the primary pair: q here minus q at the parent."""
        return self.reward_of(self.tree.primary)

    @property
    def q(self) -> float:
        """Value of the prefix that ends here under the primary pair (arXiv 2412.01981, eq. 2)."""
        return self.q_of(self.tree.primary)

    def path(self) -> list[Node]:
        """The nodes from below the root to this one, in order; empty for the root."""
        nodes: list[Node] = []
        node: Node = self
        while node.parent is not None:
            nodes.append(node)
            node = node.parent
        nodes.reverse()
        return nodes

    def path_ids(self) -> list[int]:
        """Response token ids from the root to this node's end."""
        return [i for node in self.path() for i in node.token_ids]

    def path_text(self) -> str:
        """Response text from the root to this node's end: the decoding of the steps' joined bytes."""
        whole = b"".join([node.text_bytes for node in self.path()])
        return whole[: max(len(whole) - self.hidden, 0)].decode("utf-8", "replace")

    def __reduce__(self) -> tuple[Any, ...]:
        return _node_at, (self.tree, self.index)

    def __repr__(self) -> str:
        value = "" if self.value is None else f" value={self.value:.4g}"
        return f"<Node {self.index} depth={self.depth} tokens={len(self.token_ids)} finish={self.finish}{value}>"


class SearchTree:
    """A prompt and the steps tried after it.

    Args:
        prompt: see Prompt.
        occurrence: how many equal prompts came before in the same call, so that equal prompts draw differently.

    Attributes:
        root, nodes: the root and every node in order of creation (nodes[0] is the root).
        primary: the pair that Node.reward, .q and .token_rewards speak of.
        meter: token counts by model, read out as Result.usage.
        seed: of the search, for strategies that draw numbers of their own.
        answer: finds the final answer in a text, for strategies that vote while they draw; None takes whole texts.
        notes: what a reader of the result should know, in sentences; scorers add to it.
        log_z: estimate of log sum_y policy(y) exp(value(y) / temperature), nats, where a strategy makes one.
        vocabularies: the bytes of token ids, for who shows tokens: the policy's by the name "", which a policy's draws
            bring, and those of pairs with another tokenizer by theirs.
    """

    def __init__(self, prompt: Prompt | str, *, occurrence: int = 0) -> None:
        self.prompt = Prompt.of(prompt)
        self.occurrence = occurrence
        self.primary = "prm"
        self.meter = Meter()
        self.seed = 0
        self.answer: Callable[[str], str | None] | None = None
        self.log_z: float | None = None
        self.notes: list[str] = []
        self.vocabularies: dict[str, Vocabulary] = {}
        self.nodes: list[Node] = []
        self._stream: int | None = None
        self.root = self._append(Node(self, None, ()))

    @property
    def prompt_ids(self) -> tuple[int, ...]:
        """The prompt's token ids. Raises ValueError before a policy or a pair has tokenised it."""
        if self.prompt.token_ids is None:
            raise ValueError("the prompt has no token ids yet: a policy encodes it, or build Prompt(token_ids=...)")
        return self.prompt.token_ids

    @property
    def stream(self) -> int:
        """64-bit id of this prompt's random stream, from its token ids and occurrence alone."""
        if self._stream is None:
            self._stream = stream(self.prompt_ids, self.occurrence)
        return self._stream

    def _append(self, node: Node) -> Node:
        node.index = len(self.nodes)
        self.nodes.append(node)
        if node.parent is not None:
            node.parent.children.append(node)
        return node

    def add(
        self,
        parent: Node,
        token_ids: Sequence[int],
        *,
        text: str | bytes = "",
        logprobs: np.ndarray | None = None,
        sampler: Hashable | None = None,
        finish: str = "step",
        lineage: int = 0,
        rollout: bool = False,
    ) -> Node:
        """Append a step below parent.

        Args:
            parent: a node of this tree that is not finished.
            token_ids: [T >= 1] the step's tokens.
            text: what they add to the text; bytes where that may begin or end inside a character.
            logprobs, sampler, finish, rollout: see Node.
            lineage: the random stream that drew the step.

        Raises:
            ValueError: parent is of another tree or finished, token_ids is empty, logprobs has another length,
                or finish is unknown.
            TypeError: a token id is not an integer.
        """
        if parent.tree is not self:
            raise ValueError("parent belongs to another tree")
        if parent.finished:
            raise ValueError(f"parent is finished ({parent.finish!r}); nothing can follow it")
        if len(token_ids) == 0:
            raise ValueError("a node needs at least one token")
        if finish not in FINISHES:
            raise ValueError(f"finish={finish!r} is unknown; it is one of {FINISHES}")
        if logprobs is not None and len(logprobs) != len(token_ids):
            raise ValueError(f"logprobs has {len(logprobs)} entries for {len(token_ids)} tokens")
        ids = plain_ids(token_ids)
        node = Node(self, parent, ids)
        node.text = text
        node.sampler, node.finish, node.rollout = sampler, finish, rollout
        node.logprobs = None if logprobs is None else np.asarray(logprobs, np.float32)
        node.lineages = (lineage,)
        return self._append(node)

    def discard(self, node: Node) -> None:
        """Take a node without children out again, one of the newest; the nodes after it move up.

        Raises:
            ValueError: it is the root, has children, or is no node of this tree.
        """
        if node.parent is None or node.children or self.nodes[node.index] is not node:
            raise ValueError(f"{node!r} cannot be discarded: a node of this tree without children is needed")
        for later in self.nodes[node.index + 1 :]:
            later.index -= 1
        del self.nodes[node.index]
        node.parent.children.remove(node)

    def __iter__(self) -> Iterator[Node]:
        return iter(self.nodes)

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickles and copies hold one flat record a node: a long path is as deep as a short one."""
        states = [_links(node) | node.copied() for node in self.nodes]
        return _replanted, (self.prompt, self.occurrence, self.primary, self.meter, states, self.pieces())

    def pieces(self) -> dict[str, Pieces]:
        """The bytes of the tree's own token ids, by vocabulary."""
        ids = {name: self._ids_of(name) for name in self.vocabularies}
        return {name: Pieces.of(self.vocabularies[name], ids[name]) for name in ids}

    def _ids_of(self, name: str) -> set[int]:
        """Every token id in one of its vocabularies."""
        if name == POLICY:
            return {token_id for node in self.nodes for token_id in node.token_ids}
        return {token_id for node in self.nodes for token_id in node.reward_ids.get(name, ())}

    def to_json(self, indent: int | None = None) -> str:
        """The whole tree as JSON: prompt, and for each node its tokens, text, rewards, value and finish."""
        prompt = self.prompt
        record = {
            "version": 1,
            "prompt": {
                "text": prompt.text,
                "messages": None if prompt.messages is None else [dict(m) for m in prompt.messages],
                "token_ids": None if prompt.token_ids is None else list(prompt.token_ids),
            },
            "occurrence": self.occurrence,
            "primary": self.primary,
            "log_z": self.log_z,
            "notes": self.notes,
            "pieces": {name: pieces.record() for name, pieces in self.pieces().items()},
            "nodes": [_links(node) | node.record() for node in self.nodes],
        }
        return json.dumps(record, ensure_ascii=False, indent=indent)

    @classmethod
    def from_json(cls, source: str) -> SearchTree:
        """The tree that to_json wrote.

        Raises:
            ValueError: the text is not one. The message names the field, and the node's index: "nodes[3].drawn".
        """
        try:
            if not isinstance(source, str):
                raise TypeError(f"a text is needed, got {type(source).__name__}")
            record = json.loads(source)
            check_tree(record)
            tree = cls(_read_prompt(record["prompt"]), occurrence=record["occurrence"])
            tree.primary = record["primary"]
            tree.notes = list(record.get("notes", ()))
            tree.log_z = record.get("log_z")  # trees of older versions have none, and no weights or pieces
            tree.vocabularies |= {name: Pieces.read(pieces) for name, pieces in record.get("pieces", {}).items()}
            for index, item in enumerate(record["nodes"]):
                if index:
                    tree._append(Node(tree, tree.nodes[item["parent"]], item["token_ids"]))
                tree.nodes[index].restore(item, f"nodes[{index}]")
        except (TypeError, ValueError, RecursionError) as error:
            raise ValueError(f"source is not a search tree in JSON: {error}") from error
        return tree


def _links(node: Node) -> dict[str, int | None]:
    """A node's place, from which the links of a copy are drawn anew."""
    return {"parent": None if node.parent is None else node.parent.index}


def _replanted(
    prompt: Prompt,
    occurrence: int,
    primary: str,
    meter: Meter,
    states: list[dict[str, Any]],
    vocabularies: Mapping[str, Vocabulary],
) -> SearchTree:
    """The tree of these states."""
    tree = SearchTree(prompt, occurrence=occurrence)
    tree.primary, tree.meter = primary, meter
    tree.vocabularies |= vocabularies
    for state in states:
        parent = state.pop("parent")
        node = tree.root if parent is None else tree._append(Node(tree, tree.nodes[parent], state["token_ids"]))
        for name, value in state.items():
            setattr(node, name, value)
    return tree


def _node_at(tree: SearchTree, index: int) -> Node:
    return tree.nodes[index]


def _read_prompt(fields: Mapping[str, Any]) -> Prompt:
    try:
        return Prompt(**{name: value for name, value in fields.items() if value is not None})
    except (TypeError, ValueError) as error:
        raise ValueError(f"prompt is {fields!r:.80}: {error}") from error
