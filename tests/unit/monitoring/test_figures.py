from __future__ import annotations

import numpy as np
import pytest
from matplotlib import colormaps

from dist_graft.monitoring.figures import (
    MAX_COLUMNS,
    Numbers,
    Pixels,
    _columns,
    flow_of_round,
    layers_over_epochs,
)

ARROW = (0x00, 0x72, 0xB2)
GREY = (0xBB, 0xBB, 0xBB)


def pixels_of(drawn: Pixels, color: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Rows and columns of the pixels of a color, without the color bar."""
    field = drawn[:, : int(0.82 * drawn.shape[1])].astype(int)
    return np.nonzero((np.abs(field - np.array(color)) <= 1).all(axis=2))


def color_of(name: str, value: float) -> tuple[int, ...]:
    return tuple(round(255 * part) for part in colormaps[name](value)[:3])


def test_first_layer_is_on_top_and_first_epoch_on_the_left() -> None:
    drawn = layers_over_epochs("entropy", [0, 1], ["in", "out"], np.array([[0.0, 1.0], [1.0, 2.0]]))
    smallest, largest = (pixels_of(drawn, color_of("viridis", where)) for where in (0.0, 1.0))
    for axis in (0, 1):
        assert smallest[axis].size > 1000
        assert smallest[axis].max() <= largest[axis].min()


def test_middle_of_the_diverging_color_map() -> None:
    values = np.array([[0.3, 0.5, 0.7]])
    drawn = layers_over_epochs("coefficient", [0, 1, 2], ["a"], values, middle=0.5)
    columns = [np.median(pixels_of(drawn, color_of("PuOr", where))[1]) for where in (0.0, 0.5, 1.0)]
    assert columns == sorted(columns)
    assert len(pixels_of(drawn, color_of("PuOr", 0.5))[0]) > 1000


def test_missing_values_are_grey() -> None:
    whole, lacking = np.array([[1.0, 2.0], [3.0, 4.0]]), np.array([[1.0, np.nan], [3.0, 4.0]])
    assert len(pixels_of(layers_over_epochs("e", [0, 1], ["a", "b"], whole), GREY)[0]) < 100
    assert len(pixels_of(layers_over_epochs("e", [0, 1], ["a", "b"], lacking), GREY)[0]) > 1000


@pytest.mark.parametrize("value", [0.5, 0.0, np.nan])
def test_single_value(value: float) -> None:
    for middle in (None, 0.5):
        layers_over_epochs("x", [3], ["a"], np.array([[value]]), middle=middle)


@pytest.mark.parametrize("epochs", [1, 2, MAX_COLUMNS, MAX_COLUMNS + 1, 5000])
def test_many_epochs_are_averaged(epochs: int) -> None:
    values: Numbers = np.arange(2.0 * epochs).reshape(2, epochs)
    edges, shown = _columns(np.arange(epochs, dtype=np.float64), values)
    assert shown.shape == (2, len(edges) - 1)
    assert len(edges) <= MAX_COLUMNS + 1
    assert (edges[0], edges[-1]) == (-0.5, epochs - 0.5)
    widths = np.diff(edges)
    assert np.allclose((shown * widths).sum(axis=1), values.sum(axis=1))


def test_average_ignores_missing_values() -> None:
    values = np.full((1, 2 * MAX_COLUMNS), 3.0)
    values[0, 1::2] = np.nan
    values[0, :2] = np.nan
    _, shown = _columns(np.arange(2.0 * MAX_COLUMNS), values)
    assert np.isnan(shown[0, 0])
    assert (shown[0, 1:] == 3.0).all()


def test_column_extends_to_the_next_round() -> None:
    edges, _ = _columns(np.array([4.0, 9.0, 14.0]), np.ones((1, 3)))
    assert list(edges) == [3.5, 8.5, 13.5, 18.5]


def ring(networks: int) -> tuple[Numbers, list[tuple[int, ...]]]:
    shares = np.tile(0.5 * np.eye(networks), (2, 1, 1))
    for one in range(networks):
        shares[:, one, one - 1] += 0.5
    return shares, [((one - 1) % networks,) for one in range(networks)]


@pytest.mark.parametrize("networks", [2, 3, 8])
def test_ring_has_arrows(networks: int) -> None:
    shares, donors = ring(networks)
    assert len(pixels_of(flow_of_round("round 0", ["a", "b"], shares, donors), ARROW)[0]) > 300


def test_many_arrows_become_a_matrix() -> None:
    shares = np.full((2, 6, 6), 1 / 6)
    donors = [tuple(other for other in range(6) if other != one) for one in range(6)]
    drawn = flow_of_round("round 0", ["a", "b"], shares, donors)
    assert not len(pixels_of(drawn, ARROW)[0])
    assert len(pixels_of(drawn, color_of("cividis", 0.0))[0]) > 1000


def test_no_arrow_without_a_donor() -> None:
    shares = np.tile(np.eye(2), (2, 1, 1))
    assert not len(pixels_of(flow_of_round("round 0", ["a", "b"], shares, [(), ()]), ARROW)[0])


def test_matplotlib_settings_are_restored() -> None:
    import matplotlib as mpl

    before = dict(mpl.rcParams)
    layers_over_epochs("x", [0], ["a"], np.array([[1.0]]))
    assert dict(mpl.rcParams) == before
