"""What TensorBoard's custom scalars show: the charts that matter, all networks in each."""

from __future__ import annotations

import re
from typing import Literal

PHASES = ("data", "step", "round", "evaluation", "checkpoint", "other")
"""What an epoch's time goes to."""
_IN_NATS = ("entropy", "filter_entropy")

Layout = dict[str, dict[str, tuple[Literal["Multiline", "Margin"], list[str]]]]
"""Category and title to a chart; its tags are patterns, matched from their beginning."""


def custom_scalars(criterion: str, *, validation: bool, rounds: bool) -> Layout:
    """The charts of a run, from top to bottom.

    Args:
        criterion: of the layers' information.
        validation: whether there is a validation split.
        rounds: whether the networks take part in rounds.
    """
    accuracy = {
        "test, every network; population: their ensemble": _lines(
            "accuracy/test", "population/ensemble_test_accuracy"
        ),
        "test, mean of the networks, smallest to largest": (
            "Margin",
            [f"population/test_accuracy_{name}" for name in ("mean", "min", "max")],
        ),
        "test, spread of the networks": _lines("population/test_accuracy_standard_deviation"),
        "training, every network": _lines("accuracy/train"),
    }
    loss = {"test": _lines("loss/test"), "training": _lines("loss/train")}
    if validation:
        accuracy["validation, every network"] = _lines("accuracy/val")
        loss["validation"] = _lines("loss/val")
    layout: Layout = {
        "accuracy, %": accuracy,
        "loss": loss,
        "learning rate": {"every network": _lines("learning_rate")},
    }
    if rounds:
        layout["coefficient: share of its own weights that a network keeps"] = _over_layers(
            "coefficient"
        )
        layout["distance between neighbours, before the round"] = {
            "all layers together": _lines("layers/distance_to_donor")
        }
    layout[f"information of the layers ({with_unit(criterion)})"] = _over_layers(criterion)
    layout["invalid filters"] = {
        "L1 norm below 0.1": _lines("invalid_filters_0.1"),
        "L1 norm below 0.01": _lines("invalid_filters_0.01"),
    }
    layout["speed"] = {"images/s of training": _lines("images_per_second")}
    layout["share of the time, %"] = {phase: _lines(f"time_share/{phase}") for phase in PHASES}
    return layout


def with_unit(criterion: str) -> str:
    """A criterion's name, with the unit of its numbers where they have one."""
    return f"{criterion}, nats" if criterion in _IN_NATS else criterion


def _over_layers(name: str) -> dict[str, tuple[Literal["Multiline", "Margin"], list[str]]]:
    return {
        "mean of the layers": _lines(f"layers/{name}_mean"),
        "smallest and largest layer": _lines(f"layers/{name}_min", f"layers/{name}_max"),
    }


def _lines(*tags: str) -> tuple[Literal["Multiline", "Margin"], list[str]]:
    return ("Multiline", [f"{re.escape(tag)}$" for tag in tags])
