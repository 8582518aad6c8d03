"""Plots of invalid filters, entropy and L1 norms, for several sources."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter, StrMethodFormatter

from dist_graft.analysis.filters import Inspected, Numbers
from dist_graft.plot_style import Style, column_figure, line_styles, plot_style, png

INVALID_FILTERS = "invalid_filters.png"
_RANGE = "range over the networks of a source"
_MIN_PERCENT = 5.0  # smallest upper limit of the axis of invalid filters
_TICK_STEPS = [1, 2, 5, 10]
_MAX_BARS = 60
_DARK = "#333333"


def draw(
    inspected: Sequence[Inspected], thresholds: Sequence[float], num_bins: int
) -> dict[str, bytes]:
    """Draw the PNG files of invalid filters (if there are any), entropy and norms, by name.

    If a source has several networks, their mean and range are plotted. The plot of norms has one
    line per network.
    """
    styles = line_styles(len(inspected))
    with plot_style(grid="y"):
        files = {}
        if any(source.below(max(thresholds)).any() for source in inspected):
            files[INVALID_FILTERS] = _invalid_filters(inspected, styles, thresholds)
        files["entropy.png"] = _entropy(inspected, styles, num_bins)
        files["norms.png"] = _norms(inspected, styles, thresholds)
        return files


def _invalid_filters(
    inspected: Sequence[Inspected], styles: Sequence[Style], thresholds: Sequence[float]
) -> bytes:
    """Share of invalid filters per layer, one panel per threshold: bars, or lines if too many."""
    filters = np.array([count for _, count in inspected[0].units])
    shares = [[100 * source.below(value) / filters for source in inspected] for value in thresholds]
    flat = [values for row in shares for values in row]
    bars = len(filters) * len(inspected) <= _MAX_BARS
    figure = column_figure(
        1.1 * len(thresholds) + 0.3,
        _entries(inspected, styles, "bars" if bars else "lines", flat),
    )
    panels = figure.subplots(len(thresholds), sharex=True, sharey=True, squeeze=False)[:, 0]
    for panel, threshold, row in zip(panels, thresholds, shares, strict=True):
        panel.set_title(f"L1 norm below {threshold:g}", loc="left")
        (_draw_bars if bars else _draw_lines)(panel, row, styles)
        if not any(values.any() for values in row):
            panel.grid(visible=False)
            panel.text(0.5, 0.4, "none", transform=panel.transAxes, ha="center", color="#555555")
    panels[0].set_ylim(0, max(_MIN_PERCENT, 1.05 * max(float(values.max()) for values in flat)))
    panels[0].yaxis.set_major_locator(MaxNLocator(nbins=4, integer=True, steps=_TICK_STEPS))
    figure.supylabel("invalid filters (% of the layer)")
    _layer_axis(panels[-1], len(filters))
    return png(figure)


def _entropy(inspected: Sequence[Inspected], styles: Sequence[Style], num_bins: int) -> bytes:
    """Entropy per layer."""
    values = [source.layer_entropies() for source in inspected]
    figure = column_figure(2.2, _entries(inspected, styles, "lines", values))
    axes = figure.subplots()
    _draw_lines(axes, values, styles)
    axes.set_ylabel(f"entropy (nats, at most {np.log(num_bins):.2f})")
    _layer_axis(axes, values[0].shape[1])
    return png(figure)


def _norms(
    inspected: Sequence[Inspected], styles: Sequence[Style], thresholds: Sequence[float]
) -> bytes:
    """Sorted L1 norms of all filters of each network, down to a decade below the thresholds."""
    norms = [
        [
            np.sort(np.concatenate([layer.norms for layer in layers]))[::-1]
            for layers in source.networks.values()
        ]
        for source in inspected
    ]
    all_norms = np.concatenate([network for source in norms for network in source])
    low = 10.0 ** (np.floor(np.log10(min(thresholds))) - 1)
    high = 10.0 ** np.ceil(np.log10(max(all_norms.max(), *thresholds)))
    limit: Style = {"color": _DARK, "linewidth": 0.6, "linestyle": (0, (1, 2))}
    lines: list[Style] = [{**style, "marker": ""} for style in styles]
    entries = [
        Line2D([], [], label=source.label, **line)
        for source, line in zip(inspected, lines, strict=True)
    ]
    figure = column_figure(2.2, [*entries, Line2D([], [], label="threshold", **limit)])
    axes = figure.subplots()
    for threshold in thresholds:
        axes.axhline(threshold, **limit)
    for source, line in zip(norms, lines, strict=True):
        for network in source:
            axes.plot(np.arange(1, len(network) + 1), np.maximum(network, low), **line)
    axes.set_yscale("log")
    axes.set_ylim(low, high)
    axes.yaxis.set_major_locator(LogLocator(numticks=12))
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    clipped = bool((all_norms < low).any())
    axes.set_ylabel("L1 norm of a filter" + ("\n(smaller: at the lower edge)" if clipped else ""))
    axes.set_xlabel("filters, largest norm first")
    axes.set_xlim(1, None)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True, steps=_TICK_STEPS))
    return png(figure)


def _draw_bars(axes: Axes, sources: Sequence[Numbers], styles: Sequence[Style]) -> None:
    """Draw bars for each source, [networks, layers], with the range over its networks."""
    width = 0.8 / len(sources)
    for column, (values, style) in enumerate(zip(sources, styles, strict=True)):
        mean = values.mean(0)
        positions = np.arange(1, len(mean) + 1) + (column - (len(sources) - 1) / 2) * width
        axes.bar(positions, mean, width, color=style["color"])
        if _spread(values):
            limits = (mean - values.min(0), values.max(0) - mean)
            axes.errorbar(positions, mean, limits, fmt="none", ecolor=_DARK, elinewidth=0.7)


def _draw_lines(axes: Axes, sources: Sequence[Numbers], styles: Sequence[Style]) -> None:
    """Draw a line for each source, [networks, layers], with the range over its networks."""
    for values, style in zip(sources, styles, strict=True):
        layers = np.arange(1, values.shape[1] + 1)
        axes.plot(layers, values.mean(0), markevery=max(1, len(layers) // 20), **style)
        if _spread(values):
            limits = values.min(0), values.max(0)
            axes.fill_between(layers, *limits, color=style["color"], alpha=0.2, linewidth=0)


def _entries(
    inspected: Sequence[Inspected],
    styles: Sequence[Style],
    kind: Literal["bars", "lines"],
    values: Sequence[Numbers],
) -> list[Artist]:
    """Artists of the legend; none for a single entry."""
    entries: list[Artist] = [
        Patch(color=style["color"], label=source.label)
        if kind == "bars"
        else Line2D([], [], label=source.label, **style)
        for source, style in zip(inspected, styles, strict=True)
    ]
    if any(_spread(networks) for networks in values):
        whisker = Line2D([], [], color=_DARK, linewidth=0.7, label=_RANGE)
        band = Patch(facecolor=_DARK, alpha=0.2, linewidth=0, label=_RANGE)
        entries.append(whisker if kind == "bars" else band)
    return entries if len(entries) > 1 else []


def _spread(networks: Numbers) -> bool:
    """Whether the networks differ, [networks, layers]."""
    return bool((networks.max(0) > networks.min(0)).any())


def _layer_axis(axes: Axes, layers: int) -> None:
    axes.set_xlabel("layer, from input to output")
    axes.set_xlim(0.4, layers + 0.6)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=10, integer=True, steps=_TICK_STEPS))
