"""The confidence of a whole response, from that of its tokens (DeepConf, arXiv 2508.15260, section 2). No torch."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal, get_args

import numpy as np

from .checks import is_one_of
from .steps import confidence_quantile
from .tree import Node, SearchTree

Measure = Literal["group", "bottom", "tail", "mean"]
MEASURES: tuple[str, ...] = get_args(Measure)
LOWEST = 0.1  # share of the groups that "bottom" is the mean of
TOP_TOKENS = 20  # most probable tokens that a token's confidence is the mean over, in DeepConf's released code
WINDOW = 2048  # tokens of a group


def group_confidences(confidences: np.ndarray, window: int) -> np.ndarray:
    """Means over every run of `window` tokens; one mean over all of them where there are fewer.

    Args:
        confidences: [T >= 1] of the tokens, nats.
        window: tokens of a group, >= 1.

    Returns:
        [max(1, T - window + 1)] fp64, nats.
    """
    sums = np.concatenate([[0.0], np.cumsum(confidences, dtype=np.float64)])
    window = min(window, len(confidences))
    means: np.ndarray = (sums[window:] - sums[:-window]) / window
    return means


def path_confidences(node: Node) -> np.ndarray:
    """The confidences of a response's tokens up to a node's end, [T] fp32, nats.

    Raises:
        ValueError: the policy recorded none for a part of it.
    """
    parts = [part.confidences for part in node.path()]
    if not parts or any(part is None for part in parts):
        raise ValueError(f"{node!r} has no confidences: search with confidence_tokens= and a policy that records them")
    return np.concatenate([part for part in parts if part is not None])


def trace_confidence(node: Node, measure: Measure = "tail", window: int = WINDOW) -> float:
    """The policy's confidence in a response, nats; higher is surer.

    "group": the least mean of a group of `window` tokens (the paper's lowest group confidence).
    "bottom": the mean of the lowest tenth of those groups, at least one.
    "tail": the mean of the last `window` tokens.
    "mean": the mean of all tokens.

    Args:
        node: the response's end.
        measure: see above.
        window: tokens of a group, or of the tail.

    Raises:
        ValueError: the policy recorded no confidences, or no measure has this name.
    """
    if measure not in MEASURES:
        raise ValueError(f"measure={measure!r}: it is one of {', '.join(MEASURES)}")
    confidences = path_confidences(node)
    if measure == "tail":
        return float(confidences[-window:].mean(dtype=np.float64))
    if measure == "mean":
        return float(confidences.mean(dtype=np.float64))
    groups = np.sort(group_confidences(confidences, window))
    return float(groups[0] if measure == "group" else groups[: max(1, int(LOWEST * len(groups)))].mean())


def confidence_threshold(
    trees: Iterable[SearchTree], confidence_of: Literal["top", "drawn"] = "drawn", quantile: float = 0.02
) -> float:
    """The threshold for StepRule(confidence=) or Steer(below=) that a share of a policy's tokens lies below.

        results = ps.search(prompts, policy=policy, strategy=ps.BestOfN(8), confidence_tokens=1)
        below = confidence_threshold([result.tree for result in results], "drawn")

    AdaptiveStep (arXiv 2502.13943, section 3) samples responses, takes the probability of every drawn token, and cuts
    at the lowest 2 %.

    Args:
        trees: of responses that the policy sampled, each token of which counts as often as it was drawn.
        confidence_of: "drawn", of which nodes always have the probability; or "top", for trees that were searched with
            confidence_tokens=1.
        quantile: the share, in [0, 1).

    Returns:
        A probability before temperature and filters.

    Raises:
        ValueError: there is no token, a node lacks its numbers, or an argument is out of range.
    """
    if not is_one_of(confidence_of, ("top", "drawn")):
        raise ValueError(f"confidence_of={confidence_of!r}: it is 'top' or 'drawn'")
    name = "logprobs" if confidence_of == "drawn" else "confidences"
    probabilities: list[np.ndarray] = []
    for node in (node for tree in trees for node in tree.nodes[1:]):
        values = getattr(node, name)
        if values is None:
            raise ValueError(f"{node!r} has no {name}: for 'top', search with confidence_tokens=1")
        logprobs = np.asarray(values, np.float64) * (1 if confidence_of == "drawn" else -1)
        probabilities += [np.minimum(np.exp(logprobs), 1.0)] * node.count
    if not probabilities:
        raise ValueError("trees has no sampled token to find a threshold from")
    return confidence_quantile(np.concatenate(probabilities), quantile)
