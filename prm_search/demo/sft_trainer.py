"""ResponseTrainer: transformers.Trainer with the loss of response tokens alone. Imports transformers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from ..training.data import Item, collate


class ResponseTrainer(Trainer):
    """Trains a causal LM, within `logprobs.response_forward`, to give the responses of its items.

    Args:
        model: the LM or its PEFT wrapper.
        args: remove_unused_columns must be False.
        items: of one row each; see data.Item.
        log: called with a line at every logging step; None: nothing is said.
    """

    def __init__(
        self, model: Any, args: TrainingArguments, items: Sequence[Item], *, log: Callable[[str], object] | None = None
    ) -> None:
        super().__init__(model=model, args=args, train_dataset=items, data_collator=collate)
        self.model_accepts_loss_kwargs = False  # the loss is a mean: divide it by the accumulation steps
        for printer in (PrinterCallback, ProgressCallback):
            self.remove_callback(printer)
        if log is not None:
            self.add_callback(_Lines(log))

    def compute_loss(
        self, model: Any, inputs: dict[str, Tensor], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Cross entropy in nats, the mean over the response tokens of the forward."""
        mask = inputs["response_mask"]
        logprobs = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], response_mask=mask)
        loss = -logprobs.sum() / mask.sum()
        return (loss, {"logprobs": logprobs}) if return_outputs else loss


class _Lines(TrainerCallback):
    """One line a logging step."""

    def __init__(self, log: Callable[[str], object]) -> None:
        self._log = log

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **others: Any) -> None:
        """Say it, in the main process."""
        if state.is_world_process_zero and logs and "loss" in logs:
            self._log(f"step {state.global_step} of {state.max_steps}: loss {logs['loss']:.4f} nats a token")
