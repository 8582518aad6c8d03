"""What all pictures share: colours, lines of dots from the top, legends, PNG bytes."""

from __future__ import annotations

import io
from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure

BLACK, ORANGE, SKY, GREEN, YELLOW, BLUE, VERMILION, PURPLE = (
    "#000000",
    "#E69F00",
    "#56B4E9",
    "#009E73",
    "#F0E442",
    "#0072B2",
    "#D55E00",
    "#CC79A7",
)
"""Okabe and Ito's colours (jfly.uni-koeln.de/color); yellow is too pale for lines on white."""

GREY = "#767676"
CYCLE = (BLUE, VERMILION, GREEN, PURPLE, ORANGE, SKY)
DASHES = ("-", (0, (5, 2)), (0, (1.5, 1.5)), (0, (6, 2, 1.5, 2)))
WIDTH = 7.2  # inches: the text width of A4
DPI = 140
SPREAD = 0.16  # of the seeds' dots around their line, in lines


def row_axes(names: Sequence[str], height: float = 0.34) -> tuple[Figure, Axes]:
    """A figure with one line for each name, from the top."""
    figure = Figure(
        figsize=(WIDTH, height * max(len(names), 2) + 1.2), dpi=DPI, layout="constrained"
    )
    axes = figure.subplots()
    axes.set_yticks(range(len(names)), names, fontsize=8)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x", color="#dddddd", lw=0.6)
    axes.set_axisbelow(True)
    no_box(axes)
    return figure, axes


def around(place: int, count: int) -> list[float]:
    """Places of some dots around a line, so that equal values are all seen."""
    if count < 2:
        return [float(place)] * count
    return [place + SPREAD * (2 * number / (count - 1) - 1) for number in range(count)]


def explain(axes: Axes, text: str) -> None:
    """What the marks mean, above the picture."""
    axes.set_title(text, fontsize=7.5, color="#444444", loc="right")


def legend_below(figure: Figure, axes: Axes, columns: int = 2) -> None:
    """A legend of what the axes show, where nothing is hidden by it."""
    handles, texts = axes.get_legend_handles_labels()
    if handles:
        figure.legend(
            handles,
            texts,
            loc="outside lower center",
            ncols=columns,
            frameon=False,
            fontsize=8,
            numpoints=1,
        )


def no_box(axes: Axes) -> None:
    """Keep the horizontal axis' line alone."""
    axes.spines[["top", "right", "left"]].set_visible(False)


def png(figure: Figure) -> bytes:
    """The figure's file."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()
