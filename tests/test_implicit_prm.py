"""ImplicitPRM: rewards against a naive computation, complete responses, shared models, what is refused."""

from __future__ import annotations

import warnings
from collections import Counter

import numpy as np
import pytest
import torch
from fakes import FakePolicy, ToyLM
from pairs import CORPUS, PLAIN_CHAT, byte_tokenizer, llama, naive_logprobs, naive_rewards
from peft import LoraConfig, get_peft_model

from prm_search import Beam, BestOfN, HFPolicy, ImplicitPRM, Prompt, Sampling, SearchTree, StepRule, search
from prm_search.engine.language_model import LanguageModel
from prm_search.policies.hf import Steered
from prm_search.scorers.implicit.implicit_prm import ConstantReference, Scores
from prm_search.usage import Meter

BETA = 0.25
RULE = StepRule(delimiter="\n\n", max_tokens=6)
MESSAGES = [{"role": "user", "content": "What is seven plus eight?"}]
PROMPT = "What is the sum of seven and eight?"
TEXTS = ["Step 1: add seven.\n\nThe answer is fifteen.", "naïve: 3 \u00d7 4 = 12.\n\nStep 2: so twelve.\n\n", "It is"]


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer()


@pytest.fixture(scope="module")
def trained():
    return llama(1)


@pytest.fixture(scope="module")
def base():
    return llama(2)


@pytest.fixture
def pair(trained, base, tokenizer):
    return ImplicitPRM(trained, base, tokenizer=tokenizer, beta=BETA)


@pytest.fixture
def encoded(monkeypatch):
    """Tokens encoded, by model id, from here on."""
    counts: Counter[object] = Counter()
    add = Meter.add

    def spy(self, kind, model, tokens):
        if kind == "encoded":
            counts[model] += tokens
        add(self, kind, model, tokens)

    monkeypatch.setattr(Meter, "add", spy)
    return counts


def grown(prompt_ids, shape, seed=0, vocab=340):
    """A tree built by hand: shape lists (parent index, tokens)."""
    rng = np.random.default_rng(seed)
    tree = SearchTree(Prompt(token_ids=prompt_ids))
    for parent, tokens in shape:
        tree.add(tree.nodes[parent], rng.integers(5, vocab, tokens).tolist())
    return tree


SHAPE = [(0, 3), (0, 5), (1, 2), (1, 4), (2, 1), (5, 7), (3, 2)]


def check_tree(tree, trained, base, tolerance=1e-4, beta=BETA):
    for node in tree.nodes[1:]:
        wanted = naive_rewards(trained, base, tree.prompt_ids, node.path_ids(), beta)
        np.testing.assert_allclose(node.token_rewards, wanted[node.start :], atol=tolerance)
        assert node.q == pytest.approx(wanted.sum(dtype=np.float64), abs=tolerance * max(1, len(wanted)))
        assert node.reward == pytest.approx(node.q - node.parent.q, abs=1e-9)


# --- nodes ---------------------------------------------------------------------------------------------------------


def test_node_rewards_equal_a_naive_computation(pair, trained, base):
    trees = [grown((7, 8, 9), SHAPE), grown((3, 12, 40, 41), SHAPE[:4], seed=1)]
    pair.score_nodes([trees[0].nodes[1], trees[1].nodes[2]])
    pair.score_nodes([node for tree in trees for node in tree.nodes])
    for tree in trees:
        check_tree(tree, trained, base)
        assert tree.nodes[1].token_rewards.dtype == np.float32
        pair.release(tree)
    assert pair.prm.tree.used == 0
    assert pair.reference.tree.used == 0


def test_a_scored_node_costs_nothing_more(pair):
    tree = grown((7, 8, 9), SHAPE)
    pair.score_nodes(tree.nodes)
    counts, calls = tree.meter.counts.copy(), pair.forward_calls
    before = [node.token_rewards for node in tree.nodes[1:]]
    pair.score_nodes(tree.nodes)
    assert tree.meter.counts == counts
    assert pair.forward_calls == calls
    assert all(a is node.token_rewards for a, node in zip(before, tree.nodes[1:], strict=True))
    for lm in (pair.prm, pair.reference):  # each token once, siblings on shared KV
        assert counts["encoded", lm.id] == 3 + sum(tokens for _, tokens in SHAPE)
        assert counts["reencoded", lm.id] == 0
    pair.release(tree)


def test_bf16_rewards_are_fp32_and_near(tokenizer):
    models = [llama(seed, dtype=torch.bfloat16) for seed in (1, 2)]
    tree = grown((7, 8, 9), SHAPE)
    pair = ImplicitPRM(*models, tokenizer=tokenizer, beta=1.0)
    pair.score_nodes(tree.nodes)
    errors = []
    for node in tree.nodes[1:]:
        wide = [m.float() for m in map(_copy, models)]
        wanted = naive_rewards(*wide, tree.prompt_ids, node.path_ids(), 1.0)[node.start :]
        errors.append(np.abs(node.token_rewards - wanted))
        assert node.token_rewards.dtype == np.float32
    assert np.concatenate(errors).mean() < 0.15
    naive = [naive_rewards(*models, tree.prompt_ids, n.path_ids(), 1.0)[n.start :] for n in tree.nodes[1:]]
    got = [n.token_rewards for n in tree.nodes[1:]]
    assert np.abs(np.concatenate(got) - np.concatenate(naive)).max() < 0.15


def _copy(model):
    import copy

    return copy.deepcopy(model)


def test_padded_heads_of_different_width_make_a_pair(tokenizer):
    wide, narrow = llama(3, vocab=384), llama(4, vocab=340)
    tree = grown((7, 8, 9), SHAPE)
    pair = ImplicitPRM(wide, narrow, tokenizer=tokenizer, beta=BETA)
    pair.score_nodes(tree.nodes)
    check_tree(tree, wide, narrow)
    pair.release(tree)


def test_an_adapter_alone_is_a_pair_on_shared_weights(tokenizer):
    model = get_peft_model(llama(5), LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False))
    model.eval()
    tree = grown((7, 8, 9), SHAPE)
    pair = ImplicitPRM(model, tokenizer=tokenizer, beta=BETA)
    assert pair.prm.module is pair.reference.module
    pair.score_nodes(tree.nodes)
    for node in tree.nodes[1:]:
        on = naive_logprobs(model, tree.prompt_ids, node.path_ids())
        with model.disable_adapter():
            off = naive_logprobs(model, tree.prompt_ids, node.path_ids())
        np.testing.assert_allclose(node.token_rewards, BETA * (on - off)[node.start :], atol=1e-4)
    pair.release(tree)
    named = ImplicitPRM(model, model.get_base_model(), tokenizer=tokenizer)
    assert named.reference is pair.reference  # the bare module means its own weights
    other = llama(2)
    assert ImplicitPRM(model, other, tokenizer=tokenizer).reference.module is other


def test_prompts_are_encoded_by_the_pair_where_no_policy_has(pair, tokenizer, trained, base):
    tree = SearchTree(Prompt(messages=tuple(MESSAGES)))
    node = tree.add(tree.root, [30, 31, 32])
    pair.score_nodes([node])
    wanted = tokenizer.apply_chat_template(MESSAGES, add_generation_prompt=True, return_dict=True)["input_ids"]
    assert list(tree.prompt_ids) == list(wanted)
    check_tree(tree, trained, base)
    pair.release(tree)


# --- with a policy -------------------------------------------------------------------------------------------------


def run(policy, scorer, strategy=None, **given):
    options = {"steps": RULE, "max_new_tokens": 16, "seed": 3, "temperature": 1.0} | given
    return search(
        [MESSAGES, PROMPT], policy=policy, scorer=scorer, strategy=strategy or Beam(width=2, expansions=3), **options
    )


@pytest.mark.parametrize("reference", ["policy", "the HFPolicy", "its module"])
def test_a_reference_that_is_the_policy_costs_nothing(reference, trained, base, tokenizer):
    policy = HFPolicy(base, tokenizer)
    given = {"policy": "policy", "the HFPolicy": policy, "its module": base}[reference]
    pair = ImplicitPRM(trained, given, tokenizer=tokenizer, beta=BETA)
    for scored, plain in zip(run(policy, pair), run(policy, None), strict=True):
        tree = scored.tree
        check_tree(tree, trained, base)
        assert scored.usage.encoded_tokens.keys() == {"policy", "prm"}
        lengths = sum(len(node.token_ids) for node in tree.nodes)
        assert scored.usage.encoded_tokens["prm"] == len(tree.prompt_ids) + lengths
        unread = sum(1 for node in tree.nodes[1:] if not node.children)
        assert scored.usage.encoded_tokens["policy"] == len(tree.prompt_ids) + lengths - unread
        assert plain.usage.encoded_tokens.keys() == {"policy"}
    assert policy.lm.tree.used == pair.prm.tree.used == 0


def test_a_policy_that_is_the_prm_is_run_once(trained, base, tokenizer):
    policy = HFPolicy(trained, tokenizer)
    pair = ImplicitPRM(trained, base, tokenizer=tokenizer, beta=BETA)
    (first, _) = run(policy, pair, BestOfN(3))
    check_tree(first.tree, trained, base)
    assert first.usage.encoded_tokens.keys() == {"policy", "reference"}


def test_a_policy_without_a_model_here_lends_its_log_probs(trained, tokenizer):
    policy = FakePolicy(ToyLM())
    pair = ImplicitPRM(trained, "policy", tokenizer=tokenizer, beta=BETA)
    (result,) = search(["ab"], policy=policy, scorer=pair, strategy=BestOfN(3), steps=RULE, max_new_tokens=12)
    for node in result.tree.nodes[1:]:
        mine = naive_logprobs(trained, result.tree.prompt_ids, node.path_ids())[node.start :]
        np.testing.assert_allclose(node.token_rewards, BETA * (mine - node.logprobs), atol=1e-4)
    assert pair.models == {"prm": pair.prm.id, "reference": "toy"}
    assert result.usage.encoded_tokens.keys() == {"prm"}


def test_policy_reference_needs_log_probs_of_that_policy(trained, tokenizer):
    pair = ImplicitPRM(trained, "policy", tokenizer=tokenizer)
    tree = grown((7, 8), [(0, 3)])
    with pytest.raises(ValueError, match="carries no"):
        pair.score_nodes(tree.nodes)
    pair.bind(FakePolicy(ToyLM(), id="toy"))
    node = tree.add(tree.root, [9], logprobs=np.array([-1.0]), sampler="another")
    with pytest.raises(ValueError, match="another"):
        pair.score_nodes([node])
    node = tree.add(tree.root, [9], logprobs=np.array([-1.0]), sampler="toy")
    pair.score_nodes([node])
    mine = naive_logprobs(trained, (7, 8), [9])
    np.testing.assert_allclose(node.token_rewards, 0.05 * (mine + 1.0), atol=1e-5)
    pair.release(tree)


def test_binding_compares_vocabularies(trained, base, tokenizer):
    other = HFPolicy(llama(6), byte_tokenizer(CORPUS[:1], size=300))
    with pytest.raises(ValueError, match="vocabulary"):
        ImplicitPRM(trained, "policy", tokenizer=tokenizer).bind(other)
    with pytest.raises(ValueError, match="vocabulary"):
        ImplicitPRM(trained, other, tokenizer=tokenizer)
    pair = ImplicitPRM(trained, base, tokenizer=tokenizer)
    pair.bind(other)
    with pytest.raises(ValueError, match="steering"):
        pair.steering_models()
    with pytest.raises(ValueError, match="steering"):
        Steered(other, pair, 1.0)
    pair.bind(HFPolicy(base, byte_tokenizer()))  # equal, not the same object
    assert pair.steering_models() == (pair.prm, pair.reference)
    anonymous = ImplicitPRM(trained, base)
    anonymous.bind(other)
    assert anonymous.tokenizer is other.tokenizer


# --- complete responses --------------------------------------------------------------------------------------------


def test_score_of_texts_equals_a_naive_computation(pair, tokenizer, trained, base):
    prompts = [PROMPT, MESSAGES, PROMPT]
    scores = pair.score(prompts, TEXTS, steps=RULE)
    for prompt, text, score in zip(prompts, TEXTS, scores, strict=True):
        chat = isinstance(prompt, list)
        rendered = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=False) if chat else prompt
        prompt_ids = tokenizer(rendered)["input_ids"]
        response = [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]
        assert list(score.token_ids) == response
        wanted = naive_rewards(trained, base, prompt_ids, response, BETA)
        np.testing.assert_allclose(score.token_rewards, wanted, atol=1e-4)
        np.testing.assert_allclose(score.q, np.cumsum(wanted), atol=1e-3)
        assert score.reward == pytest.approx(float(score.step_rewards.sum(dtype=np.float64)), abs=1e-4)
        assert score.q[-1] == pytest.approx(score.reward, abs=1e-5)
        assert score.text == text + "<|im_end|>"
        assert score.step_ends[-1] == len(response)
        assert (np.diff(score.step_ends, prepend=0) <= RULE.max_tokens).all()
        for values in (score.token_rewards, score.q, score.step_rewards):
            assert values.dtype == np.float32
    assert pair.prm.tree.used == pair.reference.tree.used == 0


def test_score_agrees_with_what_a_search_scored(trained, base, tokenizer):
    """Ids as sampled, end of sequence and steps included."""
    policy = HFPolicy(base, tokenizer)
    pair = ImplicitPRM(trained, base, tokenizer=tokenizer, beta=BETA)
    results = run(policy, pair, BestOfN(4), max_new_tokens=40)
    leaves = [leaf for result in results for leaf in result.candidates]
    scores = pair.score([leaf.tree.prompt_ids for leaf in leaves], [leaf.path_ids() for leaf in leaves], steps=RULE)
    for leaf, score in zip(leaves, scores, strict=True):
        path = leaf.path()
        np.testing.assert_allclose(score.token_rewards, np.concatenate([n.token_rewards for n in path]), atol=1e-4)
        assert score.step_ends.tolist() == [n.end for n in path]
        np.testing.assert_allclose(score.step_rewards, [n.reward for n in path], atol=1e-3)


def test_the_end_of_sequence_is_explicit(pair, tokenizer):
    eos = tokenizer.eos_token_id
    ids = tokenizer("It is")["input_ids"]
    whole, cut, said = pair.score([PROMPT] * 3, ["It is", "It is", "It is<|im_end|>"], append_eos=[True, False, True])
    assert list(whole.token_ids) == list(said.token_ids) == [*ids, eos]
    assert list(cut.token_ids) == ids
    (as_is,) = pair.score([PROMPT], [torch.tensor(ids)])
    assert list(as_is.token_ids) == ids
    (blank,) = pair.score([PROMPT], [""])
    assert blank.token_ids == (eos,)
    other = ImplicitPRM(pair.prm, pair.reference, tokenizer=tokenizer, eos_token_id=3)
    assert other.score([PROMPT], ["It is"])[0].token_ids == (*ids, 3)


def test_equal_prompts_are_encoded_once_and_batches_change_nothing(pair, encoded, tokenizer):
    prompts = [PROMPT, MESSAGES, PROMPT, PROMPT, MESSAGES]
    texts = [*TEXTS, TEXTS[0], TEXTS[1]]
    whole = pair.score(prompts, texts)
    rendered = tokenizer.apply_chat_template(MESSAGES, add_generation_prompt=True, return_dict=True)["input_ids"]
    distinct = {(repr(prompt), score.token_ids) for prompt, score in zip(prompts, whole, strict=True)}
    once = len(tokenizer(PROMPT)["input_ids"]) + len(rendered) + sum(len(ids) for _, ids in distinct)
    assert encoded == {pair.prm.id: once, pair.reference.id: once}
    calls = pair.forward_calls
    parts = pair.score(prompts, texts, batch_tokens=8)
    assert pair.forward_calls - calls == 2 * len(distinct)
    for a, b in zip(whole, parts, strict=True):
        assert a.token_ids == b.token_ids
        np.testing.assert_allclose(a.token_rewards, b.token_rewards, atol=1e-5)
    assert pair.prm.tree.used == 0
    assert not pair.prm._memos


def test_known_reference_log_probs_are_used(pair, encoded, trained, tokenizer):
    ids = [tokenizer(text)["input_ids"] for text in TEXTS]
    known = [np.linspace(-2, -1, len(i)) for i in ids]
    prompt = tokenizer(PROMPT)["input_ids"]
    scores = pair.score([prompt] * 3, ids, logprobs=known)
    for response, theirs, score in zip(ids, known, scores, strict=True):
        wanted = BETA * (naive_logprobs(trained, prompt, response) - theirs)
        np.testing.assert_allclose(score.token_rewards, wanted, atol=1e-4)
    assert encoded.keys() == {pair.prm.id}
    alone = ImplicitPRM(trained, "policy", tokenizer=tokenizer, beta=BETA).score([prompt] * 3, ids, logprobs=known)
    np.testing.assert_allclose(alone[0].token_rewards, scores[0].token_rewards, atol=1e-6)


def test_explicit_step_ends(pair):
    (score,) = pair.score([PROMPT], [[30, 31, 32, 33]], steps=[[1, 4]])
    assert score.step_ends.tolist() == [1, 4]
    np.testing.assert_allclose(score.step_rewards, [score.q[0], score.q[3] - score.q[0]], atol=1e-5)


def test_no_responses_no_scores(pair):
    assert pair.score([], []) == []


BAD = [
    (("a prompt", ["x"]), {}, TypeError, "prompts"),
    ((["a"], "x"), {}, TypeError, "responses"),
    ((["a"], ["x", "y"]), {}, ValueError, "responses 2"),
    ((["a", ""], ["x", "y"]), {}, ValueError, r"prompts\[1\].*empty"),
    ((["a"], [[]]), {}, ValueError, r"responses\[0\] is empty"),
    ((["a"], [""]), {"append_eos": False}, ValueError, r"responses\[0\] is empty"),
    ((["a"], [[1.5]]), {}, TypeError, r"responses\[0\]"),
    ((["a"], [7]), {}, TypeError, r"responses\[0\]"),
    ((["a"], [[5] * 600]), {}, ValueError, r"responses\[0\].*context of 512"),
    ((["a"], [[99999]]), {}, ValueError, "vocabulary"),
    ((["a"], ["x"]), {"append_eos": [True, True]}, ValueError, "append_eos"),
    ((["a"], ["x"]), {"logprobs": [[0.0, 0.0, 0.0, 0.0]]}, ValueError, r"logprobs\[0\]"),
    ((["a"], ["x"]), {"steps": [[1], [2]]}, ValueError, "steps has 2"),
    ((["a"], [[5, 6]]), {"steps": [[1]]}, ValueError, r"steps\[0\]"),
    ((["a"], [[5, 6]]), {"steps": [[2, 2]]}, ValueError, r"steps\[0\]"),
    ((["a"], ["x"]), {"steps": "\n\n"}, TypeError, "StepRule"),
    ((["a"], ["x"]), {"batch_tokens": 0}, ValueError, "batch_tokens=0"),
]


@pytest.mark.parametrize(("given", "options", "kind", "message"), BAD)
def test_bad_input_of_score_is_named(pair, given, options, kind, message):
    with pytest.raises(kind, match=message):
        pair.score(*given, **options)
    assert pair.prm.tree.used == pair.reference.tree.used == 0


def test_scores_check_themselves():
    Scores((1, 2), np.zeros(2), np.array([1, 2]), ("a", "b"))
    for ends in ([2, 1], [1], [0, 2], [], [1, 1, 2]):
        with pytest.raises(ValueError, match="step ends"):
            Scores((1, 2), np.zeros(2), np.array(ends, int), ("a", "b"))
    with pytest.raises(ValueError, match="2 tokens"):
        Scores((1, 2), np.zeros(3), np.array([2]), ("a", "b"))


def test_pieces_join_to_the_text(pair, tokenizer):
    ids = tokenizer("ü \u00d7 naïve")["input_ids"]
    (score,) = pair.score([PROMPT], [ids])
    assert score.text == "ü \u00d7 naïve"
    assert len(score.pieces) == len(ids)
    (half,) = pair.score([PROMPT], [ids[:1]])
    assert half.text in ("\ufffd", "ü")


# --- without a reference -------------------------------------------------------------------------------------------


def test_a_constant_stands_in_for_the_reference(trained, tokenizer):
    free = ImplicitPRM(trained, ConstantReference(-1.5), tokenizer=tokenizer, beta=BETA)
    tree = grown((7, 8, 9), SHAPE)
    free.score_nodes(tree.nodes)
    for node in tree.nodes[1:]:
        wanted = BETA * (naive_logprobs(trained, tree.prompt_ids, node.path_ids()) + 1.5)
        np.testing.assert_allclose(node.token_rewards, wanted[node.start :], atol=1e-4)
    free.release(tree)
    assert free.models == {"prm": free.prm.id}
    with pytest.raises(ValueError, match="cancels"):
        free.steering_models()


def test_calibrated_rewards_have_no_drift(trained, tokenizer):
    found = ConstantReference.fit(trained, [PROMPT] * 3, TEXTS, tokenizer=tokenizer)
    scores = ImplicitPRM(trained, found, tokenizer=tokenizer, beta=BETA).score([PROMPT] * 3, TEXTS)
    assert sum(s.reward for s in scores) == pytest.approx(0, abs=1e-3)
    raw = ImplicitPRM(trained, ConstantReference(0.0), tokenizer=tokenizer, beta=1.0).score([PROMPT], TEXTS[:1])
    assert (raw[0].token_rewards < 0).all()  # without control every token costs something
    with pytest.raises(ValueError, match="responses is empty"):
        ConstantReference.fit(trained, [], [], tokenizer=tokenizer)
    for bad in (0.5, float("nan"), float("-inf")):
        with pytest.raises(ValueError, match="logprob="):
            ConstantReference(bad)


def test_a_search_runs_without_a_reference(trained, base, tokenizer):
    free = ImplicitPRM(trained, ConstantReference(-1.0), tokenizer=tokenizer, beta=BETA)
    results = run(HFPolicy(base, tokenizer), free, value="prefix_mean")
    assert results[0].usage.encoded_tokens.keys() == {"policy", "prm"}
    for node in results[0].tree.nodes[1:]:
        mine = naive_logprobs(trained, results[0].tree.prompt_ids, node.path_ids())
        assert node.value == pytest.approx(BETA * (mine.mean() + 1.0), abs=1e-3)


# --- what is refused -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("beta", [0, -1.0, float("nan"), float("inf"), True, "0.1", None])
def test_beta_must_be_a_positive_number(trained, base, beta):
    with pytest.raises(ValueError, match="beta="):
        ImplicitPRM(trained, base, beta=beta)


def test_bad_models_are_named(trained, base, tokenizer):
    with pytest.raises(ValueError, match="reference is missing"):
        ImplicitPRM(trained, tokenizer=tokenizer)
    with pytest.raises(ValueError, match=r"reference='gpt2'.*from_pretrained"):
        ImplicitPRM(trained, "gpt2")
    with pytest.raises(TypeError, match=r"model='gpt2'.*from_pretrained"):
        ImplicitPRM("gpt2", base)
    with pytest.raises(TypeError, match="causal LM"):
        ImplicitPRM(object(), base)
    with pytest.raises(TypeError, match="causal LM"):
        ImplicitPRM(trained, torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match="name="):
        ImplicitPRM(trained, base, name="")
    with pytest.raises(ValueError, match="no tokenizer"):
        ImplicitPRM(trained, base).score(["a"], ["b"])
    with pytest.raises(ValueError, match="needs a policy"):
        ImplicitPRM(trained, "policy").steering_models()


def test_a_pair_of_equal_weights_warns(trained, base, tokenizer):
    with pytest.warns(UserWarning, match="every reward is 0"):
        ImplicitPRM(trained, trained)
    with pytest.warns(UserWarning, match="every reward is 0"):
        ImplicitPRM(trained, "policy", tokenizer=tokenizer).bind(HFPolicy(trained, tokenizer))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ImplicitPRM(trained, base)
        ImplicitPRM(trained, "policy", tokenizer=tokenizer).bind(HFPolicy(base, tokenizer))


def test_forms_of_one_model_are_one_model(trained, base, tokenizer):
    lm = LanguageModel.of(base)
    pairs = [ImplicitPRM(trained, form, tokenizer=tokenizer) for form in (base, lm, HFPolicy(base, tokenizer))]
    assert {pair.reference for pair in pairs} == {lm}
    assert ImplicitPRM(HFPolicy(trained, tokenizer), base).tokenizer is tokenizer


def test_a_pair_scores_nodes_that_a_policy_expanded_by_hand(pair, trained, base, tokenizer):
    policy = HFPolicy(base, tokenizer)
    pair.bind(policy)
    tree = SearchTree(Prompt(text=PROMPT))
    sampling = Sampling(steps=RULE, max_new_tokens=20)
    (first,) = policy.expand([tree.root], 3, sampling=sampling)
    policy.expand([first[0]], 2, sampling=sampling)
    pair.score_nodes(tree.nodes)
    check_tree(tree, trained, base)
    pair.release(tree)
    policy.release(tree)
    assert policy.lm.tree.used == 0


def test_chat_templates_matter_for_messages_only(pair, base):
    """Another template in the pair: it renders messages itself; the sampled tokens stay as they are."""
    policy = HFPolicy(base, byte_tokenizer(template=PLAIN_CHAT))
    chat, plain = run(policy, pair)
    own = pair.tokenizer.apply_chat_template(MESSAGES, add_generation_prompt=True, return_dict=True)["input_ids"]
    assert list(own) != list(chat.tree.prompt_ids)
    for result, prompt in ((chat, own), (plain, plain.tree.prompt_ids)):
        for node in result.tree.nodes[1:]:
            wanted = naive_rewards(pair.prm.module, base, prompt, node.path_ids(), BETA)
            np.testing.assert_allclose(node.token_rewards, wanted[node.start :], atol=1e-4)
    assert pair.prm.tree.used == pair.reference.tree.used == 0
    follower = ImplicitPRM(pair.prm, "policy", tokenizer=pair.tokenizer)
    with pytest.raises(ValueError, match="chat template"):
        run(policy, follower)
    told = ImplicitPRM(pair.prm, "policy", tokenizer=policy.tokenizer)
    assert run(policy, told)[0].tree.nodes[1].reward is not None
    bare = ImplicitPRM(pair.prm, base, tokenizer=byte_tokenizer(template=None))
    (taken, _) = run(policy, bare)  # a pair without a template takes the policy's prompts
    node = taken.tree.nodes[1]
    wanted = naive_rewards(pair.prm.module, base, taken.tree.prompt_ids, node.token_ids, 0.05)
    np.testing.assert_allclose(node.token_rewards, wanted, atol=1e-4)


def test_a_prompt_in_text_needs_a_tokenizer(trained, base):
    with pytest.raises(ValueError, match=r"prompts\[0\].*tokenizer"):
        ImplicitPRM(trained, base).score(["a prompt"], [[3, 4]], steps=[[2]])
