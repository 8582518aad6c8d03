"""Options of what goes beside grafting: other population methods, and distillation."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from dist_graft.config.validation import above_zero, at_least, require


@dataclass(frozen=True, kw_only=True)
class PapaConfig:
    """PAPA (arXiv 2304.03094), with method papa."""

    every_steps: int = 10
    """Optimizer steps between two pulls to the mean."""
    beta: float = 0.99
    """Share a network keeps in a pull, in [0, 1]; 1 - beta falls with the learning rate."""
    variant: Literal["pull", "all", "pairs"] = "pull"
    """all: every few epochs each network becomes the mean of all; pairs: of two random ones."""
    every: int = 5
    """Epochs between two means, for the variants all and pairs."""

    def __post_init__(self) -> None:
        at_least("papa.every_steps", self.every_steps, 1)
        require(0 <= self.beta <= 1, "papa.beta", self.beta, "in [0, 1]")
        at_least("papa.every", self.every, 1)


@dataclass(frozen=True, kw_only=True)
class WashConfig:
    """WASH (arXiv 2405.17517), with method wash."""

    probability: float = 0.001
    """p, that a scalar of the first layer changes places in a round; it falls to 0 at the last."""
    every_steps: int = 1
    """Optimizer steps between two rounds."""

    def __post_init__(self) -> None:
        require(0 <= self.probability <= 1, "wash.probability", self.probability, "in [0, 1]")
        at_least("wash.every_steps", self.every_steps, 1)


@dataclass(frozen=True, kw_only=True)
class DistillConfig:
    """Learning from frozen teachers, beside the labels (arXiv 2004.12311)."""

    teachers: list[str] = field(default_factory=list)
    """Networks of finished runs, e.g. RUN/checkpoints/epoch_0200/network00.pt."""
    temperature: float = 2.0
    """tau, that softens the probabilities."""
    weight: float = 1.0
    """Of the teachers' loss beside the labels'."""

    def __post_init__(self) -> None:
        above_zero("distill.temperature", self.temperature)
        at_least("distill.weight", self.weight, 0)
