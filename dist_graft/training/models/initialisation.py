"""How the small-image networks start."""

from __future__ import annotations

from typing import Literal

from torch import nn


def he_normal_(model: nn.Module, *, fan: Literal["fan_in", "fan_out"]) -> None:
    """Draw a network's first weights in place, from torch's global generator.

    Convolutions: normal with variance 2 / fan, fan being kernel area times the input (fan_in) or
    output (fan_out) channels (He et al., arXiv 1502.01852, eq. 10 and 14). Linear layers: normal
    with variance 1 / inputs, so that the first logits are of order one. Biases start at zero;
    batch norm stays at scale one and shift zero.
    """
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode=fan, nonlinearity="relu")
        elif isinstance(module, nn.Linear):
            nn.init.kaiming_normal_(module.weight, mode="fan_in", nonlinearity="linear")
            nn.init.zeros_(module.bias)
