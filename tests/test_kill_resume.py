"""Commands killed by SIGKILL and started again with --resume: nothing is lost, doubled or altered.

In `make soak` hundreds of kills at random points, with a table of them.
"""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from killing import Kill, Server
from records import lines, same, untimed
from safetensors.numpy import load_file
from soak import SOAK

from prm_search.demo import pair_dir
from prm_search.demo.chains import problems

POLICY = str(pair_dir() / "policy")
# Each command, the file of its records, and how many there are.
COMMANDS: dict[str, tuple[list[str], str, int]] = {
    "rollout": (
        ["rollout", "--policy", "demo", "--data", "problems.jsonl", "--n", "3", "--label", "exact", "--batch", "2",
         "--out", "out"], "out", 18,
    ),
    "generate": (
        ["generate", "--policy", "demo", "--pair", "demo", "--prompts-file", "prompts.txt", "--width", "2",
         "--expansions", "2", "--tree", "--batch", "2", "--out", "out"], "out", 6,
    ),
    "score": (["score", "--pair", "demo", "--data", "responses.jsonl", "--batch", "2", "--out", "out"], "out", 6),
    "eval": (
        ["eval", "--policy", "demo", "--pair", "demo", "--data", "problems.jsonl", "--label", "exact",
         "--strategies", "majority,best_of_n,beam", "--budgets", "2,4", "--batch", "2", "--out", "out"],
        "out/records.jsonl", 18,
    ),
    "train": (
        ["train", "--model", POLICY, "--rollouts", "rollouts.jsonl", "--out", "out", "--lr", "1e-3", "--holdout", "0",
         "--batch", "4", "--micro-batch", "2", "--epochs", "3", "--save-steps", "5"], "out/log.jsonl", 27,
    ),
}  # fmt: skip


@dataclass
class Tally:
    """What became of the records of one command: kills that met it running, and what was lost, doubled and altered."""

    kills: int = 0
    lost: list[Any] = field(default_factory=list)
    doubled: list[Any] = field(default_factory=list)
    altered: list[Any] = field(default_factory=list)

    def compare(self, found: list[dict[str, Any]], expected: list[dict[str, Any]], index: str) -> None:
        """Take in what a run that was killed and resumed has, beside one that was not."""
        by_index = {record[index]: record for record in found}
        self.lost += [record[index] for record in expected if record[index] not in by_index]
        self.doubled += [record[index] for record in found if by_index[record[index]] is not record]
        for record in expected:
            other = by_index.get(record[index], record)
            if not same(untimed(other), untimed(record)):
                self.altered.append(record[index])

    def __str__(self) -> str:
        return f"{self.kills:6} {len(self.lost):5} {len(self.doubled):8} {len(self.altered):8}"


@dataclass
class Place:
    """A folder with inputs, and the server of runs; `whole` has what each command gives when nobody kills it."""

    server: Server
    folder: Path
    whole: dict[str, tuple[list[dict[str, Any]], dict[str, Any]]] = field(default_factory=dict)

    def result(self, name: str) -> tuple[list[dict[str, Any]], dict[str, Any]]:
        """The records of a finished run, and for train the weights."""
        weights = load_file(self.folder / "out/model.safetensors") if name == "train" else {}
        return lines(self.folder / COMMANDS[name][1]), weights

    def clear(self) -> None:
        """Take away what a run made."""
        for path in [*self.folder.glob("out*"), *self.folder.glob("reference-*")]:
            shutil.rmtree(path) if path.is_dir() else path.unlink()

    def said(self) -> str:
        """What the last run printed."""
        return (self.folder / "said").read_text()

    def whole_run(self, name: str) -> tuple[list[dict[str, Any]], dict[str, Any]]:
        """The result without a kill; computed once."""
        if name not in self.whole:
            self.clear()
            assert self.server.run(self.folder, COMMANDS[name][0]) == 0, self.said()
            self.whole[name] = self.result(name)
            assert len(self.whole[name][0]) == (COMMANDS[name][2] if name != "train" else len(self.whole[name][0]))
        return self.whole[name]

    def kill_and_resume(self, name: str, kills: list[Kill], tally: Tally) -> None:
        """Start a command, kill it, go on, kill it again ...; let it end, and compare."""
        expected, weights = self.whole_run(name)
        self.clear()
        for kill in kills:
            status = self.server.run(self.folder, [*COMMANDS[name][0], "--resume"], kill)
            assert status in (0, -9), self.said()
            tally.kills += status == -9
            if status == 0:  # it ended before
                break
        if not (name == "train" and (self.folder / "out/pair.json").exists()):
            assert self.server.run(self.folder, [*COMMANDS[name][0], "--resume"]) == 0, self.said()
        found, trained = self.result(name)
        tally.compare(found, expected, "step" if name == "train" else "index")
        if any(abs(trained[key] - weights[key]).max() > 1e-6 for key in weights):
            tally.altered.append("weights")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    """Inputs of every command."""
    folder = tmp_path_factory.mktemp("killed")
    asked = problems(6, length=3)
    (folder / "prompts.txt").write_text("".join(each.prompt + "\n" for each in asked))
    with (folder / "problems.jsonl").open("w") as file:
        file.writelines(json.dumps({"question": each.prompt, "answer": each.answer}) + "\n" for each in asked)
    with (folder / "responses.jsonl").open("w") as file:
        for each in asked:
            response = ";".join(f"a+{i}={i}" for i in range(1, 4))
            file.write(json.dumps({"prompt": each.prompt, "response": response}) + "\n")
    with (folder / "rollouts.jsonl").open("w") as file:
        for i in range(36):
            record = {"index": i, "prompt_ids": [1, 5 + i % 6], "response_ids": [6 + i % 11, 7 + i % 5, 2]}
            file.write(json.dumps(record | {"label": i % 2}) + "\n")
    with Server() as server:
        yield Place(server, folder)


@pytest.mark.parametrize("name", COMMANDS)
def test_killed_and_resumed_nothing_is_lost_doubled_or_altered(name, place):
    """After a record, in the middle of a line, and at the moment the signal happens to arrive."""
    tally = Tally()
    first, second, third = (2, 4, 3) if name != "train" else (7, 6, 8)
    kills = [Kill(first, "after"), Kill(second, "within" if name != "train" else "after"), Kill(third, "about")]
    place.kill_and_resume(name, kills[:2], tally)
    assert tally.kills == 2
    place.kill_and_resume(name, kills[2:], tally)
    assert tally == Tally(kills=tally.kills)


@pytest.mark.soak
def test_hundreds_of_kills(place, capsys):
    """A table of kills at random points of random kinds; several in one run."""
    rng = random.Random()
    seed = rng.randrange(1 << 32)
    rng.seed(seed)
    tallies = {name: Tally() for name in COMMANDS}
    for name, tally in tallies.items():
        wanted = (5 if name == "train" else 15) * max(SOAK, 1)
        while tally.kills < wanted:
            count = COMMANDS[name][2]
            hows = ["after", "about"] if name == "train" else ["after", "within", "about"]
            kills = [Kill(rng.randint(1, count), rng.choice(hows)) for _ in range(rng.randint(1, 4))]
            place.kill_and_resume(name, kills, tally)
    with capsys.disabled():
        print(f"\nseed {seed}\n{'':10} {'kills':>6} {'lost':>5} {'doubled':>8} {'altered':>8}")
        for name, tally in tallies.items():
            print(f"{name:10} {tally}")
    assert {name: tally for name, tally in tallies.items() if tally != Tally(kills=tally.kills)} == {}
