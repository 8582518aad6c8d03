"""Information of a layer's weights: entropy (arXiv 2001.05868, eq. 4 to 6) and L1."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from dist_graft.grafting.memory_layout import flat

_CHUNK = 1 << 17  # elements; a float32 buffer of this size fits in a core's cache


def entropy(weight: Tensor, *, num_bins: int = 10) -> Tensor:
    """Entropy of all weights of a layer together (eq. 6; eq. 4 for a single filter).

    H = -sum_k p_k ln p_k, where p_k is the share of weights in the k-th of num_bins bins of equal
    width between the smallest and the largest weight. The last bin includes its upper edge, so
    every weight counts once. Bin edges are computed in float32 and counts in int64 for every dtype.

    Args:
        weight: any shape, floating-point, not empty.
        num_bins: B, at least 1.

    Returns: a float64 scalar in nats, in [0, ln B]; 0 for a constant weight.

    Raises: ValueError for a weight that is empty, not floating-point or not finite, and for
        num_bins < 1.

    Example: the weights 0, 0, 1, 1 fill two of ten bins equally, which gives ln 2.
    """
    _check(weight, num_bins)
    return _row_entropies(_vector(weight)[None], num_bins)[0]


def filter_entropy(filters: Tensor, *, num_bins: int = 10) -> Tensor:
    """Sum of the entropies of a layer's filters (eq. 5), with separate bins for each filter.

    Args:
        filters: [filters, ...], floating-point, with one filter at each index of dimension 0.
        num_bins: B, at least 1.

    Returns: a float64 scalar in nats, in [0, filters ln B].

    Raises: ValueError as `entropy` does.
    """
    return entropies(filters, num_bins=num_bins).sum()


def entropies(filters: Tensor, *, num_bins: int = 10) -> Tensor:
    """Entropy of each filter (eq. 4): [filters, ...] -> float64 [filters], in nats."""
    _check(filters, num_bins)
    return _row_entropies(filters.reshape(filters.shape[0], -1), num_bins)


def l1(weight: Tensor) -> Tensor:
    """Mean absolute weight, a float64 scalar: the L1 norm divided by the number of weights.

    The division makes one sensitivity suitable for layers of any size.

    Raises: ValueError for a weight that is empty, not floating-point or not finite.
    """
    _check(weight, 1)
    return weight.detach().abs().mean(dtype=torch.float64)


def filter_norms(filters: Tensor) -> Tensor:
    """L1 norm of each filter: [filters, ...] -> float32 (or float64) [filters]."""
    rows = filters.reshape(filters.shape[0], -1)
    dtype = torch.promote_types(filters.dtype, torch.float32)
    return rows.detach().abs().sum(dim=1, dtype=dtype)


def invalid_filters(filters: Tensor, threshold: float) -> Tensor:
    """Number of filters with an L1 norm below the threshold: an int64 scalar."""
    return (filter_norms(filters) < threshold).sum()


CRITERIA: dict[str, Callable[[Tensor, int], Tensor]] = {
    "entropy": lambda filters, num_bins: entropy(filters, num_bins=num_bins),
    "filter_entropy": lambda filters, num_bins: filter_entropy(filters, num_bins=num_bins),
    "l1": lambda filters, _: l1(filters),
}
"""Criteria by name: (filters [filters, weights per filter], num_bins) -> information."""


def _check(weight: Tensor, num_bins: int) -> None:
    if num_bins < 1:
        raise ValueError(f"num_bins must be at least 1, got {num_bins}")
    if not weight.is_floating_point() or weight.numel() == 0:
        raise ValueError(
            f"information needs a non-empty floating-point tensor, got {weight.dtype} of shape "
            f"{tuple(weight.shape)}"
        )
    if not is_finite(weight):
        raise ValueError("information needs finite weights, got NaN or infinity")


def is_finite(tensor: Tensor) -> bool:
    """Whether all elements are finite; true for an empty tensor."""
    if tensor.numel() == 0:
        return True
    low, high = torch.aminmax(_vector(tensor.detach()))  # both are NaN if an element is
    return bool((low.isfinite() & high.isfinite()).item())


def _vector(tensor: Tensor) -> Tensor:
    """All elements in one dimension; a view if they are dense in memory."""
    try:
        return flat(tensor)
    except ValueError:
        return tensor.reshape(-1)


def _histogram(rows: Tensor, num_bins: int) -> Tensor:
    """Histogram of each row between its smallest and largest element: int64 [rows, num_bins]."""
    rows = rows.detach()
    # aminmax over a dimension is ten times slower than amin and amax together.
    low, high = torch.amin(rows, 1, keepdim=True), torch.amax(rows, 1, keepdim=True)
    shrink = None
    if not (high.float() - low.float()).isfinite().all():
        # The range overflows float32. Scaling by a power of two does not change any bin.
        exponent = torch.frexp(torch.maximum(low.abs(), high.abs()).double()).exponent
        shrink = torch.ldexp(torch.ones_like(low, dtype=torch.float64), -exponent.clamp(min=0) - 1)
        low, high = low * shrink, high * shrink
    low, span = low.float(), high.float() - low.float()
    span = torch.where(span > 0, span, torch.ones_like(span))
    counts = torch.zeros(rows.shape[0] * num_bins, dtype=torch.int64, device=rows.device)
    offset = torch.arange(rows.shape[0], dtype=torch.int32, device=rows.device)[:, None] * num_bins
    step = max(1, _CHUNK // rows.shape[1])
    for first in range(0, rows.shape[0], step):
        block = slice(first, first + step)
        for start in range(0, rows.shape[1], _CHUNK):
            part = rows[block, start : start + _CHUNK]
            part = part if shrink is None else part * shrink[block]
            position = part.float().sub(low[block]).div_(span[block]).mul_(num_bins)
            bin_ = position.to(torch.int32).clamp_(max=num_bins - 1)
            if rows.shape[0] > 1:
                bin_ += offset[block]
            counts += torch.bincount(bin_.reshape(-1), minlength=counts.numel())
    return counts.view(rows.shape[0], num_bins)


def _row_entropies(rows: Tensor, num_bins: int) -> Tensor:
    counts = _histogram(rows, num_bins)
    share = counts.double() / counts.sum(dim=1, keepdim=True)
    terms: Tensor = torch.special.entr(share)
    return terms.sum(dim=1).clamp_(min=0.0, max=math.log(num_bins))
