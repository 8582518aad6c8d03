"""A run that is killed and resumed equals an uninterrupted run."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from launching import (
    PAIR,
    checkpoint_is_complete,
    children,
    is_alive,
    run_population,
    running,
    torchrun,
    wait_until,
)
from reading import (
    assert_same_bits,
    checkpoint,
    event_rows,
    events,
    metrics,
    optimizer_tensors,
    pictures,
    scalars,
    summary,
)

NETWORKS = (0, 1, 2)
EPOCHS = 5
OPTIONS = ("--epochs", str(EPOCHS), "--data.train_samples", "128")
TIMES = {"images_per_second", "seconds", "phase_seconds", "wall_seconds"}


@dataclass(frozen=True)
class Runs:
    uninterrupted: Path
    resumed: Path
    orphans: list[int]
    """Workers still alive ten seconds after their launcher was killed."""
    epochs_before: int
    """Epochs of the newest complete checkpoint when the launcher was killed."""
    log: str
    """Log of the first network since the resume."""


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    folder = tmp_path_factory.mktemp("resume")
    uninterrupted, resumed = folder / "uninterrupted", folder / "resumed"
    run_population(3, uninterrupted, *OPTIONS)
    with running([torchrun(3, resumed, *OPTIONS)]) as (launcher,):
        wait_until(checkpoint_is_complete(resumed, 1), "the first checkpoint", meanwhile=[launcher])
        workers = children(launcher)
        launcher.kill()
        launcher.communicate()
    assert len(workers) == 3
    orphans = [pid for pid in workers if is_alive(pid)]
    try:
        wait_until(lambda: not any(map(is_alive, workers)), "the exit of the workers", seconds=10)
        orphans = []
    except AssertionError:
        orphans = [pid for pid in workers if is_alive(pid)]
    assert not (resumed / "summary.json").exists(), "it finished before it was killed"
    epochs = [int(path.parent.name[-4:]) for path in resumed.glob("checkpoints/*/COMPLETE.json")]
    before = (resumed / "network00/log.txt").read_text()

    run_population(3, resumed, *OPTIONS)
    log = (resumed / "network00/log.txt").read_text().removeprefix(before)
    return Runs(uninterrupted, resumed, orphans, max(epochs), log)


def without_times(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: without_times(part) for key, part in value.items() if key not in TIMES}
    return value


def test_workers_die_with_their_launcher(runs: Runs) -> None:
    assert runs.orphans == []


def test_resumes_from_the_newest_checkpoint(runs: Runs) -> None:
    assert 1 <= runs.epochs_before < EPOCHS
    assert f"resumed from {runs.resumed}/checkpoints/epoch_000{runs.epochs_before}" in runs.log
    assert f"epoch {runs.epochs_before + 1}/{EPOCHS}" in runs.log
    assert f"epoch {runs.epochs_before}/{EPOCHS}" not in runs.log


@pytest.mark.parametrize("network", NETWORKS)
def test_weights_are_bitwise_equal(runs: Runs, network: int) -> None:
    first, second = (checkpoint(run, EPOCHS, network) for run in (runs.uninterrupted, runs.resumed))
    assert_same_bits(first["model"], second["model"])
    assert_same_bits(optimizer_tensors(first), optimizer_tensors(second))
    assert first["scheduler"] == second["scheduler"]


def test_networks_stay_different(runs: Runs) -> None:
    states = [checkpoint(runs.uninterrupted, EPOCHS, k)["model"]["conv1.weight"] for k in NETWORKS]
    for first, second in ((0, 1), (1, 2), (2, 0)):
        assert not torch.allclose(states[first], states[second])


@pytest.mark.parametrize("network", NETWORKS)
def test_metrics_have_each_epoch_once_with_equal_values(runs: Runs, network: int) -> None:
    first, second = (metrics(run, network) for run in (runs.uninterrupted, runs.resumed))
    assert [line["epoch"] for line in second] == list(range(EPOCHS))
    assert [line["graft"]["round"] for line in second] == list(range(EPOCHS))
    for one, other in zip(first, second, strict=True):
        assert without_times(one) == without_times(other)


@pytest.mark.parametrize("folder", ["network00", "network01", "network02", "population"])
def test_events_have_each_step_once_with_equal_values(runs: Runs, folder: str) -> None:
    first, second = (scalars(run / folder) for run in (runs.uninterrupted, runs.resumed))
    assert set(first) == set(second)
    for tag, values in first.items():
        assert list(second[tag]) == list(values), tag
        if tag not in {"images_per_second", "round/seconds"} and not tag.startswith("time_share/"):
            assert second[tag] == values, tag


@pytest.mark.parametrize("folder", ["network00", "network01", "network02", "population"])
def test_last_figures_are_equal(runs: Runs, folder: str) -> None:
    """Figures show all epochs: the resumed run reads the first ones from its files."""
    first, second = (pictures(run / folder) for run in (runs.uninterrupted, runs.resumed))
    assert set(first) == set(second) != set()
    for tag, images in first.items():
        assert images[EPOCHS - 1].tobytes() == second[tag][EPOCHS - 1].tobytes(), tag


def test_events_contain_the_resume(runs: Runs) -> None:
    (row,) = event_rows(runs.resumed)
    assert "| resumed | resumed from" in row
    assert not event_rows(runs.uninterrupted)


def test_summaries_are_equal(runs: Runs) -> None:
    assert events(runs.uninterrupted) == []
    assert [event["kind"] for event in events(runs.resumed)] == ["resumed"]
    first, second = (summary(run) for run in (runs.uninterrupted, runs.resumed))
    first.pop("events")
    second.pop("events")
    assert without_times(first) == without_times(second)
    assert second["wall_seconds"] > 0


def test_options_that_change_no_bit_may_differ_in_a_resumed_run(
    by_peers: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(by_peers, run)
    (run / "summary.json").unlink()
    shutil.rmtree(run / "checkpoints" / "epoch_0003")
    options = (
        *("--graft.exchange", "all_gather", "--graft.bucket_mb", "0.5", "--data.workers", "1"),
        *("--data.root", str(tmp_path), "--data.download", "false", "--checkpoint.keep", "1"),
        *("--monitor.tensorboard", "false", "--runtime.timeout_seconds", "300"),
    )
    run_population(2, run, *PAIR, *options)
    for network in (0, 1):
        before, after = (checkpoint(path, 3, network) for path in (by_peers, run))
        assert_same_bits(before["model"], after["model"])
        assert_same_bits(optimizer_tensors(before), optimizer_tensors(after))
