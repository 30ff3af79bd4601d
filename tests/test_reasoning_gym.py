"""Tasks of reasoning-gym as problems, judged by their own verifiers."""

from __future__ import annotations

import hf_models as hf
import pytest
from records import lines

from prm_search.answers import verifiers
from prm_search.cli import main
from prm_search.commands import BadInput
from prm_search.commands.problems import read_problems
from prm_search.problems import Judge

pytest.importorskip("reasoning_gym")
LEGS = "reasoning_gym:leg_counting?size=3&seed=1"


def test_problems_of_a_task_are_the_tasks_own():
    import reasoning_gym

    entries = reasoning_gym.create_dataset("leg_counting", size=3, seed=1)
    items = read_problems(LEGS)
    assert [item.prompt.text for item in items] == [entry["question"] for entry in entries]
    assert [item.extra["id"] for item in items] == ["leg_counting-0", "leg_counting-1", "leg_counting-2"]
    assert len(read_problems(LEGS, limit=2)) == 2
    assert [verifiers.score(item.response, entry["answer"]) for item, entry in zip(items, entries, strict=True)] == [
        1.0
    ] * 3


def test_one_source_has_one_spelling_and_its_own_options():
    assert verifiers.parse("reasoning_gym:x?seed=1&size=3")[0] == verifiers.parse("reasoning_gym:x?size=3&seed=1")[0]
    (easy,) = read_problems("reasoning_gym:leg_counting?size=1&min_animals=1&max_animals=1")
    assert easy.prompt.text.count(",") < read_problems("reasoning_gym:leg_counting?size=1&min_animals=9")[
        0
    ].prompt.text.count(",")


def test_the_verifier_accepts_what_spelling_would_not():
    (item,) = read_problems("reasoning_gym:countdown?size=1&seed=1")  # 309 of 6, 61, 94, 4
    judge = Judge()
    assert judge("94*4 - 61 - 6", item.response) == ("94*4 - 61 - 6", True)
    assert judge("thinking\n<answer> 94*4 - 6 - 61 </answer>", item.response) == ("94*4 - 6 - 61", True)
    assert judge("so \\boxed{94*4-67}", item.response) == ("94*4-67", False)  # 67 is no number of the problem
    assert judge("  ", item.response) == (None, False)


@pytest.mark.parametrize(
    ("source", "word"),
    [
        ("reasoning_gym:", "a task is needed"),
        ("reasoning_gym:leg_countin", "leg_counting"),
        ("reasoning_gym:leg_counting?size=0", "size"),
        ("reasoning_gym:leg_counting?size=many", "size"),
        ("reasoning_gym:leg_counting?size", "NAME=VALUE"),
        ("reasoning_gym:leg_counting?size=1&size=2", "twice"),
        ("reasoning_gym:leg_counting?wings=2", "wings"),
        ("reasoning_gym:leg_counting?min_animals=-1", "leg_counting"),
    ],
)
def test_bad_sources_are_named(source, word):
    with pytest.raises(BadInput, match=word):
        read_problems(source)


def test_a_name_of_no_problem_is_refused():
    with pytest.raises(ValueError, match="names no problem"):
        verifiers.score(f"{LEGS}#3", "1")


def test_without_the_package_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "reasoning_gym", None)
    verifiers._dataset.cache_clear()
    with pytest.raises(BadInput, match=r"prm-search\[gym\]"):
        read_problems(LEGS)


def test_rollouts_of_a_task_are_labelled_by_it(workdir):
    hf.llama(0, max_position_embeddings=1024).save_pretrained("policy")
    hf.tokenizer().save_pretrained("policy")
    asked = ["--policy", "policy", "--data", LEGS, "--n", "2", "--max-new-tokens", "8", "--out", "out.jsonl"]
    assert main(["rollout", *asked]) == 0
    records = lines("out.jsonl")
    assert {record["id"] for record in records} == {"leg_counting-0", "leg_counting-1", "leg_counting-2"}
    for record in records:
        assert record["label"] == int(verifiers.score(record["reference_answer"], record["answer"]) == 1.0)
