"""``prm-search score``: the rewards of responses that exist already: a pair's token by token, others' step by step."""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
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
from .workers import Failures, Workers, absolutes, load_scorer, place_of

if TYPE_CHECKING:
    from ..scorers.explicit.step_scores import StepScores
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
    pair: groups.Scorer,
    place: groups.Place,
    steps: groups.Steps,
    workers: Workers,
    output: Output,
    common: Common,
) -> None:
    """Score complete responses."""
    pair.need()
    rule = steps.rule(options.card_delimiter(pair.card))
    items = read_items(responses.data, chat=responses.chat, responses=True)
    if output.html is not None:
        writable("--html", output.html)
    keys = digests(items, "score", *pair.key(), place.dtype, repr(rule), responses.cut)
    out = output.out
    with RecordFile(out, keys, resume=output.resume) if out is not None else nullcontext() as file:
        records = {} if file is None else dict(file.done)
        waiting = [place for place in range(len(items)) if place not in records]
        bar = Bar("responses", len(waiting))
        failures = Failures(items, bar)
        run = Run(pair, place, items, waiting, rule, responses.cut, output.batch)
        try:
            flow = run.here(bar) if workers.ray is None else run.on_workers(workers, failures)
            turn = deque(waiting)
            with bar:
                for index, scores in flow:
                    record = record_of(items[index], scores, index=index, key=keys[index])
                    if file is not None:
                        file.write(record)
                    records[index] = record
                    with bar.aside():  # in the order of the input, whatever the order of the scores
                        while turn and (turn[0] in records or turn[0] in failures.places):
                            if turn[0] in records:
                                show(items[turn[0]], records[turn[0]], output.as_json)
                            turn.popleft()
                    bar.tick()
            if file is not None:
                file.put_in_order()
        finally:
            report(file, len(records), len(items))
    if output.html is not None:
        from .html import page

        shown = [(items[place], records[place]) for place in sorted(records)]
        write_text("--html", output.html, page(f"Rewards by {pair.title}", run.title, shown))
    failures.check()


@dataclass
class Run:
    """The scoring of some responses, by this process or by workers.

    Attributes:
        pair, place: as given.
        items: all responses.
        waiting: places of those that are to be scored.
        steps, cut, batch: as given.
        title: of a page, once the run has begun.
    """

    pair: groups.Scorer
    place: groups.Place
    items: Sequence[Item]
    waiting: Sequence[int]
    steps: StepRule
    cut: bool
    batch: int
    title: str = ""

    def here(self, bar: Bar) -> Iterator[tuple[int, Scores | StepScores]]:
        """Places and scores, by this process. Raises BadInput as score_items does."""
        from .models import quiet

        quiet()
        scorer = self.pair.load(self.place)
        beta = getattr(scorer, "beta", None)
        self.title = str(scorer.kind) if beta is None else f"beta {beta:g}"
        bar.watch(scorer)
        return score_all(scorer, self.items, self.waiting, self.steps, self.cut, self.batch)

    def on_workers(self, workers: Workers, failures: Failures) -> Iterator[tuple[int, Scores | StepScores]]:
        """Places and scores as they arrive, by the workers of a cluster."""
        from ..distributed import score as distributed_score

        with workers.open(failures.bar) as cluster:
            load = partial(load_scorer, absolutes(self.pair), place_of(self.place, cluster))
            yield from distributed_score(
                [item.prompt for item in self.items], [item.response for item in self.items], cluster=cluster,
                scorer=load, steps=self.steps, append_eos=not self.cut,
                done=frozenset(range(len(self.items))) - frozenset(self.waiting), batch=self.batch, on_failure=failures,
            )  # fmt: skip


def score_all(
    scorer: Any, items: Sequence[Item], places: Sequence[int], steps: StepRule, cut: bool, batch: int
) -> Iterator[tuple[int, Scores | StepScores]]:
    """The places of items and their scores, `batch` at a time. Raises BadInput as score_items does."""
    for first in range(0, len(places), batch):
        some = places[first : first + batch]
        yield from zip(some, score_items(scorer, items, some, steps, cut), strict=True)


def score_items(
    scorer: Any, items: Sequence[Item], places: Sequence[int], steps: StepRule, cut: bool
) -> Sequence[Scores | StepScores]:
    """Scores of some of the items. Raises BadInput that says which of them cannot be scored."""
    chosen = [items[place] for place in places]
    how = scorer.score_options(steps, not cut)

    def scores_of(some: Sequence[Item]) -> Sequence[Scores | StepScores]:
        scores: Sequence[Scores | StepScores] = scorer.score(
            [item.prompt for item in some], [item.response for item in some], **how
        )
        return scores

    try:
        return scores_of(chosen)
    except (TypeError, ValueError):
        for item in chosen:  # one by one, to name the line
            try:
                scores_of([item])
            except (TypeError, ValueError) as error:
                raise BadInput(f"{item.where}: {re.sub(_PLACE, '', reason(error))}") from error
        raise


def record_of(item: Item, scores: Scores | StepScores, **head: Any) -> dict[str, Any]:
    """A line of the output. Rewards are in beta * nats, or what a step PRM or an outcome model gives."""
    if "id" in item.extra:
        head["id"] = item.extra["id"]
    from ..scorers.explicit.step_scores import StepScores

    if isinstance(scores, StepScores):
        return {
            **head,
            "reward": rounded([scores.reward])[0],
            "step_scores": rounded(scores.step_scores),
            "step_ends": scores.step_ends.tolist(),
            "steps": list(scores.texts),
            "reward_range": scores.reward_range and list(scores.reward_range),
        } | ({"notes": list(scores.notes)} if scores.notes else {})
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
    """One response on standard output: a line of JSON, or its tokens or steps in colour and its step rewards."""
    if as_json:
        print(dumps(record), flush=True)
        return
    screen = render.console()
    screen.print(render.heading(item.prompt), style="bold")
    if "step_scores" in record:
        pieces, rewards, name = record["steps"], record["step_scores"], "step scores"
        colours = render.centred(rewards, record["reward_range"])
        numbers = " ".join(f"{score:.3f}" for score in rewards)
    else:
        pieces, colours, name = record["tokens"], record["token_rewards"], "step rewards"
        numbers = " ".join(f"{reward:+.3f}" for reward in record["step_rewards"])
    scale = max(map(abs, colours))
    text = Text()
    for piece, colour in zip(pieces, colours, strict=True):
        text.append(render.visible(piece, lines=True), style=render.style(colour, scale))
    screen.print(text, soft_wrap=True)
    sign = "" if "step_scores" in record else "+"
    screen.print(f"reward {record['reward']:{sign}.3f}; {name} {numbers}", style="dim", soft_wrap=True)
    for note in record.get("notes", ()):
        screen.print(note, style="dim", soft_wrap=True)
    screen.print()
