"""From rollouts to batches: order, thinning, the held-out split, items of each objective, padding."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from prm_search.training.data import (
    LabelledResponse,
    by_prompt,
    collate,
    mismatched,
    pairs,
    read_rollouts,
    singles,
    split,
    thin,
)
from prm_search.training.load_data import load_data
from prm_search.training.negatives import cross_prompt
from prm_search.training.pair_accuracy import count_pairs, pair_accuracy
from prm_search.training.recipe import OBJECTIVES, Recipe


def row(prompt: int, label: bool, *response: int) -> LabelledResponse:
    return LabelledResponse((1, prompt), np.array(response or (5, 2)), label)


def many(problems: int, samples: int = 4) -> list[LabelledResponse]:
    return [row(10 + p, (p + s) % 3 == 0, s + 3, 2) for p in range(problems) for s in range(samples)]


def record(index: int, **given: object) -> str:
    return json.dumps({"index": index, "prompt_ids": [1, 2], "response_ids": [index, 9], "label": 1} | given) + "\n"


@pytest.mark.parametrize("wrong", [[0.5, -1], [-1e39, 0], [float("nan"), 0], [True, 0], ["-1", 0], [-1], "x", 5, {}])
def test_log_probabilities_that_are_none_are_refused(tmp_path: Path, wrong: object):
    (tmp_path / "r.jsonl").write_text(record(0, logprobs=[-0.5, 1e-7]) + record(1, logprobs=wrong))
    with pytest.raises(ValueError, match=r"r\.jsonl, line 2: .*logprobs.* <= 0"):
        read_rollouts(tmp_path / "r.jsonl")


@pytest.mark.parametrize("name", ["batch", "micro_batch", "max_length", "save_steps", "epochs"])
def test_a_recipe_needs_each_count(name: str):
    with pytest.raises((TypeError, ValueError), match=f"^{name}=None"):
        Recipe(**{name: None})


@pytest.mark.parametrize("name", ["objective", "balanced", "margin"])
def test_a_recipe_names_what_has_no_truth(name: str):
    with pytest.raises((TypeError, ValueError), match=f"^{name}="):
        Recipe(**{name: np.array([1, 2])})


def test_order_is_that_of_the_problems_not_of_finishing(tmp_path: Path):
    path = tmp_path / "r.jsonl"
    path.write_text(record(2) + "\n" + record(0, label=0) + record(1))
    rows = read_rollouts(path)
    assert [r.response_ids.tolist() for r in rows] == [[0, 9], [1, 9], [2, 9]]
    assert [r.label for r in rows] == [False, True, True]
    assert rows[0].prompt_ids is rows[2].prompt_ids


def test_a_response_is_learnt_from_as_often_as_it_was_drawn(tmp_path: Path):
    """`export-tree` writes `count`."""
    path = tmp_path / "r.jsonl"
    path.write_text(record(0, count=3) + record(1, label=0) + record(2, prompt_ids=[5]))
    assert [row.count for row in read_rollouts(path)] == [3, 1, 1]
    data = load_data(path, Recipe(holdout=0.0))
    assert [item.rows[0].response_ids.tolist() for item in data.items] == [[0, 9]] * 3 + [[1, 9], [2, 9]]
    assert (data.counts["responses"], data.counts["items"], len(data.rows)) == (3, 5, 3)
    chosen = load_data(path, Recipe(objective="dpo", holdout=0.0)).items
    assert len(chosen) == 3


@pytest.mark.parametrize(
    "line",
    ["{", "[]", '{"prompt_ids": [1]}', record(0, label=2), record(0, prompt_ids=[]), record(0, response_ids=[]),
     record(0, response_ids="ab"), record(0, response_ids=[[1]]), record(0, label=None), record(0, count=0),
     record(0, count=1.5), record(0, count=True)],
)  # fmt: skip
def test_a_bad_record_is_named(tmp_path: Path, line: str):
    path = tmp_path / "r.jsonl"
    path.write_text(record(0) + line.rstrip() + "\n")
    with pytest.raises(ValueError, match=r"r\.jsonl, line 2"):
        read_rollouts(path)


def test_no_rollouts(tmp_path: Path):
    (tmp_path / "r.jsonl").write_text("\n")
    with pytest.raises(ValueError, match="no rollouts"):
        read_rollouts(tmp_path / "r.jsonl")


def test_thin_takes_the_first_of_each():
    rows = many(5)
    kept = thin(rows, problems=2, per_problem=3)
    assert kept == [*rows[:3], *rows[4:7]]
    assert thin(rows) == rows


def test_split_holds_whole_problems_out_and_stays_as_problems_are_added():
    rows = many(300)
    kept, held = split(rows, 0.2)
    assert not by_prompt(kept).keys() & by_prompt(held).keys()
    assert 30 <= len(by_prompt(held)) <= 90
    assert split(rows[:400], 0.2)[1] == [r for r in held if r in rows[:400]]
    assert split(rows, 0.0) == (rows, [])


def test_pairs_use_every_response_of_mixed_problems():
    rows = [row(1, True, 3), row(1, False, 4), row(1, False, 5), row(1, False, 6), row(2, True, 3), row(2, True, 4)]
    items = pairs(rows, seed=1)
    assert len(items) == 3
    assert all(item.rows[0] is rows[0] for item in items)
    assert Counter(id(item.rows[1]) for item in items) == Counter(id(r) for r in rows[1:4])
    assert [i.rows for i in pairs(many(9), seed=4)] != [i.rows for i in pairs(many(9), seed=5)]
    with pytest.raises(ValueError, match="no pairs"):
        pairs(rows[4:])


def test_mismatched_rows_join_a_prompt_with_another_ones_response():
    rows = many(6)
    items = mismatched(rows, seed=2)
    assert [item.rows[0] for item in items] == rows
    for item in items:
        own, other = item.rows
        assert other.prompt_ids == own.prompt_ids
        assert any(r.response_ids is other.response_ids or (r.response_ids == other.response_ids).all() for r in rows)
        assert other.reference is None
    with pytest.raises(ValueError, match="two problems"):
        mismatched(rows[:4])


def test_balanced_singles():
    rows = [row(1, True), row(1, False), row(1, False), row(2, True), row(2, True)]
    assert [item.weight for item in singles(rows)] == [1.0] * 5
    assert [item.weight for item in singles(rows, "dataset")] == pytest.approx([5 / 6, 5 / 4, 5 / 4, 5 / 6, 5 / 6])
    kept = singles(rows, "instance")  # the second problem says nothing
    assert [item.rows[0] for item in kept] == rows[:3]
    assert [item.weight for item in kept] == pytest.approx([5 / 2, 5 / 4, 5 / 4])
    with pytest.raises(ValueError, match="balanced"):
        singles(rows, "both")


def test_collate_marks_what_predicts_the_response():
    first = LabelledResponse((1, 2, 3), np.array([4, 5]), True, np.array([-1.0, -2.0], np.float32))
    second = LabelledResponse((1,), np.array([6]), False, np.array([-3.0], np.float32))
    batch = collate(singles([first, second]))
    assert batch["input_ids"].tolist() == [[1, 2, 3, 4, 5], [1, 6, 0, 0, 0]]
    assert batch["attention_mask"].tolist() == [[1] * 5, [1, 1, 0, 0, 0]]
    assert batch["response_mask"].tolist() == [[False, False, True, True], [True, False, False, False]]
    assert batch["reference"].tolist() == [[0, 0, -1, -2], [-3, 0, 0, 0]]
    assert batch["label"].tolist() == [1, 0]
    assert batch["weight"].tolist() == [1, 1]


def test_collate_puts_first_rows_before_second_ones():
    items = pairs([row(1, True, 7), row(1, False, 8), row(2, True, 9), row(2, False, 10)])
    assert collate(items)["input_ids"][:, 2].tolist() == [7, 9, 8, 10]


def test_pairs_are_counted():
    assert count_pairs(many(3)) == sum(
        sum(r.label for r in group) * sum(not r.label for r in group) for group in by_prompt(many(3)).values()
    )
    assert count_pairs([]) == 0


def test_pair_accuracy_by_hand():
    rows = [row(1, True), row(1, False), row(1, False), row(2, True), row(2, False), row(3, True)]
    assert pair_accuracy(rows, [1.0, 0.0, 2.0, 5.0, 5.0, -9.0]) == pytest.approx(1.5 / 3)
    assert pair_accuracy(rows[5:], [0.0]) is None


def test_data_counts_what_is_left_out(tmp_path: Path):
    path = tmp_path / "r.jsonl"
    path.write_text(
        "".join(record(i, prompt_ids=[1, i // 2], label=i % 2, response_ids=[3] * (i + 1)) for i in range(8))
    )
    data = load_data(path, Recipe(max_length=6, holdout=0.0))
    assert data.counts == {
        "responses": 4, "right": 2, "problems": 2, "negatives": 0, "items": 4,
        "held_out_responses": 0, "held_out_problems": 0, "too_long": 4,
    }  # fmt: skip
    assert load_data(path, Recipe(holdout=0.0), context=6).counts == data.counts
    assert [len(load_data(path, Recipe(objective=o, holdout=0.0)).made_up) for o in ("ce", "dpo", "kto")] == [0, 0, 8]
    with pytest.raises(ValueError, match="no rollouts to train on"):
        load_data(path, Recipe(max_length=2))


@pytest.mark.parametrize(
    ("given", "word"),
    [
        ({"objective": "ppo"}, "objective"), ({"beta": 0}, "beta"), ({"beta": float("nan")}, "beta"),
        ({"learning_rate": -1.0}, "learning_rate"), ({"epochs": 0}, "epochs"), ({"batch": 0}, "batch"),
        ({"lora": 0}, "lora"), ({"holdout": 1.0}, "holdout"), ({"balanced": "half"}, "balanced"),
        ({"balanced": "dataset", "objective": "dpo"}, "balanced"), ({"margin": 0.1}, "margin"),
        ({"margin": -0.1, "objective": "ipvrm"}, "margin"), ({"per_problem": True}, "per_problem"),
        ({"negatives": -1.0}, "negatives"), ({"negatives": float("inf")}, "negatives"),
    ],
)  # fmt: skip
def test_bad_recipes_name_the_number(given, word):
    with pytest.raises(ValueError, match=word):
        Recipe(**given)


def test_defaults_depend_on_the_objective_and_lora():
    assert (Recipe().scale, Recipe().rate) == (0.05, 5e-7)
    assert Recipe(objective="ipvrm").scale == 10
    assert Recipe(objective="ipvrm", beta=2.0).scale == 2
    assert Recipe(lora=8).rate == 1e-4
    assert [Recipe(objective=o).balance for o in ("ce", "dpo", "kto")] == ["none", "none", "dataset"]
    assert Recipe(objective="kto", balanced="none").balance == "none"


def test_items_of_kto_are_balanced():
    rows = many(6)
    assert [item.weight for item in mismatched(rows, balanced="dataset")] == [
        item.weight for item in singles(rows, "dataset")
    ]


# -- responses to other problems ---------------------------------------------------------------------------------------


def distinct(problems: int, samples: int = 4) -> list[LabelledResponse]:
    return [row(10 + p, s % 2 == 0, 100 * p + s, 2) for p in range(problems) for s in range(samples)]


def test_negatives_join_a_prompt_with_another_ones_response():
    rows = distinct(5)
    own = {(r.prompt_ids, tuple(r.response_ids)) for r in rows}
    made = cross_prompt(rows, 0.5, seed=3)
    assert len(made) == len(rows) // 2
    assert len({id(r) for r in made}) == len(made)
    for each in made:
        assert each.label is False
        assert each.reference is None
        (source,) = [r for r in rows if r.response_ids is each.response_ids]
        assert source.prompt_ids != each.prompt_ids
        assert (each.prompt_ids, tuple(each.response_ids)) not in own


def test_negatives_follow_the_seed_and_spread_over_the_rows():
    rows = distinct(5)
    said = [[(r.prompt_ids, tuple(r.response_ids)) for r in cross_prompt(rows, 2.0, seed=s)] for s in (0, 0, 1)]
    assert said[0] == said[1] != said[2]
    counts = Counter(prompt for prompt, _ in said[0])
    assert counts == {prompt: 2 * len(group) for prompt, group in by_prompt(rows).items()}
    assert cross_prompt(rows, 0.0) == []


def test_negatives_that_do_not_fit_are_left_out():
    rows = [row(1, True, 7), row(2, True, *range(7, 17))]
    limit = len(rows[1])
    made = cross_prompt(rows, 1.0, max_length=limit - 1)
    assert {(r.prompt_ids, len(r.response_ids)) for r in made} == {(rows[1].prompt_ids, 1)}


def test_negatives_need_another_problem_and_a_number():
    assert cross_prompt(many(5), 1.0) == []  # all problems have the same responses
    with pytest.raises(ValueError, match="two problems"):
        cross_prompt(distinct(1), 0.5)
    with pytest.raises(ValueError, match="negatives=-1"):
        cross_prompt(distinct(2), -1)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_every_objective_takes_negatives(objective, tmp_path: Path):
    """Four problems with a right and a wrong response each; a negative a response: two more wrong ones a problem."""
    path = tmp_path / "r.jsonl"
    path.write_text("".join(record(i, prompt_ids=[1, i // 2], label=i % 2, response_ids=[3 + i]) for i in range(8)))
    plain, more = (load_data(path, Recipe(objective=objective, holdout=0.0, negatives=n)) for n in (0.0, 1.0))
    assert more.counts["negatives"] == 8
    assert more.counts["responses"] == plain.counts["responses"] == 8
    given = {tuple(r.prompt_ids): [] for r in more.rows}
    for each in more.rows:
        given[each.prompt_ids].append(int(each.response_ids[0]))
    if objective in ("dpo", "nca"):  # (right, wrong) of four problems; each now has three wrong ones
        assert (len(plain.items), len(more.items)) == (4, 12)
        foreign = [i for i in more.items if int(i.rows[1].response_ids[0]) not in given[i.rows[1].prompt_ids]]
        assert len(foreign) == 8
        assert all(int(i.rows[0].response_ids[0]) in given[i.rows[0].prompt_ids] for i in more.items)
    else:
        assert (len(plain.items), len(more.items)) == (8, 16)
        foreign = [i for i in more.items if int(i.rows[0].response_ids[0]) not in given[i.rows[0].prompt_ids]]
        assert [i.label for i in foreign] == [False] * 8
    assert len({id(r) for r in more.made_up}) == len(more.made_up)
    assert {id(i.rows[-1]) for i in foreign} <= {id(r) for r in more.made_up}
