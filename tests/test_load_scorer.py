"""load_scorer: what a checkpoint is, told by its files or by a name, and adapters on a body."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from prm_models import QUESTION, Plain, publish
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import prm_search as ps
from prm_search.commands import BadInput, models
from prm_search.models.placement import shipped
from prm_search.scorers.explicit.formats import FORMATS
from prm_search.scorers.kinds import AUTO, KINDS, OUTCOME, PAIR, STEP_FORMATS
from prm_search.scorers.load import load_scorer

STEPS = ["2 plus 3 is 5.", "5 times 4 is 20."]


def outcome(folder: Path) -> Path:
    """The same files with the class of a sequence classifier, and of no known name."""
    publish(folder, "universal")
    return folder


def test_every_format_has_a_name_among_the_kinds() -> None:
    assert set(STEP_FORMATS) == set(FORMATS)
    assert (AUTO, *STEP_FORMATS, OUTCOME, PAIR) == KINDS


def test_a_checkpoint_is_told_by_its_files(tmp_path: Path) -> None:
    assert isinstance(load_scorer(shipped(), name="mine"), ps.ImplicitPRM)
    step = load_scorer(publish(tmp_path / "any", "qwen_math"), name="mine", too_long="keep")
    assert isinstance(step, ps.StepPRM)
    assert (step.format, step.name, step.too_long) == (FORMATS["qwen_math"], "mine", "keep")
    assert isinstance(load_scorer(outcome(tmp_path / "rm"), "outcome"), ps.OutcomeRM)
    universal = load_scorer(tmp_path / "rm", "universal")
    assert isinstance(universal, ps.StepPRM)
    assert universal.format is FORMATS["universal"]


@pytest.mark.parametrize(
    ("format", "message"),
    [
        ("universal", r"has a score head, which does not tell its format: pass format=, one of universal, outcome$"),
        ("trl", r"has a score head, .* one of trl, trl_blank_line, pure$"),
        ("rlhflow", r"has no head of its own, .* one of math_shepherd, .*rlhflow, granite, pair$"),
    ],
)
def test_what_could_be_several_things_is_refused_with_their_names(tmp_path: Path, format: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_scorer(publish(tmp_path / "mine", format))
    with pytest.raises(BadInput, match=r"--scorer .*mine: .*pass --prm-format, one of "):
        models.load_scorer(str(tmp_path / "mine"))


def test_unknown_formats_and_missing_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"format='qwen' is unknown; it is one of auto, qwen_math, .*outcome, pair$"):
        load_scorer(tmp_path, "qwen")
    with pytest.raises(FileNotFoundError, match="is not a folder with a model"):
        load_scorer(tmp_path / "none")
    with pytest.raises(FileNotFoundError, match="there are no weights"):
        load_scorer(tmp_path)


def lora(folder: Path, body: Path) -> Path:
    """An adapter of random weights on a body."""
    base = AutoModelForCausalLM.from_pretrained(body)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        made = get_peft_model(base, LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False))
    made.peft_config["default"].base_model_name_or_path = str(body)
    made.save_pretrained(folder)
    return folder


def merged(folder: Path, body: Path, adapter: Path) -> Path:
    """The body with the adapter's product added, by its formula: W + alpha / r * B A."""
    shutil.copytree(body, folder)
    state, added = load_file(body / "model.safetensors"), load_file(adapter / "adapter_model.safetensors")
    for name in [name for name in added if ".lora_A." in name]:
        place = name.removeprefix("base_model.model.").replace(".lora_A", "")
        config = LoraConfig.from_pretrained(adapter)
        state[place] = (
            state[place] + config.lora_alpha / config.r * added[name.replace("lora_A", "lora_B")] @ added[name]
        )
    save_file(state, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize("format", ["granite", "skywork"])
def test_an_adapter_on_a_body_scores_as_the_merged_weights(tmp_path: Path, format: str) -> None:
    body = publish(tmp_path / "body", format)
    adapter = lora(tmp_path / "granite-3.3-8b-lora-math-prm", body)
    plain = Plain(merged(tmp_path / "merged", body, adapter), format)
    for prm in (
        ps.StepPRM.from_pretrained(body, format=format, adapter=adapter),
        *([ps.StepPRM.from_pretrained(adapter)] if format == "granite" else []),
    ):
        (scores,) = prm.score([QUESTION], [STEPS])
        assert scores.step_scores == pytest.approx(plain.scores(STEPS), abs=1e-4)
    with pytest.raises(ValueError, match="leave out base="):
        ps.StepPRM.from_pretrained(body, format=format, adapter=adapter, base=body)
