from __future__ import annotations

import numpy as np
import pytest

from dist_graft.monitoring.layer_history import (
    MAX_DRAWINGS,
    MAX_SHARE,
    LayerHistory,
    Pacing,
    coefficients,
    informations,
)


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def drawn(epochs: int, *, epoch_seconds: float, picture_seconds: float) -> tuple[list[int], float]:
    """Epochs with pictures, and the share of drawing in the time before the last epoch."""
    clock = Clock()
    pacing = Pacing(epochs, clock)
    found, spent = [], 0.0
    for epoch in range(epochs):
        clock.now += epoch_seconds
        if pacing.due(epoch):
            found.append(epoch)
            with pacing.drawing():
                clock.now += picture_seconds
            spent += picture_seconds
    return found, (spent - picture_seconds) / (clock.now - 100.0)


@pytest.mark.parametrize("epoch_seconds", [0.1, 6.0, 60.0, 3600.0])
@pytest.mark.parametrize("epochs", [1, 2, 29, 200, 1001])
def test_pictures_are_rare_and_the_last_epoch_has_them(epochs: int, epoch_seconds: float) -> None:
    found, share = drawn(epochs, epoch_seconds=epoch_seconds, picture_seconds=0.5)
    assert found[-1] == epochs - 1
    assert len(found) <= MAX_DRAWINGS + 1
    assert share <= MAX_SHARE


def test_long_epochs_are_all_drawn() -> None:
    assert drawn(20, epoch_seconds=600, picture_seconds=1.0)[0] == list(range(20))


def test_slow_pictures_become_rarer() -> None:
    quick, slow = (
        len(drawn(1000, epoch_seconds=10, picture_seconds=seconds)[0]) for seconds in (0.5, 10.0)
    )
    assert quick > slow > 1


LINES = [
    {"epoch": 0, "graft": None, "information": {"a": 1.0}},
    {"epoch": 1, "graft": {"coefficient": {"a": 0.5, "b": 0.25}}, "information": {"a": 2, "b": 3}},
    {"epoch": 2, "graft": None},
    {"epoch": 3, "graft": {"coefficient": {"a": None, "b": 0.75}}, "information": {"b": 4.0}},
]
"""Without rounds, with a non-finite layer, and from a version without information."""


def test_coefficients_are_those_of_epochs_with_a_round() -> None:
    history = LayerHistory(LINES, coefficients)
    assert history.epochs == [1, 3]
    assert history.names == ["a", "b"]
    np.testing.assert_equal(history.numbers(), [[0.5, np.nan], [0.25, 0.75]])


def test_information_is_that_of_all_epochs_that_have_it() -> None:
    history = LayerHistory(LINES[:2], informations)
    for line in LINES[2:]:
        history.add(line)
    assert history.epochs == [0, 1, 3]
    np.testing.assert_equal(history.numbers(), [[1, 2, np.nan], [np.nan, 3, 4]])


def test_an_empty_history() -> None:
    assert not LayerHistory([], informations).epochs
