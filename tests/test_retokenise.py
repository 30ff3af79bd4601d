"""The inexact mode: a pair with another tokenizer than the policy's, against scoring every path's text anew."""

from __future__ import annotations

import codecs

import numpy as np
import pytest
from pairs import OTHER_CORPUS, PLAIN_CHAT, byte_tokenizer, llama, metaspace_tokenizer, naive_rewards

from prm_search import Beam, BestOfN, HFPolicy, ImplicitPRM, Prompt, SearchTree, StepRule, search
from prm_search.scorers.implicit.implicit_prm import ConstantReference
from prm_search.tokens import TokenizerMatch, TokenText, encode_text

BETA = 0.25
RULE = StepRule(delimiter=None, max_tokens=4)  # ends steps in the middle of words, and of characters
MESSAGES = [{"role": "user", "content": "What is seven plus eight?"}]


@pytest.fixture(scope="module")
def policy():
    return HFPolicy(llama(1), byte_tokenizer())


OTHERS = {
    "byte level": lambda: byte_tokenizer(OTHER_CORPUS, size=380, template=PLAIN_CHAT, eos="</s>"),
    "metaspace": metaspace_tokenizer,
}


@pytest.fixture(scope="module", params=list(OTHERS))
def pair(request):
    return ImplicitPRM(llama(2, vocab=448), llama(3, vocab=448), tokenizer=OTHERS[request.param](), beta=BETA)


def text_of(policy, node):
    """The path's text: no special tokens, and no character that is not finished."""
    raw = b"".join(policy.token_text.piece(i) for i in node.path_ids() if i not in policy.token_text.special)
    return codecs.getincrementaldecoder("utf-8")("replace").decode(raw)


def rescored(pair, policy, prompt, node):
    """q of a node by rendering, tokenising and scoring everything from nothing."""
    words = pair.tokenizer
    if isinstance(prompt, str):
        prompt_ids = words(prompt)["input_ids"]
    else:
        prompt_ids = words.apply_chat_template(prompt, add_generation_prompt=True, return_dict=True)["input_ids"]
    ids = encode_text(words, text_of(policy, node))
    if node.finish == "stop":
        ids = [*ids, words.eos_token_id]
    if not ids:
        return 0.0, []
    rewards = naive_rewards(pair.prm.module, pair.reference.module, prompt_ids, ids, BETA)
    return float(rewards.sum(dtype=np.float64)), ids


def check(pair, policy, prompt, tree):
    for node in tree.nodes[1:]:
        q, _ = rescored(pair, policy, prompt, node)
        assert node.q == pytest.approx(q, abs=2e-3)
        assert len(node.token_rewards) == len(node.reward_ids["prm"])
    for node in tree.nodes[1:]:
        assert node.q == pytest.approx(node.parent.q + node.reward, abs=1e-9)


@pytest.mark.parametrize("strategy", [Beam(width=2, expansions=3), BestOfN(3)], ids=["beam", "best of n"])
def test_every_step_equals_scoring_its_text_anew(pair, policy, strategy):
    prompts = [MESSAGES, "What is the sum of seven and eight?"]
    results = search(prompts, policy=policy, scorer=pair, strategy=strategy, steps=RULE, max_new_tokens=16, seed=1)
    for prompt, result in zip(prompts, results, strict=True):
        assert len(result.tree.nodes) > 5
        check(pair, policy, prompt, result.tree)
    assert pair.prm.tree.used == pair.reference.tree.used == 0


def written(policy, text, cuts):
    """A chain of nodes that spells a text, cut after these numbers of tokens."""
    ids = policy.tokenizer(text)["input_ids"]
    tree = SearchTree(Prompt(text="What is it?"))
    tree.prompt = tree.prompt.with_ids(policy.encode(tree.prompt))
    node, at = tree.root, 0
    for cut in [*cuts, len(ids)]:
        if cut > at:
            node = tree.add(node, ids[at:cut])
            at = cut
    return tree


@pytest.mark.parametrize("one_by_one", [True, False])
def test_forks_inside_a_parents_tokens(pair, policy, one_by_one):
    """A parent that ends inside a word of the pair, and children that go on differently."""
    text = "Step 2: multiply five by four.\n\nTherefore the naïve answer equals twelve."
    tree = written(policy, text, [1, 2, 5, 6, 9, 14, 20])
    chain = list(tree.nodes[1:])
    for at, rest in ((1, "e multiply"), (3, "x result"), (4, "\n\nso"), (6, "équals")):
        tree.add(chain[at], policy.tokenizer(rest)["input_ids"])
    stop = tree.add(chain[4], [policy.tokenizer.eos_token_id], finish="stop")
    pair.bind(policy)
    if one_by_one:
        for node in tree.nodes:
            pair.score_nodes([node])
    else:
        pair.score_nodes(tree.nodes)
    check(pair, policy, "What is it?", tree)
    whole, ids = rescored(pair, policy, "What is it?", chain[-1])
    assert chain[-1].q == pytest.approx(whole, abs=2e-3)
    assert TokenText(pair.tokenizer).text(ids) in (text, " " + text)
    assert stop.reward_ids["prm"] == (pair.eos_token_id,)
    assert any(len(n.reward_ids["prm"]) and n.reward != pytest.approx(n.token_rewards.sum(), abs=1e-3) for n in chain)

    counts = tree.meter.counts
    new = sum(len(node.reward_ids["prm"]) for node in tree.nodes[1:])
    prompt = len(pair.tokenizer("What is it?")["input_ids"])
    for lm in (pair.prm, pair.reference):  # a fork inside a branch encodes one shared token again, and says so
        assert counts["encoded", lm.id] == prompt + new
        assert 0 < counts["reencoded", lm.id] < len(tree.nodes)
    pair.release(tree)
    assert pair.prm.tree.used == pair.reference.tree.used == 0


def test_equal_texts_below_one_path_are_encoded_once(pair, policy):
    """Twins, whenever they come, and what is below them: as many tokens as one of each."""
    pair.bind(policy)
    counts = []
    for twins in (1, 3):
        tree = written(policy, "Step 2: multiply", [3])
        above = tree.nodes[1]
        ids = policy.tokenizer(" five by four")["input_ids"]
        pair.score_nodes([above])
        made = [tree.add(above, ids) for _ in range(twins)]
        pair.score_nodes(made)
        late = [tree.add(above, ids) for _ in range(twins - 1)]
        pair.score_nodes(late)
        below = [tree.add(node, policy.tokenizer(".")["input_ids"]) for node in [*made, *late]]
        pair.score_nodes(below)
        assert len({node.token_rewards.tobytes() for node in [*made, *late]}) == 1
        assert len({(node.reward, node.q) for node in below}) == 1
        pair.score_nodes(tree.nodes)
        check(pair, policy, "What is it?", tree)
        counts.append([tree.meter.counts[kind, lm.id] for kind in ("encoded", "reencoded") for lm in pair._lms()])
        pair.release(tree)
        assert pair.prm.tree.used == pair.reference.tree.used == 0
    assert counts[0] == counts[1]


def test_a_refused_path_leaves_nothing_behind(pair, policy):
    pair.bind(policy)
    tree = written(policy, "Step 2: multiply", [3])
    pair.score_nodes(tree.nodes)
    used = pair.prm.tree.used
    far = tree.add(tree.nodes[-1], policy.tokenizer("five " * 1000)["input_ids"])
    twin = tree.add(tree.nodes[1], [20])
    with pytest.raises(ValueError, match="context"):
        pair.score_nodes([twin, far])
    assert pair.prm.tree.used == used
    pair.score_nodes([twin])
    q, _ = rescored(pair, policy, "What is it?", twin)
    assert twin.q == pytest.approx(q, abs=2e-3)
    pair.release(tree)
    assert pair.prm.tree.used == 0


def test_eviction_changes_nothing(policy):
    words = OTHERS["byte level"]()
    roomy = ImplicitPRM(llama(2, vocab=448), llama(3, vocab=448), tokenizer=words, beta=BETA)
    tight = ImplicitPRM(llama(2, vocab=448), llama(3, vocab=448), tokenizer=words, beta=BETA, capacity=48)
    qs = []
    for pair in (roomy, tight):
        tree = written(policy, "Step 2: multiply five by four. Step 1: add two and three.", [3, 7, 9])
        chain = list(tree.nodes[1:])
        pair.bind(policy)
        pair.score_nodes(tree.nodes)
        for rest in ("first add", "hence we", "so"):
            for node in [*chain, *tree.nodes[-4:]]:  # back and forth over the tree
                pair.score_nodes([tree.add(node, policy.tokenizer(rest)["input_ids"])])
        qs.append([node.q for node in tree.nodes])
        pair.release(tree)
    assert tree.meter.counts["reencoded", tight.prm.id] > 20
    np.testing.assert_allclose(qs[0], qs[1], atol=1e-4)


def test_a_node_without_text_adds_nothing(pair, policy):
    whole = [*policy.tokenizer("It is")["input_ids"], *policy.tokenizer.convert_tokens_to_ids(["Ã", "¼"])]
    assert policy.token_text.piece(whole[-1]) == "ü".encode()[1:]
    tree = SearchTree(Prompt(text="a"))
    tree.prompt = tree.prompt.with_ids(policy.encode(tree.prompt))
    first = tree.add(tree.root, whole[:-2])
    half = tree.add(first, whole[-2:-1])
    full = tree.add(half, whole[-1:])
    pair.bind(policy)
    pair.score_nodes([full])
    assert half.reward == 0.0
    assert half.token_rewards.shape == (0,)
    assert full.q == pytest.approx(rescored(pair, policy, "a", full)[0], abs=1e-3)
    pair.release(tree)
    assert pair.prm.tree.used == 0


def test_complete_responses_are_the_pairs_own_whatever_policy_it_met(pair, policy):
    """score() takes the pair's prompts and ids; a bound policy changes nothing."""
    ids = encode_text(pair.tokenizer, "Step 1: add")
    fresh = ImplicitPRM(pair.prm, pair.reference, tokenizer=pair.tokenizer, beta=BETA)
    pair.bind(policy)
    for prompt in (MESSAGES, [5, 6, 7]):
        (bound,), (free,) = pair.score([prompt], [ids]), fresh.score([prompt], [ids])
        np.testing.assert_array_equal(bound.token_rewards, free.token_rewards)


def test_token_ids_alone_are_refused(pair, policy):
    with pytest.raises(ValueError, match=r"Prompt\(text=...\).*PRMGuidance\(prompts=...\)"):
        search([[5, 6, 7]], policy=policy, scorer=pair, strategy=BestOfN(2), steps=RULE, max_new_tokens=4)


def test_rewards_and_ids_survive_json(pair, policy):
    tree = written(policy, "Step 1: add", [2])
    pair.bind(policy)
    pair.score_nodes(tree.nodes)
    copy = SearchTree.from_json(tree.to_json())
    for a, b in zip(tree.nodes[1:], copy.nodes[1:], strict=True):
        assert a.reward_ids == b.reward_ids
        assert a.q == b.q
    pair.release(tree)


def test_a_constant_reference_in_the_pairs_own_tokens(policy):
    words = OTHERS["metaspace"]()
    model = llama(2, vocab=448)
    raw = ImplicitPRM(model, ConstantReference(0.0), tokenizer=words, beta=1.0)
    free = ImplicitPRM(model, ConstantReference(-2.0), tokenizer=words, beta=1.0)
    qs = []
    for pair in (raw, free):
        tree = written(policy, "Step 1: add", [2])
        pair.bind(policy)
        pair.score_nodes(tree.nodes)
        qs.append(tree.nodes[-1].q)
        pair.release(tree)
    tokens = len(encode_text(words, "Step 1: add"))
    assert qs[1] == pytest.approx(qs[0] + 2 * tokens, abs=1e-3)


def test_failing_leaves_nothing_behind(policy):
    words = OTHERS["byte level"]()
    pair = ImplicitPRM(llama(2, vocab=448), llama(3, vocab=300), tokenizer=words, beta=BETA)  # too few rows
    tree = written(policy, "Therefore the result equals twelve", [3])
    pair.bind(policy)
    with pytest.raises(ValueError, match="vocabulary of 300"):
        pair.score_nodes(tree.nodes)
    assert not any(node.scored_by("prm") for node in tree.nodes[1:])
    pair.release(tree)
    assert pair.prm.tree.used == pair.reference.tree.used == 0


def test_fit():
    words = byte_tokenizer()
    assert TokenizerMatch.of(words, words) == TokenizerMatch(True, True)
    assert TokenizerMatch.of(words, byte_tokenizer()) == TokenizerMatch(True, True)
    assert TokenizerMatch.of(words, byte_tokenizer(template=PLAIN_CHAT)) == TokenizerMatch(True, False)
    assert TokenizerMatch.of(byte_tokenizer(template=None), words) == TokenizerMatch(True, True)
    assert TokenizerMatch.of(words, byte_tokenizer(size=300)) == TokenizerMatch(False, False)
    assert TokenizerMatch.of(words, metaspace_tokenizer()) == TokenizerMatch(False, False)


@pytest.mark.parametrize("text", ["Step 1: add", " Step", "  two", "\n\nStep", "naïve", "", " ", "x"])
@pytest.mark.parametrize("kind", [byte_tokenizer, metaspace_tokenizer])
def test_a_response_is_spelt_as_it_goes_on(kind, text):
    words = kind()
    piece = TokenText(words).piece
    assert b"".join(map(piece, encode_text(words, text))).decode() == text
