"""Arguments of transformers' Trainer, from a recipe and what a user says besides. Importing this imports torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments

from .recipe import Recipe
from .resuming import CHECKPOINTS


def training_arguments(recipe: Recipe, arguments: Mapping[str, Any], folder: Path) -> TrainingArguments:
    """Return the arguments of a run.

    Args:
        recipe: see Recipe.
        arguments: of the user's own, which go before.
        folder: of the run.

    Raises:
        ValueError: an argument does not exist or is of another type; or the batch does not divide among the processes.
    """
    defaults = {
        "output_dir": str(folder / CHECKPOINTS),
        "per_device_train_batch_size": recipe.micro_batch,
        "num_train_epochs": recipe.epochs,
        "learning_rate": recipe.rate,
        "bf16": recipe.bf16,
        "use_cpu": not torch.accelerator.is_available(),
        "seed": recipe.seed,
        "save_steps": recipe.save_steps,
        "save_total_limit": 2,
        "logging_steps": 10,
        "remove_unused_columns": False,
        "disable_tqdm": True,
        "report_to": "none",
        "label_names": [],
        "dataloader_pin_memory": torch.cuda.is_available(),
        "ddp_find_unused_parameters": False,
    }
    _check_arguments(arguments, TrainingArguments)
    try:
        args = TrainingArguments(**(defaults | dict(arguments)))
    except (TypeError, ValueError) as error:  # of a name that it does not have, or of a value
        raise ValueError(f"arguments: {' '.join(str(error).split())}") from error
    whole = recipe.micro_batch * args.world_size
    if recipe.batch % whole:
        raise ValueError(
            f"batch={recipe.batch}: a multiple of {whole}, micro_batch times the number of processes, is needed"
        )
    args.gradient_accumulation_steps = recipe.batch // whole
    return args


def _check_arguments(arguments: Mapping[str, Any], kind: type[Any]) -> None:
    """Raises ValueError for an argument that transformers does not have, or a text where it has a number."""
    defaults = {option.name: option.default for option in fields(kind)}
    for name, value in arguments.items():
        if name not in defaults:
            raise ValueError(f"arguments: {kind.__name__} has no {name!r}")
        if isinstance(defaults[name], int | float) and not isinstance(value, int | float | None):
            raise ValueError(f"arguments: {name}={value!r:.80}: {type(defaults[name]).__name__} is needed")
