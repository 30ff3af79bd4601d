"""``prm-search rollout``: responses to problems with known answers, labelled, for training."""

from __future__ import annotations

import json
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from typing import Annotated, Any

import typer

from ..answers import ANSWERS
from ..problems import LABELS, Judge
from ..protocols import Sampling
from ..steps import StepRule
from ..training.rollouts import sample_rollouts
from . import BadInput, options, render
from .problems import encoded, function_of, read_problems
from .records import RecordFile, digests, report

_SAMPLING = "Sampling"


def rollout(
    policy: Annotated[
        str,
        typer.Option(
            help="The model that samples: hub id, folder, PEFT adapter, .gguf file, or 'demo'.",
            rich_help_panel=options.MODELS,
        ),
    ],
    data: Annotated[
        str,
        typer.Option(
            help="JSON Lines or a name for the package datasets, with question/problem/prompt/messages and "
            "answer/solution, as GSM8K and MATH have them; - is stdin.",
            rich_help_panel=options.DATA,
        ),
    ],
    out: Annotated[
        str,
        typer.Option(help="Write JSON Lines here, each response when it is finished.", rich_help_panel=options.OUTPUT),
    ],
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    engine: options.Engine = "hf",
    engine_options: options.EngineOptions = None,
    config: options.Config = None,
    split: options.Split = "train",
    limit: Annotated[int | None, typer.Option(help="Problems at most.", rich_help_panel=options.DATA)] = None,
    template: options.Template = None,
    chat: options.Chat = False,
    system: options.System = None,
    label: options.Label = "math",
    answer: options.Answer = None,
    n: Annotated[int, typer.Option("--n", help="Responses a problem.", rich_help_panel=_SAMPLING)] = 8,
    temperature: Annotated[float, typer.Option(rich_help_panel=_SAMPLING)] = 1.0,
    top_p: Annotated[float, typer.Option(rich_help_panel=_SAMPLING)] = 1.0,
    top_k: Annotated[int, typer.Option(help="0 keeps all.", rich_help_panel=_SAMPLING)] = 0,
    min_p: Annotated[float, typer.Option(rich_help_panel=_SAMPLING)] = 0.0,
    max_new_tokens: Annotated[int, typer.Option(help="Of one response.", rich_help_panel=_SAMPLING)] = 1024,
    seed: Annotated[int, typer.Option(help="Of every draw.", rich_help_panel=_SAMPLING)] = 0,
    batch: Annotated[
        int, typer.Option(help="Problems sampled together; changes no response.", rich_help_panel=options.OUTPUT)
    ] = 32,
    resume: options.Resume = False,
    debug: options.Debug = False,
) -> None:
    """Sample responses to problems with known answers, and label each right or wrong."""
    arguments = options.engine_options(engine, engine_options)
    options.at_least("--n", n)
    options.at_least("--batch", batch)
    if limit is not None:
        options.at_least("--limit", limit)
    if system is not None and not chat:
        raise BadInput("--system needs --chat")
    judge = make_judge(label, answer)
    sampling = Sampling(StepRule(), temperature, top_p, top_k, min_p, max_new_tokens, seed)
    items = read_problems(
        data,
        config=config,
        split=split,
        limit=limit,
        template=None if template is None else options.unescape(template),
        chat=chat,
        system=system,
    )
    drawn_by = () if engine == "hf" else (engine, json.dumps(arguments, sort_keys=True))
    keys = digests(
        [item for item in items for _ in range(n)],
        "rollout", policy, dtype, label, answer, repr(sampling), *drawn_by,
    )  # fmt: skip
    with RecordFile(out, keys, resume=resume) as file:
        from .models import load_policy, load_vllm_policy, quiet

        records = dict(file.done)
        try:
            quiet()
            if engine == "vllm":
                sampler = load_vllm_policy(policy, device=device, dtype=dtype, options=arguments)
            else:
                sampler = load_policy(policy, device=device, dtype=dtype)
            problems = [encoded(item, sampler) for item in items]
            bar, tick = render.progress("responses", len(keys) - len(records))
            drawn = sample_rollouts(
                problems,
                policy=sampler,
                n=n,
                sampling=sampling,
                label=judge,
                done={divmod(place, n) for place in records},
                batch=batch,
            )
            with bar:
                for each in drawn:
                    item, place = items[each.problem], each.problem * n + each.sample
                    record = {"index": place, "key": keys[place], **item.extra, **each.record()}
                    record["reference_answer"] = item.response
                    file.write(record)
                    records[place] = record
                    tick()
        finally:
            report(file, len(records), len(keys))
    print(summary(records.values()), file=sys.stderr)


def make_judge(label: str, answer: str | None) -> Judge:
    """A Judge of options. Raises BadInput naming the option where one makes no sense."""
    if label not in LABELS and ":" not in label:
        raise BadInput(f"--label {label!r} is unknown; it is one of {', '.join(LABELS)}, or module:function")
    if answer is not None and answer not in ANSWERS and ":" not in answer:
        raise BadInput(f"--answer {answer!r} is unknown; it is one of {', '.join(ANSWERS)}, or module:function")
    if answer is not None and label not in LABELS:
        raise BadInput("--answer is not asked where --label is a function")
    return Judge(
        function_of("--label", label) if ":" in label else label,
        function_of("--answer", answer) if answer is not None and ":" in answer else answer,
    )


def summary(records: Iterable[Mapping[str, Any]]) -> str:
    """What a file of rollouts holds, by label."""
    labels: defaultdict[int, Counter[int]] = defaultdict(Counter)
    cut = 0
    for record in records:
        labels[record["problem"]][record["label"]] += 1
        cut += record["finish"] != "stop"
    right, wrong = (sum(counts[label] for counts in labels.values()) for label in (1, 0))
    mixed = sum(len(counts) == 2 for counts in labels.values())
    share = right / max(1, right + wrong)
    return (
        f"{right + wrong} responses to {len(labels)} problems: {right} right ({share:.1%}), {wrong} wrong "
        f"(of these {cut} cut); {mixed} problems have both"
    )
