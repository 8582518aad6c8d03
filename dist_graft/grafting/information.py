"""Information of a layer's weights: entropy (arXiv 2001.05868, eq. 4 to 6) and L1."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from dist_graft.grafting.memory_layout import flat
from dist_graft.grafting.multi_tensor import multi_tensor

_CHUNK = 1 << 17  # elements; a float32 buffer of this size fits in a core's cache
_BATCH = 1 << 22  # elements of all layers that an accelerator counts at once
_COUNTERS = 1 << 20  # largest number of counters that an accelerator spreads the counts over


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


def information_of_all(matrices: Sequence[Tensor], criterion: str, *, num_bins: int = 10) -> Tensor:
    """Information of many layers by one criterion, in few operations: float64 [layers] on the CPU.

    The same counts and values as with the function in CRITERIA for each layer: smallest and largest
    weight, bin edges and positions are computed by the same operations in the same dtypes.

    Args:
        matrices: [filters, weights per filter] of each layer, on one device.
        criterion: a name in CRITERIA.
        num_bins: B, at least 1.

    Raises: ValueError as `entropy` does. The result is read first; for finite weights, this is the
        only synchronization with the device.
    """
    for matrix in matrices:
        _check_shape(matrix, num_bins)
    if criterion == "l1":
        result = torch.stack([matrix.abs().mean(dtype=torch.float64) for matrix in matrices])
    elif criterion == "filter_entropy":
        parts = _batched_entropies(matrices, num_bins).split([len(matrix) for matrix in matrices])
        result = torch.stack([part.sum() for part in parts])
    else:
        result = _batched_entropies([_vector(matrix)[None] for matrix in matrices], num_bins)
    result = result.cpu()
    if not result.isfinite().all() and first_not_finite(matrices) is not None:
        raise ValueError(_NOT_FINITE)  # otherwise the sum of an L1 norm is too large
    return result


_NOT_FINITE = "information needs finite weights, got NaN or infinity"


def _check(weight: Tensor, num_bins: int) -> None:
    _check_shape(weight, num_bins)
    if not is_finite(weight):
        raise ValueError(_NOT_FINITE)


def _check_shape(weight: Tensor, num_bins: int) -> None:
    if num_bins < 1:
        raise ValueError(f"num_bins must be at least 1, got {num_bins}")
    if not weight.is_floating_point() or weight.numel() == 0:
        raise ValueError(
            f"information needs a non-empty floating-point tensor, got {weight.dtype} of shape "
            f"{tuple(weight.shape)}"
        )


def first_not_finite(tensors: Sequence[Tensor]) -> int | None:
    """Return the index of the first tensor with NaN or infinity; None if all are finite."""
    if not multi_tensor(tensors):
        found = (index for index, tensor in enumerate(tensors) if not is_finite(tensor))
        return next(found, None)
    order: list[int] = []
    finite: list[Tensor] = []
    for dtype in dict.fromkeys(tensor.dtype for tensor in tensors):
        same_dtype = [i for i, one in enumerate(tensors) if one.dtype == dtype and one.numel()]
        if same_dtype:
            largest = torch._foreach_norm([tensors[i].detach() for i in same_dtype], math.inf)
            finite.append(torch.stack(largest).isfinite())  # the largest is NaN if an element is
            order += same_dtype
    flags = torch.cat(finite).tolist() if finite else []  # one read for all tensors
    return min((i for i, ok in zip(order, flags, strict=True) if not ok), default=None)


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
        shrink = _shrinkage(low, high)
        low, high = low * shrink, high * shrink
    low, span = _edges(low, high)
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


def _edges(low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """Lower edge and width of all bins together, float32; the width is 1 for a constant row."""
    span = high.float() - low.float()
    return low.float(), torch.where(span > 0, span, torch.ones_like(span))


def _shrinkage(low: Tensor, high: Tensor) -> Tensor:
    """Factor for each row whose range overflows float32, otherwise 1: float64.

    Scaling by a power of two does not change any bin.
    """
    fits = (high.float() - low.float()).isfinite()
    exponent = torch.frexp(torch.maximum(low.abs(), high.abs()).double()).exponent
    factor = torch.ldexp(torch.ones_like(low, dtype=torch.float64), -exponent.clamp(min=0) - 1)
    return torch.where(fits, 1.0, factor)


def _row_entropies(rows: Tensor, num_bins: int) -> Tensor:
    return _entropies_of_counts(_histogram(rows, num_bins))


def _entropies_of_counts(counts: Tensor) -> Tensor:
    """Entropy of each row of counts: int64 [rows, num_bins] -> float64 [rows]."""
    share = counts.double() / counts.sum(dim=1, keepdim=True)
    terms: Tensor = torch.special.entr(share)
    return terms.sum(dim=1).clamp_(min=0.0, max=math.log(counts.shape[1]))


def _batched_entropies(matrices: Sequence[Tensor], num_bins: int) -> Tensor:
    """Entropies of the rows of many matrices: float64 [rows of all matrices].

    Neither the number of operations nor the scratch memory (about 40 bytes for each of _BATCH
    elements) grows with the rows; nothing waits for the device. NaN for a row that is not finite.
    """
    entropies_: list[Tensor] = [torch.empty(0)] * len(matrices)
    for dtype in dict.fromkeys(matrix.dtype for matrix in matrices):
        chosen = [index for index, matrix in enumerate(matrices) if matrix.dtype == dtype]
        rows = [matrices[index].detach() for index in chosen]
        parts = _entropies_of_dtype(rows, num_bins).split([len(matrix) for matrix in rows])
        for index, part in zip(chosen, parts, strict=True):
            entropies_[index] = part
    return torch.cat(entropies_)


def _entropies_of_dtype(matrices: Sequence[Tensor], num_bins: int) -> Tensor:
    device, dtype = matrices[0].device, torch.promote_types(matrices[0].dtype, torch.float32)

    # Smallest and largest element of each row, in one pass over each matrix.
    bounds = [torch.aminmax(matrix, dim=1) for matrix in matrices]
    low, high = (torch.cat(parts).to(dtype) for parts in zip(*bounds, strict=True))
    finite = low.isfinite() & high.isfinite()
    shrink = _shrinkage(low, high).to(dtype)
    first, span = _edges(low * shrink, high * shrink)

    # Count all elements, in batches that may begin and end inside a matrix.
    vectors = [matrix.reshape(-1) for matrix in matrices]
    ends = torch.cumsum(
        torch.tensor([matrix.shape[1] for matrix in matrices for _ in range(len(matrix))]), 0
    )
    rows, total = len(ends), int(ends[-1])
    ends = ends.to(device, non_blocking=True)
    # Concurrent additions to one counter wait for each other, so each bin has several.
    lanes = max(1, min(256, _COUNTERS // (rows * num_bins)))
    counters = torch.zeros(rows * num_bins * lanes, dtype=torch.int64, device=device)
    one = torch.ones(1, dtype=torch.int64, device=device)
    for start in range(0, total, _BATCH):
        pieces = _between(vectors, start, start + _BATCH)
        scratch = torch.empty(min(_BATCH, total - start), dtype=dtype, device=device)
        torch._foreach_copy_(scratch.split([len(piece) for piece in pieces]), pieces)
        position = torch.arange(start, start + len(scratch), device=device)
        row = torch.bucketize(position, ends, right=True)
        scratch = scratch.mul_(shrink[row]).float()
        bin_ = scratch.sub_(first[row]).div_(span[row]).mul_(num_bins).long()
        # clamp the lower end too: NaN has any integer value
        counter = row.mul_(num_bins).add_(bin_.clamp_(min=0, max=num_bins - 1)).mul_(lanes)
        counter += position.remainder_(lanes)
        counters.scatter_add_(0, counter, one.expand(len(counter)))
    counts = counters.view(rows, num_bins, lanes).sum(dim=2)
    return torch.where(finite, _entropies_of_counts(counts), math.nan)


def _between(vectors: Sequence[Tensor], start: int, stop: int) -> list[Tensor]:
    """Elements start to stop of the concatenated vectors, as views that are not empty."""
    pieces, before = [], 0
    for vector in vectors:
        piece = vector[max(0, start - before) : max(0, stop - before)]
        before += len(vector)
        if len(piece):
            pieces.append(piece)
    return pieces
