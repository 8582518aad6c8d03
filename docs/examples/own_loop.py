"""Grafting in a plain training loop.

torchrun --standalone --nproc-per-node=2 docs/examples/own_loop.py
"""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

import dist_graft

EPOCHS, STEPS, BATCH = 3, 20, 32


def make_model() -> nn.Module:
    """A small image classifier."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 3),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 16, 3),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(64, 4),
    )


def make_batch() -> tuple[torch.Tensor, torch.Tensor]:
    """Random images [32, 1, 8, 8] with one bright quadrant, which is the class."""
    images, classes = torch.rand(BATCH, 1, 8, 8), torch.randint(4, (BATCH,))
    for image, quadrant in zip(images, classes.tolist(), strict=True):
        row, column = 4 * (quadrant // 2), 4 * (quadrant % 2)
        image[:, row : row + 4, column : column + 4] += 0.5
    return images, classes


def main() -> None:
    dist.init_process_group("gloo")  # on GPUs: "cpu:gloo,cuda:nccl"
    network = dist.get_rank()
    torch.manual_seed(network)  # different weights and batches for each network
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)

    grafter = dist_graft.Grafter(model, amplitude=0.4, sensitivity=5)
    for epoch in range(EPOCHS):
        for _ in range(STEPS):
            images, classes = make_batch()
            loss = F.cross_entropy(model(images), classes)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        record = grafter.graft()  # a collective: every rank must call it
        kept = record.coefficient["0"]
        print(f"epoch {epoch}: network {network} kept {kept:.2f} of its first layer", flush=True)

    torch.save({"model": model.state_dict(), "round": grafter.round}, f"network{network:02d}.pt")
    del grafter
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
