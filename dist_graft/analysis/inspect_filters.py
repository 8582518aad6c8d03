"""Invalid filters, entropy and L1 norms of several sources: a table, a CSV file, pictures."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from dist_graft.analysis.filter_plots import draw
from dist_graft.analysis.filters import Inspected, Numbers, check_alike, inspect_source
from dist_graft.analysis.sources import labels, read_source
from dist_graft.grafting.units import Lead
from dist_graft.monitoring.console import table
from dist_graft.training.checkpoint.files import write_atomically

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


def inspect_sources(
    paths: Sequence[Path],
    *,
    thresholds: Sequence[float],
    num_bins: int,
    out: Path,
    model_name: str | None = None,
    lead: Lead | None = None,
) -> str:
    """Measure the filters of runs, checkpoint sets or files; write inspect.csv and three pictures.

    Args:
        paths: see `read_source`; all of one architecture.
        thresholds: L1 norms, falling; a filter below one is invalid.
        num_bins: of the entropy's histogram.
        out: folder that is written to.
        model_name: architecture of files that lie in no run and no exported folder.
        lead: layers that are looked at; None: those that the run grafts.

    Returns: tables of totals and layers, and the files that were written.

    Raises: a DistGraftError whose text says what to do.
    """
    inspected = [
        inspect_source(read_source(path, model_name), label, num_bins=num_bins, lead=lead)
        for path, label in zip(paths, labels(paths), strict=True)
    ]
    check_alike(inspected)
    files = {"inspect.csv": csv_text(inspected).encode(), **draw(inspected, thresholds, num_bins)}
    for name, content in files.items():
        write_atomically(out / name, content)
    written = ", ".join(str(out / name) for name in files)
    return (
        f"{totals_text(inspected, thresholds)}\n\n{layers_text(inspected, thresholds)}\n{_NOTE}\n\n"
        f"written: {written}"
    )


def csv_text(inspected: Sequence[Inspected]) -> str:
    """A line for each source, network, unit and filter; the unit's own values are repeated."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(_COLUMNS)
    for source in inspected:
        for network, layers in source.networks.items():
            for layer in layers:
                own = (f"{layer.mean_absolute:.9g}", f"{layer.entropy:.9g}")
                for number, (norm, entropy) in enumerate(
                    zip(layer.norms, layer.entropies, strict=True)
                ):
                    line = (source.label, network, layer.unit, number, layer.weights)
                    writer.writerow((*line, f"{norm:.9g}", f"{entropy:.9g}", *own))
    return buffer.getvalue()


def totals_text(inspected: Sequence[Inspected], thresholds: Sequence[float]) -> str:
    """Filters of each network below each threshold."""
    header = ("source", "network", "filters", *(f"L1 < {value:g}" for value in thresholds))
    rows = []
    for source in inspected:
        filters = sum(count for _, count in source.units)
        below = [source.below(threshold).sum(1) for threshold in thresholds]
        for row, network in enumerate(source.networks):
            shares = (f"{counts[row]} ({100 * counts[row] / filters:.1f}%)" for counts in below)
            rows.append((source.label, network, str(filters), *shares))
    return table(header, rows)


def layers_text(inspected: Sequence[Inspected], thresholds: Sequence[float]) -> str:
    """Each layer of each source; means over the networks of a source that has several."""
    header = (
        *("layer", "name", "filters", "source"),
        *(f"L1 < {value:g}" for value in thresholds),
        *("entropy", "of a filter", "|w|", "norm"),
    )
    counts = [[_mean(source.below(value)) for value in thresholds] for source in inspected]
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
                    f"{np.mean([layer.entropy for layer in layers]):.3f}",
                    f"{np.mean([layer.entropies.mean() for layer in layers]):.3f}",
                    f"{np.mean([layer.mean_absolute for layer in layers]):.2g}",
                    f"{np.mean([layer.norms.mean() for layer in layers]):.3g}",
                )
            )
    return table(header, rows)


def _mean(counts: np.ndarray[tuple[int, ...], np.dtype[np.int64]]) -> Numbers:
    mean: Numbers = counts.mean(0, dtype=np.float64)
    return mean
