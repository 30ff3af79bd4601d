"""The released EurusPRM usage against a separate, plain implementation of what was read of it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from pairs import byte_tokenizer, llama

from prm_search import ImplicitPRM
from prm_search.scorers.implicit.eurus import boundaries, eurus_score, format_steps
from prm_search.scorers.implicit.implicit_prm import ConstantReference

LLAMA_3 = (
    "{% for m in messages %}<|start_header_id|>{{ m['role'] }}<|end_header_id|>\n\n{{ m['content'] }}<|eot_id|>"
    "{% endfor %}{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
HEADERS = ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
QUERIES = ["What is the sum of seven and eight?", "Add two and three."]
RESPONSES = ["Step 1: add seven.\n\nStep 2: Step by step, multiply five.\n\n Step 7: It is fifteen.", "It is five."]
COEF = 0.001


def chatml():
    return byte_tokenizer()


def llama_3(**given):
    words = byte_tokenizer(template=LLAMA_3, eos="</s>")
    words.add_special_tokens({"additional_special_tokens": HEADERS, "eos_token": "<|eot_id|>"} | given)
    return words


def plain_scores(model, reference, words, query, steps, *, mask_pad):
    """Whole-sequence forwards, log-ratio masked to the response, times the coefficient, cumsum, gathered."""
    whole = words.apply_chat_template(
        [{"role": "user", "content": query}, {"role": "assistant", "content": "\n\n".join(steps)}], tokenize=False
    )
    ids = words(whole, add_special_tokens=False)["input_ids"]
    at = []
    for n in range(len(steps) + 1):
        part = words.apply_chat_template(
            [{"role": "user", "content": query}, {"role": "assistant", "content": "\n\n".join(steps[:n])}],
            tokenize=False,
        ).strip()
        if n < len(steps) and part.endswith("<|eot_id|>"):
            part = part[: -len("<|eot_id|>")]
        if 0 < n < len(steps):
            part = part + "\n\n"
        at.append(len(words(part, add_special_tokens=False)["input_ids"]) - 2)
    x = torch.tensor([ids])
    pad = words.eos_token_id if words.pad_token_id is None else words.pad_token_id
    mask = (x != pad).long() if mask_pad else torch.ones_like(x)
    rows = []
    for lm in (model, reference):
        with torch.no_grad():
            table = torch.log_softmax(lm(x, attention_mask=mask).logits, -1)
        rows.append(torch.tensor([table[0, i - 1, ids[i]] for i in range(1, len(ids))]).float())
    ratio = rows[0] - rows[1]
    ratio[torch.arange(1, len(ids)) < at[0]] = 0
    return (COEF * ratio).cumsum(0)[torch.tensor(at[1:])].numpy()


@pytest.fixture(scope="module")
def models():
    return llama(1), llama(2)


def test_steps_are_cut_and_numbered_anew():
    assert format_steps(RESPONSES[0]) == [
        "Step 1: add seven.",
        "Step 2: step by step, multiply five.",
        "Step 3: It is fifteen.",
    ]
    assert format_steps("no mark") == ["Step 1: no mark"]
    assert format_steps(" \n") == []
    assert format_steps("Lead. Step 3: x") == ["Step 1: Lead.", "Step 2: x"]


@pytest.mark.parametrize("parity", [False, True])
@pytest.mark.parametrize("make", [chatml, llama_3])
def test_scores_are_those_of_a_plain_implementation(models, make, parity):
    words = make()
    pair = ImplicitPRM(*models, tokenizer=words, beta=0.05)
    for query, response, found in zip(
        QUERIES, RESPONSES, eurus_score(pair, QUERIES, RESPONSES, parity=parity), strict=True
    ):
        steps = format_steps(response)
        assert found.steps == tuple(steps)
        wanted = plain_scores(*models, words, query, steps, mask_pad=parity)
        np.testing.assert_allclose(found.accumulative, wanted, atol=COEF * 1e-3)
        np.testing.assert_allclose(found.single, np.diff(wanted, prepend=0), atol=COEF * 1e-3)
        assert found.single.sum() == pytest.approx(found.accumulative[-1], abs=1e-6)
        assert found.accumulative.dtype == np.float32
    assert pair.prm.tree.used == 0


def test_parity_masks_ends_of_turns_where_padding_is_the_end_of_sequence(models):
    """The trap: without a padding token, Llama-3's end of turn is masked out inside the prompt."""
    words = llama_3()
    words.pad_token = None
    pair = ImplicitPRM(*models, tokenizer=words)
    (query, *_), (response, *_) = QUERIES, RESPONSES
    steps = format_steps(response)
    (exact,) = eurus_score(pair, [query], [response])
    (parity,) = eurus_score(pair, [query], [response], parity=True)
    np.testing.assert_allclose(
        parity.accumulative, plain_scores(*models, words, query, steps, mask_pad=True), atol=COEF * 1e-3
    )
    np.testing.assert_allclose(
        exact.accumulative, plain_scores(*models, words, query, steps, mask_pad=False), atol=COEF * 1e-3
    )
    assert np.abs(parity.accumulative - exact.accumulative).max() > COEF * 0.1


def test_boundaries_in_chatml(models):
    """What the module says of ChatML: sums start with the prompt's last token, end with the next step's first."""
    words = byte_tokenizer(["Step 1: a\n\nStep 2: b\n\nStep 1"] * 4, lines=True)
    assert len(words("\n\n")["input_ids"]) == 1
    steps = ["Step 1: a", "Step 2: b"]
    ids, at = boundaries(words, "q", steps)
    prompt = words.apply_chat_template([{"role": "user", "content": "q"}], add_generation_prompt=True, tokenize=False)
    head = words(prompt)["input_ids"]
    first = words(prompt + steps[0] + "\n\n")["input_ids"]
    assert ids[: len(first)] == first
    assert at[0] == len(head) - 1
    assert at[1] + 1 == len(first)  # a position, so the token after the blank line
    assert ids[at[2] + 1] == words.eos_token_id


def test_steps_may_be_given_and_the_coefficient_scales(models):
    pair = ImplicitPRM(*models, tokenizer=chatml(), beta=0.7)
    steps = format_steps(RESPONSES[0])
    (cut,) = eurus_score(pair, QUERIES[:1], RESPONSES[:1])
    (given,) = eurus_score(pair, QUERIES[:1], [steps])
    (larger,) = eurus_score(pair, QUERIES[:1], [steps], coefficient=0.005)
    np.testing.assert_array_equal(cut.accumulative, given.accumulative)
    np.testing.assert_allclose(larger.accumulative, 5 * given.accumulative, rtol=1e-4)


def test_adapters_are_switched_in_parity_too():
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(llama(5), LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False)).eval()
    pair = ImplicitPRM(model, tokenizer=chatml())
    (exact,) = eurus_score(pair, QUERIES[:1], RESPONSES[:1])
    (parity,) = eurus_score(pair, QUERIES[:1], RESPONSES[:1], parity=True)
    np.testing.assert_allclose(exact.accumulative, parity.accumulative, atol=COEF * 1e-3)
    assert np.abs(exact.accumulative).max() > COEF * 0.1


def test_bad_input_is_named(models):
    pair = ImplicitPRM(*models, tokenizer=chatml())
    with pytest.raises(ValueError, match="queries has 1"):
        eurus_score(pair, ["a"], ["b", "c"])
    with pytest.raises(ValueError, match=r"responses\[0\] is empty"):
        eurus_score(pair, ["a"], ["  "])
    with pytest.raises(ValueError, match="coefficient"):
        eurus_score(pair, ["a"], ["b"], coefficient=float("nan"))
    free = ImplicitPRM(models[0], ConstantReference(-1.0), tokenizer=chatml())
    with pytest.raises(ValueError, match="parity"):
        eurus_score(free, ["a"], ["b"], parity=True)
