"""`--scorer`: step PRMs and outcome models in generate, score, eval, eval-steps and serve, against a plain forward."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from prm_models import Plain, publish
from records import lines, write
from servers import serving

from prm_search.cli import main
from prm_search.commands.models import load_policy, load_scorer
from prm_search.demo.chains import problems
from prm_search.scorers.explicit.step_prm import StepPRM
from prm_search.serving.app import make_app
from prm_search.serving.backend import ThreadEngine
from prm_search.serving.config import ServeConfig
from prm_search.steps import StepRule

ASKED = problems(3, length=3)
JUDGED = ["--label", "exact", "--answer", "prm_search.demo.chains:answer"]
PRM = ["--scorer", "prm", "--prm-format", "qwen_math"]
CUT = ["--delimiter", ";"]
SMALL = ["--width", "2", "--expansions", "2"]


@pytest.fixture
def folder(workdir: Path) -> Path:
    publish(workdir / "prm", "qwen_math")
    publish(workdir / "rm", "universal")
    write("test.jsonl", [{"id": i, "question": p.prompt, "answer": p.answer} for i, p in enumerate(ASKED)])
    return workdir


def plain(steps: Sequence[str], question: str, folder: str = "prm", format: str = "qwen_math") -> Any:
    """Scores of steps by a plain forward."""
    scores = Plain(Path(folder), format, question).scores([step.strip() for step in steps])
    return pytest.approx(scores, abs=1e-4)


def test_generate_searches_by_a_step_prm(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ask = ["generate", "--policy", "demo", *PRM, "--prompt", ASKED[0].prompt, *CUT, *SMALL]
    assert main([*ask, "--max-new-tokens", "40", "--json", "--out", "out.jsonl"]) == 0
    (record,) = lines("out.jsonl")
    steps = record["steps"]
    assert [step["reward"] for step in steps] == plain([step["text"] for step in steps], ASKED[0].prompt)
    assert record["value"] == pytest.approx(steps[-1]["reward"])  # "last", which its authors use
    assert set(record["encoded_tokens"]) == {"policy", "prm"}
    capsys.readouterr()
    assert main([*ask, "--max-new-tokens", "40", "--tree"]) == 0
    shown = capsys.readouterr().out
    assert "step scores " in shown
    assert " q " not in shown


def test_a_step_prm_as_prover_of_a_pair(folder: Path) -> None:
    ask = [
        "generate",
        "--policy",
        "demo",
        "--pair",
        "demo",
        "--prompt",
        ASKED[0].prompt,
        "--width",
        "2",
        "--expansions",
        "2",
    ]
    assert main([*ask, "--prover", "prm", "--max-new-tokens", "40", "--tree", "--out", "out.jsonl"]) == 0
    (record,) = lines("out.jsonl")
    scores = plain([step["text"] for step in record["steps"]], ASKED[0].prompt).expected
    assert record["value"] == pytest.approx(record["steps"][-1]["q"] + scores[-1], abs=1e-4)


def test_paths_beyond_its_length_are_told_in_the_record(folder: Path) -> None:
    config = json.loads(Path("prm/config.json").read_text()) | {"max_position_embeddings": 90}
    Path("prm/config.json").write_text(json.dumps(config))
    ask = [
        "generate",
        "--policy",
        "demo",
        *PRM,
        "--prompt",
        ASKED[0].prompt,
        *CUT,
        "--strategy",
        "best_of_n",
        "--n",
        "2",
    ]
    assert main([*ask, "--max-new-tokens", "40", "--out", "out.jsonl"]) == 0
    (record,) = lines("out.jsonl")
    assert record["notes"] == ["prm: paths beyond its 90 tokens keep the score of their last step that fits"]
    rewards = [step["reward"] for step in record["steps"]]
    assert rewards[-1] == rewards[-2]


def test_score_writes_records_and_a_page_of_steps(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(
        "two.jsonl", [{"prompt": "What is 2 + 2?", "response": "Add.\n\nIt is <4>."}, {"prompt": "b", "response": "c"}]
    )
    assert main(["score", "--data", "two.jsonl", *PRM, "--out", "out.jsonl", "--html", "page.html"]) == 0
    first, second = lines("out.jsonl")
    assert first["step_scores"] == plain(["Add.", "It is <4>."], "What is 2 + 2?")
    assert (first["steps"], len(second["steps"])) == (["Add.\n\n", "It is <4>."], 1)
    assert first["reward"] == pytest.approx(first["step_scores"][-1])
    page = Path("page.html").read_text()
    assert "Rewards by prm" in page
    assert "It is &lt;4&gt;." in page
    assert f'<span class="step">{first["step_scores"][0]:.3f}</span>' in page
    assert "Scores go from 0 to 1." in page
    assert "beta" not in page
    assert f"step scores {first['step_scores'][0]:.3f}" in capsys.readouterr().out
    assert main(["score", "--data", "two.jsonl", "--scorer", "rm", "--prm-format", "outcome", "--html", "rm.html"]) == 0
    assert "Scores have no bounds." in Path("rm.html").read_text()


def test_eval_compares_scorers_by_the_value_that_each_is_for(folder: Path) -> None:
    both = ["--pair", "demo", "--scorer", "prm", "--scorer", "rm", "--prm-format", "auto", "--prm-format", "outcome"]
    ask = ["eval", "--policy", "demo", *both, *JUDGED, "--data", "test.jsonl", "--budgets", "1,4"]
    assert main([*ask, "--max-new-tokens", "40", "--strategies", "best_of_n,beam", "--out", "out"]) == 0
    records = lines("out/records.jsonl")
    samples = [record for record in records if record["kind"] == "samples"]
    for record in samples:
        prompt = ASKED[record["problem"]].prompt
        for sample in record["samples"]:
            steps = [step + ";" for step in sample["text"].split(";") if step]
            steps[-1] = steps[-1] if sample["text"].endswith(";") else steps[-1].removesuffix(";")
            scores = plain(steps, prompt).expected
            assert sample["values"]["prm"]["own"] == pytest.approx(scores[-1], abs=1e-4)
        assert record["scoring"]["rm"]["prm_tokens"] > 0
        assert record["scoring"]["prm"]["reference_tokens"] == 0
    beams = [record for record in records if record["kind"] == "search"]
    assert {beam["pair"] for beam in beams} == {"demo", "prm", "rm"}
    assert all(beam["prm_tokens"] > 0 for beam in beams)


def test_eval_of_responses_that_exist(folder: Path) -> None:
    rows = [{"prompt": "What is 2 + 2?", "responses": ["Add.\n\nIt is 4.", "It is 5."], "labels": [1, 0]}]
    write("given.jsonl", rows)
    ask = ["eval", "--responses", "given.jsonl", *PRM, "--label", "exact", "--answer", "number"]
    assert main([*ask, "--strategies", "best_of_n,weighted", "--out", "out"]) == 0
    (record,) = lines("out/records.jsonl")
    values = [sample["values"]["prm"]["own"] for sample in record["samples"]]
    answers = (["Add.", "It is 4."], ["It is 5."])
    assert values == pytest.approx([plain(steps, "What is 2 + 2?").expected[-1] for steps in answers], abs=1e-4)
    ids = {
        step_ids
        for steps in answers
        for step_ids in [tuple(Plain(Path("prm"), "qwen_math", "What is 2 + 2?").ids(steps))]
    }
    assert 0 < record["scoring"]["prm"]["prm_tokens"] <= sum(map(len, ids))


SOLUTIONS: list[Mapping[str, Any]] = [
    {"problem": "What is 2 + 2?", "steps": ["Add 2 and 2.", "It is 4."], "label": -1},
    {"problem": "What is 2 + 3?", "steps": ["Add 2 and 3.", "It is 7.", "So 7."], "label": 1},
    {"problem": "What is 2 + 4?", "steps": ["It is 5."], "label": 0},
]


def test_eval_steps_finds_the_first_step_below_a_threshold(folder: Path) -> None:
    write("steps.jsonl", SOLUTIONS)
    assert main(["eval-steps", "--data", "steps.jsonl", *PRM, "--threshold", "0.5", "--out", "out"]) == 0
    records = lines("out/steps.jsonl")
    for solution, record in zip(SOLUTIONS, records, strict=True):
        assert record["scores"] == {"last": plain(solution["steps"], solution["problem"])}
    right = sum(
        next((i for i, score in enumerate(record["scores"]["last"]) if score < 0.5), -1) == record["label"]
        for record in records
        if record["label"] >= 0
    )
    report = json.loads(Path("out/report.json").read_text())
    (row,) = report["rows"]
    assert row["error_accuracy"] == right / 2
    assert report["about"]["scorer"] == "prm"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([*PRM, "--pair", "demo"], "--scorer names a reward model by itself"),
        ([*PRM, "--beta", "1"], "--scorer names a reward model by itself"),
        (["--pair", "demo", "--prm-format", "trl"], "--prm-format needs --scorer"),
        (["--scorer", "prm", "--prm-format", "qwen"], "--prm-format 'qwen' is unknown; it is one of auto, qwen_math"),
        (["--scorer", "rm"], "--scorer rm: 'rm' has a score head, .*pass --prm-format, one of universal, outcome"),
        (["--scorer", "none"], "none"),
        (["--scorer", "prm", "--prm-format", "trl"], "--scorer prm: format='trl': .*no score.weight"),
        ([*PRM, "--strategy", "steer"], "--strategy steer: pair must be an ImplicitPRM, got StepPRM"),
        (["--prm", "prm", "--reference", "demo"], "'score.0.bias' is a reward model's head.*--scorer"),
    ],
)
def test_bad_options_are_one_line(
    folder: Path, capsys: pytest.CaptureFixture[str], words: list[str], said: str
) -> None:
    assert main(["generate", "--policy", "demo", "--prompt", "=1+2?", "--max-new-tokens", "4", *words]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()[-1:]
    assert re.search(said, line), line


def test_eval_steps_refuses_what_has_no_step_scores(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write("steps.jsonl", SOLUTIONS)
    ask = ["eval-steps", "--data", "steps.jsonl", "--out", "out"]
    assert main([*ask, "--scorer", "rm", "--prm-format", "outcome"]) == 2
    assert "an outcome model judges whole answers" in capsys.readouterr().err
    assert main([*ask, *PRM, "--delimiter", ";"]) == 2
    assert "--delimiter is of pairs: prm is a step PRM" in capsys.readouterr().err


def test_a_server_searches_by_a_step_prm(folder: Path) -> None:
    policy, scorer = load_policy("demo", device="cpu"), load_scorer("prm", "qwen_math", device="cpu")
    app = make_app(lambda: ThreadEngine.of_hf(policy, scorer), ["demo"], steps=StepRule(";"))
    ask = {"model": "demo", "prompt": ASKED[0].prompt, "max_tokens": 40, "seed": 1}
    guided = {"width": 2, "expansions": 2, "return_candidates": True}
    with serving(app) as served:
        status, _, body = served.send("/v1/completions", {**ask, "prm_guidance": guided})
        assert status == 200, body
        steps = json.loads(body)["prm_search"][0]["candidates"][0]["steps"]
        assert [step["reward"] for step in steps] == plain([step["text"] for step in steps], ASKED[0].prompt)
        for refused, field in (
            ({"prompt": [5, 6]}, "prompt"),
            ({"prm_guidance": {"alpha": 1.0}}, "prm_guidance.alpha"),
        ):
            status, _, body = served.send("/v1/completions", {**ask, "prm_guidance": guided, **refused})
            assert (status, json.loads(body)["error"]["param"]) == (400, field)


def test_the_plugin_behind_vllm_loads_what_the_configuration_names(folder: Path) -> None:
    from prm_search.integrations.vllm.endpoint import load_scorer as load

    config = ServeConfig(scorer="prm", format="qwen_math", device="cpu")
    assert ServeConfig.of(json.loads(config.json())) == config
    scorer = load(config)
    assert isinstance(scorer, StepPRM)
    assert (scorer.format.name, scorer.too_long) == ("qwen_math", "keep")
    assert load(ServeConfig(scorer="demo", device="cpu")).kind == "pair"
    assert ServeConfig.of({"scorer": "demo"}).steps.delimiter == ServeConfig.of({"pair": "demo"}).steps.delimiter
    with pytest.raises(ValueError, match="format is needed beside the URL of a step PRM"):
        load(ServeConfig(scorer="http://127.0.0.1:1"))
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"scorer": "a", "pair": "b"}, "one of pair and prm, or scorer, is needed"),
        ({"scorer": "a", "format": "qwen"}, "format='qwen' is unknown"),
        ({"pair": "a", "format": "trl"}, "format='trl' is of a scorer, and there is none"),
        ({"scorer": "a", "beta": 0.1}, "reference and beta are for prm and pair"),
    ]
    for settings, said in wrong:
        with pytest.raises(ValueError, match=said):
            ServeConfig(**settings)


def test_the_demo_takes_another_reward_model(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "--problems", "1", "--scorer", "prm", "--prm-format", "qwen_math", "--json", "demo.json"]) == 0
    record = json.loads(Path("demo.json").read_text())
    assert (record["scorer"], record["format"], record["beam"]["value"]) == ("prm", "qwen_math", "own")
    assert record["beam_scoring"]["encoded"] > 0 == record["beam_scoring"]["reference"]
    assert "ranks a prefix by the value that its scorer is meant for" in " ".join(capsys.readouterr().out.split())
    assert main(["demo", "--prm-format", "trl"]) == 2
    assert main(["demo", "--train", "--out", "new", "--scorer", "prm"]) == 2
