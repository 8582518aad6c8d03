"""Scalars of an epoch by tag, the same for all loggers."""

from __future__ import annotations

import math
import statistics
from collections.abc import Collection, Mapping
from typing import Any

from dist_graft.monitoring.metrics import MOMENTS, EpochMetrics, EpochReport, LayerStats

Scalars = dict[str, float]
"""Values by tag. The step of each is an epoch, counted from 0."""


def network_scalars(metrics: EpochMetrics, layers: LayerStats) -> Scalars:
    """Results of one network in an epoch, including its rounds."""
    splits = {
        "train": metrics.train,
        "test": metrics.test,
        "val": metrics.val or {},
        "ema_test": metrics.ema_test or {},
    }
    scalars: dict[str, float | None] = {
        f"{name}/{split}": value
        for split, values in splits.items()
        for name, value in values.items()
    }
    scalars |= {
        "learning_rate": metrics.lr,
        "images_per_second": metrics.images_per_second,
    }
    total_seconds = sum(metrics.phase_seconds.values())
    for phase, seconds in metrics.phase_seconds.items():
        scalars[f"time_share/{phase}"] = 100 * seconds / total_seconds
    scalars |= _by_unit(layers.criterion, layers.information)
    scalars |= _over_units(layers.criterion, layers.information.values())
    for threshold, counts in layers.invalid.items():
        scalars[f"invalid_filters_{threshold:g}"] = sum(counts.values())
        scalars |= _by_unit(f"invalid_{threshold:g}", counts)
    if metrics.graft is not None:
        scalars["round/seconds"] = metrics.graft["seconds"]
        scalars["round/megabytes_received"] = metrics.graft["bytes"] / 1e6
        scalars["round/lag"] = metrics.graft.get("lag")
        coefficient = metrics.graft["coefficient"]
        scalars |= _by_unit("coefficient", coefficient)
        scalars |= _over_units("coefficient", coefficient.values())
        differences = [kept - 0.5 for kept in coefficient.values()]
        scalars |= _over_units("coefficient_minus_half", differences)
        distance = metrics.graft["distance"]
        scalars |= _by_unit("distance", distance)
        if distance:
            scalars["layers/distance_to_donor"] = math.hypot(*distance.values())
    return _known(scalars)


def population_scalars(report: EpochReport) -> Scalars:
    """Mean and spread of the networks' test metric, and the ensemble's accuracy if known.

    All are measured before the round. The spread is NaN if a value is not finite.
    """
    metric = report.metric or "loss"
    values = [row.test_metric if report.metric else row.test_loss for row in report.networks]
    spread = 0.0
    if len(values) > 1:
        spread = statistics.stdev(values) if all(map(math.isfinite, values)) else math.nan
    return _known(
        {
            f"population/test_{metric}_mean": statistics.fmean(values),
            f"population/test_{metric}_min": min(values),
            f"population/test_{metric}_max": max(values),
            f"population/test_{metric}_standard_deviation": spread,
            "population/ensemble_test_accuracy": report.ensemble_accuracy,
        }
    )


def final_network_scalars(summary: Mapping[str, Any], network: int) -> Scalars:
    """Final results of one network, before and after the last round, from summary.json."""
    metric = summary.get("metric", "accuracy")
    values = next(row for row in summary["networks"] if row["network"] == network)
    return {f"final/test_{metric}_{when}": values[f"{metric}_{when}"] for when in MOMENTS}


def final_population_scalars(summary: Mapping[str, Any]) -> Scalars:
    """Final accuracies of the ensemble; empty if it is unknown."""
    return _known(
        {
            f"final/ensemble_test_accuracy_{when}": summary.get(f"ensemble_accuracy_{when}")
            for when in MOMENTS
        }
    )


def _by_unit(name: str, values: Mapping[str, float]) -> Scalars:
    """A scalar per graft unit."""
    return {f"{name}/{unit}": value for unit, value in values.items()}


def _over_units(name: str, values: Collection[float]) -> Scalars:
    """Mean, minimum and maximum of the graft units' values, if there are any."""
    if not values:
        return {}
    summaries = {"mean": statistics.fmean(values), "min": min(values), "max": max(values)}
    return {f"layers/{name}_{which}": value for which, value in summaries.items()}


def _known(scalars: Mapping[str, float | None]) -> Scalars:
    return {tag: value for tag, value in scalars.items() if value is not None}
