"""Variants as in the authors' scripts against recorded rounds (tests/golden/README.md)."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from dist_graft import graft_units, mix
from dist_graft.grafting.reactivation import graft_internal
from dist_graft.grafting.rules.filter_graft import FilterGraft, filter_links
from dist_graft.grafting.units import graft_tensors

FOLDER = Path(__file__).parents[2] / "golden"
FILTER_ROUNDS = {"authors": "authors", "authors_classifier": "authors", "channel": "channel"}
"""graft.filter_rule of each recorded round, by the name of its file."""
State = dict[str, torch.Tensor]


def chain(*, classifier: bool = False) -> nn.Module:
    """Three convolutions, with biases and a classifier at two positions or without both."""
    convolutions = nn.Sequential(
        *(nn.Conv2d(3, 5, 3, bias=classifier), nn.BatchNorm2d(5), nn.ReLU()),
        *(nn.Conv2d(5, 8, 3, bias=classifier), nn.BatchNorm2d(8), nn.ReLU()),
        *(nn.Conv2d(8, 4, 3, bias=classifier), nn.BatchNorm2d(4)),
    )
    if classifier:
        convolutions.extend([nn.AdaptiveAvgPool2d((1, 2)), nn.Flatten(), nn.Linear(8, 3)])
    return convolutions


def recorded(name: str, networks: int, when: str) -> list[State]:
    with np.load(FOLDER / f"filter_{name}.npz") as arrays:
        starts = [f"{networks}/{when}/{network}/" for network in range(networks)]
        return [
            {
                key.removeprefix(start): torch.from_numpy(arrays[key])
                for key in arrays.files
                if key.startswith(start)
            }
            for start in starts
        ]


def play(model: nn.Module, befores: list[State], filter_rule: str) -> list[State]:
    units = graft_units(model)
    rule = FilterGraft(links=filter_links(units, graft_tensors(model)), filter_rule=filter_rule)  # type: ignore[arg-type]
    information = torch.stack([rule.measure(units, state) for state in befores])
    return mix(befores, units, rule.decide(information, 0))


@pytest.mark.parametrize("networks", [2, 3])
@pytest.mark.parametrize("name", FILTER_ROUNDS)
def test_filter_level(name: str, networks: int) -> None:
    """Biases and classifier keep what this project chose; the rest of `authors` is published."""
    model = chain(classifier=name != "authors")
    befores, wanted = (recorded(name, networks, when) for when in ("before", "after"))
    for after, expected in zip(play(model, befores, FILTER_ROUNDS[name]), wanted, strict=True):
        assert set(after) == set(expected) == set(graft_tensors(model))
        for key, value in after.items():
            torch.testing.assert_close(value, expected[key], rtol=0, atol=2e-6, msg=key)


def test_the_authors_filter_level_leaves_two_networks_different_and_the_donors_batch_norm() -> None:
    befores = recorded("authors", 2, "before")
    first, second = play(chain(), befores, "authors")
    assert (first["3.weight"] - second["3.weight"]).abs().max() > 0.1
    donor = befores[1]["4.running_mean"]
    apart = (first["4.running_mean"] - donor).abs().max()
    assert apart < 0.01 * (befores[0]["4.running_mean"] - donor).abs().max()
    equal = play(chain(), befores, "channel")
    torch.testing.assert_close(equal[0]["3.weight"], equal[1]["3.weight"])


@pytest.mark.parametrize("rule", ["add", "replace"])
def test_internal_scions(rule: str) -> None:
    with np.load(FOLDER / f"internal_{rule}.npz") as arrays:
        before, after = (torch.from_numpy(arrays[name]) for name in ("before", "after"))
    assert torch.equal(graft_internal(before, threshold=0.1, add=rule == "add"), after)
    changed = (before != after).any(dim=1)
    assert changed.nonzero().flatten().tolist() == [1, 4, 6]
    assert not torch.equal(graft_internal(before, threshold=0.1, add=rule != "add"), after)
