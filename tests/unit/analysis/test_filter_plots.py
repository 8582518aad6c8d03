from __future__ import annotations

import io
from itertools import combinations

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.transforms import Bbox
from PIL import Image

from dist_graft.analysis import filter_plots
from dist_graft.analysis.filter_plots import draw
from dist_graft.analysis.filters import Inspected, Layer
from dist_graft.plot_style import COLORS, line_styles

NAMES = {"invalid_filters.png", "entropy.png", "norms.png"}


def source(label: str, *, networks: int = 1, layers: int = 19, invalid: float = 0.3) -> Inspected:
    """Networks with some invalid filters, some of them exactly zero."""
    random = np.random.default_rng(len(label))

    def layer(number: int) -> Layer:
        norms = np.exp(random.normal(1.5, 0.5, 32))
        norms[random.random(32) < invalid] = 0.003
        norms[random.random(32) < invalid / 5] = 0.0
        return Layer(
            unit=f"layer{number}",
            weights=9,
            entropy=float(random.uniform(1.2, 2.0)),
            mean_absolute=0.1,
            norms=norms,
            entropies=random.uniform(1, 2, 32),
        )

    named = {str(number): [layer(i) for i in range(layers)] for number in range(networks)}
    return Inspected(label=label, networks=named)


POPULATIONS = {
    "one": [source("alone")],
    "two": [source("before", networks=2), source("after", networks=2, invalid=0)],
    "nothing invalid": [source("a", invalid=0), source("b", invalid=0)],
    "deep": [source(f"a_rather_long_name_of_a_run_{i}", networks=3, layers=109) for i in range(3)],
    "many": [source(f"run{i}") for i in range(9)],
    "one layer": [source("a", layers=1), source("b", layers=1)],
    "long": [source("x" * 90), source("y" * 90)],
}


@pytest.mark.parametrize("name", ["one", "deep", "long"])
def test_plots_have_column_width(name: str) -> None:
    plots = draw(POPULATIONS[name], [0.1, 0.01, 0.001], 10)
    assert set(plots) == NAMES
    for content in plots.values():
        image = Image.open(io.BytesIO(content))
        assert image.format == "PNG"
        assert 3.3 * 300 < image.width < 3.7 * 300
        assert image.height < 6 * 300


def shown(figure: Figure) -> list[tuple[str, Bbox]]:
    """Visible texts of a figure and their boxes."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()  # applies the layout
    renderer = canvas.get_renderer()
    hidden = set()
    for axes in figure.axes:
        for axis in (axes.xaxis, axes.yaxis):
            low, high = sorted(axis.get_view_interval())
            for tick in (*axis.get_major_ticks(), *axis.get_minor_ticks()):
                if not low <= tick.get_loc() <= high:
                    hidden |= {tick.label1, tick.label2}
    texts = [text for text in figure.findobj(Text) if text not in hidden and text.get_visible()]
    return [
        (text.get_text(), text.get_window_extent(renderer))
        for text in texts
        if text.get_text().strip()
    ]


@pytest.mark.parametrize(
    ("name", "thresholds"),
    [*((name, [0.1, 0.01, 0.001]) for name in POPULATIONS), ("two", [30.0]), ("two", [0.5, 0.3])],
)
def test_texts_do_not_overlap(
    name: str, thresholds: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    overlapping = []

    def record(figure: Figure) -> bytes:
        for (first, box), (second, other) in combinations(shown(figure), 2):
            if box.overlaps(other):
                overlapping.append((first, second))
        return b""

    monkeypatch.setattr(filter_plots, "png", record)
    draw(POPULATIONS[name], thresholds, 10)
    assert not overlapping


def test_axes_have_labels_and_units(monkeypatch: pytest.MonkeyPatch) -> None:
    written = []

    def record(figure: Figure) -> bytes:
        written.append(" | ".join(text for text, _ in shown(figure)))
        return b""

    monkeypatch.setattr(filter_plots, "png", record)
    draw(POPULATIONS["two"], [0.1], 10)
    invalid, entropy, norms = written
    assert "invalid filters (% of the layer)" in invalid
    assert "L1 norm below 0.1" in invalid
    assert "entropy (nats, at most 2.30)" in entropy
    assert "L1 norm of a filter" in norms
    assert all("before" in text and "after" in text for text in written)
    assert "layer, from input to output" in invalid
    assert "layer, from input to output" in entropy


def test_line_styles_are_distinct_without_color() -> None:
    styles = line_styles(9)
    assert len({(style["color"], style["linestyle"], style["marker"]) for style in styles}) == 9
    assert len({(style["linestyle"], style["marker"]) for style in styles[:7]}) == 7
    assert len({style["color"] for style in styles[:7]}) == len(COLORS)


def test_matplotlib_settings_are_restored() -> None:
    import matplotlib as mpl

    with mpl.rc_context({"font.size": 31.0}):
        draw(POPULATIONS["one"], [0.1], 10)
        assert mpl.rcParams["font.size"] == 31.0
