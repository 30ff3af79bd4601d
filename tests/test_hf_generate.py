"""generate with prm_guidance: what goes in and comes out, and that plain generate stays what it was."""

from __future__ import annotations

import hf_models as hf
import pytest
import torch
from transformers import GenerationConfig
from transformers.generation import StoppingCriteria

import prm_search as ps

tokenizer, pair_of, model, pair, guided, inputs = hf.FIXTURES
ONE = ps.BestOfN(1)


# --- what comes out ---------------------------------------------------------------------------------------------------


def test_same_as_search(model, pair, tokenizer, inputs, guided):
    """The hook only translates: same seed, same tokens, same tree as the library call."""
    strategy = ps.Beam(3, 2)
    out = model.generate(
        **inputs, max_new_tokens=12, temperature=0.7, top_k=30, top_p=0.9, return_dict_in_generate=True,
        prm_guidance=guided(strategy, seed=11),
    )  # fmt: skip
    prompts = [[i for i in row if i != hf.PAD] for row in inputs["input_ids"].tolist()]
    wanted = ps.search(
        prompts, policy=ps.HFPolicy(model, tokenizer), scorer=pair, strategy=strategy, steps=hf.STEPS,
        max_new_tokens=12, temperature=0.7, top_k=30, top_p=0.9, seed=11,
    )  # fmt: skip
    for mine, theirs in zip(out.prm, wanted, strict=True):
        assert [node.token_ids for node in mine.tree] == [node.token_ids for node in theirs.tree]
        assert mine.token_ids == theirs.token_ids
        assert mine.value == theirs.value
        assert mine.usage.sampled_tokens == theirs.usage.sampled_tokens
        assert mine.usage.encoded_tokens == theirs.usage.encoded_tokens


@pytest.mark.parametrize("k", [1, 3])
def test_rows_are_the_best_candidates(k, model, inputs, guided):
    out = model.generate(
        **inputs, max_new_tokens=12, eos_token_id=[111, 25, 30], num_return_sequences=k, return_dict_in_generate=True,
        prm_guidance=guided(ps.BestOfN(6), seed=3),
    )  # fmt: skip
    width = inputs["input_ids"].shape[1]
    assert out.sequences.shape[0] == 3 * k
    assert len(out.prm) == 3
    assert list(out.keys()) == ["sequences", "prm"]
    for i, row in enumerate(out.sequences):
        node = out.prm[i // k].candidates[i % k]
        ids = node.path_ids()
        assert torch.equal(row[:width], inputs["input_ids"][i // k])
        assert row[width : width + len(ids)].tolist() == ids
        assert set(row[width + len(ids) :].tolist()) <= {hf.PAD}
    for result in out.prm:
        complete = [node for node in result.candidates if node.finish == "stop"]
        assert result.candidates[: len(complete)] == complete
        values = [node.value for node in complete]
        assert values == sorted(values, reverse=True)
    plain = model.generate(
        **inputs, max_new_tokens=12, eos_token_id=[111, 25, 30], num_return_sequences=k,
        prm_guidance=guided(ps.BestOfN(6), seed=3),
    )  # fmt: skip
    assert torch.equal(plain, out.sequences)


def test_steps_rewards_and_usage(model, tokenizer, inputs, guided):
    out = model.generate(
        **inputs, max_new_tokens=12, return_dict_in_generate=True, prm_guidance=guided(ps.Beam(2, 2), seed=3)
    )
    for row, result in zip(inputs["input_ids"].tolist(), out.prm, strict=True):
        path = result.node.path()
        assert [node.end for node in path][-1] == len(result.token_ids)
        assert all(1 <= len(node.token_ids) <= 4 for node in path)
        assert result.value == pytest.approx(sum(float(node.token_rewards.sum()) for node in path), abs=1e-5)
        assert result.node.q == pytest.approx(sum(node.reward for node in path))
        tokens = sum(len(node.token_ids) for node in result.tree)
        leaves = sum(not node.children for node in result.tree.nodes[1:])
        prompt = sum(i != hf.PAD for i in row)
        # The reference is the policy, so its half costs nothing; a leaf's last token is drawn and never read.
        assert result.usage.encoded_tokens == {"policy": prompt + tokens - leaves, "prm": prompt + tokens}
        assert result.usage.sampled_tokens["policy"] >= tokens


def test_fewer_candidates_than_rows_are_repeated(model, inputs, guided, caplog):
    out = model.generate(
        **inputs, max_new_tokens=5, num_return_sequences=3, return_dict_in_generate=True, prm_guidance=guided(ONE)
    )
    assert "num_return_sequences=3" in caplog.text
    assert out.sequences.shape[0] == 9
    for i, row in enumerate(out.sequences):
        assert row[-5:].tolist() == out.prm[i // 3].candidates[i % 3].path_ids()


def test_nothing_found_is_an_empty_response(model, inputs, guided):
    out = model.generate(
        **inputs, max_new_tokens=5, max_time=1e-9, return_dict_in_generate=True, prm_guidance=guided(ps.Beam(2, 2))
    )
    assert [result.stopped for result in out.prm] == ["seconds"] * 3
    for i, result in enumerate(out.prm):
        found = result.node.path_ids() if result.node else []
        assert hf.responses(out.sequences, inputs)[i] == found


def test_the_nodes_come_from_the_users_own_model(model, tokenizer, inputs, guided):
    out = model.generate(**inputs, max_new_tokens=5, return_dict_in_generate=True, prm_guidance=guided(ps.BestOfN(2)))
    assert out.prm[0].node.sampler == ps.HFPolicy(model, tokenizer).id


# --- random numbers ---------------------------------------------------------------------------------------------------


def test_torch_manual_seed_governs(model, inputs, guided):
    def run(seed):
        torch.manual_seed(seed)
        return model.generate(**inputs, max_new_tokens=8, prm_guidance=guided(ps.BestOfN(2)))

    first = run(1)
    assert torch.equal(run(1), first)
    assert not torch.equal(run(2), first)
    assert not torch.equal(model.generate(**inputs, max_new_tokens=8, prm_guidance=guided(ps.BestOfN(2))), run(2))


def test_a_seed_of_its_own_leaves_torchs_generator_alone(model, inputs, guided):
    guidance = guided(ps.BestOfN(2), seed=4)
    state = torch.get_rng_state()
    first = model.generate(**inputs, max_new_tokens=8, prm_guidance=guidance)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(99)
    assert torch.equal(model.generate(**inputs, max_new_tokens=8, prm_guidance=guidance), first)


def test_equal_prompts_draw_differently_and_order_does_not_matter(model, tokenizer, guided):
    batch = tokenizer(["same", "other one", "same"], return_tensors="pt", padding=True)
    out = hf.responses(model.generate(**batch, max_new_tokens=8, prm_guidance=guided(ps.BestOfN(2), seed=1)), batch)
    assert out[0] != out[2]
    turned = tokenizer(["other one", "same"], return_tensors="pt", padding=True)
    again = hf.responses(model.generate(**turned, max_new_tokens=8, prm_guidance=guided(ps.BestOfN(2), seed=1)), turned)
    assert again == [out[1], out[0]]


# --- do_sample --------------------------------------------------------------------------------------------------------


def test_do_sample_false_cannot_draw_several(model, inputs, guided):
    for strategy in (ps.BestOfN(2), ps.Beam(1, 2), ps.DVTS(2, 1, 1), ps.Lookahead(1, 1, steps=1, rollouts=2)):
        with pytest.raises(ValueError, match=r"do_sample=False.*do_sample=True"):
            model.generate(**inputs, max_new_tokens=8, do_sample=False, prm_guidance=guided(strategy))


def test_do_sample_becomes_true_where_nobody_said(model, inputs, guided):
    guidance = guided(ps.BestOfN(3), seed=1)
    wanted = model.generate(**inputs, max_new_tokens=8, do_sample=True, temperature=0.5, prm_guidance=guidance)
    absent = model.generate(**inputs, max_new_tokens=8, temperature=0.5, prm_guidance=guidance)
    config = GenerationConfig(max_new_tokens=8, temperature=0.5)
    inside = model.generate(**inputs, generation_config=config, prm_guidance=guidance)
    assert torch.equal(absent, wanted)
    assert torch.equal(inside, wanted)
    assert config.do_sample is None  # the user's object is left alone
    with pytest.raises(ValueError, match="do_sample=False"):
        model.generate(**inputs, generation_config=GenerationConfig(do_sample=False), prm_guidance=guidance)


def test_do_sample_false_in_the_models_own_config_is_explicit(model, inputs, guided):
    model.generation_config.do_sample = False
    try:
        with pytest.raises(ValueError, match="do_sample=False"):
            model.generate(**inputs, max_new_tokens=8, prm_guidance=guided(ps.BestOfN(3)))
    finally:
        model.generation_config.do_sample = None


# --- the function as custom_generate ----------------------------------------------------------------------------------


def test_custom_generate_without_enable(pair_of, inputs, guided, tokenizer):
    model, _ = pair_of
    assert "generate" not in model.__dict__
    guidance = guided(ps.Beam(2, 2), seed=2)
    out = model.generate(**inputs, max_new_tokens=9, do_sample=True, custom_generate=ps.generate, prm_guidance=guidance)
    ps.enable(model, tokenizer)
    try:
        assert torch.equal(model.generate(**inputs, max_new_tokens=9, prm_guidance=guidance), out)
        both = model.generate(**inputs, max_new_tokens=9, custom_generate=ps.generate, prm_guidance=guidance)
        assert torch.equal(both, out)
    finally:
        ps.disable(model)


def test_custom_generate_needs_do_sample(pair_of, inputs, guided):
    with pytest.raises(ValueError, match="do_sample=True"):
        pair_of[0].generate(**inputs, max_new_tokens=9, custom_generate=ps.generate, prm_guidance=guided())


def test_custom_generate_needs_a_tokenizer(pair_of, inputs, tokenizer):
    model, pair = pair_of
    bare = ps.ImplicitPRM(pair.prm, model, tokenizer=None, name="bare")
    given = {
        **inputs, "max_new_tokens": 4, "do_sample": True, "custom_generate": ps.generate,
        "prm_guidance": ps.PRMGuidance(bare, strategy=ONE, steps=hf.STEPS),
    }  # fmt: skip
    with pytest.raises(ValueError, match="prm_tokenizer"):
        model.generate(**given)
    assert model.generate(**given, prm_tokenizer=tokenizer).shape[0] == 3


def test_called_by_hand(pair_of, inputs, guided):
    with pytest.raises(TypeError, match=r"custom_generate=ps\.generate"):
        ps.generate(pair_of[0], inputs["input_ids"], prm_guidance=guided())


# --- plain generate ---------------------------------------------------------------------------------------------------

PLAIN = [
    {"do_sample": False},
    {"do_sample": True, "temperature": 0.8},
    {"num_beams": 3, "do_sample": False, "num_return_sequences": 2},
    {"do_sample": True, "top_p": 0.8, "num_return_sequences": 2, "repetition_penalty": 1.2},
    {"do_sample": False, "cache_implementation": "static"},
]


def test_plain_generate_is_bit_identical(tokenizer, inputs):
    model = hf.llama(0)
    pair = ps.ImplicitPRM(hf.near(model, 1), model, tokenizer=tokenizer)
    guidance = ps.PRMGuidance(pair, strategy=ps.Beam(2, 2), steps=hf.STEPS)

    def run():
        rows = []
        for given in PLAIN:
            torch.manual_seed(0)
            out = model.generate(**inputs, max_new_tokens=8, **given, output_scores=True, return_dict_in_generate=True)
            rows += [out.sequences, *out.scores]
        return rows

    before = run()
    ps.enable(model, tokenizer)
    runs = [run()]
    model.generate(**inputs, max_new_tokens=8, prm_guidance=guidance)
    runs.append(run())
    with pytest.raises(ValueError, match="num_beams"):
        model.generate(**inputs, max_new_tokens=8, num_beams=2, prm_guidance=guidance)
    runs.append(run())
    ps.disable(model)
    runs.append(run())
    for after in runs:
        assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


# --- nothing stays behind ---------------------------------------------------------------------------------------------


class Fails(StoppingCriteria):
    def __init__(self, error, calls):
        self.error, self.calls = error, calls

    def __call__(self, input_ids, scores, **kwargs):
        self.calls -= 1
        if self.calls < 0:
            raise self.error
        return torch.zeros(input_ids.shape[0], dtype=torch.bool)


@pytest.mark.parametrize("error", [None, RuntimeError("broken"), KeyboardInterrupt()])
def test_the_kv_is_freed(error, model, pair, tokenizer, inputs, guided):
    criteria = [] if error is None else [Fails(error, 6)]
    given = {"max_new_tokens": 12, "stopping_criteria": criteria, "prm_guidance": guided(ps.Beam(2, 2), seed=1)}
    lms = [pair.prm, ps.HFPolicy(model, tokenizer).lm]
    if error is None:
        model.generate(**inputs, **given)
    else:
        with pytest.raises(type(error)):
            model.generate(**inputs, **given)
    assert [lm.tree.used for lm in lms] == [0, 0]
    assert [len(lm._memos) for lm in lms] == [0, 0]
    assert model.generate(**inputs, max_new_tokens=4, prm_guidance=guided()).shape[0] == 3
