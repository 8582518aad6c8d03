"""Segmentation: two LR-ASPP networks graft each other.

python docs/examples/segmentation.py
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import TensorDataset
from torchvision.models.segmentation import lraspp_mobilenet_v3_large

import dist_graft
from dist_graft.config import DataConfig, OptimConfig

SIDE = 32


def make_dataset(samples: int, seed: int) -> TensorDataset:
    """Noisy images [samples, 3, 32, 32] with a bright square, and its masks [samples, 32, 32]."""
    generator = torch.Generator().manual_seed(seed)
    masks = torch.zeros(samples, SIDE, SIDE, dtype=torch.long)
    for mask in masks:
        top, left = torch.randint(SIDE // 2, (2,), generator=generator).tolist()
        mask[top : top + SIDE // 2, left : left + SIDE // 2] = 1
    noise = torch.randn(samples, 3, SIDE, SIDE, generator=generator)
    return TensorDataset(masks[:, None] + 0.3 * noise, masks)


def make_model() -> nn.Module:
    model = lraspp_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=2)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 0.3  # the default of 0.01 is for long training
    return model


def loss(output: dict[str, Tensor], target: Tensor) -> Tensor:
    return F.cross_entropy(output["out"], target)


def iou(output: dict[str, Tensor], target: Tensor) -> tuple[Tensor, Tensor]:
    """Intersection and union of the predicted and the true squares, in pixels."""
    predicted, true = output["out"].argmax(dim=1) == 1, target == 1
    return (predicted & true).sum(), (predicted | true).sum()


def main() -> None:
    config = dist_graft.TrainConfig(
        run_dir="runs/segmentation",
        epochs=4,
        data=DataConfig(batch_size=16),
        optim=OptimConfig(lr=0.1),
    )
    data = dist_graft.Datasets(train=make_dataset(128, seed=0), test=make_dataset(32, seed=1))
    dist_graft.Trainer(config, model=make_model, data=data, loss=loss, metrics={"iou": iou}).fit()


if __name__ == "__main__":
    dist_graft.launch(main, networks=2)
