"""``prm-search score``: the rewards of responses that exist already, of any pair, token by token."""

from __future__ import annotations

import re
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.text import Text

from ..steps import StepRule
from . import BadInput, options, render
from .options import make_steps
from .records import Item, RecordFile, digests, dumps, read_items, reason, report, rounded, writable

if TYPE_CHECKING:
    from ..scorers.implicit.scores import Scores

_PLACE = re.compile(r"^(prompts|responses)\[0\]:? ")


def score(
    data: Annotated[
        str, typer.Option(help='JSON Lines with "prompt" (or "messages") and "response"; - is standard input.')
    ],
    pair: options.Pair = None,
    prm: options.Prm = None,
    reference: options.Reference = None,
    beta: options.Beta = None,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    chat: Annotated[bool, typer.Option("--chat", help="Prompts are user messages to a chat model.")] = False,
    cut: Annotated[
        bool, typer.Option("--cut", help="Responses were cut: no end of sequence is scored after their text.")
    ] = False,
    delimiter: options.Delimiter = None,
    step_tokens: options.StepTokens = None,
    step_regex: options.StepRegex = None,
    batch: Annotated[
        int, typer.Option(help="Responses scored together; changes no reward.", rich_help_panel=options.OUTPUT)
    ] = 16,
    html: Annotated[
        str | None,
        typer.Option(help="A page that shows every response, coloured by reward.", rich_help_panel=options.OUTPUT),
    ] = None,
    as_json: options.Json = False,
    out: options.Out = None,
    resume: options.Resume = False,
    debug: options.Debug = False,
) -> None:
    """Score complete responses."""
    options.at_least("--batch", batch)
    options.check_models(pair, prm, reference, needed=True)
    if resume and out is None:
        raise BadInput("--resume needs --out, the file to go on with")
    steps = make_steps(delimiter, step_tokens, step_regex, default=options.card_delimiter(pair))
    items = read_items(data, chat=chat, responses=True)
    if html is not None:
        writable("--html", html)
    keys = digests(items, "score", pair, prm, reference, beta, dtype, repr(steps), cut)
    with RecordFile(out, keys, resume=resume) if out is not None else nullcontext() as file:
        from .models import load_pair, quiet

        records = {} if file is None else dict(file.done)
        try:
            quiet()
            scorer = load_pair(pair, prm, reference, beta=beta, device=device, dtype=dtype)
            waiting = [place for place in range(len(items)) if place not in records]
            bar, tick = render.progress("responses", len(waiting), beside_output=True)
            with bar:
                for first in range(0, len(waiting), batch):
                    places = waiting[first : first + batch]
                    for place, scores in zip(places, score_items(scorer, items, places, steps, cut), strict=True):
                        record = record_of(items[place], scores, index=place, key=keys[place])
                        if file is not None:
                            file.write(record)
                        records[place] = record
                        show(items[place], record, as_json)
                        tick()
        finally:
            report(file, len(records), len(items))
    if html is not None:
        from .html import page

        shown = [(items[place], records[place]) for place in sorted(records)]
        title = pair or f"{prm} against {reference or 'its base'}"
        Path(html).write_text(page(f"Rewards by {title}", f"beta {scorer.beta:g}", shown), encoding="utf-8")


def score_items(
    pair: Any, items: Sequence[Item], places: Sequence[int], steps: StepRule, cut: bool
) -> Sequence[Scores]:
    """Scores of some of the items. Raises BadInput that says which of them cannot be scored."""
    chosen = [items[place] for place in places]

    def scores_of(some: Sequence[Item]) -> Sequence[Scores]:
        found: Sequence[Scores] = pair.score(
            [item.prompt for item in some], [item.response for item in some], steps=steps, append_eos=not cut
        )
        return found

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
