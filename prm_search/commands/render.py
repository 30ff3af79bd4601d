"""Output for terminals: search trees with their rewards, and plain lines."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from rich.console import Console
from rich.text import Text
from rich.tree import Tree

from ..tree import Node, Prompt, SearchTree

WIDTH = 120  # of what is not a terminal


def console(*, stderr: bool = False) -> Console:
    """A console that never fails on a character its encoding lacks, and never reads text as markup."""
    stream = sys.stderr if stderr else sys.stdout
    reconfigure = getattr(stream, "reconfigure", None)
    if reconfigure is not None:
        reconfigure(errors="replace")
    width = None if stream.isatty() else WIDTH
    return Console(stderr=stderr, highlight=False, markup=False, emoji=False, width=width)


def waiting(screen: Console, what: str) -> AbstractContextManager[object]:
    """Says what is being waited for, on a terminal."""
    return screen.status(what) if screen.is_terminal else nullcontext()


def savings(counts: Mapping[str, int]) -> str:
    """A sentence on what scoring trees once saved.

    Args:
        counts: tokens that the reward model encoded ("encoded"), would have encoded by reading prompt and response anew
            for every step ("reencoding_every_step"), and with the prompt kept ("reencoding_with_cached_prompt"); those
            that the reference encoded beside it ("reference").
    """
    encoded, again = counts["encoded"], counts["reencoding_every_step"]
    cached, reference = counts["reencoding_with_cached_prompt"], counts["reference"]
    if not encoded:
        return "The reward model encoded no tokens."
    own = f"{reference:,} tokens" if reference else "no tokens: it is the policy, run once for both"
    return (
        f"The reward model encoded {encoded:,} tokens, the reference {own}. Reading prompt and response anew for every "
        f"step, the reward model would encode {again:,} ({again / encoded:.1f} times as many; with the prompt cached "
        f"{cached:,}, {cached / encoded:.1f} times)."
    )


def visible(text: str, *, lines: bool = False) -> str:
    """Text without control characters (a model may write any): each is spelt out. `lines` keeps line feeds and tabs."""
    keep = "\n\t" if lines else ""
    return "".join(c if c.isprintable() or c in keep else ascii(c)[1:-1] for c in text)


def reward_colour(reward: float, scale: float) -> tuple[int, int, int]:
    """Red for rewards below 0, green above, grey at 0; full at `scale`."""
    if not scale > 0 or reward != reward:
        return (150, 150, 150)
    strength = min(1.0, abs(reward) / scale) ** 0.6  # small rewards stay visible
    target = (40, 180, 75) if reward > 0 else (225, 60, 50)
    red, green, blue = (round(150 + strength * (t - 150)) for t in target)
    return red, green, blue


def centred(scores: Sequence[float], reward_range: Sequence[float] | None) -> list[float]:
    """Scores as rewards for colours: their distances from the middle of their range, from 0 where it has no bounds."""
    middle = 0.0 if reward_range is None else sum(reward_range) / 2
    return [score - middle for score in scores]


def style(reward: float, scale: float) -> str:
    """Return that colour as a style of rich."""
    return "rgb({},{},{})".format(*reward_colour(reward, scale))


def scored(nodes: Sequence[Node]) -> list[Node]:
    """Return those of the nodes that the tree's own pair has scored."""
    return [node for node in nodes if node.parent is not None and node.scored_by(node.tree.primary)]


def tree_view(
    tree: SearchTree,
    chosen: Node | None,
    *,
    note: Callable[[Node], Text | None] | None = None,
    scores: tuple[float, float] | None = None,
) -> Tree:
    """A search tree: each step with its reward in colour, q, how often it was drawn; the chosen path in bold.

    Args:
        tree: the tree.
        chosen: end of the path to mark.
        note: what else to say of a step.
        scores: the range of step scores, whose sum q says nothing; None for rewards of tokens.
    """
    kept = set() if chosen is None else set(chosen.path())
    colour = {node: centred([node.reward], scores)[0] for node in scored(tree.nodes)}
    scale = max(map(abs, colour.values()), default=0.0)
    view = Tree(heading(tree.prompt), guide_style="dim")
    branches = {tree.root: view}
    for node in tree.nodes[1:]:
        live = bool(node.children) or node.finish == "stop"
        weight = "bold" if node in kept else "" if live else "dim"
        label = Text(no_wrap=True, overflow="ellipsis")
        if node in colour and scores is not None:
            label.append(f"{node.reward:.3f}  ", style=style(colour[node], scale))
        elif node in colour:
            label.append(f"{node.reward:+.3f}", style=style(node.reward, scale))
            label.append(f"  q {node.q:+.3f}  ", style="dim")
        label.append("> " if node in kept else "  ", style=weight)
        label.append(visible(node.text.strip()) or visible(node.text) or "(end)", style=weight)
        if node.count > 1:
            label.append(f"  x{node.count}", style="dim")
        if node.finish in ("length", "budget", "weak"):
            label.append(f"  cut: {node.finish}", style="dim")
        note_text = None if note is None else note(node)
        if note_text is not None:
            label.append("  ").append_text(note_text)
        branches[node] = branches[node.parent or tree.root].add(label)
    return view


def heading(prompt: Prompt) -> Text:
    """A prompt on one line."""
    text = prompt.text
    if text is None and prompt.messages is not None:
        text = str(prompt.messages[-1]["content"])
    shown = f"{len(prompt.token_ids or ())} prompt tokens" if text is None else visible(text)
    return Text(shown, no_wrap=True, overflow="ellipsis")


def step_range(scorer: Any) -> tuple[float, float] | None:
    """Return the range of a scorer's step scores, as tree_view takes it; None for rewards of tokens, or no scorer."""
    if scorer is None or scorer.rewards_tokens:
        return None
    return scorer.reward_range or (0.0, 0.0)


STEP_LEGEND = (
    "Each line is a step: its score (green above the middle of its range, red below), its text. '>' marks the chosen "
    "answer, x3 a step that was drawn three times; a dim one was pruned."
)
LEGEND = (
    "Each line is a step: its reward (beta * nats; green above 0, red below), q up to its end, its text. "
    "'>' marks the chosen answer, x3 a step that was drawn three times; a dim one was pruned."
)
