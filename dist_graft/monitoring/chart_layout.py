"""Layout of TensorBoard's Custom Scalars tab: the main charts, all networks in each.

All charts are bands: by default, TensorBoard smooths other charts and scales the axis to the
smoothed values, which cuts off the ends of a short run. Axis labels have three digits, so values
that vary little are drawn with a band, or as differences.
"""

from __future__ import annotations

from typing import Literal

PHASES = ("data", "step", "round", "evaluation", "checkpoint", "other")
"""Phases of an epoch, for timing."""
_IN_NATS = ("entropy", "filter_entropy")

Chart = tuple[Literal["Margin"], list[str]]
"""A band for each run that has the tags: value, lower edge, upper edge."""
Layout = dict[str, dict[str, Chart]]
"""Charts by category and title."""


def custom_scalars(
    criterion: str, *, validation: bool, rounds: bool, metric: str = "accuracy"
) -> Layout:
    """Charts of the Custom Scalars tab, from top to bottom.

    Args:
        criterion: of the layers' information.
        validation: whether there is a validation split.
        rounds: whether the networks take part in rounds.
        metric: the first metric of the task.
    """
    charts = {
        "test, every network": _line(f"{metric}/test"),
        "test, mean of the networks, minimum to maximum": _band(f"population/test_{metric}"),
        "test, spread of the networks": _line(f"population/test_{metric}_standard_deviation"),
        "training, every network": _line(f"{metric}/train"),
    }
    if metric == "accuracy":
        charts["test, ensemble of the networks"] = _line("population/ensemble_test_accuracy")
    loss = {"test": _line("loss/test"), "training": _line("loss/train")}
    if validation:
        charts["validation, every network"] = _line(f"{metric}/val")
        loss["validation"] = _line("loss/val")
    layout: Layout = {
        "accuracy, %" if metric == "accuracy" else f"{metric}, all networks": charts,
        "loss": loss,
        "learning rate": {"every network": _line("learning_rate")},
    }
    if rounds:
        layout["coefficient minus 1/2: above 0, a network keeps more than it takes"] = _over_layers(
            "coefficient_minus_half"
        )
        layout["distance to the donor, before the round"] = {
            "all layers together": _line("layers/distance_to_donor")
        }
    layout[f"information of the layers ({with_unit(criterion)})"] = _over_layers(criterion)
    layout["invalid filters"] = {
        "L1 norm below 0.1": _line("invalid_filters_0.1"),
        "L1 norm below 0.01": _line("invalid_filters_0.01"),
    }
    layout["speed"] = {"training, images/s": _line("images_per_second")}
    layout["share of time, %"] = {phase: _line(f"time_share/{phase}") for phase in PHASES}
    return layout


def with_unit(criterion: str) -> str:
    """A criterion's name, with its unit if it has one."""
    return f"{criterion}, nats" if criterion in _IN_NATS else criterion


def _over_layers(name: str) -> dict[str, Chart]:
    return {"mean of the layers, minimum to maximum": _band(f"layers/{name}")}


def _band(tag: str) -> Chart:
    """Mean, minimum and maximum of each run."""
    return ("Margin", [f"{tag}_{name}" for name in ("mean", "min", "max")])


def _line(tag: str) -> Chart:
    """A line for each run: a band of zero width."""
    return ("Margin", [tag] * 3)
