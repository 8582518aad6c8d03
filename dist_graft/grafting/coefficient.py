"""How much of its own weights a layer keeps (arXiv 2001.05868, eq. 7)."""

from __future__ import annotations

import math
from typing import overload

import torch
from torch import Tensor


@overload
def graft_coefficient(
    recipient: float, donor: float, *, amplitude: float, sensitivity: float
) -> float: ...
@overload
def graft_coefficient(
    recipient: Tensor, donor: Tensor | float, *, amplitude: float, sensitivity: float
) -> Tensor: ...
@overload
def graft_coefficient(
    recipient: float, donor: Tensor, *, amplitude: float, sensitivity: float
) -> Tensor: ...


def graft_coefficient(
    recipient: Tensor | float,
    donor: Tensor | float,
    *,
    amplitude: float,
    sensitivity: float,
) -> Tensor | float:
    """Weight that the recipient keeps when one layer is grafted.

    alpha = (A / pi) arctan(c (H_recipient - H_donor)) + 1/2 (eq. 7; the 1/pi is in the authors'
    code and figure, not in the printed formula, and keeps alpha inside (0, 1); see ADR 1).

    Args:
        recipient: information of the layer in the network that receives (nats for entropy), a
            number or a tensor.
        donor: information of the same layer in the network that gives, likewise.
        amplitude: A, dimensionless, in [0, 1].
        sensitivity: c, per unit of information, at least 0.

    Returns: alpha in [1/2 - A/2, 1/2 + A/2]; a float for two numbers, else a tensor of their
        common shape. Swapping the first two gives 1 - alpha.

    Raises: ValueError naming the argument and its value, when out of range or not finite.

    Example: equal information gives 0.5.
    """
    if not 0 <= amplitude <= 1:
        raise ValueError(f"amplitude must be in [0, 1], got {amplitude!r}")
    if not (sensitivity >= 0 and math.isfinite(sensitivity)):
        raise ValueError(f"sensitivity must be finite and at least 0, got {sensitivity!r}")
    for name, value in (("recipient", recipient), ("donor", donor)):
        finite = value.isfinite().all() if isinstance(value, Tensor) else math.isfinite(value)
        if not finite:
            raise ValueError(f"{name} must be finite, got {value!r}")
    difference = recipient - donor
    if isinstance(difference, Tensor):
        return torch.atan(sensitivity * difference) * (amplitude / math.pi) + 0.5
    return math.atan(sensitivity * difference) * (amplitude / math.pi) + 0.5
