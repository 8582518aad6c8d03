"""Options of monitoring."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from dist_graft.config.validation import known_or_own, step_range

LOGGERS = ("tensorboard", "wandb", "mlflow", "trackio")
"""Built-in loggers."""


@dataclass(frozen=True, kw_only=True)
class MonitorConfig:
    """Progress display, loggers and profiling."""

    loggers: str | list[str] = field(default_factory=lambda: ["tensorboard"])
    """Loggers of each network and of the population: tensorboard, wandb, mlflow, trackio, or
    package.module:Name. A list, or names separated by commas; replaces the default."""
    tensorboard: bool = True
    """False removes tensorboard from monitor.loggers."""
    progress: Literal["auto", "bar", "lines"] = "auto"
    """Progress bar, or one line per epoch; auto: a bar on a terminal, lines otherwise."""
    profile_steps: str | None = None
    """A:B (quoted in YAML): profile the optimizer steps A to B - 1 of the run, counted from 0, with
    the rounds, evaluations and checkpoints between them. Each network writes
    RUN/networkNN/trace.json.gz; open it at ui.perfetto.dev."""

    def __post_init__(self) -> None:
        parts = [self.loggers] if isinstance(self.loggers, str) else self.loggers
        names = [name.strip() for part in parts for name in part.split(",") if name.strip()]
        for name in names:
            known_or_own("monitor.loggers", name, LOGGERS)
        removed = () if self.tensorboard else ("tensorboard",)
        loggers = [name for name in dict.fromkeys(names) if name not in removed]
        object.__setattr__(self, "loggers", loggers)
        if self.profile_steps is not None:
            step_range("monitor.profile_steps", self.profile_steps)
