"""``prm-search score``: the rewards of responses that exist already, of any pair, token by token."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.text import Text

from ..steps import StepRule
from . import BadInput, groups, options, render
from .config import Common
from .grouped import grouped
from .options import DATA, OUTPUT
from .progress import Bar
from .records import Item, RecordFile, digests, dumps, read_items, reason, report, rounded, writable, write_text

if TYPE_CHECKING:
    from ..scorers.scores import Scores

_PLACE = re.compile(r"^(prompts|responses)\[0\]:? ")


@dataclass(frozen=True, kw_only=True)
class Responses:
    """The responses to score."""

    data: Annotated[
        str,
        typer.Option(
            help='JSON Lines with "prompt" (or "messages") and "response"; - is standard input.', rich_help_panel=DATA
        ),
    ]
    chat: Annotated[bool, groups.CHAT] = False
    cut: Annotated[
        bool,
        typer.Option(
            "--cut", help="Responses were cut: no end of sequence is scored after their text.", rich_help_panel=DATA
        ),
    ] = False


@dataclass(frozen=True, kw_only=True)
class Output(groups.MaybeOutFile):
    """Places of scores."""

    html: Annotated[
        str | None,
        typer.Option(help="A page that shows every response, coloured by reward.", rich_help_panel=OUTPUT),
    ] = None
    as_json: Annotated[bool, groups.JSON] = False
    batch: Annotated[int, groups.BATCH] = 16


@grouped
def score(
    responses: Responses,
    pair: groups.Pair,
    place: groups.Place,
    steps: groups.Steps,
    output: Output,
    common: Common,
) -> None:
    """Score complete responses."""
    pair.need()
    rule = steps.rule(options.card_delimiter(pair.pair))
    items = read_items(responses.data, chat=responses.chat, responses=True)
    if output.html is not None:
        writable("--html", output.html)
    keys = digests(
        items, "score", pair.pair, pair.prm, pair.reference, pair.beta, place.dtype, repr(rule), responses.cut
    )
    out = output.out
    with RecordFile(out, keys, resume=output.resume) if out is not None else nullcontext() as file:
        from .models import quiet

        records = {} if file is None else dict(file.done)
        try:
            quiet()
            scorer = pair.load(place)
            waiting = [place for place in range(len(items)) if place not in records]
            with Bar("responses", len(waiting)) as bar:
                bar.watch(scorer)
                for index, scores in score_all(scorer, items, waiting, rule, responses.cut, output.batch):
                    record = record_of(items[index], scores, index=index, key=keys[index])
                    if file is not None:
                        file.write(record)
                    records[index] = record
                    with bar.aside():
                        show(items[index], record, output.as_json)
                    bar.tick()
        finally:
            report(file, len(records), len(items))
    if output.html is not None:
        from .html import page

        shown = [(items[place], records[place]) for place in sorted(records)]
        source = page(f"Rewards by {pair.title}", f"beta {scorer.beta:g}", shown)
        write_text("--html", output.html, source)


def score_all(
    pair: Any, items: Sequence[Item], places: Sequence[int], steps: StepRule, cut: bool, batch: int
) -> Iterator[tuple[int, Scores]]:
    """The places of items and their scores, `batch` at a time. Raises BadInput as score_items does."""
    for first in range(0, len(places), batch):
        some = places[first : first + batch]
        yield from zip(some, score_items(pair, items, some, steps, cut), strict=True)


def score_items(
    pair: Any, items: Sequence[Item], places: Sequence[int], steps: StepRule, cut: bool
) -> Sequence[Scores]:
    """Scores of some of the items. Raises BadInput that says which of them cannot be scored."""
    chosen = [items[place] for place in places]

    def scores_of(some: Sequence[Item]) -> Sequence[Scores]:
        scores: Sequence[Scores] = pair.score(
            [item.prompt for item in some], [item.response for item in some], steps=steps, append_eos=not cut
        )
        return scores

    try:
        return scores_of(chosen)
    except ValueError:
        for item in chosen:  # one by one, to name the line
            try:
                scores_of([item])
            except ValueError as error:
                raise BadInput(f"{item.where}: {re.sub(_PLACE, '', reason(error))}") from error
        raise


def record_of(item: Item, scores: Scores, **head: Any) -> dict[str, Any]:
    """A line of the output. Rewards are in beta * nats."""
    if "id" in item.extra:
        head["id"] = item.extra["id"]
    return {
        **head,
        "reward": rounded([scores.reward])[0],
        "step_rewards": rounded(scores.step_rewards),
        "step_ends": scores.step_ends.tolist(),
        "token_rewards": rounded(scores.token_rewards),
        "q": rounded(scores.q),
        "tokens": list(scores.pieces),
        "token_ids": list(scores.token_ids),
    }


def show(item: Item, record: dict[str, Any], as_json: bool) -> None:
    """One response on standard output: a line of JSON, or its tokens in colour and its step rewards."""
    if as_json:
        print(dumps(record), flush=True)
        return
    screen = render.console()
    scale = max(map(abs, record["token_rewards"]))
    text = Text()
    for piece, reward in zip(record["tokens"], record["token_rewards"], strict=True):
        text.append(render.visible(piece, lines=True), style=render.style(reward, scale))
    screen.print(render.heading(item.prompt), style="bold")
    screen.print(text, soft_wrap=True)
    steps = " ".join(f"{reward:+.3f}" for reward in record["step_rewards"])
    screen.print(f"reward {record['reward']:+.3f}; step rewards {steps}", style="dim", soft_wrap=True)
    screen.print()
