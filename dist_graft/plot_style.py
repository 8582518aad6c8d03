"""The style of all plots: Okabe and Ito's colors, thin axes, and readable without color."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import cycle, islice
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.figure import Figure

Style = dict[str, Any]
"""Keyword arguments of matplotlib's plotting functions."""

BLUE, VERMILION, GREEN, PURPLE = "#0072B2", "#D55E00", "#009E73", "#CC79A7"
SKY, ORANGE, BLACK, GREY = "#56B4E9", "#E69F00", "#000000", "#767676"
COLORS = (BLUE, VERMILION, GREEN, PURPLE, SKY, ORANGE, BLACK)
"""Colors of Okabe and Ito (2008), distinct for every color vision; yellow is too pale on white."""
LINE_STYLES = ("-", "--", ":", "-.")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")

COLUMN_INCHES = 3.5
"""Width of a column in print."""
PAGE_INCHES = 7.2
"""Text width of A4."""
_LEGEND_CHARACTERS = 44  # per row of a legend of COLUMN_INCHES
_SETTINGS: dict[Any, Any] = {
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.6,
    "axes.axisbelow": True,
    "grid.color": "#dddddd",
    "grid.linewidth": 0.5,
    "legend.frameon": False,
    "lines.linewidth": 1.2,
    "lines.markersize": 3,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "savefig.dpi": 300,
}


@contextmanager
def plot_style(font_size: float = 8, *, grid: Literal["none", "x", "y"] = "none") -> Iterator[None]:
    """Apply the style within the context. The user's own settings of matplotlib are restored.

    Args:
        font_size: of titles and labels, in points; ticks and legends are one point smaller.
        grid: axis whose ticks have grid lines.
    """
    import matplotlib as mpl

    settings: dict[Any, Any] = {
        **_SETTINGS,
        "axes.grid": grid != "none",
        "axes.grid.axis": "y" if grid == "none" else grid,
        "font.size": font_size,
        "axes.labelsize": font_size,
        "axes.titlesize": font_size,
        "figure.titlesize": font_size,
        "figure.labelsize": font_size,
        "xtick.labelsize": font_size - 1,
        "ytick.labelsize": font_size - 1,
        "legend.fontsize": font_size - 1,
    }
    with mpl.rc_context():
        mpl.rcdefaults()
        mpl.rcParams.update(settings)
        yield


def line_styles(count: int) -> list[Style]:
    """Color, dashes and marker for each of several lines, distinct without color."""
    styles = zip(cycle(COLORS), cycle(LINE_STYLES), cycle(MARKERS), strict=False)
    return [
        {"color": color, "linestyle": line, "marker": marker}
        for color, line, marker in islice(styles, count)
    ]


def column_figure(height: float, legend: Sequence[Artist] = ()) -> Figure:
    """Create a figure of column width with a legend above its axes.

    Args:
        height: in inches, without the legend.
        legend: artists to explain, each with a label; no legend if empty.
    """
    from matplotlib.figure import Figure

    names = [_shorten(str(entry.get_label())) for entry in legend]
    longest = max(map(len, names), default=0)
    columns = max(1, min(len(names), (_LEGEND_CHARACTERS + 6) // (longest + 6)))
    rows = -(-len(names) // columns)
    figure = Figure(figsize=(COLUMN_INCHES, height + 0.16 * rows), layout="constrained")
    if names:
        figure.legend(legend, names, loc="outside upper left", ncols=columns)
    return figure


def png(figure: Figure) -> bytes:
    """Render a figure as a PNG file that is the same for the same figure."""
    buffer = io.BytesIO()
    figure.savefig(
        buffer, format="png", bbox_inches="tight", pad_inches=0.03, metadata={"Software": None}
    )
    return buffer.getvalue()


def _shorten(name: str) -> str:
    """Keep the end of a long name, which differs more often than its beginning."""
    if len(name) <= _LEGEND_CHARACTERS:
        return name
    return f"…{name[1 - _LEGEND_CHARACTERS :]}"
