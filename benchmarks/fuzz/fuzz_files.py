"""Wrong options and wrong files, through the command line in this process, and the readers of records by themselves."""

from __future__ import annotations

import io
import json
import random
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

from fuzz_cases import Case, Finding, short

import prm_search as ps
from prm_search.cli import main
from prm_search.demo import pair_dir
from prm_search.serving.config import ServeConfig
from prm_search.training.data import read_rollouts

PROMPT = "=5a*7b+3c*9d+8?"
AT_LEAST_ONE = ("0", "-1", "x", "1.5", "nan", "", "1e22")
COUNTS = (*AT_LEAST_ONE, "9" * 30)  # of what is made one by one
WORDS = ("x", "", "none at all")
SHARES = ("nan", "inf", "-1", "x", "")


class Folder:
    """Right files for each command, and places for wrong ones."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._made = 0
        self.right = {
            "scored": self.file({"prompt": PROMPT, "response": "a"}),
            "problems": self.file({"question": PROMPT, "answer": "1"}),
            "prompts": self.file({"prompt": PROMPT}),
            "solutions": self.file({"problem": PROMPT, "steps": ["5;", "6;"], "label": -1}),
            "rollouts": self.file({"prompt_ids": [4], "response_ids": [5], "label": 1, "index": 0}),
        }

    def file(self, *records: Any, suffix: str = ".jsonl") -> str:
        """A file of records; bytes are lines as they are."""
        lines = [each if isinstance(each, bytes) else json.dumps(each).encode() for each in records]
        path = self.new(suffix)
        Path(path).write_bytes(b"\n".join(lines) + b"\n")
        return path

    def new(self, suffix: str = "") -> str:
        """A path that is free."""
        self._made += 1
        return str(self.root / f"{self._made}{suffix}")


def command(*words: str) -> tuple[int, str]:
    """A command's status and what it said on standard error."""
    said = io.StringIO()
    with redirect_stderr(said), redirect_stdout(io.StringIO()):
        try:
            status = main(words)
        except SystemExit as stop:
            status = int(stop.code or 0)
        except Exception:
            raise Finding("traceback", traceback.format_exc().strip().splitlines()[-1]) from None
    return status, said.getvalue()


def refused(names: Sequence[str], *words: str) -> None:
    """Run a command that has to fail, and raise what it came to."""
    status, said = command(*words)
    if status == 0:
        raise Finding("silent", "status 0")
    lines = [line for line in said.splitlines() if line.strip()]
    clear = status == 2 and len(lines) == 1 and any(name in said for name in names)
    raise Finding("clear" if clear else "unclear", f"status {status}, {len(lines)} lines: {said.strip()[-300:]}")


def cases(folder: Folder, rng: random.Random, size: int) -> Iterator[Case]:
    """All of them."""
    yield from _options(folder, rng, size)
    yield from _contents(folder, rng, size)
    yield from _records(folder, rng, size)


def _bases(folder: Folder) -> Mapping[str, list[str]]:
    right, pair = folder.right, ["--pair", "demo"]
    return {
        "generate": [
            "--policy",
            "demo",
            *pair,
            "--prompt",
            PROMPT,
            "--max-new-tokens",
            "2",
            "--n",
            "1",
            "--strategy",
            "best_of_n",
        ],
        "score": [*pair, "--data", right["scored"]],
        "rollout": [
            "--policy",
            "demo",
            "--data",
            right["problems"],
            "--label",
            "exact",
            "--n",
            "1",
            "--max-new-tokens",
            "2",
        ],
        "eval": ["--policy", "demo", *pair, "--data", right["problems"], "--max-new-tokens", "2"],
        "eval-steps": [*pair, "--data", right["solutions"]],
        "train": ["--model", str(pair_dir() / "policy"), "--rollouts", right["rollouts"]],
        "serve": ["--policy", "demo", *pair, "--host", "256.0.0.1"],
    }


OUT = {"rollout", "eval", "eval-steps", "train"}  # commands that need --out
OPTIONS: Mapping[str, Mapping[str, Sequence[str]]] = {
    "generate": {
        "--max-new-tokens": AT_LEAST_ONE,
        "--width": COUNTS,
        "--n": COUNTS,
        "--budget": AT_LEAST_ONE,
        "--batch": COUNTS,
        "--temperature": SHARES,
        "--top-p": SHARES,
        "--min-p": SHARES,
        "--top-k": ("-1", "x", "1.5"),
        "--seed": ("x", "1.5", ""),
        "--strategy": WORDS,
        "--value": WORDS,
        "--select": WORDS,
        "--answer": WORDS,
        "--step-tokens": ("-1", "x", "1.5"),
        "--step-regex": ("(", "a{99999999999}", "x*"),
        "--step-confidence": SHARES,
        "--weight": WORDS,
        "--weight-temperature": SHARES,
        "--budget-nodes": AT_LEAST_ONE,
        "--budget-seconds": SHARES,
        "--beta": SHARES,
        "--dtype": WORDS,
        "--device": WORDS,
        "--engine": WORDS,
        "--prompts-file": ("/no/such/file",),
        "--pair": ("/no/such",),
    },
    "score": {
        "--batch": COUNTS,
        "--beta": SHARES,
        "--step-tokens": ("-1", "x"),
        "--step-regex": ("(",),
        "--data": ("/no/such", "/"),
        "--delimiter": ("",),
        "--dtype": WORDS,
    },
    "rollout": {
        "--n": COUNTS,
        "--limit": AT_LEAST_ONE,
        "--batch": COUNTS,
        "--temperature": SHARES,
        "--max-new-tokens": AT_LEAST_ONE,
        "--label": ("x", "nonsense:f", ""),
        "--answer": WORDS,
        "--data": ("/no/such.jsonl", "/"),
        "--seed": ("x",),
    },
    "eval": {
        "--n": COUNTS,
        "--limit": AT_LEAST_ONE,
        "--strategies": WORDS,
        "--max-new-tokens": AT_LEAST_ONE,
        "--temperature": SHARES,
    },
    "eval-steps": {
        "--folds": ("-1", "x", "1.5"),
        "--limit": AT_LEAST_ONE,
        "--batch": COUNTS,
        "--values": WORDS,
        "--data": ("/no/such.jsonl",),
    },
    "train": {
        "--objective": WORDS,
        "--epochs": ("0", *SHARES),
        "--batch": COUNTS,
        "--lr": ("0", *SHARES),
        "--beta": ("0", *SHARES),
        "--lora": COUNTS,
        "--holdout": ("1", *SHARES),
        "--max-length": COUNTS,
        "--save-steps": COUNTS,
        "--negatives": SHARES,
        "--seed": ("x",),
        "--rollouts": ("/no/such", "/"),
    },
    "serve": {
        "--port": ("-1", "65536", "x"),
        "--max-searches": AT_LEAST_ONE,
        "--max-tokens": AT_LEAST_ONE,
        "--max-children": AT_LEAST_ONE,
        "--max-body": AT_LEAST_ONE,
        "--timeout": ("0", "nan", "-1", "x"),
        "--api-key": ("", "a b"),
        "--engine": WORDS,
    },
}


def _options(folder: Folder, rng: random.Random, size: int) -> Iterator[Case]:
    for name, base in _bases(folder).items():
        out = ["--out", folder.new()] if name in OUT else []
        for option, values in OPTIONS[name].items():
            for given in (
                *values,
                *(str(rng.choice((-rng.random(), rng.randint(-99, -2), "ab c"))) for _ in range(size // 8)),
            ):
                if (option, given) in _RIGHT or (given[:1] in "-ab" and option in _ANY):
                    continue
                words = [name, *_without(base, option), *out, f"{option}={given}"]
                names = _names(option, given)
                yield Case("cli", name, option, short(given), lambda words=words, names=names: refused(names, *words))
        for option in ("--nonsense", "--widht=4", "-q"):
            words = [name, *base, *out, option]
            yield Case(
                "cli", name, option, "", lambda words=words, option=option: refused([option.split("=")[0]], *words)
            )  # type: ignore[misc]


def _names(option: str, given: str) -> list[str]:
    """Return what may name an option: itself, the argument that it is called as, or the path that it was given."""
    return [option, option[2:].replace("-", "_") + "=", option[2:] + ":", *([given] if given.startswith("/") else [])]


_RIGHT = {("--top-k", "0"), ("--seed", "-1")}
_ANY = {"--seed", "--pair", "--prompts-file", "--data", "--rollouts", "--delimiter", "--step-regex", "--api-key"}


def _without(base: Sequence[str], option: str) -> list[str]:
    if option not in base:
        return list(base)
    at = base.index(option)
    return [*base[:at], *base[at + 2 :]]


BROKEN: Sequence[bytes] = (
    b"{",
    b"[]",
    b"5",
    b'"x"',
    b"null",
    b"\xff\xfe\x00",
    b"{} {}",
    b"NaN",
    b'{"prompt": "\\ud800", "response": "a"}',
    b'{"a": ' * 5000 + b"1" + b"}" * 5000,
    b"[" * 100_000,
    b'{"n": ' + b"9" * 5000 + b"}",
    b"{'a': 1}",
    b'{"a": 1,}',
)
WRONG: Mapping[str, Sequence[Any]] = {
    "scored": (
        {"prompt": PROMPT},
        {"response": "a"},
        {"prompt": PROMPT, "response": 5},
        {"prompt": PROMPT, "response": []},
        {"prompt": PROMPT, "response": [1.5]},
        {"prompt": PROMPT, "response": [-1]},
        {"prompt": PROMPT, "response": [10**6]},
        {"prompt": PROMPT, "response": ""},
        {"prompt": "", "response": "a"},
        {"prompt": {}, "response": "a"},
        {"prompt": 5, "response": "a"},
        {"prompt": [10**6], "response": "a"},
        {"prompt": [1.5], "response": "a"},
        {"prompt": PROMPT, "messages": [], "response": "a"},
        {"messages": [{"role": 5}], "response": "a"},
        {"messages": [{}], "response": "a"},
        {"prompt": PROMPT, "response": [10**30]},
        {"prompt": PROMPT * 1000, "response": "a"},
    ),
    "prompts": (
        {"prompt": ""},
        {"prompt": 5},
        {"prompt": []},
        {"prompt": [1.5]},
        {"prompt": [10**6]},
        {"prompt": [-1]},
        {"x": 1},
        {"messages": []},
        {"messages": [{"content": "a"}]},
        {"messages": "a"},
        {"prompt": PROMPT * 1000},
        {"prompt": [True]},
        {"prompt": None},
    ),
    "problems": (
        {"question": PROMPT},
        {"answer": "1"},
        {"question": 5, "answer": "1"},
        {"question": "", "answer": "1"},
        {"question": PROMPT, "answer": None},
        {"question": PROMPT, "answer": [1]},
        {"question": PROMPT, "answer": {}},
        {"question": PROMPT * 1000, "answer": "1"},
        {"question": PROMPT, "answer": ""},
    ),
    "solutions": (
        {"problem": PROMPT, "steps": [], "label": -1},
        {"problem": PROMPT, "steps": ["a"], "label": 1},
        {"problem": PROMPT, "steps": ["a"], "label": -2},
        {"problem": PROMPT, "steps": "a", "label": 0},
        {"problem": PROMPT, "steps": [5], "label": 0},
        {"problem": "", "steps": ["a"], "label": 0},
        {"problem": PROMPT, "steps": ["a"], "label": "x"},
        {"problem": PROMPT, "steps": ["a"], "label": 0.5},
        {"steps": ["a"], "label": 0},
        {"problem": PROMPT, "steps": ["a"]},
        {"problem": PROMPT, "steps": [""], "label": 0},
        {"problem": PROMPT, "label": 0},
        {"problem": PROMPT, "steps": ["a"], "label": True},
    ),
    "rollouts": (
        {"prompt_ids": [], "response_ids": [5], "label": 1},
        {"prompt_ids": [4], "response_ids": [], "label": 1},
        {"prompt_ids": [4], "response_ids": [1.5], "label": 1},
        {"prompt_ids": [4], "response_ids": [-1], "label": 1},
        {"prompt_ids": [4], "response_ids": [5], "label": 2},
        {"prompt_ids": [4], "response_ids": [5], "label": "1"},
        {"prompt_ids": [4], "response_ids": [5], "label": None},
        {"prompt_ids": [4], "response_ids": [5]},
        {"prompt_ids": "4", "response_ids": [5], "label": 1},
        {"prompt_ids": [[4]], "response_ids": [5], "label": 1},
        {"prompt_ids": [4], "response_ids": [10**30], "label": 1},
        {"prompt_ids": [4], "response_ids": [5], "label": 1, "logprobs": [1, 2]},
        {"prompt_ids": [4], "response_ids": [5], "label": 1, "logprobs": ["x"]},
        {"prompt_ids": [4], "response_ids": [5], "label": 1, "index": "x"},
        {"prompt_ids": [True], "response_ids": [5], "label": 1},
        {"prompt_ids": [4], "response_ids": [5], "label": 1, "logprobs": [0.5]},
    ),
    "trees": (
        {"tree": 5},
        {"tree": {}},
        {"tree": {"nodes": []}},
        {"tree": None},
        {"x": 1},
        {"tree": {"prompt": "a", "nodes": [5]}},
        {"tree": []},
    ),
}
READERS: Mapping[str, tuple[str, str]] = {  # kind of file -> the command that reads it, and its option
    "scored": ("score", "--data"),
    "prompts": ("generate", "--prompts-file"),
    "problems": ("rollout", "--data"),
    "solutions": ("eval-steps", "--data"),
    "rollouts": ("train", "--rollouts"),
    "trees": ("export-tree", ""),
}


def _contents(folder: Folder, rng: random.Random, size: int) -> Iterator[Case]:
    """Files whose second line is wrong: the message has to say which line of which file."""
    bases = _bases(folder)
    for kind, (name, option) in READERS.items():
        first = [json.loads(Path(folder.right[kind]).read_text())] if kind in folder.right else []
        whole = json.dumps(first[0] if first else {"tree": {}}).encode()
        cut = [whole[: rng.randrange(1, len(whole) - 1)] for _ in range(size // 4)]
        for wrong in (*BROKEN, *WRONG[kind], *cut):
            path = folder.file(*first, wrong)
            where = f"{path}, line {len(first) + 1}"
            base = [] if name == "export-tree" else _without(bases[name], "--prompt" if name == "generate" else option)
            out = ["--out", folder.new()] if name in OUT or name == "export-tree" else []
            words = [name, *base, *out, *([path] if not option else [option, path])]
            yield Case(
                "cli",
                f"{name} (file)",
                f"line {len(first) + 1}",
                short(wrong),
                lambda words=words, where=where: refused([where], *words),
            )  # type: ignore[misc]
    for text in ("[1]", "5", "x: [", "nonsense: 1", "batch: x", "batch: [1]", "\x00", "batch: {a: 1}", "help: true"):
        path = folder.new(".yaml")
        Path(path).write_text(text)
        words = ["score", *bases["score"], "--config", path]
        yield Case(
            "cli", "score", "--config", short(text), lambda words=words, path=path: refused([path, "--batch"], *words)
        )  # type: ignore[misc]


def _records(folder: Folder, rng: random.Random, size: int) -> Iterator[Case]:
    """The readers that the API has."""
    for wrong in (*BROKEN, *WRONG["rollouts"]):
        path = folder.file(wrong)
        yield Case(
            "records", "read_rollouts", "line 1", short(wrong), lambda path=path: read_rollouts(path), f"{path}, line 1"
        )  # type: ignore[misc]
    tree = ps.SearchTree(ps.Prompt(token_ids=(4,)))
    tree.add(tree.add(tree.root, [5, 6]), [7], finish="stop")
    plain = json.loads(tree.to_json()) if isinstance(tree.to_json(), str) else tree.to_json()
    for argument, changed in _changed(plain, rng, 12 * size):
        given = json.dumps(changed) if isinstance(tree.to_json(), str) else changed
        yield Case(
            "records",
            "SearchTree.from_json",
            argument,
            short(changed),
            lambda given=given: ps.SearchTree.from_json(given),
        )  # type: ignore[misc]
    for argument, section in (
        ("pair", {}),
        ("bta", {"pair": "a", "bta": 1}),
        ("steps", {"pair": "a", "steps": 4}),
        ("limits", {"pair": "a", "limits": []}),
        ("searches", {"pair": "a", "limits": {"searches": "x"}}),
        ("seconds", {"pair": "a", "limits": {"seconds": "x"}}),
        ("searches", {"pair": "a", "limits": {"searches": 1.5}}),
        ("patterns", {"pair": "a", "limits": {"patterns": "x"}}),
        ("beta", {"pair": "a", "beta": "x"}),
        ("beta", {"pair": "a", "beta": -1}),
        ("pair", {"pair": 5}),
        ("device", {"pair": "a", "device": 5}),
        ("prm", {"prm": ["a"], "reference": "b"}),
        ("reference", {"prm": "a", "reference": 5}),
        ("dtype", {"pair": "a", "dtype": 5}),
        ("max_tokens", {"pair": "a", "steps": {"max_tokens": 0}}),
        ("regex", {"pair": "a", "steps": {"regex": "("}}),
        ("configuration", []),
        ("configuration", 5),
        ("configuration", None),
    ):
        yield Case(
            "records", "ServeConfig.of", argument, short(section), lambda section=section: ServeConfig.of(section)
        )  # type: ignore[misc]


def _changed(plain: Any, rng: random.Random, count: int) -> Iterator[tuple[str, Any]]:
    """A record with one field of one node taken away or made of another kind, and the field's name."""
    nodes = [key for key, value in plain.items() if isinstance(value, list) and value and isinstance(value[0], dict)]
    for _ in range(count):
        copy = json.loads(json.dumps(plain))
        part = copy[rng.choice(nodes)][rng.randrange(len(copy[nodes[0]]))] if nodes and rng.random() < 0.8 else copy
        name = rng.choice(sorted(part))
        wrong = rng.choice(("x", -7, {}, [None], 1.5, 10**30))
        kept = part[name]
        if type(wrong) is type(kept) or kept is None or isinstance(kept, dict):
            continue
        part[name] = wrong
        yield name, copy
