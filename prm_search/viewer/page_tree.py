"""PageTree: a search tree as a page shows it, in columns. Made of a SearchTree, or by hand of what a record has."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..prompt import Prompt
from ..tokens.pieces import POLICY, text_pieces
from ..tree import Node, SearchTree
from ..usage import Usage

#: Costs of a search that a page tells; see Usage.
COSTS = ("sampled_tokens", "encoded_tokens", "reencoded_tokens", "cached_tokens", "forward_calls", "seconds")
FOLDED = 5_000  # steps beyond which a page opens with all folded but the chosen path

Piece = str | int  # a token's text; its id where nobody knows the text


@dataclass
class PageStep:
    """A step.

    Attributes:
        parent: place of its parent in PageTree.steps, counted from 1; 0 is the prompt.
        text: its own.
        tokens: how many it has; None where the record does not say.
        finish: see Node.
        count: merged duplicates.
        value: what it was ranked by.
        rollout: drawn to look ahead.
        rewards, q: by scorer.
        token_rewards: by scorer, one a token.
        pieces: by scorer, the tokens that its token_rewards speak of.
    """

    parent: int
    text: str
    tokens: int | None = None
    finish: str | None = "step"
    count: int = 1
    value: float | None = None
    rollout: bool = False
    rewards: Mapping[str, float] = field(default_factory=dict)
    q: Mapping[str, float] = field(default_factory=dict)
    token_rewards: Mapping[str, Sequence[float]] = field(default_factory=dict)
    pieces: Mapping[str, Sequence[Piece]] = field(default_factory=dict)


@dataclass
class PageTree:
    """A tree.

    Attributes:
        name: what the page calls it.
        prompt: messages, as (role, text); one without a role where it is a text.
        steps: parents before their children.
        primary: the scorer that ranks.
        chosen: place of the chosen path's end in `steps`, counted from 1; None where nobody said.
        facts: (name, text) of the whole search.
        usage: cost -> model or phase -> number; see Usage.
        notes: sentences for the reader.
    """

    name: str
    prompt: Sequence[tuple[str, str]]
    steps: list[PageStep]
    primary: str = "prm"
    chosen: int | None = None
    facts: Sequence[tuple[str, str]] = ()
    usage: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    notes: Sequence[str] = ()

    @classmethod
    def of(cls, tree: SearchTree, name: str, *, chosen: Node | None = None, **about: Any) -> PageTree:
        """A SearchTree.

        Args:
            tree: the tree.
            name: what the page calls it.
            chosen: the chosen path's end.
            about: facts, usage and notes.
        """
        steps = [_step(node) for node in tree.nodes[1:]]
        notes = [*about.pop("notes", ()), *tree.notes]
        end = None if chosen is None else chosen.index
        return cls(name, prompt_of(tree.prompt), steps, tree.primary, end, notes=notes, **about)

    @property
    def scorers(self) -> list[str]:
        """Names of those that scored it, the one that ranks first."""
        names = dict.fromkeys(name for step in self.steps for name in step.rewards)
        return sorted(names, key=lambda name: name != self.primary)

    @property
    def strange(self) -> int:
        """Steps with a reward that is NaN or infinite."""
        return sum(not all(map(math.isfinite, step.rewards.values())) for step in self.steps)

    def record(self) -> dict[str, Any]:
        """Columns of plain values, as frontend/src/data.ts reads them; numbers that are not finite are texts."""
        steps, texts = self.steps, _Texts()
        return {
            "name": self.name,
            "prompt": [{"role": role, "text": text} for role, text in self.prompt],
            "primary": self.primary,
            "chosen": self.chosen,
            "facts": [list(fact) for fact in self.facts],
            "usage": {cost: dict(numbers) for cost, numbers in self.usage.items() if numbers},
            "notes": list(self.notes),
            "parent": [step.parent for step in steps],
            "text": [step.text for step in steps],
            "tokens": [step.tokens for step in steps],
            "finish": [step.finish for step in steps],
            "count": [step.count for step in steps],
            "value": [_number(step.value) for step in steps],
            "rollout": [place for place, step in enumerate(steps, start=1) if step.rollout],
            "scorers": [
                {
                    "name": name,
                    "reward": [_number(step.rewards.get(name)) for step in steps],
                    "q": [_number(step.q.get(name)) for step in steps],
                    "tokenRewards": [list(map(_number, step.token_rewards.get(name, ()))) for step in steps],
                    "pieces": [texts.places(step.pieces.get(name, ())) for step in steps],
                }
                for name in self.scorers
            ],
            "pieces": texts.distinct(),
        }


def costs_of(usage: Usage) -> dict[str, dict[str, float]]:
    """The costs of a search, as PageTree.usage has them."""
    return {cost: dict(getattr(usage, cost)) for cost in COSTS}


def prompt_of(prompt: Prompt) -> list[tuple[str, str]]:
    """A prompt as messages, each a role and a text; a plain text has the role ""."""
    if prompt.messages is not None:
        return [(str(message.get("role", "")), _content(message.get("content"))) for message in prompt.messages]
    return [("", prompt.text if prompt.text is not None else f"({len(prompt.token_ids or ())} token ids)")]


def _content(content: Any) -> str:
    if isinstance(content, list):
        return "".join(str(part.get("text", "")) for part in content if isinstance(part, Mapping))
    return "" if content is None else str(content)


def _step(node: Node) -> PageStep:
    names = list(node.rewards)
    return PageStep(
        parent=0 if node.parent is None else node.parent.index,
        text=node.text,
        tokens=len(node.token_ids),
        finish=node.finish,
        count=node.count,
        value=node.value,
        rollout=node.rollout,
        rewards={name: node.reward_of(name) for name in names},
        q={name: node.q_of(name) for name in names},
        token_rewards={name: node.rewards[name].tolist() for name in names},
        pieces={name: token_texts(node, name) for name in names},
    )


def token_texts(node: Node, name: str) -> Sequence[Piece]:
    """The tokens that a scorer's rewards of a node speak of: their texts, or their ids where nobody knows those."""
    own = node.reward_ids.get(name)
    ids = node.token_ids if own is None else own
    vocabulary = node.tree.vocabularies.get(POLICY if own is None else name)
    return ids if vocabulary is None else text_pieces(ids, vocabulary.piece)


class _Texts:
    """Distinct pieces, each told once: a page has the same tokens many times."""

    def __init__(self) -> None:
        self._places: dict[Piece, int] = {}

    def places(self, pieces: Iterable[Piece]) -> list[int]:
        return [self._places.setdefault(piece, len(self._places)) for piece in pieces]

    def distinct(self) -> list[Piece]:
        return list(self._places)


def _number(number: float | None) -> float | int | str | None:
    """A number with six digits; "NaN", "inf" and "-inf", which JSON has no words for, as texts."""
    if number is None:
        return None
    if not math.isfinite(number):
        return "NaN" if math.isnan(number) else str(number)
    short = float(f"{number:.6g}")
    return int(short) if short.is_integer() and abs(short) < 1e15 else short
