"""Judge: scores against plain full forwards of its prompts, exact counts, any policy, and what is refused."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Sequence

import pytest
import torch
from fake_vllm import FakeAsyncLLM, FakeEngine, FakeLLM, install
from fakes import RULE, FakeBlockingPolicy, FakePolicy, ToyLM
from pairs import byte_tokenizer, llama

import prm_search as ps
from prm_search.integrations.vllm import AsyncVLLMPolicy, VLLMPolicy
from prm_search.next_token import NextToken
from prm_search.scorers.explicit.judge_formats import grades
from prm_search.tree import Node, Prompt, SearchTree

QUESTION = "What is two and three?"
STEPS = ["Add two and three.", "It is five."]
# One token each in the byte tokenizer.
FORMAT = ps.JudgeFormat(
    "Problem: {question}\n{steps}\nIs the last step right?", {"y": 1, "n": 0}, system="Judge.", answer="Verdict: ",
    aggregate="min",
)  # fmt: skip
GRADES = ps.JudgeFormat("{question}\n{answer}\nGrade:", grades(("a", "b", "c", "d", "e")), per="answer")


@pytest.fixture(scope="module")
def policy() -> ps.HFPolicy:
    return ps.HFPolicy(llama(3, dtype=torch.float64), byte_tokenizer())


class Plain:
    """The judge read the plain way: the prompt written out, one full forward, tokens found by decoding each."""

    def __init__(self, policy: ps.HFPolicy) -> None:
        self.model, self.tokenizer = policy.lm.module, policy.tokenizer

    def ids(self, user: str, system: str | None = None, answer: str = "") -> list[int]:
        turns = ([("system", system)] if system else []) + [("user", user)]
        text = "".join(f"<|im_start|>{role}\n{content}<|im_end|>\n" for role, content in turns)
        ids = self.tokenizer(text + "<|im_start|>assistant\n", add_special_tokens=False)["input_ids"]
        return [*ids, *self.tokenizer(answer, add_special_tokens=False)["input_ids"]]

    def step_ids(self, steps: Sequence[str]) -> list[int]:
        numbered = "\n".join(f"Step {i}: {step}" for i, step in enumerate(steps, start=1))
        return self.ids(f"Problem: {QUESTION}\n{numbered}\nIs the last step right?", "Judge.", "Verdict: ")

    @torch.no_grad()
    def score(self, ids: Sequence[int], words: dict[str, float]) -> float:
        shares = torch.softmax(self.model(torch.tensor([list(ids)])).logits[0, -1], -1)
        spelled = [self.tokenizer.decode([i]).strip().lower() for i in range(len(self.tokenizer))]
        mass = {word: sum(float(shares[i]) for i, text in enumerate(spelled) if text == word) for word in words}
        return sum(mass[word] * value for word, value in words.items()) / sum(mass.values())


def grow(tree: SearchTree, parent: Node, text: str, finish: str = "step") -> Node:
    return tree.add(parent, [7], text=text, finish=finish)


def distinct_prefixes(texts: Sequence[Sequence[int]]) -> int:
    return len({tuple(text[:end]) for text in texts for end in range(1, len(text) + 1)})


def test_step_scores_are_full_forwards_and_each_token_is_encoded_once(policy: ps.HFPolicy) -> None:
    judge, plain = ps.Judge(policy, format=FORMAT), Plain(policy)
    tree = SearchTree(Prompt(text=QUESTION))
    first = grow(tree, tree.root, STEPS[0] + "\n\n")
    right, wrong = grow(tree, first, STEPS[1], "stop"), grow(tree, first, "It is six.", "stop")
    twin, blank = grow(tree, tree.root, STEPS[0]), grow(tree, first, "\n\n")
    judge.score_nodes([first])
    judge.score_nodes([wrong, blank, twin, right])
    paths = [STEPS[:1], [STEPS[0], "It is six."], STEPS]
    texts = [plain.step_ids(steps) for steps in paths]
    wanted = [plain.score(ids, {"y": 1, "n": 0}) for ids in texts]
    assert [node.reward_of("judge") for node in (first, wrong, right)] == pytest.approx(wanted, abs=1e-9)
    assert twin.reward_of("judge") == blank.reward_of("judge") == first.reward_of("judge")
    assert tree.meter.counts["encoded", policy.id] == distinct_prefixes(texts)
    assert tree.meter.counts["reencoded", policy.id] == 0
    judge.score_nodes([right])  # known
    assert tree.meter.counts["encoded", policy.id] == distinct_prefixes(texts)
    judge.release(tree)
    assert policy.lm.tree.used == 0


def test_grades_of_whole_answers_are_their_expectation(policy: ps.HFPolicy) -> None:
    judge, plain = ps.Judge(policy, format=GRADES), Plain(policy)
    answers = ["It is five.", "First add.\n\nIt is six."]
    scores = judge.score([QUESTION] * 2, answers)
    words = {"a": 1.0, "b": 0.75, "c": 0.5, "d": 0.25, "e": 0.0}
    wanted = [plain.score(plain.ids(f"{QUESTION}\n{answer}\nGrade:"), words) for answer in answers]
    assert [score.reward for score in scores] == pytest.approx(wanted, abs=1e-6)
    assert [len(score.step_scores) for score in scores] == [1, 1]
    assert policy.lm.tree.used == 0
    tree = SearchTree(Prompt(text=QUESTION))
    step = grow(tree, tree.root, "First add.\n\n")
    end = grow(tree, step, "It is six.", "stop")
    judge.score_nodes([end])
    assert (step.reward_of("judge"), end.q_of("judge")) == (0.0, pytest.approx(wanted[1], abs=1e-6))
    judge.release(tree)


def test_score_takes_steps_and_ranks_by_the_formats_aggregate(policy: ps.HFPolicy) -> None:
    judge, plain = ps.Judge(policy, format=FORMAT), Plain(policy)
    (by_rule, by_hand) = judge.score([QUESTION] * 2, ["\n\n".join(STEPS), STEPS])
    wanted = [plain.score(plain.step_ids(STEPS[:i]), {"y": 1, "n": 0}) for i in (1, 2)]
    assert by_hand.step_scores.tolist() == pytest.approx(wanted, abs=1e-6)
    assert by_rule.step_scores.tolist() == by_hand.step_scores.tolist()
    assert by_hand.reward == pytest.approx(min(wanted), abs=1e-6)


def test_a_judge_may_be_the_searchs_own_policy_and_counts_under_it(policy: ps.HFPolicy) -> None:
    judge = ps.Judge(policy, format=FORMAT)
    (result,) = ps.search(
        [QUESTION], policy=policy, scorer=judge, strategy=ps.Beam(2, 2), steps=ps.StepRule(";", max_tokens=6),
        max_new_tokens=18,
    )  # fmt: skip
    assert set(result.usage.encoded_tokens) == {"policy"}
    assert result.value == min(node.reward for node in result.node.path())
    assert policy.lm.tree.used == 0


def test_control_tokens_that_text_spells_are_broken_up(policy: ps.HFPolicy) -> None:
    judge = ps.Judge(policy, format=FORMAT)
    (plain, spelled) = judge.score([QUESTION] * 2, [["< |im_end|>"], ["<|im_end|>"]])
    assert plain.reward == spelled.reward


VLLM_FORMAT = ps.JudgeFormat("{question}{answer}", {"a": 1, "b": 0}, chat=False)


class Told(FakeBlockingPolicy):
    """Tells log-probabilities of a ToyLM, of the words that are among its `top` most probable tokens."""

    def __init__(self, lm: ToyLM, top: int = 9) -> None:
        super().__init__(lm)
        self.top = top

    def next_token_logprobs(self, asks: Sequence[NextToken], words: Sequence[str]) -> list[dict[str, float]]:
        answers = []
        for ask in asks:
            text = (ask.prompt.text or "") + ask.text
            probs = dict(zip(self.lm.letters, self.lm.probs([ord(c) for c in text]), strict=True))
            shown = sorted(probs, key=lambda letter: -probs[letter])[: self.top]
            answers.append({word: math.log(probs[word]) for word in words if word in shown})
        return answers


@pytest.mark.parametrize("kind", ["told", "vllm", "async"])
def test_any_policy_that_tells_the_next_token_judges(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    install(monkeypatch)
    lm = ToyLM()
    tree = SearchTree(Prompt(text="ab"))
    nodes = [grow(tree, tree.root, text) for text in ("ab;", "ba;", "bb;")]
    engine = FakeEngine(block=4)
    if kind == "async":
        judge = ps.Judge(AsyncVLLMPolicy(FakeAsyncLLM(engine)), format=VLLM_FORMAT)
        with pytest.raises(TypeError, match="use asearch, or await ascore_nodes"):
            judge.score_nodes(nodes)
        asyncio.run(judge.ascore_nodes(nodes))
    else:
        policy = Told(lm) if kind == "told" else VLLMPolicy(FakeLLM(engine))
        judge = ps.Judge(policy, format=VLLM_FORMAT)
        judge.score_nodes(nodes)
    for node in nodes:
        probs = dict(zip("ab;.", lm.probs([ord(c) for c in "ab" + node.text]), strict=True))
        assert node.reward_of("judge") == pytest.approx(probs["a"] / (probs["a"] + probs["b"]), abs=1e-6)
    if kind != "told":
        texts = ["ab" + node.text for node in nodes]  # blocks of 4: only the first text fills one
        counts = tree.meter.counts
        assert counts["encoded", judge.policy.id] == distinct_prefixes([list(map(ord, text)) for text in texts])
        assert counts["reencoded", judge.policy.id] == sum(map(len, texts)) - counts["encoded", judge.policy.id]
    judge.release(tree)


def test_words_that_an_endpoint_does_not_show_are_impossible_and_noted() -> None:
    tree = SearchTree(Prompt(text="ab"))
    format = ps.JudgeFormat("{question}{answer}", {"a": 1, "q": 0.25, "z": 0}, chat=False)
    node = grow(tree, tree.root, "ab;")
    ps.Judge(Told(ToyLM(letters="ab;.")), format=format).score_nodes([node])  # only "a" is a token there
    assert (node.reward_of("judge"), tree.notes) == (1.0, [])
    none = SearchTree(Prompt(text="ab"))
    node = grow(none, none.root, "ab;")
    judge = ps.Judge(Told(ToyLM(letters="ab;."), top=0), format=format)
    judge.score_nodes([node])
    assert node.reward_of("judge") == 0.5
    assert none.notes == [
        "judge: verdict words had less than 1% of the probability at some places: does the prompt lead to one of them?"
    ]


def test_a_judge_guides_a_search_over_another_policy() -> None:
    judge = ps.Judge(Told(ToyLM(seed=1)), format=VLLM_FORMAT)
    (result,) = ps.search(["ab"], policy=FakePolicy(), scorer=judge, strategy=ps.Beam(2, 2), steps=RULE, value="min")
    assert result.value == pytest.approx(min(node.reward for node in result.node.path()))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"text": "{question}"}, "one of {answer}, {steps} and {step}"),
        ({"text": "{steps}"}, "{question} is needed"),
        ({"words": {"yes": 1}}, "values that differ"),
        ({"words": {"yes": 1, "Yes": 0}}, "differ in more than case"),
        ({"words": {"yes": 1, "no": math.nan}}, r"words\['no'\]=nan"),
        ({"per": "token"}, "per='token': it is 'step' or 'answer'"),
        ({"aggregate": "most"}, "aggregate='most' is unknown"),
    ],
)
def test_formats_that_do_not_serve_are_refused_by_name(changed: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ps.JudgeFormat(**({"text": "{question} {steps}", "words": {"yes": 1, "no": 0}} | changed))  # type: ignore[arg-type]


def test_what_does_not_fit_is_refused_by_name(policy: ps.HFPolicy) -> None:
    with pytest.raises(ValueError, match="format='yes' is unknown; it is one of answer_grade, answer_yes_no, step_"):
        ps.Judge(policy, format="yes")
    with pytest.raises(TypeError, match="policy must be a Policy, but str has no"):
        ps.Judge("gpt", format=FORMAT)
    judge = ps.Judge(policy, format=FORMAT)
    tree = SearchTree(Prompt(token_ids=(5,)))
    with pytest.raises(ValueError, match="given only as token ids"):
        judge.score_nodes([grow(tree, tree.root, "a")])
    with pytest.raises(ValueError, match="given only as token ids"):  # before anything is sampled
        ps.search([[5, 6]], policy=policy, scorer=judge)
    with pytest.raises(ValueError, match="no token of the policy's vocabulary spells 'incomprehensible'"):
        ps.Judge(policy, format=ps.JudgeFormat("{question}{step}", {"incomprehensible": 1, "n": 0})).score(["a"], ["b"])
    with pytest.raises(TypeError, match="FakePolicy does not"):
        ps.Judge(FakePolicy(), format=VLLM_FORMAT).score(["a"], ["b"])
    with pytest.raises(ValueError, match="no chat template"):
        ps.Judge(ps.HFPolicy(policy.lm, byte_tokenizer(template=None)), format=FORMAT).score(["a"], ["b"])
    assert policy.lm.tree.used == 0
