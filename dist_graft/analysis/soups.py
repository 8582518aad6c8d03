"""Model soups: networks with averaged weights (arXiv 2203.05482), and their batch norm."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn

from dist_graft.training.state import Predictor
from dist_graft.training.weights import State

_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


def uniform_soup(states: Sequence[State]) -> dict[str, Tensor]:
    """Average the weights of networks into new tensors.

    Sums are taken in float64 and rounded once to each tensor's type. Integer tensors (batch
    counters) are copied from the first network.
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
    """Choose the networks of a greedy soup (arXiv 2203.05482, recipe 1).

    Networks are tried in order of decreasing accuracy. Each one joins if the soup with it is at
    least as accurate as the soup without it.

    Args:
        states: of the networks.
        accuracies: of each network, on a split other than the test set.
        accuracy_of: accuracy of a soup on the same split.

    Returns: the chosen networks in the order in which they joined. Ties go to the first network.
    """
    order = sorted(range(len(states)), key=lambda network: -accuracies[network])
    members, best = order[:1], accuracies[order[0]]
    for network in order[1:]:
        candidate = [*members, network]
        accuracy = accuracy_of(uniform_soup([states[member] for member in sorted(candidate)]))
        if accuracy >= best:
            members, best = candidate, accuracy
    return members


@torch.no_grad()
def reestimate_batch_norm(predictor: Predictor, batches: Iterable[tuple[Tensor, Tensor]]) -> None:
    """Replace running mean and variance of each batch norm by their averages over batches.

    Each batch has the same weight; empty ones are skipped. Only batch norm runs in training mode,
    so dropout draws nothing. Batches are read only if the model has batch norm.

    Args:
        predictor: its model is modified in place and left in eval mode.
        batches: images and labels, on the model's device.
    """
    predictor.model.eval()
    layers = [
        module
        for module in predictor.model.modules()
        if isinstance(module, _BATCH_NORMS) and module.track_running_stats
    ]
    if not layers:
        return
    momenta = [layer.momentum for layer in layers]
    for layer in layers:
        layer.reset_running_stats()
        layer.momentum = None  # cumulative average instead of a moving one
        layer.train()
    for images, _ in batches:
        if len(images):
            with predictor.autocast():
                predictor.model(images)
    for layer, momentum in zip(layers, momenta, strict=True):
        layer.momentum = momentum
        layer.eval()
