"""Views of weight tensors that avoid copies in any memory format."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def memory_order(tensor: Tensor) -> tuple[int, ...]:
    """Return the dimensions from the largest to the smallest stride; those of size 1 come first.

    Two tensors of the same shape have the same order exactly when their elements have the same
    order in memory.
    """
    shape, strides = tuple(tensor.shape), tuple(tensor.stride())
    return tuple(
        sorted(range(tensor.dim()), key=lambda d: (1, -strides[d]) if shape[d] != 1 else (0, 0))
    )


def flat(tensor: Tensor) -> Tensor:
    """Return a one-dimensional view of the tensor's elements in memory order.

    Raises: ValueError for a tensor that is not dense in memory (a slice with gaps, an expanded
        tensor).
    """
    ordered = tensor.permute(memory_order(tensor))
    if not ordered.is_contiguous():
        raise ValueError(
            f"a tensor of shape {tuple(tensor.shape)} and strides {tensor.stride()} is not dense "
            "in memory: clone it first"
        )
    return ordered.view(-1)


def memory_positions(tensor: Tensor, positions: Tensor) -> Tensor:
    """Convert positions in a dense tensor's logical order to positions in its `flat` view.

    Args:
        tensor: dense in memory.
        positions: int64, any shape, on the CPU.
    """
    order = memory_order(tensor)
    if order == tuple(range(tensor.dim())):
        return positions
    coordinates = torch.unravel_index(positions, tensor.shape)
    result = torch.zeros_like(positions)
    for dim in order:
        result = result * tensor.shape[dim] + coordinates[dim]
    return result


def filter_matrix(weight: Tensor, *, transposed: bool = False, groups: int = 1) -> Tensor:
    """Return weights as [filters, weights per filter], with each row in memory order.

    Args:
        weight: [out, in / groups, *kernel] of a convolution, [in, out / groups, *kernel] of a
            transposed convolution, or [out, in] of a linear layer.
        transposed: whether the layer is a transposed convolution.
        groups: groups of a transposed convolution.

    Returns: a view if the memory format allows it (contiguous and channels-last do), or a copy.
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
    """Write a matrix in the form of `filter_matrix` into the weight, in place."""
    if transposed:
        into, out, *kernel = weight.shape
        grouped = filters.view(groups, out, into // groups, *kernel).transpose(1, 2)
        weight.copy_(grouped.reshape(weight.shape))
        return
    inner = [dim for dim in memory_order(weight) if dim != 0]
    shape = [weight.shape[0], *(weight.shape[dim] for dim in inner)]
    weight.permute(0, *inner).copy_(filters.view(shape))
