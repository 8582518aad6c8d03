"""Running statistics of batch norm, estimated anew for weights that no training step has seen."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from dist_graft.training.loop import Predictor

_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


@torch.no_grad()
def reestimate(predictor: Predictor, batches: Iterable[tuple[Tensor, Tensor]]) -> None:
    """Set the running mean and variance of each batch norm to their means over the batches.

    Every batch weighs the same, an empty one nothing. Only batch norm runs as in training: dropout
    stays off, so nothing is drawn. A network without batch norm is left as it is.

    Args: batches: pairs of images and labels, in the run's device and memory format.
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
        layer.momentum = None  # the mean of all batches instead of a moving one
        layer.train()
    for images, _ in batches:
        if not len(images):
            continue
        with predictor.autocast():
            predictor.model(images)
    for layer, momentum in zip(layers, momenta, strict=True):
        layer.momentum = momentum
        layer.eval()
