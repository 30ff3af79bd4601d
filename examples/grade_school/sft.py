"""Fine-tuning of a policy on worked answers with transformers.Trainer: ``python sft.py --model M --data F --out D``.

The data are JSON Lines with "question" and "answer", the whole worked answer. The prompt is the question and a line
break, as ``prm-search rollout --template '{}\\n'`` has it; the loss is of the answer and the end of sequence alone.
A run that was stopped goes on from the last checkpoint in --out.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForSeq2Seq, Trainer, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint


def rows(data: Path, tokenizer: Any) -> list[dict[str, list[int]]]:
    """Return prompts and answers in tokens; the labels of a prompt are -100, which no loss counts."""
    encoded = []
    for record in map(json.loads, data.read_text(encoding="utf-8").splitlines()):
        prompt = tokenizer(record["question"] + "\n")["input_ids"]
        answer = [*tokenizer(record["answer"], add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
        encoded.append({"input_ids": prompt + answer, "labels": [-100] * len(prompt) + answer})
    return encoded


def main(arguments: Sequence[str] | None = None) -> None:
    """Fine-tune all weights, and leave an ordinary transformers folder in --out."""
    command = argparse.ArgumentParser(description="Fine-tune a policy on worked answers.")
    for name, kind in (("model", str), ("data", Path), ("out", Path)):
        command.add_argument(f"--{name}", type=kind, required=True)
    for name, default in (("lr", 3e-4), ("epochs", 1.0), ("batch", 16), ("save-steps", 10), ("seed", 0)):
        command.add_argument(f"--{name}", type=type(default), default=default)
    chosen = command.parse_args(arguments)
    tokenizer = AutoTokenizer.from_pretrained(chosen.model)
    recipe = TrainingArguments(
        output_dir=str(chosen.out / "checkpoints"), per_device_train_batch_size=chosen.batch, seed=chosen.seed,
        num_train_epochs=chosen.epochs, learning_rate=chosen.lr, warmup_steps=2, save_steps=chosen.save_steps,
        save_total_limit=1, logging_steps=1, report_to="none", disable_tqdm=True,
        use_cpu=not torch.accelerator.is_available(),
    )  # fmt: skip
    model = AutoModelForCausalLM.from_pretrained(chosen.model, dtype=torch.float32)
    trainer = Trainer(model, recipe, DataCollatorForSeq2Seq(tokenizer), train_dataset=rows(chosen.data, tokenizer))
    last = get_last_checkpoint(recipe.output_dir) if Path(recipe.output_dir).is_dir() else None
    trainer.train(resume_from_checkpoint=last)
    tokenizer.save_pretrained(chosen.out)
    log = "".join(json.dumps(each) + "\n" for each in trainer.state.log_history)
    (chosen.out / "log.jsonl").write_text(log, encoding="utf-8")
    trainer.save_model(str(chosen.out))  # last: a folder with weights is complete


if __name__ == "__main__":
    main()
