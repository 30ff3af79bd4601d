"""``prm-search generate``: search for answers to prompts with any models."""

from __future__ import annotations

import json
import sys
from collections import Counter, deque
from collections.abc import Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..answers import SELECTS
from ..driver.search_settings import SearchSettings
from ..strategies import BestOfN, Steer, Strategy
from ..tree import Node, Prompt, SearchTree
from . import BadInput, options, render
from .options import make_budget, make_steps, make_strategy
from .records import Item, RecordFile, asked, digests, dumps, prompt_of, read_items, reason, report

if TYPE_CHECKING:
    from ..driver.participants import Participants
    from ..driver.result import Result

_PROMPTS, _SEARCH, _CHOICE = "Prompts", "Search", "Choice of the answer"
_SAMPLING, _BUDGET = "Sampling", "Budget of a prompt"


def generate(
    policy: Annotated[
        str,
        typer.Option(
            help="The model that samples: hub id, folder, PEFT adapter, .gguf file, or 'demo'.",
            rich_help_panel=options.MODELS,
        ),
    ],
    pair: options.Pair = None,
    prm: options.Prm = None,
    reference: options.Reference = None,
    beta: options.Beta = None,
    prover: Annotated[
        str | None,
        typer.Option(help="A second pair: rank by q plus its reward of the last step.", rich_help_panel=options.MODELS),
    ] = None,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    engine: options.Engine = "hf",
    engine_options: options.EngineOptions = None,
    prompt: Annotated[
        list[str] | None, typer.Option(help="A prompt; may be repeated.", rich_help_panel=_PROMPTS)
    ] = None,
    prompts_file: Annotated[
        str | None,
        typer.Option(
            help='JSON Lines with "prompt", "messages" or "question"; any other ending: a prompt a line; - is stdin.',
            rich_help_panel=_PROMPTS,
        ),
    ] = None,
    chat: Annotated[
        bool, typer.Option("--chat", help="Prompts are user messages to a chat model.", rich_help_panel=_PROMPTS)
    ] = False,
    system: Annotated[
        str | None, typer.Option(help="With --chat: the system message.", rich_help_panel=_PROMPTS)
    ] = None,
    strategy: Annotated[
        str, typer.Option(help="best_of_n, beam, lookahead, dvts or steer.", rich_help_panel=_SEARCH)
    ] = "beam",
    n: Annotated[int | None, typer.Option("--n", help="best_of_n, steer: answers.", rich_help_panel=_SEARCH)] = None,
    width: Annotated[int | None, typer.Option(help="Slots of a beam.", rich_help_panel=_SEARCH)] = None,
    expansions: Annotated[int | None, typer.Option(help="Children of each slot.", rich_help_panel=_SEARCH)] = None,
    per_parent: Annotated[
        int | None, typer.Option(help="Slots for children of one parent at most.", rich_help_panel=_SEARCH)
    ] = None,
    subtrees: Annotated[int | None, typer.Option(help="dvts: independent beams.", rich_help_panel=_SEARCH)] = None,
    steps: Annotated[int | None, typer.Option(help="lookahead: steps of a rollout.", rich_help_panel=_SEARCH)] = None,
    rollouts: Annotated[
        int | None, typer.Option(help="lookahead: rollouts of a child.", rich_help_panel=_SEARCH)
    ] = None,
    reduce: Annotated[str | None, typer.Option(help="lookahead: mean or max.", rich_help_panel=_SEARCH)] = None,
    alpha: Annotated[float | None, typer.Option(help="steer: strength.", rich_help_panel=_SEARCH)] = None,
    value: Annotated[
        str | None,
        typer.Option(help="Rank by: q, last, min, mean, prefix_mean, min_q. Default: q.", rich_help_panel=_SEARCH),
    ] = None,
    delimiter: options.Delimiter = None,
    step_tokens: options.StepTokens = None,
    step_regex: options.StepRegex = None,
    step_confidence: Annotated[
        float | None,
        typer.Option(help="End a step where the likeliest token has less probability.", rich_help_panel=options.STEPS),
    ] = None,
    select: Annotated[str, typer.Option(help="best, majority or weighted.", rich_help_panel=_CHOICE)] = "best",
    answer: Annotated[
        str | None, typer.Option(help="The answer in a text: boxed, #### or number.", rich_help_panel=_CHOICE)
    ] = None,
    weight: Annotated[str, typer.Option(help="weighted: softmax or sigmoid.", rich_help_panel=_CHOICE)] = "softmax",
    weight_temperature: Annotated[float, typer.Option(help="weighted: of the weights.", rich_help_panel=_CHOICE)] = 1.0,
    temperature: Annotated[float, typer.Option(help="0: the likeliest token.", rich_help_panel=_SAMPLING)] = 0.8,
    top_p: Annotated[float, typer.Option(rich_help_panel=_SAMPLING)] = 1.0,
    top_k: Annotated[int, typer.Option(help="0 keeps all.", rich_help_panel=_SAMPLING)] = 0,
    min_p: Annotated[float, typer.Option(rich_help_panel=_SAMPLING)] = 0.0,
    max_new_tokens: Annotated[int, typer.Option(help="Of one answer.", rich_help_panel=_SAMPLING)] = 1024,
    seed: Annotated[int, typer.Option(help="Of every draw.", rich_help_panel=_SAMPLING)] = 0,
    budget: Annotated[int | None, typer.Option(help="Sampled tokens.", rich_help_panel=_BUDGET)] = None,
    budget_nodes: Annotated[int | None, typer.Option(help="Nodes of the tree.", rich_help_panel=_BUDGET)] = None,
    budget_depth: Annotated[int | None, typer.Option(help="Steps of an answer.", rich_help_panel=_BUDGET)] = None,
    budget_seconds: Annotated[float | None, typer.Option(help="Wall time.", rich_help_panel=_BUDGET)] = None,
    batch: Annotated[
        int, typer.Option(help="Prompts searched together; changes no answer.", rich_help_panel=options.OUTPUT)
    ] = 32,
    tree: Annotated[
        bool, typer.Option("--tree", help="Show the search trees; in JSON, hold them.", rich_help_panel=options.OUTPUT)
    ] = False,
    as_json: options.Json = False,
    out: options.Out = None,
    resume: options.Resume = False,
    debug: options.Debug = False,
) -> None:
    """Search for the answers to prompts."""
    chosen = make_strategy(
        strategy,
        {
            "n": n, "width": width, "expansions": expansions, "per_parent": per_parent, "subtrees": subtrees,
            "steps": steps, "rollouts": rollouts, "reduce": reduce, "alpha": alpha,
        },
    )  # fmt: skip
    settings = SearchSettings.make(
        strategy=chosen,
        steps=make_steps(
            delimiter, step_tokens, step_regex, default=options.card_delimiter(pair), confidence=step_confidence
        ),
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        min_p=min_p,
        seed=seed,
        select=options.one_of("--select", select, SELECTS),
        answer=answer,
        budget=make_budget(budget, budget_nodes, budget_depth, budget_seconds),
        value=value,
        weight=options.one_of("--weight", weight, ("softmax", "sigmoid")),
        weight_temperature=weight_temperature,
    )
    options.at_least("--batch", batch)
    arguments = options.engine_options(engine, engine_options)
    options.check_models(pair, prm, reference, needed=not _blind(chosen, select))
    if resume and out is None:
        raise BadInput("--resume needs --out, the file to go on with")
    if system is not None and not chat:
        raise BadInput("--system needs --chat")
    items = _prompts(prompt, prompts_file, chat, system)
    drawn_by = () if engine == "hf" else (engine, json.dumps(arguments, sort_keys=True))
    keys = digests(
        items, "generate", policy, pair, prm, reference, beta, prover, dtype, repr(chosen), repr(settings.sampling),
        repr(settings.budget), value, select, answer, weight, weight_temperature, tree, *drawn_by,
    )  # fmt: skip
    with RecordFile(out, keys, resume=resume) if out is not None else nullcontext() as file:
        from .models import load_pair, load_policy, load_vllm_policy, quiet

        run = Run(items, keys, settings, file, as_json=as_json, with_tree=tree)
        try:
            quiet()
            if engine == "vllm":
                sampler = load_vllm_policy(policy, device=device, dtype=dtype, options=arguments)
            else:
                sampler = load_policy(policy, device=device, dtype=dtype)
            scorer = second = None
            if pair is not None or prm is not None:
                scorer = load_pair(pair, prm, reference, beta=beta, device=device, dtype=dtype)
            if prover is not None:
                second = load_pair(prover, None, None, name="prover", device=device, dtype=dtype)
            run.go(sampler, scorer, second, batch)
        finally:
            report(file, len(run.done), len(items))


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
    ) -> None:
        self.items, self.keys, self.settings, self.file = items, keys, settings, file
        self.as_json, self.with_tree = as_json, with_tree
        self.screen = render.console()
        self.done = set() if file is None else set(file.done)
        self._cut_into_steps = False

    def go(self, policy: Any, scorer: Any, prover: Any, batch: int) -> None:
        """Search for every item that is not done, at most `batch` at a time."""
        from ..driver.loop import SearchLoop

        if isinstance(self.settings.strategy, Steer):
            policy = self.settings.strategy.wrap(policy, scorer)
        waiting = deque(place for place in range(len(self.items)) if place not in self.done)
        bar, tick = render.progress("prompts", len(waiting), beside_output=True)
        running: dict[SearchTree, int] = {}
        with bar, SearchLoop(policy, scorer, prover) as loop:
            encoded = _encode(self.items, loop.models)
            while waiting or loop.active:
                while waiting and len(running) < batch:
                    prompt, occurrence = encoded[place := waiting.popleft()]
                    running[loop.add(prompt, self.settings, occurrence=occurrence)] = place
                for result in loop.step():
                    self._emit(running.pop(result.tree), result)
                    tick()
        if self.done and not self._cut_into_steps and not isinstance(self.settings.strategy, BestOfN | Steer):
            print("prm-search: no answer came in several steps: is it another --delimiter?", file=sys.stderr)

    def _emit(self, place: int, result: Result) -> None:
        if self.file is not None or self.as_json:
            record = self._record(place, result)
            if self.file is not None:
                self.file.write(record)
            if self.as_json:
                print(dumps(record), flush=True)
        self.done.add(place)
        self._cut_into_steps |= any(node.finish == "step" for node in result.tree.nodes[1:])
        if not self.as_json:
            self._show(result)

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
            "steps": [_step(node) for node in ([] if result.node is None else result.node.path())],
            "candidates": [
                {"text": node.path_text(), "value": node.value, "finish": node.finish, "count": node.count}
                for node in result.candidates
            ],
            "sampled_tokens": usage.sampled_tokens,
            "encoded_tokens": usage.encoded_tokens,
            "reencoded_tokens": usage.reencoded_tokens,
        }
        if self.with_tree:
            record["tree"] = json.loads(result.tree.to_json())
        return record

    def _show(self, result: Result) -> None:
        node, screen = result.node, self.screen
        if self.with_tree:
            screen.print(render.tree_view(result.tree, node))
        else:
            screen.print(render.heading(result.tree.prompt), style="bold")
        screen.print(render.visible(result.text, lines=True).strip("\n"), soft_wrap=True)
        facts = [f"{sum(result.usage.sampled_tokens.values())} tokens sampled", f"search {result.stopped}"]
        if node is not None and node.scored_by(result.tree.primary):
            rewards = " ".join(f"{step.reward:+.3f}" for step in node.path())
            facts = [f"q {node.q:+.3f}", f"step rewards {rewards}", *facts]
        if self.settings.answer is not None:
            facts = [f"answer {render.visible(result.answer or 'none')}", *facts]
        screen.print("; ".join(facts), style="dim", soft_wrap=True)
        screen.print()


def _step(node: Node) -> dict[str, Any]:
    step: dict[str, Any] = {"text": node.text, "tokens": len(node.token_ids), "value": node.value}
    if node.scored_by(node.tree.primary):
        step |= {"reward": node.reward, "q": node.q}
    return step


def _encode(items: Sequence[Item], models: Participants[Any]) -> list[tuple[Prompt, int]]:
    """Prompts with their token ids, and how many equal ones came before. Raises BadInput saying where one stands."""
    seen: Counter[tuple[int, ...]] = Counter()
    encoded = []
    for item in items:
        try:
            prompt = models.encode(item.prompt)
        except ValueError as error:
            raise BadInput(f"{item.where}: {reason(error)}") from error
        ids = prompt.token_ids or ()
        encoded.append((prompt, seen[ids]))
        seen[ids] += 1
    return encoded


def _prompts(given: list[str] | None, file: str | None, chat: bool, system: str | None) -> list[Item]:
    if bool(given) == (file is not None):
        raise BadInput("prompts are needed: --prompt (once or more), or --prompts-file")
    if file is not None:
        return read_items(file, chat=chat, system=system)
    wheres = [f"--prompt {number}" for number in range(1, len(given or ()) + 1)]
    return [Item(where, prompt_of(text, where, chat, system)) for where, text in zip(wheres, given or (), strict=True)]


def _blind(strategy: Strategy, select: str) -> bool:
    """Whether the search needs no rewards."""
    return isinstance(strategy, BestOfN) and (strategy.n == 1 or select == "majority")
