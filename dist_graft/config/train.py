"""All options of a training run."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from dist_graft.config.checkpoint import CheckpointConfig
from dist_graft.config.data import DataConfig
from dist_graft.config.graft import GraftConfig
from dist_graft.config.methods import DistillConfig, PapaConfig, WashConfig
from dist_graft.config.model import ModelConfig
from dist_graft.config.monitor import MonitorConfig
from dist_graft.config.optim import OptimConfig
from dist_graft.config.runtime import RuntimeConfig
from dist_graft.config.validation import at_least, require
from dist_graft.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Train a population of networks that graft each other."""

    run_dir: str = "runs/run"
    """Folder of the run: configuration, metrics, events, checkpoints."""
    epochs: int = 20
    """Passes over the training images, in all."""
    seed: int = 0
    """All draws follow from it: the same seed and command give the same networks."""
    resume: Literal["auto", "never", "must"] = "auto"
    """auto: go on from the newest complete checkpoint set, or start; must: refuse to start anew;
    never: refuse to go on."""
    method: Literal["graft", "average", "papa", "wash", "none"] = "graft"
    """How the networks influence each other; average: all become the mean, as often as
    graft.every says; none: not at all."""
    on_divergence: Literal["heal", "abort", "exclude"] = "heal"
    """What becomes of a network whose weights or loss are no longer finite. heal: it takes the
    weights of the network before it, and goes on; abort: the run ends; exclude: nobody takes from
    it."""
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    graft: GraftConfig = field(default_factory=GraftConfig)
    papa: PapaConfig = field(default_factory=PapaConfig)
    wash: WashConfig = field(default_factory=WashConfig)
    distill: DistillConfig = field(default_factory=DistillConfig)
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    monitor: MonitorConfig = field(default_factory=MonitorConfig)

    def __post_init__(self) -> None:
        require(bool(self.run_dir), "run_dir", self.run_dir, "a folder")
        at_least("epochs", self.epochs, 1)
        require(0 <= self.seed < 2**63, "seed", self.seed, "in [0, 2^63)")
        if self.graft.rule and (self.method, self.graft.source) != ("graft", "external"):
            raise ConfigError("graft.rule needs method graft and graft.source external")
        if self.data.skip_broken and self.runtime.replicas > 1:
            raise ConfigError(
                "data.skip_broken needs runtime.replicas 1: no part of a batch may shrink"
            )
