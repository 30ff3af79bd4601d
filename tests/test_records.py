"""Files of records: one writer at a time, each record once, and nothing that cannot be written or read again."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from prm_search.cli import main
from prm_search.commands import BadInput
from prm_search.commands.records import RecordFile, dumps, finished
from prm_search.commands.responses import read_responses
from prm_search.demo import pair_dir
from prm_search.files import one_writer, parse_json
from prm_search.training.data import read_rollouts

HOLD = """
import sys
from prm_search.files import one_writer
with one_writer(sys.argv[1]):
    print("held", flush=True)
    sys.stdin.read()
"""


@contextmanager
def another_writer(path: object) -> Iterator[subprocess.Popen[str]]:
    """A process that writes this file, until it is told to end or is killed."""
    command = [sys.executable, "-c", HOLD, str(path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with an input for every command, which is the current one."""
    monkeypatch.chdir(tmp_path)
    Path("problems.jsonl").write_text('{"question": "=5a*7?", "answer": "5"}\n{"question": "=3a+1?", "answer": "4"}\n')
    Path("responses.jsonl").write_text('{"prompt": "=5a*7?", "response": "a*7=5"}\n')
    Path("solutions.jsonl").write_text('{"problem": "=5a*7?", "steps": ["a*7=5"], "label": -1}\n')
    Path("rollouts.jsonl").write_text(
        "".join(
            json.dumps({"prompt_ids": [1, 5 + i], "response_ids": [6, 7], "label": i % 2, "index": i}) + "\n"
            for i in range(4)
        )
    )
    return tmp_path


POLICY, PAIR = ["--policy", "demo"], ["--pair", "demo"]
WRITERS = {
    "rollout": (["rollout", *POLICY, "--data", "problems.jsonl", "--n", "1", "--label", "exact"], ""),
    "generate": (["generate", *POLICY, *PAIR, "--prompt", "=5a*7?", "--width", "1", "--expansions", "1"], ""),
    "score": (["score", *PAIR, "--data", "responses.jsonl"], ""),
    "eval": (["eval", *POLICY, "--data", "problems.jsonl", "--strategies", "greedy", "--label", "exact"],
             "records.jsonl"),
    "eval-steps": (["eval-steps", *PAIR, "--data", "solutions.jsonl", "--delimiter", ";"], "steps.jsonl"),
    "train": (["train", "--model", str(pair_dir() / "policy"), "--rollouts", "rollouts.jsonl", "--holdout", "0"],
              "train"),
    "export-tree": (["export-tree", "none.jsonl"], ""),
}  # fmt: skip


@pytest.mark.parametrize("command", WRITERS)
def test_a_second_process_is_refused_by_name(command, folder, capsys):
    words, inside = WRITERS[command]
    path = Path("out") / inside
    with another_writer(path):
        assert main([*words, "--out", "out"]) == 2
        assert f"{path} is being written by another process" in capsys.readouterr().err
        assert not path.exists()


def test_the_lock_dies_with_its_process(folder):
    with another_writer("r/out.jsonl") as process:
        process.kill()
        process.wait()
        with one_writer("r/out.jsonl"):
            Path("r/out.jsonl").write_text("x\n")
    assert [path.name for path in Path("r").iterdir()] == ["out.jsonl"]


def test_a_refused_process_leaves_the_file_of_the_other_alone(folder):
    """What the other has not written anything to yet, and then has."""
    with RecordFile("out.jsonl", ["a", "b"], resume=False) as file:
        for text in ("", '{"index": 0, "key": "a"}\n'):
            assert Path("out.jsonl").read_text() == text
            with pytest.raises(ValueError, match=r"out\.jsonl is being written"):
                RecordFile("out.jsonl", ["a", "b"], resume=True)
            assert Path("out.jsonl").read_text() == text
            if not text:
                file.write({"index": 0, "key": "a"})
    assert [path.name for path in folder.glob("out*")] == ["out.jsonl"]


def test_folders_are_made_and_go_again_if_nothing_is_written(folder):
    with pytest.raises(KeyError), RecordFile("r/s/out.jsonl", ["a"], resume=False):
        raise KeyError
    assert not Path("r").exists()
    with RecordFile("r/s/out.jsonl", ["a"], resume=False) as file:
        file.write({"index": 0, "key": "a"})
    assert [str(path) for path in Path("r").rglob("*")] == ["r/s", "r/s/out.jsonl"]


def test_an_empty_file_of_the_user_stays(folder):
    Path("out.jsonl").touch()
    with RecordFile("out.jsonl", ["a"], resume=False):
        pass
    assert Path("out.jsonl").exists()


# -- each record once --------------------------------------------------------------------------------------------------

ROLLOUT = {"prompt_ids": [1, 5], "response_ids": [6], "response": "x", "label": 1, "problem": 0, "finish": "stop"}


@pytest.mark.parametrize("key", [{}, {"key": "k"}])
@pytest.mark.parametrize(
    "read",
    [
        lambda: RecordFile("f.jsonl", ["k", "k"], resume=True),
        lambda: finished(Path("f.jsonl")),
        lambda: read_rollouts("f.jsonl"),
        lambda: read_responses("f.jsonl"),
    ],
    ids=["resume", "finished", "rollouts", "responses"],
)
def test_a_record_that_stands_twice_is_refused_by_name(read, key, folder, request):
    if not key and "resume" in request.node.name:
        key = {"key": "k"}
    rows = [{"index": index, **key, **ROLLOUT} for index in (0, 1, 0)]
    Path("f.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(ValueError, match=r"f\.jsonl, line 3: index 0 stands in f\.jsonl, line 1 already"):
        read()


def test_files_of_other_settings_may_be_put_together(folder):
    rows = [{"index": 0, "key": key, **ROLLOUT} for key in "ab"]
    Path("f.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert len(read_rollouts("f.jsonl")) == 2


# -- what cannot be written --------------------------------------------------------------------------------------------


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs the device that is always full")
def test_a_full_disk_is_named(folder, capsys):
    assert main(["score", *PAIR, "--data", "responses.jsonl", "--out", "/dev/full"]) == 2
    assert capsys.readouterr().err == "prm-search: --out /dev/full cannot be written: No space left on device\n"


def test_half_a_record_is_taken_back_when_the_disk_is_full(folder, monkeypatch):
    """A disk with room for 30 bytes more: what was whole stays, and --resume goes on where it was."""
    with RecordFile("out.jsonl", ["a", "b"], resume=False) as file:
        file.write({"index": 0, "key": "a"})
        disk = file._file

        class Full:
            room = 10

            def write(self, part: memoryview) -> int:
                if not self.room:
                    raise OSError(28, "No space left on device")
                count = disk.write(part[: self.room])
                self.room -= count
                return count

            def __getattr__(self, name: str) -> object:
                return getattr(disk, name)

        file._file = Full()
        with pytest.raises(BadInput, match=r"--out out\.jsonl cannot be written: No space left"):
            file.write({"index": 1, "key": "b"})
    assert Path("out.jsonl").read_text() == '{"index": 0, "key": "a"}\n'
    with RecordFile("out.jsonl", ["a", "b"], resume=True) as file:
        assert sorted(file.done) == [0]


def test_half_a_character_is_written_escaped(folder):
    record = {"index": 0, "key": "a", "id": "x\ud800", "text": "四", "value": float("nan")}
    assert json.loads(dumps(record).encode()) == record | {"value": None}
    with RecordFile("out.jsonl", ["a"], resume=False) as file:
        file.write(record)
    with RecordFile("out.jsonl", ["a"], resume=True) as file:
        assert file.done[0]["id"] == "x\ud800"


@pytest.mark.parametrize("where", ["d", "f/x.jsonl"])
def test_an_out_that_is_a_folder_or_below_a_file(where, folder, capsys):
    Path("d").mkdir()
    Path("f").touch()
    assert main(["score", *PAIR, "--data", "responses.jsonl", "--out", where]) == 2
    said = capsys.readouterr().err
    assert f"--out {where} " in said
    assert said.count("\n") == 1


# -- JSON --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", r"f, line 1: not JSON \(Expecting property name"),
        ("[" * 5000, "f, line 1: JSON that is nested too deep"),
        ('{"a":' * 5000 + "1" + "}" * 5000, "f, line 1: JSON that is nested too deep"),
        ("9" * 5000, r"f, line 1: Exceeds the limit \(4300 digits\)"),
        (b'{"a": "\xff"}', r"f, line 1: not UTF-8 \(byte 7\)"),
    ],
)
def test_json_that_cannot_be_read_is_named(text, said):
    with pytest.raises(ValueError, match=said) as raised:
        parse_json(text, "f, line 1")
    assert "\n" not in str(raised.value)
