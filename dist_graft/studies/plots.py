"""Plots of a report, as matplotlib figures."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from dist_graft.plot_style import (
    BLACK,
    BLUE,
    GREEN,
    GREY,
    LINE_STYLES,
    ORANGE,
    PAGE_INCHES,
    PURPLE,
    SKY,
    VERMILION,
    Style,
    plot_style,
)
from dist_graft.studies.controls import Run
from dist_graft.studies.measurements import parse_list
from dist_graft.studies.statistics import ArmResult, ContrastResult, mean_and_deviation

COLORS = (BLUE, VERMILION, GREEN, PURPLE, ORANGE, SKY)
DPI = 140  # several plots are embedded in one HTML file
SPREAD = 0.16  # of the dots around their row, in rows

OUTCOME_STYLES = {
    "largest_lr_member": ("member with the largest learning rate", BLUE, "o"),
    "mean_of_members": ("mean of members", SKY, "s"),
    "ensemble": ("ensemble", VERMILION, "D"),
    "uniform_soup": ("uniform soup, batch norm re-estimated", GREEN, "^"),
    "greedy_soup": ("greedy soup, batch norm re-estimated", PURPLE, "v"),
}
"""Label, color and marker of each outcome that is plotted."""


@plot_style(grid="x")
def seeds(arms: Sequence[ArmResult], outcomes: Sequence[str], label: str) -> Figure:
    """Plot each seed as a dot, and mean and standard deviation as a bar, one row per arm.

    Args: outcomes: of each arm.
    """
    figure, axes = _arm_rows(arms)
    for row, (arm, outcome) in enumerate(zip(arms, outcomes, strict=True)):
        values = arm.values(outcome).tolist()
        color = BLUE if arm.arm.role == "method" else GREY
        axes.plot(values, _spread_rows(row, len(values)), "o", color=color, ms=4.5, alpha=0.75)
        if spread := mean_and_deviation(values):
            mean, deviation = spread
            bar: Style = {"fmt": "|", "ms": 14, "mew": 2, "capsize": 3, "elinewidth": 1.2}
            axes.errorbar(mean, row, xerr=deviation or 0.0, color=BLACK, **bar)
    axes.set_xlabel(label)
    _annotate(axes, "dots: seeds (blue: methods, gray: controls); bars: mean ± standard deviation")
    return figure


@plot_style(grid="x")
def differences(results: Sequence[ContrastResult]) -> Figure:
    """Plot each seed's difference to the control as a dot, and its 95% interval as a bar."""
    figure, axes = _rows(_pairs(results), height=0.55)
    axes.axvline(0, color=BLACK, lw=1)
    for row, result in enumerate(results):
        values = result.differences.tolist()
        axes.plot(values, _spread_rows(row, len(values)), "o", color=SKY, ms=4.5)
        if values:
            _draw_interval(axes, row, result)
    # Show all dots, but clip intervals that are much wider, as with two seeds.
    largest = max((abs(value) for r in results for value in r.differences), default=1.0)
    _clip(axes, results, largest)
    _show_margin(axes, results)
    axes.set_xlabel("difference in accuracy (percentage points)")
    _annotate(
        axes,
        "dots: seeds; diamonds and bars: mean and 95% interval, unadjusted; red: a difference is "
        "shown\n(Holm); gray: not tested; shaded: smaller than the smallest effect of interest",
    )
    return figure


@plot_style(grid="x")
def forest(
    results: Sequence[ContrastResult], published: Sequence[tuple[str, str, float, bool]]
) -> Figure:
    """Plot this comparison's intervals above published gains, one row per method and setting.

    Args: published: method, setting, gain in percentage points, and whether its square is open.
    """
    settings = list(dict.fromkeys((method, setting) for method, setting, *_ in published))
    names = _pairs(results)
    names += [f"{method}, published:\n{setting}" for method, setting in settings]
    figure, axes = _rows(names, height=0.4)
    axes.axvline(0, color=BLACK, lw=1)
    for row, result in enumerate(results):
        _draw_interval(axes, row, result)
    axes.axhline(len(results) - 0.5, color="#999999", lw=0.8)
    for method, setting, gain, is_open in published:
        row = len(results) + settings.index((method, setting))
        axes.plot([gain], [row], "s", color=ORANGE, mfc="white" if is_open else ORANGE, ms=6)
    gains = [gain for _, _, gain, _ in published]
    _clip(axes, results, max(map(abs, [*gains, *(r.test.mean for r in results)])))
    axes.set_xlabel("gain in accuracy (percentage points)")
    _annotate(axes, "diamonds and bars: this comparison; squares: published, other data and models")
    return figure


def _draw_interval(axes: Axes, row: int, result: ContrastResult) -> None:
    color, mean = _interval_color(result), result.test.mean
    if result.half_width is not None:
        ends = (mean - result.half_width, mean + result.half_width)
        axes.plot(ends, (row, row), "-", color=color, lw=1.8, solid_capstyle="butt")
    axes.plot([mean], [row], "D", color=color, ms=6)


def _interval_color(result: ContrastResult) -> str:
    if result.not_tested:
        return GREY
    return VERMILION if result.decision.rejected else BLACK


def _pairs(results: Sequence[ContrastResult]) -> list[str]:
    """Names of the compared arms, a row each."""
    return [f"{r.contrast.method.label}\nvs. {r.contrast.control_name}" for r in results]


def _clip(axes: Axes, results: Sequence[ContrastResult], largest: float) -> None:
    """Limit the axis to three times a value, with arrows where intervals continue beyond it."""
    reach, (low, high) = 3 * largest or 1.0, axes.get_xlim()
    axes.set_xlim(max(low, -reach), min(high, reach))
    low, high = axes.get_xlim()
    for row, result in enumerate(results):
        if result.half_width is None:
            continue
        style: Style = {"color": _interval_color(result), "ms": 8, "clip_on": False, "zorder": 5}
        if result.test.mean - result.half_width < low:
            axes.plot([low], [row], "<", **style)
        if result.test.mean + result.half_width > high:
            axes.plot([high], [row], ">", **style)
    axes.set_xlim(low, high)


def _show_margin(axes: Axes, results: Sequence[ContrastResult]) -> None:
    """Shade the differences that are smaller than the smallest effect of interest."""
    if results:
        low, high = axes.get_xlim()
        axes.axvspan(-results[0].margin, results[0].margin, color=GREEN, alpha=0.1, lw=0)
        axes.set_xlim(low, high)


@plot_style(grid="x")
def learning_curves(
    arms: Sequence[ArmResult], curves: pd.DataFrame, outcome: str, label: str
) -> Figure:
    """Plot the mean over the seeds of each epoch's accuracy, for all epochs and the second half.

    Bands are one standard deviation. `outcome` is a column of the curves.
    """
    figure, (whole, end) = _panels(2, len(arms))
    limits: list[float] = []
    epochs = 0
    for arm, style in zip(arms, _line_styles(arms), strict=True):
        points = curves[curves["key"].isin(arm.rows["key"])]
        if points.empty:
            continue
        by_epoch = points.groupby("epoch")[outcome]
        means, spreads = by_epoch.mean(), by_epoch.std().fillna(0.0)
        low, high = means - spreads, means + spreads
        epochs = len(means)
        limits += [*low[epochs // 2 :], *high[epochs // 2 :]]
        x = range(1, epochs + 1)
        for axes in (whole, end):
            marker = "o" if epochs < 3 else None
            (curve,) = axes.plot(x, means, lw=1.6, marker=marker, **style)
            axes.fill_between(x, low, high, color=style["color"], alpha=0.15, lw=0)
        curve.set_label(f"{arm.arm.name} (n = {points['key'].nunique()})")
    for axes in (whole, end):
        axes.set_xlabel("epoch")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(visible=True)
    whole.set_ylabel(label)
    if limits:
        margin = 0.05 * (max(limits) - min(limits)) or 1.0
        end.set_ylim(min(limits) - margin, max(limits) + margin)
        end.set_xlim(max(epochs // 2, 1) - 0.5, epochs + 0.5)
    _annotate(whole, "all epochs")
    _annotate(end, "second half")
    _add_legend(figure, end, columns=3)
    return figure


@plot_style(grid="x")
def accuracy_by_cost(
    arms: Sequence[ArmResult], curves: pd.DataFrame, outcome: str, label: str
) -> Figure:
    """Plot the mean accuracy against images seen, if they are known, and against wall time.

    The epochs of all networks of an arm are taken to be equally long. The curve of a network with
    teachers begins at their cost. `outcome` is a column of the curves.
    """
    costs = [
        (column, factor, text)
        for column, factor, text in (
            ("images_seen", 1e-6, "images seen by the arm (million)"),
            ("wall_seconds", 1 / 60, "wall time (min)"),
        )
        if any(len(arm.values(column)) for arm in arms)
    ]
    figure, panels = _panels(len(costs), len(arms))
    ends: list[float] = []
    for arm, style in zip(arms, _line_styles(arms), strict=True):
        points = curves[curves["key"].isin(arm.rows["key"])]
        if points.empty:
            continue
        means = points.groupby("epoch")[outcome].mean()
        ends.append(float(means.iloc[-1]))
        run = Run(phase="comparison", arm=arm.arm, seed=0)
        before = run.teachers.cost if run.teachers else 0
        shares = [(before + run.trained(epoch + 1)) / run.cost for epoch in range(len(means))]
        for axes, (column, factor, _) in zip(panels, costs, strict=True):
            total = arm.mean(column) * factor
            x = [total * share for share in shares]
            (curve,) = axes.plot(x, means, lw=1.6, **style)
            axes.plot(x[-1:], means.iloc[-1:], "o", ms=5, color=style["color"])
        curve.set_label(arm.arm.label)
    for axes, (_, _, text) in zip(panels, costs, strict=True):
        axes.set_xlabel(text)
        axes.set_xlim(left=0)
        axes.grid(visible=True)
        if ends:
            reach = max(max(ends) - min(ends), 1.0)
            axes.set_ylim(max(0.0, min(ends) - 2 * reach), max(ends) + 0.3 * reach)
    panels[0].set_ylabel(label)
    _add_legend(figure, panels[-1])
    return figure


@plot_style(grid="y")
def coefficients(arms: Sequence[ArmResult]) -> Figure:
    """Plot the coefficients of each epoch's last round: median, and a band from 5% to 95%."""
    columns = min(len(arms), 3)
    rows = -(-len(arms) // columns)
    figure = Figure(figsize=(PAGE_INCHES, 0.4 + 2.1 * rows), dpi=DPI, layout="constrained")
    panels = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    for axes in panels.flat[len(arms) :]:
        axes.set_visible(False)
    for axes, arm in zip(panels.flat, arms, strict=False):
        low, middle, high = (
            pd.DataFrame([parse_list(cell) for cell in arm.rows[f"coefficients_{name}"]]).mean()
            for name in ("5", "median", "95")
        )
        epochs = middle.index + 1
        color = BLUE if arm.arm.role == "method" else GREY
        axes.axhline(0.5, color=BLACK, lw=0.6, ls=":")
        axes.plot(epochs, middle, lw=1.6, color=color, marker="o" if len(epochs) < 3 else None)
        axes.fill_between(epochs, low, high, color=color, alpha=0.25, lw=0)
        axes.set_title(arm.arm.label)
        axes.set_xlabel("epoch")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    for axes in panels[:, 0]:
        axes.set_ylabel("coefficient")
    return figure


@plot_style(grid="x")
def outcomes(arms: Sequence[ArmResult], names: Sequence[str], label: str) -> Figure:
    """Plot the means of single networks, ensembles and soups, one row per population.

    Networks and ensembles determine the axis. A soup far below is printed at the left edge.

    Args: names: columns to plot, keys of OUTCOME_STYLES.
    """
    figure, axes = _arm_rows(arms, height=0.42)
    spreads = {
        (name, row): spread
        for name in names
        for row, arm in enumerate(arms)
        if (spread := mean_and_deviation(arm.values(name)))
    }
    shown = [name for name in names if any(name == key for key, _ in spreads)]
    means = [mean for (name, _), (mean, _) in spreads.items() if "soup" not in name]
    left = min(means) - max(max(means) - min(means), 0.5)
    for number, name in enumerate(shown):
        text, color, marker = OUTCOME_STYLES[name]
        offset = SPREAD * 1.4 * (2 * number / max(len(shown) - 1, 1) - 1)
        rows = {row: spread for (key, row), spread in spreads.items() if key == name}
        near = {row: spread for row, spread in rows.items() if spread[0] >= left}
        style: Style = {"fmt": marker, "ms": 5.5, "mec": "white", "mew": 0.5}
        axes.errorbar(
            [mean for mean, _ in near.values()],
            [row + offset for row in near],
            xerr=[deviation or 0.0 for _, deviation in near.values()],
            elinewidth=1.0,
            color=color,
            label=text,
            **style,
        )
        for row in rows.keys() - near.keys():
            mean = f"◂ {rows[row][0]:.1f}"
            axes.text(left, row + offset, mean, color=color, fontsize=7.5, va="center")
    axes.set_xlim(left=left)
    axes.set_xlabel(label)
    _add_legend(figure, axes)
    return figure


@plot_style(grid="x")
def invalid_filters(arms: Sequence[ArmResult], names: Mapping[str, str]) -> Figure:
    """Plot the share of invalid filters, each seed a dot; `names` maps columns to labels."""
    values = {
        text: [(100 * arm.rows[name] / arm.rows["filters"]).dropna().tolist() for arm in arms]
        for name, text in names.items()
    }
    figure = _dots_from_zero(arms, values, "invalid filters (%)")
    if not any(any(of_arm) for by_arm in values.values() for of_arm in by_arm):
        (axes,) = figure.axes
        where: Style = {"ha": "center", "va": "center", "transform": axes.transAxes}
        text = "no filter is invalid in any run"
        axes.text(0.5, 0.5, text, fontsize=11, bbox={"fc": "white", "ec": GREY}, **where)
    return figure


@plot_style(grid="x")
def costs(arms: Sequence[ArmResult]) -> Figure:
    """Plot wall time and CPU time of a training, each seed a dot."""
    values = {
        "CPU time, all cores": [arm.rows["core_seconds"].tolist() for arm in arms],
        "wall time": [arm.rows["wall_seconds"].tolist() for arm in arms],
    }
    return _dots_from_zero(arms, values, "time to train the whole population once (s)")


def _dots_from_zero(
    arms: Sequence[ArmResult], values: Mapping[str, Sequence[Sequence[float]]], label: str
) -> Figure:
    """Plot quantities from zero, each seed a dot; `values` has one list per arm by legend text."""
    figure, axes = _arm_rows(arms)
    for number, (text, by_arm) in enumerate(values.items()):
        xs = [x for of_arm in by_arm for x in of_arm]
        ys = [y for row, of_arm in enumerate(by_arm) for y in _spread_rows(row, len(of_arm))]
        style: Style = {"color": COLORS[number], "ms": 4.5, "alpha": 0.75}
        axes.plot(xs, ys, "os^"[number % 3], label=text, clip_on=False, **style)
    axes.set_xlabel(label)
    any_above_zero = any(any(of_arm) for by_arm in values.values() for of_arm in by_arm)
    axes.set_xlim(0.0, None if any_above_zero else 1.0)
    _add_legend(figure, axes)
    return figure


def _panels(count: int, curves: int) -> tuple[Figure, list[Axes]]:
    """Create a figure with panels side by side, and room for a legend of so many curves."""
    height = 3.1 + 0.2 * -(-curves // 3)
    figure = Figure(figsize=(PAGE_INCHES, height), dpi=DPI, layout="constrained")
    return figure, list(figure.subplots(1, count, squeeze=False)[0])


def _line_styles(arms: Sequence[ArmResult]) -> Iterator[Style]:
    """Yield colors for methods, and black and gray dashes for controls."""
    methods = controls = 0
    for arm in arms:
        if arm.arm.role == "method":
            dashes = LINE_STYLES[methods // len(COLORS) % len(LINE_STYLES)]
            yield {"color": COLORS[methods % len(COLORS)], "ls": dashes}
            methods += 1
        else:
            color = (BLACK, GREY)[controls // len(LINE_STYLES) % 2]
            yield {"color": color, "ls": LINE_STYLES[(controls + 1) % len(LINE_STYLES)]}
            controls += 1


def _arm_rows(arms: Sequence[ArmResult], height: float = 0.34) -> tuple[Figure, Axes]:
    """Create a figure with one row per arm and a line between population sizes."""
    figure, axes = _rows([arm.arm.label for arm in arms], height)
    for row in range(1, len(arms)):
        if arms[row].arm.group != arms[row - 1].arm.group:
            axes.axhline(row - 0.5, color="#999999", lw=0.8)
    return figure, axes


def _rows(names: Sequence[str], height: float) -> tuple[Figure, Axes]:
    """Create a figure with one row per name, from the top."""
    size = (PAGE_INCHES, height * max(len(names), 2) + 1.2)
    figure = Figure(figsize=size, dpi=DPI, layout="constrained")
    axes = figure.subplots()
    axes.set_yticks(range(len(names)), names, fontsize=8)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.tick_params(axis="y", length=0, pad=7)  # room for arrows
    axes.spines.left.set_visible(False)
    return figure, axes


def _spread_rows(row: int, count: int) -> list[float]:
    """Return y positions around a row, so that dots with equal values do not overlap."""
    if count < 2:
        return [float(row)] * count
    return [row + SPREAD * (2 * number / (count - 1) - 1) for number in range(count)]


def _annotate(axes: Axes, text: str) -> None:
    axes.set_title(text, fontsize=7.5, color="#444444", loc="right")


def _add_legend(figure: Figure, axes: Axes, columns: int = 2) -> None:
    """Add a legend below the axes."""
    handles, texts = axes.get_legend_handles_labels()
    if handles:
        figure.legend(handles, texts, loc="outside lower center", ncols=columns)
