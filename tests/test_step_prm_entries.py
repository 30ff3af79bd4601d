"""A step PRM everywhere a pair goes in the library: searches, generate's hook, as a prover; and who refuses it."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import hf_models
import pytest
from fakes import RULE, FakeAsyncPolicy, FakePolicy, ToyLM
from pairs import byte_tokenizer, llama
from prm_models import QUESTION, Plain, prm_tokenizer, publish

import prm_search as ps
from prm_search.scorers.explicit.formats import FORMATS
from prm_search.scorers.explicit.layouts import MarkerChat
from prm_search.scorers.load import load_scorer
from prm_search.training.online import OnlineUpdater
from prm_search.tree import SearchTree
from prm_search.values import Advantage

OPTIONS: dict[str, Any] = {"strategy": ps.Beam(2, 2), "steps": RULE, "max_new_tokens": 12}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return publish(tmp_path_factory.mktemp("prm") / "prm", "qwen_math")


@pytest.fixture(scope="module")
def prm(folder: Path) -> ps.StepPRM:
    return ps.StepPRM.from_pretrained(folder)


def check(tree: SearchTree, folder: Path, question: str = QUESTION, name: str = "prm") -> None:
    """Every step's score is a plain full forward's."""
    plain, scored = Plain(folder, "qwen_math", question), 0
    for node in tree.nodes[1:]:
        texts = [text for step in node.path() if (text := step.text.strip())]
        if node.text.strip() and "\ufffd" not in "".join(texts):  # no character is split over steps
            assert node.reward_of(name) == pytest.approx(plain.scores(texts)[-1], abs=1e-4)
            scored += 1
    assert scored


def policy() -> FakePolicy:
    return FakePolicy(ToyLM(letters="ab;."))


def test_search_and_asearch_are_one(prm: ps.StepPRM, folder: Path) -> None:
    prompts = [QUESTION, "What is 7?"]
    results = ps.search(prompts, policy=policy(), scorer=prm, **OPTIONS)
    for result, question in zip(results, prompts, strict=True):
        check(result.tree, folder, question)
    others = asyncio.run(ps.asearch(prompts, policy=FakeAsyncPolicy(ToyLM(letters="ab;.")), scorer=prm, **OPTIONS))
    for mine, other in zip(results, others, strict=True):
        assert mine.text == other.text
        assert mine.value == pytest.approx(other.value, abs=1e-6)
    assert prm.prm.tree.used == 0


def test_generate_takes_it_with_the_prompts_as_text(prm: ps.StepPRM, folder: Path) -> None:
    model, tokenizer = llama(3), byte_tokenizer()
    ps.enable(model, tokenizer)
    inputs = tokenizer(QUESTION, return_tensors="pt")
    how: dict[str, Any] = {"strategy": ps.Beam(2, 2), "steps": ps.StepRule(None, max_tokens=4), "seed": 1}
    guidance = ps.PRMGuidance(prm, prompts=[QUESTION], **how)
    out = model.generate(**inputs, max_new_tokens=8, return_dict_in_generate=True, prm_guidance=guidance)
    check(out.prm[0].tree, folder)
    assert out.prm[0].value == out.prm[0].node.reward  # "last", which its authors use
    with pytest.raises(ValueError, match=r"'prm' writes the question in its own format.*PRMGuidance\(prompts="):
        model.generate(**inputs, max_new_tokens=8, prm_guidance=ps.PRMGuidance(prm, **how))


def test_it_is_a_prover_and_has_one(prm: ps.StepPRM, folder: Path) -> None:
    prover = ps.StepPRM(prm.prm, prm.tokenizer, format="rlhflow", name="prover")
    value = Advantage(alpha=0.5, value="last")
    (result,) = ps.search([QUESTION], policy=policy(), scorer=prm, prover=prover, value=value, **OPTIONS)
    check(result.tree, folder)
    assert result.node is not None
    assert result.value == pytest.approx(result.node.reward + 0.5 * result.node.reward_of("prover"))
    (bare,) = ps.search([QUESTION], policy=policy(), scorer=prm, prover=prover, **OPTIONS)
    assert bare.node is not None
    assert bare.value == pytest.approx(bare.node.reward + bare.node.reward_of("prover"))


def test_steering_and_training_refuse_it_by_name(prm: ps.StepPRM) -> None:
    model = ps.HFPolicy(hf_models.llama(0), hf_models.tokenizer())
    for refused in (
        lambda: ps.Steered(model, prm, 1.0),
        lambda: ps.search(["a"], policy=ps.Steer(1.0).wrap(model, prm), scorer=prm, strategy=ps.Steer(1.0)),
        lambda: OnlineUpdater(prm),
    ):
        with pytest.raises(TypeError, match="pair must be an ImplicitPRM, got StepPRM"):
            refused()


def test_an_implicit_pair_of_it_is_refused_by_its_head(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"'score.0.bias' is a reward model's head, .*StepPRM and OutcomeRM load it"):
        ps.ImplicitPRM.from_pretrained(folder, reference="policy")


def test_a_base_model_and_logits_as_wide_as_the_vocabulary_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="LlamaModel has no output embedding"):
        ps.StepPRM(llama(0).model, prm_tokenizer(), format="rlhflow")
    lm = publish(tmp_path / "lm", "rlhflow")  # whose logits are as wide as the vocabulary
    with pytest.raises(ValueError, match=r"format='trl': the checkpoint has no score.weight, the head"):
        ps.StepPRM.from_pretrained(lm, format="trl")
    with pytest.raises(ValueError, match=r"score\.weight is nothing: an outcome model has a head"):
        ps.OutcomeRM.from_pretrained(lm)


def test_a_marker_that_is_several_tokens_is_refused(tmp_path: Path) -> None:
    folder = publish(tmp_path / "x", "qwen_math")
    mine = ps.PRMFormat("mine", MarkerChat("<extra_1>"), FORMATS["qwen_math"].reading)
    with pytest.raises(ValueError, match=r"reads '<extra_1>' as \d+ tokens, where this format needs one"):
        ps.StepPRM.from_pretrained(folder, format=mine)
    with pytest.raises(ValueError, match=r"format='math_shepherd': the tokenizer does not read ' ки' as one token"):
        ps.StepPRM(llama(0), byte_tokenizer(), format="math_shepherd")
    # A word of the vocabulary that merges with what stands before it is no marker.
    merging = ps.PRMFormat("mine", MarkerChat("e."), FORMATS["rlhflow"].reading)
    with pytest.raises(ValueError, match=r"as other tokens between steps|as 2 tokens"):
        ps.StepPRM.from_pretrained(publish(tmp_path / "y", "rlhflow"), format=merging)


def test_a_generation_prompt_that_no_answer_begins_with_is_refused(tmp_path: Path) -> None:
    folder = publish(tmp_path / "x", "rlhflow")
    tokenizer = ps.StepPRM.from_pretrained(folder, format="rlhflow").tokenizer
    template = tokenizer.chat_template
    try:
        tokenizer.chat_template = template.replace(
            "{% if add_generation_prompt %}", "{% if add_generation_prompt %}<|im_start|>think"
        )
        assert tokenizer.chat_template != template
        with pytest.raises(ValueError, match="generation prompt is not what it writes before an assistant's answer"):
            ps.StepPRM.from_pretrained(folder, format="rlhflow")
    finally:
        tokenizer.chat_template = template


def test_questions_that_leave_no_room_are_refused_before_anything_is_sampled(prm: ps.StepPRM) -> None:
    short = ps.StepPRM(prm.prm, prm.tokenizer, format="rlhflow", too_long="keep")
    sampler = policy()
    with pytest.raises(ValueError, match=r"the prompt has \d+ tokens with one step in the format of 'prm', .* 4096"):
        ps.search([QUESTION * 900], policy=sampler, scorer=short, **OPTIONS)
    assert not sampler.forward_calls


def test_a_file_names_an_ensemble(tmp_path: Path, folder: Path) -> None:
    publish(tmp_path / "rm", "universal")
    members = [str(folder), {"model": str(tmp_path / "rm"), "format": "outcome", "name": "whole"}]
    path = tmp_path / "both.json"
    path.write_text(json.dumps({"scorers": members, "reduce": "lcb", "k": 0.5, "weights": {"prm": 2, "whole": 1}}))
    both = load_scorer(path, name="both")
    assert isinstance(both, ps.Ensemble)
    assert ([member.name for member in both.scorers], both.name, both.reduce, both.k) == (
        ["prm", "whole"],
        "both",
        "lcb",
        0.5,
    )
    (result,) = ps.search([QUESTION], policy=policy(), scorer=both, **OPTIONS)
    check(result.tree, folder)
    with pytest.raises(ValueError, match="given only as token ids"):
        ps.search([[5, 6]], policy=policy(), scorer=both, **OPTIONS)
    for content, message in (
        ([], 'an object with "scorers"'), ({"scorers": [3]}, r"scorers\[0\] must be a hub id or folder"),
        ({"scorers": [str(folder)], "reduce": "max"}, "both.json: reduce='max'"),
        ({"scorers": [str(folder)], "how": 1}, "both.json: .*how"),
    ):  # fmt: skip
        path.write_text(json.dumps(content))
        with pytest.raises(ValueError, match=message):
            load_scorer(path)
    with pytest.raises(ValueError, match="is an ensemble, whose members have formats"):
        load_scorer(path, "trl")
