"""A pair that reads paths in its own tokens: the inexact mode, and prompts in another chat template.

A pair scores what the policy sampled token by token as long as both mean the same by token ids. Where they do not, the
pair renders the prompt itself and reads each path's text in its own tokens, from the longest prefix of tokens that
the path shares with its parent's. A step's reward is then q(text so far) minus q(the parent's text), so that step
rewards still sum to the whole text's log-ratio, while the last token of the parent may have become another one.

With one vocabulary in both, the sampled tokens are kept whatever the chat templates are, and only the prompt differs.
"""

from __future__ import annotations

from codecs import utf_8_decode
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..engine.kv_tree import Branch
from ..engine.language_model import LanguageModel
from ..engine.pending import Pending
from ..tokens import TokenizerMatch, TokenText, encode_prompt, encode_text
from ..tree import Node, Prompt, SearchTree
from .pair import log_ratio


@dataclass(eq=False)
class Path:
    """A path in the pair's tokens. Nodes below one path that read as the same tokens share it, whoever drew them.

    Attributes:
        ids: the response so far.
        shared: how many of them are those of the path above.
        branches: one a model; the path of each begins with prompt and ids. Those above where there is no new token.
        above: the path of the parent; None for the root's.
        ratios: [len(ids) - shared] float64, nats: log-ratios of the new tokens, once scored.
        sums: [len(ids) + 1] float64, nats: the log-ratio of each prefix. None until scored.
        nodes: how many it is the path of.
    """

    ids: tuple[int, ...]
    shared: int
    branches: tuple[Branch, ...]
    above: Path | None = None
    ratios: np.ndarray = field(default_factory=lambda: np.zeros(0))
    sums: np.ndarray | None = None
    nodes: int = 1

    def settle(self) -> float:
        """Sum the ratios up, those of the path above first; return by how much the whole sum grew, nats."""
        before = np.zeros(1) if self.above is None else self.above.sums
        assert before is not None  # parents are settled first
        if self.sums is None:
            self.sums = np.concatenate([before[: self.shared + 1], before[self.shared] + np.cumsum(self.ratios)])
        return float(self.sums[-1] - before[-1])


class RetokenisedTree:
    """A search tree as a pair with tokens or a prompt of its own sees it.

    Args:
        tree: the search tree.
        prompt_ids: the pair's rendering of its prompt.
        read: the pair's token ids of a node's path.
        lms: the pair's models, the trained one first.
    """

    def __init__(
        self,
        tree: SearchTree,
        prompt_ids: Sequence[int],
        read: Callable[[Node], Sequence[int]],
        lms: Sequence[LanguageModel],
    ) -> None:
        self.prompt_ids = tuple(prompt_ids)
        self.lms = tuple(lms)
        self._read = read
        roots = tuple(lm.tree.root(prompt_ids, tree.meter) for lm in lms)
        self.paths: dict[Node, Path] = {tree.root: Path((), 0, roots, sums=np.zeros(1))}
        self._known: dict[tuple[Path, tuple[int, ...]], Path] = {}  # (the path above, ids)

    def grow(self, node: Node) -> Path:
        """The path of a node whose parent has one: a known one, or one that forks, unencoded, where it leaves the
        parent's tokens."""
        above = self.paths[node.parent]  # type: ignore[index]  # the root has its path from the start
        ids = tuple(self._read(node))
        path = self._known.get((above, ids))
        if path is not None:
            path.nodes += 1
        else:
            shared = _common(above.ids, ids)
            branches = above.branches
            if len(ids) > shared:
                at = len(self.prompt_ids) + shared
                branches = tuple(lm.tree.fork(b, ids[shared:], at=at) for lm, b in zip(self.lms, branches, strict=True))
            path = self._known[above, ids] = Path(ids, shared, branches, above)
        self.paths[node] = path
        return path

    def drop(self, nodes: Iterable[Node]) -> None:
        """Forget nodes' paths, children first."""
        for node in nodes:
            path = self.paths.pop(node)
            path.nodes -= 1
            if path.nodes:
                continue
            if path.above is not None:
                del self._known[path.above, path.ids]
            if path.above is None or path.branches is not path.above.branches:
                for lm, branch in zip(self.lms, path.branches, strict=True):
                    lm.tree.release(branch)

    def free(self) -> None:
        """Forget everything."""
        self.drop(reversed(list(self.paths)))


def score_paths(
    jobs: Sequence[tuple[RetokenisedTree, Node]], constant: float | None = None
) -> list[tuple[np.ndarray, float, tuple[int, ...]]]:
    """Score nodes in the pair's own tokens, whatever their trees, in one packed forward a model.

    Args:
        jobs: nodes, each after its parent where that is not scored yet; trees of one pair.
        constant: stands in for the second model's log-probability of every token, nats.

    Raises:
        ValueError: both models hold a token impossible.

    Returns:
        for each node: the log-ratios [T] float64 of the tokens that its parent's path does not have, in nats; by how
        much the log-ratio of the whole path grew; and those T tokens.
    """
    grown: list[Path] = []
    try:
        for own, node in jobs:
            grown.append(own.grow(node))
        new: dict[Path, tuple[RetokenisedTree, Node]] = {}
        for job, path in zip(jobs, grown, strict=True):
            if path.sums is None and len(path.ids) > path.shared:
                new.setdefault(path, job)
        fresh = [(own, node, path) for path, (own, node) in new.items()]
        begun = [_begin(k, fresh) for k in range(len(jobs[0][0].lms))] if fresh else []
        tables = [pending.result() for pending in begun]
        for place, path in enumerate(new):
            theirs = tables[1][place] if constant is None else constant
            path.ratios = np.asarray(log_ratio(path.ids[path.shared :], tables[0][place], theirs), np.float64)
    except BaseException:
        for own, node in reversed(jobs[: len(grown)]):
            own.drop([node])
        raise
    return [(path.ratios, path.settle(), path.ids[path.shared :]) for path in grown]


def _begin(k: int, fresh: Sequence[tuple[RetokenisedTree, Node, Path]]) -> Pending[list[np.ndarray]]:
    """Log-probabilities of each path's new tokens under the k-th model, launched."""
    lm = fresh[0][0].lms[k]
    branches = [path.branches[k] for _, _, path in fresh]
    skip = [
        len(branch.token_ids) - (len(path.ids) - path.shared)
        for branch, (_, _, path) in zip(branches, fresh, strict=True)
    ]
    for branch, (_, node, _) in zip(branches, fresh, strict=True):
        above = branch.parent
        node.tree.meter.add("cached", lm.id, branch.start if above is not None and above.encoded else 0)
    return lm.begin_score(branches, skip)


def _common(first: Sequence[int], second: Sequence[int]) -> int:
    """Length of the longest common prefix."""
    limit = min(len(first), len(second))
    return next((i for i in range(limit) if first[i] != second[i]), limit)


class PathReader:
    """Reads prompts and paths of a policy as a pair's tokens.

    Args:
        tokenizer: the pair's.
        eos: the pair's end of sequence; None for none.
        policy: whose nodes they are.
        fit: what the two tokenizers have in common.
        name: the pair's, for messages.
    """

    def __init__(self, tokenizer: Any, eos: int | None, policy: Any, fit: TokenizerMatch, name: str = "prm") -> None:
        self.tokenizer = tokenizer
        self._name = name
        self.eos = eos
        self.fit = fit
        self._own = TokenText(tokenizer)
        self._text = TokenText(policy.tokenizer)
        stops = getattr(policy, "stop_ids", None)
        self._stops = frozenset([policy.tokenizer.eos_token_id] if stops is None else stops)

    def prompt(self, tree: SearchTree) -> tuple[int, ...] | None:
        """The pair's token ids of a tree's prompt; None where the policy's serve, and its sampled tokens too.

        Raises:
            ValueError: the prompt is given as the policy's token ids only, which mean nothing to the pair; or as chat
                messages, which the pair has no template for.
        """
        prompt = tree.prompt
        if prompt.text is None and prompt.messages is None:
            if self.fit.tokens:
                return None
            raise ValueError(
                "the pair's tokenizer is not the policy's, and the prompt is given only as the policy's token ids: "
                "give it as Prompt(text=...) or Prompt(messages=...), a string or chat messages, so that the pair can "
                "tokenise it (in generate: PRMGuidance(prompts=...))"
            )
        if self.fit.tokens and prompt.messages is not None and getattr(self.tokenizer, "chat_template", "") is None:
            return None
        unread = Prompt(text=prompt.text, messages=prompt.messages)
        own = encode_prompt(self.tokenizer, unread, f"the tokenizer of pair {self._name!r}, not the policy's,")
        return None if self.fit.tokens and own == prompt.token_ids else own

    def path(self, node: Node) -> Sequence[int]:
        """The pair's token ids of a path: the sampled ones where the vocabulary is the same, else its text's.

        Special tokens are no text. A sampled end of sequence becomes the pair's; bytes of a character that is not
        complete yet wait for the next node.
        """
        sampled = node.path_ids()
        if self.fit.tokens:
            return sampled
        written = self._text.text_bytes(sampled)
        own = self._text.text_bytes(node.token_ids)
        if node.finish == "stop" and node.text_bytes and own.startswith(node.text_bytes):
            written = written[: len(written) - len(own) + len(node.text_bytes)]  # nothing behind a stop string
        ids = encode_text(self.tokenizer, utf_8_decode(written, "replace", False)[0], self._own)
        if node.finish == "stop" and sampled[-1] in self._stops and self.eos is not None:
            ids.append(self.eos)
        return ids
