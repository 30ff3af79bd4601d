"""What fails while a search is under way: models that compute nonsense, interrupts, callbacks. It is said, and nothing
is left behind: no KV, no half of a request, no change to the models."""

from __future__ import annotations

import math
from typing import Any

import benches
import pytest
import torch
from benches import TOKENIZER, Bench
from hf_models import VOCAB, llama, near

import prm_search as ps

_shared, bench, own = benches.FIXTURES
NAN, INF = math.nan, math.inf

# -- models that went wrong -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("strategy", [ps.Beam(2, 2), ps.BestOfN(3), ps.Lookahead(2, 2)], ids=["beam", "bon", "look"])
def test_a_policy_that_computes_nan(own: Bench, strategy: Any, temperature: float) -> None:
    with torch.no_grad():
        own.model.lm_head.weight[7] = NAN
    for scorer in (None, own.pair):
        with pytest.raises(ValueError, match="gives probabilities that are not numbers: its weights hold NaN or inf"):
            own.search(strategy=strategy, temperature=temperature, scorer=scorer)


def test_a_prm_that_computes_nan(own: Bench) -> None:
    with torch.no_grad():
        own.trained.model.layers[1].mlp.down_proj.weight[0, 0] = INF
    for strategy in (ps.Beam(2, 2), ps.BestOfN(2), ps.Steer(1.0)):
        with pytest.raises(ValueError, match="gives probabilities that are not numbers"):
            own.search(strategy=strategy)
    with pytest.raises(ValueError, match="gives probabilities that are not numbers"):
        own.pair.score(["a"], ["b"])
    with torch.no_grad():
        own.trained.model.layers[1].mlp.down_proj.weight[0, 0] = 0.0
    assert math.isfinite(own.pair.score(["a"], ["b"])[0].reward)


def test_nan_from_the_start_is_not_admitted() -> None:
    model = llama(0)
    with torch.no_grad():
        model.model.norm.weight[:] = NAN
    with pytest.raises(ValueError, match=r"LlamaForCausalLM.* is not supported"):
        ps.HFPolicy(model, TOKENIZER)


def forbid(model: Any, low: int) -> Any:
    """The model, with every token from `low` on impossible."""
    head = torch.nn.Linear(32, VOCAB, dtype=model.dtype)
    with torch.no_grad():
        head.weight.copy_(model.lm_head.weight)
        head.bias.zero_()
    model.lm_head = head
    ps.HFPolicy(model, TOKENIZER)  # admitted as it is now
    with torch.no_grad():
        head.bias[low:] = -INF
    return model


def test_infinite_rewards(own: Bench) -> None:
    """A token that the PRM holds impossible costs everything; one that both do has no reward at all."""
    pair = ps.ImplicitPRM(forbid(near(own.model, 2), 100), own.model, tokenizer=TOKENIZER)
    for strategy in (ps.Beam(2, 2), ps.BestOfN(4), ps.Lookahead(2, 2), ps.DVTS(2, 1, 2)):
        for select in ("best", "majority", "weighted"):
            result = own.search(["q"], scorer=pair, strategy=strategy, select=select)[0]
            assert result.value == -INF
            assert result.node is not None
            bad = [node for node in result.tree.nodes[1:] if max(node.token_ids) >= 100]
            assert bad
            assert all(node.q == -INF for node in bad)
            again = ps.SearchTree.from_json(result.tree.to_json())
            assert [node.q for node in again.nodes] == [node.q for node in result.tree.nodes]
    assert pair.score(["a"], [[5, 6]])[0].reward > -INF == pair.score(["a"], [[5, 200]])[0].reward
    with pytest.warns(UserWarning, match="same weights"):
        same = ps.ImplicitPRM(pair.prm, pair.prm, tokenizer=TOKENIZER)
    with pytest.raises(ValueError, match="token 200 has no reward: its log-probability is -inf under model and ref"):
        same.score(["a"], [[5, 200]])
    assert pair.prm.tree.used == 0


@pytest.mark.parametrize("part", ["model", "trained"])
def test_training_mode(own: Bench, part: str) -> None:
    getattr(own, part).train()
    with pytest.raises(ValueError, match=r"LlamaForCausalLM#.* is in training mode.*call \.eval\(\)"):
        own.search()
    with pytest.raises(ValueError, match=r"in training mode.*call \.eval\(\)"):
        own.pair.score(["a"], ["b"])
    assert getattr(own, part).training
    getattr(own, part).eval()
    assert own.search()[0].candidates


# -- errors under way -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("part", ["policy", "scorer"])
@pytest.mark.parametrize("strategy", [ps.Beam(2, 2), ps.Steer(1.0, n=3)], ids=["beam", "steer"])
def test_an_interrupt_in_a_forward(own: Bench, strategy: Any, part: str) -> None:
    inputs = TOKENIZER(["hi"], return_tensors="pt")
    plain = own.model.generate(**inputs, max_new_tokens=6, do_sample=False, output_logits=True,
                               return_dict_in_generate=True)  # fmt: skip
    before = own.search(strategy=strategy)
    lm = own.policy.lm if part == "policy" else own.pair.prm
    calls = iter(range(1000))

    def interrupted(*_: object) -> None:
        if next(calls) == 1:
            raise KeyboardInterrupt

    layer = lm.module.model.layers[1]
    for hook in (layer.register_forward_pre_hook, layer.self_attn.register_forward_hook):
        calls = iter(range(1000))
        handle = hook(interrupted)
        with pytest.raises(KeyboardInterrupt):
            own.search(strategy=strategy)
        handle.remove()
        assert own.used == 0
    again = own.model.generate(**inputs, max_new_tokens=6, do_sample=False, output_logits=True,
                               return_dict_in_generate=True)  # fmt: skip
    assert all(torch.equal(a, b) for a, b in zip(plain.logits, again.logits, strict=True))
    assert [r.token_ids for r in own.search(strategy=strategy)] == [r.token_ids for r in before]


def test_a_callback_that_raises(bench: Bench) -> None:
    seen = []

    def on_event(event: Any) -> None:
        seen.append(event.kind)
        if len(seen) == 2:
            raise RuntimeError("the callback failed")

    with pytest.raises(RuntimeError, match="the callback failed"):
        bench.search(on_event=on_event)
    with pytest.raises(ValueError, match=r"value: <Node .* was given NaN"):
        bench.search(value=lambda node: NAN)
    with pytest.raises(ZeroDivisionError):
        bench.search(select="majority", answer=lambda text: 1 / 0)


# -- models that change between two searches --------------------------------------------------------------------------


def test_a_head_that_was_exchanged(own: Bench) -> None:
    own.search()
    own.model.resize_token_embeddings(VOCAB + 5, mean_resizing=False)
    with torch.no_grad():
        own.model.lm_head.weight.normal_(0, 0.3)
    tree = own.search(["hi"], scorer=None)[0].tree
    leaf = next(node for node in tree.nodes if not node.children)
    ids = torch.tensor([[*tree.prompt_ids, *leaf.path_ids()]])
    rows = torch.log_softmax(own.model(ids).logits[0, :-1], dim=-1)
    plain = rows.gather(1, ids[0, 1:, None])[len(tree.prompt_ids) - 1 :, 0].tolist()
    ours = [value for node in leaf.path() for value in node.logprobs]  # type: ignore[union-attr]
    assert ours == pytest.approx(plain, abs=1e-4)
    assert own.search([[VOCAB + 4]], scorer=None)[0].candidates
