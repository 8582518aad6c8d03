"""Figures for TensorBoard, sized for its cards.

matplotlib is imported with the first figure, because that takes as long as some epochs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

import numpy as np
import numpy.typing as npt

from dist_graft.plot_style import BLUE, ORANGE, plot_style

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize
    from matplotlib.figure import Figure, FigureBase

Pixels = npt.NDArray[np.uint8]
"""RGB image, [height, width, 3]."""
Numbers = npt.NDArray[np.float64]

MAX_COLUMNS = 240
MAX_NAMES = 24
MAX_ARROWS = 24
MAX_NUMBERS = 10
_DPI = 100
_MISSING = "#bbbbbb"
_FONT_SIZE = 11
_CURVATURE = 0.22
_HORIZONTAL: dict[int, Literal["left", "center", "right"]] = {-1: "right", 0: "center", 1: "left"}
_VERTICAL: dict[int, Literal["top", "center", "bottom"]] = {-1: "top", 0: "center", 1: "bottom"}
_WIDTH = 4.6  # inches; a card is about 350 pixels wide


def layers_over_epochs(
    title: str,
    epochs: Sequence[int],
    names: Sequence[str],
    values: Numbers,
    *,
    middle: float | None = None,
) -> Pixels:
    """Draw a heat map with a row per layer, input on top, and a column per epoch.

    Args:
        title: name of the values.
        epochs: epoch of each column, ascending. A column extends to the next one.
        names: of the layers.
        values: [layers, epochs]. Non-finite values are gray.
        middle: center of a diverging color map, drawn white; None: a sequential color map.

    Returns: the figure as an RGB image.
    """
    edges, averaged = _columns(np.asarray(epochs, dtype=np.float64), values)
    with plot_style(_FONT_SIZE):
        figure = _figure(_rows_inches(names))
        axes = figure.add_subplot()
        colors = "viridis" if middle is None else "PuOr"
        mesh = _heat_map(axes, edges, averaged, colors, _normalize(averaged, middle))
        _title(figure, title)
        axes.set_xlabel("epoch, from 0")
        _name_rows(axes, names)
        figure.colorbar(mesh, ax=axes, pad=0.02)
        return _pixels(figure)


def flow_of_round(
    title: str, names: Sequence[str], shares: Numbers, donors: Sequence[Sequence[int]]
) -> Pixels:
    """Draw a round: arrows from donors to recipients, and the share that each layer received.

    Args:
        title: name of the round.
        names: of the layers.
        shares: [layers, recipients, donors], share of the donor in the recipient's weights.
        donors: of each network.

    Returns: the figure as an RGB image.
    """
    networks = len(donors)
    taken = 1 - np.diagonal(shares, axis1=1, axis2=2)
    heights = (3.4, _rows_inches(names))
    with plot_style(_FONT_SIZE):
        figure = _figure(sum(heights))
        upper, lower = figure.subfigures(2, 1, squeeze=False, height_ratios=heights)[:, 0]
        above, below = upper.add_subplot(), lower.add_subplot()
        flow = shares.mean(axis=0)
        few = networks <= 3 or (networks <= MAX_ARROWS and max(map(len, donors)) <= 1)
        if few:
            _draw_arrows(above, flow, donors)
        else:
            _draw_matrix(above, flow)
        _title(upper, f"{title}: % taken, mean over layers")
        norm = _normalize(100 * taken, None, least=2.0)
        mesh = _heat_map(below, np.arange(networks + 1) - 0.5, 100 * taken, "viridis", norm)
        _title(lower, f"{title}: % taken, by layer")
        below.set_xlabel("recipient")
        _name_rows(below, names)
        lower.colorbar(mesh, ax=below, pad=0.03)
        return _pixels(figure)


def _draw_arrows(axes: Axes, flow: Numbers, donors: Sequence[Sequence[int]]) -> None:
    """Networks on a circle, network 0 on top, with arrows as wide as the donors' shares."""
    networks = len(donors)
    angles = [math.tau * network / networks for network in range(networks)]
    positions = [np.array([math.sin(angle), math.cos(angle)]) for angle in angles]
    arrows = [
        (donor, recipient, flow[recipient, donor])
        for recipient, its_donors in enumerate(donors)
        for donor in its_donors
    ]
    largest = max((share for *_, share in arrows), default=1.0) or 1.0
    radius = max(9.0, 19.0 - networks)  # in points
    for donor, recipient, share in arrows:
        axes.annotate(
            "",
            xy=tuple(positions[recipient]),
            xytext=tuple(positions[donor]),
            arrowprops={
                "arrowstyle": "-|>,head_length=0.6,head_width=0.3",
                "mutation_scale": max(8, 22 - networks),
                "linewidth": 0.8 + 3.2 * share / largest,
                "color": BLUE,
                "shrinkA": radius,
                "shrinkB": radius + 1,
                "connectionstyle": f"arc3,rad={-_CURVATURE}",
            },
        )
        direction = positions[recipient] - positions[donor]
        normal = np.array([-direction[1], direction[0]]) / np.hypot(*direction)
        label = (
            positions[donor]
            + 0.5 * direction
            + normal * (_CURVATURE / 2 * np.hypot(*direction) + 0.07)
        )
        axes.text(
            float(label[0]),
            float(label[1]),
            f"{100 * share:.2g}%",
            ha=_HORIZONTAL[round(normal[0])],
            va=_VERTICAL[round(normal[1])],
            fontsize=_FONT_SIZE,
        )
    for network, (x, y) in enumerate(positions):
        axes.scatter([x], [y], s=(2 * radius) ** 2, color=ORANGE, edgecolors="black", zorder=3)
        axes.text(x, y, str(network), ha="center", va="center", fontsize=radius, zorder=4)
    axes.set(xlim=(-1.4, 1.4), ylim=(-1.25, 1.25), aspect="equal")
    axes.axis("off")


def _draw_matrix(axes: Axes, flow: Numbers) -> None:
    """Many arrows as a matrix: a row per recipient, a column per donor."""
    percent = 100 * flow
    np.fill_diagonal(percent, np.nan)
    norm = _normalize(percent, None, least=2.0)
    mesh = _heat_map(axes, np.arange(len(percent) + 1) - 0.5, percent, "cividis", norm)
    if len(percent) <= MAX_NUMBERS:
        middle = float(np.mean(mesh.get_clim()))
        for (recipient, donor), share in np.ndenumerate(percent):
            if recipient != donor:
                color = "white" if share < middle else "black"
                axes.text(donor, recipient, f"{share:.2g}", ha="center", va="center", color=color)
    axes.set_xlabel("donor")
    axes.set_ylabel("recipient")
    _whole_ticks(axes.yaxis)
    axes.figure.colorbar(mesh, ax=axes, pad=0.03)


def _heat_map(
    axes: Axes, edges: npt.ArrayLike, values: Numbers, colors: str, norm: Normalize
) -> ScalarMappable:
    """Draw values, [rows, columns], from top to bottom; `edges` are those of the columns."""
    from matplotlib import colormaps

    mesh = axes.pcolormesh(
        edges,
        np.arange(len(values) + 1) - 0.5,
        np.ma.masked_invalid(values),
        cmap=colormaps[colors].with_extremes(bad=_MISSING),
        norm=norm,
    )
    axes.invert_yaxis()
    _whole_ticks(axes.xaxis)
    return mesh


def _columns(epochs: Numbers, values: Numbers) -> tuple[Numbers, Numbers]:
    """Edges and values of the columns, averaged if there are more than MAX_COLUMNS."""
    group = -(-len(epochs) // MAX_COLUMNS)
    starts = np.arange(0, len(epochs), group)
    if group > 1:
        known = np.isfinite(values)
        count = np.add.reduceat(known, starts, axis=1, dtype=np.float64)
        total = np.add.reduceat(np.where(known, values, 0.0), starts, axis=1)
        values = np.divide(total, count, out=np.full_like(total, np.nan), where=count > 0)
    width = epochs[-1] - epochs[-2] if len(epochs) > 1 else 1.0
    return np.append(epochs[starts], epochs[-1] + width) - 0.5, values


def _normalize(values: Numbers, middle: float | None, *, least: float = 1e-3) -> Normalize:
    """Range of the values, symmetric around the middle if there is one."""
    from matplotlib.colors import Normalize

    known = values[np.isfinite(values)]
    low, high = (float(known.min()), float(known.max())) if known.size else (0.0, 1.0)
    if middle is not None:
        reach = max(high - middle, middle - low, least)
        return Normalize(middle - reach, middle + reach)
    return Normalize(low, max(high, low + least))


def _rows_inches(names: Sequence[str]) -> float:
    return 1.1 + 0.17 * max(8, min(len(names), MAX_NAMES))


def _name_rows(axes: Axes, names: Sequence[str]) -> None:
    every = -(-len(names) // MAX_NAMES)
    axes.set_yticks(range(0, len(names), every), names[::every])


def _whole_ticks(axis: Axis) -> None:
    from matplotlib.ticker import MaxNLocator

    axis.set_major_locator(MaxNLocator(nbins=8, integer=True))


def _title(figure: FigureBase, title: str) -> None:
    """Align the title with the left edge, to have room beside long row names."""
    figure.suptitle(title, x=0.02, ha="left")


def _figure(height: float) -> Figure:
    """Create a figure of a height in inches, with 100 pixels per inch."""
    from matplotlib.figure import Figure

    return Figure(figsize=(_WIDTH, height), dpi=_DPI, layout="constrained")


def _pixels(figure: Figure) -> Pixels:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    canvas.draw()  # type: ignore[no-untyped-call]
    drawn = np.asarray(canvas.buffer_rgba())  # type: ignore[no-untyped-call]
    return drawn[..., :3].copy()
