"""Options of monitoring."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from dist_graft.config.validation import step_range


@dataclass(frozen=True, kw_only=True)
class MonitorConfig:
    """Progress display, TensorBoard and profiling."""

    tensorboard: bool = True
    """Write TensorBoard events."""
    progress: Literal["auto", "bar", "lines"] = "auto"
    """Progress bar, or one line per epoch; auto: a bar on a terminal, lines otherwise."""
    profile_steps: str | None = None
    """A:B (quoted in YAML): profile the optimizer steps A to B - 1 of the run, counted from 0, with
    the rounds, evaluations and checkpoints between them. Each network writes
    RUN/networkNN/trace.json.gz; open it at ui.perfetto.dev."""

    def __post_init__(self) -> None:
        if self.profile_steps is not None:
            step_range("monitor.profile_steps", self.profile_steps)
