from __future__ import annotations

import harness
import pytest
import torch
from dist_graft.training.loop import EvalResult

from dist_graft.errors import DataError
from dist_graft.population.runtime.process_group import Runtime
from dist_graft.population.runtime.process_info import ProcessInfo
from dist_graft.population.runtime.timeouts import Timeouts
from dist_graft.training.summary import LARGEST_ENSEMBLE, ensemble_accuracy, summarise


def summary_of(here: harness.ProcessInfo, tested: list[int]) -> str:
    """What a network says that was tested on tested[rank] images."""
    labels = torch.zeros(tested[here.rank], dtype=torch.int64)
    result = EvalResult(
        loss=0.0, accuracy=0.0, probabilities=torch.zeros(len(labels), 2), labels=labels
    )
    place = ProcessInfo(here.rank, here.networks, here.rank, here.networks)
    runtime = Runtime(place, torch.device("cpu"), "gloo", Timeouts(60.0, epochs=5.0), None)
    try:
        summarise(runtime, 0.1, result, result, 1.0, sound=True)
    except DataError as error:
        return str(error)
    return "summarised"


@pytest.mark.parametrize(
    ("tested", "says"), [([5, 5], "summarised"), ([5, 4], "numbers of images ([5, 4])")]
)
def test_other_numbers_of_test_images_are_an_error_of_all(tested: list[int], says: str) -> None:
    told = harness.run(summary_of, 2, tested)
    assert told[0] == told[1]
    assert says in told[0]


def ensemble_of(here: harness.ProcessInfo, certain: list[float], images: list[int]) -> float | None:
    """What a network hears whose probability of the right answer is certain[rank]."""
    labels = torch.zeros(images[here.rank], dtype=torch.int64)
    own = torch.tensor([certain[here.rank], 1 - certain[here.rank]])
    result = EvalResult(
        loss=0.0, accuracy=0.0, probabilities=own.expand(len(labels), 2), labels=labels
    )
    place = ProcessInfo(here.rank, here.networks, here.rank, here.networks)
    runtime = Runtime(place, torch.device("cpu"), "gloo", Timeouts(60.0, epochs=5.0), None)
    return ensemble_accuracy(runtime, result, 0)


@pytest.mark.parametrize(
    ("certain", "images", "expected"),
    [
        ([0.9, 0.3], [5, 5], 100.0),
        ([0.6, 0.3], [5, 5], 0.0),
        ([float("nan"), 0.6], [5, 5], 100.0),
        ([0.9, 0.3], [5, 4], None),
        ([0.9, 0.3], [LARGEST_ENSEMBLE, LARGEST_ENSEMBLE], None),
    ],
)
def test_the_ensemble_of_an_epoch_is_known_to_all_where_it_is_cheap(
    certain: list[float], images: list[int], expected: float | None
) -> None:
    assert harness.run(ensemble_of, 2, certain, images) == [expected, expected]
