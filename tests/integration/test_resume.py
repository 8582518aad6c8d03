"""A run that was killed and started again ends as one that never was."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from launching import background, children, is_alive, saved, together, torchrun, wait_until
from reading import assert_same_bits, checkpoint, metrics, pictures, scalars, texts

NETWORKS = (0, 1, 2)
EPOCHS = 5
OPTIONS = ("--epochs", str(EPOCHS), "--data.train_samples", "128")
CLOCKS = {"images_per_second", "seconds", "phase_seconds", "wall_seconds"}


@dataclass(frozen=True)
class Runs:
    straight: Path
    interrupted: Path
    orphans: list[int]
    """Workers that were alive ten seconds after their launcher was killed."""
    found: int
    """Epochs of the newest complete set at that moment."""
    log: str
    """What the first network's log says of the second start."""


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    folder = tmp_path_factory.mktemp("resume")
    straight, interrupted = folder / "straight", folder / "interrupted"
    together(3, straight, *OPTIONS)
    with background([torchrun(3, interrupted, *OPTIONS)]) as (launcher,):
        wait_until(saved(interrupted, 1), "the first complete set", meanwhile=[launcher])
        workers = children(launcher)
        launcher.kill()
        launcher.wait()
    assert len(workers) == 3
    orphans = [pid for pid in workers if is_alive(pid)]
    try:
        wait_until(lambda: not any(map(is_alive, workers)), "the end of the workers", seconds=10)
        orphans = []
    except AssertionError:
        orphans = [pid for pid in workers if is_alive(pid)]
    assert not (interrupted / "summary.json").exists(), "it ended before it was killed"
    sets = [int(path.parent.name[-4:]) for path in interrupted.glob("checkpoints/*/COMPLETE.json")]
    before = (interrupted / "network00/log.txt").read_text()

    together(3, interrupted, *OPTIONS)
    log = (interrupted / "network00/log.txt").read_text().removeprefix(before)
    return Runs(straight, interrupted, orphans, max(sets), log)


def without_clocks(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: without_clocks(part) for key, part in value.items() if key not in CLOCKS}
    return value


def test_workers_die_with_their_launcher(runs: Runs) -> None:
    assert runs.orphans == []


def test_the_second_start_goes_on(runs: Runs) -> None:
    assert 1 <= runs.found < EPOCHS
    assert f"going on from {runs.interrupted}/checkpoints/epoch_000{runs.found}" in runs.log
    assert f"epoch {runs.found + 1}/{EPOCHS}" in runs.log
    assert f"epoch {runs.found}/{EPOCHS}" not in runs.log


@pytest.mark.parametrize("network", NETWORKS)
def test_the_weights_are_the_same_bit_for_bit(runs: Runs, network: int) -> None:
    first, second = (checkpoint(run, EPOCHS, network) for run in (runs.straight, runs.interrupted))
    assert_same_bits(first["model"], second["model"])
    moments = [
        {str(k): part["momentum_buffer"] for k, part in state["optimizer"]["state"].items()}
        for state in (first, second)
    ]
    assert_same_bits(*moments)
    assert first["scheduler"] == second["scheduler"]


def test_the_networks_of_a_larger_population_stay_different(runs: Runs) -> None:
    states = [checkpoint(runs.straight, EPOCHS, k)["model"]["conv1.weight"] for k in NETWORKS]
    for first, second in ((0, 1), (1, 2), (2, 0)):
        assert not torch.allclose(states[first], states[second])


@pytest.mark.parametrize("network", NETWORKS)
def test_the_metrics_have_each_epoch_once_with_the_same_values(runs: Runs, network: int) -> None:
    first, second = (metrics(run, network) for run in (runs.straight, runs.interrupted))
    assert [line["epoch"] for line in second] == list(range(EPOCHS))
    assert [line["graft"]["round"] for line in second] == list(range(EPOCHS))
    for one, other in zip(first, second, strict=True):
        assert without_clocks(one) == without_clocks(other)


@pytest.mark.parametrize("folder", ["network00", "network01", "network02", "population"])
def test_the_events_have_no_step_twice_and_the_same_values(runs: Runs, folder: str) -> None:
    first, second = (scalars(run / folder) for run in (runs.straight, runs.interrupted))
    assert set(first) == set(second)
    for tag, values in first.items():
        assert list(second[tag]) == list(values), tag
        if tag not in {"images_per_second", "round/seconds"} and not tag.startswith("time_share/"):
            assert second[tag] == values, tag


@pytest.mark.parametrize("folder", ["network00", "network01", "network02", "population"])
def test_the_last_pictures_are_the_same(runs: Runs, folder: str) -> None:
    """Those of all epochs, of which the second start has read the first ones back."""
    first, second = (pictures(run / folder) for run in (runs.straight, runs.interrupted))
    assert set(first) == set(second) != set()
    for tag, drawn in first.items():
        assert drawn[EPOCHS - 1].tobytes() == second[tag][EPOCHS - 1].tobytes(), tag


def test_the_story_tells_of_the_resume(runs: Runs) -> None:
    (told,) = texts(runs.interrupted / "population")["run/story"].values()
    assert "| resumed | went on from" in told
    assert "run/story" not in texts(runs.straight / "population")


def test_the_summaries_are_the_same(runs: Runs) -> None:
    first, second = (
        json.loads((run / "summary.json").read_text()) for run in (runs.straight, runs.interrupted)
    )
    assert first.pop("events") == []
    assert [event["kind"] for event in second.pop("events")] == ["resumed"]
    assert without_clocks(first) == without_clocks(second)
    assert second["wall_seconds"] > 0
