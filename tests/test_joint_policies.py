"""DraftPolicy and PolicyPool: two models in one search, each counted, under every strategy."""

from __future__ import annotations

from typing import Any

import hf_models as hf
import numpy as np
import pytest
from exact import exact
from fakes import RULE, Child, Clock, FakePolicy, FakeScorer, ScriptedPolicy, ToyLM, step_scores
from hypothesis import given, settings, strategies as st
from pairs import naive_rewards
from search_cases import ALL, LETTERS, SEEDS, drawn_paths, facts
from soak import examples

import prm_search as ps
from prm_search.driver.loop import SearchLoop
from prm_search.policy import RequestFailed
from prm_search.search import SearchSettings
from prm_search.strategies import AdaptiveBranch, Beam, BestOfN, Steer, Strategy
from prm_search.tree import Node, SearchTree

SMALL, LARGE = ToyLM(seed=11), ToyLM(seed=12)


def draft(accept: float, **options: Any) -> ps.DraftPolicy:
    small, large = FakePolicy(SMALL, id="small", **options), FakePolicy(LARGE, id="large", **options)
    return ps.DraftPolicy(small, large, FakeScorer(), accept)


def look(policy: Any, strategy: Any, **options: Any) -> ps.Result:
    options = {"scorer": FakeScorer(), "steps": RULE, "max_new_tokens": 12, **options}
    (result,) = ps.search([[5]], policy=policy, strategy=strategy, **options)
    return result


def outcome(result: ps.Result) -> Any:
    ends = [(node.path_ids(), node.value, node.count, node.finish) for node in result.candidates]
    return result.token_ids, result.value, result.stopped, drawn_paths(result.tree), ends


@settings(max_examples=examples(60))
@given(strategy=ALL, seed=SEEDS)
def test_a_draft_that_always_or_never_stands_is_one_models_search(strategy: Strategy, seed: int) -> None:
    always, alone = draft(-np.inf), FakePolicy(SMALL, id="small")
    if not isinstance(strategy, Steer):  # whose requests draw nothing, and are the target's
        found, wanted = look(always, strategy, seed=seed), look(alone, strategy, seed=seed)
        assert outcome(found) == outcome(wanted)
        assert found.usage.sampled_tokens["draft"] == wanted.usage.sampled_tokens["policy"]
        assert "policy" not in found.usage.sampled_tokens
        assert not always.rejected
    never, alone = draft(np.inf), FakePolicy(LARGE, id="large")
    found, wanted = look(never, strategy, seed=seed), look(alone, strategy, seed=seed)
    assert outcome(found) == outcome(wanted)
    assert found.usage.sampled_tokens["policy"] == wanted.usage.sampled_tokens["policy"]
    assert [node.index for node in found.tree] == list(range(len(found.tree.nodes)))
    assert not never.accepted


@settings(max_examples=examples(60))
@given(strategy=ALL, seed=SEEDS, tokens=st.integers(1, 60), accept=st.sampled_from([-0.2, 0.3, np.inf]))
def test_a_token_budget_holds_for_both_together(strategy: Strategy, seed: int, tokens: int, accept: float) -> None:
    result = look(draft(accept), strategy, seed=seed, budget=tokens)
    assert sum(result.usage.sampled_tokens.values()) <= tokens
    assert all(node.finished for node in result.candidates)


@settings(max_examples=examples(60))
@given(strategy=ALL, seed=SEEDS, rows=st.integers(1, 3), order=st.booleans(), accept=st.sampled_from([-0.2, 0.1]))
def test_batches_change_nothing(strategy: Strategy, seed: int, rows: int, order: bool, accept: float) -> None:
    def turned(children: list[Child]) -> list[Child]:
        return children[::-1] if order else children

    free = look(draft(accept), strategy, seed=seed)
    assert facts(look(draft(accept, rows=rows, order=turned), strategy, seed=seed)) == facts(free)


def test_the_target_writes_what_the_scorer_is_not_content_with() -> None:
    policy = draft(0.5)
    result = look(policy, BestOfN(8), max_new_tokens=20)
    steps = result.tree.nodes[1:]
    small, large = ([node for node in steps if node.sampler == name] for name in ("small", "large"))
    assert small
    assert large
    assert all(node.reward >= 0.5 for node in small)
    for node in large:  # the draft's own step there, from the same numbers, is worth less
        assert node.parent is not None
        tree = SearchTree(ps.Prompt(token_ids=(5,)))
        above = tree.root
        for part in node.parent.path():
            above = tree.add(above, part.token_ids, text=part.text)
        above.lineages = node.lineages[:1]
        how = SearchSettings.make(steps=RULE, max_new_tokens=20).sampling
        ((proposal,),) = FakePolicy(SMALL).expand([above], 1, sampling=how)
        scorer = FakeScorer()
        scorer.score_nodes([proposal])
        assert proposal.reward < 0.5
    assert (policy.accepted, policy.rejected) == (sum(n.count for n in small), sum(n.count for n in large))
    drawn = {role: result.usage.sampled_tokens[role] for role in ("policy", "draft")}
    assert drawn["policy"] == sum(len(node.token_ids) * node.count for node in large)
    assert drawn["draft"] > sum(len(node.token_ids) * node.count for node in small)  # the rejected ones too


def test_value_says_what_is_asked_of_a_proposal() -> None:
    small, large = FakePolicy(SMALL, id="small"), FakePolicy(LARGE, id="large")
    policy = ps.DraftPolicy(small, large, FakeScorer(), 0.0, value="q")
    result = look(policy, BestOfN(8), max_new_tokens=20)
    assert all(node.q >= 0 for node in result.tree.nodes[1:] if node.sampler == "small")
    assert any(node.reward < 0 for node in result.tree.nodes[1:] if node.sampler == "small")


@pytest.mark.parametrize("forward", range(12))
def test_time_that_is_up_keeps_what_was_drawn(forward: int) -> None:
    policy, clock = draft(0.2), Clock()
    settings_ = SearchSettings.make(strategy=BestOfN(4), steps=RULE, max_new_tokens=12, budget=ps.Budget(seconds=0.5))
    with SearchLoop(policy, FakeScorer(), clock=clock) as loop:
        loop.add(ps.Prompt(token_ids=(5,)), settings_)
        results: list[ps.Result] = []
        for step in range(100):
            clock.now = float(step >= forward)
            results += loop.step()
            if results:
                break
    (result,) = results
    assert result.stopped == "seconds" or all(end.finish != "budget" for end in result.candidates)
    assert all(end.finished and end.value is not None for end in result.candidates)
    for part in policy.parts.values():
        assert not part._policy.requests  # type: ignore[attr-defined]
        assert not part._policy.trees  # type: ignore[attr-defined]


class Failing(FakePolicy):
    """Gives its first request up."""

    def failures(self) -> list[tuple[Any, RequestFailed]]:
        given_up = list(self.requests)[:1] if self.forward_calls == 2 else []
        return [(request, RequestFailed("no answer")) for request in given_up]


@pytest.mark.parametrize("fails", ["draft", "target", "pool"])
def test_a_request_that_is_given_up_ends_its_search(fails: str) -> None:
    small, large = FakePolicy(SMALL, id="small"), FakePolicy(LARGE, id="large")
    if fails == "draft":
        policy: Any = ps.DraftPolicy(Failing(SMALL, id="small"), large, FakeScorer(), 0.0)
    elif fails == "target":
        policy = ps.DraftPolicy(small, Failing(LARGE, id="large"), FakeScorer(), np.inf)
    else:
        policy = ps.PolicyPool({"a": Failing(SMALL, id="small"), "b": large})
    result = look(policy, BestOfN(3))
    assert result.stopped == "failed"
    assert "no answer" in result.tree.notes[0]
    for part in policy.parts.values():
        assert not part._policy.requests


def test_an_error_and_a_cancelled_search_leave_nothing() -> None:
    policy = draft(0.2)
    policy.scorer.scorer.fail_at = 2  # type: ignore[attr-defined]
    with pytest.raises(RuntimeError, match="the scorer failed"):
        look(policy, BestOfN(4))
    for part in policy.parts.values():
        assert not part._policy.trees  # type: ignore[attr-defined]
    policy = draft(0.2)
    with SearchLoop(policy, FakeScorer()) as loop:
        tree = loop.add(ps.Prompt(token_ids=(5,)), SearchSettings.make(strategy=BestOfN(4), steps=RULE))
        loop.step()
        assert loop.cancel(tree) is not None
    for part in policy.parts.values():
        assert not part._policy.requests  # type: ignore[attr-defined]


# --- over models ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return hf.tokenizer()


@pytest.fixture(scope="module")
def models() -> tuple[Any, Any, Any]:
    large = exact(hf.llama(0))
    return large, exact(hf.llama(5)), hf.near(large, 1, 0.1)


def check_rewards(result: ps.Result, models: Any, beta: float = 0.1) -> None:
    """Every node has the rewards that plain forwards give, whichever model drew it."""
    large, _, trained = models
    for node in result.tree.nodes[1:]:
        if not node.children:
            rewards = naive_rewards(trained, large, list(result.tree.prompt_ids), node.path_ids(), beta)
            got = np.concatenate([part.token_rewards for part in node.path()])
            np.testing.assert_allclose(got, rewards, atol=1e-6)


def test_a_pair_scores_each_proposal_once_and_knows_whose_numbers_it_reads(models: Any, tokenizer: Any) -> None:
    """The reference is the target: its own steps' half is free, the draft's steps it has to read."""
    large, small, trained = models
    pair = ps.ImplicitPRM(trained, large, tokenizer=tokenizer, beta=0.1)
    policy = ps.DraftPolicy(ps.HFPolicy(small, tokenizer), ps.HFPolicy(large, tokenizer), pair, accept=0.0)
    (result,) = ps.search(
        [[4, 9, 30]], policy=policy, scorer=pair, strategy=Beam(2, 2), steps=hf.STEPS, max_new_tokens=12,
        temperature=1.0,
    )  # fmt: skip
    assert policy.accepted
    assert policy.rejected
    ids = {node.sampler for node in result.tree.nodes[1:]}
    assert ids == {policy.id, policy.draft.id}
    assert set(result.usage.sampled_tokens) == {"policy", "draft"}
    check_rewards(result, models)
    drawn = sum(result.usage.sampled_tokens.values())
    assert result.usage.encoded_tokens["prm"] <= 3 + drawn  # accepted, rejected and written ones: once each


def test_two_models_share_one_search(models: Any, tokenizer: Any) -> None:
    large, small, trained = models
    pair = ps.ImplicitPRM(trained, large, tokenizer=tokenizer, beta=0.1)
    pool = ps.PolicyPool({"large": ps.HFPolicy(large, tokenizer), "small": ps.HFPolicy(small, tokenizer)})
    (result,) = ps.search(
        [[4, 9, 30]], policy=pool, scorer=pair, strategy=AdaptiveBranch(draws=12, policies=("large", "small")),
        steps=hf.STEPS, max_new_tokens=8, temperature=1.0,
    )  # fmt: skip
    by_model = {role: result.usage.sampled_tokens[role] for role in ("policy", "small")}
    for role, name in (("policy", "large"), ("small", "small")):
        nodes = [node for node in result.tree.nodes[1:] if node.sampler == pool.parts[name].id]
        assert nodes
        assert by_model[role] == sum(len(node.token_ids) for node in nodes)
    check_rewards(result, models)


# --- pools over fakes -------------------------------------------------------------------------------------------------


@settings(max_examples=examples(40))
@given(seed=SEEDS, draws=st.integers(1, 10), until=st.sampled_from(["end", "step"]), batch=st.integers(1, 3))
def test_a_pool_of_one_is_its_policy(seed: int, draws: int, until: Any, batch: int) -> None:
    strategy = AdaptiveBranch(draws, until=until, batch=batch)
    plain = look(FakePolicy(SMALL, id="small"), strategy, seed=seed)
    pool = ps.PolicyPool({"only": FakePolicy(SMALL, id="small")})
    assert facts(look(pool, strategy, seed=seed)) == facts(plain)
    named = AdaptiveBranch(draws, until=until, batch=batch, policies=("only",))
    assert facts(look(pool, named, seed=seed)) == facts(plain)


@settings(max_examples=examples(40))
@given(
    seed=SEEDS, draws=st.integers(1, 10), until=st.sampled_from(["end", "step"]), tokens=st.none() | st.integers(1, 60),
    rows=st.none() | st.integers(1, 2), prior=st.sampled_from(["gaussian", "beta"]),
)  # fmt: skip
def test_pools_keep_budgets_and_do_not_depend_on_batches(
    seed: int, draws: int, until: Any, tokens: int | None, rows: int | None, prior: Any
) -> None:
    def pool(rows: int | None) -> ps.PolicyPool:
        return ps.PolicyPool({"a": FakePolicy(SMALL, id="a", rows=rows), "b": FakePolicy(LARGE, id="b", rows=rows)})

    strategy = AdaptiveBranch(draws, prior, until, policies=("a", "b"))
    result = look(pool(rows), strategy, seed=seed, budget=tokens)
    assert facts(result) == facts(look(pool(None), strategy, seed=seed, budget=tokens))
    assert sum(result.usage.sampled_tokens.values()) <= (tokens or 10**6)
    assert result.candidates or tokens == 1


def test_the_better_model_draws_more() -> None:
    good, bad = (ScriptedPolicy({"": [f"{letter}."]}) for letter in "da")
    good.id, bad.id = "good", "bad"  # type: ignore[misc]
    pool = ps.PolicyPool({"bad": bad, "good": good})
    result = look(
        pool,
        AdaptiveBranch(draws=40, policies=["bad", "good"]),
        scorer=FakeScorer(step_scores(LETTERS)),  # type: ignore[arg-type]
    )
    drawn = {name: sum(node.sampler == name for node in result.tree.nodes[1:]) for name in ("good", "bad")}
    assert drawn["good"] + drawn["bad"] == 40
    assert drawn["good"] > 2 * drawn["bad"] > 0


def test_what_makes_no_sense_is_refused() -> None:
    small, large = FakePolicy(SMALL, id="small"), FakePolicy(LARGE, id="large")
    pool = ps.PolicyPool({"a": small, "b": large})
    assert pool.names == ("a", "b")
    for policy in (pool, small):
        with pytest.raises(
            ValueError, match="policies='c': the search's policy is no PolicyPool with one of that name"
        ):
            look(policy, AdaptiveBranch(policies=("c",)))

    class Wrong:
        def run(self, root: Node) -> Any:
            return (yield ps.Expand([root], 1, until="end", policy="c"))

    with pytest.raises(ValueError, match="policy='c' is none of this pool, which has a, b"):
        look(pool, Wrong())
    for wrong, error, message in (
        ("ab", TypeError, "policies='ab': a list of names"), ((1,), TypeError, "a list of names"),
        (("a", "a"), ValueError, "each name once"),
    ):  # fmt: skip
        with pytest.raises(error, match=message):
            AdaptiveBranch(policies=wrong)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="policies must be a mapping"):
        ps.PolicyPool([small])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="at least one"):
        ps.PolicyPool({})
    with pytest.raises(ValueError, match="a and b are one model"):
        ps.PolicyPool({"a": small, "b": small})
    with pytest.raises(TypeError, match="draft"):
        ps.DraftPolicy(object(), large, FakeScorer())  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="scorer"):
        ps.DraftPolicy(small, large, object())  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="accept=nan"):
        ps.DraftPolicy(small, large, FakeScorer(), float("nan"))
    with pytest.raises(ValueError, match="value='best'"):
        ps.DraftPolicy(small, large, FakeScorer(), value="best")


def test_a_node_is_discarded_and_the_rest_moves_up() -> None:
    tree = SearchTree("?")
    first, second = tree.add(tree.root, [1]), tree.add(tree.root, [2])
    third = tree.add(second, [3])
    tree.discard(first)
    assert [(node, node.index) for node in tree] == [(tree.root, 0), (second, 1), (third, 2)]
    assert tree.root.children == [second]
    assert SearchTree.from_json(tree.to_json()).nodes[2].path_ids() == [2, 3]
    for wrong in (tree.root, second, first):
        with pytest.raises(ValueError, match="cannot be discarded"):
            tree.discard(wrong)
