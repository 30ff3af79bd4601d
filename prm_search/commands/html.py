"""A self-contained page that shows responses coloured by token reward."""

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


def page(title: str, subtitle: str, records: Iterable[tuple[Item, Mapping[str, Any]]]) -> str:
    """The page.

    Args:
        title, subtitle: plain text.
        records: responses and their scores, as `prm-search score` writes them.

    Returns:
        HTML that loads nothing from elsewhere; everything in it that a user or a model wrote is escaped.
    """
    shown = list(records)
    low = min((min(0.0, *record["q"]) for _, record in shown), default=0.0)
    high = max((max(0.0, *record["q"]) for _, record in shown), default=0.0)
    scale = max((abs(r) for _, record in shown for r in record["token_rewards"]), default=0.0) or 1.0
    title, subtitle = escape(visible(title)), escape(visible(subtitle))
    articles = "\n".join(_article(item, record, scale, low, high) for item, record in shown)
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
<p><small>{subtitle}; {_count(len(shown), "response")}. Rewards are in beta * nats.</small></p>
<p class="legend">token reward: {-scale:+.3g}<i></i>{scale:+.3g}
&nbsp; <span class="step">+0.12</span> ends a step and says its reward;
point at a token for its own reward and q, the sum so far; &#8942; is a token of part of a character,
which stands behind its last one. All curves have one scale.</p>
{articles}
</body>
</html>
"""


def _article(item: Item, record: Mapping[str, Any], scale: float, low: float, high: float) -> str:
    rewards, values, ends = record["token_rewards"], record["q"], record["step_ends"]
    steps = dict(zip(ends, record["step_rewards"], strict=True))
    spans = []
    for place, (piece, reward, q) in enumerate(zip(record["tokens"], rewards, values, strict=True), start=1):
        spans.append(
            f'<span style="background:{_colour(reward, scale)}" title="reward {reward:+.4f}, q {q:+.4f}">'
            f"{escape(visible(piece, lines=True)) or PART}</span>"
        )
        if place in steps:
            spans.append(f'<span class="step">{steps[place]:+.3f}</span>')
    name = record.get("id", record["index"])
    return f"""<article>
<h2><small>{escape(visible(str(name)))}: reward {record["reward"]:+.4f},
{_count(len(rewards), "token")}, {_count(len(ends), "step")}</small></h2>
<div class="prompt">{escape(visible(_prompt(item), lines=True))}</div>
<p class="response">{"".join(spans)}</p>
{_curve(values, ends, low, high)}
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


def _curve(values: Sequence[float], ends: Sequence[int], low: float, high: float) -> str:
    """q from the start of the response to its end, with a dot where a step ends; low and high are those of the page."""
    curve = [0.0, *values]
    height = high - low or 1.0

    def at(token: int) -> tuple[str, str]:
        x = _PAD + (_WIDTH - 2 * _PAD) * token / len(values)
        y = _PAD + (_HEIGHT - 2 * _PAD) * (high - curve[token]) / height
        return f"{x:.1f}", f"{y:.1f}"

    line = " ".join(",".join(at(token)) for token in range(len(curve)))
    zero = at(0)[1]
    dots = "".join('<circle cx="{}" cy="{}" r="3" fill="#335"/>'.format(*at(end)) for end in ends)
    return (
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="q from 0 to {curve[-1]:+.4f}">'
        f'<line x1="0" x2="{_WIDTH}" y1="{zero}" y2="{zero}" stroke="#bbb" stroke-dasharray="4"/>'
        f'<polyline points="{line}" fill="none" stroke="#335" stroke-width="1.5"/>{dots}'
        f'<text x="{_PAD}" y="{_HEIGHT - 2}" font-size="11" fill="#555">q: {low:+.3f} to {high:+.3f}, '
        f"dots where steps end</text></svg>"
    )


def _colour(reward: float, scale: float) -> str:
    """White at 0, full green or red at `scale`."""
    strength = min(1.0, abs(reward) / scale) ** 0.6  # small rewards stay visible
    red, green, blue = (26, 152, 80) if reward > 0 else (215, 48, 39)
    return f"rgba({red},{green},{blue},{strength:.2f})"
