"""Final results and ensembles that the trainer gathers from several processes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from harness import Place, run

from dist_graft import TrainConfig, Trainer
from dist_graft.errors import DataError
from dist_graft.monitoring.run_events import RunEvents
from dist_graft.population.runtime.process_group import Runtime
from dist_graft.population.runtime.process_info import ProcessInfo
from dist_graft.population.runtime.timeouts import Timeouts
from dist_graft.training.step import EvalResult
from dist_graft.training.summary import MAX_ENSEMBLE_NUMBERS


def evaluation(certainty: float, images: int) -> EvalResult:
    """Result of a network that gives the right one of two classes this probability."""
    return EvalResult(
        loss=0.0,
        samples=images,
        metrics={"accuracy": 0.0},
        probabilities=torch.tensor([certainty, 1 - certainty]).expand(images, 2),
        labels=torch.zeros(images, dtype=torch.int64),
    )


def trainer_of(place: Place, folder: Path) -> Trainer:
    """Trainer of one of the processes, before its first epoch."""
    trainer = Trainer(TrainConfig(run_dir=str(folder)))
    trainer.process = ProcessInfo(place.rank, place.networks, place.rank, place.networks)
    timeouts = Timeouts(60.0, epochs=5.0)
    trainer.runtime = Runtime(trainer.process, torch.device("cpu"), "gloo", timeouts, None)
    trainer.max_lr, trainer.run_events = 0.1, RunEvents()
    return trainer


def summary_of(place: Place, folder: Path, images: list[int]) -> str:
    """Summary, or the error, of a network that was tested on images[rank] images."""
    trainer = trainer_of(place, folder)
    result = evaluation(0.9, images[place.rank])
    try:
        trainer._summarize(result, result, finite=True)
    except DataError as error:
        return str(error)
    return f"ensemble {trainer.summary['ensemble_accuracy_after_last_round']:g}"


@pytest.mark.parametrize(
    ("images", "text"), [([5, 5], "ensemble 100"), ([5, 4], "numbers of images ([5, 4])")]
)
def test_unequal_numbers_of_test_images_are_an_error_on_all_ranks(
    images: list[int], text: str, tmp_path: Path
) -> None:
    first, second = run(summary_of, 2, tmp_path, images)
    assert first == second
    assert text in first


def ensemble_of(
    place: Place, folder: Path, certainty: list[float], images: list[int]
) -> float | None:
    """Accuracy of the ensemble as one network knows it."""
    trainer = trainer_of(place, folder)
    return trainer._epoch_ensemble(evaluation(certainty[place.rank], images[place.rank]), 0)


@pytest.mark.parametrize(
    ("certainty", "images", "expected"),
    [
        ([0.9, 0.3], [5, 5], 100.0),
        ([0.6, 0.3], [5, 5], 0.0),
        ([float("nan"), 0.6], [5, 5], 100.0),
        ([0.9, 0.3], [5, 4], None),
        ([0.9, 0.3], [MAX_ENSEMBLE_NUMBERS, MAX_ENSEMBLE_NUMBERS], None),
    ],
)
def test_all_ranks_know_the_ensemble_of_an_epoch_if_it_is_cheap(
    certainty: list[float], images: list[int], expected: float | None, tmp_path: Path
) -> None:
    assert run(ensemble_of, 2, tmp_path, certainty, images) == [expected, expected]
