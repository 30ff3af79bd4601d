"""Many workers without many machines: the schedule of `prm_search.distributed` under simulated time.

    python benchmarks/scale_simulation.py                 # the tables of docs/scale.md
    python benchmarks/scale_simulation.py --measure       # what a message and a record cost the driver, on Ray, here

What is handed out to whom, tries, and what becomes of a dead worker's problems are the product's own `Schedule`. The
rest is simulated:

* A worker has `batch` problems under way. Each takes a lognormal time, whatever else is under way (a decode loop that
  is bound by memory traffic), and gives out its `rows` records when it ends.
* Records travel as `Worker.run` sends them: a message at once, and the next not before GROUP_SECONDS later.
* The driver is one server with a queue. A message costs it `message` seconds, each record in it `record` seconds more
  (it is parsed, written to the file and counted), and problems for a worker `message` seconds. Both are measured.
* What the driver sends arrives `network` seconds later, and what workers send too.
* Workers load their models for `load` seconds, at first and after each death. Deaths are a Poisson process.

Ideal is every worker full from its first second to the end: all problems' time over workers x batch.
"""

from __future__ import annotations

import argparse
import heapq
import itertools
import json
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from prm_search.distributed.schedule import Schedule
from prm_search.distributed.worker import GROUP_SECONDS, Entry, Feed, Task

WORKERS = (8, 16, 32, 64, 128, 256, 512, 1024)


@dataclass(frozen=True)
class Load:
    """The work, and the workers and driver that do it.

    Attributes:
        name: of its table.
        problems: a worker (`fixed` False), or in all.
        seconds: mean time of a problem.
        spread: sigma of its logarithm.
        rows: records of a problem.
        batch: problems under way in a worker.
        load: seconds until a worker has its models.
        lifetime: mean seconds until a worker dies; inf for never.
        message, record: seconds of the driver.
        network: seconds from the driver to a worker.
    """

    name: str
    problems: int
    fixed: bool = False
    seconds: float = 40.0
    spread: float = 0.5
    rows: int = 8
    batch: int = 32
    load: float = 60.0
    lifetime: float = float("inf")
    message: float = 1.0e-3
    record: float = 0.3e-3
    network: float = 1e-3


@dataclass
class Outcome:
    """One run, in simulated seconds."""

    makespan: float = 0.0
    ideal: float = 0.0
    driver: float = 0.0  # busy
    waited: float = 0.0  # of places in workers, empty while problems waited at the driver
    records: int = 0
    messages: int = 0
    deaths: int = 0
    redone: float = 0.0  # of problems that were begun and lost
    failed: int = 0

    @property
    def efficiency(self) -> float:
        return self.ideal / self.makespan


@dataclass
class _Worker:
    """One worker's present life; what belongs to an earlier one is known by `life`."""

    life: int = 0
    ready: bool = False
    queue: deque[int] = field(default_factory=deque)
    begun: dict[int, float] = field(default_factory=dict)
    empty: list[float] = field(default_factory=list)  # since when each free place is
    unsent: list[int] = field(default_factory=list)
    sent: float = float("-inf")


class Simulation:
    """One run: events in the order of their time."""

    def __init__(self, load: Load, workers: int, seed: int = 0) -> None:
        self.load, self.rng, self.out = load, np.random.default_rng(seed), Outcome()
        count = load.problems if load.fixed else load.problems * workers
        mean = np.log(load.seconds) - load.spread**2 / 2
        self.seconds = self.rng.lognormal(mean, load.spread, count)
        self.schedule = Schedule(range(count), workers=workers, batch=load.batch)
        self.workers = [_Worker() for _ in range(workers)]
        self.out.ideal = float(self.seconds.sum()) / (workers * load.batch)
        self.events: list[tuple[float, int, str, int, int, Any]] = []
        self.order = itertools.count()
        self.free = 0.0  # when the driver is

    def run(self) -> Outcome:
        for worker in range(len(self.workers)):
            self._begin_life(worker, 0.0)
        while self.schedule.active:
            now, _, what, worker, life, content = heapq.heappop(self.events)
            if life == self.workers[worker].life:
                getattr(self, f"_{what}")(now, worker, content)
        return self.out

    def _at(self, when: float, what: str, worker: int, content: Any = None) -> None:
        heapq.heappush(self.events, (when, next(self.order), what, worker, self.workers[worker].life, content))

    def _begin_life(self, worker: int, now: float) -> None:
        self.workers[worker] = _Worker(life=self.workers[worker].life + 1)
        self._at(now + self.load.load, "ready", worker)
        if self.load.lifetime < float("inf"):
            self._at(now + self.load.load + self.rng.exponential(self.load.lifetime), "death", worker)

    def _serve(self, now: float, seconds: float) -> float:
        """Time at which the driver has done a piece of work that reaches it now."""
        self.free = max(self.free, now) + seconds
        self.out.driver += seconds
        return self.free

    def _ready(self, now: float, worker: int, _: Any) -> None:
        state = self.workers[worker]
        state.ready, state.empty = True, [now] * self.load.batch
        self._hand_out(now, worker)

    def _hand_out(self, now: float, worker: int) -> None:
        if self.workers[worker].ready and (places := self.schedule.next(worker)):
            self._at(self._serve(now, self.load.message) + self.load.network, "given", worker, places)

    def _given(self, now: float, worker: int, places: Sequence[int]) -> None:
        self.workers[worker].queue.extend(places)
        self._fill(now, worker)

    def _fill(self, now: float, worker: int) -> None:
        state = self.workers[worker]
        while state.queue and state.empty:
            place = state.queue.popleft()
            self.out.waited += now - state.empty.pop()
            state.begun[place] = now
            self._at(now + self.seconds[place], "ended", worker, place)

    def _ended(self, now: float, worker: int, place: int) -> None:
        state = self.workers[worker]
        del state.begun[place]
        state.empty.append(now)
        self._fill(now, worker)
        state.unsent.append(place)
        if len(state.unsent) == 1:
            self._at(max(now, state.sent + GROUP_SECONDS), "send", worker)

    def _send(self, now: float, worker: int, _: Any) -> None:
        state = self.workers[worker]
        places, state.unsent, state.sent = state.unsent, [], now
        self._at(now + self.load.network, "arrive", worker, places)

    def _arrive(self, now: float, worker: int, places: list[int]) -> None:
        records = len(places) * self.load.rows
        self.out.messages += 1
        self._at(self._serve(now, self.load.message + records * self.load.record), "read", worker, places)

    def _read(self, now: float, worker: int, places: list[int]) -> None:
        for place in places:
            self.schedule.finished(worker, place)
        self.out.records += len(places) * self.load.rows
        self.out.makespan = now
        self._hand_out(now, worker)

    def _death(self, now: float, worker: int, _: Any) -> None:
        state = self.workers[worker]
        self.out.deaths += 1
        self.out.redone += sum(now - began for began in state.begun.values())
        self.out.failed += len(self.schedule.lost(worker, "died").failed)
        self._begin_life(worker, now)
        for other in range(len(self.workers)):
            if self.schedule.waiting and not self.schedule.held(other):
                self._hand_out(now, other)


def table(load: Load, counts: Sequence[int]) -> Iterator[str]:
    """A Markdown table, line by line."""
    yield "| workers | problems | records/s | of ideal | driver busy | messages/s | empty places | deaths | redone |"
    yield "|---:|---:|---:|---:|---:|---:|---:|---:|---:|"
    for workers in counts:
        out = Simulation(load, workers).run()
        span, places = out.makespan, workers * load.batch
        yield (
            f"| {workers} | {out.records // load.rows:,} | {out.records / span:,.0f} | {out.efficiency:.0%} "
            f"| {out.driver / span:.0%} | {out.messages / span:,.0f} | {out.waited / (places * span):.1%} "
            f"| {out.deaths} | {out.redone / (out.ideal * places):.1%} |"
        )


class Echo:
    """Work that costs nothing: records of a rollout's size, to measure the driver.

    Args:
        pause: seconds between records, each of which then is a message; 0 for records in large messages.
        size: tokens of a response.
    """

    forward_calls = 0

    def __init__(self, pause: float, size: int) -> None:
        from prm_search.distributed import worker

        self.pause = pause
        if pause:
            worker.GROUP_SECONDS = 0.0
        self.record = {"prompt_ids": list(range(100)), "response_ids": list(range(size)), "response": "a" * 3 * size}

    def encode(self, prompt: Any) -> tuple[int, ...]:
        return (1,)

    def run(self, feed: Feed) -> Iterator[Entry]:
        while True:
            for task in feed.take(32, wait=True):
                for index in task.wanted:
                    time.sleep(self.pause)
                    yield Entry(task.place, index, self.record | {"index": index})


def measure(problems: int, rows: int = 8, size: int = 300) -> dict[str, float]:
    """Seconds that a record and a message cost the driver: processor time of this process, by a least-squares fit."""
    import tempfile
    from functools import partial

    from prm_search.commands.records import RecordFile
    from prm_search.distributed import Cluster
    from prm_search.distributed.crew import Crew

    taken = {}
    with Cluster("local", workers=1, gpus_per_worker=0) as cluster, tempfile.TemporaryDirectory() as folder:
        for name, pause in (("single", 0.005), ("grouped", 0.0)):
            tasks = {i: Task(i, tuple(range(i * rows, (i + 1) * rows)), None) for i in range(problems)}
            keys = [f"{index:016x}" for index in range(problems * rows)]
            with (
                Crew(cluster, partial(Echo, pause, size)) as crew,
                RecordFile(f"{folder}/{name}", keys, resume=False) as file,
            ):
                crew.encode([])
                schedule = Schedule(tasks, workers=1, batch=32)
                before, began = time.process_time(), time.perf_counter()
                for index, record in crew.run(tasks, schedule, print):
                    file.write({"key": keys[index], **record})
                taken[name] = (time.process_time() - before) / len(keys)
                taken[f"{name} wall"] = (time.perf_counter() - began) / len(keys)
    return {
        "record seconds": taken["grouped"], "message seconds": taken["single"] - taken["grouped"],
        "records a second, in large messages": 1 / taken["grouped wall"],
    }  # fmt: skip


LOADS = (
    Load("long answers, 64 problems a worker (40 s each, 8 records, 32 under way)", 64),
    Load("long answers, 256 problems a worker", 256),
    Load("short answers, 512 problems a worker (1 s each)", 512, seconds=1.0),
    Load("12,000 problems in all (40 s each)", 12_000, fixed=True),
    Load("256 problems a worker, a worker lives 30 minutes", 256, lifetime=1800.0),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--measure", action="store_true", help="measure what the driver costs, on Ray, and print it")
    parser.add_argument("--problems", type=int, default=500, help="with --measure")
    parser.add_argument("--workers", type=int, nargs="+", default=WORKERS)
    parser.add_argument("--message", type=float, default=Load.message, help="seconds of the driver")
    parser.add_argument("--record", type=float, default=Load.record, help="seconds of the driver")
    parser.add_argument("--out", type=Path, help="a file for the tables; default: standard output")
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measure(options.problems), indent=2))
        return
    lines = [f"A message costs the driver {options.message * 1e3:g} ms, a record {options.record * 1e3:g} ms.", ""]
    for load in LOADS:
        costed = replace(load, message=options.message, record=options.record)
        lines += [f"**{load.name}**", "", *table(costed, options.workers), ""]
    text = "\n".join(lines)
    print(text) if options.out is None else options.out.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
