"""Views of a weight tensor that never copy a dense one, whatever its memory format."""

from __future__ import annotations

import math

from torch import Tensor


def memory_order(tensor: Tensor) -> tuple[int, ...]:
    """Dimensions from the slowest to the fastest in memory; those of size 1 come first.

    Equal for two tensors of one shape exactly when their elements lie in the same order.
    """
    shape, strides = tuple(tensor.shape), tuple(tensor.stride())
    return tuple(
        sorted(range(tensor.dim()), key=lambda d: (1, -strides[d]) if shape[d] != 1 else (0, 0))
    )


def flat(tensor: Tensor) -> Tensor:
    """The tensor's elements in memory order, as a one-dimensional view of the same storage.

    Raises: ValueError when the elements do not fill one stretch of memory (a slice with gaps, an
        expanded tensor).
    """
    ordered = tensor.permute(memory_order(tensor))
    if not ordered.is_contiguous():
        raise ValueError(
            f"a tensor of shape {tuple(tensor.shape)} and strides {tensor.stride()} does not fill "
            "one stretch of memory; clone it first"
        )
    return ordered.view(-1)


def filter_matrix(weight: Tensor, *, transposed: bool = False, groups: int = 1) -> Tensor:
    """Weights as [filters, weights per filter]; the order inside a row is that of memory.

    Args:
        weight: of a convolution, [out, in / groups, *kernel]; transposed: [in, out / groups,
            *kernel]; or of a linear layer, [out, in].
        transposed: whether the layer is a transposed convolution.
        groups: of the layer; only a transposed one needs it.

    Returns: a view where the memory format allows one (plain and channels-last do), else a copy.
    """
    if transposed:
        into, out, *kernel = weight.shape
        grouped = weight.reshape(groups, into // groups, out, *kernel)
        return grouped.transpose(1, 2).reshape(groups * out, -1)
    inner = [dim for dim in memory_order(weight) if dim != 0]
    return weight.permute(0, *inner).reshape(weight.shape[0], math.prod(weight.shape[1:]))


def write_filters(
    weight: Tensor, filters: Tensor, *, transposed: bool = False, groups: int = 1
) -> None:
    """Write a matrix as `filter_matrix` gives it back into the weight, in place.

    Args:
        weight: of the layer; changed.
        filters: [filters, weights per filter].
        transposed: whether the layer is a transposed convolution.
        groups: of the layer; only a transposed one needs it.
    """
    if transposed:
        into, out, *kernel = weight.shape
        grouped = filters.view(groups, out, into // groups, *kernel).transpose(1, 2)
        weight.copy_(grouped.reshape(weight.shape))
        return
    inner = [dim for dim in memory_order(weight) if dim != 0]
    shape = [weight.shape[0], *(weight.shape[dim] for dim in inner)]
    weight.permute(0, *inner).copy_(filters.view(shape))
