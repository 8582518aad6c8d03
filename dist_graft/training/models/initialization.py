"""Initialization of the networks for small images."""

from __future__ import annotations

from typing import Literal

from torch import nn


def he_normal_(model: nn.Module, *, fan: Literal["fan_in", "fan_out"]) -> None:
    """Initialize a network in place, from torch's global generator.

    Convolutions: normal with variance 2 / fan, where fan is the kernel area times the number of
    input (fan_in) or output (fan_out) channels (He et al., arXiv 1502.01852, eq. 10 and 14). Linear
    layers: normal with variance 1 / in_features and zero bias, so that initial logits are of order
    one. Batch norm keeps scale one and shift zero.
    """
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode=fan, nonlinearity="relu")
        elif isinstance(module, nn.Linear):
            nn.init.kaiming_normal_(module.weight, mode="fan_in", nonlinearity="linear")
            nn.init.zeros_(module.bias)
