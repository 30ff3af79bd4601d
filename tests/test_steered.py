"""Steering: every token is drawn from policy logits + alpha * (log pi_phi - log pi_ref), whatever does the drawing."""

from __future__ import annotations

import gc
import weakref

import hf_models as hf
import numpy as np
import pytest
import torch
from exact import exact
from transformers.generation import RepetitionPenaltyLogitsProcessor

import prm_search as ps
from prm_search.engine.sampler import Sampler

ALPHA = 1.7


@pytest.fixture(scope="module")
def tokenizer():
    return hf.tokenizer()


@pytest.fixture(scope="module")
def models():
    """Policy, trained model, reference: three different ones."""
    policy = exact(hf.llama(0))
    return policy, hf.near(policy, 1, 0.1), hf.near(policy, 2, 0.1)


@pytest.fixture(scope="module", params=["shared", "three"])
def case(request, models, tokenizer):
    """Policy, pair and the modules of both; once with the policy as reference."""
    policy, trained, reference = models
    reference = policy if request.param == "shared" else reference
    return policy, ps.ImplicitPRM(trained, reference, tokenizer=tokenizer, beta=0.1), trained, reference


@pytest.fixture(scope="module")
def inputs(tokenizer):
    return tokenizer(["2+2=", "hello there, ", "a"], return_tensors="pt", padding=True)


def prompts(inputs):
    return [[i for i in row if i != hf.PAD] for row in inputs["input_ids"].tolist()]


@torch.no_grad()
def naive(case, ids, alpha=ALPHA, processors=()):
    """Steered logits after ids and the three log-probabilities, by plain forwards without a cache."""
    policy, _, trained, reference = case
    ids = torch.tensor([ids])
    plain, phi, ref = (model(ids).logits[:, -1].float() for model in (policy, trained, reference))
    logits = plain + alpha * (phi.log_softmax(-1) - ref.log_softmax(-1))
    for processor in processors:
        logits = processor(ids, logits)
    return logits[0], plain.log_softmax(-1)[0], phi.log_softmax(-1)[0], ref.log_softmax(-1)[0]


def greedy(case, prompt, count, **given):
    """Tokens of the naive loop, and each token's log-probability under policy, trained model and reference."""
    ids, logprobs = list(prompt), []
    while len(ids) < len(prompt) + count and (len(ids) == len(prompt) or ids[-1] != hf.EOS):
        logits, *tables = naive(case, ids, **given)
        ids.append(int(logits.argmax()))
        logprobs.append([float(table[ids[-1]]) for table in tables])
    return ids[len(prompt) :], np.array(logprobs)


def check(case, node, wanted, logprobs):
    """The path of a node is the naive one, log-probabilities and rewards included."""
    pair = case[1]
    assert node.path_ids() == wanted
    np.testing.assert_allclose(np.concatenate([step.logprobs for step in node.path()]), logprobs[:, 0], atol=1e-4)
    rewards = np.concatenate([step.token_rewards for step in node.path()])
    np.testing.assert_allclose(rewards, pair.beta * (logprobs[:, 1] - logprobs[:, 2]), atol=1e-4)


def test_generate_is_the_naive_loop(case, inputs, tokenizer):
    policy, pair, *_ = case
    out = policy.generate(
        **inputs, max_new_tokens=12, do_sample=False, return_dict_in_generate=True, custom_generate=ps.generate,
        prm_guidance=ps.PRMGuidance(pair, strategy=ps.Steer(ALPHA), steps=hf.STEPS),
    )  # fmt: skip
    plain = policy.generate(**inputs, max_new_tokens=12, do_sample=False)
    assert not torch.equal(out.sequences, plain)  # it does steer
    for prompt, result in zip(prompts(inputs), out.prm, strict=True):
        check(case, result.node, *greedy(case, prompt, 12))


def test_search_is_the_naive_loop_and_beam_of_one_too(case, inputs, tokenizer):
    policy, pair, *_ = case
    for strategy, steered in [
        (ps.Steer(ALPHA), False),
        (ps.BestOfN(1), True),
        (ps.Beam(1, 1), True),
    ]:
        model = ps.HFPolicy(policy, tokenizer)
        results = ps.search(
            prompts(inputs), policy=ps.Steered(model, pair, ALPHA) if steered else model, scorer=pair,
            strategy=strategy, steps=hf.STEPS, max_new_tokens=9, temperature=0.0,
        )  # fmt: skip
        for prompt, result in zip(prompts(inputs), results, strict=True):
            check(case, result.node, *greedy(case, prompt, 9))


def test_processors_see_steered_logits(case, inputs):
    """A repetition penalty depends on the sign of a logit: log-probabilities in its place would change the tokens."""
    policy, pair, *_ = case
    out = policy.generate(
        inputs["input_ids"][1:2], max_new_tokens=12, do_sample=False, repetition_penalty=0.5,
        return_dict_in_generate=True, custom_generate=ps.generate,
        prm_guidance=ps.PRMGuidance(pair, strategy=ps.Steer(ALPHA), steps=hf.STEPS),
    )  # fmt: skip
    prompt = prompts(inputs)[1]
    penalty = RepetitionPenaltyLogitsProcessor(0.5)
    wanted, logprobs = greedy(case, prompt, 12, processors=[penalty])
    normalised = [lambda ids, scores: scores.log_softmax(-1), penalty]
    assert wanted != greedy(case, prompt, 12, processors=normalised)[0] != greedy(case, prompt, 12)[0]
    check(case, out.prm[0].node, wanted, logprobs)


@pytest.mark.parametrize("strategy", [ps.BestOfN(4), ps.Beam(2, 3), ps.Lookahead(2, 2), ps.DVTS(2, 1, 2)])
def test_every_row_of_every_strategy_is_steered(case, inputs, tokenizer, strategy):
    seen = []

    class Recording(Sampler):
        def scores(self, logprobs, rows):
            out = super().scores(logprobs, rows)
            seen.append(([row.ids() for row in rows], out))
            return out

    policy, pair, *_ = case
    steered = ps.Steered(ps.HFPolicy(policy, tokenizer, sampler=Recording()), pair, ALPHA)
    uneven = ps.StepRule(delimiter=[chr(i) for i in range(33, 127, 2)], max_tokens=4)
    results = ps.search(
        prompts(inputs)[:2], policy=steered, scorer=pair, strategy=strategy, steps=uneven, max_new_tokens=7,
        temperature=0.7, seed=5,
    )  # fmt: skip
    assert any(len({len(row) for row in rows}) > 1 for rows, _ in seen)
    for rows, out in seen[:: max(1, len(seen) // 6)]:
        for row, scores in zip(rows, out, strict=True):
            wanted = naive(case, row)[0] / 0.7
            np.testing.assert_allclose(scores.log_softmax(-1), wanted.log_softmax(-1), atol=1e-4)
    for result in results:
        for node in result.tree.nodes[1:]:
            context = [*result.tree.prompt_ids, *node.path_ids()]
            *_, plain, phi, ref = naive(case, context[:-1])
            last = context[-1]
            assert float(node.logprobs[-1]) == pytest.approx(float(plain[last]), abs=1e-4)
            assert float(node.token_rewards[-1]) == pytest.approx(0.1 * float(phi[last] - ref[last]), abs=1e-4)


def test_a_model_in_two_parts_runs_once(case, inputs, tokenizer):
    """Three models or two, each encodes a token at most once; scoring what steering has drawn costs nothing."""
    policy, pair, _, reference = case
    steered = ps.Steered(ps.HFPolicy(policy, tokenizer), pair, ALPHA)
    shared = reference is policy
    before = {lm: lm.forwards for lm in steered._decoder.lms}
    assert len(before) == (2 if shared else 3)
    results = ps.search(
        prompts(inputs), policy=steered, scorer=pair, strategy=ps.Beam(2, 2), steps=hf.STEPS, max_new_tokens=8, seed=1
    )
    for prompt, result in zip(prompts(inputs), results, strict=True):
        nodes = result.tree.nodes[1:]
        read = len(prompt) + sum(len(node.token_ids) for node in nodes) - sum(not node.children for node in nodes)
        roles = ["policy", "prm"] if shared else ["policy", "prm", "reference"]
        assert result.usage.encoded_tokens == dict.fromkeys(roles, read)
        assert result.usage.reencoded_tokens == {}
    rounds = {lm.forwards - count for lm, count in before.items()}
    assert len(rounds) == 1  # one packed forward a model and a round
    assert results[0].usage.forward_calls.get("scorer", 0) == 0


def test_alpha_zero_is_the_policy(case, inputs, tokenizer):
    policy, pair, *_ = case
    model = ps.HFPolicy(policy, tokenizer)
    given = {
        "scorer": pair, "strategy": ps.Beam(2, 2), "steps": hf.STEPS, "max_new_tokens": 8, "seed": 3,
    }  # fmt: skip
    plain = ps.search(prompts(inputs), policy=model, **given)
    zero = ps.search(prompts(inputs), policy=ps.Steered(model, pair, 0.0), **given)
    assert [r.token_ids for r in zero] == [r.token_ids for r in plain]
    other = ps.search(prompts(inputs), policy=ps.Steered(model, pair, 30.0), **given)
    assert [r.token_ids for r in other] != [r.token_ids for r in plain]


def test_steer_is_best_of_n_over_steered(case, inputs, tokenizer):
    policy, pair, *_ = case
    given = {"scorer": pair, "steps": hf.STEPS, "max_new_tokens": 8, "seed": 3}
    model = ps.HFPolicy(policy, tokenizer)
    sugar = ps.search(prompts(inputs), policy=model, strategy=ps.Steer(ALPHA, n=3), **given)
    wrapped = ps.search(prompts(inputs), policy=ps.Steered(model, pair, ALPHA), strategy=ps.BestOfN(3), **given)
    assert [r.token_ids for r in sugar] == [r.token_ids for r in wrapped]
    hooked = policy.generate(
        **inputs, max_new_tokens=8, do_sample=True, temperature=0.8, top_k=0, return_dict_in_generate=True,
        custom_generate=ps.generate,
        prm_guidance=ps.PRMGuidance(pair, strategy=ps.Steer(ALPHA, n=3), steps=hf.STEPS, seed=3),
    )  # fmt: skip
    assert [r.token_ids for r in hooked.prm] == [r.token_ids for r in sugar]


def test_steering_leaves_no_kv(case, inputs, tokenizer):
    policy, pair, *_ = case
    steered = ps.Steered(ps.HFPolicy(policy, tokenizer), pair, ALPHA)
    ps.search(prompts(inputs), policy=steered, scorer=pair, strategy=ps.Beam(2, 2), steps=hf.STEPS, max_new_tokens=8)
    assert [lm.tree.used for lm in steered._decoder.lms] == [0] * len(steered._decoder.lms)


def test_refused_by_name(case, inputs, tokenizer):
    policy, pair, *_ = case
    model = ps.HFPolicy(policy, tokenizer)
    with pytest.raises(TypeError, match="HFPolicy"):
        ps.Steered(policy, pair, 1.0)
    for alpha in (float("nan"), float("inf"), 1e39):
        with pytest.raises(ValueError, match="alpha"):
            ps.Steered(model, pair, alpha)
        with pytest.raises(ValueError, match="alpha"):
            ps.Steer(alpha)
    with pytest.raises(ValueError, match="steer twice"):
        ps.search(["a"], policy=ps.Steered(model, pair, 1.0), scorer=pair, strategy=ps.Steer(1.0), max_new_tokens=4)
    with pytest.raises(ValueError, match="scorer"):
        ps.search(["a"], policy=model, strategy=ps.Steer(1.0), max_new_tokens=4)
    other = ps.ImplicitPRM(hf.llama(5), hf.llama(6), tokenizer=hf.tokenizer(reverse=True))
    with pytest.raises(ValueError, match="vocabulary"):
        ps.Steered(model, other, 1.0)
    with pytest.raises(ValueError, match="vocabulary"):
        policy.generate(
            **inputs, max_new_tokens=4, do_sample=True, custom_generate=ps.generate, prm_tokenizer=tokenizer,
            prm_guidance=ps.PRMGuidance(other, strategy=ps.Steer(1.0), prompts=["a", "b", "c"]),
        )  # fmt: skip


def test_a_steered_policy_goes_with_its_last_user(case):
    """Not with the next garbage collection: each search makes one, over models whose memory may be wanted."""
    policy, pair, _, _ = case
    gc.disable()
    try:
        steered = ps.Steered(ps.HFPolicy(policy, pair.tokenizer), pair, ALPHA)
        seen = weakref.ref(steered), weakref.ref(steered.session()), weakref.ref(steered._decoder)
        del steered
        assert [ref() for ref in seen] == [None] * 3
    finally:
        gc.enable()
