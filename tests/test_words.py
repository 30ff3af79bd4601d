"""Word problems: every worked step is right and rests on the story, splits share nothing, draws are deterministic."""

from __future__ import annotations

import json
import random
import re

import pytest
import words
from word_templates import NAMES, SPLITS, templates
from words import LARGEST, draw, problems

from prm_search.commands.problems import read_problems
from prm_search.problems import final_answer

LINE = re.compile(r"(?P<label>[^:{}]+): (?P<left>\d+)(?P<op>[-+*/])(?P<right>\d+)=(?P<result>\d+)")
ALL = [template for split in SPLITS for template in templates(split)]


def lines(worked: str) -> list[re.Match[str]]:
    *steps, _ = worked.split("\n")
    found = [LINE.fullmatch(step) for step in steps]
    assert all(found), worked
    return [match for match in found if match]


@pytest.mark.parametrize("split", SPLITS)
def test_every_step_is_right_and_rests_on_the_question_or_an_earlier_step(split):
    constants = {t.name: {side for step in t.steps for side in (step.left, step.right) if side.isdigit()} for t in ALL}
    for problem in problems(600, split=split, seed=3):
        known = set(re.findall(r"\d+", problem.question)) | constants[problem.template]
        for match in lines(problem.worked):
            left, right, result = (int(match[name]) for name in ("left", "right", "result"))
            right_result = {"+": left + right, "-": left - right, "*": left * right, "/": left / right}[match["op"]]
            assert right_result == result, problem.worked
            assert 1 <= result <= LARGEST
            assert {match["left"], match["right"]} <= known, problem.worked
            known.add(match["result"])
        assert problem.worked.split("\n")[-1] == f"#### {match['result']}"
        assert problem.answer == match["result"] == final_answer(problem.worked)


@pytest.mark.parametrize("template", ALL, ids=lambda template: template.name)
def test_a_template_uses_what_it_draws_and_fills_every_slot(template):
    """Each number that is drawn is told, and every result but the last is used by a later step."""
    assert 2 <= len(template.steps) <= 5
    assert template.question.endswith("?")
    told = set(re.findall(r"{([a-z])}", template.question))
    assert told == set(template.numbers)
    sides = [{step.left, step.right} for step in template.steps]
    assert told <= set().union(*sides)
    for place, step in enumerate(template.steps[:-1]):
        assert step.result in set().union(*sides[place + 1 :])
        assert step.result not in told
    assert set(re.findall(r"{(\w+)}", " ".join(step.label for step in template.steps))) <= set(
        re.findall(r"{(\w+)}", template.question)
    )
    problem = draw(template, random.Random(0))
    assert not re.search(r"[{}]|\s\s", problem.question + problem.worked)


def test_there_are_many_templates_and_no_two_splits_share_one():
    assert len({template.name for template in ALL}) == len(ALL) >= 40
    assert len({template.question for template in ALL}) == len(ALL)
    for split in SPLITS:
        assert {len(template.steps) for template in templates(split)} == {2, 3, 4, 5}
    drawn = {split: {problem.template for problem in problems(200, split=split)} for split in SPLITS}
    for split in SPLITS:
        assert drawn[split] == {template.name for template in templates(split)}


def test_draws_are_deterministic_distinct_and_begin_alike():
    few, many = problems(40, split="prm", seed=1), problems(120, split="prm", seed=1)
    assert many[:40] == few
    assert len({problem.question for problem in many}) == 120
    assert problems(40, split="prm", seed=2) != few
    assert {len(problem.steps) for problem in problems(60, max_steps=2)} == {2}
    assert {len(problem.steps) for problem in problems(60, min_steps=3, max_steps=4)} == {3, 4}
    assert len({word for problem in many for word in problem.question.split()} & set(NAMES)) > 12


@pytest.mark.parametrize(
    ("given", "name"),
    [({"n": -1}, "n must"), ({"split": "train"}, "split must"), ({"min_steps": 1}, "min_steps"),
     ({"max_steps": 6}, "min_steps"), ({"min_steps": 4, "max_steps": 3}, "min_steps")],
)  # fmt: skip
def test_bad_arguments_are_named(given, name):
    with pytest.raises(ValueError, match=name):
        problems(**{"n": 3, **given})


def test_the_command_writes_what_rollout_reads(tmp_path, capsys):
    out = tmp_path / "test.jsonl"
    command = ["--split", "test", "--n", "5", "--max-steps", "3", "--out"]
    assert words.main([*command, str(out)]) == 0
    drawn = problems(5, split="test", max_steps=3)
    records = [json.loads(line) for line in out.read_text().splitlines()]
    assert [record["answer"] for record in records] == [problem.worked for problem in drawn]
    read = read_problems(str(out), template="{}\n")
    assert [item.response for item in read] == [problem.answer for problem in drawn]
    assert [item.prompt.text for item in read] == [f"{problem.question}\n" for problem in drawn]
    assert [item.response for item in read_problems(str(out), worked=True)] == [problem.worked for problem in drawn]
    assert words.main([*command, "-"]) == 0
    assert capsys.readouterr().out == out.read_text()
    with pytest.raises(SystemExit, match="2"):
        words.main([*command, str(out)])  # a file is not overwritten
    assert "cannot be written" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        words.main(["--split", "test", "--n", "-5", "--out", "-"])
    assert "n must be at least 0" in capsys.readouterr().err
