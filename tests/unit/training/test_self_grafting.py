"""Rounds inside one network: which weights change, and that the noise is reproducible."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from small import make_state
from torch import nn

from dist_graft.config import GraftConfig, OptimConfig
from dist_graft.grafting.units import graft_units
from dist_graft.training.self_grafting import self_graft

State = dict[str, torch.Tensor]


def model_of(*, channels_last: bool = False) -> nn.Module:
    """Model in which every other filter of each convolution is invalid."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(2, 6, 3),
        nn.BatchNorm2d(6),
        nn.Conv2d(6, 5, 3, groups=1),
        nn.ConvTranspose2d(5, 4, 2),
        nn.Flatten(),
        nn.Linear(16, 4),
    )
    with torch.no_grad():
        model[0].weight[::2] *= 1e-4
        model[2].weight[1::2] *= 1e-4
        model[3].weight[:, ::2] *= 1e-4
    return model.to(memory_format=torch.channels_last) if channels_last else model


def after(model: nn.Module, round_: int = 0, *, network: int = 0, **options: object) -> State:
    state = make_state(OptimConfig(), model=copy.deepcopy(model), network=network)
    config = GraftConfig(**{"threshold": 0.1, **options})  # type: ignore[arg-type]
    self_graft(state, graft_units(state.model), config, round_)
    return dict(state.model.state_dict())


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("source", ["noise", "internal"])
def test_only_the_invalid_filters_of_the_leads_change(source: str, channels_last: bool) -> None:
    model = model_of(channels_last=channels_last)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    state = after(model, source=source)
    for key, value in state.items():
        changed = (value != before[key]).numpy()
        invalid = np.zeros(value.shape, dtype=bool)
        if key == "0.weight":
            invalid[::2] = True
        elif key == "2.weight":
            invalid[1::2] = True
        elif key == "3.weight":
            invalid[:, ::2] = True
        assert (changed == invalid).all(), key
        assert value.stride() == before[key].stride()


def test_internal_donors_are_the_strongest_filters() -> None:
    model = model_of()
    weight = model[0].weight.detach().clone()
    norms = weight.abs().sum(dim=(1, 2, 3))
    order = norms.argsort().tolist()
    state = after(model, source="internal")
    for rank in range(3):
        assert torch.equal(state["0.weight"][order[rank]], weight[order[5 - rank]])


@pytest.mark.parametrize(("round_", "annealing"), [(0, 0.5), (3, 0.5), (2, 0.9)])
def test_the_noise_anneals_with_the_round(round_: int, annealing: float) -> None:
    model = nn.Sequential(nn.Conv2d(16, 64, 3, bias=False))
    nn.init.zeros_(model[0].weight)
    state = after(model, round_, source="noise", noise_annealing=annealing)
    assert float(state["0.weight"].std()) == pytest.approx(annealing**round_, rel=0.05)


def test_the_noise_depends_on_network_and_round_only() -> None:
    model = model_of()
    drawn = [
        after(model, round_, network=network, source="noise", noise_annealing=1.0)
        for round_, network in ((0, 0), (0, 0), (1, 0), (0, 1))
    ]
    first, again, later, other = (state["0.weight"] for state in drawn)
    assert torch.equal(first, again)
    assert not torch.equal(first, later)
    assert not torch.equal(first, other)
    assert not torch.equal(later, other)


def test_layers_have_different_noise() -> None:
    model = nn.Sequential(nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3))
    for part in model:
        nn.init.zeros_(part.weight)
    state = after(model, source="noise")
    assert not torch.equal(state["0.weight"], state["1.weight"])
