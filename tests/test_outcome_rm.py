"""OutcomeRM against a plain full forward, in votes and searches, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from fakes import RULE, FakePolicy, ToyLM
from pairs import byte_tokenizer
from prm_models import QUESTION, Plain, chat, publish

import prm_search as ps
from prm_search.tree import Prompt, SearchTree


class PlainRM(Plain):
    """The same reading as its description: the last token of the whole chat."""

    def reward(self, answer: str) -> float:
        ids = self.encode(chat([("user", self.question), ("assistant", answer)]))
        with torch.no_grad():
            row = self.body(input_ids=torch.tensor([ids]), use_cache=False).last_hidden_state[0, -1].double()
        logits = row @ self.state["score.weight"].double().T + self.state.get("score.bias", torch.zeros(1)).double()
        return float(logits[0] if len(logits) == 1 else torch.softmax(logits, -1)[1])


@pytest.fixture(scope="module", params=["universal", "trl"])  # heads of one output and of two
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[ps.OutcomeRM, PlainRM]:
    folder = publish(tmp_path_factory.mktemp("rm") / "rm", request.param)
    return ps.OutcomeRM.from_pretrained(folder), PlainRM(folder, request.param)


def test_rewards_are_a_plain_full_forward(model: tuple[ps.OutcomeRM, PlainRM]) -> None:
    rm, plain = model
    answers = ["It is 20.", "It is 25.\n\nOr so.", "It is 20."]
    scores = rm.score([QUESTION] * 3, answers, batch_tokens=4)
    assert [score.reward for score in scores] == pytest.approx([plain.reward(answer) for answer in answers], abs=1e-4)
    assert rm.rm.tree.used == 0


def test_only_finished_answers_have_a_reward_and_equal_ones_cost_once(model: tuple[ps.OutcomeRM, PlainRM]) -> None:
    rm, plain = model
    tree = SearchTree(Prompt(text=QUESTION))
    step = tree.add(tree.root, [7], text="First add.\n\n")
    ends = [tree.add(step, [7], text=text, finish="stop") for text in ("It is 20.", "It is 20.", "It is 9.")]
    rm.score_nodes([step])
    assert (step.reward_of("rm"), rm.rm.tree.used) == (0.0, 0)
    rm.score_nodes(ends)
    wanted = [plain.reward("First add.\n\n" + text) for text in ("It is 20.", "It is 20.", "It is 9.")]
    assert [end.q_of("rm") for end in ends] == pytest.approx(wanted, abs=1e-4)
    prompt = plain.encode(chat([("user", QUESTION)]) + "<|im_start|>assistant\n")
    written = [
        plain.encode(chat([("user", QUESTION), ("assistant", "First add.\n\n" + t)])) for t in ("It is 20.", "It is 9.")
    ]
    encoded = tree.meter.counts["encoded", rm.rm.id]
    assert encoded <= len(prompt) + sum(len(ids) - len(prompt) for ids in written) + 2
    rm.release(tree)


def test_it_chooses_among_answers(model: tuple[ps.OutcomeRM, PlainRM]) -> None:
    rm, plain = model
    policy = FakePolicy(ToyLM(letters="ab;."))
    (result,) = ps.search([QUESTION], policy=policy, scorer=rm, strategy=ps.BestOfN(4), steps=RULE, max_new_tokens=12)
    complete = [node for node in result.candidates if node.finish == "stop"] or result.candidates
    assert result.value == pytest.approx(max(plain.reward(node.path_text()) for node in complete), abs=1e-4)


def test_what_does_not_fit_is_refused_by_name(tmp_path: Path, model: tuple[ps.OutcomeRM, PlainRM]) -> None:
    rm, _ = model
    with pytest.raises(ValueError, match=r"score\.weight is nothing"):
        ps.OutcomeRM.from_pretrained(publish(tmp_path / "lm", "rlhflow"))
    with pytest.raises(ValueError, match=r"score\.weight is \[420, 32\]"):
        ps.OutcomeRM(rm.rm, rm.tokenizer, tensors={"score.weight": torch.zeros(420, 32)})
    with pytest.raises(ValueError, match="no chat template"):
        ps.OutcomeRM(rm.rm, byte_tokenizer(template=None), tensors={"score.weight": torch.zeros(1, 32)})
    with pytest.raises(TypeError, match=r"responses\[0\] must be a text, got"):
        rm.score([QUESTION], [["a", "b"]])
    with pytest.raises(ValueError, match="given only as token ids"):
        rm.score_nodes([(tree := SearchTree(Prompt(token_ids=(5,)))).add(tree.root, [7], text="a", finish="stop")])
