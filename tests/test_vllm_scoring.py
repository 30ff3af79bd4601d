"""VLLMImplicitPRM on fake engines: rewards, what is asked again and why, what it costs. Needs no vLLM."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np
import pytest
from fake_vllm import ByteTokenizer, FakeAsyncLLM, FakeEngine, FakeLLM, SamplingParams, install
from fakes import RULE, FakePolicy, FakeScorer, ToyLM, ids
from hypothesis import HealthCheck, given, settings, strategies as st
from search_cases import ALL
from soak import examples

from prm_search.integrations.vllm import AsyncVLLMPolicy, VLLMImplicitPRM, VLLMPolicy, VLLMServer
from prm_search.integrations.vllm.logprob_requests import NextTokenRequest, SpanRequest
from prm_search.integrations.vllm.scoring_engine import ScoredEngine
from prm_search.protocols import Request, Sampling, Scorer
from prm_search.scorers.implicit.implicit_prm import ConstantReference
from prm_search.search import asearch, search
from prm_search.steps import StepRule
from prm_search.strategies import Beam, BestOfN, Strategy
from prm_search.tree import Node, Prompt, SearchTree

BETA = 0.5
PHI, REF = ToyLM(letters="ab;.", seed=1), ToyLM(letters="ab;.", seed=2)
POLICY = ToyLM(letters="ab;.", seed=3)


@pytest.fixture(autouse=True)
def _vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch)


def logprobs(lm: ToyLM, node: Node) -> np.ndarray:
    """log p of a node's tokens, the plain way."""
    before = [*node.tree.prompt_ids, *node.path_ids()[: node.start]]
    found = []
    for token in node.token_ids:
        found.append(np.log(lm.probs(before)[lm.vocabulary.index(token)]))
        before.append(token)
    return np.array(found)


def check(tree: SearchTree, phi: ToyLM = PHI, ref: ToyLM = REF) -> None:
    scored = [node for node in tree.nodes[1:] if node.scored_by("prm")]
    assert scored
    for node in scored:
        np.testing.assert_allclose(
            node.rewards["prm"], BETA * (logprobs(phi, node) - logprobs(ref, node)), rtol=0, atol=1e-5
        )


def grow(*paths: str, prompt: str = "ab;b") -> tuple[SearchTree, list[Node]]:
    """A tree with these paths, steps separated by spaces, built by hand; the last node of each."""
    tree = SearchTree(Prompt(token_ids=ids(prompt)))
    known: dict[tuple[str, ...], Node] = {(): tree.root}
    ends = []
    for path in paths:
        steps: tuple[str, ...] = ()
        for step in path.split():
            above, steps = known[steps], (*steps, step)
            if steps not in known:
                known[steps] = tree.add(above, ids(step))
        ends.append(known[steps])
    return tree, ends


def pair(block: int = 4, v2: bool = False, **options: Any) -> tuple[VLLMImplicitPRM, FakeEngine, FakeEngine]:
    phi, ref = FakeEngine(PHI, block=block, v2=v2), FakeEngine(REF, block=block, v2=v2)
    return VLLMImplicitPRM(FakeLLM(phi), FakeLLM(ref), beta=BETA, **options), phi, ref


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=examples(60))
@given(
    strategy=ALL,
    seed=st.integers(0, 99),
    block=st.integers(1, 9),
    v2=st.booleans(),
    asynchronous=st.booleans(),
    free=st.booleans(),
)
def test_rewards_of_a_search_are_the_models_own(
    strategy: Strategy, seed: int, block: int, v2: bool, asynchronous: bool, free: bool
) -> None:
    prompts = [list(ids("ab;b")), list(ids("b")), list(ids("ab;b"))]
    options: dict[str, Any] = {"strategy": strategy, "seed": seed, "steps": RULE, "max_new_tokens": 12}
    phi, ref = FakeEngine(PHI, block=block, v2=v2), FakeEngine(REF, block=block, v2=v2)
    if asynchronous:
        llms = FakeAsyncLLM(phi), FakeAsyncLLM(ref)
        policy: Any = AsyncVLLMPolicy(llms[1])
        found = asyncio.run(
            asearch(
                prompts,
                policy=policy,
                scorer=VLLMImplicitPRM(llms[0], "policy" if free else llms[1], beta=BETA),
                **options,
            )
        )
    else:
        whole = FakeLLM(phi), FakeLLM(ref)
        policy = VLLMPolicy(whole[1])
        found = search(
            prompts,
            policy=policy,
            scorer=VLLMImplicitPRM(whole[0], "policy" if free else whole[1], beta=BETA),
            **options,
        )
    for result in found:
        check(result.tree)
    # The reference is the policy, by name or by engine: it is never asked, whoever drew the tokens carries its half.
    assert all(params.prompt_logprobs is None and params.prompt_logprob_token_ids is None for _, _, params in ref.log)
    assert not phi.running
    assert not ref.running


def test_equal_steps_are_asked_once_whenever_they_were_drawn() -> None:
    scorer, phi, _ = pair()
    tree, (first, below) = grow("ab; a;", "ab; b;")
    scorer.score_nodes([first, below])
    asked = len(phi.log)
    twin = tree.add(tree.root, ids("ab;"))
    late = tree.add(twin, ids("a;"))
    scorer.score_nodes([late])
    assert len(phi.log) == asked
    assert (late.q, twin.q) == (first.q, first.parent.q)
    check(tree)
    counts = {kind: n for (kind, model), n in tree.meter.counts.items() if model == scorer.prm.id}
    assert counts["encoded"] == 4 + 3 + 2 + 2


def test_it_is_a_scorer_and_knows_its_models() -> None:
    scorer, phi, ref = pair()
    assert isinstance(scorer, Scorer)
    policy = VLLMPolicy(FakeLLM(ref))
    assert scorer.models == {"prm": VLLMPolicy(FakeLLM(phi)).id, "reference": policy.id}
    follows = VLLMImplicitPRM(policy, "policy")
    assert follows.models["reference"] == "policy"
    follows.bind(policy)
    assert follows.models["reference"] == policy.id
    assert VLLMImplicitPRM(FakeLLM(phi), ConstantReference(-1.0)).models == {"prm": scorer.models["prm"]}


def asks(engine: FakeEngine) -> list[str]:
    """What an engine was asked, in order: rows, all (without the cache) or next."""
    kinds = []
    for _, _, params in engine.log:
        scored = params.prompt_logprobs is not None or params.prompt_logprob_token_ids is not None
        kinds.append(("all" if params.skip_reading_prefix_cache else "rows") if scored else "next")
    return kinds


@pytest.mark.parametrize("v2", [False, True])
def test_a_parent_that_ends_with_a_block_costs_one_more_request_for_all_of_its_children(v2: bool) -> None:
    scorer, phi, ref = pair(block=4, v2=v2)
    tree, (parent,) = grow("bba;", prompt="ab;b")  # 8 tokens: two blocks
    scorer.score_nodes([parent])
    children = [tree.add(parent, ids(step)) for step in ("ab;", "aa", "b", ".")]
    scorer.score_nodes(children)
    check(tree)
    for engine in (phi, ref):
        # Each path, and then what the block hid: under V2 that is the rest of the first child too.
        assert asks(engine) == ["rows"] * (6 if v2 else 5) + ["next"]
        (request,) = [(tokens, cached, params) for tokens, cached, params in engine.log if params.logprob_token_ids]
        assert request[:2] == (8, 4)  # one block is encoded again
        assert sorted(request[2].logprob_token_ids) == sorted(ids("ab."))


@pytest.mark.parametrize("v2", [False, True])
def test_a_sequence_that_was_encoded_before_is_encoded_in_full(v2: bool) -> None:
    scorer, phi, _ = pair(block=4, v2=v2)
    first, ends = grow("bba;ab;")
    scorer.score_nodes(ends)
    again, ends = grow("bba;ab;")
    scorer.score_nodes(ends)
    check(first)
    check(again)
    assert asks(phi) == ["rows", "rows", "all"]
    assert again.meter.counts["reencoded", scorer.prm.id] == 11
    assert again.meter.counts["cached", scorer.prm.id] == phi.log[1][1] == 8


@pytest.mark.parametrize("v2", [False, True])
@pytest.mark.parametrize("together", [False, True])
def test_siblings_that_begin_alike_share_what_they_share(v2: bool, together: bool) -> None:
    scorer, phi, _ = pair(block=4, v2=v2)
    # Beside the first, the second differs within a block, the third where one ends; the fourth and fifth are within it.
    tree, ends = grow("ab;b ab;bba", "ab;b ab;bbb;", "ab;b ab;ba;", "ab;b ab;b", "ab;b a")
    for some in [ends] if together else [[end] for end in ends]:
        scorer.score_nodes(some)
    check(tree)
    assert sorted(asks(phi)) == ["next", *["rows"] * (4 if v2 else 3)]
    assert [(tokens, cached) for tokens, cached, _ in phi.log][:2] == [(14, 0), (15, 12)]


def test_what_was_scored_costs_nothing() -> None:
    scorer, phi, _ = pair()
    tree, ends = grow("b;a ab", "b;a b")
    scorer.score_nodes(ends)
    before = len(phi.log)
    scorer.score_nodes([*ends, ends[0].parent, tree.root])  # type: ignore[list-item]
    assert len(phi.log) == before == 2
    other = VLLMImplicitPRM(scorer.prm, ConstantReference(-1.0), name="other")
    other.score_nodes(ends)  # the same engine: its log-probabilities are known
    assert len(phi.log) == before


def test_each_chain_is_one_request_and_usage_counts_it() -> None:
    scorer, phi, _ = pair(block=4)
    tree, ends = grow("b;a ab; b;", "b;a ba;a; .")
    scorer.score_nodes(ends)
    check(tree)
    total = len(tree.prompt_ids)
    first, second = total + 8, total + 9
    assert [tokens for tokens, _, _ in phi.log] == [first, second]
    counts = tree.meter.counts
    model = scorer.prm.id
    assert counts["encoded", model] == total + sum(len(node.token_ids) for node in tree.nodes)
    assert counts["cached", model] == sum(cached for _, cached, _ in phi.log)
    assert counts["encoded", model] + counts["reencoded", model] + counts["cached", model] == first + second


def test_with_the_cache_off_it_is_right_and_slow() -> None:
    engines = [FakeEngine(lm, prefix_caching=False) for lm in (PHI, REF)]
    scorer = VLLMImplicitPRM(*map(FakeLLM, engines), beta=BETA)
    (result,) = search(
        [list(ids("ab;b"))], policy=FakePolicy(POLICY), scorer=scorer, strategy=Beam(width=2, expansions=2), steps=RULE
    )
    check(result.tree)
    assert "prm" not in result.usage.cached_tokens
    assert result.usage.reencoded_tokens["prm"] > 0


def test_garbage_is_never_taken_for_a_row() -> None:
    """Of an answer whose cache reaches beyond the wanted rows nothing is believed that was not computed."""
    engine = FakeEngine(PHI, block=4)
    scored = ScoredEngine.of(FakeLLM(engine))
    assert scored is not None
    sequence = ids("ab;bba;ab;")
    scored.begin([SpanRequest(sequence, 4)]).result()
    (again,) = scored.begin([SpanRequest(sequence, 4)]).result()
    assert again.cached == 8
    assert np.isnan(again.logprobs[:5]).all()
    assert not np.isnan(again.logprobs[5:]).any()
    assert (again.logprobs[5:] < 0).all()
    (head,) = scored.begin([NextTokenRequest(sequence[:4], ids("ab"))]).result()
    np.testing.assert_allclose(head.logprobs, [np.log(PHI.probs(sequence[:4])[i]) for i in (0, 1)], atol=1e-6)


def test_a_policy_that_is_no_vllm_engine_and_one_that_has_no_logprobs() -> None:
    scorer = VLLMImplicitPRM(FakeLLM(FakeEngine(PHI)), "policy", beta=BETA)
    (result,) = search([list(ids("ab;b"))], policy=FakePolicy(REF), scorer=scorer, strategy=BestOfN(3), steps=RULE)
    check(result.tree)
    _, ends = grow("ab;")
    with pytest.raises(ValueError, match="carries no log-probabilities"):
        scorer.score_nodes(ends)


def test_a_vllm_policy_under_another_scorer() -> None:
    policy = VLLMPolicy(FakeLLM(FakeEngine(POLICY)))
    (result,) = search(["ab"], policy=policy, scorer=FakeScorer(), strategy=Beam(width=2, expansions=2), steps=RULE)
    assert result.value is not None
    np.testing.assert_allclose(result.tree.nodes[1].logprobs, logprobs(POLICY, result.tree.nodes[1]), atol=1e-5)


def test_a_scorer_on_the_policys_engine_leaves_its_requests_alone() -> None:
    """Policy, PRM and reference in one step loop: hand-built nodes are scored while the policy draws."""
    engine, other = FakeEngine(REF), FakeEngine(PHI)
    llm = FakeLLM(engine)
    policy, scorer = VLLMPolicy(llm), VLLMImplicitPRM(FakeLLM(other), llm, beta=BETA)
    drawn = SearchTree(Prompt(token_ids=ids("ab")))
    request = Request.draw(drawn.root, 2, Sampling(RULE, max_new_tokens=40), until="end")
    policy.submit([request])
    policy.advance()
    tree, ends = grow("bab ab;", "ab")
    scorer.score_nodes(ends)
    check(tree)
    answered: list[Any] = []
    while not answered:
        answered = policy.advance()
    assert len(answered[0][1]) == 2


def test_responses_are_scored_without_a_search() -> None:
    scorer, _, _ = pair()
    prompts, responses = ["ab;b", "b", "ab;b"], ["ab;a", "b;", "ab;bb"]
    found = scorer.score(prompts, responses, steps=StepRule(delimiter=";"), append_eos=False)
    for prompt, response, scores in zip(prompts, responses, found, strict=True):
        tree, _ = grow(response, prompt=prompt)
        node = tree.nodes[1]
        np.testing.assert_allclose(scores.token_rewards, BETA * (logprobs(PHI, node) - logprobs(REF, node)), atol=1e-5)
    assert found[0].step_ends.tolist() == [3, 4]


def test_release_forgets() -> None:
    scorer, _, _ = pair()
    (result,) = search(["ab"], policy=FakePolicy(POLICY), scorer=scorer, strategy=BestOfN(2), steps=RULE)
    assert result.tree not in scorer.prm._memos


class OtherWords(ByteTokenizer):
    def get_vocab(self) -> dict[str, int]:
        return {"x": 1}


class BeginWords(ByteTokenizer):
    """The same vocabulary, another rendering of prompts."""

    def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
        return {"input_ids": [98, *(ord(c) for c in text)]}


def test_another_vocabulary_is_refused_and_another_rendering_of_prompts_is_not() -> None:
    phi, ref = FakeEngine(PHI), FakeEngine(REF)
    policy = VLLMPolicy(FakeLLM(FakeEngine(POLICY)))
    with pytest.raises(ValueError, match="another vocabulary"):
        search(["ab"], policy=policy, scorer=VLLMImplicitPRM(FakeLLM(phi), FakeLLM(ref), tokenizer=OtherWords()))
    scorer = VLLMImplicitPRM(FakeLLM(phi), FakeLLM(ref), tokenizer=BeginWords(), beta=BETA)
    (result,) = search(["ab"], policy=policy, scorer=scorer, strategy=Beam(width=2, expansions=2), steps=RULE)
    for node in result.tree.nodes[1:]:
        node_ids = [98, *ids("ab"), *node.path_ids()]
        at = len(node_ids) - len(node.token_ids)
        wanted = [log_ratio(node_ids, i) for i in range(at, len(node_ids))]
        np.testing.assert_allclose(node.rewards["prm"], BETA * np.array(wanted), atol=1e-5)
    # The policy's own engine as reference: what it drew, it drew after another prompt.
    drawer = FakeLLM(ref)
    scorer = VLLMImplicitPRM(FakeLLM(phi), drawer, tokenizer=BeginWords(), beta=BETA)
    (again,) = search(["ba"], policy=VLLMPolicy(drawer), scorer=scorer, strategy=BestOfN(2), steps=RULE)
    for node in again.tree.nodes[1:]:
        path = [98, *ids("ba"), *node.path_ids()]
        wanted = [log_ratio(path, i) for i in range(len(path) - len(node.token_ids), len(path))]
        np.testing.assert_allclose(node.rewards["prm"], BETA * np.array(wanted), atol=1e-5)
    with pytest.raises(ValueError, match="renders this prompt in another way"):
        search(["ab"], policy=policy, scorer=VLLMImplicitPRM(FakeLLM(phi), "policy", tokenizer=BeginWords()))


def log_ratio(sequence: list[int], at: int) -> float:
    mine, theirs = (FakeEngine(lm).logprob(sequence, at) for lm in (PHI, REF))
    return mine - theirs


def test_what_cannot_be_served_is_refused_by_name() -> None:
    llm = FakeLLM(FakeEngine(PHI))
    with pytest.raises(TypeError, match=r"model must be a vllm\.LLM.*got str"):
        VLLMImplicitPRM("name", "policy")
    with pytest.raises(TypeError, match="reference must be"):
        VLLMImplicitPRM(llm, 3)
    with pytest.raises(ValueError, match="one engine"):
        VLLMImplicitPRM(llm, VLLMPolicy(llm))
    with pytest.raises(ValueError, match="beta=0"):
        VLLMImplicitPRM(llm, "policy", beta=0)
    with pytest.raises(ValueError, match="name=''"):
        VLLMImplicitPRM(llm, "policy", name="")
    with pytest.raises(ValueError, match="logprobs_mode='raw_logits'"):
        VLLMImplicitPRM(FakeLLM(FakeEngine(logprobs_mode="raw_logits")), "policy")
    _, ends = grow("ab;")
    with pytest.raises(TypeError, match="use asearch"):
        VLLMImplicitPRM(FakeAsyncLLM(FakeEngine(PHI)), ConstantReference(-1.0)).score_nodes(ends)
    with pytest.raises(ValueError, match="leaves no room"):
        search(["a" * 15], policy=FakePolicy(), scorer=VLLMImplicitPRM(FakeLLM(FakeEngine(PHI, context=16)), "policy"))


# --- over HTTP -------------------------------------------------------------------------------------------------------


class Server(ThreadingHTTPServer):
    """vLLM's token-in/token-out route over a FakeEngine."""

    engine: FakeEngine
    details = True
    scale_out = True
    nan = 0  # the status that garbage which JSON cannot hold has; 0: there is none
    lock = threading.Lock()


class Handler(BaseHTTPRequestHandler):
    server: Server

    def log_message(self, *_: Any) -> None:
        pass

    def _send(self, status: int, body: Any) -> None:
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def do_GET(self) -> None:
        self._send(200, {"data": [{"id": "toy", "max_model_len": self.server.engine.context}]})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if not self.server.scale_out:
            return self._send(403, {"error": "scale out is off"})
        if self.headers.get("Authorization") != "Bearer key":
            return self._send(401, {"error": "no key"})
        with self.server.lock:
            params = SamplingParams(**body["sampling_params"])
            engine = self.server.engine
            name = engine.add_request(f"http-{len(engine.log)}", {"prompt_token_ids": body["token_ids"]}, params)
            (output,) = [output for output in engine.step() if output.request_id == name]
        if self.server.nan and output.num_cached_tokens:
            said = {"message": "Out of range float values are not JSON compliant", "type": "BadRequestError"}
            return self._send(self.server.nan, {"error": said})
        usage: dict[str, Any] = {"prompt_tokens": len(body["token_ids"])}
        if self.server.details:
            usage["prompt_tokens_details"] = {"cached_tokens": output.num_cached_tokens}
        (table,) = output.outputs[0].logprobs
        top = [{"token_id": token, "logprob": entry.logprob} for token, entry in table.items()]
        rows = output.prompt_logprobs
        answer: dict[str, Any] = {
            "usage": usage,
            "choices": [
                {
                    "logprobs": None
                    if params.logprobs is None
                    else {"content": [{"top_logprobs": top[: params.logprobs]}]}
                }
            ],
            "prompt_logprobs": rows
            and [row and {str(i): {"logprob": e.logprob} for i, e in row.items()} for row in rows],
        }
        self._send(200, answer)


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server(("127.0.0.1", 0), Handler)
    server.engine = FakeEngine(PHI, block=4)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()


def model(server: Server, **options: Any) -> VLLMServer:
    pytest.importorskip("httpx")
    return VLLMServer(f"http://127.0.0.1:{server.server_port}/", api_key="key", **options)


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("nan", [0, 400, 500])
def test_a_pair_over_http(server: Server, asynchronous: bool, nan: int) -> None:
    server.nan = nan
    prm = model(server)
    options: dict[str, Any] = {
        "scorer": VLLMImplicitPRM(prm, "policy", beta=BETA),
        "strategy": Beam(width=3, expansions=3),
        "steps": RULE,
    }
    engine = FakeEngine(REF)
    prompts = [list(ids("ab;b")), list(ids("b"))]
    if asynchronous:
        found = asyncio.run(asearch(prompts, policy=AsyncVLLMPolicy(FakeAsyncLLM(engine)), **options))
    else:
        found = search(prompts, policy=VLLMPolicy(FakeLLM(engine)), **options)
    for result in found:
        check(result.tree)
    assert ("next" in asks(server.engine)) is (nan == 0)
    assert ("all" in asks(server.engine)) is (nan != 0)
    assert prm.context == server.engine.context - 1
    prm.close()


def test_a_server_that_does_not_do_is_refused_by_name(server: Server) -> None:
    prm = model(server)
    with pytest.raises(ValueError, match=r"model='other': .* serves toy"):
        model(server, model="other")
    _, ends = grow("ab;")
    scorer = VLLMImplicitPRM(prm, ConstantReference(-1.0))
    server.details = False
    with pytest.raises(ValueError, match="--enable-prompt-tokens-details"):
        scorer.score_nodes(ends)
    server.scale_out = False
    with pytest.raises(ValueError, match="--enable-scale-out"):
        scorer.score_nodes(ends)
    with pytest.raises(ConnectionError, match="127"):
        VLLMServer("http://127.0.0.1:9")
    prm.close()
