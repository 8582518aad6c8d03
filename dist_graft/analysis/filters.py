"""Norms and entropies of the filters of networks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import compress

import numpy as np
from numpy.typing import NDArray

from dist_graft.analysis.stored_weights import Source, architecture, load_state
from dist_graft.errors import ConfigError, NonFiniteError
from dist_graft.grafting.information import entropies, entropy, filter_norms, l1
from dist_graft.grafting.units import Lead, graft_tensors, graft_units

Numbers = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Layer:
    """Lead tensor of one graft unit in one network."""

    unit: str
    weights: int
    """Number of weights per filter."""
    entropy: float
    """Entropy of all weights together (eq. 6), in nats."""
    mean_absolute: float
    """Mean absolute weight, the information of the L1 criterion."""
    norms: Numbers
    """[filters]: L1 norm of each filter."""
    entropies: Numbers
    """[filters]: entropy of each filter (eq. 4), in nats."""


@dataclass(frozen=True, kw_only=True)
class Inspected:
    """Measurements of all networks of one source. The networks have the same layers."""

    label: str
    networks: dict[str, list[Layer]]

    @property
    def units(self) -> list[tuple[str, int]]:
        """Name and number of filters of each graft unit, from input to output."""
        return [(layer.unit, len(layer.norms)) for layer in next(iter(self.networks.values()))]

    def below(self, threshold: float) -> NDArray[np.int64]:
        """Number of filters with a smaller L1 norm, [networks, units]."""
        return np.array(
            [
                [int((layer.norms < threshold).sum()) for layer in layers]
                for layers in self.networks.values()
            ]
        )

    def layer_entropies(self) -> Numbers:
        """Entropy of each layer in nats, [networks, units]."""
        return np.array([[layer.entropy for layer in layers] for layers in self.networks.values()])


def inspect_source(source: Source, label: str, *, num_bins: int, lead: Lead | None) -> Inspected:
    """Measure every filter of every network.

    Args:
        source: networks to measure.
        label: name of the source in tables and plots.
        num_bins: histogram bins of the entropy.
        lead: layers to inspect; None: those that the source's run grafts.

    Raises: ConfigError if the weights do not fit the architecture or no layer can lead a unit;
        NonFiniteError naming network and layer.
    """
    first = next(iter(source.states.values()))
    model = architecture(source.model, first, source.path, source.shape)
    try:
        units = graft_units(model, lead=lead or source.lead)
    except ValueError as error:
        raise ConfigError(f"{source.path}: {error}") from error
    networks = {}
    for name, state in source.states.items():
        load_state(model, state, source.path)
        tensors = graft_tensors(model)
        layers = []
        for unit in units:
            filters = unit.filters(tensors[unit.lead].detach())
            try:
                layer = Layer(
                    unit=unit.name,
                    weights=filters.shape[1],
                    entropy=float(entropy(filters, num_bins=num_bins)),
                    mean_absolute=float(l1(filters)),
                    norms=filter_norms(filters).double().numpy(),
                    entropies=entropies(filters, num_bins=num_bins).numpy(),
                )
            except ValueError as error:
                raise NonFiniteError(
                    f"{source.path}: layer {unit.name} of network {name}: {error}"
                ) from error
            layers.append(layer)
        networks[name] = layers
    return Inspected(label=label, networks=networks)


def shared_layers(inspected: Sequence[Inspected]) -> list[Inspected]:
    """Keep the layers that all sources have, with the same name and number of filters.

    Raises: ConfigError if there are none.
    """
    common = set(inspected[0].units).intersection(*(source.units for source in inspected[1:]))
    if not common:
        raise ConfigError(
            f"{', '.join(source.label for source in inspected)} share no layers: inspect them "
            "separately"
        )
    kept = []
    for source in inspected:
        keep = [unit in common for unit in source.units]
        networks = {name: list(compress(layers, keep)) for name, layers in source.networks.items()}
        kept.append(replace(source, networks=networks))
    if any(source.units != kept[0].units for source in kept):
        raise ConfigError(
            "the sources have their layers in different orders: inspect them separately"
        )
    return kept
