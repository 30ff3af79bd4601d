"""What a search may cost, in counts: tokens encoded, bytes copied. Times are benchmarks; these are promises."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, PreTrainedTokenizerFast

import prm_search as ps
from prm_search.engine.language_model import LanguageModel
from prm_search.engine.pool import KVPool
from prm_search.strategies import MCTS, AdaptiveBranch, Expand, ParticleFilter, Rebase

VOCAB, EOS = 24, 1


def tiny(seed: int, config=None):
    torch.manual_seed(seed)
    config = config or LlamaConfig(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, eos_token_id=EOS, max_position_embeddings=512,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.3)
    return model


@pytest.fixture(scope="module")
def tokenizer():
    backend = Tokenizer(models.WordLevel({(";" if i == 2 else f"<{i}>"): i for i in range(VOCAB)}, unk_token="<0>"))
    backend.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<1>")


def counts(tree, model_id) -> dict[str, int]:
    return {kind: n for (kind, key), n in tree.meter.counts.items() if key == model_id}


@dataclass(frozen=True)
class OneByOne:
    """Children of the root, drawn by a request each: one after the other, or all at once."""

    n: int = 16
    at_once: bool = False

    def run(self, root):
        children = []
        for _ in range(1 if self.at_once else self.n):
            children += yield Expand([root], self.n if self.at_once else 1)
        grown = []
        for child in dict.fromkeys(children):
            if not child.finished:
                grown += yield Expand([child], until="end")
        return [*grown, *(child for child in children if child.finished)]


def distinct(tree) -> int:
    """Tokens of a tree, steps with the same path counted once."""
    return sum(len(path[-1]) for path in {tuple(step.token_ids for step in node.path()) for node in tree.nodes[1:]})


STRATEGIES = [
    ps.BestOfN(6), ps.Beam(3, 3), ps.Beam(3, 3, merge=False), ps.Lookahead(2, 2, 1, 2), ps.DVTS(2, 1, 3),
    MCTS(simulations=12, expansions=2), MCTS(simulations=12, expansions=2, rollout_steps=1, leaves=3, merge=False),
    ParticleFilter(particles=6, sweeps=2), Rebase(width=6), AdaptiveBranch(draws=12), OneByOne(),
]  # fmt: skip


@pytest.mark.parametrize("strategy", STRATEGIES, ids=lambda strategy: type(strategy).__name__)
@pytest.mark.parametrize("shared", [True, False], ids=["reference is the policy", "reference apart"])
def test_every_token_is_encoded_once_a_model(tokenizer, strategy, shared):
    """Also where requests of different times drew the same step: nodes are two, their tokens are encoded once."""
    policy = ps.HFPolicy(tiny(0), tokenizer, max_rows=5)
    pair = ps.ImplicitPRM(tiny(1), policy if shared else tiny(2))
    prompts = [[3, 4, 5, 6], [7, 8], [3, 4, 5, 6]]
    results = ps.search(
        prompts, policy=policy, scorer=pair, strategy=strategy, steps=ps.StepRule(delimiter=";", max_tokens=6),
        max_new_tokens=20, seed=5,
    )  # fmt: skip
    for prompt, result in zip(prompts, results, strict=True):
        tree = result.tree
        total = len(prompt) + distinct(tree)
        assert counts(tree, pair.prm.id) == {"encoded": total, **cached(tree, pair.prm.id)}
        assert result.usage.encoded_tokens["prm"] == total
        assert not any(result.usage.reencoded_tokens.values())
        mine = counts(tree, policy.id)
        sampled = sum(len(node.token_ids) * node.count for node in tree.nodes)
        assert mine["sampled"] == result.usage.sampled_tokens["policy"] == sampled
        twins = total - len(prompt) < sum(len(node.token_ids) for node in tree.nodes)
        if not twins and not any(node.count > 1 for node in tree.nodes):  # duplicates are decoded apart
            leaves = sum(1 for node in tree.nodes[1:] if not node.children)
            assert mine["encoded"] == total - leaves  # a leaf's last token is drawn, never read
        if shared:
            assert result.usage.encoded_tokens.get("reference", 0) == 0
        else:
            assert result.usage.encoded_tokens["reference"] == total
    for lm in (policy.lm, pair.prm):
        assert lm.tree.used == 0


@pytest.mark.parametrize("reference", ["apart", "the policy"])
def test_children_drawn_one_by_one_cost_what_they_cost_at_once(tokenizer, reference):
    """16 requests for one child of the root, and one for 16: the same children, the same tokens in every model."""
    found = []
    for at_once in (True, False):
        policy = ps.HFPolicy(tiny(0), tokenizer)
        pair = ps.ImplicitPRM(tiny(1), policy if reference == "the policy" else tiny(2))
        (result,) = ps.search(
            [[3, 4, 5, 6]], policy=policy, scorer=pair, strategy=OneByOne(16, at_once),
            steps=ps.StepRule(delimiter=";", max_tokens=2), max_new_tokens=4, temperature=0.5, seed=5,
        )  # fmt: skip
        tree = result.tree
        first = [node for node in tree.nodes[1:] if node.depth == 1]
        assert len({node.token_ids for node in first}) < 16  # some are equal
        assert at_once or len(first) == 16  # and yet nodes of their own
        by_tokens = {node.token_ids: node for node in first}
        assert all(np.array_equal(node.token_rewards, by_tokens[node.token_ids].token_rewards) for node in first)
        scored = {role: n for role, n in result.usage.encoded_tokens.items() if role != "policy"}
        assert scored["prm"] == 4 + distinct(tree)
        deeper = distinct(tree) - sum(map(len, by_tokens))  # 16 nodes go on each in its own way, merged ones in one
        found.append((sorted(by_tokens), scored["prm"] - deeper))
    assert found[0] == found[1]


def test_the_policys_half_of_twins_is_one_too(tokenizer):
    """Below two equal nodes the policy goes on from one KV: their last token is read once."""
    policy = ps.HFPolicy(tiny(0), tokenizer)
    tree = ps.SearchTree(ps.Prompt(token_ids=[3, 4, 5]))
    one, other = tree.add(tree.root, [6, 7, 8]), tree.add(tree.root, [6, 7, 8])
    sampling = ps.Sampling(steps=ps.StepRule(max_tokens=1))
    policy.expand([one], 1, sampling=sampling)
    before = counts(tree, policy.id)["encoded"]
    assert before == 6
    policy.expand([other], 1, sampling=sampling)
    assert counts(tree, policy.id)["encoded"] == before
    assert policy.lm.memo(tree).branch(one) is policy.lm.memo(tree).branch(other)
    policy.release(tree)
    assert policy.lm.tree.used == 0


def cached(tree, model_id) -> dict[str, int]:
    found = counts(tree, model_id)
    return {"cached": found["cached"]} if "cached" in found else {}


def test_a_fork_copies_nothing_and_each_token_is_written_once(monkeypatch):
    lm = LanguageModel.of(tiny(3))
    written = []
    write = KVPool.write

    def counting(pool, layer, slots, keys, values, *rest):
        assert len(slots) == len(keys) == len(values)
        written.append(sum(t.numel() * t.element_size() for t in (keys, values)))
        return write(pool, layer, slots, keys, values, *rest)

    monkeypatch.setattr(KVPool, "write", counting)
    root = lm.tree.root([3, 4, 5])
    lm.extend([root], [[]], want=None)
    branches, tokens = [root], 3
    for _ in range(3):
        before = sum(written)
        branches = [lm.tree.fork(branch) for branch in branches for _ in range(3)]
        assert sum(written) == before
        lm.extend(branches, [[6, 7]] * len(branches))
        tokens += 2 * len(branches)
    per_token = 2 * 2 * 2 * 8 * 4  # layers, K and V, heads, head size, bytes
    assert sum(written) == tokens * per_token
    assert lm.tree.used == tokens


def test_eviction_changes_no_reward_and_no_token(tokenizer):
    """The same search with room for everything, and with room for little more than one path.

    GPT-2 in float64: Llama's norms round to fp32 inside, which would make the last bits depend on the batch.
    """
    found, config = [], GPT2Config(vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=4, n_positions=512, eos_token_id=EOS)
    for capacity in (None, 64):
        policy = ps.HFPolicy(tiny(0, config).double(), tokenizer, capacity=capacity)
        pair = ps.ImplicitPRM(tiny(1, config).double(), tiny(2, config).double(), capacity=capacity)
        results = ps.search(
            [[3, 4, 5, 6], [7, 8]], policy=policy, scorer=pair, strategy=ps.Beam(3, 3),
            steps=ps.StepRule(delimiter=";", max_tokens=6), max_new_tokens=20, seed=5,
        )  # fmt: skip
        again = sum(result.usage.reencoded_tokens.get("prm", 0) for result in results)
        assert (again > 0) == (capacity is not None)
        for result in results:  # its nodes stand in the order in which their requests were answered
            nodes = {tuple(node.path_ids()): node.token_rewards.tolist() for node in result.tree.nodes}
            found.append((result.token_ids, nodes))
    assert found[:2] == found[2:]
