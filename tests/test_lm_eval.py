"""integrations.lm_eval: lm-evaluation-harness over searches."""

from __future__ import annotations

import json
from pathlib import Path

import hf_models as hf
import pytest

import prm_search as ps

pytest.importorskip("lm_eval")
TASK = """task: sums
dataset_path: json
dataset_kwargs: {data_files: {test: FILE}}
test_split: test
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{answer}}"
repeats: REPEATS
generation_kwargs: {until: ["\\n\\n", "5"], max_gen_toks: 8, do_sample: false}
metric_list: [{metric: exact_match}]
"""


@pytest.fixture
def task(workdir: Path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(workdir / "cache"))
    rows = [{"question": f"{a}+{a}=", "answer": str(2 * a)} for a in (1, 2, 3)]
    Path("sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def written(repeats: int = 1) -> str:
        text = TASK.replace("FILE", str(workdir / "sums.jsonl")).replace("REPEATS", str(repeats))
        Path("sums.yaml").write_text(text)
        return str(workdir)

    return written


@pytest.fixture
def model():
    from prm_search.integrations.lm_eval import PRMSearchLM

    policy = hf.exact(hf.llama(0))
    pair = ps.ImplicitPRM(hf.near(policy, 1), policy, tokenizer=hf.tokenizer(), beta=0.1)
    given = {"scorer": pair, "width": 2, "expansions": 2, "delimiter": "\\n", "step_tokens": 4, "device": "cpu"}
    return lambda **more: PRMSearchLM(policy, tokenizer=hf.tokenizer(), **{**given, **more})


def evaluated(model, folder, **given):
    import lm_eval
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=folder, include_defaults=False)
    return lm_eval.simple_evaluate(model, tasks=["sums"], task_manager=manager, bootstrap_iters=0, **given)


def test_a_task_of_the_harness_is_searched_as_search_does(task, model):
    lm = model()
    found = evaluated(lm, task(), log_samples=True)
    answers = [sample["resps"][0][0] for sample in found["samples"]["sums"]]
    expected = ps.search(
        ["1+1=", "2+2=", "3+3="], policy=lm.policy, scorer=lm.scorer, strategy=ps.Beam(2, 2), steps=hf.STEPS,
        max_new_tokens=8, temperature=0.8, stop=["\n\n", "5"],
    )  # fmt: skip
    assert answers == [result.text for result in expected]
    assert lm.usage.sampled_tokens == sum((result.usage for result in expected), ps.Usage()).sampled_tokens
    assert "Beam(width=2, expansions=2" in lm.get_model_info()["prm_search"]["strategy"]


def test_repeats_of_a_prompt_draw_differently(task, model):
    found = evaluated(model(batch_size=2), task(repeats=3), log_samples=True)
    for sample in found["samples"]["sums"]:
        assert len(set(sample["resps"][0])) > 1


def test_likelihoods_are_the_plain_policys(model):
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    lm = model()
    asked = [Instance("loglikelihood", {}, (f"{a}+{a}=", "4"), a) for a in range(3)]
    assert lm.loglikelihood(asked) == HFLM(lm.model, tokenizer=hf.tokenizer(), device="cpu").loglikelihood(asked)


def request(context, **gen_kwargs):
    from lm_eval.api.instance import Instance

    return Instance("generate_until", {}, (context, {"until": [], "max_gen_toks": 4, **gen_kwargs}), 0)


def test_arguments_of_generation_are_kept_apart_and_honoured(model):
    lm = model(strategy="best_of_n", n=1, width=None, expansions=None)
    greedy, again, sampled = lm.generate_until(
        [request("ab"), request("ab", do_sample=False), request("ab", do_sample=True, temperature=1.0, top_k=3)]
    )
    assert greedy == again
    assert (
        greedy
        == ps.search(
            ["ab"],
            policy=lm.policy,
            scorer=lm.scorer,
            strategy=ps.BestOfN(1),
            steps=hf.STEPS,
            max_new_tokens=4,
            temperature=0.0,
        )[0].text
    )
    assert sampled != ""
    with pytest.raises(ValueError, match="num_beams"):
        lm.generate_until([request("ab", num_beams=4)])


def test_greedy_tasks_are_refused_where_asked(model):
    with pytest.raises(ValueError, match="temperature="):
        model(temperature=None).generate_until([request("ab")])


def test_a_long_context_keeps_its_end(model):
    lm = model(max_length=12)
    assert lm.generate_until([request("x" * 30 + "abcdefgh")]) == lm.generate_until([request("abcdefgh")])


def test_the_cache_hook_is_told_each_answer(model):
    lm, told = model(), []
    lm.cache_hook.add_partial = lambda kind, key, text: told.append((kind, key[0], text))
    texts = lm.generate_until([request("ab"), request("cd")])
    assert told == [("generate_until", "ab", texts[0]), ("generate_until", "cd", texts[1])]


def test_a_scorer_with_its_own_template_is_told_the_messages(model):
    lm = model()
    lm.tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}\n{% endfor %}"
    history = [{"role": "user", "content": "2+2"}]
    context = lm.apply_chat_template(history)
    prompt = lm._prompt(context, 100)
    assert prompt.messages == tuple(history)
    assert prompt.token_ids == tuple(lm.tok_encode(context))


@pytest.mark.parametrize(("given", "word"), [({"strategy": "best"}, "strategy"), ({"width": 0}, "width")])
def test_bad_arguments_are_named(model, given, word):
    with pytest.raises(ValueError, match=word):
        model(**given)
