"""Options of monitoring."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from dist_graft.config.validation import step_range


@dataclass(frozen=True, kw_only=True)
class MonitorConfig:
    """What a run shows of itself."""

    tensorboard: bool = True
    """Write TensorBoard events."""
    progress: Literal["auto", "bar", "lines"] = "auto"
    """A bar, or one line an epoch; auto: a bar on a terminal."""
    profile_steps: str | None = None
    """A:B, in quotes in YAML: each network profiles the optimizer steps A to B - 1 of the run,
    counted from 0, and all between them: RUN/networkNN/trace.json.gz, for ui.perfetto.dev."""

    def __post_init__(self) -> None:
        if self.profile_steps is not None:
            step_range("monitor.profile_steps", self.profile_steps)
