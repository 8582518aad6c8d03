"""Train a population of networks that graft each other. Names load when first used (PEP 562)."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from dist_graft.version import VERSION as __version__  # noqa: N811

if TYPE_CHECKING:
    from dist_graft.analysis.exported import ExportedModel, load
    from dist_graft.config import TrainConfig
    from dist_graft.errors import (
        CallbackError,
        ConfigError,
        DataError,
        DisagreementError,
        DistGraftError,
        NetworkFailedError,
        NonFiniteError,
        PeerError,
        RunDirectoryError,
        StoppedEarlyError,
    )
    from dist_graft.grafting.coefficient import graft_coefficient
    from dist_graft.grafting.information import entropy, filter_entropy, l1
    from dist_graft.grafting.mixing import Mixing, mix
    from dist_graft.grafting.rules import Average, Diloco, Graft, Papa, Rule, Wash
    from dist_graft.grafting.units import GraftUnit, graft_units
    from dist_graft.monitoring.callback import Callback
    from dist_graft.monitoring.metrics import EpochReport
    from dist_graft.population.grafter import Grafter
    from dist_graft.population.round.record import GraftRecord
    from dist_graft.population.runtime.launch import launch
    from dist_graft.training.data.datasets import Datasets
    from dist_graft.training.train import train
    from dist_graft.training.trainer import Trainer

_NAMES = {
    "analysis.exported": ("ExportedModel", "load"),
    "config": ("TrainConfig",),
    "errors": (
        "CallbackError",
        "ConfigError",
        "DataError",
        "DisagreementError",
        "DistGraftError",
        "NetworkFailedError",
        "NonFiniteError",
        "PeerError",
        "RunDirectoryError",
        "StoppedEarlyError",
    ),
    "grafting.coefficient": ("graft_coefficient",),
    "grafting.information": ("entropy", "filter_entropy", "l1"),
    "grafting.mixing": ("Mixing", "mix"),
    "grafting.rules": ("Average", "Diloco", "Graft", "Papa", "Rule", "Wash"),
    "grafting.units": ("GraftUnit", "graft_units"),
    "monitoring.callback": ("Callback",),
    "monitoring.metrics": ("EpochReport",),
    "population.grafter": ("Grafter",),
    "population.round.record": ("GraftRecord",),
    "population.runtime.launch": ("launch",),
    "training.data.datasets": ("Datasets",),
    "training.train": ("train",),
    "training.trainer": ("Trainer",),
}
_MODULES = {name: module for module, names in _NAMES.items() for name in names}

__all__ = [
    "Average",
    "Callback",
    "CallbackError",
    "ConfigError",
    "DataError",
    "Datasets",
    "Diloco",
    "DisagreementError",
    "DistGraftError",
    "EpochReport",
    "ExportedModel",
    "Graft",
    "GraftRecord",
    "GraftUnit",
    "Grafter",
    "Mixing",
    "NetworkFailedError",
    "NonFiniteError",
    "Papa",
    "PeerError",
    "Rule",
    "RunDirectoryError",
    "StoppedEarlyError",
    "TrainConfig",
    "Trainer",
    "Wash",
    "__version__",
    "entropy",
    "filter_entropy",
    "graft_coefficient",
    "graft_units",
    "l1",
    "launch",
    "load",
    "mix",
    "train",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'dist_graft' has no attribute {name!r}")
    value = getattr(import_module(f"dist_graft.{_MODULES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
