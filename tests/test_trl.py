"""integrations.trl: scorers as reward functions of GRPOTrainer, and the online update of a pair."""

from __future__ import annotations

import hf_models as hf
import numpy as np
import pytest

import prm_search as ps
from prm_search.integrations.trl import PRIMEReward, PRMReward

pytest.importorskip("trl")
PROMPTS = ["2+2=", "2+2=", "hello ", "hello "]
COMPLETIONS = ["4\n5", "", "you\n", "there"]


@pytest.fixture
def pair():
    model = hf.llama(0)
    return ps.ImplicitPRM(hf.near(model, 1), model, tokenizer=hf.tokenizer(), beta=0.1)


def ids_of(texts, cut=()):
    tokenizer = hf.tokenizer()
    return [
        tokenizer(text)["input_ids"] + ([] if place in cut or not text else [hf.EOS])
        for place, text in enumerate(texts)
    ]


def test_sampled_tokens_are_scored_as_they_are(pair):
    reward = PRMReward(pair, tokenizer=hf.tokenizer(), steps=hf.STEPS)
    ids = ids_of(COMPLETIONS, cut=(3,))
    rewards = reward(PROMPTS, COMPLETIONS, ids, answer=["4"] * 4)
    expected = pair.score([PROMPTS[i] for i in (0, 2, 3)], [ids[i] for i in (0, 2, 3)], steps=hf.STEPS)
    assert rewards[1] is None
    np.testing.assert_allclose([rewards[i] for i in (0, 2, 3)], [each.reward for each in expected], atol=1e-6)
    assert reward.__name__ == "prm_q"


def test_values_of_the_steps(pair):
    logged = {}
    reward = PRMReward(pair, tokenizer=hf.tokenizer(), value="min", steps=hf.STEPS)
    (worst,) = reward(PROMPTS[:1], COMPLETIONS[:1], ids_of(COMPLETIONS[:1]), log_extra=logged.__setitem__)
    (steps,) = logged["prm steps"]
    assert len(steps) == 2
    assert worst == pytest.approx(min(steps))


def test_conversations_are_rendered_by_the_chat_template(pair):
    pair.tokenizer.chat_template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    reward = PRMReward(pair, steps=hf.STEPS)
    asked, answer = [{"role": "user", "content": "2+2"}], [{"role": "assistant", "content": "4"}]
    expected = pair.score([asked], ["4"], steps=hf.STEPS)[0].reward
    assert reward([asked], [answer]) == [pytest.approx(expected)]
    with pytest.raises(ValueError, match="completions"):
        reward([asked], [[*answer, {"role": "tool", "content": "4"}]])


def test_another_tokenizer_reads_texts_and_ends_only_what_ended(pair):
    reward = PRMReward(pair, tokenizer=hf.tokenizer(reverse=True), steps=hf.STEPS)
    assert not reward.exact
    ended, cut = reward(["2+2="] * 2, ["4", "4"], [[7, hf.EOS], [7]])
    expected = pair.score(["2+2="] * 2, ["4", "4"], steps=hf.STEPS, append_eos=[True, False])
    np.testing.assert_allclose([ended, cut], [each.reward for each in expected], atol=1e-6)


@pytest.mark.parametrize(("given", "kind", "word"), [
    ({"scorer": object()}, TypeError, "scorer"),
    ({"value": "best"}, ValueError, "value"),
    ({"steps": "\n"}, TypeError, "steps"),
])  # fmt: skip
def test_bad_arguments_are_named(pair, given, kind, word):
    with pytest.raises(kind, match=word):
        PRMReward(**{"scorer": pair, **given})


def test_prime_needs_the_sampled_tokens(pair):
    with pytest.raises(ValueError, match="tokenizer"):
        PRIMEReward(pair, lambda **_: [], tokenizer=hf.tokenizer(reverse=True))
    with pytest.raises(ValueError, match="completion_ids"):
        PRIMEReward(pair, lambda **_: [], tokenizer=hf.tokenizer())(PROMPTS, COMPLETIONS)


def test_two_steps_of_grpo_with_prime(pair, tmp_path):
    """Every completion is an outcome once; the pair learns from them, and the policy from its rewards."""
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    tokenizer = hf.tokenizer()
    seen = []

    def label(completions, completion_ids, **columns):
        seen.extend(map(tuple, completion_ids))
        return [float(place % 2) for place in range(len(completions))]  # half of each prompt's are right

    prime = PRIMEReward(pair, label, tokenizer=tokenizer, steps=hf.STEPS, learning_rate=1e-3)
    before = [weight.detach().clone() for weight in pair.prm.module.parameters()]
    config = GRPOConfig(
        output_dir=str(tmp_path), per_device_train_batch_size=4, num_generations=4, max_completion_length=6,
        max_steps=2, use_cpu=True, report_to="none", disable_tqdm=True, logging_steps=1, save_strategy="no",
        seed=0, beta=0.0,
    )  # fmt: skip
    trainer = GRPOTrainer(
        hf.llama(0), reward_funcs=[prime], args=config, train_dataset=Dataset.from_dict({"prompt": ["2+2=", "ab"] * 4}),
        processing_class=tokenizer, callbacks=[prime.callback],
    )  # fmt: skip
    trainer.train()
    assert len(seen) == sum(len(update.kept) for update in prime.updates) == 8
    assert len(prime.updates) == 2
    assert all(update.updated for update in prime.updates)
    assert any((weight != old).any() for weight, old in zip(pair.prm.module.parameters(), before, strict=True))
    assert [f"rewards/{prime.__name__}/mean" in row for row in trainer.state.log_history[:2]] == [True, True]
    assert prime.update() is None
