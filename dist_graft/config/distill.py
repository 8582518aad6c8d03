"""Options of distillation."""

from __future__ import annotations

from dataclasses import dataclass, field

from dist_graft.config.validation import above_zero, at_least


@dataclass(frozen=True, kw_only=True)
class DistillConfig:
    """Distillation from frozen teachers, in addition to the labels (arXiv 2004.12311)."""

    teachers: list[str] = field(default_factory=list)
    """Networks of finished runs, e.g. RUN/checkpoints/epoch_0200/network00.pt."""
    temperature: float = 2.0
    """Softmax temperature tau of teachers and student."""
    weight: float = 1.0
    """Weight of the distillation loss relative to the labels' loss."""

    def __post_init__(self) -> None:
        above_zero("distill.temperature", self.temperature)
        at_least("distill.weight", self.weight, 0)
