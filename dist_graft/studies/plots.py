"""Pictures of a comparison, as PNG bytes: labelled, colour-blind safe, readable in print."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from dist_graft.studies.figures import (
    BLACK,
    BLUE,
    CYCLE,
    DASHES,
    DPI,
    GREEN,
    GREY,
    PURPLE,
    SKY,
    SPREAD,
    VERMILION,
    WIDTH,
    around,
    explain,
    legend_below,
    no_box,
    png,
    row_axes,
)
from dist_graft.studies.lines import ArmLine, ContrastLine, mean_and_deviation
from dist_graft.studies.outcomes import CurvePoint

OUTCOME_STYLES = {
    "largest_lr_member": ("member with the largest learning rate", BLUE, "o"),
    "mean_of_members": ("mean of members", SKY, "s"),
    "ensemble": ("ensemble", VERMILION, "D"),
    "uniform_soup": ("uniform soup, batch norm re-estimated", GREEN, "^"),
    "greedy_soup": ("greedy soup, batch norm re-estimated", PURPLE, "v"),
}
"""Text, colour and marker of each outcome that is drawn."""


def dots(lines: Sequence[ArmLine], outcome: str, axis: str) -> bytes:
    """Every seed a dot, mean and standard deviation as a bar, a line for each arm."""
    figure, axes = _arms(lines)
    for place, line in enumerate(lines):
        values = list(line.values(outcome).values())
        axes.plot(values, around(place, len(values)), "o", color=_role(line), ms=4.5, alpha=0.75)
        told = mean_and_deviation(values)
        if told:
            mean, deviation = told
            axes.errorbar(
                mean,
                place,
                xerr=deviation or 0.0,
                fmt="|",
                ms=14,
                mew=2,
                color=BLACK,
                capsize=3,
                elinewidth=1.2,
            )
    axes.set_xlabel(axis)
    explain(axes, "dots: seeds (blue: methods, grey: controls); bars: mean ± standard deviation")
    return png(figure)


def differences(lines: Sequence[ContrastLine]) -> bytes:
    """Differences to the control: every seed a dot, the corrected interval a bar."""
    names = [f"{line.contrast.method.label}\nless {line.contrast.control_name}" for line in lines]
    figure, axes = row_axes(names, height=0.55)
    axes.axvline(0, color=BLACK, lw=1)
    for place, line in enumerate(lines):
        values = list(line.differences.values())
        axes.plot(values, around(place, len(values)), "o", color=SKY, ms=4.5)
        if not values:
            continue
        colour = VERMILION if line.decision.shown else BLACK
        if line.half_width is not None:
            ends = (line.result.mean - line.half_width, line.result.mean + line.half_width)
            axes.plot(ends, (place, place), "-", color=colour, lw=1.8, solid_capstyle="butt")
        axes.plot([line.result.mean], [place], "D", color=colour, ms=6)
    _frame(axes, lines)
    axes.set_xlabel("difference in accuracy (percentage points)")
    explain(
        axes,
        "dots: seeds; diamonds and bars: mean and t-interval, corrected after Holm; "
        "red: a difference is shown",
    )
    return png(figure)


def curves(
    lines: Sequence[ArmLine], points: Mapping[str, Sequence[CurvePoint]], axis: str
) -> bytes:
    """Mean over the seeds of each epoch's accuracy, all epochs and the last half of them.

    The bands are one standard deviation.
    """
    figure = Figure(figsize=(WIDTH, 3.1 + 0.2 * -(-len(lines) // 3)), dpi=DPI, layout="constrained")
    whole, end = figure.subplots(1, 2)
    shown: list[float] = []
    epochs = 0
    for line, style in zip(lines, _styles(lines), strict=True):
        by_seed = [points[row.key] for row in line.rows.values() if points.get(row.key)]
        if not by_seed:
            continue
        columns = list(zip(*([p.largest_lr_member for p in seed] for seed in by_seed), strict=True))
        epochs = len(columns)
        means = [statistics.fmean(column) for column in columns]
        spreads = [statistics.stdev(column) if len(column) > 1 else 0.0 for column in columns]
        low = [mean - spread for mean, spread in zip(means, spreads, strict=True)]
        high = [mean + spread for mean, spread in zip(means, spreads, strict=True)]
        shown += low[epochs // 2 :] + high[epochs // 2 :]
        for axes in (whole, end):
            (drawn,) = axes.plot(
                range(1, epochs + 1), means, lw=1.6, marker="o" if epochs < 3 else None, **style
            )
            band: dict[str, Any] = {"color": style["color"], "alpha": 0.15, "lw": 0}
            axes.fill_between(range(1, epochs + 1), low, high, **band)
        drawn.set_label(f"{line.arm.name} (n = {len(by_seed)})")
    for axes in (whole, end):
        axes.set_xlabel("epoch")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(color="#dddddd", lw=0.6)
        no_box(axes)
    whole.set_ylabel(axis)
    if shown:
        margin = 0.05 * (max(shown) - min(shown)) or 1.0
        end.set_ylim(min(shown) - margin, max(shown) + margin)
        end.set_xlim(max(epochs // 2, 1) - 0.5, epochs + 0.5)
    explain(whole, "all epochs")
    explain(end, "the last half")
    legend_below(figure, end, columns=3)
    return png(figure)


def outcomes(lines: Sequence[ArmLine], axis: str) -> bytes:
    """Means of single networks, ensembles and soups, a line for each population.

    The axis is that of networks and ensembles; a soup far below them is a number at its left end.
    """
    figure, axes = _arms(lines, height=0.42)
    drawn = [name for name in OUTCOME_STYLES if any(line.values(name) for line in lines)]
    told = {
        (name, place): spread
        for name in drawn
        for place, line in enumerate(lines)
        if (spread := mean_and_deviation(list(line.values(name).values())))
    }
    trained = [mean for (name, _), (mean, _) in told.items() if "soup" not in name]
    least = min(trained) - max(max(trained) - min(trained), 0.5)
    for number, name in enumerate(drawn):
        text, colour, marker = OUTCOME_STYLES[name]
        offset = SPREAD * 1.4 * (2 * number / max(len(drawn) - 1, 1) - 1)
        style: dict[str, Any] = {
            "fmt": marker,
            "ms": 5.5,
            "color": colour,
            "mec": "white",
            "mew": 0.5,
        }
        inside = {place: told[name, place] for n, place in told if n == name}
        far = {place: mean for place, (mean, _) in inside.items() if mean < least}
        near = {place: spread for place, spread in inside.items() if place not in far}
        axes.errorbar(
            [mean for mean, _ in near.values()],
            [place + offset for place in near],
            xerr=[deviation or 0.0 for _, deviation in near.values()],
            elinewidth=1.0,
            label=text,
            **style,
        )
        for place, mean in far.items():
            note = f"◂ {mean:.1f}"
            axes.text(least, place + offset, note, color=colour, fontsize=7.5, va="center")
    axes.set_xlim(left=least)
    axes.set_xlabel(axis)
    legend_below(figure, axes)
    return png(figure)


def filters(lines: Sequence[ArmLine], names: Mapping[str, str]) -> bytes:
    """Share of invalid filters, every seed a dot; `names` maps a row's count to its text."""
    values = {
        text: [
            [
                100 * row.filters[name] / row.filters["filters"]
                for row in line.rows.values()
                if row.filters.get("filters")
            ]
            for line in lines
        ]
        for name, text in names.items()
    }
    return _from_zero(
        lines, values, "invalid filters of the member with the largest learning rate (%)"
    )


def cost(lines: Sequence[ArmLine]) -> bytes:
    """Wall time and processor time of a training, every seed a dot."""
    rows = [list(line.rows.values()) for line in lines]
    values = {
        "processor time, all cores together": [[row.core_seconds for row in of] for of in rows],
        "wall time": [[row.wall_seconds for row in of] for of in rows],
    }
    return _from_zero(lines, values, "time of one training of the whole population (s)")


def _from_zero(
    lines: Sequence[ArmLine], values: Mapping[str, Sequence[Sequence[float]]], axis: str
) -> bytes:
    """Several quantities that start at zero, a dot for each seed; by text, a list for each arm."""
    figure, axes = _arms(lines)
    for number, (text, by_arm) in enumerate(values.items()):
        xs = [x for of_arm in by_arm for x in of_arm]
        ys = [y for place, of_arm in enumerate(by_arm) for y in around(place, len(of_arm))]
        style: dict[str, Any] = {"color": CYCLE[number], "ms": 4.5, "alpha": 0.75, "label": text}
        style["clip_on"] = False  # dots at zero are whole
        axes.plot(xs, ys, "os^"[number % 3], **style)
    axes.set_xlabel(axis)
    something = any(any(of_arm) for by_arm in values.values() for of_arm in by_arm)
    axes.set_xlim(0.0, None if something else 1.0)
    legend_below(figure, axes)
    return png(figure)


def _role(line: ArmLine) -> str:
    return BLUE if line.arm.role == "method" else GREY


def _styles(lines: Sequence[ArmLine]) -> Iterator[dict[str, Any]]:
    """Colours for methods, black and grey dashes for controls."""
    methods = controls = 0
    for line in lines:
        if line.arm.role == "method":
            dashes = DASHES[methods // len(CYCLE) % len(DASHES)]
            yield {"color": CYCLE[methods % len(CYCLE)], "ls": dashes}
            methods += 1
        else:
            colour = (BLACK, GREY)[controls // len(DASHES) % 2]
            yield {"color": colour, "ls": DASHES[(controls + 1) % len(DASHES)]}
            controls += 1


def _arms(lines: Sequence[ArmLine], height: float = 0.34) -> tuple[Figure, Axes]:
    """A figure with a line for each arm; sizes of populations are kept apart."""
    figure, axes = row_axes([line.arm.label for line in lines], height)
    for place in range(1, len(lines)):
        if lines[place].arm.group != lines[place - 1].arm.group:
            axes.axhline(place - 0.5, color="#999999", lw=0.8)
    return figure, axes


def _frame(axes: Axes, lines: Iterable[ContrastLine]) -> None:
    """Show all dots, and intervals unless they are much wider (as with two seeds)."""
    values = [value for line in lines for value in line.differences.values()]
    reach = 3 * max([abs(value) for value in values], default=1.0) or 1.0
    low, high = axes.get_xlim()
    axes.set_xlim(max(low, -reach), min(high, reach))
