"""OnlineUpdater: what it learns, what it leaves alone, what is forgotten, and leave-one-out advantages."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from models import naive_logprobs
from peft import LoraConfig, get_peft_model

import prm_search as ps
from prm_search.commands.models import load_policy
from prm_search.demo.chains import answer as chain_answer, problems
from prm_search.driver.loop import SearchLoop
from prm_search.driver.search_settings import SearchSettings
from prm_search.problems import Judge
from prm_search.protocols import Sampling
from prm_search.training.online import OnlineUpdater, Outcome, leave_one_out
from prm_search.training.rollouts import Problem, sample_rollouts
from prm_search.tree import Prompt

STEPS = ps.StepRule(";")


@pytest.fixture(scope="module")
def policy():
    return load_policy("demo")


@pytest.fixture(scope="module")
def outcomes(policy) -> list[Outcome]:
    asked = [Problem(Prompt(text=p.prompt), p.answer) for p in problems(40, split="prm", length=2)]
    drawn = sample_rollouts(
        asked, policy=policy, n=8, sampling=Sampling(STEPS, max_new_tokens=16), label=Judge("exact", chain_answer)
    )
    found = sorted(drawn, key=lambda r: (r.problem, r.sample))
    return [Outcome(r.prompt_ids, r.response_ids, r.label) for r in found]


@pytest.fixture
def pair(policy) -> ps.ImplicitPRM:
    return ps.ImplicitPRM(copy.deepcopy(policy.lm.module), policy, tokenizer=policy.tokenizer)


def rewards(pair: ps.ImplicitPRM, some: list[Outcome]) -> list[np.ndarray]:
    scores = pair.score([o.prompt_ids for o in some], [list(o.response_ids) for o in some])
    return [s.token_rewards for s in scores]


# -- advantages --------------------------------------------------------------------------------------------------------


def test_leave_one_out_by_hand():
    # mean token rewards 2, 1, 0: of the first the others' mean is 1/2, of the second 1, of the third 3/2
    tokens = [np.array([1.0, 3.0]), np.array([1.0]), np.array([0.0, 0.0])]
    first, second, third = leave_one_out(tokens, [True, False, False])
    assert first.tolist() == pytest.approx([0.5 + 2.5 + 1, 2.5 + 1])
    assert second.tolist() == pytest.approx([0.0 - 0.5])
    assert third.tolist() == pytest.approx([-3.0 - 0.5, -1.5 - 0.5])
    assert leave_one_out(tokens, [True, False, False], 0.5)[0].tolist() == pytest.approx([0.5 + 1.25 + 1, 2.5 + 1])


def test_leave_one_out_needs_others():
    for tokens, labels in (([np.ones(2)], [True]), ([np.ones(2)] * 2, [True]), ([np.ones(2), np.ones(0)], [1, 0])):
        with pytest.raises(ValueError, match="two at least"):
            leave_one_out(tokens, labels)


# -- forgetting --------------------------------------------------------------------------------------------------------


def test_forgotten_weights_leave_no_trace(pair, outcomes):
    tree = ps.SearchTree(Prompt(token_ids=tuple(outcomes[0].prompt_ids)))
    node = tree.add(tree.root, token_ids=list(outcomes[0].response_ids))
    pair.score_nodes([node])
    assert pair.prm.tree.used > 0
    before = pair.prm.id
    with torch.no_grad():
        for weight in pair.prm.module.parameters():
            weight.mul_(1.1)
    pair.prm.forget()
    assert pair.prm.tree.used == 0
    assert pair.prm.id != before
    assert pair.models["prm"] == pair.prm.id
    pair.release(tree)
    fresh = ps.SearchTree(tree.prompt)
    pair.score_nodes([end := fresh.add(fresh.root, token_ids=node.token_ids)])
    ids, at = [*tree.prompt_ids, *node.token_ids], len(tree.prompt_ids)
    plain = [naive_logprobs(lm.module, ids)[at:] for lm in (pair.prm, pair.reference)]
    assert np.abs(end.token_rewards - 0.05 * (plain[0] - plain[1])).max() < 1e-5
    pair.release(fresh)  # its reference is shared by this file's tests


def test_a_running_search_is_not_pulled_from_under(policy, outcomes):
    own = ps.HFPolicy(copy.deepcopy(policy.lm.module), policy.tokenizer)
    with SearchLoop(own) as loop:
        loop.add(Prompt(text="=5a*7b+3c*9?"), SearchSettings.make(strategy=ps.BestOfN(2), steps=STEPS))
        loop.step()
        loop.step()
        with pytest.raises(ValueError, match="under way"):
            own.lm.forget()


# -- learning ----------------------------------------------------------------------------------------------------------


def test_it_learns_to_tell_right_from_wrong(pair, outcomes):
    base = copy.deepcopy(pair.reference.module.state_dict())
    updater = OnlineUpdater(pair, learning_rate=2e-3, micro_batch=256)
    first = updater.add(outcomes)
    assert first.updated
    assert first.accuracy_before == pytest.approx(0.5)  # every reward is 0
    assert first.loss == pytest.approx(np.log(2), abs=1e-5)
    assert first.accuracy_after > 0.5
    for _ in range(10):
        last = updater.add(outcomes)
    assert last.loss < 0.66
    assert last.accuracy_after > 0.75
    assert all(torch.equal(base[name], weight) for name, weight in pair.reference.module.state_dict().items())
    kept = [o for o, inside in zip(outcomes, last.kept, strict=True) if inside]
    sums = [float(r.sum()) for r in rewards(pair, kept)]
    right, wrong = (np.mean([s for s, o in zip(sums, kept, strict=True) if o.label is is_]) for is_ in (True, False))
    assert right > wrong


def test_advantages_are_those_of_the_pairs_rewards(pair, outcomes):
    updater = OnlineUpdater(pair, learning_rate=2e-3, micro_batch=256, discount=0.9, band=None)
    updater.add(outcomes)
    group = outcomes[:8]
    expected = leave_one_out(rewards(pair, group), [o.label for o in group], 0.9)
    found = updater.add(group).advantages
    for ours, theirs in zip(found, expected, strict=True):
        assert np.abs(ours - theirs).max() < 1e-4


def test_the_band_keeps_prompts_that_teach(pair, outcomes):
    updater = OnlineUpdater(pair, every=100)
    update = updater.add(outcomes)
    for start in range(0, len(outcomes), 8):
        share = np.mean([o.label for o in outcomes[start : start + 8]])
        assert set(update.kept[start : start + 8]) == {0.2 < share < 0.8}
        assert all((a is None) == (not 0.2 < share < 0.8) for a in update.advantages[start : start + 8])
    assert 0 < sum(update.kept) < len(outcomes)
    assert all(OnlineUpdater(pair, every=100, band=None).add(outcomes).kept)
    alone = updater.add([outcomes[0]])
    assert alone.advantages == (None,)


def test_it_trains_every_so_many_batches_on_all_of_them(pair, outcomes):
    updater = OnlineUpdater(pair, learning_rate=1e-3, every=2, band=None, micro_batch=256)
    before = copy.deepcopy(pair.prm.module.state_dict())
    half = updater.add(outcomes[:80])
    assert (half.updated, half.loss, half.accuracy_after) == (False, None, None)
    assert all(torch.equal(before[name], weight) for name, weight in pair.prm.module.state_dict().items())
    assert updater.add(outcomes[80:160]).updated
    whole = ps.ImplicitPRM(copy.deepcopy(pair.reference.module), pair.reference, tokenizer=pair.tokenizer)
    OnlineUpdater(whole, learning_rate=1e-3, band=None, micro_batch=16).add(outcomes[:160])
    for one, two in zip(pair.prm.module.parameters(), whole.prm.module.parameters(), strict=True):
        assert (one - two).abs().max() < 5e-4  # Adam's first step is a sign; micro-batches round differently
    assert not updater.add(outcomes[:8]).updated


def test_a_refused_batch_can_be_given_again(pair, policy, outcomes):
    """While a search samples from the model, nothing is trained, and nothing of this batch or earlier ones is lost."""
    updater = OnlineUpdater(pair, learning_rate=1e-3, every=2, band=None, micro_batch=256)
    updater.add(outcomes[:80])
    own = ps.HFPolicy(pair.prm.module, policy.tokenizer)
    assert own.lm is pair.prm
    with SearchLoop(own) as loop:
        loop.add(Prompt(text="=5a*7b+3c*9?"), SearchSettings.make(strategy=ps.BestOfN(2), steps=STEPS))
        loop.step()
        loop.step()
        with pytest.raises(ValueError, match="under way"):
            updater.add(outcomes[80:160])
    update = updater.add(outcomes[80:160])
    assert update.updated
    whole = ps.ImplicitPRM(copy.deepcopy(pair.reference.module), pair.reference, tokenizer=pair.tokenizer)
    other = OnlineUpdater(whole, learning_rate=1e-3, band=None, micro_batch=256).add(outcomes[:160])
    assert (update.loss, update.accuracy_before) == pytest.approx((other.loss, other.accuracy_before), abs=1e-5)


def test_an_adapter_is_trained_alone(policy, outcomes):
    module = get_peft_model(
        copy.deepcopy(policy.lm.module), LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    ).eval()
    pair = ps.ImplicitPRM(module, tokenizer=policy.tokenizer)
    before = copy.deepcopy(module.state_dict())
    updater = OnlineUpdater(pair, learning_rate=1e-2, micro_batch=256)
    for _ in range(6):
        update = updater.add(outcomes)
    assert update.accuracy_after > 0.6
    changed = {name for name, weight in module.state_dict().items() if not torch.equal(before[name], weight)}
    assert changed
    assert all("lora_" in name for name in changed)
    assert max(np.abs(r).max() for r in rewards(pair, outcomes[:8])) > 0


def test_search_goes_on_with_the_new_rewards(pair, policy, outcomes):
    updater = OnlineUpdater(pair, learning_rate=2e-3, micro_batch=256)
    updater.add(outcomes)
    (result,) = ps.search(["=5a*7b+3c*9?"], policy=policy, scorer=pair, strategy=ps.Beam(2, 2), steps=STEPS)
    ids = [*result.tree.prompt_ids, *result.token_ids]
    plain = [naive_logprobs(lm.module, ids)[len(result.tree.prompt_ids) :] for lm in (pair.prm, policy.lm)]
    assert result.node.q == pytest.approx(0.05 * float((plain[0] - plain[1]).sum()), abs=1e-4)


BAD = {
    "learning_rate": {"learning_rate": 0.0},
    "every": {"every": 0},
    "micro_batch": {"micro_batch": True},
    "discount": {"discount": 1.5},
    "band": {"band": (0.8, 0.2)},
    "clip": {"clip": float("inf")},
}


@pytest.mark.parametrize("name", BAD)
def test_bad_numbers_are_named(pair, name):
    with pytest.raises(ValueError, match=name):
        OnlineUpdater(pair, **BAD[name])


def test_pairs_that_cannot_be_trained_are_refused(pair, policy):
    with pytest.raises(TypeError, match="pair"):
        OnlineUpdater(policy)
    with pytest.raises(ValueError, match="no reference"):
        OnlineUpdater(ps.ImplicitPRM(pair.prm, ps.ConstantReference(0.0), tokenizer=policy.tokenizer))
    with pytest.warns(UserWarning, match="same weights"):
        same = ps.ImplicitPRM(policy, policy)
    with pytest.raises(ValueError, match="same weights"):
        OnlineUpdater(same)
    half = ps.ImplicitPRM(copy.deepcopy(policy.lm.module).bfloat16(), policy, tokenizer=policy.tokenizer)
    with pytest.raises(ValueError, match="bfloat16"):
        OnlineUpdater(half)
    with pytest.raises(ValueError, match=r"outcomes\[0\]"):
        OnlineUpdater(pair).add([Outcome([1], [], True)])
