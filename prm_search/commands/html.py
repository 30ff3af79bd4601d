"""A self-contained page that shows responses coloured by token reward, or by step score."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

from .records import Item, asked
from .render import visible

PART = "&#8942;"  # for a token that ends inside a character: its text stands with the token that ends it
_WIDTH, _HEIGHT, _PAD = 720, 120, 8

_STYLE = """
:root { color-scheme: light }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem }
body, .step { color: #222; background: #fff }
h1 { font-size: 1.3rem; margin-bottom: .2rem }
article { border-top: 1px solid #ccc; padding: 1rem 0 }
.prompt { white-space: pre-wrap; color: #555; max-height: 12rem; overflow: auto }
.response { white-space: pre-wrap; font-family: ui-monospace, monospace; overflow-wrap: anywhere }
.response span { border-radius: 3px }
.step { font: 11px system-ui, sans-serif; border: 1px solid #999; padding: 0 3px; margin: 0 3px }
.legend i { display: inline-block; width: 12rem; height: .8rem; vertical-align: middle; margin: 0 .5rem;
  background: linear-gradient(90deg, rgb(215,48,39), #fff, rgb(26,152,80)) }
svg { width: 100%; height: auto; max-width: 45rem }
small { color: #555 }
"""


class _TokenRewards:
    """The drawing of a pair's records: each token in the colour of its reward, and q as a curve."""

    unit = "Rewards are in beta * nats."

    def __init__(self, records: Sequence[tuple[Item, Mapping[str, Any]]]) -> None:
        self.low = min((min(0.0, *record["q"]) for _, record in records), default=0.0)
        self.high = max((max(0.0, *record["q"]) for _, record in records), default=0.0)
        self.scale = max((abs(r) for _, record in records for r in record["token_rewards"]), default=0.0) or 1.0

    @property
    def legend(self) -> str:
        """Return what the colours mean."""
        return f"""token reward: {-self.scale:+.3g}<i></i>{self.scale:+.3g}
&nbsp; <span class="step">+0.12</span> ends a step and says its reward;
point at a token for its own reward and q, the sum so far; &#8942; is a token of part of a character,
which stands behind its last one. All curves have one scale."""

    def spans(self, record: Mapping[str, Any]) -> str:
        """The text in colours."""
        steps = dict(zip(record["step_ends"], record["step_rewards"], strict=True))
        parts = []
        rows = zip(record["tokens"], record["token_rewards"], record["q"], strict=True)
        for place, (piece, reward, q) in enumerate(rows, start=1):
            parts.append(_span(piece, reward, self.scale, f"reward {reward:+.4f}, q {q:+.4f}"))
            if place in steps:
                parts.append(f'<span class="step">{steps[place]:+.3f}</span>')
        return "".join(parts)

    def curve(self, record: Mapping[str, Any]) -> str:
        """A drawing of q."""
        return _curve([0.0, *record["q"]], record["step_ends"], self.low, self.high, "q")

    def size(self, record: Mapping[str, Any]) -> str:
        """Return how long the response is."""
        return f"{_count(len(record['tokens']), 'token')}, {_count(len(record['step_ends']), 'step')}"


class _StepScores:
    """The drawing of other scorers' records: each step in the colour of its score, and the scores as a curve."""

    def __init__(self, records: Sequence[tuple[Item, Mapping[str, Any]]]) -> None:
        reward_range = records[0][1]["reward_range"]
        scores = [score for _, record in records for score in record["step_scores"]]
        bounds = (min([0.0, *scores]), max([0.0, *scores])) if reward_range is None else reward_range
        self.low: float = bounds[0]
        self.high: float = bounds[1]
        self.middle = 0.0 if reward_range is None else (self.low + self.high) / 2
        self.scale = max((abs(score - self.middle) for score in scores), default=0.0) or 1.0
        span = "have no bounds" if reward_range is None else f"go from {self.low:g} to {self.high:g}"
        self.unit = f"Scores {span}."

    @property
    def legend(self) -> str:
        """Return what the colours mean."""
        return f"""step score: {self.middle - self.scale:.3g}<i></i>{self.middle + self.scale:.3g}
&nbsp; <span class="step">0.812</span> ends a step and says its score. All curves have one scale."""

    def spans(self, record: Mapping[str, Any]) -> str:
        """The text in colours."""
        return "".join(
            _span(text, score - self.middle, self.scale, f"score {score:.4f}")
            + f'<span class="step">{score:.3f}</span>'
            for text, score in zip(record["steps"], record["step_scores"], strict=True)
        ) + "".join(f"<br><small>{escape(visible(note))}</small>" for note in record.get("notes", ()))

    def curve(self, record: Mapping[str, Any]) -> str:
        """A drawing of the scores."""
        scores = record["step_scores"]
        return _curve([scores[0], *scores], range(1, len(scores) + 1), self.low, self.high, "score")

    def size(self, record: Mapping[str, Any]) -> str:
        """Return how long the response is."""
        return _count(len(record["steps"]), "step")


def _span(text: str, reward: float, scale: float, title: str) -> str:
    shown = escape(visible(text, lines=True)) or PART
    return f'<span style="background:{_colour(reward, scale)}" title="{title}">{shown}</span>'


def page(title: str, subtitle: str, records: Iterable[tuple[Item, Mapping[str, Any]]]) -> str:
    """The page.

    Args:
        title, subtitle: plain text.
        records: responses and their scores, as `prm-search score` writes them.

    Returns:
        HTML that loads nothing from elsewhere; everything in it that a user or a model wrote is escaped.
    """
    shown = list(records)
    of_steps = any("step_scores" in record for _, record in shown)
    draw = _StepScores(shown) if of_steps else _TokenRewards(shown)
    title, subtitle = escape(visible(title)), escape(visible(subtitle))
    articles = "\n".join(_article(item, record, draw) for item, record in shown)
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>{title}</title>
<style>{_STYLE}</style>
</head>
<body>
<h1>{title}</h1>
<p><small>{subtitle}; {_count(len(shown), "response")}. {draw.unit}</small></p>
<p class="legend">{draw.legend}</p>
{articles}
</body>
</html>
"""


def _article(item: Item, record: Mapping[str, Any], draw: _TokenRewards | _StepScores) -> str:
    name = record.get("id", record["index"])
    return f"""<article>
<h2><small>{escape(visible(str(name)))}: reward {record["reward"]:+.4f},
{draw.size(record)}</small></h2>
<div class="prompt">{escape(visible(_prompt(item), lines=True))}</div>
<p class="response">{draw.spans(record)}</p>
{draw.curve(record)}
</article>"""


def _prompt(item: Item) -> str:
    prompt = asked(item)
    if isinstance(prompt, str):
        return prompt
    if item.prompt.messages is not None:
        return "\n".join(f"{message['role']}: {message['content']}" for message in item.prompt.messages)
    return f"token ids {prompt}"


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def _curve(curve: Sequence[float], ends: Sequence[int], low: float, high: float, name: str) -> str:
    """A number from the start of the response to its end, with a dot where a step ends.

    Args:
        curve: the start's, then one a token or step.
        ends: places in it.
        low, high: of the page.
        name: of the number.
    """
    height = high - low or 1.0

    def at(token: int) -> tuple[str, str]:
        x = _PAD + (_WIDTH - 2 * _PAD) * token / (len(curve) - 1)
        y = _PAD + (_HEIGHT - 2 * _PAD) * (high - curve[token]) / height
        return f"{x:.1f}", f"{y:.1f}"

    line = " ".join(",".join(at(token)) for token in range(len(curve)))
    zero = f"{_PAD + (_HEIGHT - 2 * _PAD) * (high - min(max(0.0, low), high)) / height:.1f}"
    dots = "".join('<circle cx="{}" cy="{}" r="3" fill="#335"/>'.format(*at(end)) for end in ends)
    return (
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{name} from {curve[0]:.4g} to {curve[-1]:+.4f}">'
        f'<line x1="0" x2="{_WIDTH}" y1="{zero}" y2="{zero}" stroke="#bbb" stroke-dasharray="4"/>'
        f'<polyline points="{line}" fill="none" stroke="#335" stroke-width="1.5"/>{dots}'
        f'<text x="{_PAD}" y="{_HEIGHT - 2}" font-size="11" fill="#555">{name}: {low:+.3f} to {high:+.3f}, '
        f"dots where steps end</text></svg>"
    )


def _colour(reward: float, scale: float) -> str:
    """White at 0, full green or red at `scale`."""
    strength = min(1.0, abs(reward) / scale) ** 0.6  # small rewards stay visible
    red, green, blue = (26, 152, 80) if reward > 0 else (215, 48, 39)
    return f"rgba({red},{green},{blue},{strength:.2f})"
