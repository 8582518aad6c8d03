"""Components that the command line names as package.module:name, with arguments."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from dist_graft import Callback, Trainer


class SignMomentum(torch.optim.Optimizer):
    """Steps by the sign of an average of gradients; its constructor fills its state."""

    def __init__(self, params: Iterable[Tensor], lr: float, beta: float = 0.9) -> None:
        super().__init__(params, {"lr": lr, "beta": beta})
        for group in self.param_groups:
            for parameter in group["params"]:
                self.state[parameter]["average"] = torch.zeros_like(parameter)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        del closure
        for group in self.param_groups:
            for parameter in group["params"]:
                average = self.state[parameter]["average"]
                average.lerp_(parameter.grad, 1 - group["beta"])
                parameter.add_(average.sign(), alpha=-group["lr"])


class Unsaved(SignMomentum):
    """Keeps an object in its state that a checkpoint cannot hold."""

    def __init__(self, params: Iterable[Tensor], lr: float) -> None:
        super().__init__(params, lr)
        self.param_groups[0]["folder"] = Path()


class CountingSGD(torch.optim.SGD):
    """Counts its steps in param_groups, as schedule-free optimizers do."""

    def __init__(self, params: Iterable[Tensor], lr: float, **arguments: Any) -> None:
        super().__init__(params, lr, **arguments)
        self.param_groups[0]["count"] = 0

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        del closure
        self.param_groups[0]["count"] += 1
        super().step()


class NeedsClosure(torch.optim.SGD):
    def step(self, closure: Callable[[], float]) -> None:  # type: ignore[override]
        del closure


def decayed_sgd(params: Iterable[Tensor], lr: float, weight_decay: float) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, lr=2 * lr, weight_decay=weight_decay)


def forwarded_sgd(params: Iterable[Tensor], **arguments: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, **arguments)


def triangle(progress: float, *, peak: float = 0.5) -> float:
    """Rises from 0 to 1 at the peak, and falls to 0."""
    return progress / peak if progress < peak else (1 - progress) / (1 - peak)


def rising(progress: float) -> float:
    return 1 + progress


def add_noise(images: Tensor, generator: torch.Generator, *, std: float = 0.1) -> Tensor:
    """Half of the noise is from the generator, half from torch's global one."""
    own = torch.randn(images.shape, generator=generator, device=images.device)
    return images + std * (own + torch.randn(images.shape, device=images.device))


def drop_one(images: Tensor, generator: torch.Generator) -> Tensor:
    del generator
    return images[1:]


def margin_loss(scores: Tensor, labels: Tensor, *, margin: float = 1.0) -> Tensor:
    return F.multi_margin_loss(scores, labels, margin=margin)


class WeightedLoss(torch.nn.Module):
    """Cross entropy with the weights of four classes, which are a buffer."""

    weights: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("weights", torch.arange(1.0, 5.0))

    def forward(self, scores: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(scores, labels, weight=self.weights)


def losses(scores: Tensor, labels: Tensor) -> Tensor:
    """One per sample, which is not a scalar."""
    return F.cross_entropy(scores, labels, reduction="none")


class Counter(Callback):
    """Writes what it was created with."""

    def __init__(self, **arguments: Any) -> None:
        self._arguments = arguments

    def on_fit_start(self, trainer: Trainer) -> None:
        folder = trainer.directory.network(trainer.process.network)
        (folder / "counter.txt").write_text(repr(self._arguments))


def own_donors(networks: int, round_: int, seed: int) -> list[int]:
    """A topology in which every network is its own donor."""
    del round_, seed
    return list(range(networks))


def no_criterion(filters: Tensor, num_bins: int) -> float:
    """A criterion that fails."""
    raise ZeroDivisionError(f"{num_bins} bins")


def unknown_criterion(filters: Tensor, num_bins: int) -> float:
    """A criterion without a value."""
    del filters, num_bins
    return float("nan")
