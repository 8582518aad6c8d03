"""Grafting as a callback of Lightning.

Lightning's strategies train replicas of one network. Here every process runs a Trainer with one
device, and `main` creates the process group first.

torchrun --standalone --nproc-per-node=2 docs/examples/lightning_callback.py
"""

from __future__ import annotations

import os
from datetime import timedelta
from typing import Any

import lightning
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from dist_graft import Grafter


class GraftEveryEpoch(lightning.Callback):
    """Run a round of grafting after each epoch."""

    def __init__(self, **options: Any) -> None:
        self.options = options
        self.round = 0

    def on_fit_start(self, trainer: lightning.Trainer, module: lightning.LightningModule) -> None:
        self.grafter = Grafter(module, **self.options)
        self.grafter.round = self.round

    def on_train_epoch_end(
        self, trainer: lightning.Trainer, module: lightning.LightningModule
    ) -> None:
        record = self.grafter.graft()  # a collective: every rank must call it
        kept = sum(record.coefficient.values()) / len(record.coefficient)
        module.log("graft/mean_coefficient", kept)
        self.round = self.grafter.round

    def on_fit_end(self, trainer: lightning.Trainer, module: lightning.LightningModule) -> None:
        del self.grafter  # before the process group is destroyed

    def state_dict(self) -> dict[str, Any]:
        return {"round": self.round}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.round = state["round"]


class Classifier(lightning.LightningModule):
    """A small image classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten()
        )
        self.classifier = nn.Linear(32, 4)

    def training_step(self, batch: list[torch.Tensor], index: int) -> torch.Tensor:
        images, classes = batch
        return F.cross_entropy(self.classifier(self.layers(images)), classes)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.05)


def main() -> None:
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    store = dist.TCPStore(  # the launcher's store, before its variables are removed
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        size,
        is_master=False,
        timeout=timedelta(seconds=60),
    )
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "TORCHELASTIC_RUN_ID"):
        os.environ.pop(name, None)  # Lightning must see a single process

    torch.manual_seed(rank)
    images, classes = torch.rand(64, 1, 8, 8), torch.randint(4, (64,))
    trainer = lightning.Trainer(
        max_epochs=2,
        accelerator="cpu",
        devices=1,
        callbacks=[GraftEveryEpoch(lead="conv+linear")],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Classifier(), DataLoader(TensorDataset(images, classes), 16, shuffle=True))
    mean = float(trainer.callback_metrics["graft/mean_coefficient"])
    print(f"network {rank} kept {mean:.2f} of its weights in the last round", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
