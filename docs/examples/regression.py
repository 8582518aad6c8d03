"""Regression: two multilayer perceptrons graft each other.

python docs/examples/regression.py
"""

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import dist_graft
from dist_graft.config import GraftConfig, OptimConfig


def make_dataset(samples: int, seed: int) -> TensorDataset:
    """Points x [samples, 2] in a square, and y = sin(x_0) cos(x_1) [samples, 1]."""
    x = 6 * torch.rand(samples, 2, generator=torch.Generator().manual_seed(seed)) - 3
    return TensorDataset(x, x[:, :1].sin() * x[:, 1:].cos())


def make_model() -> nn.Module:
    return nn.Sequential(nn.Linear(2, 64), nn.Tanh(), nn.Linear(64, 1))


def make_optimizer(model: nn.Module, lr: float) -> torch.optim.Optimizer:
    return torch.optim.NAdam(model.parameters(), lr=lr)


def absolute_error(output: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Sum of the absolute errors, and the number of points."""
    return (output - target).abs().sum(), torch.tensor(len(target), device=target.device)


class PrintCoefficients(dist_graft.Callback):
    """Print how much of its own weights the network keeps in each round."""

    def on_round_end(self, trainer: dist_graft.Trainer, record: dist_graft.GraftRecord) -> None:
        print(f"round {record.round}: network {record.network} kept {record.coefficient}")


def main() -> None:
    config = dist_graft.TrainConfig(
        run_dir="runs/regression",
        epochs=10,
        optim=OptimConfig(lr=0.02),
        graft=GraftConfig(lead="conv+linear"),
    )
    dist_graft.Trainer(
        config,
        model=make_model,
        data=dist_graft.Datasets(train=make_dataset(2048, seed=0), test=make_dataset(256, seed=1)),
        loss=nn.functional.mse_loss,
        metrics={"absolute_error": absolute_error},
        optimizer=make_optimizer,
        callbacks=[PrintCoefficients()],
    ).fit()


if __name__ == "__main__":
    dist_graft.launch(main, networks=2)
