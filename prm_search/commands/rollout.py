"""``prm-search rollout``: responses to problems with known answers, labelled, for training."""

from __future__ import annotations

import sys
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any

import typer

from ..checks import MANY
from ..problems import Problem
from ..training.rollouts import Rollout, sample_rollouts
from . import groups, options
from .config import Common
from .grouped import grouped
from .problems import at_lines, encoded
from .progress import Bar
from .records import Item, RecordFile, digests, report
from .workers import Failures, Workers, absolute, load_policy, place_of, sent_whole


@dataclass(frozen=True, kw_only=True)
class Count:
    """The number of responses. Raises BadInput for a number out of range."""

    n: Annotated[int, typer.Option("--n", help="Responses a problem.", rich_help_panel=options.SAMPLING)] = 8

    def __post_init__(self) -> None:
        options.at_least("--n", self.n, 1, MANY)


@grouped
def rollout(
    policy: groups.Policy,
    place: groups.Place,
    data: groups.Data,
    labels: groups.Labels,
    count: Count,
    draws: groups.SeededDraws,
    workers: Workers,
    records: groups.OutFile,
    common: Common,
) -> None:
    """Sample responses to problems with known answers, and label each right or wrong."""
    judge, sampling, n = labels.judge(), draws.sampling(), count.n
    items = data.problems(data.data)
    keys = digests(
        [item for item in items for _ in range(n)],
        "rollout", policy.policy, place.dtype, labels.label, labels.answer, repr(sampling), *policy.names(),
    )  # fmt: skip
    with RecordFile(records.out, keys, resume=records.resume) as file:
        done = dict(file.done)
        bar = Bar("responses", len(keys) - len(done))
        failures = Failures(items, bar)
        how: dict[str, Any] = {
            "n": n, "sampling": sampling, "label": judge, "batch": records.batch,
            "done": {divmod(place, n) for place in done},
        }  # fmt: skip
        try:
            if workers.ray is None:
                drawn = _here(items, policy, place, failures, how)
            else:
                drawn = _on_workers(items, policy, place, workers, failures, how)
            with bar:
                for sample in drawn:
                    item, index = items[sample.problem], sample.problem * n + sample.sample
                    record = {"index": index, "key": keys[index], **item.extra, **sample.record()}
                    record["reference_answer"] = item.response
                    file.write(record)
                    done[index] = record
                    bar.tick(len(sample.response_ids))
            file.put_in_order()
        finally:
            report(file, len(done), len(keys))
    print(summary(done.values()), file=sys.stderr)
    failures.check()


def _here(
    items: Sequence[Item], policy: groups.Policy, place: groups.Place, failures: Failures, how: Mapping[str, Any]
) -> Iterator[Rollout]:
    """Responses that this process samples."""
    from .models import quiet

    def lost(problem: int, sample: int, error: Exception) -> None:
        failures.lost(problem, f"response {sample}: {error}")

    quiet()
    sampler = policy.load(policy.policy, place)
    failures.bar.watch(sampler)
    return sample_rollouts([encoded(item, sampler) for item in items], policy=sampler, on_failure=lost, **how)


def _on_workers(
    items: Sequence[Item],
    policy: groups.Policy,
    place: groups.Place,
    workers: Workers,
    failures: Failures,
    how: Mapping[str, Any],
) -> Iterator[Rollout]:
    """The same responses by the workers of a cluster."""
    from ..distributed import rollout as distributed_rollout

    problems = [Problem(item.prompt, str(item.response)) for item in items]
    with workers.open(failures.bar) as cluster, at_lines(items):
        sent_whole(how["label"].same, how["label"].answer)
        load = partial(load_policy, policy, absolute(policy.policy), place_of(place, cluster, policy.engine))
        yield from distributed_rollout(problems, cluster=cluster, policy=load, on_failure=failures, **how)


def summary(records: Iterable[Mapping[str, Any]]) -> str:
    """Return what a file of rollouts holds, by label."""
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
