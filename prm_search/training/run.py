"""`train`: from rollouts to a folder that is a pair."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from os import PathLike
from pathlib import Path
from typing import Any

from ..files import one_writer
from ..models.checkpoint import Checkpoint
from ..models.load_report import check_report
from ..scorers.implicit.card import CARD, CARD_FORMAT
from .load_data import Data, load_data
from .pair_accuracy import count_pairs, pair_accuracy
from .recipe import Recipe
from .resuming import CHECKPOINTS, begin, settings_of

Progress = Callable[[str, int, int], object]


def train(
    model: str,
    rollouts: str | PathLike[str],
    out: str | PathLike[str],
    recipe: Recipe | None = None,
    *,
    revision: str | None = None,
    resume: bool = False,
    delimiter: str | None = None,
    arguments: Mapping[str, Any] | None = None,
    log: Callable[[str], object] | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Train an implicit PRM on outcome labels; `ImplicitPRM.from_pretrained(out)` is then the pair.

    The model is the reference too: its log-probabilities of all responses are computed once, filed beside the rollouts,
    and training runs one model. Under `accelerate launch` every process calls this.

    Args:
        model: hub id or folder of the checkpoint to begin with.
        rollouts: what `prm-search rollout` wrote, with a policy of the same tokenizer.
        out: folder for weights (or adapter), tokenizer, `pair.json`, `log.jsonl` and checkpoints.
        recipe: see Recipe; None for its defaults.
        revision: of the hub repository.
        resume: go on from the last checkpoint in `out`, if there is one.
        delimiter: of steps, noted in the card.
        arguments: further transformers.TrainingArguments (fsdp, gradient_checkpointing, warmup_steps, ...).
        log: is called with a line now and then.
        progress: is called often, in the main process, with the name of the phase ("reference", "training", "held
            out"), the work done, and the work in all.

    Returns:
        The card.

    Raises:
        ValueError: a number of the recipe is out of range, or the rollouts do not suit the recipe; `out` holds a pair
            or another run, or another process trains there; or the model's head is not understood.
        OSError: model or rollouts cannot be read, or out not be written.
        ImportError: accelerate, or for LoRA peft, is missing.
    """
    recipe = recipe or Recipe()
    for package in ("accelerate", *([] if recipe.lora is None else ["peft"])):
        if find_spec(package) is None:
            raise ImportError(f"training needs the package {package}: pip install 'prm-search[train]'")
    source = Checkpoint.of(model, revision)
    source.check_config()
    if source.gguf_file is not None or (source.local and source.file("adapter_config.json", {}) is not None):
        raise ValueError(f"model={model!r}: a checkpoint is needed, not a GGUF file or an adapter (merge it first)")
    if source.local and source.file("config.json", {}) is None:
        raise FileNotFoundError(f"there is no model in {model!r}: no config.json")
    folder = Path(out)
    if (folder / CARD).exists():
        raise ValueError(f"{folder} holds a pair already: name another folder")

    from transformers import AutoConfig, set_seed

    from ..engine.admission.context_limits import context_of

    where = source.where()
    config = AutoConfig.from_pretrained(source.path, **where)
    data = load_data(rollouts, recipe, context_of(config.get_text_config()))
    settings = settings_of(source, recipe, data, arguments)
    main = os.environ.get("RANK", "0") == "0"  # of the processes of one run, as torchrun and accelerate number them
    with one_writer(folder / "train") if main else nullcontext():
        last = begin(folder, settings, resume)
        set_seed(recipe.seed)
        metrics = _run(source, Path(rollouts).parent, folder, recipe, data, arguments or {}, last, log, progress)
        return _finish(source, folder, recipe, data, metrics, delimiter)


def _run(
    source: Checkpoint,
    cache: Path,
    folder: Path,
    recipe: Recipe,
    data: Data,
    arguments: Mapping[str, Any],
    last: str | None,
    log: Callable[[str], object] | None,
    progress: Progress | None,
) -> dict[str, Any]:
    """Train, and save weights or adapter. Returns what was measured."""
    import torch
    from transformers import AutoModelForCausalLM

    from .arguments import training_arguments
    from .logprobs import check_packs, freeze, response_forward, row_logprobs, without_dropout
    from .packing import packs
    from .trainer import PRMTrainer

    args = training_arguments(recipe, arguments, folder)
    if args.process_index:
        log = progress = None

    def told(what: str) -> Callable[[int, int], object] | None:
        return None if progress is None else partial(progress, what)

    lm, report = AutoModelForCausalLM.from_pretrained(
        source.path, dtype=torch.float32, output_loading_info=True, **source.where()
    )
    check_report(source.name, lm, report)
    top = max(max(max(row.prompt_ids), int(row.response_ids.max())) for row in data.rows)
    if top >= lm.get_input_embeddings().num_embeddings:
        raise ValueError(
            f"rollouts: token id {top} is not in the vocabulary of {source.name!r}; its policy had another"
        )
    without_dropout(lm)
    lm.to(args.device)
    pack = recipe.max_length if recipe.pack else None
    made: list[Any] = packs(data.items, recipe.max_length) if pack else data.items
    with response_forward(lm):
        if pack:
            check_packs(lm, made)
            if log is not None:
                rows_of = (row for item in data.items for row in item.rows)
                log(f"packed {sum(map(len, rows_of))} tokens into {sum(map(len, made))}, {len(made)} problems")
        identity = [os.path.realpath(source.path) if source.local else source.path, source.revision, source.stamp()]
        with args.main_process_first(desc="reference"):
            _add_reference(lm, data, recipe, identity, cache, log, told("reference"))
        trained = lm if recipe.lora is None else _adapted(lm, recipe.lora, source)
        freeze(lm, recipe.freeze_layers)
        use_cache = getattr(lm.config, "use_cache", True)
        trainer = PRMTrainer(
            trained, args, made, objective=recipe.objective, beta=recipe.scale, margin=recipe.margin, log=log,
            progress=told("training"),
        )  # fmt: skip
        trainer.train(resume_from_checkpoint=last)
        lm.config.use_cache = use_cache  # the Trainer switches it off, which the saved config would repeat
        trained.eval()
        metrics: dict[str, Any] = {
            "steps": trainer.state.global_step,
            "processes": args.world_size,
            "held_out_pair_accuracy": None,
            "held_out_pairs": count_pairs(data.held),
        }
        if data.held:
            values = row_logprobs(trained, data.held, bf16=recipe.bf16, pack=pack, progress=told("held out"))
            sums = [float((v - row.reference).sum()) for v, row in zip(values, data.held, strict=True)]
            metrics["held_out_pair_accuracy"] = pair_accuracy(data.held, sums)
    trainer.save_model(str(folder))
    (folder / "training_args.bin").unlink(missing_ok=True)  # the card has them
    if trainer.is_world_process_zero():
        lines = (json.dumps(entry) + "\n" for entry in steps_logged(trainer.state.log_history))
        (folder / "log.jsonl").write_text("".join(lines), encoding="utf-8")
    metrics["process"] = args.process_index
    return metrics


def _add_reference(
    lm: Any,
    data: Data,
    recipe: Recipe,
    identity: object,
    cache: Path,
    log: Callable[[str], object] | None,
    progress: Callable[[int, int], object] | None,
) -> None:
    """Fill in what the reference says of all rows."""
    from .logprobs import add_reference, sampled_reference

    if recipe.sampled_reference:
        sampled_reference(lm, data.rows, bf16=recipe.bf16)
    pack = recipe.max_length if recipe.pack else None
    for rows in filter(None, ([] if recipe.sampled_reference else data.rows, data.made_up)):
        known = add_reference(lm, rows, identity, cache, bf16=recipe.bf16, pack=pack, progress=progress)
        if log is not None:
            log(f"reference log-probabilities of {len(rows)} rows {'read' if known else 'computed'}")


def steps_logged(history: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """A Trainer's log without its summary. The summary's mean loss and runtime are wrong after a resume: they leave
    out, or count as 0, the steps before."""
    return [entry for entry in history if "train_runtime" not in entry]


def _adapted(lm: Any, rank: int, source: Checkpoint) -> Any:
    from peft import LoraConfig, get_peft_model

    # What the saved adapter says of its base has to be found from any folder.
    lm.name_or_path = os.path.realpath(source.path) if source.local else source.path
    config = LoraConfig(
        r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM", revision=source.revision
    )
    return get_peft_model(lm, config)


def _finish(
    source: Checkpoint, folder: Path, recipe: Recipe, data: Data, metrics: dict[str, Any], delimiter: str | None
) -> dict[str, Any]:
    """Tokenizer and card, the card last: a folder that has it is complete."""
    from transformers import AutoTokenizer

    reference: str | None = None  # an adapter's base
    if recipe.lora is None:
        reference = source.path
        if source.local:  # a folder begins with a dot: "policy" alone is the policy of a search
            reference = os.path.relpath(os.path.realpath(source.path), folder.resolve())
            reference = reference if reference.startswith(".") else os.path.join(".", reference)
    main = metrics.pop("process") == 0
    card: dict[str, Any] = {
        "format": CARD_FORMAT,
        "model": ".",
        "reference": reference,
        "beta": recipe.scale,
        **({} if delimiter is None else {"delimiter": delimiter}),
        "objective": recipe.objective,
        "recipe": asdict(recipe) | {"learning_rate": recipe.rate, "beta": recipe.scale, "balanced": recipe.balance},
        "reference_revision": source.revision,
        "data": data.counts,
        "metrics": metrics,
        "versions": _versions(),
    }
    if main:
        AutoTokenizer.from_pretrained(source.path, **source.where()).save_pretrained(folder)
        part = folder / f"{CARD}.part"
        part.write_text(json.dumps(card, indent=2) + "\n", encoding="utf-8")
        os.replace(part, folder / CARD)
        shutil.rmtree(folder / CHECKPOINTS)  # as large as several models, and of no use to a finished run
    return card


def _versions() -> dict[str, str]:
    versions = {}
    for name in ("prm-search", "torch", "transformers", "accelerate", "peft"):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return versions
