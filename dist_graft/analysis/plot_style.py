"""How pictures look: made for a column of a printed page, and for eyes that see colours alike."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import cycle, islice
from typing import Any

import matplotlib as mpl
from matplotlib.artist import Artist
from matplotlib.figure import Figure

Style = dict[str, Any]

COLUMN_INCHES = 3.5
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
"""Of Okabe and Ito (2008), told apart with any colour vision; without the yellow, too faint on
white."""
_LINES = ("-", "--", ":", "-.")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X")
_ROW = 44  # characters
_SETTINGS: dict[Any, Any] = {
    "font.size": 8,
    "axes.labelsize": 8,
    "axes.titlesize": 8,
    "xtick.labelsize": 7,
    "ytick.labelsize": 7,
    "legend.fontsize": 7,
    "legend.frameon": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.6,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": "#dddddd",
    "grid.linewidth": 0.5,
    "lines.linewidth": 1.2,
    "lines.markersize": 3,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "savefig.dpi": 300,
}


@contextmanager
def print_style() -> Iterator[None]:
    """Draw within, so that a user's own settings of matplotlib stay as they are."""
    with mpl.rc_context():
        mpl.rcdefaults()
        mpl.rcParams.update(_SETTINGS)
        yield


def line_styles(count: int) -> list[Style]:
    """Colour, dashes and marker for each of several lines; they differ in print without colour."""
    styles = zip(cycle(COLOURS), cycle(_LINES), cycle(_MARKERS), strict=False)
    return [
        {"color": colour, "linestyle": line, "marker": marker}
        for colour, line, marker in islice(styles, count)
    ]


class Picture:
    """A figure as wide as a column, with its legend above the axes.

    Args:
        inches: height, the legend not counted.
        legend: what it explains, each with a label; none: no legend.
    """

    def __init__(self, *, inches: float, legend: Sequence[Artist] = ()) -> None:
        names = [shorten(str(entry.get_label())) for entry in legend]
        columns = _columns(names)
        rows = -(-len(names) // columns)
        self.figure = Figure(figsize=(COLUMN_INCHES, inches + 0.16 * rows), layout="constrained")
        if names:
            self.figure.legend(legend, names, loc="outside upper left", ncols=columns)

    def png(self) -> bytes:
        """The picture as a PNG file."""
        buffer = io.BytesIO()
        self.figure.savefig(buffer, format="png", bbox_inches="tight", pad_inches=0.03)
        return buffer.getvalue()


def shorten(name: str) -> str:
    """A name that fits into one row of a legend; its end tells more than its beginning."""
    return name if len(name) <= _ROW else f"…{name[1 - _ROW :]}"


def _columns(names: Sequence[str]) -> int:
    longest = max(map(len, names), default=0)
    return max(1, min(len(names), (_ROW + 6) // (longest + 6)))
