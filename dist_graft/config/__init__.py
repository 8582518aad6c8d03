"""Configuration: one frozen, keyword-only dataclass per section."""

from dist_graft.config.checkpoint import CheckpointConfig
from dist_graft.config.data import DataConfig
from dist_graft.config.distill import DistillConfig
from dist_graft.config.graft import GraftConfig
from dist_graft.config.model import ModelConfig
from dist_graft.config.monitor import MonitorConfig
from dist_graft.config.optim import OptimConfig
from dist_graft.config.population import PopulationConfig
from dist_graft.config.runtime import RuntimeConfig
from dist_graft.config.train import TrainConfig

__all__ = [
    "CheckpointConfig",
    "DataConfig",
    "DistillConfig",
    "GraftConfig",
    "ModelConfig",
    "MonitorConfig",
    "OptimConfig",
    "PopulationConfig",
    "RuntimeConfig",
    "TrainConfig",
]
