"""Grafting as a callback of Lightning; each process trains a network of its own.

Lightning's own strategies keep replicas of one network, so every process here is a Trainer with one
device, and the group is made before: see `main`. To run it:

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
    """Grafts the networks of all processes after each epoch."""

    def __init__(self, **options: Any) -> None:
        self.options = options
        self.round = 0

    def on_fit_start(self, trainer: lightning.Trainer, module: lightning.LightningModule) -> None:
        self.grafter = Grafter(module, **self.options)
        self.grafter.round = self.round

    def on_train_epoch_end(
        self, trainer: lightning.Trainer, module: lightning.LightningModule
    ) -> None:
        record = self.grafter.graft()  # every process comes here, equally often
        kept = sum(record.coefficient.values()) / len(record.coefficient)
        module.log("graft/mean_coefficient", kept)
        self.round = self.grafter.round

    def on_fit_end(self, trainer: lightning.Trainer, module: lightning.LightningModule) -> None:
        del self.grafter  # before the process group goes

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
    store = dist.TCPStore(  # with the launcher's address, before Lightning may see it
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        size,
        is_master=False,
        timeout=timedelta(seconds=60),
    )
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "TORCHELASTIC_RUN_ID"):
        os.environ.pop(name, None)  # Lightning shall see one process: its own

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
    print(f"network {rank} kept {mean:.2f} of itself in the last round", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
