"""Scions that come from the network itself: noise, and its own strong filters. No exchange."""

from __future__ import annotations

import torch
from torch import Tensor

from dist_graft.grafting.information import filter_norms


def noise_deviation(round_: int, *, annealing: float = 0.975) -> float:
    """Standard deviation of the noise in a round: sigma_t = a^t (arXiv 2001.05868, section 3.2).

    Raises: ValueError when a is not in (0, 1] or the round is negative.
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
        deviation: sigma of the noise.
        threshold: a filter with a smaller L1 norm is invalid.
        generator: on the CPU, so that the draws do not depend on the device; it is advanced by one
            number for every weight of the layer, whatever is invalid.

    Returns: the filters after the graft, in a new tensor.
    """
    noise = torch.randn(filters.shape, generator=generator) * deviation
    invalid = filter_norms(filters) < threshold
    noise = noise.to(device=filters.device, dtype=filters.dtype)
    return torch.where(invalid[:, None], filters + noise, filters)


def graft_internal(filters: Tensor, *, threshold: float = 0.1) -> Tensor:
    """Put a layer's strongest filters into the places of its invalid ones.

    With the filters sorted by L1 norm, the i-th largest replaces the i-th smallest, for every i for
    which the smaller one is below the threshold and the two are different filters.

    Args:
        filters: [filters, weights per filter]; not changed.
        threshold: gamma; a filter with a smaller L1 norm is invalid.

    Returns: the filters after the graft, in a new tensor.
    """
    norms = filter_norms(filters)
    order = torch.argsort(norms, stable=True)
    half = len(order) // 2
    smallest, largest = order[:half], order.flip(0)[:half]
    chosen = norms[smallest] < threshold
    grafted = filters.clone()
    grafted[smallest[chosen]] = filters[largest[chosen]]
    return grafted
