"""``dist-graft inspect``: invalid filters, entropy and L1 norms as tables, CSV and plots."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any, Literal

from jsonargparse import ArgumentParser

from dist_graft.command import Command, Options
from dist_graft.config.validation import above_zero, at_least
from dist_graft.population.runtime.process_info import ProcessInfo
from dist_graft.printing import format_table

if TYPE_CHECKING:
    from dist_graft.analysis.filters import Inspected

_COLUMNS = (
    "source",
    "network",
    "unit",
    "filter",
    "weights",
    "l1_norm",
    "entropy_nats",
    "unit_mean_absolute_weight",
    "unit_entropy_nats",
)
_NOTE = (
    "entropy in nats: of all weights of a layer, and the mean over its filters; |w|: mean absolute "
    "weight; norm: mean L1 norm of a filter"
)


def build_parser(settings: Mapping[str, Any]) -> ArgumentParser:
    """Build the parser of the command's options."""
    parser = ArgumentParser(
        description="Measure the filters of networks. Writes inspect.csv and plots.",
        **settings,
    )
    add = parser.add_argument
    add(
        "sources",
        type=str,
        nargs="+",
        help="run directories, checkpoints, exported folders or .pt files to compare",
    )
    add(
        "--thresholds",
        type=float,
        nargs="+",
        default=[0.1, 0.01, 0.001],
        help="L1 norms below which a filter counts as invalid",
    )
    add("--num_bins", type=int, default=10, help="histogram bins of the entropy")
    add(
        "--out",
        type=str | None,
        default=None,
        help="output folder; unset: inspect in the first source's run, or beside its file",
    )
    add(
        "--model.name",
        type=str | None,
        default=None,
        help="architecture of .pt files outside of runs and exported folders",
    )
    add(
        "--graft.lead",
        type=Literal["conv", "conv+linear"] | None,
        default=None,
        help="layers to inspect; unset: those that the run grafts",
    )
    return parser


def run(options: Options, process: ProcessInfo) -> Iterator[str]:
    """Print tables of networks and layers; write inspect.csv and plots.

    Sources of different models are compared in the layers that they share. There is no plot of
    invalid filters if there are none.

    Raises: DistGraftError.
    """
    del process
    at_least("num_bins", options["num_bins"], 1)
    for threshold in options["thresholds"]:
        above_zero("thresholds", threshold)
    from dist_graft.analysis.filter_plots import INVALID_FILTERS, draw
    from dist_graft.analysis.filters import inspect_source, shared_layers
    from dist_graft.analysis.stored_weights import labels, owner, read_source
    from dist_graft.run_directory import write_atomically

    paths = [Path(source) for source in options["sources"]]
    model_name, lead = options["model"]["name"], options["graft"]["lead"]
    num_bins, out = options["num_bins"], Path(options["out"] or owner(paths[0]) / "inspect")
    thresholds = sorted(set(options["thresholds"]), reverse=True)
    inspected = [
        inspect_source(read_source(path, model_name), label, num_bins=num_bins, lead=lead)
        for path, label in zip(paths, labels(paths), strict=True)
    ]
    counts = [len(source.units) for source in inspected]
    inspected = shared_layers(inspected)
    shared = len(inspected[0].units)
    files = {"inspect.csv": csv_text(inspected).encode(), **draw(inspected, thresholds, num_bins)}
    for name, content in files.items():
        write_atomically(out / name, content)
    if INVALID_FILTERS not in files:
        (out / INVALID_FILTERS).unlink(missing_ok=True)  # of an earlier call
    yield f"{network_table(inspected, thresholds)}\n"
    yield f"{layer_table(inspected, thresholds)}\n{_NOTE}\n"
    if max(counts) > shared:
        yield f"different models: only the {shared} layers that all of them have are compared"
    if INVALID_FILTERS not in files:
        yield f"no plot of invalid filters: no L1 norm is below {thresholds[0]:g}"
    yield f"written: {', '.join(str(out / name) for name in files)}"


COMMAND = Command(
    name="inspect",
    help="measure and plot invalid filters, entropy and L1 norms",
    build_parser=build_parser,
    run=run,
)


def csv_text(inspected: Sequence[Inspected]) -> str:
    """One line per source, network, unit and filter. Values of a unit are repeated."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(_COLUMNS)
    for source in inspected:
        for network, layers in source.networks.items():
            for layer in layers:
                unit = (f"{layer.mean_absolute:.9g}", f"{layer.entropy:.9g}")
                for number, (norm, entropy) in enumerate(
                    zip(layer.norms, layer.entropies, strict=True)
                ):
                    line = (source.label, network, layer.unit, number, layer.weights)
                    writer.writerow((*line, f"{norm:.9g}", f"{entropy:.9g}", *unit))
    return buffer.getvalue()


def network_table(inspected: Sequence[Inspected], thresholds: Sequence[float]) -> str:
    """Filters of each network below each threshold."""
    header = ("source", "network", "filters", *(f"L1 < {value:g}" for value in thresholds))
    rows = []
    for source in inspected:
        filters = sum(count for _, count in source.units)
        below = [source.below(threshold).sum(1) for threshold in thresholds]
        for row, network in enumerate(source.networks):
            shares = (f"{counts[row]} ({100 * counts[row] / filters:.1f}%)" for counts in below)
            rows.append((source.label, network, str(filters), *shares))
    return format_table(header, rows)


def layer_table(inspected: Sequence[Inspected], thresholds: Sequence[float]) -> str:
    """Each layer of each source, averaged over the networks of the source."""
    header = (
        *("layer", "name", "filters", "source"),
        *(f"L1 < {value:g}" for value in thresholds),
        *("entropy", "of a filter", "|w|", "norm"),
    )
    counts = [[source.below(value).mean(0) for value in thresholds] for source in inspected]
    rows = []
    for unit, (name, filters) in enumerate(inspected[0].units):
        for column, source in enumerate(inspected):
            layers = [network[unit] for network in source.networks.values()]
            digits = 0 if len(layers) == 1 else 1
            rows.append(
                (
                    *((str(unit + 1), name, str(filters)) if column == 0 else ("", "", "")),
                    source.label,
                    *(f"{below[unit]:.{digits}f}" for below in counts[column]),
                    f"{fmean(layer.entropy for layer in layers):.3f}",
                    f"{fmean(layer.entropies.mean() for layer in layers):.3f}",
                    f"{fmean(layer.mean_absolute for layer in layers):.2g}",
                    f"{fmean(layer.norms.mean() for layer in layers):.3g}",
                )
            )
    return format_table(header, rows)
