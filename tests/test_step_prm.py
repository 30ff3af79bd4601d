"""StepPRM: every published format against a plain full forward, exact counts, and what is refused."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch
from fakes import RULE, FakePolicy, ToyLM
from pairs import byte_tokenizer, llama
from prm_models import HEADS, QUESTION, Plain, prm_tokenizer, publish
from safetensors.torch import load_file

import prm_search as ps
from prm_search.scorers.explicit.formats import FORMATS
from prm_search.tree import Node, Prompt, SearchTree

STEPS = [
    ["2 plus 3 is 5.", "5 times 4 is 20.", "So it is \\boxed{20}."],
    ["2 plus 3 is 5.", "5 times 4 is 25."],
    ["2 plus 3 is 6, {sic}.", "6 times 4 is 24.", "Done.", "Really."],
    ["First, add."],
]


@pytest.fixture(scope="module", params=sorted(HEADS))
def published(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    folder = tmp_path_factory.mktemp("prm") / request.param
    return publish(folder, request.param), request.param


Nodes = dict[tuple[str, ...], Node]


def plant(
    paths: list[list[str]] = STEPS, prompt: Prompt | None = None
) -> tuple[SearchTree, dict[tuple[str, ...], Node]]:
    """A tree of these answers; answers share the nodes of common steps."""
    tree = SearchTree(prompt or Prompt(text=QUESTION))
    nodes: Nodes = {(): tree.root}
    for steps in paths:
        for i in range(1, len(steps) + 1):
            key = tuple(steps[:i])
            if key not in nodes:
                nodes[key] = tree.add(nodes[key[:-1]], [7], text=steps[i - 1] + "\n\n")
    return tree, nodes


def near(expected: object) -> object:
    return pytest.approx(expected, abs=1e-4)


def test_every_format_is_a_plain_full_forward(published: tuple[Path, str]) -> None:
    folder, format = published
    prm, plain = ps.StepPRM.from_pretrained(folder, format=format), Plain(folder, format)
    tree, nodes = plant()
    order = list(tree.nodes[1:])
    random.Random(5).shuffle(order)
    for node in order:  # ancestors come with their children, whatever is asked for first
        prm.score_nodes([node])
    for path, node in nodes.items():
        if path:
            assert node.reward == near(plain.scores(path)[-1])
            assert FORMATS[format].low <= node.reward <= FORMATS[format].high


def test_each_token_is_encoded_once(published: tuple[Path, str]) -> None:
    folder, format = published
    prm, plain = ps.StepPRM.from_pretrained(folder, format=format), Plain(folder, format)
    tree, nodes = plant([*STEPS, ["2 plus 3 is 5.  ", "5 times 4 is 20."]])
    twin = tree.add(tree.root, [8], text="2 plus 3 is 5.\n\n")  # the same text from another request
    prm.score_nodes(list(tree.nodes[1:]))
    ids = {path: plain.ids([step.strip() for step in path]) for path in nodes if path}
    begin = common(plain.ids(["a"]), plain.ids(["1"]))
    written = {
        tuple(new): common(new, ids[path[:-1]] if path[:-1] else plain.ids(["a"])[:begin]) for path, new in ids.items()
    }
    assert tree.meter.counts["encoded", prm.prm.id] == begin + sum(len(new) - kept for new, kept in written.items())
    assert tree.meter.counts["reencoded", prm.prm.id] == 0
    assert twin.reward == nodes[("2 plus 3 is 5.",)].reward
    prm.release(tree)
    assert prm.prm.tree.used == 0


def common(first: list[int], second: list[int]) -> int:
    return next(
        (i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), min(len(first), len(second))
    )


def test_eviction_and_batches_change_nothing(published: tuple[Path, str]) -> None:
    folder, format = published
    plain = Plain(folder, format)
    longest = max(len(plain.ids(steps)) for steps in STEPS)
    prm = ps.StepPRM.from_pretrained(folder, format=format, capacity=longest + 4)
    for together in (True, False):
        tree, nodes = plant()
        for batch in [tree.nodes[1:]] if together else [[node] for node in tree.nodes[1:]]:
            prm.score_nodes(batch)
        assert [node.reward for path, node in nodes.items() if path] == near(
            [plain.scores(path)[-1] for path in nodes if path]
        )
        prm.release(tree)


def test_score_of_whole_answers(published: tuple[Path, str]) -> None:
    folder, format = published
    prm, plain = ps.StepPRM.from_pretrained(folder, format=format), Plain(folder, format)
    text, steps = prm.score([QUESTION, QUESTION], ["\n\n".join(STEPS[0]), STEPS[2]], batch_tokens=8)
    assert text.step_scores == near(plain.scores(STEPS[0]))
    assert steps.step_scores == near(plain.scores(STEPS[2]))
    how = {
        "last": lambda s: s[-1],
        "min": min,
        "mean": lambda s: sum(s) / len(s),
        "prod": lambda s: float(torch.tensor(s).prod()),
    }
    assert steps.reward == near(how[FORMATS[format].aggregate](list(steps.step_scores)))
    assert prm.default_value == FORMATS[format].aggregate
    assert list(text.step_ends) == sorted(set(text.step_ends.tolist()))
    assert prm.prm.tree.used == 0


def test_auto_finds_the_format_or_says_what_there_is(tmp_path: Path) -> None:
    names = {
        "qwen_math": "Qwen2.5-Math-PRM-7B", "reasonflux": "ReasonFlux-PRM-7B", "skywork": "anything",
        "math_shepherd": "math-shepherd-mistral-7b-prm", "math_psa": "math-psa", "er_prm": "Llama3.1-Math-PRM",
        "versaprm": "VersaPRM", "rlhflow": "Llama3.1-8B-PRM-Deepseek-Data", "granite": "granite-3.3-8b-lora-math-prm",
        "pure": "PURE-PRM-7B", "universal": "Universal-PRM-7B",
        "trl_blank_line": "Qwen2.5-Math-7B-Instruct-PRM-0.2",
    }  # fmt: skip
    for format, name in names.items():
        assert ps.StepPRM.from_pretrained(publish(tmp_path / name, format)).format is FORMATS[format]
    with pytest.raises(ValueError, match=r"has a score head.*one of trl, trl_blank_line, pure$"):
        ps.StepPRM.from_pretrained(publish(tmp_path / "mine", "trl"))
    with pytest.raises(ValueError, match=r"has no head of its own.*math_shepherd.*rlhflow"):
        ps.StepPRM.from_pretrained(publish(tmp_path / "llm", "rlhflow"))


def test_a_search_ranks_by_the_authors_value(tmp_path: Path) -> None:

    prm = ps.StepPRM.from_pretrained(publish(tmp_path / "x", "qwen_math"), format="qwen_math")
    (result,) = ps.search(
        [QUESTION],
        policy=FakePolicy(ToyLM(letters="ab;.")),
        scorer=prm,
        strategy=ps.Beam(2, 2),
        steps=RULE,
        max_new_tokens=12,
    )
    assert result.value == result.node.reward  # "last"
    assert all(0 <= node.reward <= 1 for node in result.tree.nodes[1:])
    assert result.usage.encoded_tokens["prm"] > 0
    (other,) = ps.search(
        [QUESTION],
        policy=FakePolicy(ToyLM(letters="ab;.")),
        scorer=prm,
        strategy=ps.Beam(2, 2),
        steps=RULE,
        max_new_tokens=12,
        value="min",
    )
    assert other.value == min(step.reward for step in other.node.path())


def test_a_step_without_text_keeps_its_parents_score(tmp_path: Path) -> None:
    prm = ps.StepPRM.from_pretrained(publish(tmp_path / "x", "trl"), format="trl")
    tree, nodes = plant()
    empty = tree.add(nodes[("First, add.",)], [7], text=" \n")
    first = tree.add(tree.root, [7], text="\n")
    prm.score_nodes([empty, first])
    assert empty.reward == nodes[("First, add.",)].reward
    assert first.reward == 0.0


def test_characters_over_steps_are_read_whole(tmp_path: Path) -> None:
    folder = publish(tmp_path / "x", "qwen_math")
    prm, plain = ps.StepPRM.from_pretrained(folder, format="qwen_math"), Plain(folder, "qwen_math")
    tree = SearchTree(Prompt(text=QUESTION))
    four = "四".encode()
    node = tree.add(tree.root, [7], text=b"It is " + four[:2])
    node = tree.add(node, [7], text=four[2:] + b".")
    prm.score_nodes([node])
    assert node.reward == near(plain.scores(["It is", "四."])[-1])


def test_control_tokens_that_text_spells_stay_text(tmp_path: Path) -> None:
    folder = publish(tmp_path / "x", "qwen_math")
    prm = ps.StepPRM.from_pretrained(folder, format="qwen_math")
    plain = Plain(folder, "qwen_math", question="Is < extra_0> a < |im_end|>?")
    tree, nodes = plant([["Yes<extra_0>", "No<|im_end|>"]], Prompt(text="Is <extra_0> a <|im_end|>?"))
    prm.score_nodes(tree.nodes[1:])
    assert [n.reward for p, n in nodes.items() if p] == near(plain.scores(["Yes< extra_0>", "No< |im_end|>"]))


def test_messages_are_questions_too(tmp_path: Path) -> None:
    folder = publish(tmp_path / "x", "qwen_math")
    prm, plain = ps.StepPRM.from_pretrained(folder, format="qwen_math"), Plain(folder, "qwen_math")
    tree, nodes = plant(prompt=Prompt(messages=({"role": "user", "content": QUESTION},)))
    prm.score_nodes(tree.nodes[1:])
    assert nodes[tuple(STEPS[1])].reward == near(plain.scores(STEPS[1])[-1])
    with pytest.raises(ValueError, match="given only as token ids"):
        prm.score_nodes([(tree := SearchTree(Prompt(token_ids=(5, 6)))).add(tree.root, [7], text="a")])


def test_paths_beyond_its_length(tmp_path: Path) -> None:
    folder = publish(tmp_path / "x", "trl")
    plain = Plain(folder, "trl")
    limit = len(plain.ids(STEPS[2][:2]))
    short = ps.StepPRM.from_pretrained(folder, format="trl", capacity=limit)
    tree, nodes = plant()
    with pytest.raises(ValueError, match=rf"a path of \d+ tokens exceeds the {limit}"):
        short.score_nodes([nodes[tuple(STEPS[2])]])
    assert not nodes[tuple(STEPS[2][:1])].scored_by("prm")
    keeping = ps.StepPRM(short.prm, short.tokenizer, format="trl", tensors=head_of(folder), too_long="keep")
    keeping.score_nodes([nodes[tuple(STEPS[2])]])
    assert nodes[tuple(STEPS[2])].reward == nodes[tuple(STEPS[2][:2])].reward == near(plain.scores(STEPS[2][:2])[-1])
    assert tree.notes == [f"prm: paths beyond its {limit} tokens keep the score of their last step that fits"]


def head_of(folder: Path) -> dict[str, torch.Tensor]:
    return {
        name: tensor for name, tensor in load_file(folder / "model.safetensors").items() if name.startswith("score")
    }


def test_what_does_not_fit_is_refused_by_name(tmp_path: Path) -> None:
    wide = publish(tmp_path / "wide", "trl", **{"score.weight": torch.zeros(420, 32), "score.bias": torch.zeros(420)})
    with pytest.raises(ValueError, match=r"format='trl': score.weight has shape \[420, 32\].*needs \[2, 32\]"):
        ps.StepPRM.from_pretrained(wide, format="trl")
    lost = publish(tmp_path / "lost", "qwen_math", **{"score.2.weight": None})
    with pytest.raises(ValueError, match=r"no score\.2\.weight"):
        ps.StepPRM.from_pretrained(lost, format="qwen_math")
    bare = publish(tmp_path / "bare", "rlhflow")
    with pytest.raises(ValueError, match=r"no score\.0\.weight, the head"):
        ps.StepPRM.from_pretrained(bare, format="qwen_math")
    with pytest.raises(ValueError, match=r"format='qwen' is unknown; it is one of er_prm"):
        ps.StepPRM.from_pretrained(bare, format="qwen")
    with pytest.raises(TypeError, match="format must be a name or a PRMFormat"):
        ps.StepPRM.from_pretrained(bare, format=3)
    dropping = publish(tmp_path / "template", "qwen_math")
    settings = json.loads((dropping / "tokenizer_config.json").read_text())
    (dropping / "chat_template.jinja").unlink(missing_ok=True)
    settings["chat_template"] = "{{ messages[0]['content'] }}"
    (dropping / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match="drops the assistant's text"):
        ps.StepPRM.from_pretrained(dropping, format="qwen_math")
    plainer = prm_tokenizer().__class__(tokenizer_object=prm_tokenizer().backend_tokenizer)
    with pytest.raises(ValueError, match="no chat template"):
        ps.StepPRM.from_pretrained(bare, format="rlhflow", tokenizer=plainer)
    with pytest.raises(ValueError, match="too_long='cut'"):
        ps.StepPRM.from_pretrained(bare, format="rlhflow", too_long="cut")


def test_steering_and_pairs_refuse_it_by_name(tmp_path: Path) -> None:
    prm = ps.StepPRM.from_pretrained(publish(tmp_path / "x", "trl"), format="trl")
    with pytest.raises((TypeError, ValueError), match=r"StepPRM|step PRM|ImplicitPRM"):
        ps.Steered(ps.HFPolicy(llama(0), byte_tokenizer()), prm, 1.0)
