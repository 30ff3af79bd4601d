"""``prm-search generate``: search for answers to prompts with any models."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..answers import SELECTS
from ..driver.search_settings import SearchSettings
from ..strategies import STRATEGIES, BestOfN, DeepConf, SelfConsistency, Steer, Strategy
from ..tree import Prompt
from ..values import VALUES
from . import BadInput, groups, options, render
from .config import Common
from .grouped import grouped
from .options import ADVANCED, CHOICE, OUTPUT, PROMPTS, SEARCH
from .problems import answer_of
from .progress import Bar
from .records import Item, RecordFile, asked, digests, dumps, prompt_of, read_items, reason, report, writable
from .view import write_page
from .view_records import page_tree, result_page, step_record
from .workers import Failures

if TYPE_CHECKING:
    from ..driver.participants import Participants
    from ..driver.result import Event, Result
    from ..viewer.page_tree import PageTree


@dataclass(frozen=True, kw_only=True)
class Prompts(groups.Chat):
    """The prompts."""

    prompt: Annotated[list[str] | None, typer.Option(help="A prompt; may be repeated.", rich_help_panel=PROMPTS)] = None
    prompts_file: Annotated[
        str | None,
        typer.Option(
            help='JSON Lines with "prompt", "messages" or "question"; any other ending: a prompt a line; - is stdin.',
            rich_help_panel=PROMPTS,
        ),
    ] = None

    def read(self) -> list[Item]:
        """The prompts. Raises BadInput where there are none, or one makes no sense."""
        if bool(self.prompt) == (self.prompts_file is not None):
            raise BadInput("prompts are needed: --prompt (once or more), or --prompts-file")
        if self.prompts_file is not None:
            return read_items(self.prompts_file, chat=self.chat, system=self.system)
        return [
            Item(f"--prompt {number}", prompt_of(text, f"--prompt {number}", self.chat, self.system))
            for number, text in enumerate(self.prompt or (), start=1)
        ]


@dataclass(frozen=True, kw_only=True)
class Search:
    """The strategy and its own options."""

    strategy: Annotated[
        str, typer.Option(help=f"{', '.join(STRATEGIES)}; or a JSON object: name and fields.", rich_help_panel=SEARCH)
    ] = "beam"
    n: Annotated[int | None, typer.Option("--n", help="best_of_n, steer: answers.", rich_help_panel=SEARCH)] = None
    width: Annotated[int | None, typer.Option(help="Slots of a beam.", rich_help_panel=SEARCH)] = None
    expansions: Annotated[int | None, typer.Option(help="Children of each slot.", rich_help_panel=SEARCH)] = None
    per_parent: Annotated[
        int | None, typer.Option(help="Slots for children of one parent at most.", rich_help_panel=ADVANCED)
    ] = None
    subtrees: Annotated[int | None, typer.Option(help="dvts: independent beams.", rich_help_panel=SEARCH)] = None
    steps: Annotated[int | None, typer.Option(help="lookahead: steps of a rollout.", rich_help_panel=SEARCH)] = None
    rollouts: Annotated[int | None, typer.Option(help="lookahead: rollouts of a child.", rich_help_panel=SEARCH)] = None
    reduce: Annotated[str | None, typer.Option(help="lookahead: mean, max or policy.", rich_help_panel=ADVANCED)] = None
    alpha: Annotated[float | None, typer.Option(help="steer: strength.", rich_help_panel=SEARCH)] = None
    value: Annotated[
        str | None,
        typer.Option(
            help=f"Rank by: {', '.join(VALUES)}. Default: q; of a step PRM, its authors'.", rich_help_panel=SEARCH
        ),
    ] = None

    def make(self) -> Strategy:
        """The strategy. Raises BadInput or ValueError as options.make_strategy does."""
        names = ("n", "width", "expansions", "per_parent", "subtrees", "steps", "rollouts", "reduce", "alpha")
        return options.make_strategy(self.strategy, {name: getattr(self, name) for name in names})


@dataclass(frozen=True, kw_only=True)
class Confidence(groups.Steps):
    """Ends of steps, by the policy's own confidence too."""

    step_confidence: Annotated[
        float | None,
        typer.Option(help="End a step before a token that has less probability.", rich_help_panel=ADVANCED),
    ] = None
    step_confidence_of: Annotated[
        str, typer.Option(help="The token meant: top, the likeliest; or drawn.", rich_help_panel=ADVANCED)
    ] = "top"


@dataclass(frozen=True, kw_only=True)
class Draws(groups.SeededDraws):
    """Options of how tokens are drawn."""

    temperature: Annotated[float, typer.Option(help="0: the likeliest token.", rich_help_panel=options.SAMPLING)] = 0.8


@dataclass(frozen=True, kw_only=True)
class Choice:
    """The choice among candidates."""

    select: Annotated[
        str | None,
        typer.Option(help="best, majority or weighted; default: the strategy's own.", rich_help_panel=CHOICE),
    ] = None
    answer: Annotated[
        str | None,
        typer.Option(help="The answer in a text: boxed, ####, number or module:function.", rich_help_panel=CHOICE),
    ] = None
    weight: Annotated[str, typer.Option(help="weighted: softmax or sigmoid.", rich_help_panel=ADVANCED)] = "softmax"
    weight_temperature: Annotated[float, typer.Option(help="weighted: of the weights.", rich_help_panel=ADVANCED)] = 1.0

    def __post_init__(self) -> None:
        if self.select is not None:
            options.one_of("--select", self.select, SELECTS)
        options.one_of("--weight", self.weight, ("softmax", "sigmoid"))


@dataclass(frozen=True, kw_only=True)
class Prover:
    """A second scorer."""

    prover: Annotated[
        str | None,
        typer.Option(
            help="A second scorer, as --scorer: rank by the value plus its reward of the last step.",
            rich_help_panel=ADVANCED,
        ),
    ] = None


@dataclass(frozen=True, kw_only=True)
class Shown:
    """The parts of a result that are shown."""

    tree: Annotated[
        bool, typer.Option("--tree", help="Show the search trees; in JSON, hold them.", rich_help_panel=OUTPUT)
    ] = False
    html: Annotated[
        str | None,
        typer.Option(help="A page of the search trees, as of prm-search view.", rich_help_panel=OUTPUT),
    ] = None
    as_json: Annotated[bool, groups.JSON] = False


@grouped
def generate(
    policy: groups.Policy,
    pair: groups.Scorer,
    prover: Prover,
    place: groups.Place,
    prompts: Prompts,
    search: Search,
    steps: Confidence,
    choice: Choice,
    draws: Draws,
    budget: groups.Limits,
    shown: Shown,
    records: groups.MaybeOutFile,
    common: Common,
) -> None:
    """Search for the answers to prompts."""
    settings = _settings(pair, search, steps, choice, draws, budget)
    if not _blind(settings.strategy, settings.select):
        pair.need()
    items = prompts.read()
    keys = digests(
        items, "generate", policy.policy, *pair.key(), prover.prover, place.dtype,
        repr(settings.strategy), repr(settings.sampling), repr(settings.budget), search.value, settings.select,
        choice.answer, choice.weight, choice.weight_temperature, shown.tree, *policy.names(),
    )  # fmt: skip
    if shown.html is not None:
        writable("--html", shown.html)
    out = records.out
    with RecordFile(out, keys, resume=records.resume) if out is not None else nullcontext() as file:
        from .models import load_scorer, quiet

        run = Run(items, keys, settings, file, as_json=shown.as_json, with_tree=shown.tree, html=shown.html)
        try:
            quiet()
            sampler = policy.load(policy.policy, place)
            scorer = pair.load(place) if pair.named else None
            second = prover.prover and load_scorer(prover.prover, name="prover", option="--prover", **place.options())
            run.go(sampler, scorer, second or None, records.batch)
        finally:
            report(file, len(run.done), len(items))
        run.page()
        run.failures.check()


def _settings(
    pair: groups.Scorer, search: Search, steps: Confidence, choice: Choice, draws: Draws, budget: groups.Limits
) -> SearchSettings:
    rule = options.make_steps(
        steps.delimiter, steps.step_tokens, steps.step_regex, default=options.card_delimiter(pair.card),
        confidence=steps.step_confidence, confidence_of=steps.step_confidence_of,
    )  # fmt: skip
    return SearchSettings.make(
        strategy=search.make(),
        steps=rule,
        seed=draws.seed,
        select=choice.select,  # type: ignore[arg-type]
        answer=answer_of(choice.answer),
        budget=budget.make(),
        value=search.value,
        weight=choice.weight,  # type: ignore[arg-type]
        weight_temperature=choice.weight_temperature,
        **draws.fields(),
    )


class Run:
    """The searches of one call: begins them, and shows and writes each as it ends."""

    def __init__(
        self,
        items: Sequence[Item],
        keys: Sequence[str],
        settings: SearchSettings,
        file: RecordFile | None,
        *,
        as_json: bool,
        with_tree: bool,
        html: str | None,
    ) -> None:
        self.items, self.keys, self.settings, self.file = items, keys, settings, file
        self.as_json, self.with_tree, self.html = as_json, with_tree, html
        self._pages: dict[int, PageTree] = {}
        self.screen = render.console()
        self.done = set() if file is None else set(file.done)
        self.failures = Failures(items, Bar("prompts", len(items) - len(self.done)))
        self._cut_into_steps = False
        self._scores: tuple[float, float] | None = None  # range of step scores; None for rewards of tokens

    def go(self, policy: Any, scorer: Any, prover: Any, batch: int) -> None:
        """Search for every item that is not done, at most `batch` at a time."""
        from ..driver.loop import Job, SearchLoop

        if isinstance(self.settings.strategy, Steer):
            try:
                policy = self.settings.strategy.wrap(policy, scorer)
            except TypeError as error:
                raise BadInput(f"--strategy steer: {reason(error)}") from error
        self._scores = render.step_range(scorer)
        waiting = [place for place in range(len(self.items)) if place not in self.done]
        bar = self.failures.bar
        bar.watch(policy)
        with bar, SearchLoop(policy, scorer, prover, on_event=_tokens(bar)) as loop:
            encoded = _encode(self.items, loop.models)
            jobs = (Job(encoded[place][0], self.settings, encoded[place][1], place) for place in waiting)
            for job, result in loop.run(jobs, batch):
                if result.failure is not None:
                    self.failures.lost(job.place, result.failure)
                else:
                    with bar.aside():
                        self._emit(job.place, result)
                bar.tick()
        if self.done and not self._cut_into_steps and not isinstance(self.settings.strategy, BestOfN | Steer):
            print("prm-search: no answer came in several steps: is it another --delimiter?", file=sys.stderr)

    def _emit(self, place: int, result: Result) -> None:
        if self.file is not None or self.as_json:
            record = self._record(place, result)
            if self.file is not None:
                self.file.write(record)
            if self.as_json:
                print(dumps(record), flush=True)
        if self.html is not None:
            self._pages[place] = result_page(result, self._name(place))
        self.done.add(place)
        self._cut_into_steps |= any(node.finish == "step" for node in result.tree.nodes[1:])
        if not self.as_json:
            self._show(result)

    def page(self) -> None:
        """Write the page of the searches, where one is asked for: those of an earlier run as the file has them."""
        if self.html is None:
            return
        for place, record in {} if self.file is None else self.file.done.items():
            self._pages[place] = page_tree(record, self.items[place].where, self._name(place))
        title = f"Search: {type(self.settings.strategy).__name__}"
        write_page("--html", self.html, title, [self._pages[place] for place in sorted(self._pages)])

    def _name(self, place: int) -> str:
        return str(self.items[place].extra.get("id", f"prompt {place}"))

    def _record(self, place: int, result: Result) -> dict[str, Any]:
        item, usage = self.items[place], result.usage
        record: dict[str, Any] = {"index": place, "key": self.keys[place]}
        if "id" in item.extra:
            record["id"] = item.extra["id"]
        record |= {
            "prompt": asked(item),
            "text": result.text,
            "answer": result.answer,
            "value": result.value,
            "stopped": result.stopped,
            "steps": [step_record(node) for node in ([] if result.node is None else result.node.path())],
            "candidates": [
                {"text": node.path_text(), "value": node.value, "finish": node.finish, "count": node.count}
                for node in result.candidates
            ],
            "sampled_tokens": usage.sampled_tokens,
            "encoded_tokens": usage.encoded_tokens,
            "reencoded_tokens": usage.reencoded_tokens,
        }
        if result.tree.notes:
            record["notes"] = result.tree.notes
        if self.with_tree:
            record["tree"] = json.loads(result.tree.to_json())
        return record

    def _show(self, result: Result) -> None:
        node, screen = result.node, self.screen
        if self.with_tree:
            screen.print(render.tree_view(result.tree, node, scores=self._scores))
        else:
            screen.print(render.heading(result.tree.prompt), style="bold")
        screen.print(render.visible(result.text, lines=True).strip("\n"), soft_wrap=True)
        facts = [f"{sum(result.usage.sampled_tokens.values())} tokens sampled", f"search {result.stopped}"]
        if node is not None and node.scored_by(result.tree.primary):
            if self._scores is None:
                rewards = " ".join(f"{step.reward:+.3f}" for step in node.path())
                facts = [f"q {node.q:+.3f}", f"step rewards {rewards}", *facts]
            else:
                scores = " ".join(f"{step.reward:.3f}" for step in node.path())
                facts = [f"value {node.value or 0.0:.3f}", f"step scores {scores}", *facts]
        if self.settings.answer is not None:
            facts = [f"answer {render.visible(result.answer or 'none')}", *facts]
        screen.print("; ".join([*facts, *result.tree.notes]), style="dim", soft_wrap=True)
        screen.print()


def _tokens(bar: Bar) -> Callable[[Event], object]:
    return lambda event: bar.sampled(sum(len(node.token_ids) for node in event.nodes))


def _encode(items: Sequence[Item], models: Participants[Any]) -> list[tuple[Prompt, int]]:
    """Prompts with their token ids, and how many equal ones came before. Raises BadInput saying where one stands."""
    from ..search import encode_all

    try:
        return encode_all([item.prompt for item in items], models.encode, lambda place: items[place].where)
    except ValueError as error:
        raise BadInput(reason(error)) from error


def _blind(strategy: Strategy, select: str) -> bool:
    """Return True if the search needs no rewards."""
    if isinstance(strategy, SelfConsistency | DeepConf):
        return select != "best"
    return isinstance(strategy, BestOfN) and (strategy.n == 1 or select == "majority")
