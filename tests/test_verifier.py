"""GenerativeVerifier: scripted critiques, plain full forwards, exact counts, and what is refused."""

from __future__ import annotations

import asyncio
import math
import re
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from fakes import FakePolicy
from pairs import byte_tokenizer, llama

import prm_search as ps
from prm_search.drawing import Segment, commit
from prm_search.next_token import NextToken
from prm_search.policy import AsyncPolicyBase, BlockingPolicy
from prm_search.protocols import Request
from prm_search.tree import Node, Prompt, SearchTree

QUESTION = "What is two and three?"
STEPS = ["Add two and three.", "It is five."]


class Critic(BlockingPolicy):
    """Writes critiques of a script in turn, a stop string behind each, and believes the number in their last line.

    Attributes:
        asked: chat messages of each request, and the text that the critique goes on from.
        closed: whole answers whose next word was asked for.
    """

    id = "critic"
    takes_stop = True

    def __init__(self, script: Sequence[str], context: int | None = None) -> None:
        super().__init__()
        self.script, self.context = list(script), context
        self.asked: list[tuple[list[dict[str, Any]], str]] = []
        self.stops: list[tuple[str, ...]] = []
        self.closed: list[str] = []
        self.released: list[SearchTree] = []

    def encode(self, prompt: Prompt) -> tuple[int, ...]:
        return tuple("".join(str(m["content"]) for m in prompt.messages or ()).encode())

    def run(self, requests: Sequence[Request]) -> list[list[Node]]:
        return [self._answer(request) for request in requests]

    def _answer(self, request: Request) -> list[Node]:
        self.asked.append(([dict(m) for m in request.node.tree.prompt.messages or ()], request.node.path_text()))
        self.stops.append(request.sampling.stop)
        chains = []
        for _ in request.lineages:
            text, stop = self.script.pop(0), request.sampling.stop[0]
            ids = list((text + stop).encode())
            chains.append([Segment(ids, [-1.0] * len(ids), text + stop, "stop", hidden=len(stop.encode()))])
            request.node.tree.meter.add("sampled", self.id, len(ids))
        return [nodes[-1] for nodes in commit(request, chains, self.id)]

    def next_token_logprobs(self, asks: Sequence[NextToken], words: Sequence[str]) -> list[dict[str, float]]:
        self.closed += [ask.text for ask in asks]
        shares = [float(re.findall(r"\.\d+", ask.text)[-1]) for ask in asks]
        return [{words[0]: math.log(p / 2), words[1]: math.log((1 - p) / 2)} for p in shares]

    def release(self, tree: SearchTree) -> None:
        self.released.append(tree)
        super().release(tree)


class AsyncCritic(AsyncPolicyBase):
    """The same, asynchronous."""

    takes_stop = True

    def __init__(self, script: Sequence[str]) -> None:
        self.critic = Critic(script)
        self.id = "critic"

    def encode(self, prompt: Prompt) -> tuple[int, ...]:
        return self.critic.encode(prompt)

    async def run(self, request: Request) -> list[Node]:
        await asyncio.sleep(0)
        return self.critic.run([request])[0]

    async def next_token_logprobs(self, asks: Sequence[NextToken], words: Sequence[str]) -> list[dict[str, float]]:
        return self.critic.next_token_logprobs(asks, words)

    def release(self, tree: SearchTree) -> None:
        self.critic.release(tree)


def path(tree: SearchTree, steps: Sequence[str]) -> list[Node]:
    nodes = [tree.root]
    for place, step in enumerate(steps, start=1):
        finish = "stop" if place == len(steps) else "step"
        nodes.append(tree.add(nodes[-1], list(step.encode()), text=step + "\n\n", finish=finish))
    return nodes[1:]


THINK = (
    "You are given a math problem and a proposed step-by-step solution:\n\n[Math Problem]\n\nWhat is two and three?\n\n"
    "[Solution]\n\nStep 1: Add two and three.\nStep 2: It is five.\n\nReview and critique each step in the proposed "
    "solution to determine whether each step is correct. If the solution is incomplete, only verify the provided steps."
)


@pytest.mark.parametrize("asynchronous", [False, True])
def test_think_prm_is_the_mean_of_yes_behind_each_critique(asynchronous: bool) -> None:
    script = [" Fine .9", " Doubtful .3"]
    policy: Any = AsyncCritic(script) if asynchronous else Critic(script)
    critic = policy.critic if asynchronous else policy
    verifier = ps.GenerativeVerifier(policy, samples=2)
    tree = SearchTree(Prompt(text=QUESTION))
    first, end = path(tree, STEPS)
    if asynchronous:
        asyncio.run(verifier.ascore_nodes([end]))
    else:
        verifier.score_nodes([end])
    assert (first.reward_of("verifier"), end.reward_of("verifier")) == (0.0, pytest.approx(0.6))
    begin = "\nLet's verify step by step:"
    assert critic.asked == [([{"role": "user", "content": THINK}], begin)]  # one question for both samples
    assert critic.stops == [("Is the solution correct?", "</think>", "Step 3:")]
    assert critic.closed == [f"{begin}{text}\nIs the solution correct? " for text in script]
    assert [(c.text, c.verdict) for c in verifier.critiques(end)] == [
        (critic.closed[0], "yes"),
        (critic.closed[1], "no"),
    ]
    assert tree.meter.counts["sampled", "critic"] == sum(len(text) + len("Is the solution correct?") for text in script)
    assert len(critic.released) == 1  # the critiques' own tree
    asyncio.run(verifier.ascore_nodes([end]))  # known: the script is empty
    with pytest.raises(ValueError, match="has no critiques by 'verifier'"):
        verifier.critiques(first)


def test_think_prm_steps_judges_every_prefix() -> None:
    verifier = ps.GenerativeVerifier(Critic(["a .9", "b .2"]), format="think_prm_steps", samples=1)
    (scores,) = verifier.score([QUESTION], [STEPS])
    assert scores.step_scores.tolist() == pytest.approx([0.9, 0.2])
    assert scores.reward == pytest.approx(0.2)
    assert THINK in verifier.policy.asked[1][0][0]["content"]  # type: ignore[union-attr]


def test_gen_prm_is_a_conversation_of_each_sample_and_runs_no_code() -> None:
    code = "```python\nraise SystemExit\n``` .8"
    critic = Critic([code, "b .4", "c .6", "d .1"])
    verifier = ps.GenerativeVerifier(critic, format="gen_prm", samples=2)
    tree = SearchTree(Prompt(text=QUESTION))
    first, end = path(tree, STEPS)
    verifier.score_nodes([end])
    assert [node.reward_of("verifier") for node in (first, end)] == pytest.approx([0.6, 0.35])
    begin = "<analyze>\nLet's analyze the Paragraph {} step by step: "
    system = {
        "role": "system",
        "content": "You are a math teacher. Your task is to review and critique the paragraphs in solution step "
        "by step.",
    }
    turn = {"role": "user", "content": f"{QUESTION}\n{STEPS[0]}"}
    assert critic.asked[0] == ([system, turn], begin.format(1))
    for sample, (text, verdict) in enumerate([(code, "Yes"), ("b .4", "No")]):
        reply = f"{begin.format(1)}{text}</analyze>\n<output>\n**Judgement**: $\\boxed{{{verdict}}}$\n</output>\n"
        later = [system, turn, {"role": "assistant", "content": reply}, {"role": "user", "content": STEPS[1]}]
        assert critic.asked[1 + sample] == (later, begin.format(2))
    assert critic.closed[0] == f"{begin.format(1)}{code}</analyze>\n<output>\n**Judgement**: $\\boxed{{"


def test_a_conversation_is_begun_anew_where_it_is_not_known() -> None:
    tree = SearchTree(Prompt(text=QUESTION))
    first, end = path(tree, STEPS)
    ps.GenerativeVerifier(Critic(["a .9"]), format="gen_prm", samples=1).score_nodes([first])
    other = ps.GenerativeVerifier(Critic(["a .9", "b .2"]), format="gen_prm", samples=1)  # of the same name
    other.score_nodes([end])
    assert end.reward_of("verifier") == pytest.approx(0.2)


FORMAT = ps.VerifierFormat(
    "tiny", "{question}\n{steps}\nReview.", "\nRight? ", "Look:", words={"y": 1, "n": 0}, max_new_tokens=9,
    aggregate="last",
)  # fmt: skip


def test_scores_are_full_forwards_and_each_token_is_encoded_once() -> None:
    tokenizer = byte_tokenizer()
    policy = ps.HFPolicy(llama(3, dtype=torch.float64), tokenizer)
    verifier = ps.GenerativeVerifier(policy, format=FORMAT, samples=3)
    tree = SearchTree(Prompt(text=QUESTION))
    step = tree.add(tree.root, [7], text="It is five.")
    drawn: list[list[int]] = []
    release = policy.release

    def watch(own: SearchTree) -> None:  # what was drawn, before it is forgotten
        ends = [node for node in own.nodes if node.finished]
        drawn.extend([*own.prompt_ids, *end.path_ids()] for end in ends for _ in range(end.count))
        release(own)

    policy.release = watch  # type: ignore[method-assign]
    verifier.score_nodes([step])
    special = set(tokenizer.all_special_ids)
    closing = tokenizer("\nRight? ", add_special_tokens=False)["input_ids"]
    texts = []
    for ids in drawn:
        while ids[-1] in special:
            ids.pop()
        texts.append([*ids, *closing])
    prompt = f"<|im_start|>user\n{QUESTION}\nStep 1: It is five.\nReview.<|im_end|>\n<|im_start|>assistant\nLook:"
    begun = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    assert len(texts) == 3
    assert all(text[: len(begun)] == begun for text in texts)
    spelled = [tokenizer.decode([i]).strip().lower() for i in range(len(tokenizer))]
    scores = []
    for text in texts:
        with torch.no_grad():
            shares = torch.softmax(policy.lm.module(torch.tensor([text])).logits[0, -1], -1)
        yes, no = (sum(float(shares[i]) for i, word in enumerate(spelled) if word == w) for w in ("y", "n"))
        scores.append(yes / (yes + no))
    assert step.reward_of("verifier") == pytest.approx(sum(scores) / 3, abs=1e-9)
    prefixes = {tuple(text[:end]) for text in texts for end in range(1, len(text) + 1)}
    assert tree.meter.counts["encoded", policy.id] == len(prefixes)
    assert tree.meter.counts["reencoded", policy.id] == 0
    assert policy.lm.tree.used == 0


def test_what_does_not_fit_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="format='think' is unknown; it is one of gen_prm, think_prm"):
        ps.GenerativeVerifier(Critic([]), format="think")
    with pytest.raises(ValueError, match="samples=0"):
        ps.GenerativeVerifier(Critic([]), samples=0)
    deaf = Critic([])
    deaf.takes_stop = False
    with pytest.raises(ValueError, match="'think_prm' ends critiques by stop strings, and it takes none"):
        ps.GenerativeVerifier(deaf)
    with pytest.raises(ValueError, match="leaves no room for a critique in the policy's context of 200"):
        ps.GenerativeVerifier(Critic([], context=200)).score(["a"], ["b"])
    with pytest.raises(TypeError, match="FakePolicy does not"):
        ps.GenerativeVerifier(FakePolicy(), format=FORMAT).score(["a"], ["b"])
    with pytest.raises(ValueError, match=r"later='\{question\}': a text with \{step\} is needed"):
        ps.VerifierFormat("x", "{question}{steps}", "?", later="{question}")
    with pytest.raises(ValueError, match="temperature=-1"):
        ps.VerifierFormat("x", "{question}{steps}", "?", temperature=-1)
