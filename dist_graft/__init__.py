"""Train a population of networks that graft each other. Names load when first used (PEP 562)."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from dist_graft.version import VERSION as __version__  # noqa: N811

if TYPE_CHECKING:
    from dist_graft.errors import (
        ConfigError,
        DisagreementError,
        DistGraftError,
        NetworkFailedError,
        NonFiniteError,
        PeerError,
    )
    from dist_graft.grafting.coefficient import graft_coefficient
    from dist_graft.grafting.information import entropy, filter_entropy, l1
    from dist_graft.grafting.mixing import Mixing, mix
    from dist_graft.grafting.rules.average import Average
    from dist_graft.grafting.rules.base import Rule
    from dist_graft.grafting.rules.graft import Graft
    from dist_graft.grafting.rules.papa import Papa
    from dist_graft.grafting.rules.wash import Wash
    from dist_graft.grafting.units import GraftUnit, graft_units
    from dist_graft.population.grafter import Grafter
    from dist_graft.population.round.record import GraftRecord
    from dist_graft.population.runtime.launch import launch
    from dist_graft.training.data.datasets import Datasets

_HOME = {
    "ConfigError": "errors",
    "DisagreementError": "errors",
    "DistGraftError": "errors",
    "NetworkFailedError": "errors",
    "NonFiniteError": "errors",
    "PeerError": "errors",
    "entropy": "grafting.information",
    "filter_entropy": "grafting.information",
    "l1": "grafting.information",
    "graft_coefficient": "grafting.coefficient",
    "GraftUnit": "grafting.units",
    "graft_units": "grafting.units",
    "Mixing": "grafting.mixing",
    "mix": "grafting.mixing",
    "Average": "grafting.rules.average",
    "Papa": "grafting.rules.papa",
    "Wash": "grafting.rules.wash",
    "Graft": "grafting.rules.graft",
    "Rule": "grafting.rules.base",
    "Grafter": "population.grafter",
    "GraftRecord": "population.round.record",
    "Datasets": "training.data.datasets",
    "launch": "population.runtime.launch",
}

__all__ = [
    "Average",
    "ConfigError",
    "Datasets",
    "DisagreementError",
    "DistGraftError",
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
    "Wash",
    "__version__",
    "entropy",
    "filter_entropy",
    "graft_coefficient",
    "graft_units",
    "l1",
    "launch",
    "mix",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'dist_graft' has no attribute {name!r}")
    value = getattr(import_module(f"dist_graft.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
