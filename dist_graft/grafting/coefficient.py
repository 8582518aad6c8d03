"""Graft coefficient: the share of its weights that a layer keeps (arXiv 2001.05868)."""

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

    alpha = (A / pi) arctan(c (H_recipient - H_donor)) + 1/2 (eq. 7, with the 1/pi of the authors'
    code, which keeps alpha in (0, 1); see ADR 1).

    Args:
        recipient: information of the layer in the recipient, a number or a tensor (nats for
            entropy).
        donor: information of the same layer in the donor.
        amplitude: A, dimensionless, in [0, 1].
        sensitivity: c, per unit of information, at least 0.

    Returns: alpha in [1/2 - A/2, 1/2 + A/2], and 1/2 for equal information; a float for two
        numbers, otherwise a tensor of their broadcast shape. Swapping recipient and donor gives
        1 - alpha.

    Raises: ValueError naming the argument and its value when it is out of range or not finite.
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
