"""The traps of generate's custom decoding functions, each of which lost something silently, and what is refused."""

from __future__ import annotations

import copy
from dataclasses import replace

import hf_models as hf
import pytest
import torch
from transformers import (
    DynamicCache,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    QuantizedCache,
    StaticCache,
    T5Config,
    T5ForConditionalGeneration,
    TemperatureLogitsWarper,
)
from transformers.generation import ConfidenceCriteria

import prm_search as ps

tokenizer, pair_of, model, pair, guided, inputs = hf.FIXTURES
ONE = ps.BestOfN(1)


# --- 1: a callable gets no streamer, tokenizer, assistant_model or synced_gpus ----------------------------------------


class Recorder:
    def __init__(self):
        self.puts, self.ends = 0, 0

    def put(self, value):
        self.puts += 1

    def end(self):
        self.ends += 1


def test_trap_1_streamer_and_tokenizer_arrive(model, tokenizer, guided):
    ids = tokenizer("2+2=", return_tensors="pt")
    lost, found = Recorder(), Recorder()
    given = {"max_new_tokens": 12, "do_sample": True}
    model.generate(**ids, **given, streamer=lost, custom_generate=lambda model, input_ids, **rest: input_ids)
    assert (lost.puts, lost.ends) == (1, 0)  # the trap: the prompt, then nothing and no end
    model.generate(**ids, **given, streamer=found, prm_guidance=guided(seed=1))
    assert found.puts > 2
    assert found.ends == 1
    both = Recorder()  # without enable, the streamer goes in twice
    type(model).generate(
        model, **ids, **given, streamer=both, custom_generate=ps.generate, prm_streamer=both,
        prm_guidance=guided(seed=1),
    )  # fmt: skip
    assert (both.puts, both.ends) == (found.puts, found.ends)


def test_trap_1_a_tokenizer_of_the_call_comes_first(model, inputs, guided):
    """The pipeline passes its own."""
    out = model.generate(
        **inputs, max_new_tokens=4, tokenizer=hf.tokenizer(), return_dict_in_generate=True,
        prm_guidance=guided(ONE, seed=1),
    )  # fmt: skip
    assert all(result.text for result in out.prm)


@pytest.mark.parametrize("name", ["assistant_model", "synced_gpus"])
def test_trap_1_what_would_be_lost_is_refused(name, model, inputs, guided):
    value = {"assistant_model": hf.llama(3), "synced_gpus": True}[name]
    with pytest.raises(ValueError, match=name):
        model.generate(**inputs, **{name: value}, prm_guidance=guided())


# --- 2: stop strings need a tokenizer that a callable's call does not have --------------------------------------------


def test_trap_2_stop_strings(model, tokenizer, guided):
    ids = tokenizer("2+2=", return_tensors="pt")
    given = {"max_new_tokens": 12, "do_sample": False}
    whole = model.generate(**ids, **given)
    mark = "*"
    wanted = model.generate(**ids, **given, stop_strings=[mark], tokenizer=tokenizer)
    assert wanted.shape[1] < whole.shape[1]
    with pytest.raises(ValueError, match="tokenizer"):  # the trap
        type(model).generate(
            model, **ids, **given, stop_strings=[mark], tokenizer=tokenizer, custom_generate=ps.generate,
            prm_guidance=guided(ONE),
        )  # fmt: skip
    guidance = guided(ONE)
    config = GenerationConfig(**given, stop_strings=[mark])
    assert torch.equal(model.generate(**ids, **given, stop_strings=[mark], prm_guidance=guidance), wanted)
    assert torch.equal(model.generate(**ids, **given, stop_strings=mark, prm_guidance=guidance), wanted)
    assert torch.equal(model.generate(**ids, generation_config=config, prm_guidance=guidance), wanted)
    assert config.stop_strings == [mark]
    model.generation_config.stop_strings = [mark]
    try:
        assert torch.equal(model.generate(**ids, **given, prm_guidance=guidance), wanted)
    finally:
        model.generation_config.stop_strings = None


# --- 3: rows are multiplied before the callable -----------------------------------------------------------------------


def test_trap_3_a_prompt_is_encoded_once(model, inputs, guided):
    def encoded(k):
        out = model.generate(
            **inputs, max_new_tokens=8, num_return_sequences=k, return_dict_in_generate=True,
            prm_guidance=guided(ps.BestOfN(8), seed=1),
        )  # fmt: skip
        return out.sequences.shape[0], [result.usage.encoded_tokens for result in out.prm]

    assert encoded(1)[1] == encoded(8)[1]
    assert encoded(8)[0] == 24
    prompts = inputs["attention_mask"].sum(dim=1).tolist()
    for tokens, prompt in zip(encoded(8)[1], prompts, strict=True):
        assert tokens["policy"] <= prompt + 8 * 7


@pytest.mark.parametrize("do_sample", [True, False])
def test_trap_3_num_beams_is_refused(do_sample, model, inputs, guided):
    with pytest.raises(ValueError, match="num_beams=4"):
        model.generate(**inputs, num_beams=4, do_sample=do_sample, prm_guidance=guided())


# --- 4: what is set on a generation config is deep-copied, or swallowed -----------------------------------------------


def test_trap_4_models_are_not_copied(model, pair, inputs, guided, monkeypatch):
    def no_copy(self, memo):
        raise AssertionError("a model was deep-copied")

    monkeypatch.setattr(torch.nn.Module, "__deepcopy__", no_copy, raising=False)
    out = model.generate(**inputs, max_new_tokens=4, return_dict_in_generate=True, prm_guidance=guided(ONE, seed=1))
    assert out.prm[0].node.scored_by(pair.name)


@pytest.mark.parametrize("where", ["model", "config"])
def test_trap_4_guidance_on_a_config_is_refused(where, model, inputs, guided):
    class Light:  # stands for a guidance, so that nothing heavy is copied here
        pass

    config = GenerationConfig(max_new_tokens=4)
    holder = model.generation_config if where == "model" else config
    holder.prm_guidance = Light()
    given = {"generation_config": config} if where == "config" else {"max_new_tokens": 4}
    try:
        with pytest.raises(ValueError, match="generation config"):
            model.generate(**inputs, **given, prm_guidance=guided(ONE))
    finally:
        del holder.prm_guidance


def test_trap_4_an_attribute_of_that_name_swallows_nothing(model, inputs, guided):
    """A config that merely knows the name made generate(prm_guidance=...) a plain call."""
    guidance = guided(ps.BestOfN(2), seed=1)
    wanted = model.generate(**inputs, max_new_tokens=4, prm_guidance=guidance)
    model.generation_config.prm_guidance = None
    try:
        assert torch.equal(model.generate(**inputs, max_new_tokens=4, prm_guidance=guidance), wanted)
        assert torch.equal(
            type(model).generate(
                model, **inputs, max_new_tokens=4, do_sample=True, custom_generate=ps.generate, prm_guidance=guidance
            ),
            wanted,
        )
    finally:
        del model.generation_config.prm_guidance


# --- 5: processors that count rows ------------------------------------------------------------------------------------


def test_trap_5_processors_that_count_rows_are_refused(model, inputs, guided):
    from transformers import WatermarkingConfig

    for name, given in {
        "prefix_allowed_tokens_fn": {"prefix_allowed_tokens_fn": lambda row, ids: [5]},
        "guidance_scale": {"guidance_scale": 1.5},
        "watermarking_config": {"watermarking_config": WatermarkingConfig()},
        "encoder_repetition_penalty": {"encoder_repetition_penalty": 1.5},
        "encoder_no_repeat_ngram_size": {"encoder_no_repeat_ngram_size": 2},
    }.items():
        with pytest.raises(ValueError, match=name):
            model.generate(**inputs, max_new_tokens=4, **given, prm_guidance=guided())


def test_trap_5_unknown_processors_are_refused(model, inputs, guided):
    class Mine(LogitsProcessor):
        def __call__(self, input_ids, scores):
            return scores

    class Cooler(TemperatureLogitsWarper):
        pass

    class TemperatureLogitsWarper2(LogitsProcessor):
        pass

    TemperatureLogitsWarper2.__name__ = "TemperatureLogitsWarper"  # a name is not enough
    for processor, name in [(Mine(), "Mine"), (Cooler(0.5), "Cooler"), (TemperatureLogitsWarper2(), "Temperature")]:
        with pytest.raises(ValueError, match=name):
            model.generate(
                **inputs, max_new_tokens=4, logits_processor=LogitsProcessorList([processor]), prm_guidance=guided()
            )


def test_trap_5_a_known_processor_of_the_users_is_served(model, inputs, guided):
    given = {"max_new_tokens": 6, "top_k": 0, "prm_guidance": guided(ps.BestOfN(2), seed=2)}
    own = model.generate(**inputs, **given, logits_processor=[TemperatureLogitsWarper(0.5)])
    assert torch.equal(own, model.generate(**inputs, **given, temperature=0.5))


def test_trap_5_all_tokens_forbidden(model, inputs, guided):
    with pytest.raises(ValueError, match="forbid every token"):
        model.generate(
            **inputs, max_new_tokens=4, suppress_tokens=list(range(hf.VOCAB)), prm_guidance=guided(ps.BestOfN(2))
        )


# --- 6: rows that end a step early need positions of their own --------------------------------------------------------


@torch.no_grad()
def test_trap_6_uneven_rows_are_scored_at_their_own_positions(model, pair, inputs, guided):
    """The log-probabilities and rewards of a padded batch with uneven steps are those of each row alone."""
    uneven = ps.StepRule(delimiter=[chr(i) for i in range(33, 127, 2)], max_tokens=5)
    out = model.generate(
        **inputs, max_new_tokens=12, return_dict_in_generate=True,
        prm_guidance=guided(ps.Beam(3, 3), steps=uneven, seed=2),
    )  # fmt: skip
    lengths = {len(node.token_ids) for result in out.prm for node in result.tree.nodes[1:]}
    assert len(lengths) > 2
    for result in out.prm:
        for node in result.candidates:
            ids = torch.tensor([[*result.tree.prompt_ids, *node.path_ids()]])
            at = torch.arange(len(result.tree.prompt_ids), ids.shape[1])
            ours = [m(ids).logits.float().log_softmax(-1)[0, at - 1, ids[0, at]] for m in (model, pair.prm.module)]
            found = torch.tensor([x for step in node.path() for x in step.logprobs])
            assert torch.allclose(found, ours[0], atol=1e-4)
            rewards = torch.tensor([x for step in node.path() for x in step.token_rewards])
            assert torch.allclose(rewards, pair.beta * (ours[1] - ours[0]), atol=1e-5)


# --- 7: no input ids, encoder-decoder models --------------------------------------------------------------------------


def test_trap_7_embeddings_are_refused(model, inputs, guided):
    embeds = model.get_input_embeddings()(inputs["input_ids"])
    for function in (model.generate, lambda **given: type(model).generate(model, custom_generate=ps.generate, **given)):
        with pytest.raises(ValueError, match="inputs_embeds"):
            function(inputs_embeds=embeds, max_new_tokens=4, do_sample=True, prm_guidance=guided())


def test_trap_7_encoder_decoder_models_are_refused(tokenizer, guided):
    config = T5Config(vocab_size=hf.VOCAB, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    config.decoder_start_token_id = 0
    t5 = T5ForConditionalGeneration(config).eval()
    with pytest.raises(ValueError, match="T5ForConditionalGeneration is an encoder-decoder"):
        ps.enable(t5, tokenizer)
    with pytest.raises(ValueError, match="T5ForConditionalGeneration is an encoder-decoder"):
        t5.generate(
            torch.tensor([[5, 6]]), max_new_tokens=3, do_sample=True, custom_generate=ps.generate, prm_guidance=guided()
        )


# --- what else is refused ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"cache_implementation": "static"}, "cache_implementation='static'"),
        ({"cache_implementation": "offloaded"}, "cache_implementation='offloaded'"),
        ({"prompt_lookup_num_tokens": 3}, "assisted_generation"),
        ({"penalty_alpha": 0.6, "top_k": 4, "do_sample": False}, "contrastive_search"),
        ({"dola_layers": "low"}, "dola_generation"),
        ({"output_scores": True}, "output_scores"),
        ({"output_logits": True}, "output_logits"),
        ({"output_attentions": True}, "output_attentions"),
        ({"output_hidden_states": True}, "output_hidden_states"),
        ({"stopping_criteria": [ConfidenceCriteria(0.5)]}, "ConfidenceCriteria"),
        ({"custom_generate": lambda model, input_ids, **rest: input_ids}, "custom_generate"),
        ({"min_p": 7.0}, "min_p"),
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"max_new_tokens": None, "max_length": 5}, "max_length"),
    ],
)
def test_refused_by_name(given, named, model, inputs, guided):
    given = {"max_new_tokens": 4, "return_dict_in_generate": True, **given}
    with pytest.raises(ValueError, match=named):
        model.generate(**inputs, **given, prm_guidance=guided())


def test_caches_are_refused(model, inputs, guided):
    config = model.config
    full = DynamicCache(config=config)
    with torch.no_grad():
        model(inputs["input_ids"], past_key_values=full)
    for cache, named in [
        (full, "past_key_values holds 13 tokens"),
        (StaticCache(config=config, max_cache_len=40), "StaticCache"),
    ]:
        with pytest.raises(ValueError, match=named):
            model.generate(**inputs, max_new_tokens=4, past_key_values=cache, prm_guidance=guided())
    empty = DynamicCache(config=config)
    out = model.generate(**inputs, max_new_tokens=4, past_key_values=empty, prm_guidance=guided(ONE))
    assert out.shape[0] == 3
    assert empty.get_seq_length() == 0


def test_quantised_caches_are_refused(model, inputs, guided, monkeypatch):
    cache = QuantizedCache.__new__(QuantizedCache)  # its backends are not installed
    cache.layers = []
    with pytest.raises(ValueError, match="QuantizedCache"):
        model.generate(**inputs, max_new_tokens=4, past_key_values=cache, prm_guidance=guided())


def test_right_padding_and_odd_positions_are_refused(model, inputs, guided):
    mask = inputs["attention_mask"]
    with pytest.raises(ValueError, match=r"attention_mask.*padding_side"):
        model.generate(
            inputs["input_ids"].flip(1), attention_mask=mask.flip(1), max_new_tokens=4, prm_guidance=guided()
        )
    with pytest.raises(ValueError, match="position_ids"):
        model.generate(
            **inputs, position_ids=torch.arange(13)[None].expand(3, -1), max_new_tokens=4, prm_guidance=guided()
        )


def test_padding_is_needed_for_several_rows(pair, guided, inputs):
    bare = hf.tokenizer()
    bare.pad_token = None
    model = hf.llama(0, pad_token_id=None, eos_token_id=None)
    ps.enable(model, bare)
    with pytest.raises(ValueError, match="pad_token_id"):
        model.generate(**inputs, max_new_tokens=4, prm_guidance=guided(ONE))
    one = inputs["input_ids"][1:2]
    assert model.generate(one, max_new_tokens=4, prm_guidance=guided(ONE)).shape == (1, 17)
    assert model.generate(**inputs, max_new_tokens=4, pad_token_id=0, prm_guidance=guided(ONE)).shape == (3, 17)


def test_a_model_in_training_mode_is_refused(inputs, tokenizer, pair):
    model = hf.llama(4).train()
    ps.enable(model, tokenizer)
    with pytest.raises(ValueError, match="eval"):
        model.generate(**inputs, max_new_tokens=4, prm_guidance=ps.PRMGuidance(pair, strategy=ONE))


def test_prompts_beyond_the_context(tokenizer, pair):
    model = hf.llama(5, max_position_embeddings=64)
    ps.enable(model, tokenizer)
    long = tokenizer("a prompt of more than sixty four tokens" * 2, return_tensors="pt")
    with pytest.raises(ValueError, match=r"prompts\[0\].*context of 64"):
        model.generate(**long, max_new_tokens=4, prm_guidance=ps.PRMGuidance(pair, strategy=ONE))


def test_prm_guidance_of_another_type(model, inputs):
    with pytest.raises(TypeError, match="PRMGuidance"):
        model.generate(**inputs, max_new_tokens=4, prm_guidance={"strategy": "beam"})


def test_prompts_go_with_rows(model, inputs, guided):
    guidance = guided(ONE, seed=1)
    texts = ["2+2=", "hello there, ", "a"]
    out = model.generate(
        **inputs, max_new_tokens=4, return_dict_in_generate=True, prm_guidance=replace(guidance, prompts=texts)
    )
    assert [result.tree.prompt.text for result in out.prm] == texts
    assert torch.equal(out.sequences, model.generate(**inputs, max_new_tokens=4, prm_guidance=guidance))
    with pytest.raises(ValueError, match=r"prompts: 2 .* 3 rows"):
        model.generate(**inputs, max_new_tokens=4, prm_guidance=replace(guidance, prompts=texts[:2]))


@torch.no_grad()
def test_a_pair_with_another_tokenizer_reads_the_prompts_itself(model, tokenizer):
    """Bytes in another order: the pair's own naive computation on its own tokens is what the search must report."""
    other = hf.tokenizer(reverse=True)
    prm, reference = hf.llama(7), hf.llama(8)
    pair = ps.ImplicitPRM(prm, reference, tokenizer=other, beta=0.1)
    texts = ["2+2=", "hello there, "]
    batch = tokenizer(texts, return_tensors="pt", padding=True)
    odd = [i for i in range(hf.VOCAB) if i != hf.EOS and not tokenizer.decode([i]).isascii()] + [hf.PAD]
    given = {"max_new_tokens": 8, "suppress_tokens": odd, "return_dict_in_generate": True}
    guidance = ps.PRMGuidance(pair, strategy=ps.Beam(2, 2), steps=hf.STEPS, seed=3)
    with pytest.raises(ValueError, match=r"PRMGuidance\(prompts"):
        model.generate(**batch, **given, prm_guidance=guidance)
    out = model.generate(**batch, **given, prm_guidance=replace(guidance, prompts=texts))
    for text, result in zip(texts, out.prm, strict=True):
        start = other(text)["input_ids"]
        ids = torch.tensor([start + other(result.text)["input_ids"]])
        at = torch.arange(len(start), ids.shape[1])
        a, b = (m(ids).logits.log_softmax(-1)[0, at - 1, ids[0, at]].sum() for m in (prm, reference))
        assert result.value == pytest.approx(float(0.1 * (a - b)), abs=1e-5)


def test_guidance_may_be_copied(guided):
    assert copy.copy(guided()).pair is guided().pair
