"""Logits processors, warpers and stopping criteria mean to a search what they mean to generate."""

from __future__ import annotations

import hf_models as hf
import numpy as np
import pytest
import torch
from transformers.generation import MaxLengthCriteria, StoppingCriteria, logits_process

import prm_search as ps
from prm_search.integrations import hf_rows

tokenizer, pair_of, model, pair, guided, inputs = hf.FIXTURES
ONE = ps.BestOfN(1)


# --- greedy decoding says whether inputs, processors and criteria mean what they mean to generate ---------------------

PROCESSORS = {
    "nothing": {},
    "repetition_penalty": {"repetition_penalty": 1.8},
    "repetition_reward": {"repetition_penalty": 0.6},
    "no_repeat_ngram": {"no_repeat_ngram_size": 1},
    "bad_words": {"bad_words_ids": [[95], [226, 224], [73, 145]]},
    "sequence_bias": {"sequence_bias": [[[95], -9.0], [[116], 4.0], [[73, 145], -8.0]]},
    "suppress": {"suppress_tokens": [95, 73]},
    "begin_suppress": {"begin_suppress_tokens": [95, 73]},
    "eos_list": {"eos_token_id": [226, 145, 183]},
    "min_new_tokens": {"min_new_tokens": 5, "eos_token_id": [226, 145, 183]},
    "min_length": {"min_length": 18, "eos_token_id": [226, 145, 183]},
    "exponential_decay": {"exponential_decay_length_penalty": (2, 1.6), "eos_token_id": [226, 145, 183]},
    "forced_eos": {"forced_eos_token_id": 200, "eos_token_id": 200},
    "invalid_values": {"remove_invalid_values": True, "renormalize_logits": True},
    "several": {"repetition_penalty": 1.4, "no_repeat_ngram_size": 2, "eos_token_id": [224, 187], "min_new_tokens": 4},
    "max_length": {"max_length": 20, "max_new_tokens": None},
}


@pytest.mark.parametrize("name", PROCESSORS)
def test_greedy_is_generates_own_greedy(name, model, inputs, guided):
    given = {"max_new_tokens": 10, "do_sample": False, "pad_token_id": hf.PAD, **PROCESSORS[name]}
    plain = model.generate(**inputs, **given)
    assert torch.equal(model.generate(**inputs, **given, prm_guidance=guided(ONE)), plain)
    if name not in ("nothing", "invalid_values", "max_length"):
        base = {"max_new_tokens": 10, "do_sample": False, "pad_token_id": hf.PAD}
        assert hf.responses(plain, inputs) != hf.responses(model.generate(**inputs, **base), inputs)  # the case is one


def test_greedy_without_left_padding_or_a_mask(model, tokenizer, guided):
    ids = tokenizer("no padding here", return_tensors="pt")["input_ids"]
    plain = model.generate(ids, max_new_tokens=9, do_sample=False)
    assert torch.equal(model.generate(ids, max_new_tokens=9, do_sample=False, prm_guidance=guided(ONE)), plain)


def test_default_length_is_generates(model, inputs, guided):
    plain = model.generate(**inputs, do_sample=False)
    assert torch.equal(model.generate(**inputs, do_sample=False, prm_guidance=guided(ONE)), plain)
    assert plain.shape[1] == inputs["input_ids"].shape[1] + 20


def test_one_token_to_choose_from_is_greedy(model, inputs, guided):
    plain = model.generate(**inputs, max_new_tokens=10, do_sample=False)
    one = model.generate(**inputs, max_new_tokens=10, do_sample=True, top_k=1, prm_guidance=guided(ps.BestOfN(3)))
    assert torch.equal(one, plain)


W = logits_process
WARPERS = {
    "temperature": ({"temperature": 0.5}, [W.TemperatureLogitsWarper(0.5), W.TopKLogitsWarper(50)]),
    "no top-k": ({"top_k": 0}, []),
    "top-p": ({"top_k": 0, "top_p": 0.7}, [W.TopPLogitsWarper(0.7)]),
    "min-p": ({"top_k": 0, "min_p": 0.1}, [W.MinPLogitsWarper(0.1)]),
    "typical": ({"top_k": 0, "typical_p": 0.6}, [W.TypicalLogitsWarper(0.6)]),
    "epsilon": ({"top_k": 0, "epsilon_cutoff": 0.02}, [W.EpsilonLogitsWarper(0.02)]),
    "eta": ({"top_k": 0, "eta_cutoff": 0.05}, [W.EtaLogitsWarper(0.05)]),
    "top-h": ({"top_k": 0, "top_h": 0.4}, [W.TopHLogitsWarper(0.4)]),
    "repetition": (
        {"top_k": 20, "temperature": 0.9, "repetition_penalty": 1.5},
        [W.RepetitionPenaltyLogitsProcessor(1.5), W.TemperatureLogitsWarper(0.9), W.TopKLogitsWarper(20)],
    ),
    "ngrams": (
        {"no_repeat_ngram_size": 1, "top_k": 9},
        [W.NoRepeatNGramLogitsProcessor(1), W.TopKLogitsWarper(9)],
    ),
}


@torch.no_grad()
@pytest.mark.parametrize("name", WARPERS)
def test_what_is_drawn_from(name, model, tokenizer, guided, monkeypatch):
    """Every row of the search, whatever its length, draws from what generate's processors make of its own logits."""
    given, processors = WARPERS[name]
    seen = []
    original = hf_rows.ProcessorSampler.scores

    def scores(self, logprobs, rows):
        before = logprobs.clone()
        out = original(self, logprobs, rows)
        assert torch.equal(logprobs, before)  # the decoder reads it afterwards
        seen.append(([row.ids() for row in rows], out))
        return out

    monkeypatch.setattr(hf_rows.ProcessorSampler, "scores", scores)
    ids = tokenizer(["2+2=", "abcd"], return_tensors="pt")
    given = {"max_new_tokens": 7, "eos_token_id": [111, 25], "pad_token_id": hf.PAD, **given}
    uneven = ps.StepRule(delimiter=[chr(i) for i in range(33, 127, 2)], max_tokens=5)
    model.generate(**ids, **given, prm_guidance=guided(ps.Beam(2, 3), steps=uneven, seed=5))
    assert any(len({len(row) for row in rows}) > 1 for rows, _ in seen)
    for rows, out in seen:
        for row, found in zip(rows, out, strict=True):
            context = torch.tensor([row])
            logits = model(context).logits[:, -1].float()
            for processor in processors:
                logits = processor(context, logits)
            np.testing.assert_allclose(found.softmax(-1), logits[0].softmax(-1), atol=2e-6)


def test_top_k_50_is_generates_default(model, inputs, guided):
    """Absent arguments mean what they mean to generate."""
    given = {"max_new_tokens": 8, "prm_guidance": guided(ps.BestOfN(4), seed=1)}
    assert torch.equal(model.generate(**inputs, **given), model.generate(**inputs, top_k=50, **given))
    assert not torch.equal(model.generate(**inputs, **given), model.generate(**inputs, top_k=0, **given))


# --- what ends a response ---------------------------------------------------------------------------------------------


class EndsWith(StoppingCriteria):
    """Stops at a token, and remembers the shapes it was asked with."""

    def __init__(self, token):
        self.token, self.shapes = token, set()

    def __call__(self, input_ids, scores, **kwargs):
        self.shapes.add(tuple(input_ids.shape))
        return input_ids[:, -1] == self.token


def test_stopping_criteria_as_generate_asks_them(model, inputs, guided):
    plain, searched = EndsWith(183), EndsWith(183)
    given = {"max_new_tokens": 10, "do_sample": False}
    wanted = hf.responses(model.generate(**inputs, **given, stopping_criteria=[plain]), inputs)
    found = model.generate(**inputs, **given, stopping_criteria=[searched], prm_guidance=guided(ONE))
    cut = [row[: row.index(183) + 1] if 183 in row else row for row in wanted]  # generate itself draws on after it
    assert hf.responses(found, inputs) == cut
    assert min(map(len, cut)) < 10
    assert {width for _, width in searched.shapes} <= {width for _, width in plain.shapes}


def test_a_criterion_ends_rows_as_complete(model, inputs, guided):
    out = model.generate(
        **inputs, max_new_tokens=30, top_k=0, stopping_criteria=[EndsWith(95)], return_dict_in_generate=True,
        prm_guidance=guided(ps.BestOfN(40), seed=1),
    )  # fmt: skip
    stops = [node for result in out.prm for node in result.candidates if node.finish == "stop"]
    assert any(node.token_ids[-1] == 95 for node in stops)
    for result in out.prm:
        for node in result.candidates:
            *inside, last = node.path_ids()
            assert 95 not in inside
            assert (node.finish == "stop") == (last in (95, hf.EOS))


def test_a_criterion_that_knows_only_its_batch(model, inputs, guided):
    class Fixed(StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            return torch.zeros(3, dtype=torch.bool)

    with pytest.raises(ValueError, match="Fixed gave 3 answers"):
        model.generate(**inputs, max_new_tokens=4, stopping_criteria=[Fixed()], prm_guidance=guided(ps.BestOfN(5)))


def test_max_time_is_a_budget(model, inputs, guided):
    out = model.generate(
        **inputs, max_new_tokens=100, max_time=1e-6, return_dict_in_generate=True, prm_guidance=guided(ps.BestOfN(2))
    )
    assert [result.stopped for result in out.prm] == ["seconds"] * 3


def test_user_lengths_take_precedence(model, inputs, guided):
    width = inputs["input_ids"].shape[1]
    given = {"max_new_tokens": 10, "do_sample": False, "stopping_criteria": [MaxLengthCriteria(width + 4)]}
    plain = model.generate(**inputs, **given)
    assert plain.shape[1] == width + 4
    assert torch.equal(model.generate(**inputs, **given, prm_guidance=guided(ONE)), plain)
