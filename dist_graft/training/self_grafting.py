"""Rounds inside one network: noise or strong filters replace invalid filters."""

from __future__ import annotations

import torch

from dist_graft.config import GraftConfig
from dist_graft.grafting.reactivation import graft_internal, graft_noise, noise_deviation
from dist_graft.grafting.units import GraftUnit, graft_tensors
from dist_graft.seeding import stream_seed
from dist_graft.training.state import TrainState


@torch.no_grad()
def self_graft(state: TrainState, units: list[GraftUnit], config: GraftConfig, round_: int) -> None:
    """Graft a network in place, with noise or with its strongest filters.

    The noise is a pure function of seed, network and round.
    """
    tensors = graft_tensors(state.model)
    generator = torch.Generator().manual_seed(
        stream_seed("noise", state.seed, state.network, round_)
    )
    deviation = noise_deviation(round_, annealing=config.noise_annealing)
    for unit in units:
        weight = tensors[unit.lead]
        filters = unit.filters(weight)
        if config.source == "internal":
            grafted = graft_internal(
                filters, threshold=config.threshold, add=config.internal == "add"
            )
        else:
            grafted = graft_noise(
                filters, deviation=deviation, threshold=config.threshold, generator=generator
            )
        unit.store_filters(weight, grafted)
