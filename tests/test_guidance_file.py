"""guidance.yaml: written by tune, read by PRMGuidance, generate's --config and serve's --guidance."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from fakes import RULE, FakeScorer

from prm_search import PRMGuidance
from prm_search.answers.functions import whole_name
from prm_search.driver.budget import Budget
from prm_search.driver.guidance_file import guidance_of, read_guidance
from prm_search.evaluation.tuning.guidance import guidance, write_guidance
from prm_search.evaluation.tuning.trials import Config
from prm_search.protocols import Sampling
from prm_search.steps import StepRule
from prm_search.strategies import Beam, BestOfN, ByDifficulty

BINS = ByDifficulty(4, (-0.5, 0.25), (Beam(2, 8), Beam(4, 4), BestOfN(16)))


def written(path: Path, config: Config, **fields: object) -> Path:
    sampling = Sampling(RULE, temperature=0.7, top_p=0.9, max_new_tokens=64)
    content = guidance(config, sampling, answer="number", models={"policy": "demo", "pair": "demo"}, **fields)  # type: ignore[arg-type]
    write_guidance(path, content, "Written by a test.\nA second line: with a colon.")
    return path


def test_what_tune_writes_is_what_is_read(tmp_path: Path) -> None:
    path = written(tmp_path / "guidance.yaml", Config(BINS, "prm", "min", "weighted", 0.25, 512), seconds=2.5)
    assert path.read_text().startswith("# Written by a test.\n# A second line: with a colon.\npolicy: demo\n")
    file = read_guidance(path)
    assert file.strategy == BINS
    assert file.choice == {"value": "min", "select": "weighted", "answer": "number", "weight_temperature": 0.25}
    assert (file.steps, file.budget) == (RULE, Budget(tokens=512, seconds=2.5))
    assert file.draws == {"temperature": 0.7, "top_p": 0.9, "max_new_tokens": 64}
    assert file.models == {"policy": "demo", "pair": "demo"}
    made = PRMGuidance.from_file(path, FakeScorer(), seed=3, budget=100)
    assert (made.strategy, made.value, made.select, made.seed, made.budget) == (BINS, "min", "weighted", 3, 100)
    settings = file.settings()
    assert (settings.sampling.temperature, settings.sampling.max_new_tokens) == (0.7, 64)


def test_whole_samples_are_not_cut_at_their_mean(tmp_path: Path) -> None:
    path = written(tmp_path / "guidance.yaml", Config(BestOfN(16), "prm", "own", "best", 1.0, 512))
    file = read_guidance(path)
    assert file.budget == Budget()
    assert "value" not in file.choice  # the scorer's own
    assert file.steps == StepRule(";", max_tokens=6)


def test_json_is_read_too(tmp_path: Path) -> None:
    path = tmp_path / "guidance.json"
    path.write_text(json.dumps({"strategy": "dvts", "steps": {"delimiter": ["\n", ";"]}, "budget": {"tokens": 9}}))
    assert read_guidance(path).settings().budget.tokens == 9


def test_an_answer_may_be_a_function_of_a_module_or_a_file(workdir: Path) -> None:
    Path("reading.py").write_text("def last(text):\n    return text[-1:]\n")
    for name in ("prm_search.demo.chains:answer", "reading:last", f"{workdir}/reading.py:last", "reading.py:last"):
        Path("guidance.yaml").write_text(f"strategy: beam\nselect: majority\nanswer: {name}\n")
        read = read_guidance("guidance.yaml").settings().answer
        made = PRMGuidance.from_file("guidance.yaml", FakeScorer())
        assert read("=5") == made.answer("=5") == "5"
    assert whole_name("reading.py:last") == f"{workdir}/reading.py:last"
    assert whole_name("reading:last") == "reading:last"
    assert PRMGuidance.from_file("guidance.yaml", FakeScorer(), answer="boxed").answer == "boxed"
    with pytest.raises(ValueError, match=r"^answer='os:getcwd' is unknown"):  # a file may name one, nobody else
        PRMGuidance(FakeScorer(), answer="os:getcwd")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            "strategy: beam\nanswer: nowhere.py:f\n",
            r"guidance.yaml: answer: nowhere.py:f: nowhere.py cannot be imported",
        ),
        ("strategy: beam\nanswer: 'os.path:none'\n", r"answer: os.path:none: os.path has no function none"),
        ("strategy: beam\nanswer: ':f'\n", r"answer: :f: a module cannot be imported"),
        ("strategy: beam\nanswer: last\n", r"answer='last' is unknown"),
        ("- beam\n", r"guidance.yaml: keys and values are needed, got list"),
        ("strategy: beam\nstrategy: dvts\n", r"guidance.yaml, line 2: not YAML \(strategy stands twice\)"),
        ("strategy: [\n", r"guidance.yaml, line 2: not YAML"),
        ("value: min\n", "there is no strategy"),
        ("strategy: beams\n", "strategy='beams' is unknown"),
        ("strategy: {name: beam, breadth: 2}\n", "breadth is no field of beam"),
        ("strategy: {name: beam, width: 0}\n", "width=0"),
        ("strategy: beam\nwidth: 2\n", "width is unknown; known are strategy, value"),
        ("strategy: beam\nvalue: best\n", "value='best' is unknown"),
        ("strategy: beam\nselect: vote\n", "select='vote' is unknown"),
        ("strategy: beam\nsteps: ';'\n", "steps: an object is needed, got ';'"),
        ("strategy: beam\nsteps: {ends: ';'}\n", "steps.ends is unknown"),
        ("strategy: beam\nbudget: {tokens: 0}\n", "budget: tokens=0"),
        ("strategy: beam\ntemperature: -1\n", "temperature=-1"),
        ("strategy: {name: by_difficulty, thresholds: [1]}\n", "strategies: 1 for 1 thresholds"),
        ("strategy: {name: by_difficulty, strategies: [{name: beam, depth: 1}]}\n", "depth is no field of beam"),
    ],
)
def test_what_makes_no_sense_is_named_with_its_file(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "guidance.yaml"
    path.write_text(content)
    with pytest.raises(ValueError, match=message) as caught:
        read_guidance(path)
    assert str(path) in str(caught.value)


def test_bytes_that_are_no_text_and_a_file_that_is_not_there(tmp_path: Path) -> None:
    path = tmp_path / "guidance.yaml"
    path.write_bytes(b"strategy: \xff")
    with pytest.raises(ValueError, match="not UTF-8"):
        read_guidance(path)
    with pytest.raises(OSError, match="No such file"):
        read_guidance(tmp_path / "none.yaml")
    with pytest.raises(ValueError, match="guidance: keys and values are needed"):
        guidance_of(None, "guidance")
