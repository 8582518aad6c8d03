"""Layout of TensorBoard's Custom Scalars tab: the main charts, all networks in each."""

from __future__ import annotations

import re
from typing import Literal

PHASES = ("data", "step", "round", "evaluation", "checkpoint", "other")
"""Phases of an epoch, for timing."""
_IN_NATS = ("entropy", "filter_entropy")

Layout = dict[str, dict[str, tuple[Literal["Multiline", "Margin"], list[str]]]]
"""Charts by category and title; tags are regular expressions, matched from the start."""


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
    tests = [f"{metric}/test"]
    if metric == "accuracy":
        tests.append("population/ensemble_test_accuracy")
    charts = {
        "test, every network; population: their ensemble": _lines(*tests),
        "test, mean of the networks, minimum to maximum": (
            "Margin",
            [f"population/test_{metric}_{name}" for name in ("mean", "min", "max")],
        ),
        "test, spread of the networks": _lines(f"population/test_{metric}_standard_deviation"),
        "training, every network": _lines(f"{metric}/train"),
    }
    loss = {"test": _lines("loss/test"), "training": _lines("loss/train")}
    if validation:
        charts["validation, every network"] = _lines(f"{metric}/val")
        loss["validation"] = _lines("loss/val")
    layout: Layout = {
        "accuracy, %" if metric == "accuracy" else f"{metric}, all networks": charts,
        "loss": loss,
        "learning rate": {"every network": _lines("learning_rate")},
    }
    if rounds:
        layout["coefficient: share of its own weights that a network keeps"] = _over_layers(
            "coefficient"
        )
        layout["distance to the donor, before the round"] = {
            "all layers together": _lines("layers/distance_to_donor")
        }
    layout[f"information of the layers ({with_unit(criterion)})"] = _over_layers(criterion)
    layout["invalid filters"] = {
        "L1 norm below 0.1": _lines("invalid_filters_0.1"),
        "L1 norm below 0.01": _lines("invalid_filters_0.01"),
    }
    layout["speed"] = {"training, images/s": _lines("images_per_second")}
    layout["share of time, %"] = {phase: _lines(f"time_share/{phase}") for phase in PHASES}
    return layout


def with_unit(criterion: str) -> str:
    """A criterion's name, with its unit if it has one."""
    return f"{criterion}, nats" if criterion in _IN_NATS else criterion


def _over_layers(name: str) -> dict[str, tuple[Literal["Multiline", "Margin"], list[str]]]:
    return {
        "mean of the layers": _lines(f"layers/{name}_mean"),
        "minimum and maximum layer": _lines(f"layers/{name}_min", f"layers/{name}_max"),
    }


def _lines(*tags: str) -> tuple[Literal["Multiline", "Margin"], list[str]]:
    return ("Multiline", [f"{re.escape(tag)}$" for tag in tags])
