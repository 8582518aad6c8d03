"""Filter matrices and flat views in any dense memory format."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from dist_graft import graft_units
from dist_graft.grafting.memory_layout import filter_matrix, flat, memory_order

LAYERS = [
    nn.Conv1d(4, 6, 3),
    nn.Conv2d(4, 6, 3),
    nn.Conv2d(4, 6, (3, 1)),
    nn.Conv3d(4, 6, 2),
    nn.Conv2d(4, 6, 3, groups=2),
    nn.Conv2d(4, 8, 3, groups=4),
    nn.ConvTranspose1d(4, 6, 3),
    nn.ConvTranspose2d(4, 6, 3),
    nn.ConvTranspose3d(4, 6, 2),
    nn.ConvTranspose2d(4, 6, 3, groups=2),
    nn.ConvTranspose2d(4, 8, 3, groups=4),
]


def by_loop(weight: np.ndarray, transposed: bool, groups: int) -> list[list[float]]:
    """Weights of each filter, sorted because the order inside a filter is not specified."""
    if not transposed:
        return [sorted(weight[out].ravel()) for out in range(weight.shape[0])]
    into = weight.shape[0] // groups
    return [
        sorted(weight[group * into : (group + 1) * into, out].ravel())
        for group in range(groups)
        for out in range(weight.shape[1])
    ]


def channels_last(weight: Tensor) -> Tensor:
    return torch.empty_permuted(
        weight.shape, (0, *range(2, weight.dim()), 1), dtype=weight.dtype
    ).copy_(weight)


@pytest.mark.parametrize("last", [False, True], ids=["plain", "channels_last"])
@pytest.mark.parametrize("layer", LAYERS, ids=str)
def test_filter_matrix_has_one_row_for_each_filter(layer, last):
    weight = layer.weight.detach()
    weight = channels_last(weight) if last else weight
    matrix = filter_matrix(weight, transposed=layer.transposed, groups=layer.groups)
    rows = by_loop(weight.numpy(), layer.transposed, layer.groups)
    assert matrix.shape == (layer.out_channels, weight.numel() // layer.out_channels)
    assert np.array_equal(np.sort(matrix.numpy(), axis=1), np.array(rows, dtype=np.float32))


@pytest.mark.parametrize("layer", LAYERS, ids=str)
def test_each_filter_computes_one_output_channel(layer):
    """The gradient of output channel k is nonzero only in row k."""
    (unit,) = graft_units(layer)
    kernel = layer.weight.dim() - 2
    batch = torch.rand(1, layer.in_channels, *[5] * kernel) + 0.1
    for channel in range(layer.out_channels):
        (gradient,) = torch.autograd.grad(layer(batch)[:, channel].sum(), layer.weight)
        used = unit.filters(gradient).ne(0).any(dim=1)
        assert used.nonzero().flatten().tolist() == [channel]


def test_filters_of_a_linear_layer_are_its_rows():
    weight = torch.arange(12.0).reshape(3, 4)
    assert torch.equal(filter_matrix(weight), weight)


@pytest.mark.parametrize("last", [False, True], ids=["plain", "channels_last"])
@pytest.mark.parametrize("shape", [(6, 4, 3, 3), (6, 4, 1, 1), (6, 1, 3, 3), (6, 4, 3), (6, 4)])
def test_filters_of_a_dense_weight_are_a_view(shape, last):
    weight = torch.rand(shape)
    weight = channels_last(weight) if last else weight
    assert filter_matrix(weight).data_ptr() == weight.data_ptr()


DENSE = {
    "plain": torch.rand(2, 3, 4, 5),
    "channels_last": channels_last(torch.rand(2, 3, 4, 5)),
    "permuted": torch.rand(2, 3, 4).permute(2, 0, 1),
    "transposed": torch.rand(3, 4).t(),
    "sizes_of_one": torch.rand(1, 3, 1, 4).permute(3, 0, 2, 1),
    "scalar": torch.tensor(3.0),
    "empty": torch.empty(0, 3),
}


@pytest.mark.parametrize("tensor", DENSE.values(), ids=DENSE.keys())
def test_flat_is_a_view_in_memory_order(tensor):
    view = flat(tensor)
    assert view.shape == (tensor.numel(),)
    assert view.data_ptr() == tensor.data_ptr()
    assert view.tolist() == tensor.as_strided((tensor.numel(),), (1,)).tolist()


def test_writing_to_the_flat_view_writes_to_the_tensor():
    tensor = channels_last(torch.zeros(2, 3, 4, 5))
    flat(tensor)[7] = 1
    assert tensor[0, 1, 0, 2] == 1  # 7 = 2 * 3 channels + 1


@pytest.mark.parametrize(
    "tensor",
    [
        torch.rand(4, 5)[:, 1:3],
        torch.rand(4, 5)[::2],
        torch.rand(4, 6)[:, ::2],
        torch.rand(10)[::2],
        torch.rand(3, 1).expand(3, 4),
        torch.rand(1).expand(4),
    ],
    ids=["columns", "rows", "regular_gaps", "step", "expanded_matrix", "expanded_vector"],
)
def test_flat_of_a_non_dense_tensor_is_an_error(tensor):
    with pytest.raises(ValueError, match="is not dense in memory"):
        flat(tensor)


@pytest.mark.parametrize(
    ("tensor", "order"),
    [
        (torch.rand(2, 3, 4, 5), (0, 1, 2, 3)),
        (channels_last(torch.rand(2, 3, 4, 5)), (0, 2, 3, 1)),
        (torch.rand(2, 3).t(), (1, 0)),
        (torch.rand(2, 1, 3, 1), (1, 3, 0, 2)),
        (torch.tensor(1.0), ()),
    ],
)
def test_memory_order_is_descending_in_stride(tensor, order):
    assert memory_order(tensor) == order


def test_memory_order_ignores_strides_of_dimensions_of_size_1():
    """A depthwise kernel has the same elements in the same order in both formats."""
    plain = torch.rand(6, 1, 3, 3)
    assert memory_order(plain) == memory_order(plain.to(memory_format=torch.channels_last))
