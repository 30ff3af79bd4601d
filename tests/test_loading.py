"""Models and pairs by name: checkpoints, adapters, GGUF files, cards, and what is shared between them."""

from __future__ import annotations

import gc
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from pairs import CORPUS, byte_tokenizer, llama, naive_logprobs, naive_rewards
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file

from prm_search import BestOfN, HFPolicy, ImplicitPRM, StepRule, search
from prm_search.demo import pair_dir
from prm_search.engine.language_model import LanguageModel
from prm_search.integrations.vllm.steering_config import SteeringConfig
from prm_search.models.loading import load
from prm_search.scorers.implicit.card import card_delimiter, read_card
from prm_search.scorers.implicit.implicit_prm import ConstantReference
from prm_search.serving.config import ServeConfig

PROMPT, TEXT = "What is the sum of seven and eight?", "It is fifteen."
RULE = StepRule(max_tokens=6)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """base/ and prm/: checkpoints with tokenizers; lora/ and more/: adapters on base."""
    root = tmp_path_factory.mktemp("models")
    words = byte_tokenizer()
    for name, seed in (("base", 1), ("prm", 2)):
        llama(seed).save_pretrained(root / name)
        words.save_pretrained(root / name)
    for name, targets in (("lora", ["q_proj", "v_proj"]), ("more", ["gate_proj", "lm_head"])):
        torch.manual_seed(7)
        model = llama(1)
        model.config._name_or_path = str(root / "base")
        model.name_or_path = str(root / "base")
        adapted = get_peft_model(model, LoraConfig(r=4, target_modules=targets, init_lora_weights=False))
        adapted.peft_config["default"].base_model_name_or_path = str(root / "base")
        adapted.save_pretrained(root / name)
    return root


@pytest.fixture
def copied(folders, tmp_path):
    """A copy of a folder, to be spoilt."""

    def copy(name):
        return Path(shutil.copytree(folders / name, tmp_path / name))

    return copy


def adapted(folders, name):
    from peft import PeftModel

    return PeftModel.from_pretrained(llama(1), folders / name).eval()


def check(pair, trained, reference, beta):
    (score,) = pair.score([PROMPT], [TEXT])
    prompt = pair.tokenizer(PROMPT)["input_ids"]
    wanted = naive_rewards(trained, reference, prompt, score.token_ids, beta)
    np.testing.assert_allclose(score.token_rewards, wanted, atol=1e-4)
    assert np.abs(wanted).max() > 1e-3


# --- checkpoints ---------------------------------------------------------------------------------------------------


def test_a_pair_by_path(folders):
    pair = ImplicitPRM.from_pretrained(folders / "prm", str(folders / "base"), beta=0.3, name="x")
    assert (pair.beta, pair.name) == (0.3, "x")
    assert len(pair.tokenizer) == len(byte_tokenizer())
    check(pair, llama(2), llama(1), 0.3)
    assert ImplicitPRM.from_pretrained(folders / "prm", folders / "base").beta == 0.05


def test_one_checkpoint_is_loaded_once_and_let_go(folders):
    policy = HFPolicy.from_pretrained(folders / "base", max_rows=3)
    pair = ImplicitPRM.from_pretrained(folders / "prm", folders / "base")
    assert pair.reference is policy.lm
    assert policy.max_rows == 3
    assert HFPolicy.from_pretrained(folders / "base").tokenizer is policy.tokenizer
    (result,) = search([PROMPT], policy=policy, scorer=pair, strategy=BestOfN(2), steps=RULE, max_new_tokens=8)
    assert result.usage.encoded_tokens.keys() == {"policy", "prm"}
    in_bf16 = load(folders / "base", dtype="bfloat16").lm
    assert in_bf16 is not policy.lm
    assert in_bf16 is load(folders / "base", dtype=torch.bfloat16).lm
    assert next(in_bf16.module.parameters()).dtype == torch.bfloat16
    again = load(folders / "base", dtype="auto").lm
    assert again is policy.lm
    import weakref

    module = weakref.ref(policy.lm.module)
    del policy, pair, again, result
    gc.collect()
    assert module() is None


def test_a_retrained_folder_is_loaded_anew(copied):
    folder = copied("base")
    before = load(folder).lm
    llama(9).save_pretrained(folder)
    after = load(folder).lm
    assert after is not before
    prompt = [5, 6, 7]
    np.testing.assert_allclose(
        naive_logprobs(after.module, prompt, [8, 9]), naive_logprobs(llama(9), prompt, [8, 9]), atol=1e-5
    )


def test_references_that_are_no_paths(folders):
    base = llama(1)
    check(ImplicitPRM.from_pretrained(folders / "prm", base, beta=0.1), llama(2), base, 0.1)
    assert ImplicitPRM.from_pretrained(folders / "prm", HFPolicy(base, byte_tokenizer())).reference.module is base
    assert ImplicitPRM.from_pretrained(folders / "prm", "policy").models["reference"] == "policy"
    free = ImplicitPRM.from_pretrained(folders / "prm", ConstantReference(-1.0))
    assert free.reference is None


def test_a_prm_equal_to_its_reference_warns(folders):
    with pytest.warns(UserWarning, match="every reward is 0"):
        ImplicitPRM.from_pretrained(folders / "prm", folders / "prm")


def test_options_reach_transformers(folders):
    pair = ImplicitPRM.from_pretrained(
        folders / "prm", folders / "base", dtype=torch.float64, attn_implementation="eager", capacity=256
    )
    for lm in (pair.prm, pair.reference):
        assert next(lm.module.parameters()).dtype == torch.float64
        assert lm.module.config._attn_implementation == "eager"
        assert lm.tree.capacity == 256


def test_tokenizers_may_be_named(folders, tmp_path):
    words = byte_tokenizer(CORPUS, size=300)
    words.save_pretrained(tmp_path / "words")
    assert len(ImplicitPRM.from_pretrained(folders / "prm", llama(1), tokenizer=tmp_path / "words").tokenizer) == 300
    assert HFPolicy.from_pretrained(folders / "base", tokenizer=words).tokenizer is words
    llama(1).save_pretrained(tmp_path / "bare")
    with pytest.raises(ValueError, match=r"bare.*without a tokenizer"):
        HFPolicy.from_pretrained(tmp_path / "bare")
    bare = ImplicitPRM.from_pretrained(tmp_path / "bare", folders / "base")
    assert len(bare.tokenizer) == 340  # the reference's


# --- adapters ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["lora", "more"])
def test_an_adapter_is_a_pair_with_its_base(folders, name):
    pair = ImplicitPRM.from_pretrained(folders / name, beta=0.3)
    assert pair.prm.module is pair.reference.module
    check(pair, adapted(folders, name), llama(1), 0.3)
    check(ImplicitPRM.from_pretrained(folders / name, folders / "prm", beta=0.3), adapted(folders, name), llama(2), 0.3)
    named = ImplicitPRM.from_pretrained(folders / name, folders / "base")
    assert named.reference is pair.reference


def test_adapters_share_a_base_that_is_in_use_already(folders):
    """The policy's model is the base of two adapters, loaded after it; none sees another's weights."""
    policy = HFPolicy.from_pretrained(folders / "base")
    ids = torch.arange(5, 17)[None]
    with torch.no_grad():
        before = policy.lm.module(ids).logits
    first = ImplicitPRM.from_pretrained(folders / "lora", beta=0.3)
    second = ImplicitPRM.from_pretrained(folders / "more", beta=0.3, name="other")
    with torch.no_grad():
        assert torch.equal(policy.lm.module(ids).logits, before)
    assert {first.prm.module, second.prm.module, first.reference.module} == {policy.lm.module}
    assert first.reference is second.reference is policy.lm
    (result,) = search(
        [PROMPT], policy=policy, scorer=first, prover=second, strategy=BestOfN(2), steps=RULE, max_new_tokens=8
    )
    assert result.usage.encoded_tokens.keys() == {"policy", "prm", "other.prm"}
    base = llama(1)
    trained = {"prm": adapted(folders, "lora"), "other": adapted(folders, "more")}
    for node in result.tree.nodes[1:]:
        prompt, path = result.tree.prompt_ids, node.path_ids()
        np.testing.assert_allclose(node.logprobs, naive_logprobs(base, prompt, path)[node.start :], atol=1e-4)
        for name, model in trained.items():
            wanted = naive_rewards(model, base, prompt, path, 0.3)[node.start :]
            np.testing.assert_allclose(node.rewards[name], wanted, atol=1e-4)
    assert ImplicitPRM.from_pretrained(folders / "lora").prm is first.prm
    with torch.no_grad():
        assert torch.equal(policy.lm.module(ids).logits, before)


def test_another_base_may_be_given(folders):
    model = llama(1)
    pair = ImplicitPRM.from_pretrained(folders / "lora", base=model, tokenizer=byte_tokenizer(), beta=0.3)
    assert pair.reference.module is model
    check(pair, adapted(folders, "lora"), llama(1), 0.3)
    policy = HFPolicy(llama(1), byte_tokenizer())
    pair = ImplicitPRM.from_pretrained(folders / "lora", base=policy, beta=0.3)
    assert pair.reference is policy.lm
    assert pair.tokenizer is policy.tokenizer
    check(pair, adapted(folders, "lora"), llama(1), 0.3)
    steered = HFPolicy.from_pretrained(folders / "lora")  # an adapter can be a policy too
    assert steered.lm.state is not None
    with pytest.raises(ValueError, match="no adapter"):
        load(folders / "base", base=folders / "prm")
    with pytest.raises(TypeError, match="base must be"):
        load(folders / "lora", base=3)


def test_bad_adapters_are_named(folders, copied, tmp_path):
    folder = copied("lora")
    weights = load_file(folder / "adapter_model.safetensors")
    gone = sorted(weights)[0]
    save_file({k: v for k, v in weights.items() if k != gone}, folder / "adapter_model.safetensors")
    with pytest.raises(ValueError, match=rf"{folder}.*incomplete.*{gone}"):
        load(folder)
    (folder / "adapter_model.safetensors").write_bytes(b"junk")
    with pytest.raises(ValueError, match=rf"adapter.*{folder}"):
        load(folder)
    good = load(folders / "base").lm  # what failed has left nothing switched on
    np.testing.assert_allclose(
        naive_logprobs(good.module, [5, 6], [7, 8, 9]), naive_logprobs(llama(1), [5, 6], [7, 8, 9]), atol=1e-6
    )
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": None}))
    with pytest.raises(ValueError, match="names no base"):
        load(folder)
    (folder / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": str(folders / "more")}))
    with pytest.raises(ValueError, match="adapter itself"):
        load(folder)
    prompt = get_peft_model(llama(1), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    prompt.save_pretrained(tmp_path / "virtual")
    with pytest.raises(ValueError, match="virtual tokens"):
        load(tmp_path / "virtual", base=llama(1))


# --- cards ---------------------------------------------------------------------------------------------------------


def test_the_demo_pair_loads_by_its_card():
    pair = ImplicitPRM.from_pretrained(pair_dir())
    card = read_card(pair_dir() / "pair.json")
    assert pair.beta == card["beta"]
    policy = HFPolicy.from_pretrained(pair_dir() / card["reference"])
    assert pair.reference is policy.lm
    assert pair.prm is not policy.lm
    (score,) = pair.score(["=5a+3b*7?"], ["a+3=8;b*7=6;"], steps=StepRule(delimiter=";"))
    assert len(score.step_rewards) == 3  # two steps and the end of sequence
    assert policy.lm.id == pair.reference_id


def write_card(folder, **card):
    (folder / "pair.json").write_text(json.dumps(card))
    return folder


def test_cards_resolve_their_names(folders, copied):
    root = copied("prm").parent
    copied("base")
    card = write_card(root, model="prm", reference="base", beta=0.2, format=1, more="ignored")
    pair = ImplicitPRM.from_pretrained(card)
    check(pair, llama(2), llama(1), 0.2)
    assert ImplicitPRM.from_pretrained(card, beta=0.4).beta == 0.4
    assert ImplicitPRM.from_pretrained(card, "policy").models["reference"] == "policy"
    write_card(root, model="prm", reference=str(folders / "base"))
    assert ImplicitPRM.from_pretrained(root).reference is load(folders / "base").lm
    write_card(root, model="prm", reference="policy")
    with pytest.warns(UserWarning, match=r"names the reference 'policy', and no such folder .* by './policy'"):
        assert ImplicitPRM.from_pretrained(root).models["reference"] == "policy"
    write_card(root / "prm", reference="../base", beta=1)  # a card beside the weights
    check(ImplicitPRM.from_pretrained(root / "prm"), llama(2), llama(1), 1.0)
    lora = copied("lora")
    write_card(lora, beta=0.7)  # an adapter's base is the reference
    pair = ImplicitPRM.from_pretrained(lora)
    check(pair, adapted(folders, "lora"), llama(1), 0.7)


@pytest.mark.parametrize(
    ("card", "message"),
    [
        ("{", "no JSON"),
        ("[1]", "JSON object"),
        ('{"format": 2}', "format 2"),
        ('{"format": "a"}', "format='a'"),
        ('{"beta": 0}', "beta=0"),
        ('{"beta": "x"}', "beta='x'"),
        ('{"model": 3}', "model=3"),
        ('{"reference": 3}', "reference=3"),
    ],
)
def test_bad_cards_are_named(tmp_path, card, message):
    (tmp_path / "pair.json").write_text(card)
    with pytest.raises(ValueError, match=rf"pair.json.*{message}"):
        ImplicitPRM.from_pretrained(tmp_path)


def test_a_card_whose_reference_folder_is_lost_is_no_pair(folders, copied):
    """Never the policy of whatever search comes: a folder and the keyword are written in two ways."""
    root = copied("prm").parent
    lost = copied("base").rename(root / "policy")
    write_card(root, model="prm", reference="./policy")
    check(ImplicitPRM.from_pretrained(root), llama(2), llama(1), 0.05)
    shutil.rmtree(lost)
    with pytest.raises(
        ValueError, match=r"reference='./policy' of '.*pair.json' is a folder beside the card, and it is not"
    ):
        ImplicitPRM.from_pretrained(root)
    assert ImplicitPRM.from_pretrained(root, folders / "base").reference is load(folders / "base").lm
    write_card(root / "prm", reference="../base")
    with pytest.raises(ValueError, match=r"reference='\.\./base'"):
        ImplicitPRM.from_pretrained(root / "prm")


@pytest.mark.parametrize("beta", [1e39, 1e-50, 10**400, True, None, "0.1"])
def test_a_cards_beta_is_a_number_that_fp32_can_carry(copied, beta):
    root = write_card(copied("prm"), reference="../base", beta=beta)
    with pytest.raises(ValueError, match=r"pair.json': beta=.*: a finite number > 0"):
        ImplicitPRM.from_pretrained(root)


@pytest.fixture
def hub(monkeypatch, copied):
    """Folders as a hub has them, under org/: what was fetched before, and no network."""
    root = copied("prm").parent
    copied("base").rename(root / "policy")

    def cached_file(repo, name, subfolder="", **options):
        path = root / repo.removeprefix("org/") / subfolder / name
        return str(path) if path.is_file() else None

    monkeypatch.setattr("transformers.utils.cached_file", cached_file)
    return root


def test_a_pair_on_the_hub_has_its_cards_delimiter(hub):
    write_card(hub / "prm", reference="./policy", delimiter=";")
    assert card_delimiter("org/prm") == ";"
    assert card_delimiter("org/none") is card_delimiter(hub / "policy") is card_delimiter(hub / "nowhere") is None
    with pytest.raises(ValueError, match=r"reference='./policy' of 'org/prm/pair.json' is a folder beside the card"):
        ImplicitPRM.from_pretrained("org/prm")
    write_card(hub / "prm", delimiter=5)
    with pytest.raises(ValueError, match="delimiter=5 is not str"):
        card_delimiter("org/prm")


def test_a_server_is_configured_by_the_card_of_its_pair(hub):
    write_card(hub / "prm", delimiter=";")
    for section in ({"pair": "org/prm"}, {"prm": "org/prm"}, {"pair": str(hub / "prm"), "steps": {"max_tokens": 9}}):
        config = ServeConfig.of(section)
        assert config.steps.delimiter == ";"
        assert config.steps.max_tokens == section.get("steps", {}).get("max_tokens", StepRule().max_tokens)
        assert ServeConfig.find({"PRM_SEARCH_SERVE": config.json()}, None) == config
    assert ServeConfig.of({"pair": "org/prm", "steps": {"delimiter": "\n"}}).steps.delimiter == "\n"
    assert ServeConfig.of({"pair": "org/prm", "steps": {"delimiter": None, "regex": "x"}}).steps.delimiter is None
    assert ServeConfig.of({"pair": "org/none"}).steps == StepRule()
    assert ServeConfig.of({"pair": "demo"}).steps.delimiter == ";"
    assert ServeConfig.of({"prm": "http://127.0.0.1:1", "reference": "policy"}).steps == StepRule()

    steering = {"model": "org/prm", "reference": "policy", "report": "r.jsonl"}
    assert SteeringConfig.of({"prm_search": steering}).steps.delimiter == ";"
    assert SteeringConfig.of({"prm_search": steering | {"steps": {"delimiter": "."}}}).steps.delimiter == "."


# --- what is left over ---------------------------------------------------------------------------------------------


def with_more(folder, more, **config):
    """A checkpoint with further tensors, and with other fields in its config."""
    weights = load_file(folder / "model.safetensors")
    save_file(weights | more, folder / "model.safetensors", {"format": "pt"})
    old = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(old | config))
    return folder


@pytest.mark.parametrize(
    ("more", "config", "named"),
    [
        ({}, {"num_hidden_layers": 1}, r"model\.layers\.1\."),  # the config lost a layer
        ({"model.layers.0.self_attn.q_proj.bias": torch.zeros(32)}, {}, r"q_proj\.bias"),
        ({"model.layers.0.self_attn.q_norm.weight": torch.ones(8)}, {}, r"q_norm\.weight"),
        ({"model.embed_norm.weight": torch.ones(32)}, {}, r"embed_norm"),
        ({"lm_head.bias": torch.zeros(300)}, {}, r"lm_head\.bias"),
        ({"base_model.model.layers.0.q_proj.lora_A.weight": torch.ones(2, 2)}, {}, r"lora_A"),
    ],
)
def test_weights_without_a_place_are_refused(copied, more, config, named):
    folder = with_more(copied("base"), more, **config)
    with pytest.raises(ValueError, match=rf"{folder}.*does not fit its config.*{named}"):
        load(folder)


@pytest.mark.parametrize(
    ("more", "told"),
    [
        ({"v_head.summary.weight": torch.zeros(1, 32), "v_head.summary.bias": torch.zeros(1)}, "v_head"),
        ({"score.weight": torch.zeros(1, 32)}, "score"),
        ({"reward_head.0.weight": torch.zeros(1, 32)}, "reward_head"),
        ({"model.visual.blocks.0.weight": torch.zeros(1)}, r"model\.visual"),
    ],
)
def test_an_extra_head_is_told(copied, recwarn, more, told):
    lm = load(with_more(copied("base"), more)).lm
    assert lm.head.vocab
    (warning,) = [w for w in recwarn if "does not use" in str(w.message)]
    assert str(warning.message).endswith(f"does not use: {told.replace(chr(92), '')}")


def test_buffers_and_tied_heads_are_no_leftovers(copied, recwarn):
    folder = copied("base")
    embedding = load_file(folder / "model.safetensors")["model.embed_tokens.weight"].clone()
    buffers = {
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4),
        "model.rotary_emb.inv_freq": torch.ones(4),
    }
    load(with_more(folder, buffers | {"lm_head.weight": embedding}, tie_word_embeddings=True))
    assert [str(w.message) for w in recwarn if "does not use" in str(w.message)] == []


def test_an_adapters_leftovers_are_refused(copied):
    folder = copied("lora")
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | {"target_modules": ["q_proj"]}))
    with pytest.raises(ValueError, match=rf"{folder}.*does not fit its config.*v_proj"):
        load(folder)


def test_an_activated_adapter_is_refused(folders, tmp_path):
    """Its effect is switched on in PEFT's wrapper, by tokens of the text: without the wrapper every reward is 0."""
    config = LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"], alora_invocation_tokens=[5, 6])
    get_peft_model(llama(1), config).save_pretrained(tmp_path / "alora")
    with pytest.raises(ValueError, match=r"alora.*activated LoRA"):
        load(tmp_path / "alora", base=folders / "base")


# --- what cannot be loaded -----------------------------------------------------------------------------------------


def test_missing_things_are_named(folders, copied, tmp_path):
    with pytest.raises(OSError, match="nowhere"):
        load(tmp_path / "nowhere")
    with pytest.raises(OSError, match="someone/nothing"):
        load("someone/nothing")
    with pytest.raises(OSError, match=r"no file 'x.gguf'"):
        load(folders / "base", gguf_file="x.gguf")
    with pytest.raises(OSError, match=str(tmp_path)):
        load(tmp_path)
    with pytest.raises(ValueError, match=r"reference is missing.*pair\.json"):
        ImplicitPRM.from_pretrained(folders / "prm")
    folder = copied("base")
    (folder / "model.safetensors").unlink()
    with pytest.raises(OSError, match=str(folder)):
        load(folder)


def test_corrupt_checkpoints_are_named(copied):
    folder = copied("base")
    file = folder / "model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=str(folder)):
        load(folder)
    file.write_bytes(whole)
    weights = load_file(file)
    gone = "model.layers.1.mlp.down_proj.weight"
    save_file({k: v for k, v in weights.items() if k != gone}, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=rf"{folder}.*incomplete.*{gone}"):
        load(folder)
    save_file(weights | {gone: torch.zeros(3, 3)}, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=str(folder)):
        load(folder)
    file.write_bytes(whole)
    (folder / "config.json").write_text("{")
    with pytest.raises(ValueError, match=rf"{folder}/config.json: not JSON"):
        load(folder)


def test_a_reference_with_another_vocabulary_is_refused(folders, tmp_path):
    llama(1).save_pretrained(tmp_path / "other")
    byte_tokenizer(CORPUS, size=300).save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match=r"other.*another vocabulary"):
        ImplicitPRM.from_pretrained(folders / "prm", tmp_path / "other")


# --- GGUF ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def gguf_file(tmp_path_factory):
    """A tiny Llama with its tokenizer in one GGUF file."""
    gguf = pytest.importorskip("gguf")
    pytest.importorskip("accelerate")
    model, words = llama(3), byte_tokenizer(template=None)
    config = model.config
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    out = gguf.GGUFWriter(str(path), "llama")
    out.add_context_length(config.max_position_embeddings)
    out.add_embedding_length(config.hidden_size)
    out.add_block_count(config.num_hidden_layers)
    out.add_feed_forward_length(config.intermediate_size)
    out.add_head_count(config.num_attention_heads)
    out.add_head_count_kv(config.num_key_value_heads)
    out.add_layer_norm_rms_eps(config.rms_norm_eps)
    out.add_rope_freq_base(10000.0)
    out.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    out.add_vocab_size(config.vocab_size)
    tokens = [words.convert_ids_to_tokens(i) for i in range(len(words))]
    tokens += [f"<unused{i}>" for i in range(config.vocab_size - len(tokens))]
    out.add_tokenizer_model("gpt2")
    out.add_token_list(tokens)
    out.add_token_types([3 if t in words.all_special_tokens else 1 for t in tokens])
    merges = json.loads(words.backend_tokenizer.to_str())["model"]["merges"]
    out.add_token_merges([" ".join(pair) for pair in merges])
    out.add_eos_token_id(words.eos_token_id)
    out.add_bos_token_id(1)
    names = {
        "model.embed_tokens.weight": "token_embd.weight",
        "model.norm.weight": "output_norm.weight",
        "lm_head.weight": "output.weight",
    }
    parts = {
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
    }
    for layer in range(config.num_hidden_layers):
        for ours, theirs in parts.items():
            names[f"model.layers.{layer}.{ours}.weight"] = f"blk.{layer}.{theirs}.weight"
    for name, weight in model.state_dict().items():
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
        found = next((n for part, n in heads.items() if part in name), None)
        if found is not None:  # GGUF keeps rotary pairs side by side
            weight = weight.reshape(found, 2, -1, weight.shape[-1]).transpose(1, 2).reshape(weight.shape)
        out.add_tensor(names[name], weight.contiguous().numpy())
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()
    return path


def test_gguf_files_load_and_are_plain_models_afterwards(gguf_file, tmp_path):
    lm, words = load(gguf_file, dtype="float32")
    prompt = words(PROMPT, add_special_tokens=False)["input_ids"]
    assert prompt == byte_tokenizer()(PROMPT)["input_ids"]
    np.testing.assert_allclose(
        naive_logprobs(lm.module, prompt, [7, 8, 9]), naive_logprobs(llama(3), prompt, [7, 8, 9]), atol=1e-4
    )
    assert load(gguf_file.parent, gguf_file=gguf_file.name, dtype="float32").lm is lm
    lm.module.save_pretrained(tmp_path / "saved")
    assert LanguageModel.of(load(tmp_path / "saved", dtype="float32").lm.module).head.vocab == lm.head.vocab
    pair = ImplicitPRM.from_pretrained(gguf_file, llama(1), dtype="float32", beta=0.2)
    (score,) = pair.score([prompt], [[7, 8, 9]])
    np.testing.assert_allclose(
        score.token_rewards, naive_rewards(lm.module, llama(1), prompt, [7, 8, 9], 0.2), atol=1e-4
    )
