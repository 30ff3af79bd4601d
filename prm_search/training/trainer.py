"""PRMTrainer: transformers.Trainer with the objectives. Imports transformers and, through it, accelerate."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import ExportableState, PrinterCallback, ProgressCallback

from .data import Item, collate
from .logprobs import FORWARD
from .objectives import ce, dpo, ipvrm, kto, nca
from .packing import Pack, collate_packs


class PRMTrainer(Trainer):
    """Trains a causal LM, within `logprobs.response_forward`, on items whose reference is known.

    Args:
        model: the LM or its PEFT wrapper.
        args: remove_unused_columns must be False.
        items: see data.Item; or packs of items, which then are what a batch counts.
        objective: one of recipe.OBJECTIVES.
        beta: scale of the log-ratios.
        margin: of ipvrm.
        log: called with a line at every logging step; None for silence.
        progress: called with the step that is done and their number, from the one that training begins with.
    """

    def __init__(
        self,
        model: Any,
        args: TrainingArguments,
        items: Sequence[Item] | Sequence[Pack],
        *,
        objective: str,
        beta: float,
        margin: float = 0.0,
        log: Callable[[str], object] | None = None,
        progress: Callable[[int, int], object] | None = None,
    ) -> None:
        collator = collate_packs if isinstance(items[0], Pack) else collate
        super().__init__(model=model, args=args, train_dataset=items, data_collator=collator)
        self.model_accepts_loss_kwargs = False  # the loss is a mean over items: divide it by the accumulation steps
        self.objective, self.beta, self.margin = objective, beta, margin
        self._means = _Means(lambda values: self.accelerator.reduce(values, "mean"))
        self.add_callback(self._means)
        for printer in (PrinterCallback, ProgressCallback):
            self.remove_callback(printer)
        if log is not None:
            self.add_callback(_Lines(log))
        if progress is not None:
            self.add_callback(_Progress(progress))

    def compute_loss(
        self, model: Any, inputs: dict[str, Tensor], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The weighted mean of the items' losses."""
        label, weight = inputs["label"], inputs["weight"]
        mask = inputs["response_mask"]
        if self.objective == "kto":
            tokens, others = self._kto_rewards(model, inputs, len(label))
            baseline = others.sum(1).mean().clamp(min=0)
        else:
            tokens = self._token_rewards(model, inputs)
        rewards = tokens.sum(1)
        if self.objective == "ce":
            losses = ce(rewards, label)
        elif self.objective == "ipvrm":
            losses = ipvrm(tokens, mask, label, margin=self.margin)
        elif self.objective == "kto":
            losses = kto(rewards, label, baseline)
        else:
            losses = (dpo if self.objective == "dpo" else nca)(*rewards.chunk(2))
        with torch.no_grad():
            right = rewards.chunk(2)[0] > rewards.chunk(2)[1] if self.objective in ("dpo", "nca") else None
            right = (rewards > 0) == (label > 0.5) if right is None else right
        loss = (losses * weight).mean()
        self._means.add(loss.detach(), right.float().mean())
        return (loss, {"rewards": rewards}) if return_outputs else loss

    def _kto_rewards(self, model: Any, inputs: dict[str, Tensor], items: int) -> tuple[Tensor, Tensor]:
        """Token rewards of the responses, and without gradients those of the mismatched ones."""
        if "places" in inputs:  # one forward has both
            own, other = self._token_rewards(model, inputs).chunk(2)
            return own, other.detach()
        first, second = _halves(inputs, items)
        with torch.no_grad():
            other = self._token_rewards(model, second)
        return self._token_rewards(model, first), other

    def _token_rewards(self, model: Any, inputs: dict[str, Tensor]) -> Tensor:
        logprobs = model(**{name: inputs[name] for name in FORWARD if name in inputs})
        return self.beta * (logprobs - inputs["reference"])  # 0 - 0 outside the response

    def log(self, logs: dict[str, float], *arguments: Any, **options: Any) -> None:
        """Trainer's, with the means since the last line, those steps included that a resumed run did before."""
        if "loss" in logs:
            logs |= self._means.take()
        super().log(logs, *arguments, **options)


def _halves(inputs: dict[str, Tensor], items: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """A batch of items of two rows each as two batches."""
    rows = {name: part for name, part in inputs.items() if len(part) == 2 * items}
    return {name: part[:items] for name, part in rows.items()}, {name: part[items:] for name, part in rows.items()}


class _Means(TrainerCallback, ExportableState):
    """Mean loss and accuracy of the steps since the last line of the log.

    Trainer's own mean begins anew with each run. So the first line after a resume would leave out the steps between the
    last line and the checkpoint. These sums are a part of the checkpoint's state.

    Args:
        reduce: the mean of a tensor over all processes.
    """

    def __init__(self, reduce: Callable[[Tensor], Tensor]) -> None:
        self._reduce = reduce
        self._parts: list[Tensor] = []
        self._sums: Tensor | None = None
        self._steps = 0

    def add(self, loss: Tensor, accuracy: Tensor) -> None:
        """Take in one forward of a step: scalars."""
        self._parts.append(torch.stack([loss.float(), accuracy.float()]))

    def take(self) -> dict[str, float]:
        """The means, which begin anew."""
        loss, accuracy = self._values()
        steps, self._sums, self._steps = max(1, self._steps), None, 0
        return {"loss": loss / steps, "accuracy": accuracy / steps}

    def state(self) -> dict[str, Any]:
        """For the checkpoint."""
        return {"args": {}, "attributes": {"sums": self._values(), "steps": self._steps}}

    def on_train_begin(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        """Go on with the sums of the checkpoint."""
        stored = state.stateful_callbacks.get(type(self).__name__, {}).get("attributes", {})
        if stored.get("steps"):
            self._sums = torch.tensor(stored["sums"], dtype=torch.float64)
            self._steps = stored["steps"]

    def on_step_end(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        """Take in the step's mean over its forwards and all processes."""
        step = self._reduce(torch.stack(self._parts).mean(0)).double()
        self._parts.clear()
        self._sums = step if self._sums is None else self._sums.to(step.device) + step
        self._steps += 1

    def _values(self) -> list[float]:
        return [0.0, 0.0] if self._sums is None else self._sums.tolist()


class _Progress(TrainerCallback):
    """Tells how many steps are done."""

    def __init__(self, progress: Callable[[int, int], object]) -> None:
        self._progress = progress

    def on_train_begin(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        """Say where it begins."""
        self.on_step_end(args, state, control)

    def on_step_end(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        """Say it, in the main process."""
        if state.is_world_process_zero:
            self._progress(state.global_step, state.max_steps)


class _Lines(TrainerCallback):
    """One line a logging step."""

    def __init__(self, log: Callable[[str], object]) -> None:
        self._log = log

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **others: Any) -> None:
        """Say it, in the main process."""
        if state.is_world_process_zero and logs and "loss" in logs:
            figures = " ".join(f"{name} {logs[name]:.4g}" for name in ("loss", "accuracy", "learning_rate"))
            self._log(f"step {state.global_step} of {state.max_steps}: {figures}")
