"""search and asearch: prompts in, a Result each out."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from os import PathLike
from typing import Any, Literal

from .answers import Answer, Select
from .checks import require
from .driver.async_loop import AsyncSearchLoop
from .driver.budget import Budget
from .driver.loop import Job, SearchLoop
from .driver.result import Event, Result
from .driver.search_settings import SearchSettings
from .prompt import numbered
from .protocols import AsyncPolicy, Policy, Scorer
from .recording import Recorder, told_by
from .steps import StepRule
from .strategies import Steer, Strategy
from .tree import Prompt
from .values import Value

__all__ = ["AsyncSearchLoop", "Event", "Result", "SearchLoop", "SearchSettings", "Settings", "asearch", "search"]

Settings = SearchSettings  # its former name

PromptLike = Prompt | str | Sequence[int] | Sequence[Mapping[str, Any]]


def search(
    prompts: Iterable[PromptLike],
    *,
    policy: Policy,
    scorer: Scorer | None = None,
    strategy: Strategy | str = "beam",
    steps: StepRule | None = None,
    max_new_tokens: int = 1024,
    temperature: float = 0.8,
    top_p: float = 1.0,
    top_k: int = 0,
    min_p: float = 0.0,
    seed: int = 0,
    stop: str | Sequence[str] | None = None,
    include_stop_str: bool = False,
    select: Select | None = None,
    answer: str | Answer | None = None,
    prover: Scorer | None = None,
    budget: Budget | int | None = None,
    value: Value | str | None = None,
    weight: Literal["softmax", "sigmoid"] = "softmax",
    weight_temperature: float = 1.0,
    confidence_tokens: int = 0,
    record: str | PathLike[str] | None = None,
    on_event: Callable[[Event], object] | None = None,
) -> list[Result]:
    """Sample reasoning steps for each prompt, score every step, keep the good ones.

    Every draw is a function of the seed, the prompt and its place in the search alone. The batching and the order of
    prompts change no token.

    Args:
        prompts: strings, lists of chat messages, lists of token ids, or Prompts. The n-th of equal prompts draws
            differently from the others.
        policy: samples steps.
        scorer: rewards them; without one every value is 0 and ties keep draw order.
        strategy: how to search, or the name of a strategy for its default configuration.
        steps: where a step ends; None for StepRule(), blank lines.
        max_new_tokens: tokens of a response; the context of the policy, or of a pair, may leave fewer.
        temperature, top_p, top_k, min_p: see Sampling. 0.8 is the usual temperature of search with a PRM.
        seed: of every draw.
        stop: strings; the first to complete ends the response, even if it spreads over several tokens or steps. Nothing
            is drawn behind it, and no text behind it is scored.
        include_stop_str: keep it in the texts. Else they end before it; it is one of the tokens in any case.
        select: "best", "majority" or "weighted" (see answers.select); None for the strategy's own, which is "best"
            unless it is made for votes (SelfConsistency, DeepConf). Responses that a length or a budget cut are
            chosen only where none is complete.
        answer: finds the final answer in a response: "boxed", "####", "number", a function, or None.
        prover: a second scorer. Unless a value says otherwise, nodes are then ranked by Advantage(prover=prover.name).
        budget: limits of each prompt's search; an integer limits its sampled tokens.
        value: what nodes are ranked by: a name, a function of a node, or None for the strategy's, or else q.
        weight, weight_temperature: of a weighted vote.
        confidence_tokens: record how sure the policy was of each token, over so many of the most probable ones (20 in
            DeepConf), as Node.confidences; 0 records nothing and costs nothing.
        record: a file to write every draw and score to, each prompt's as its search ends; see recording.Recorder.
        on_event: called with every Event, in this thread.

    Returns:
        One Result a prompt, in order.

    Raises:
        ValueError: an argument is out of range, or a prompt is empty or too long (the message names the prompt). Raised
            before anything is sampled.
        TypeError: an argument is of the wrong kind; also a single string instead of a list.
    """
    settings = SearchSettings.make(
        strategy=strategy,
        steps=steps,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        min_p=min_p,
        seed=seed,
        stop=stop,
        include_stop_str=include_stop_str,
        select=select,
        answer=answer,
        budget=budget,
        value=value,
        weight=weight,
        weight_temperature=weight_temperature,
        confidence_tokens=confidence_tokens,
    )
    prompt_list = _listed(prompts)
    require("policy", policy, Policy)
    if isinstance(settings.strategy, Steer):
        policy = settings.strategy.wrap(policy, scorer)
    if record is not None and getattr(policy, "alpha", None) is not None:
        raise ValueError("record: a recording keeps a policy's own draws, and this one is steered")
    with SearchLoop(policy, scorer, prover, on_event=on_event) as loop:
        encoded = encode_all(prompt_list, loop.models.encode)
        jobs = [Job(prompt, settings, occurrence, index) for index, (prompt, occurrence) in enumerate(encoded)]
        results = {}
        with nullcontext() if record is None else Recorder(record) as recorder:
            for job, result in loop.run(jobs, len(jobs)):
                results[job.place] = result
                if recorder is not None:
                    recorder.add(result.tree, settings.sampling, **told_by(policy, scorer, prover))
        for result in results.values():
            loop.models.read_batch(result.usage)
    return [results[job.place] for job in jobs]


async def asearch(
    prompts: Iterable[PromptLike],
    *,
    policy: AsyncPolicy,
    scorer: Scorer | None = None,
    prover: Scorer | None = None,
    on_event: Callable[[Event], object] | None = None,
    **options: Any,
) -> list[Result]:
    """`search` on the running event loop, over a policy whose requests are coroutines.

    Args:
        prompts, prover, on_event: as in `search`.
        policy: see AsyncPolicy.
        scorer: as in `search`; `ascore_nodes` is awaited where it has that, otherwise score_nodes runs in a thread.
        options: the other arguments of `search`, with the same meaning and defaults.

    Returns, Raises: as `search`. Cancelling it cancels every prompt's search.
    """
    settings = SearchSettings.make(**options)
    prompt_list = _listed(prompts)
    require("policy", policy, AsyncPolicy)
    if isinstance(settings.strategy, Steer) and settings.strategy.candidates is None:
        raise ValueError("strategy=Steer(...) needs token by token access to the policy: use search, not asearch")
    loop = AsyncSearchLoop(policy, scorer, prover, on_event=on_event)
    searches = [
        loop.begin(prompt, settings, occurrence=occurrence)
        for prompt, occurrence in encode_all(prompt_list, loop.models.encode)
    ]
    tasks = [asyncio.create_task(prompt_search.run()) for prompt_search in searches]
    try:
        results = list(await asyncio.gather(*tasks))
    except BaseException:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        raise
    for result in results:
        loop.models.read_batch(result.usage)
    return results


def encode_all(
    prompts: Iterable[PromptLike],
    encode: Callable[[Prompt], Prompt],
    name_of: Callable[[int], str] = "prompts[{}]".format,
) -> list[tuple[Prompt, int]]:
    """Prompts with their token ids, and how many equal ones came before each.

    Args:
        prompts: what users pass.
        encode: fills the token ids in, such as Participants.encode.
        name_of: what a prompt is called in an error, by its place.

    Raises:
        ValueError, TypeError: what encode or Prompt say of a prompt, after its name.
    """
    encoded: list[Prompt] = []
    for index, prompt in enumerate(prompts):
        try:
            encoded.append(encode(Prompt.of(prompt)))
        except (ValueError, TypeError) as error:
            kind = ValueError if isinstance(error, ValueError) else TypeError
            raise kind(f"{name_of(index)}: {error}") from error
    return numbered(encoded)


def _listed(prompts: Iterable[PromptLike]) -> list[PromptLike]:
    if isinstance(prompts, str | Prompt | Mapping) or not isinstance(prompts, Iterable):
        raise TypeError(f"prompts must be a list of prompts, got one {type(prompts).__name__}: pass [prompt]")
    return list(prompts)
