"""Rounds that happen inside one network: invalid filters get noise, or the strongest filters."""

from __future__ import annotations

import torch

from dist_graft.config import GraftConfig
from dist_graft.grafting.reactivation import graft_internal, graft_noise, noise_deviation
from dist_graft.grafting.units import GraftUnit, graft_tensors
from dist_graft.seeding import stream_seed
from dist_graft.training.state import TrainState


@torch.no_grad()
def self_graft(
    trainee: TrainState, units: list[GraftUnit], config: GraftConfig, round_: int
) -> None:
    """Change the network's lead weights in place; no other network is involved."""
    tensors = graft_tensors(trainee.model)
    draw = torch.Generator().manual_seed(
        stream_seed("noise", trainee.seed, trainee.network, round_)
    )
    deviation = noise_deviation(round_, annealing=config.noise_annealing)
    for unit in units:
        weight = tensors[unit.lead]
        filters = unit.filters(weight)
        if config.source == "internal":
            grafted = graft_internal(filters, threshold=config.threshold)
        else:
            grafted = graft_noise(
                filters, deviation=deviation, threshold=config.threshold, generator=draw
            )
        unit.store_filters(weight, grafted)
