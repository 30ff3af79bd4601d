"""Sampling and Request: what a policy is asked to draw."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from .checks import flag, integer, number
from .rng import child_lineage
from .steps import StepRule
from .stop_strings import stop_strings
from .tree import Node


@dataclass(frozen=True)
class Sampling:
    """Settings by which a policy draws tokens. Filters apply in HF's order: temperature, top-k, top-p, min-p.

    Args:
        steps: where a step ends.
        temperature: > 0 divides the logits; 0 takes the most probable token.
        top_p: in (0, 1]; 1 keeps all.
        top_k: 0 keeps all.
        min_p: in [0, 1]; 0 keeps all.
        max_new_tokens: response tokens of a path, all steps together.
        seed: 64-bit seed of every draw.
        stop: strings that end a response (one may be given alone). The token that completes the first of them is the
            response's last, with finish "stop", whatever step it is in.
        include_stop_str: keep the stop string in the text. Text of the last token behind the stop string is dropped in
            any case.
        confidence_tokens: record each token's confidence (Node.confidences) over so many of the most probable tokens;
            0 records none and costs nothing.

    Raises:
        ValueError: a number is out of range or not finite, or a stop string is empty.
        TypeError: an argument is of another kind.
    """

    steps: StepRule
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    max_new_tokens: int = 1024
    seed: int = 0
    stop: tuple[str, ...] = ()
    include_stop_str: bool = False
    confidence_tokens: int = 0

    def __post_init__(self) -> None:
        if not isinstance(self.steps, StepRule):
            raise TypeError(f"steps must be a StepRule, got {type(self.steps).__name__}")
        if isinstance(self.seed, bool) or not isinstance(self.seed, int):
            raise TypeError(f"seed must be an int, got {type(self.seed).__name__}")
        object.__setattr__(self, "stop", stop_strings(self.stop))
        flag("include_stop_str", self.include_stop_str)
        number("temperature", self.temperature, "a finite number >= 0", lambda value: 0 <= value < float("inf"))
        number("top_p", self.top_p, "a number in (0, 1]", lambda value: 0 < value <= 1)
        number("min_p", self.min_p, "a number in [0, 1]", lambda value: 0 <= value <= 1)
        integer("top_k", self.top_k, 0, "an integer >= 0 (0 keeps all)")
        integer("max_new_tokens", self.max_new_tokens, 1, "an integer >= 1")
        integer("confidence_tokens", self.confidence_tokens, 0, "an integer >= 0 (0 records none)")


@dataclass(frozen=True)
class Doubt:
    """Ends children before tokens of which the policy is unsure: as a StepRule's confidence, but before their first
    token too. A child that ends so is none.

    Args:
        below: probability in [0, 1].
        confidence_of: "top" or "drawn"; see StepRule.
    """

    below: float
    confidence_of: Literal["top", "drawn"] = "top"


@dataclass(frozen=True)
class Floor:
    """Ends a child while it is drawn: where the policy's confidence, over a group of tokens, falls below a bar.

    Args:
        window: tokens of a group: the last ones of the path. No shorter group ends a child.
        bar: the least mean of their confidences (Node.confidences), nats.
    """

    window: int
    bar: float


@dataclass(eq=False)
class Request:
    """Children to draw for one node.

    Attributes:
        node: an unfinished node.
        sampling: how to draw.
        lineages: the random stream of each child; their number is the number of children.
        caps: tokens each child may add at most, all >= 1.
        cap_reasons: the finish ("length" or "budget") of a child that its cap cuts.
        until: "step" or "end" (see strategies.Expand).
        rollout: mark the children.
        merge: count identical children on one node.
        ranked: draw nothing: child i is the i-th most probable token, counted from 0, as a step of its own. Needs
            until="step".
        doubting: its children may end before their first token, where the StepRule's confidence says so: there are
            fewer nodes then. Needs until="step".
        policy: which policy of a PolicyPool draws; None for the first.
        strict: a token budget holds: all tokens drawn for a child, those of no node too, stay within its cap.
        wasted: tokens drawn for it that are in none of its nodes; the policy counts them up, and the budget pays them.
        floor: ends children of low confidence, with finish "weak"; None ends none.
    """

    node: Node
    sampling: Sampling
    lineages: tuple[int, ...]
    caps: tuple[int, ...]
    cap_reasons: tuple[str, ...]
    until: Literal["step", "end"] = "step"
    rollout: bool = False
    merge: bool = True
    ranked: bool = False
    floor: Floor | None = None
    doubting: bool = False
    policy: str | None = None
    strict: bool = False
    wasted: int = 0

    @classmethod
    def draw(
        cls,
        node: Node,
        n: int | Sequence[int],
        sampling: Sampling,
        *,
        until: Literal["step", "end"] = "step",
        caps: Sequence[int] | None = None,
        cap_reason: str = "length",
        rollout: bool = False,
        merge: bool = True,
        ranked: bool = False,
        floor: Floor | None = None,
        doubting: bool = False,
    ) -> Request:
        """The next children of a node, lineage by lineage; advances node.drawn.

        Args:
            n: children of each lineage, or one number a lineage (lineages beyond the last number get none).
            caps: one a child; None for what sampling.max_new_tokens leaves.
            cap_reason: the finish of a child that its cap cuts before sampling.max_new_tokens does.
        """
        counts = [n] * node.count if isinstance(n, int) else list(n)
        if len(counts) > node.count:
            raise ValueError(f"n has {len(counts)} numbers for {node.count} lineages")
        lineages = tuple(
            child_lineage(lineage, node.end, node.drawn + i)
            for lineage, count in zip(node.lineages, counts, strict=False)
            for i in range(count)
        )
        room = sampling.max_new_tokens - node.end
        limits = [room] * len(lineages) if caps is None else list(caps)
        if len(limits) != len(lineages):
            raise ValueError(f"caps has {len(limits)} numbers for {len(lineages)} children")
        if any(min(cap, room) < 1 for cap in limits):
            raise ValueError(
                f"no room for children: caps {limits} after {node.end} of {sampling.max_new_tokens} tokens"
            )
        node.drawn += max(counts, default=0)
        reasons = tuple("length" if cap >= room else cap_reason for cap in limits)
        within = tuple(min(cap, room) for cap in limits)
        return cls(node, sampling, lineages, within, reasons, until, rollout, merge, ranked, floor, doubting)
