"""Draw docs/images/tree-*.svg: a real search tree of the demo task for each strategy.

python scripts/draw_trees.py
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from html import escape
from pathlib import Path

import prm_search as ps
from prm_search.demo import chains, pair_dir

FOLDER = Path(__file__).resolve().parents[1] / "docs" / "images"
STEP, ROW, LEFT, TOP = 104, 15, 20, 40  # pixels: a step to the right, a leaf down, the margins
LETTER = 5.42  # pixels of a letter
BUDGET = 320  # policy tokens, at most
LENGTH, SEED = 6, 4
STRATEGIES: Mapping[str, ps.Strategy] = {
    "best-of-n": ps.BestOfN(12),
    "beam": ps.Beam(3, 4),
    "lookahead": ps.Lookahead(2, 3),
    "dvts": ps.DVTS(3, 1, 4),
    "particle-filter": ps.ParticleFilter(12, temperature=0.1),
    "mcts": ps.MCTS(20),
    "rebase": ps.Rebase(12),
    "adaptive-branch": ps.AdaptiveBranch(24),
    "by-difficulty": ps.ByDifficulty(3, (-0.6,), (ps.Beam(3, 4), ps.BestOfN(6))),
    "steer": ps.Steer(1.0, n=4),
}


def places(node: ps.Node, row: Iterator[int]) -> dict[ps.Node, tuple[float, float]]:
    """The place of each node below this one: leaves one below the other, a parent beside the middle of its children."""
    found: dict[ps.Node, tuple[float, float]] = {}
    for child in node.children:
        found |= places(child, row)
    heights = [found[child][1] for child in node.children]
    height = (min(heights) + max(heights)) / 2 if heights else TOP + ROW * next(row)
    return found | {node: (LEFT + STEP * node.depth, height)}


def colour(reward: float) -> str:
    """Green for a step that the pair likes, red for one that it does not, paler near 0."""
    strength = min(1.0, abs(reward) / 0.5)
    pale = round(225 - 150 * strength)
    return f"rgb({pale},{190 - round(40 * strength)},{pale})" if reward >= 0 else f"rgb(225,{pale},{pale})"


def label(node: ps.Node) -> str:
    """The step's text, and how often it was drawn."""
    times = f" x{node.count}" if node.count > 1 else ""
    return "" if node.parent is None else f"{node.text.rstrip(';')}{times}"


def picture(name: str, strategy: ps.Strategy, result: ps.Result, right: str) -> str:
    """The tree as SVG: an edge as wide as it was drawn often, the answer's path dark, rollouts dashed."""
    tree = result.tree
    where = places(tree.root, iter(range(10_000)))
    path = set() if result.node is None else set(result.node.path())
    width = max(x for x, _ in where.values()) + STEP
    height = max(y for _, y in where.values()) + ROW
    parts = []
    for node, (x, y) in where.items():
        if node.parent is None:
            continue
        before = where[node.parent]
        on = node in path
        dash = ' stroke-dasharray="3 2"' if node.rollout else ""
        (x0, y0), wide = before, min(5.0, 0.8 + 0.3 * node.count)
        x0 = min(x0 + 8 + LETTER * len(label(node.parent)), x - 10)  # behind the parent's label
        bend = (x0 + x) / 2
        curve = f"M{x0:.0f} {y0:.1f}C{bend:.0f} {y0:.1f} {bend:.0f} {y:.1f} {x:.0f} {y:.1f}"
        parts.append(f'<path d="{curve}" stroke="{"#234" if on else "#bbb"}" stroke-width="{wide:.1f}"{dash}/>')
    for node, (x, y) in where.items():
        fill = "#234" if node.parent is None else colour(node.reward)
        ring = ' stroke="#234"' if node.finish == "stop" else ""
        parts.append(f'<circle cx="{x:.0f}" cy="{y:.1f}" r="4" fill="{fill}"{ring}/>')
        if node.parent is not None:
            weight = ' font-weight="bold"' if node in path else ""
            parts.append(f'<text x="{x + 7:.0f}" y="{y + 3:.1f}"{weight}>{escape(label(node))}</text>')
    tokens = sum(result.usage.sampled_tokens.values())
    verdict = "right" if result.answer == right else "wrong"
    caption = f"{strategy!r}".partition(", per_parent")[0].partition(", rule")[0].rstrip(")") + ")"
    caption = caption if name != "by-difficulty" else "ByDifficulty(3, (-0.6,), (Beam(3, 4), BestOfN(6)))"
    note = f"{len(tree.nodes) - 1} nodes, {tokens} policy tokens, answer {result.answer} ({verdict})"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height:.0f}" width="{width:.0f}" '
        f'font-family="monospace" font-size="9" fill="none"><title>{escape(name)}</title>'
        f'<rect width="100%" height="100%" fill="#fff"/><g fill="#234"><text x="8" y="14" font-size="11" '
        f'font-weight="bold">{escape(caption)}</text>'
        f'<text x="8" y="27">{escape(tree.prompt.text or "")}  {note}</text></g>'
        f"<g>{''.join(p for p in parts if p.startswith('<path'))}</g>"
        f'<g fill="#234">{"".join(p for p in parts if not p.startswith("<path"))}</g></svg>\n'
    )


def main() -> None:
    """Search the same problem by every strategy, and draw what came of it."""
    folder = pair_dir()
    pair = ps.ImplicitPRM.from_pretrained(folder)
    policy = ps.HFPolicy.from_pretrained(folder / "policy")
    problem = chains.problems(SEED + 1, seed=1, length=LENGTH)[SEED]
    for name, strategy in STRATEGIES.items():
        (result,) = ps.search(
            [problem.prompt], policy=policy, scorer=pair, strategy=strategy, steps=ps.StepRule(chains.DELIMITER),
            max_new_tokens=40, temperature=1.0, seed=0, answer=chains.answer, value="min", budget=BUDGET,
        )  # fmt: skip
        svg = picture(name, strategy, result, problem.answer)
        (FOLDER / f"tree-{name}.svg").write_text(svg, encoding="utf-8")
        print(f"tree-{name}.svg: {len(svg):,} bytes, {len(result.tree.nodes)} nodes, answer {result.answer}")


if __name__ == "__main__":
    main()
