"""--config FILE: a command's options from YAML or JSON; and what --help shows of them."""

from __future__ import annotations

import ast
import inspect
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.main import get_command

import prm_search as ps
import prm_search.commands as commands
from prm_search.cli import app, main
from prm_search.commands import options
from prm_search.commands.options import ADVANCED

NAMES = ("generate", "rollout", "train", "eval", "serve", "score", "eval-steps", "export-tree", "calibrate")


@pytest.fixture
def called(monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, Any]]:
    """Parse a command line, and give the options with which its command would run."""

    def call(*words: str) -> dict[str, Any]:
        command = get_command(app).commands[words[0]]  # type: ignore[attr-defined]
        with command.make_context(words[0], list(words[1:])) as context:
            return dict(context.params)

    return call


def write(path: str, content: Any) -> str:
    text = json.dumps(content) if path.endswith(".json") else yaml.safe_dump(content)
    Path(path).write_text(text)
    return path


@pytest.mark.parametrize("name", ["c.yaml", "c.json", "c.yml", "plain"])
def test_a_file_is_a_command_line(name, called, workdir):
    content = {
        "policy": "demo", "pair": "demo", "prompt": ["a", "b"], "width": 2, "temperature": 0.5, "as_json": True,
        "max-new-tokens": 7, "chat": False, "answer": None, "engine_options": {"a": [1]},
    }  # fmt: skip
    options = called("generate", "--config", write(name, content))
    line = ["--prompt", "a", "--prompt", "b", "--width", "2", "--temperature", "0.5", "--json", "--max-new-tokens", "7"]
    expected = called("generate", "--policy", "demo", "--pair", "demo", *line, "--engine-options", '{"a": [1]}')
    assert options | {"config": None} == expected


def test_the_command_line_wins(called, workdir):
    write("c.yaml", {"policy": "demo", "width": 2, "delimiter": [";", "\n"], "json": True, "temperature": 0.3})
    options = called("generate", "--config", "c.yaml", "--width", "3", "--delimiter", "x")
    assert (options["width"], options["delimiter"], options["temperature"]) == (3, ["x"], 0.3)
    assert options["as_json"] is True


def test_names_of_the_librarys_configs(called, workdir):
    """StepRule, Budget, Plan, ServeConfig, Limits and Recipe are read by their own fields."""
    steps = {"delimiter": ["\n\n", ";"], "max_tokens": None, "confidence": 0.5}
    write(
        "g.yaml", {"policy": "demo", "steps": steps, "budget": {"tokens": 9, "depth": 2}, "strategy": {"name": "beam"}}
    )
    found = called("generate", "--config", "g.yaml")
    assert found["delimiter"] == ["\n\n", ";"]
    assert (found["step_tokens"], found["step_confidence"], found["steps"]) == (0, 0.5, None)
    assert (found["budget"], found["budget_depth"]) == (9, 2)
    assert json.loads(found["strategy"]) == {"name": "beam"}
    write("l.yaml", {"policy": "demo", "steps": 2, "strategy": "lookahead", "budget": 5})
    found = called("generate", "--config", "l.yaml")
    assert (found["steps"], found["budget"]) == (2, 5)
    write("d.yaml", {"policy": "demo", "steps": [";"]})
    assert called("generate", "--config", "d.yaml")["delimiter"] == [";"]
    plan = {"strategies": ["beam", "majority"], "budgets": [1, 4], "seeds": [0, 1], "shapes": {4: [1, 4], 16: [2, 8]}}
    plan |= {"capped": False}
    found = called("eval", "--out", "o", "--config", write("e.yaml", plan))
    assert (found["strategies"], found["budgets"], found["seeds"]) == ("beam,majority", "1,4", "0,1")
    assert found["shape"] == ["4=1x4", "16=2x8"]
    assert found["uncapped"] is True
    limits = {"searches": 3, "seconds": 1.5, "patterns": True, "max_tokens": 5}
    write("s.json", {"policy": "demo", "pair": "demo", "limits": limits, "steps": {"max_tokens": 8}})
    found = called("serve", "--config", "s.json")
    assert (found["max_searches"], found["timeout"], found["allow_regex"], found["max_tokens"]) == (3, 1.5, True, 5)
    assert found["step_tokens"] == 8
    recipe = {"learning_rate": 1e-3, "lora": 4, "bf16": True, "epochs": 3}
    write("t.yaml", {"model": "demo", "rollouts": "r.jsonl", "out": "o", **recipe, "arguments": {"warmup_steps": 2}})
    found = called("train", "--config", "t.yaml")
    assert {name: found[name] for name in recipe} == recipe
    assert json.loads(found["arguments"]) == {"warmup_steps": 2}


def test_a_data_sets_configuration_is_still_taken(called, workdir):
    for words in (["--config", "main"], ["--data-config", "main"]):
        found = called("rollout", "--policy", "demo", "--data", "openai/gsm8k", "--out", "o", *words)
        assert found["data_config"] == "main"


BAD = {
    "unknown key": ({"policy": "demo", "widht": 3}, "c.yaml: widht is unknown; known are alpha, answer"),
    "unknown key of a section": ({"steps": {"max": 3}}, "c.yaml: steps.max is unknown; known are delimiter"),
    "another command's key": ({"objective": "ce"}, "c.yaml: objective is unknown"),
    "one option twice": ({"max-new-tokens": 3, "max_new_tokens": 4}, "are one option"),
    "option and section": ({"step_tokens": 3, "steps": {"max_tokens": 4}}, "are one option"),
    "not a number": ({"policy": "demo", "width": "three"}, "c.yaml: "),
    "true for a number": ({"width": True}, "c.yaml: width is True"),
    "text for a flag": ({"chat": "yes"}, "c.yaml: chat is 'yes': true or false is needed"),
    "an object for a text": ({"policy": {"a": 1}}, "c.yaml: policy is {'a': 1}"),
    "list": ([1], "c.yaml: keys and values are needed, got list"),
    "a list for a number": ({"batch": [1]}, "c.yaml: batch (--batch) is [1]: one value is needed, not a list"),
    "a list for a text": ({"policy": ["demo"]}, "c.yaml: policy (--policy) is ['demo']: one value is needed"),
    "itself": ({"config": "x.yaml"}, "c.yaml: config is unknown"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_is_wrong_in_a_file_is_named_with_it(case, workdir, capsys):
    content, said = BAD[case]
    assert main(["generate", "--config", write("c.yaml", content), "--prompt", "x"]) == 2
    message = capsys.readouterr().err
    assert said in message
    assert message.count("\n") == 1


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("c.yaml", "a: [1", "c.yaml, line 1: not YAML"),
        ("c.yaml", "\tb: 1", "c.yaml, line 1: not YAML"),
        ("c.yaml", "width: 1\nwidth: 2\n", "c.yaml, line 2: not YAML (width stands twice)"),
        ("c.yaml", "[" * 3000, "c.yaml: "),
        ("c.yaml", "width: " + "9" * 5000, "c.yaml: not YAML"),
        ("c.json", "[" * 100_000, "c.json: JSON that is nested too deep"),
        ("c.json", '{"a": 1', "c.json: not JSON"),
        ("c.yaml", "", "c.yaml: keys and values are needed, got NoneType"),
    ],
)
def test_files_that_cannot_be_read(name, text, said, workdir, capsys):
    Path(name).write_text(text)
    assert main(["generate", "--config", name]) == 2
    message = capsys.readouterr().err
    assert said in message
    assert message.count("\n") == 1


def test_no_such_file_and_no_text(workdir, capsys):
    Path("c.yaml").write_bytes(b"\xff\xfe\xff")
    for path in ("none.yaml", "c.yaml", "."):
        assert main(["generate", "--config", path]) == 2
        assert f"--config {path} cannot be read" in capsys.readouterr().err


# -- the options themselves --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_every_option_has_a_help_and_a_panel(name):
    command = get_command(app).commands[name]  # type: ignore[attr-defined]
    panels = []
    for option in command.params:
        assert option.help, option.name
        panels.append(option.rich_help_panel)
    seen = [panel for panel, before in zip(panels, [None, *panels], strict=False) if panel == ADVANCED != before]
    assert len(seen) <= 1  # the rare ones stand together
    assert panels[-1] == ADVANCED or ADVANCED not in panels


def test_a_help_text_stands_once():
    """An option that commands share is written down once, whatever its defaults."""
    texts: dict[str, list[str]] = {}
    for path in Path(commands.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.keyword) and node.arg == "help" and isinstance(node.value, ast.Constant):
                texts.setdefault(node.value.value, []).append(f"{path.name}:{node.lineno}")
    longer = {text: places for text, places in texts.items() if len(places) > 1 and len(text) > 25}
    assert longer == {}


def test_no_command_is_longer_than_60_lines():
    functions = [inspect.unwrap(command.callback) for command in app.registered_commands]
    lines = {function.__name__: len(inspect.getsourcelines(function)[0]) for function in functions}
    assert len(lines) >= len(NAMES)
    assert {name: count for name, count in lines.items() if count > 60} == {}


def test_a_strategy_may_be_an_object_of_its_fields(workdir):
    made = options.make_strategy('{"name": "lookahead", "rollouts": 3, "per_parent": 2}', {"width": 5, "steps": None})
    assert made == ps.Lookahead(width=5, rollouts=3, per_parent=2)
    for text, said in (
        ('{"name": "beam", "rollouts": 3}', "rollouts is no field of beam"),
        ('{"name": "beam", "width": 3}', "width is given twice"),
        ('{"width": 3}', "strategy='None' is unknown"),
        ('{"name": "beam"', "--strategy: not JSON"),
    ):
        with pytest.raises(ValueError, match=said):
            options.make_strategy(text, {"width": 5})
