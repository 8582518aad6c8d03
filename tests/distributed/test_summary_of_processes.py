"""Final results and ensembles that the trainer gathers from several processes."""

from __future__ import annotations

import math
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from harness import RankContext, run
from reading import summary

from dist_graft import Trainer
from dist_graft.config import TrainConfig
from dist_graft.errors import DataError
from dist_graft.monitoring.run_events import RunEvents
from dist_graft.population.runtime import process_group
from dist_graft.population.runtime.process_group import Runtime
from dist_graft.population.runtime.process_info import ProcessInfo
from dist_graft.population.runtime.replicas import Replicas
from dist_graft.population.runtime.timeouts import Timeouts
from dist_graft.training import summary as summaries
from dist_graft.training.step import ENSEMBLE_CHUNK, EvalResult, merge_eval_results
from dist_graft.training.task import accuracy


def trainer_of(context: RankContext, run_dir: str = "run") -> Trainer:
    """A trainer of one network that can communicate, without data or model."""
    trainer = Trainer(TrainConfig(run_dir=run_dir))
    trainer.process = ProcessInfo(context.rank, context.networks, context.rank, context.networks)
    timeouts = Timeouts(60.0, epochs=5.0)
    trainer.runtime = Runtime(trainer.process, torch.device("cpu"), "gloo", timeouts, None)
    trainer.run_events, trainer.max_lr = RunEvents(), 0.1 + context.rank
    return trainer


def classified(images: int, certain: float) -> EvalResult:
    """Result of a network that assigns this probability to the right class of all images."""
    right = 100.0 if certain > 0.5 else 0.0
    return EvalResult(
        loss=0.0,
        samples=images,
        metrics={"accuracy": right},
        probabilities=torch.tensor([certain, 1 - certain]).expand(images, 2),
        labels=torch.zeros(images, dtype=torch.int64),
        finite=not math.isnan(certain),
    )


def summary_of(context: RankContext, tested: list[int], run_dir: str) -> Any:
    """The summary on this rank, or the text of its error."""
    trainer = trainer_of(context, run_dir)
    before, after = (
        classified(tested[context.rank], 0.9 - context.rank * by) for by in (0.6, 0.85)
    )
    try:
        trainer._summarize(before, after, finite=context.rank == 0)
    except DataError as error:
        return str(error)
    return trainer.summary


def test_all_ranks_have_the_same_summary(tmp_path: Path) -> None:
    first, second = run(summary_of, 2, [5, 5], str(tmp_path))
    assert first.pop("events") == []
    for found in (first, second):
        assert found.pop("wall_seconds") >= 0
    assert first == second
    assert [network["lr"] for network in first["networks"]] == [0.1, 1.1]
    assert first["mean_accuracy_before_last_round"] == 50.0
    assert first["ensemble_accuracy_before_last_round"] == 100.0
    assert first["ensemble_accuracy_after_last_round"] == 0.0
    assert first["diverged"] == [1]
    stored = summary(tmp_path)
    assert {key: stored[key] for key in first} == first


def test_different_numbers_of_test_images_are_an_error_on_all_ranks(tmp_path: Path) -> None:
    first, second = run(summary_of, 2, [5, 4], str(tmp_path))
    assert first == second
    assert "numbers of images ([5, 4])" in first


def ensemble_of(context: RankContext, certain: list[float], images: list[int]) -> float | None:
    result = classified(images[context.rank], certain[context.rank])
    return trainer_of(context)._epoch_ensemble(result, 0)


@pytest.mark.parametrize(
    ("certain", "images", "expected"),
    [
        ([0.9, 0.3], [5, 5], 100.0),
        ([0.6, 0.3], [5, 5], 0.0),
        ([float("nan"), 0.6], [5, 5], 100.0),
        ([0.9, 0.3], [5, 4], None),
        ([0.9, 0.3], [ENSEMBLE_CHUNK, ENSEMBLE_CHUNK], None),
    ],
)
def test_all_ranks_know_the_ensemble_of_an_epoch_unless_it_is_expensive(
    certain: list[float], images: list[int], expected: float | None
) -> None:
    assert run(ensemble_of, 2, certain, images) == [expected, expected]


NETWORKS, REPLICAS, SAMPLES, CLASSES = 2, 2, 7, 3


def answers_of(network: int) -> torch.Tensor:
    """Probabilities of a network, [SAMPLES, CLASSES]."""
    draw = torch.Generator().manual_seed(network)
    return torch.rand(SAMPLES, CLASSES, generator=draw).softmax(1)


LABELS = torch.arange(SAMPLES) % CLASSES


def ensemble_of_replicas(context: RankContext, bad: int | None, chunk: int) -> list[float | None]:
    """Accuracies of the ensemble of two networks, whose replicas test 3 and 4 samples."""
    network, replica = divmod(context.rank, REPLICAS)
    process = ProcessInfo(context.rank, context.networks, replicas=REPLICAS)
    timeouts, cpu = Timeouts(60.0, epochs=5.0), torch.device("cpu")
    mesh = process_group._mesh(process, "cpu", timedelta(seconds=60))
    replicas = Replicas(mesh.get_group("replica"), timeouts)
    trainer = Trainer(TrainConfig())
    trainer.process = process
    trainer.runtime = Runtime(process, cpu, "gloo", timeouts, None, mesh, replicas)
    part = slice(0, 3) if replica == 0 else slice(3, SAMPLES)
    probabilities = answers_of(network)[part].clone()
    if context.rank == bad:
        probabilities[0, 0] = math.nan
    local = EvalResult(
        loss=0.0,
        samples=len(probabilities),
        metrics={"accuracy": 0.0},
        counts={"accuracy": float(len(probabilities))},
        probabilities=probabilities,
        labels=LABELS[part],
        finite=context.rank != bad,
    )
    result = merge_eval_results(local, replicas.gather(local.row(), "a test"), classification=True)
    summaries.ENSEMBLE_CHUNK = chunk
    return [trainer._epoch_ensemble(result, 0), trainer._ensemble_accuracy(result, "the end")]


@pytest.mark.parametrize("bad", [None, 0, 3])
@pytest.mark.parametrize("chunk", [1, 2**22])
def test_replicas_sum_their_own_samples_over_the_networks(bad: int | None, chunk: int) -> None:
    """A network that is not finite in one replica does not count in any."""
    good = [network for network in range(NETWORKS) if bad is None or network != bad // REPLICAS]
    total = sum((answers_of(network) for network in good), torch.zeros(SAMPLES, CLASSES))
    expected = accuracy(total, LABELS)
    for found in run(ensemble_of_replicas, NETWORKS * REPLICAS, bad, chunk):
        assert found == [expected, expected]


def ranks_of_groups(context: RankContext) -> list[list[int]]:
    process = ProcessInfo(context.rank, context.networks, replicas=3)
    mesh = process_group._mesh(process, "cpu", timedelta(seconds=60))
    return [dist.get_process_group_ranks(mesh.get_group(name)) for name in ("network", "replica")]


def test_the_groups_across_networks_and_within_one() -> None:
    for rank, groups in enumerate(run(ranks_of_groups, 6)):
        first = rank // 3 * 3
        assert groups == [[rank % 3, rank % 3 + 3], [first, first + 1, first + 2]]
