"""Rollouts: what is drawn, how it is labelled, what is read and written, and a run that is killed and resumed."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
from processes import AFTER_RECORDS, held, python
from records import lines, same, write
from transformers import AutoModelForCausalLM, AutoTokenizer

import prm_search as ps
from prm_search.cli import main
from prm_search.commands import BadInput
from prm_search.commands.problems import read_problems
from prm_search.demo import pair_dir
from prm_search.demo.chains import answer as chain_answer, problems
from prm_search.demo.tokenizer import EOS_ID
from prm_search.policies.hf import HFPolicy
from prm_search.problems import Judge, final_answer, stated_answer
from prm_search.protocols import Sampling
from prm_search.training.rollouts import Problem, sample_rollouts
from prm_search.tree import Prompt

ASKED = problems(6, split="prm", length=3)
PROBLEMS = [Problem(Prompt(text=p.prompt), p.answer) for p in ASKED]
SAMPLING = Sampling(ps.StepRule(";"), temperature=1.0, max_new_tokens=32, seed=3)
JUDGE = Judge("exact", chain_answer)


@pytest.fixture(scope="module")
def policy(float64_models):
    folder = pair_dir() / "policy"  # a model of its own: loaders share theirs with other tests, and so its KV
    return HFPolicy(AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder))


@pytest.fixture
def folder(workdir: Path, policy: object) -> Path:
    rows = [{"id": f"p{i}", "question": p.prompt, "answer": f"by hand\n#### {p.answer}"} for i, p in enumerate(ASKED)]
    write("problems.jsonl", rows)
    return workdir


def drawn(policy: object, **given: object) -> dict[tuple[int, int], object]:
    options = {"policy": policy, "n": 4, "sampling": SAMPLING, "label": JUDGE} | given
    found = list(sample_rollouts(PROBLEMS, **options))
    assert len({(r.problem, r.sample) for r in found}) == len(found)
    return {(r.problem, r.sample): r for r in found}


# -- drawing -----------------------------------------------------------------------------------------------------------


def test_rollouts_are_the_draws_of_best_of_n(policy):
    got = drawn(policy)
    results = ps.search(
        [p.prompt for p in ASKED], policy=policy, strategy=ps.BestOfN(4), steps=SAMPLING.steps, max_new_tokens=32,
        temperature=1.0, seed=3,
    )  # fmt: skip
    for i, result in enumerate(results):
        ends = [node for node in result.candidates for _ in range(node.count)]
        assert sorted(tuple(node.path_ids()) for node in ends) == sorted(got[i, k].response_ids for k in range(4))


def test_records_are_token_exact_and_labelled(policy):
    for (i, _), rollout in drawn(policy).items():
        assert rollout.prompt_ids == policy.encode(PROBLEMS[i].prompt)
        assert rollout.finish == "stop"
        assert rollout.response_ids[-1] == EOS_ID
        assert rollout.response_ids.count(EOS_ID) == 1
        assert policy.tokenizer.decode(rollout.response_ids, skip_special_tokens=True) == rollout.text
        assert rollout.answer == chain_answer(rollout.text)
        assert rollout.label == (rollout.answer == ASKED[i].answer)


def test_both_labels_come_up(policy):
    assert {rollout.label for rollout in drawn(policy).values()} == {True, False}


def test_batch_and_what_is_done_change_no_draw(policy):
    whole = drawn(policy)
    done = [(0, 1), (2, 0), (2, 1), (2, 2), (2, 3), (5, 3)]
    rest = drawn(policy, batch=1, done=done)
    assert set(rest) == set(whole) - set(done)
    assert all(rest[place] == whole[place] for place in rest)


def test_equal_problems_draw_differently(policy):
    twice = [PROBLEMS[0]] * 2
    found = list(sample_rollouts(twice, policy=policy, n=6, sampling=SAMPLING, label=JUDGE))
    first, second = ([r.response_ids for r in found if r.problem == i] for i in (0, 1))
    assert sorted(first) != sorted(second)


def test_a_cut_response_is_wrong_and_has_no_end_of_sequence(policy):
    short = Sampling(ps.StepRule(";"), max_new_tokens=3)
    for rollout in drawn(policy, sampling=short, label=lambda text, right: (right, True)).values():
        assert (rollout.finish, rollout.label, rollout.answer) == ("length", False, None)
        assert len(rollout.response_ids) == 3
        assert EOS_ID not in rollout.response_ids


def test_the_context_limits_the_response(policy):
    prompt = "=5" + "a*7" * 60 + "?"
    (rollout,) = sample_rollouts(
        [Problem(Prompt(text=prompt), "1")], policy=policy, n=1, sampling=Sampling(ps.StepRule(";")), label=JUDGE
    )
    assert len(rollout.prompt_ids) + len(rollout.response_ids) <= policy.context


def test_each_is_given_out_when_it_is_finished_and_kv_is_freed(policy):
    flow = sample_rollouts(PROBLEMS, policy=policy, n=4, sampling=SAMPLING, label=JUDGE)
    next(flow)
    assert policy.lm.tree.used > 0
    flow.close()
    assert policy.lm.tree.used == 0
    drawn(policy)
    assert policy.lm.tree.used == 0


@pytest.mark.parametrize(
    ("given", "kind", "word"),
    [({"n": 0}, ValueError, "n=0"), ({"batch": 0}, ValueError, "batch=0"), ({"policy": 3}, TypeError, "policy")],
)
def test_bad_arguments_are_named_at_once(policy, given, kind, word):
    options = {"policy": policy, "n": 1, "sampling": SAMPLING, "label": JUDGE} | given
    with pytest.raises(kind, match=word):
        sample_rollouts(PROBLEMS, **options)


# -- labels ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("so 3 + 4 = 7\n#### 7", "7"),
        (r"thus \boxed{\frac{1}{2}}, not 3", r"\frac{1}{2}"),
        ("it is 1,234 apples", "1,234"),
        ("none", None),
    ],
)
def test_final_answer(text, found):
    assert final_answer(text) == found


def test_reference_answers_of_gsm8k_and_math():
    assert stated_answer("He has <<3+4=7>>7.\n#### 7") == "7"
    assert stated_answer(r"So $x = \boxed{\sqrt{2}}$.") == r"\sqrt{2}"
    assert stated_answer(" 12 ") == "12"


def test_labels_by_math_are_more_lenient_than_exact_ones():
    assert Judge("exact")("it is 0.50", "1/2") == ("0.50", True)  # one spelling of numbers
    assert Judge("exact")(r"\boxed{2\sqrt{2}}", r"\sqrt{8}") == (r"2\sqrt{2}", False)
    assert Judge("math")(r"\boxed{2\sqrt{2}}", r"\sqrt{8}") == (r"2\sqrt{2}", True)
    assert Judge("math")("no idea", "3") == (None, False)
    assert Judge("math", "boxed")("it is 3", "3") == (None, False)
    assert Judge(lambda text, right: right in text)("so 3!", "3") == (None, True)


@pytest.mark.parametrize(
    ("given", "kind", "word"),
    [(("fuzzy",), ValueError, "same"), ((3,), TypeError, "same"), (("exact", "any"), ValueError, "answer")],
)
def test_bad_judges(given, kind, word):
    with pytest.raises(kind, match=word):
        Judge(*given)


def test_math_labels_need_math_verify(monkeypatch):
    monkeypatch.setattr("prm_search.problems.find_spec", lambda name: None)
    with pytest.raises(ImportError, match="math-verify"):
        Judge("math")
    assert Judge("exact")("7", "7") == ("7", True)


# -- problems ----------------------------------------------------------------------------------------------------------


def test_columns_of_gsm8k_and_math_files(folder):
    rows = [
        {"question": "How many?", "answer": "It is <<1+1=2>>2.\n#### 2"},
        {"problem": "What is x?", "solution": r"It is $\boxed{3}$.", "level": "Level 1"},
        {"problem": "What is y?", "solution": r"It is $\boxed{3.5}$.", "answer": "3.5"},
        {"prompt": [4, 5], "answer": 7},
        {"messages": [{"role": "user", "content": "Hi"}], "answer": "8", "id": 9},
    ]
    Path("mixed.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    items = read_problems("mixed.jsonl")
    assert [item.response for item in items] == ["2", "3", "3.5", "7", "8"]
    assert items[0].prompt == Prompt(text="How many?")
    assert items[3].prompt == Prompt(token_ids=(4, 5))
    assert items[4].extra == {"id": 9}
    assert len(read_problems("mixed.jsonl", limit=2)) == 2


def test_template_and_chat(folder):
    (item,) = read_problems("problems.jsonl", limit=1, template="Q: {}\nA:")
    assert item.prompt.text == f"Q: {ASKED[0].prompt}\nA:"
    (item,) = read_problems("problems.jsonl", limit=1, template="Q: {}", chat=True, system="Add.")
    assert [m["content"] for m in item.prompt.messages] == ["Add.", f"Q: {ASKED[0].prompt}"]


def test_data_sets_by_name(folder, monkeypatch):
    asked = []

    def load_dataset(name, config, split):
        asked.append((name, config, split))
        return [{"question": "How many?", "answer": "#### 2"}]

    fake = ModuleType("datasets")
    fake.load_dataset = load_dataset
    monkeypatch.setitem(sys.modules, "datasets", fake)
    (item,) = read_problems("openai/gsm8k", config="main", split="test")
    assert asked == [("openai/gsm8k", "main", "test")]
    assert (item.prompt.text, item.response) == ("How many?", "2")

    fake.load_dataset = lambda *given, **options: (_ for _ in ()).throw(RuntimeError("no such split"))
    with pytest.raises(BadInput, match="no such split"):
        read_problems("openai/gsm8k")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(BadInput, match="datasets"):
        read_problems("openai/gsm8k")


def test_a_data_set_of_this_machine_by_name(folder):
    """`datasets` itself, on a folder as its users have them: splits are files, the name is the folder's."""
    pytest.importorskip("datasets")
    Path("sums").mkdir()
    for split, answers in (("train", ["#### 1", "#### 2"]), ("test", ["steps\n#### 3"])):
        rows = [{"question": f"{split} {i}", "answer": answer} for i, answer in enumerate(answers)]
        Path(f"sums/{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = [
        [(item.prompt.text, item.response) for item in read_problems("./sums", split=s)] for s in ("train", "test")
    ]
    assert found == [[("train 0", "1"), ("train 1", "2")], [("test 0", "3")]]
    (item,) = read_problems("./sums", limit=1)
    assert item.where == "./sums [train], row 0"
    with pytest.raises(BadInput, match="sums cannot be loaded"):
        read_problems("./sums", split="dev")


BAD = {
    "no such file": (["--data", "none.jsonl"], "none.jsonl"),
    "no answer": (["--data", "unanswered.jsonl"], "unanswered.jsonl, line 1"),
    "two questions": (["--data", "twofold.jsonl"], "twofold.jsonl, line 1"),
    "empty file": (["--data", "empty.jsonl"], "no problems"),
    "template without a place": (["--data", "problems.jsonl", "--template", "Q:"], "--template"),
    "n 0": (["--data", "problems.jsonl", "--n", "0"], "--n 0"),
    "unknown label": (["--data", "problems.jsonl", "--label", "fuzzy"], "--label"),
    "unknown answer": (["--data", "problems.jsonl", "--answer", "any"], "--answer"),
    "no such module": (["--data", "problems.jsonl", "--answer", "nowhere:f"], "nowhere"),
    "no such function": (["--data", "problems.jsonl", "--answer", "prm_search.demo.chains:none"], "none"),
    "no such script": (["--data", "problems.jsonl", "--label", "none.py:f"], "none.py"),
    "answer beside a function": (["--data", "problems.jsonl", "--label", "os:getcwd", "--answer", "####"], "--answer"),
    "temperature": (["--data", "problems.jsonl", "--temperature", "-1"], "temperature"),
    "prompt too long": (["--data", "long.jsonl"], "long.jsonl, line 1"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_and_leaves_no_file(folder, capsys, case):
    Path("unanswered.jsonl").write_text('{"question": "=5a*7?"}\n')
    Path("twofold.jsonl").write_text('{"question": "=5a*7?", "prompt": "x", "answer": 1}\n')
    Path("long.jsonl").write_text(json.dumps({"question": "=5" + "a*7" * 70 + "?", "answer": 1}) + "\n")
    Path("empty.jsonl").write_text("")
    args, word = BAD[case]
    assert main(["rollout", "--policy", "demo", "--out", "out.jsonl", *args]) == 2
    said = capsys.readouterr().err
    assert word in said
    assert said.count("\n") == 1
    assert not Path("out.jsonl").exists()


def test_help_loads_no_model_library(tmp_path):
    code = (
        "import sys; from prm_search.cli import main; "
        "assert main(['rollout', '--help']) == main(['train', '--help']) == 0; "
        "print([m for m in ('torch', 'transformers', 'datasets') if m in sys.modules])"
    )
    assert python(code, tmp_path).splitlines()[-1] == "[]"


# -- the command -------------------------------------------------------------------------------------------------------

COMMAND = ["rollout", "--policy", "demo", "--data", "problems.jsonl", "--n", "4", "--out"]


def test_command_writes_a_record_a_response(folder, capsys):
    assert main([*COMMAND, "out.jsonl", "--label", "exact", "--answer", "prm_search.demo.chains:answer"]) == 0
    records = lines("out.jsonl")
    assert sorted(r["index"] for r in records) == list(range(24))
    for r in records:
        assert (r["id"], r["reference_answer"]) == (f"p{r['problem']}", ASKED[r["problem"]].answer)
        assert r["label"] == int(r["answer"] == r["reference_answer"])
        assert r["response_ids"][-1] == EOS_ID
    right = sum(r["label"] for r in records)
    assert f"24 responses to 6 problems: {right} right" in capsys.readouterr().err


def test_a_function_of_the_user_labels(folder):
    Path("mine.py").write_text("def even(text, answer):\n    return text[-1] in '02468'\n")
    before = list(sys.path)
    assert main([*COMMAND, "out.jsonl", "--label", "mine.py:even"]) == 0
    assert main([*COMMAND, "again.jsonl", "--label", "mine:even"]) == 0
    assert sys.path == before
    assert all(r["label"] == int(r["response"][-1] in "02468") for r in lines("out.jsonl"))


def test_other_settings_are_not_mixed_in(folder, capsys):
    assert main([*COMMAND, "out.jsonl", "--limit", "1"]) == 0
    assert main([*COMMAND, "out.jsonl", "--limit", "1"]) == 2
    assert "--resume" in capsys.readouterr().err
    assert main([*COMMAND, "out.jsonl", "--limit", "1", "--seed", "1", "--resume"]) == 2
    assert "same ones" in capsys.readouterr().err
    assert len(lines("out.jsonl")) == 4


def test_killed_and_resumed_is_as_if_never_killed(folder, float64_models):
    """SIGKILL in the middle: nothing that was finished is lost, nothing is drawn twice, the whole is the same."""
    more = problems(30, split="prm", length=8)
    write("many.jsonl", [{"prompt": p.prompt, "answer": p.answer} for p in more])
    args = ["rollout", "--policy", "demo", "--data", "many.jsonl", "--n", "4", "--label", "exact", "--batch", "8"]
    with held(AFTER_RECORDS.replace("COUNT", "20"), *args, "--out", "out.jsonl"):
        pass
    out = Path("out.jsonl")
    kept = out.read_bytes()
    assert kept.count(b"\n") == 20
    with out.open("ab") as file:  # a line that was being written
        file.write(b'{"index": 3, "ke')
    assert main([*args, "--out", str(out), "--resume"]) == 0
    assert out.read_bytes().startswith(kept)
    assert main([*args, "--out", "whole.jsonl"]) == 0
    resumed, whole = lines("out.jsonl"), lines("whole.jsonl")
    assert len(resumed) == len(whole) == 120
    assert same(*(sorted(records, key=lambda record: record["index"]) for records in (resumed, whole)))
