"""Rounds recorded from the authors' script, deviation by deviation (tests/golden/README.md)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from dist_graft import Graft, Mixing, entropy, graft_coefficient, graft_units, mix

FOLDER = Path(__file__).parents[2] / "golden"


class Block(nn.Module):
    def __init__(self, into: int, out: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(into, out, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(out)
        self.conv2 = nn.Conv2d(out, out, 3, bias=False)
        self.bn2 = nn.BatchNorm2d(out)


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 6, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(6)
        self.layer1 = nn.Sequential(Block(6, 6))
        self.layer2 = nn.Sequential(Block(6, 12))
        self.linear = nn.Linear(12, 5)


class Golden:
    """One recorded round."""

    def __init__(self, name: str) -> None:
        self.facts: dict[str, Any] = json.loads((FOLDER / f"{name}.json").read_text())
        with np.load(FOLDER / f"{name}.npz") as arrays:
            self._arrays = {key: arrays[key] for key in arrays.files}
        self.networks = range(self.facts["networks"])
        self.amplitude = self.facts["amplitude"]
        self.sensitivity = self.facts["sensitivity"]
        self.donor_of = self.facts["donor_of"]
        self.units = graft_units(Network())
        self.leads = [unit.lead for unit in self.units]

    def state(self, when: str, network: int) -> dict[str, torch.Tensor]:
        start = f"{when}/{network}/"
        return {
            key.removeprefix(start): torch.from_numpy(value)
            for key, value in self._arrays.items()
            if key.startswith(start)
        }

    def mixing(self, coefficients: str) -> Mixing:
        """Mixing with recorded coefficients."""
        shares = torch.zeros(len(self.units), *[len(self.networks)] * 2, dtype=torch.float64)
        for network in self.networks:
            own = torch.tensor(
                [self.facts[coefficients][network][key] for key in self.leads], dtype=torch.float64
            )
            shares[:, network, network] = own
            shares[:, network, self.donor_of[network]] = 1 - own
        return Mixing(shares=shares, donors=tuple((donor,) for donor in self.donor_of))


@pytest.fixture(params=["k2_c500", "k3_c5"], scope="module")
def golden(request: pytest.FixtureRequest) -> Golden:
    return Golden(request.param)


def half_open_counts(weight: np.ndarray, num_bins: int) -> np.ndarray:
    """Weights per half-open bin, with edges in float32."""
    low, high = weight.min(), weight.max()
    width = (high - low) / np.float32(num_bins)
    edges = low + np.arange(num_bins + 1, dtype=np.float32) * width
    return np.array(
        [((weight >= edges[k]) & (weight < edges[k + 1])).sum() for k in range(num_bins)]
    )


def entropy_of(counts: np.ndarray, total: int) -> float:
    share = counts[counts > 0] / total
    return float(-(share * np.log(share)).sum())


def test_recorded_network_has_the_architecture_of_this_test(golden):
    for network in golden.networks:
        expected = {key: value.shape for key, value in Network().state_dict().items()}
        for when in ("before", "after"):
            state = golden.state(when, network)
            assert list(state) == list(expected)
            assert {key: value.shape for key, value in state.items()} == expected
    assert golden.leads == list(golden.facts["coefficient"][0])


def test_recorded_donors_are_the_ring(golden):
    information = torch.zeros(len(golden.networks), 1, dtype=torch.float64)
    mixing = Graft().decide(information, 0)
    assert [donor for (donor,) in mixing.donors] == golden.donor_of


def test_entropy_differs_only_by_the_last_bin(golden):
    """Habit 1: the script omits the largest weights, which `entropy` counts in the last bin.

    Both count them where rounding puts the upper edge above the largest weight.
    """
    left_out = 0
    for network in golden.networks:
        state = golden.state("before", network)
        for key, recorded in golden.facts["layer_entropy"][network].items():
            weight = state[key].numpy().ravel()
            counts = half_open_counts(weight, golden.facts["num_bins"])
            missing = weight.size - counts.sum()
            assert missing in (0, (weight == weight.max()).sum())
            left_out += missing
            assert entropy_of(counts, weight.size) == pytest.approx(recorded, abs=1e-6)

            counts[-1] += missing
            assert entropy(state[key]).item() == pytest.approx(
                entropy_of(counts, weight.size), abs=1e-12
            )
    assert left_out > 0


def test_last_bin_changes_the_entropy_slightly(golden):
    for network in golden.networks:
        state = golden.state("before", network)
        for key, recorded in golden.facts["layer_entropy"][network].items():
            assert entropy(state[key]).item() == pytest.approx(recorded, abs=0.032)


def test_coefficient_is_the_unrounded_one(golden):
    """Habit 2: the script rounds its coefficients to two digits."""
    for network, own in enumerate(golden.facts["layer_entropy"]):
        donor = golden.facts["layer_entropy"][golden.donor_of[network]]
        for key in golden.leads:
            computed = graft_coefficient(
                own[key],
                donor[key],
                amplitude=golden.amplitude,
                sensitivity=golden.sensitivity,
            )
            recorded = golden.facts["coefficient_unrounded"][network][key]
            assert computed == pytest.approx(recorded, abs=1e-9)
            assert round(computed, 2) == golden.facts["coefficient"][network][key]


def test_recorded_coefficients_give_the_recorded_weights(golden):
    """Habits 2 and 3: with rounded coefficients, up to two ulps of the larger input.

    The script computes a*x + b*y, `mix` a lerp.
    """
    befores = [golden.state("before", network) for network in golden.networks]
    afters = mix(befores, golden.units, golden.mixing("coefficient"))
    for network, after in enumerate(afters):
        donor = befores[golden.donor_of[network]]
        for key, recorded in golden.state("after", network).items():
            if recorded.is_floating_point():
                size = torch.maximum(befores[network][key].abs(), donor[key].abs()).numpy()
                apart = (after[key] - recorded).abs().numpy()
                assert (apart <= 2 * np.spacing(size)).all(), key


def test_recorded_weights_are_the_weighted_sum_by_units(golden):
    """Habit 3 alone, without tolerance: every tensor has the coefficient of its unit."""
    for network in golden.networks:
        own = golden.state("before", network)
        donor = golden.state("before", golden.donor_of[network])
        after = golden.state("after", network)
        for unit in golden.units:
            kept = golden.facts["coefficient"][network][unit.lead]
            for key in unit.tensors:
                blend = np.float32(kept) * own[key].numpy()
                blend += np.float32(1 - kept) * donor[key].numpy()
                assert np.array_equal(blend, after[key].numpy()), key


def test_rounding_the_coefficients_changes_the_weights(golden):
    befores = [golden.state("before", network) for network in golden.networks]
    afters = mix(befores, golden.units, golden.mixing("coefficient_unrounded"))
    worst = max(
        (after[key] - golden.state("after", network)[key]).abs().max().item()
        for network, after in enumerate(afters)
        for key in golden.leads
    )
    assert worst > 1e-4


def test_script_blends_integers_and_mix_does_not(golden):
    """Habit 4: the script truncates kept * own + (1 - kept) * donor to an integer."""
    befores = [golden.state("before", network) for network in golden.networks]
    afters = mix(befores, golden.units, golden.mixing("coefficient"))
    blended = 0
    for network, after in enumerate(afters):
        kept = None
        for key, recorded in golden.state("after", network).items():
            kept = golden.facts["coefficient"][network].get(key, kept)
            if recorded.is_floating_point():
                continue
            own, donor = befores[network][key], befores[golden.donor_of[network]][key]
            assert recorded == int(kept * own.item() + (1 - kept) * donor.item())
            assert after[key] == own
            blended += int(recorded != own)
    assert blended > 0


def test_round_is_close_to_the_recorded_one():
    """All deviations together, at a low sensitivity."""
    golden = Golden("k3_c5")
    befores = [golden.state("before", network) for network in golden.networks]
    rule = Graft(amplitude=golden.amplitude, sensitivity=golden.sensitivity)
    information = torch.stack(
        [
            torch.stack([rule.information(u.filters(state[u.lead])) for u in golden.units])
            for state in befores
        ]
    )
    mixing = rule.decide(information, 0)
    for network in golden.networks:
        recorded = golden.facts["coefficient_unrounded"][network]
        for unit, computed in zip(golden.units, mixing.own_share(network), strict=True):
            assert computed == pytest.approx(recorded[unit.lead], abs=0.02)
