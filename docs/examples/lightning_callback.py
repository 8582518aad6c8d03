"""Graft networks that Lightning trains, with loggers and checkpoints of each network.

python docs/examples/lightning_callback.py, or with torchrun and without `launch`
"""

from __future__ import annotations

import os
from pathlib import Path

import lightning
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from dist_graft import launch
from dist_graft.integrations.lightning import GraftCallback, network_trainer

ROOT = os.environ.get("RUN_DIR", "runs/lightning")


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
        loss = F.cross_entropy(self.classifier(self.layers(images)), classes)
        self.log("train_loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.05)


def make_loader(network: int) -> DataLoader:
    images, classes = torch.rand(64, 1, 8, 8), torch.randint(4, (64,))
    order = torch.Generator().manual_seed(network)  # each network has its own data order
    return DataLoader(TensorDataset(images, classes), 16, shuffle=True, generator=order)


def main() -> str:
    network = int(os.environ["RANK"])
    torch.manual_seed(0)
    trainer = network_trainer(
        default_root_dir=ROOT,
        max_epochs=2,
        accelerator="cpu",
        callbacks=[GraftCallback(lead="conv+linear"), ModelCheckpoint(save_last=True)],
        logger=CSVLogger,  # called with the folder of this network
        log_every_n_steps=1,
    )
    checkpoints = Path(trainer.default_root_dir).rglob("last.ckpt")
    last = max(checkpoints, key=lambda path: path.stat().st_mtime, default=None)
    trainer.fit(Classifier(), make_loader(network), ckpt_path=last)
    kept = trainer.callback_metrics.get("graft/coefficient")
    if kept is None:
        return "had already trained for all epochs"
    return f"kept {kept:.2f} of its weights in the last round"


if __name__ == "__main__":
    for network, result in enumerate(launch(main, networks=2)):
        print(f"network {network} {result}")
