from __future__ import annotations

import pytest
import torch
from harness import run

from dist_graft.errors import DataError
from dist_graft.population.patience import Patience
from dist_graft.population.place import Place
from dist_graft.population.runtime import Runtime
from dist_graft.training.loop import EvalResult
from dist_graft.training.summary import summarise


def summary_of(place: Place, tested: list[int]) -> str:
    """What a network says that was tested on tested[rank] images."""
    labels = torch.zeros(tested[place.rank], dtype=torch.int64)
    result = EvalResult(
        loss=0.0, accuracy=0.0, probabilities=torch.zeros(len(labels), 2), labels=labels
    )
    runtime = Runtime(place, torch.device("cpu"), "gloo", Patience(60.0, epochs=5.0), None)
    try:
        summarise(runtime, 0.1, result, result, 1.0, sound=True)
    except DataError as error:
        return str(error)
    return "summarised"


@pytest.mark.parametrize(
    ("tested", "says"), [([5, 5], "summarised"), ([5, 4], "numbers of images ([5, 4])")]
)
def test_other_numbers_of_test_images_are_an_error_of_all(tested: list[int], says: str) -> None:
    told = run(summary_of, 2, tested)
    assert told[0] == told[1]
    assert says in told[0]
