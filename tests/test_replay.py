"""Recordings: searches answered from the draws and scores of others, without a model."""

from __future__ import annotations

import json
from pathlib import Path

import hf_models as hf
import pytest
from records import lines, write

import prm_search as ps
from prm_search.cli import main
from prm_search.demo.chains import problems
from prm_search.recording import NotRecorded, Recording

tokenizer, pair_of, model, pair, guided, inputs = hf.FIXTURES
PROMPTS = ["2+2=", "hello ", "2+2="]  # of equal ones each draws its own
HOW = {"steps": hf.STEPS, "max_new_tokens": 12, "temperature": 1.0, "seed": 3}


@pytest.fixture
def policy(pair_of, tokenizer):
    return ps.HFPolicy(pair_of[0], tokenizer)


def steps_of(results):
    """The steps of each tree; a model's are made in the order in which its rows end."""
    of_node = lambda n: (tuple(n.path_ids()), n.token_ids, n.text, n.finish, n.lineages, n.reward, n.value)  # noqa: E731
    return [sorted(map(of_node, result.tree.nodes[1:])) for result in results]


@pytest.mark.parametrize("strategy", [ps.BestOfN(6), ps.Beam(2, 3), ps.ParticleFilter(4), ps.MCTS(simulations=6)])
def test_the_same_search_again(strategy, policy, pair, tmp_path):
    file = tmp_path / "draws.jsonl"
    live = ps.search(PROMPTS, policy=policy, scorer=pair, strategy=strategy, record=file, **HOW)
    replayed = ps.ReplayPolicy(file)
    again = ps.search(PROMPTS, policy=replayed, scorer=ps.ReplayScorer(file), strategy=strategy, **HOW)
    assert steps_of(again) == steps_of(live)
    assert [result.text for result in again] == [result.text for result in live]
    assert all(result.usage.of_role("prm") == 0 for result in again)


def test_other_values_selections_budgets_and_fewer_samples(policy, pair, tmp_path):
    file = tmp_path / "draws.jsonl"
    ps.search(PROMPTS, policy=policy, scorer=pair, strategy=ps.BestOfN(8), record=file, **HOW)
    for other in (
        {"strategy": ps.BestOfN(3)}, {"strategy": ps.BestOfN(8), "value": "min"}, {"strategy": ps.Beam(8, 1)},
        {"strategy": ps.BestOfN(8), "select": "weighted", "answer": str.strip},
        {"strategy": ps.BestOfN(8), "budget": 500},
    ):  # fmt: skip
        live = ps.search(PROMPTS, policy=policy, scorer=pair, **HOW, **other)
        again = ps.search(PROMPTS, policy=ps.ReplayPolicy(file), scorer=ps.ReplayScorer(file), **HOW, **other)
        assert steps_of(again) == steps_of(live)
        assert [result.text for result in again] == [result.text for result in live]


def test_a_live_scorer_and_another_step_rule_on_recorded_draws(policy, pair, tmp_path):
    file = tmp_path / "draws.jsonl"
    ps.search(PROMPTS, policy=policy, strategy=ps.BestOfN(4), record=file, **HOW)
    how = HOW | {"steps": ps.StepRule(max_tokens=5), "strategy": ps.BestOfN(4)}
    live = ps.search(PROMPTS, policy=policy, scorer=pair, **how)
    again = ps.search(PROMPTS, policy=ps.ReplayPolicy(file), scorer=pair, **how)
    for one, other in zip(live, again, strict=True):
        rewards = [{tuple(node.path_ids()): node.q for node in tree.nodes} for tree in (one.tree, other.tree)]
        assert rewards[1] == pytest.approx(rewards[0], abs=1e-6)


@pytest.mark.parametrize(("other", "word"), [
    ({"strategy": ps.BestOfN(9)}, "is not recorded"), ({"strategy": ps.Beam(2, 4)}, "is not recorded"),
    ({"temperature": 0.5}, "temperature 0.5"), ({"seed": 4}, "seed 4"), ({"top_k": 3}, "top_k 3"),
    ({"prompts": ["3+3="]}, "3[+]3="), ({"steps": ps.StepRule(confidence=0.5)}, "not recorded"),
    ({"steps": ps.StepRule(max_tokens=3)}, "no recorded reward"),
])  # fmt: skip
def test_nothing_is_made_up(other, word, policy, pair, tmp_path):
    file = tmp_path / "draws.jsonl"
    ps.search(PROMPTS, policy=policy, scorer=pair, strategy=ps.BestOfN(4), record=file, **HOW)
    how = {"strategy": ps.BestOfN(4), "prompts": PROMPTS, **HOW, **other}
    with pytest.raises(ValueError, match=word):  # of a prompt, search names its place
        ps.search(policy=ps.ReplayPolicy(file), scorer=ps.ReplayScorer(file), **how)


def test_steered_draws_are_not_recorded(policy, pair, tmp_path):
    with pytest.raises(ValueError, match="record"):
        ps.search(PROMPTS, policy=policy, scorer=pair, strategy=ps.Steer(0.5), record=tmp_path / "draws.jsonl", **HOW)


def test_a_cut_last_line_is_left_out_and_other_files_are_refused(policy, pair, tmp_path):
    file = tmp_path / "draws.jsonl"
    ps.search(PROMPTS, policy=policy, scorer=pair, strategy=ps.BestOfN(2), record=file, **HOW)
    whole = file.read_text()
    file.write_text(whole[:-40])
    with pytest.raises(NotRecorded):
        ps.search(PROMPTS, policy=ps.ReplayPolicy(file), strategy=ps.BestOfN(2), **HOW)
    for text, word in (("", "no recording"), ('{"a": 1}\n', "line 1"), ("[\n" + whole, "line 1"),
                       (json.dumps({**json.loads(whole.splitlines()[0]), "tree": {}}) + "\n", "line 1")):  # fmt: skip
        file.write_text(text)
        with pytest.raises(ValueError, match=word):
            Recording(file)
    file.write_text(whole)
    with pytest.raises(ValueError, match="name='other'"):
        ps.ReplayScorer(file, "other")


ASKED = ["--data", "problems.jsonl", "--budgets", "1,4", "--label", "exact", "--delimiter", ";", "--max-new-tokens",
         "24", "--answer", "prm_search.demo.chains:answer"]  # fmt: skip


def test_eval_records_and_replays(workdir, float64_models, capsys):
    write("problems.jsonl", [{"question": p.prompt, "answer": p.answer} for p in problems(3, split="test", length=3)])
    live = ["eval", "--policy", "demo", "--pair", "demo", *ASKED, "--out", "live", "--record", "draws.jsonl"]
    assert main([*live, "--strategies", "greedy,majority,best_of_n,beam"]) == 0
    replay = ["eval", "--replay", "draws.jsonl", *ASKED]
    assert main([*replay, "--out", "again", "--strategies", "greedy,majority,best_of_n,beam"]) == 0
    told = []
    for folder in ("live", "again"):
        records = lines(f"{folder}/records.jsonl")
        samples = [[(x["text"], x["right"], x["values"]) for x in record.get("samples", ())] for record in records]
        told.append([(r["kind"], r["problem"], r.get("response"), x) for r, x in zip(records, samples, strict=True)])
    assert told[0] == told[1]
    assert main([*replay, "--out", "more", "--strategies", "best_of_n,weighted", "--values", "min"]) == 0
    capsys.readouterr()
    assert main([*replay, "--out", "other", "--strategies", "majority", "--seeds", "5"]) == 2
    assert "seed 5" in capsys.readouterr().err
    assert main([*replay, "--out", "none", "--ray"]) == 2
    assert "--replay needs no model, and so no workers: leave --ray out" in capsys.readouterr().err
    assert main([*replay, "--out", "none", "--policy", "demo"]) == 2
    assert Path("draws.jsonl").is_file()
