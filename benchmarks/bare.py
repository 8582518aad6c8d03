"""A minimal training program, the reference of `job.py`. It does not use the trainer.

One process reads the first images of Fashion-MNIST, normalizes them once, and trains and evaluates
ResNet-20 on them in a plain loop: no augmentation, no training metrics, no files, no exchange.

    python benchmarks/bare.py --root data --precision bf16
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from dist_graft.training.models.resnet import ResNet

BATCH, PIXELS, PADDED = 128, 28, 32


def read(folder: Path, prefix: str, count: int) -> tuple[Tensor, Tensor]:
    """Read images, float32 [count, 3, 32, 32] in channels_last, and labels [count] of one split."""
    image_path, label_path = (
        folder / f"{prefix}-{what}-ubyte" for what in ("images-idx3", "labels-idx1")
    )
    pixels = np.fromfile(image_path, np.uint8, count=count * PIXELS**2, offset=16)
    labels = np.fromfile(label_path, np.uint8, count=count, offset=8)
    images = torch.from_numpy(pixels).view(count, 1, PIXELS, PIXELS).float() / 255
    images = F.pad(images, [(PADDED - PIXELS) // 2] * 4).expand(-1, 3, -1, -1)
    normalized = ((images - 0.2860) / 0.3530).contiguous(memory_format=torch.channels_last)
    return normalized, torch.from_numpy(labels).long()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--root", required=True, help="folder that holds FashionMNIST/raw")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--train_samples", type=int, default=2048)
    parser.add_argument("--test_samples", type=int, default=500)
    parser.add_argument("--lr", type=float, default=0.1)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(options.seed)

    folder = Path(options.root) / "FashionMNIST" / "raw"
    images, labels = read(folder, "train", options.train_samples)
    test_images, test_labels = read(folder, "t10k", options.test_samples)
    model = ResNet(20, num_classes=10, channels=3).to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.parameters(), lr=options.lr, momentum=0.9, weight_decay=5e-4)
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=options.precision == "bf16")
    for epoch in range(options.epochs):
        model.train()
        for batch in torch.randperm(len(images)).split(BATCH):
            optimizer.zero_grad()
            with autocast:
                loss = F.cross_entropy(model(images[batch]), labels[batch])
            loss.backward()
            optimizer.step()
        model.eval()
        with torch.no_grad(), autocast:
            predictions = torch.cat([model(part).argmax(1) for part in test_images.split(BATCH)])
        accuracy = (predictions == test_labels).double().mean().item()
        print(f"epoch {epoch + 1}: test accuracy {100 * accuracy:.2f}%", flush=True)


if __name__ == "__main__":
    main()
