"""Stop strings: a response ends with the token that completes the first of them, over whatever tokens and steps."""

from __future__ import annotations

import copy
import json
import pickle
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_vllm import install
from fakes import FakePolicy, FakeScorer, SpelledLM, ids, sampling
from hypothesis import example, given, strategies as st
from pairs import byte_tokenizer, llama, metaspace_tokenizer
from spelled import MODEL, POLICIES, TOKENIZER, found

import prm_search as ps
from prm_search.cli import main
from prm_search.protocols import BlockingPolicy
from prm_search.steps import StepRule
from prm_search.stop_strings import StopMatch, StopMatcher, stop_strings
from prm_search.tokens import TokenText
from prm_search.training.rollouts import Problem, sample_rollouts
from prm_search.tree import Prompt, SearchTree

TEXT = "so 6 * 7 = 42 ∎ Q: next? 四十二"
STOPS = ["Q:", "∎ Q", "四", "so", " 42 ∎ Q: n"]
RULES = [StepRule(None, max_tokens=1), StepRule(None, max_tokens=3), StepRule(None, confidence=1.0), StepRule()]


@pytest.fixture(autouse=True)
def _vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch)


def pieces(name: str, text: str) -> list[bytes]:
    """The bytes of each token that a policy says a text in."""
    if name == "hf":
        return [TokenText(TOKENIZER).piece(i) for i in TOKENIZER(text)["input_ids"]]
    return [bytes([b]) for b in text.encode()]


def tokens_up_to(parts: Sequence[bytes], size: int) -> int:
    """How many of these it takes to have so many bytes."""
    return next(n for n in range(len(parts) + 1) if len(b"".join(parts[:n])) >= size)


# -- the matcher -------------------------------------------------------------------------------------------------------


def first_completed(data: bytes, stop: Sequence[bytes]) -> tuple[int, int] | None:
    """Start and end of what completes first, of two the longer: one byte at a time."""
    for end in range(1, len(data) + 1):
        starts = [end - len(string) for string in stop if data[:end].endswith(string)]
        if starts:
            return min(starts), end
    return None


@given(
    text=st.text(alphabet="ab;é四", max_size=20),
    stop=st.lists(st.text(alphabet="ab;é四", min_size=1, max_size=4), min_size=1, max_size=3),
    cuts=st.sets(st.integers(1, 60)),
    known=st.integers(0, 6),
)
@example(text="aab", stop=["ab"], cuts={1, 2}, known=0)
@example(text="xyab", stop=["b", "ab", "yab"], cuts={3}, known=1)
def test_the_first_to_complete_is_found_however_the_text_is_cut(
    text: str, stop: list[str], cuts: set[int], known: int
) -> None:
    data = text.encode()
    wanted = first_completed(data, [string.encode() for string in stop])
    if wanted is not None and wanted[1] <= known:
        known = 0
    bounds = sorted({min(known, len(data)), *(cut for cut in cuts if known < cut < len(data)), len(data)})
    matcher = StopMatcher(stop, data[: bounds[0]])
    for begin, end in pairwise(bounds):
        match = matcher.copy().feed(data[begin:end])
        assert matcher.feed(data[begin:end]) == match  # a copy says the same, and changes nothing
        if match is not None:
            assert (end - match.behind - match.length, end - match.behind) == wanted
            return
    assert wanted is None or wanted[1] <= bounds[0]


def test_what_was_complete_before_is_not_found_again() -> None:
    matcher = StopMatcher(["ab", "abc;"], b"xab")
    assert matcher.feed(b"") is None
    assert matcher.feed(b"c") is None
    assert matcher.feed(b";d") == StopMatch(4, 1)


# -- policies ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kept", [False, True])
@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("name", POLICIES)
def test_a_response_ends_with_the_token_that_completes_it_and_its_text_before_or_behind_it(
    name: str, rule: StepRule, kept: bool
) -> None:
    parts = pieces(name, TEXT)
    for stop in STOPS:
        start = TEXT.index(stop)
        shown = TEXT[: start + len(stop)] if kept else TEXT[:start]
        result = found(POLICIES[name](TEXT), steps=rule, stop=stop, include_stop_str=kept, strategy=ps.BestOfN(1))
        assert result.text == shown
        assert (result.node.finish, result.stopped) == ("stop", "finished")
        assert len(result.token_ids) == tokens_up_to(parts, len(TEXT[: start + len(stop)].encode()))
        if name != "vllm" and name != "async vllm":  # engines that hand over several tokens at once draw beyond it
            assert result.usage.sampled_tokens == {"policy": len(result.token_ids)}


@pytest.mark.parametrize("name", POLICIES)
def test_of_several_the_first_to_complete_counts_and_one_that_never_comes_ends_nothing(name: str) -> None:
    result = found(POLICIES[name](TEXT), steps=RULES[1], stop=["next", "42 ∎", "= 42", "never"])
    assert result.text == "so 6 * 7 "
    assert found(POLICIES[name](TEXT), steps=RULES[1], stop=["never"]).text == TEXT


def test_a_beam_of_steps_ends_where_it_lies_in_several() -> None:
    for name in POLICIES:
        result = found(
            POLICIES[name](TEXT), steps=RULES[1], stop="= 42 ∎", strategy=ps.Beam(1, 2), scorer=FakeScorer(),
            answer="number",
        )  # fmt: skip
        assert (result.text, result.answer) == ("so 6 * 7 ", "7")
        path = result.node.path()
        assert not any("= 42 ∎".encode() in node.text_bytes for node in path)  # it lies in several steps
        assert b"".join(node.text_bytes for node in path).decode() == "so 6 * 7 = 42 ∎"
        assert result.node.text == ""  # its own bytes are all of the stop string


def test_the_prompt_ends_nothing() -> None:
    prompt = ids("x QQ")
    policy = FakePolicy(SpelledLM(": Q: a", prompt=len(prompt)))
    assert found(policy, prompt, stop="Q:").text == ": "
    assert found(FakePolicy(SpelledLM(":a", prompt=len(prompt))), prompt, stop="QQ:").text == ":a"


def test_a_path_that_is_cut_inside_a_stop_string_shows_what_it_has_of_it() -> None:
    for size in range(len("so 6 * 7 = 42")):
        result = found(POLICIES["fake"](TEXT), steps=RULES[1], stop="7 = 42 ∎", max_new_tokens=size + 1)
        assert (result.text, result.node.finish) == (TEXT[: size + 1], "length")


def test_nothing_behind_it_is_scored_or_voted_for() -> None:
    scorer = FakeScorer(lambda prompt, path: 1.0)
    text = "\\boxed{1}\n\nQ: \\boxed{2}"
    result = found(FakePolicy(SpelledLM(text)), stop="Q:", scorer=scorer, answer="boxed", select="majority")
    assert result.answer == "1"
    assert result.node.q == len("\\boxed{1}\n\nQ:")
    assert [vote.answer for vote in result.selection.votes] == ["1"]


def test_a_pair_with_another_tokenizer_reads_nothing_behind_it() -> None:
    """The token "\n\n" completes the stop string with its first line break."""
    policy_tokenizer = byte_tokenizer(lines=True)
    text = "Step 1: add two and three.\n\nThe answer"
    policy = POLICIES["hf"](text)
    policy.tokenizer, policy.token_text = policy_tokenizer, TokenText(policy_tokenizer)
    policy.sampler.script = list(policy_tokenizer(text)["input_ids"])
    tokenizer = metaspace_tokenizer()
    pair = ps.ImplicitPRM(llama(3, vocab=len(tokenizer)), llama(4, vocab=len(tokenizer)), tokenizer=tokenizer)
    (result,) = ps.search(
        [Prompt(text="What?")], policy=policy, scorer=pair, strategy=ps.BestOfN(1), temperature=0.0, stop=".\n"
    )
    assert result.text == "Step 1: add two and three"
    assert policy.token_text.piece(result.token_ids[-1]) == b"\n\n"
    (whole,) = pair.score([Prompt(text="What?")], ["Step 1: add two and three.\n"], append_eos=[False])
    assert result.node.q == pytest.approx(float(whole.q[-1]), abs=1e-4)


def test_saved_copied_and_pickled_trees_show_the_same_text() -> None:
    result = found(POLICIES["hf"](TEXT), steps=RULES[0], stop="∎ Q")
    tree = result.tree
    for twin in (SearchTree.from_json(tree.to_json()), pickle.loads(pickle.dumps(tree)), copy.deepcopy(tree)):
        assert twin.nodes[result.node.index].path_text() == result.text == "so 6 * 7 = 42 "
        assert [node.text for node in twin] == [node.text for node in tree]


def test_rollouts_end_at_it_and_labels_are_of_what_is_shown() -> None:
    how = sampling(steps=RULES[1], temperature=0.0, max_new_tokens=64, stop=("∎",))
    problem = Problem(Prompt(token_ids=(5,)), "so 6 * 7 = 42 ")
    for name in ("fake", "hf", "vllm"):
        (rollout,) = sample_rollouts(
            [problem], policy=POLICIES[name](TEXT), n=1, sampling=how, label=lambda text, answer: (text, text == answer)
        )
        assert (rollout.text, rollout.label, rollout.finish) == ("so 6 * 7 = 42 ", True, "stop")


# -- arguments ---------------------------------------------------------------------------------------------------------


def test_a_string_and_strings_are_the_same() -> None:
    assert stop_strings("ab") == stop_strings(["ab"]) == stop_strings(("ab",)) == ("ab",)
    assert stop_strings(None) == stop_strings([]) == ()
    assert sampling(stop="ab") == sampling(stop=["ab"])
    assert hash(sampling(stop=["ab"])) == hash(sampling(stop=("ab",)))


@pytest.mark.parametrize(
    ("stop", "error", "message"),
    [
        ("", ValueError, "stop='': an empty string ends no response"),
        (["a", ""], ValueError, r"stop=\['a', ''\]: an empty string"),
        (5, TypeError, "stop=5: a string, strings or None is needed, not int"),
        (b"a", TypeError, "stop=b'a': a string, strings or None is needed, not bytes"),
        (["a", 5], TypeError, r"stop=\['a', 5\]: a string, strings or None is needed, not int"),
        ("\ud800", ValueError, "stop=.*surrogates not allowed"),
    ],
)
def test_bad_stop_strings_are_named(stop: Any, error: type[Exception], message: str) -> None:
    policy = POLICIES["fake"](TEXT)
    with pytest.raises(error, match=message):
        found(policy, stop=stop)
    assert policy.forward_calls == 0


def test_a_flag_is_a_flag() -> None:
    with pytest.raises(TypeError, match="include_stop_str='no': True or False"):
        found(POLICIES["fake"](TEXT), stop="a", include_stop_str="no")


def test_a_policy_that_would_ignore_them_is_refused() -> None:
    class Own(BlockingPolicy):
        id = "own"

        def encode(self, prompt: Prompt) -> tuple[int, ...]:
            return prompt.token_ids or (1,)

        def run(self, requests: Sequence[Any]) -> list[list[Any]]:
            raise AssertionError("nothing is to be drawn")

    with pytest.raises(ValueError, match=r"stop=\('a',\): this policy takes no stop strings"):
        found(Own(), stop="a")
    how = sampling(stop="a")
    with pytest.raises(ValueError, match="this policy takes no stop strings"):
        list(sample_rollouts([], policy=Own(), n=1, sampling=how, label=lambda text, answer: (None, False)))


def test_the_command_line_has_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A random model: what it says without a stop string tells what it has to say with one."""
    folder = str(tmp_path / "model")
    MODEL.save_pretrained(folder)
    TOKENIZER.save_pretrained(folder)
    args = ["generate", "--policy", folder, "--prompt", "a", "--strategy", "best_of_n", "--n", "1", "--json"]
    args += ["--max-new-tokens", "12", "--temperature", "0"]

    def text(*more: str) -> str:
        assert main([*args, *more]) == 0
        return str(json.loads(capsys.readouterr().out)["text"])

    whole = text()
    end = next(c for c in whole[1:] if c.isascii() and c.isprintable())
    start = whole.index(end)
    assert text("--stop", "never to come", "--stop", end) == whole[:start]
    assert text("--stop", end, "--include-stop-str") == whole[: start + 1]
    assert main([*args, "--stop", ""]) == 2
    assert "an empty string ends no response" in capsys.readouterr().err


def test_log_probabilities_stay_those_of_the_tokens() -> None:
    with_stop = found(POLICIES["hf"](TEXT), steps=RULES[1], stop="∎", strategy=ps.BestOfN(1))
    without = found(POLICIES["hf"](TEXT), steps=RULES[1], strategy=ps.BestOfN(1))
    cut = np.concatenate([node.logprobs for node in with_stop.node.path()])
    whole = np.concatenate([node.logprobs for node in without.node.path()])
    assert cut == pytest.approx(whole[: len(cut)], abs=1e-5)
