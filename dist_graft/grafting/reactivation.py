"""Reactivation of invalid filters without an exchange: noise, and the network's own filters."""

from __future__ import annotations

import torch
from torch import Tensor

from dist_graft.grafting.information import filter_norms


def noise_deviation(round_: int, *, annealing: float = 0.975) -> float:
    """Standard deviation of the noise in round t: sigma_t = a^t (arXiv 2001.05868, section 3.2).

    Raises: ValueError if a is not in (0, 1] or the round is negative.
    """
    if not 0 < annealing <= 1:
        raise ValueError(f"annealing must be in (0, 1], got {annealing!r}")
    if round_ < 0:
        raise ValueError(f"round must be at least 0, got {round_!r}")
    return annealing**round_


def graft_noise(
    filters: Tensor, *, deviation: float, threshold: float = 0.1, generator: torch.Generator
) -> Tensor:
    """Add Gaussian noise to the invalid filters of a layer.

    Args:
        filters: [filters, weights per filter]; not changed.
        deviation: standard deviation of the noise.
        threshold: filters with a smaller L1 norm are invalid.
        generator: CPU generator, so that draws do not depend on the device; advanced by one number
            for every weight of the layer.

    Returns: the filters after the graft, in a new tensor.
    """
    noise = torch.randn(filters.shape, generator=generator) * deviation
    invalid = filter_norms(filters) < threshold
    noise = noise.to(device=filters.device, dtype=filters.dtype)
    return torch.where(invalid[:, None], filters + noise, filters)


def graft_internal(filters: Tensor, *, threshold: float = 0.1, add: bool = False) -> Tensor:
    """Replace a layer's invalid filters by its strongest ones, or add these to them.

    With the filters sorted by L1 norm, the i-th largest replaces the i-th smallest if the smaller
    one is below the threshold and the two are different filters.

    Args:
        filters: [filters, weights per filter]; not changed.
        threshold: gamma; filters with a smaller L1 norm are invalid.
        add: an invalid filter becomes the sum of both, as in the authors' first release.

    Returns: the filters after the graft, in a new tensor.
    """
    norms = filter_norms(filters)
    order = torch.argsort(norms, stable=True)
    half = len(order) // 2
    smallest, largest = order[:half], order.flip(0)[:half]
    chosen = norms[smallest] < threshold
    grafted = filters.clone()
    invalid, strong = smallest[chosen], filters[largest[chosen]]
    grafted[invalid] = filters[invalid] + strong if add else strong
    return grafted
