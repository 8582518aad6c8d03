"""Several networks as one: the mean of their weights (arXiv 2203.05482), or of their answers."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from dist_graft.analysis.stored_run import State


def uniform_soup(states: Sequence[State]) -> dict[str, Tensor]:
    """Mean of the networks' weights, in new tensors.

    Sums are taken in float64 and rounded once, to each tensor's own type. Integer tensors (counters
    of batches) are those of the first network.
    """
    return {
        key: torch.stack([state[key].double() for state in states]).mean(0).to(first.dtype)
        if first.is_floating_point()
        else first.clone()
        for key, first in states[0].items()
    }


def greedy_soup(
    states: Sequence[State],
    accuracies: Sequence[float],
    accuracy_of: Callable[[dict[str, Tensor]], float],
) -> list[int]:
    """Choose the members of a soup, the best network first (arXiv 2203.05482, recipe 1).

    Each network in turn, in falling order of accuracy, joins when the soup with it is not worse
    than the soup without it.

    Args:
        states: of the networks.
        accuracies: of each network, on a split that is not the test set.
        accuracy_of: of a soup, on the same split.

    Returns: the members in the order in which they joined; of equal networks the first goes first.
    """
    order = sorted(range(len(states)), key=lambda network: -accuracies[network])
    members, best = order[:1], accuracies[order[0]]
    for network in order[1:]:
        candidate = [*members, network]
        reached = accuracy_of(uniform_soup([states[member] for member in sorted(candidate)]))
        if reached >= best:
            members, best = candidate, reached
    return members
