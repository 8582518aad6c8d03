"""Grafting as a callback of the Hugging Face Trainer.

Under a launcher, the Trainer trains replicas of one network. Here `main` creates the process group
itself and removes the launcher's variables.

torchrun --standalone --nproc-per-node=2 docs/examples/transformers_callback.py
"""

from __future__ import annotations

import os
import tempfile
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from dist_graft import Grafter


class GraftEveryEpoch(TrainerCallback):
    """Run a round of grafting after each epoch."""

    def __init__(self, **options: Any) -> None:
        self.options = options

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.grafter = Grafter(kwargs["model"], **self.options)
        self.grafter.round = int(state.epoch or 0)

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        record = self.grafter.graft()  # a collective: every rank must call it
        kept = sum(record.coefficient.values()) / len(record.coefficient)
        state.log_history.append({"epoch": state.epoch, "graft/mean_coefficient": kept})

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        del self.grafter  # before the process group is destroyed


def make_model() -> BertForSequenceClassification:
    """A very small text classifier."""
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    return BertForSequenceClassification(
        BertConfig(vocab_size=50, intermediate_size=32, max_position_embeddings=8, **sizes)
    )


def main() -> None:
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    store = dist.TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        size,
        is_master=False,
        timeout=timedelta(seconds=60),
    )
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "TORCHELASTIC_RUN_ID"):
        os.environ.pop(name, None)  # the Trainer must see a single process

    torch.manual_seed(rank)
    texts = [{"input_ids": torch.randint(50, (8,)), "labels": n % 2} for n in range(32)]
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder,
            num_train_epochs=2,
            per_device_train_batch_size=8,
            seed=rank,
            use_cpu=True,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
        )
        trainer = Trainer(
            make_model(),
            arguments,
            train_dataset=texts,
            callbacks=[GraftEveryEpoch(lead="conv+linear")],
        )
        dist.init_process_group("gloo", store=store, rank=rank, world_size=size)
        trainer.train()
    means = [row["graft/mean_coefficient"] for row in trainer.state.log_history if len(row) == 2]
    print(f"network {rank} kept {means[-1]:.2f} of its weights in the last round", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
