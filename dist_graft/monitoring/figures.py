"""Pictures for TensorBoard: readable at the size of its cards, and with any colour vision.

matplotlib is imported with the first picture, as it takes as long as some epochs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import Normalize
    from matplotlib.figure import Figure, FigureBase

Pixels = npt.NDArray[np.uint8]
"""[height, width, 3]"""
Numbers = npt.NDArray[np.float64]

MOST_COLUMNS = 240
MOST_NAMES = 24
MOST_ARROWS = 24
MOST_NUMBERS = 10
_DPI = 100
_MISSING = "#bbbbbb"
_BEND = 0.22
_BESIDE: dict[int, Literal["left", "center", "right"]] = {-1: "right", 0: "center", 1: "left"}
_ABOVE: dict[int, Literal["top", "center", "bottom"]] = {-1: "top", 0: "center", 1: "bottom"}
_WIDTH = 4.6  # inches; a card is about 350 pixels wide
_SETTINGS: dict[Any, Any] = {
    "font.size": 11,
    "figure.titlesize": 11,
    "xtick.labelsize": 11,
    "ytick.labelsize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
}


def layers_over_epochs(
    title: str,
    epochs: Sequence[int],
    names: Sequence[str],
    values: Numbers,
    *,
    middle: float | None = None,
) -> Pixels:
    """A heat map: a row a layer, from the input above to the output below, a column an epoch.

    Args:
        title: what the values are.
        epochs: of the columns, ascending; a column reaches to the next one.
        names: of the layers.
        values: [layers, epochs]; those that are not finite are drawn grey.
        middle: value that gets white, with two colours on its sides; unset: one scale of colours.
    """
    edges, shown = _columns(np.asarray(epochs, dtype=np.float64), values)
    with _style():
        figure = _figure(_rows_inches(names))
        axes = figure.add_subplot()
        mesh = axes.pcolormesh(
            edges,
            np.arange(len(names) + 1) - 0.5,
            np.ma.masked_invalid(shown),
            cmap=_colours("viridis" if middle is None else "PuOr"),
            norm=_range(shown, middle),
        )
        _title(figure, title)
        axes.set_xlabel("epoch, from 0")
        axes.invert_yaxis()
        _name_rows(axes, names)
        _whole_ticks(axes)
        figure.colorbar(mesh, ax=axes, pad=0.02)
        return _pixels(figure)


def who_gave_to_whom(
    title: str, names: Sequence[str], shares: Numbers, donors: Sequence[Sequence[int]]
) -> Pixels:
    """A round: the networks with arrows from their donors, and what each took, layer by layer.

    Args:
        title: which round.
        names: of the layers.
        shares: [layers, networks, networks]: how much of the last one flowed into the other.
        donors: of each network.
    """
    networks = len(donors)
    taken = 1 - np.stack([shares[:, one, one] for one in range(networks)], axis=1)
    heights = (3.4, _rows_inches(names))
    with _style():
        figure = _figure(sum(heights))
        upper, lower = figure.subfigures(2, 1, squeeze=False, height_ratios=heights)[:, 0]
        above, below = upper.add_subplot(), lower.add_subplot()
        flow = shares.mean(axis=0)
        simple = networks <= 3 or (networks <= MOST_ARROWS and max(map(len, donors)) <= 1)
        if simple:
            _draw_arrows(above, flow, donors)
        else:
            _draw_matrix(above, flow)
        _title(upper, f"{title}: % taken, mean of the layers")
        mesh = below.pcolormesh(
            np.arange(networks + 1) - 0.5,
            np.arange(len(names) + 1) - 0.5,
            100 * taken,
            cmap=_colours("viridis"),
            norm=_range(100 * taken, None, least=2.0),
        )
        _title(lower, f"{title}: % taken, layer by layer")
        below.set_xlabel("recipient")
        below.invert_yaxis()
        _name_rows(below, names)
        _whole_ticks(below)
        lower.colorbar(mesh, ax=below, pad=0.03)
        return _pixels(figure)


def _draw_arrows(axes: Axes, flow: Numbers, donors: Sequence[Sequence[int]]) -> None:
    """Networks on a circle, the first one on top; arrows from donors, as wide as what they gave."""
    networks = len(donors)
    turns = [math.tau * one / networks for one in range(networks)]
    places = [np.array([math.sin(turn), math.cos(turn)]) for turn in turns]
    gifts = [(donor, one, flow[one, donor]) for one, list_ in enumerate(donors) for donor in list_]
    largest = max((share for *_, share in gifts), default=1.0) or 1.0
    radius = max(9.0, 19.0 - networks)  # in points
    for donor, recipient, share in gifts:
        axes.annotate(
            "",
            xy=tuple(places[recipient]),
            xytext=tuple(places[donor]),
            arrowprops={
                "arrowstyle": "-|>,head_length=0.6,head_width=0.3",
                "mutation_scale": max(8, 22 - networks),
                "linewidth": 0.8 + 3.2 * share / largest,
                "color": "#0072B2",
                "shrinkA": radius,
                "shrinkB": radius + 1,
                "connectionstyle": f"arc3,rad={-_BEND}",
            },
        )
        along = places[recipient] - places[donor]
        aside = np.array([-along[1], along[0]]) / np.hypot(*along)
        spot = places[donor] + 0.5 * along + aside * (_BEND / 2 * np.hypot(*along) + 0.07)
        axes.text(
            float(spot[0]),
            float(spot[1]),
            f"{100 * share:.2g}%",
            ha=_BESIDE[round(aside[0])],
            va=_ABOVE[round(aside[1])],
            fontsize=11,
        )
    for one, (x, y) in enumerate(places):
        axes.scatter([x], [y], s=(2 * radius) ** 2, color="#E69F00", edgecolors="black", zorder=3)
        axes.text(x, y, str(one), ha="center", va="center", fontsize=radius, zorder=4)
    axes.set(xlim=(-1.4, 1.4), ylim=(-1.25, 1.25), aspect="equal")
    axes.axis("off")


def _draw_matrix(axes: Axes, flow: Numbers) -> None:
    """For more arrows than an eye can follow: row of the recipient, column of the donor."""
    given = 100 * flow
    np.fill_diagonal(given, np.nan)
    mesh = axes.pcolormesh(
        np.arange(len(given) + 1) - 0.5,
        np.arange(len(given) + 1) - 0.5,
        np.ma.masked_invalid(given),
        cmap=_colours("cividis"),
        norm=_range(given, None, least=2.0),
    )
    if len(given) <= MOST_NUMBERS:
        middle = float(np.mean(mesh.get_clim()))
        for (recipient, donor), share in np.ndenumerate(given):
            if recipient != donor:
                ink = "white" if share < middle else "black"
                axes.text(donor, recipient, f"{share:.2g}", ha="center", va="center", color=ink)
    axes.set_xlabel("donor")
    axes.set_ylabel("recipient")
    axes.invert_yaxis()
    _whole_ticks(axes, "both")
    axes.figure.colorbar(mesh, ax=axes, pad=0.03)


def _columns(epochs: Numbers, values: Numbers) -> tuple[Numbers, Numbers]:
    """Edges of the columns, and their values; many columns are drawn as the means of several."""
    together = -(-len(epochs) // MOST_COLUMNS)
    starts = np.arange(0, len(epochs), together)
    if together > 1:
        known = np.isfinite(values)
        count = np.add.reduceat(known, starts, axis=1, dtype=np.float64)
        total = np.add.reduceat(np.where(known, values, 0.0), starts, axis=1)
        values = np.divide(total, count, out=np.full_like(total, np.nan), where=count > 0)
    width = epochs[-1] - epochs[-2] if len(epochs) > 1 else 1.0
    return np.append(epochs[starts], epochs[-1] + width) - 0.5, values


def _range(values: Numbers, middle: float | None, *, least: float = 1e-3) -> Normalize:
    """From the smallest to the largest value, or as far on both sides of the middle."""
    from matplotlib.colors import Normalize

    known = values[np.isfinite(values)]
    low, high = (float(known.min()), float(known.max())) if known.size else (0.0, 1.0)
    if middle is not None:
        reach = max(high - middle, middle - low, least)
        return Normalize(middle - reach, middle + reach)
    return Normalize(low, max(high, low + least))


def _rows_inches(names: Sequence[str]) -> float:
    return 1.1 + 0.17 * max(8, min(len(names), MOST_NAMES))


def _name_rows(axes: Axes, names: Sequence[str]) -> None:
    every = -(-len(names) // MOST_NAMES)
    axes.set_yticks(range(0, len(names), every), names[::every])


def _whole_ticks(axes: Axes, which: Literal["x", "both"] = "x") -> None:
    from matplotlib.ticker import MaxNLocator

    for axis in (axes.xaxis, axes.yaxis)[: 1 if which == "x" else 2]:
        axis.set_major_locator(MaxNLocator(nbins=8, integer=True))


def _title(figure: FigureBase, title: str) -> None:
    """From the left edge, so that the names of the rows leave it its room."""
    figure.suptitle(title, x=0.02, ha="left")


def _colours(name: str) -> Any:
    from matplotlib import colormaps

    return colormaps[name].with_extremes(bad=_MISSING)


def _figure(height: float) -> Figure:
    """Of a height in inches, of 100 pixels each."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(_WIDTH, height), dpi=_DPI, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _style() -> Any:
    from matplotlib import rc_context

    return rc_context(_SETTINGS)


def _pixels(figure: Figure) -> Pixels:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = figure.canvas
    assert isinstance(canvas, FigureCanvasAgg)
    canvas.draw()  # type: ignore[no-untyped-call]
    drawn = np.asarray(canvas.buffer_rgba())  # type: ignore[no-untyped-call]
    return drawn[..., :3].copy()
