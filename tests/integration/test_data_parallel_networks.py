"""Several processes per network: --runtime.replicas."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
import torch
from launching import (
    PROMPT_SECONDS,
    checkpoint_is_complete,
    end_population,
    error_line,
    program,
    run_population,
    run_programs,
    running,
    wait_for_end,
    wait_until,
)
from reading import assert_same_bits, checkpoint, metrics, scalars

GROUP_NORM_MODEL = """
from torch import nn


def network(num_classes, channels):
    return nn.Sequential(
        nn.Conv2d(channels, 8, 3, stride=2), nn.GroupNorm(2, 8), nn.ReLU(),
        nn.Conv2d(8, 16, 3, stride=2), nn.GroupNorm(2, 16), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, num_classes),
    )
"""
SHORT = (
    *("--model.name", "group_norm:network", "--epochs", "2", "--graft.every_steps", "3"),
    # the last batch has a single image, fewer than processes, so each computes all of it
    *("--data.train_samples", "97", "--optim.accumulation", "2", "--optim.clip_norm", "1"),
)
DIVERSE = (
    "--members",
    "[{optim.weight_decay: 0.05, data.cutmix: 1}, {optim.label_smoothing: 0.1, data.mixup: 0.5}]",
    *("--diversity", "{optim.lr: {uniform: [0.05, 0.2]}, data.random_erasing: {choice: [0, 0.3]}}"),
)
EPOCHS = 3
LONG = (
    *("--model.name", "resnet8", "--epochs", str(EPOCHS), "--data.train_samples", "480"),
    *("--data.batch_size", "15", "--graft.every_steps", "7", "--runtime.timeout_seconds", "60"),
)


def replicas(number: int) -> tuple[str, str]:
    return "--runtime.replicas", str(number)


@pytest.mark.parametrize(
    ("networks", "number", "more"),
    [(2, 2, ()), (1, 3, ()), (2, 2, DIVERSE)],
    ids=["2x2", "1x3", "2x2-members"],
)
def test_replicas_change_only_the_order_of_sums(
    networks: int,
    number: int,
    more: tuple[str, ...],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "group_norm.py").write_text(GROUP_NORM_MODEL)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    single, replicated = tmp_path / "single", tmp_path / "replicated"
    run_population(networks, single, *SHORT, *more)
    run_population(networks * number, replicated, *SHORT, *more, *replicas(number))
    for network in range(networks):
        first, second = (checkpoint(run, 2, network) for run in (single, replicated))
        assert first["round"] == second["round"] == (2 if networks > 1 else 0)
        for key, value in first["model"].items():
            torch.testing.assert_close(second["model"][key], value, rtol=1e-3, atol=1e-5)
        for one, other in zip(metrics(single, network), metrics(replicated, network), strict=True):
            assert one.get("options") == other.get("options")
            assert bool(one.get("options")) == bool(more)
            for what in ("lr", "train_loss", "train_accuracy", "test_loss", "test_accuracy"):
                assert other[what] == pytest.approx(one[what], rel=1e-3)
            if networks > 1:
                assert other["graft"]["bytes"] == one["graft"]["bytes"]
                for unit, share in one["graft"]["coefficient"].items():
                    assert other["graft"]["coefficient"][unit] == pytest.approx(share, abs=1e-3)
    folders = sorted(path.name for path in replicated.glob("network*"))
    assert folders == [f"network{network:02d}" for network in range(networks)]
    table = (replicated / "network00/log.txt").read_text()
    assert "network  replica  rank  host  device" in table
    # the same tags as with one process per network
    for folder in (*folders, "population"):
        assert set(scalars(replicated / folder)) == set(scalars(single / folder))


@pytest.mark.slow
@pytest.mark.parametrize(("networks", "number"), [(2, 2), (1, 3)])
def test_stopped_and_killed_run_resumes_exactly(networks: int, number: int, tmp_path: Path) -> None:
    """With batch norm: inside an epoch, its statistics differ between the processes."""
    processes = networks * number
    uninterrupted, run = tmp_path / "uninterrupted", tmp_path / "run"
    options = (*LONG, *replicas(number), *(DIVERSE if networks == 2 else ()))
    run_population(processes, uninterrupted, *options)

    with running([program(run, *options)] * processes) as started:
        wait_until(checkpoint_is_complete(run, 1), "the first checkpoint", meanwhile=started)
        started[-1].send_signal(signal.SIGUSR1)
        ends = [wait_for_end(process, 25) for process in started]
    for done in ends:
        assert done.status == 75
        assert "stopped early by SIGUSR1" in done.errors
    assert list(run.glob("checkpoints/epoch_000[12]_round_*/COMPLETE.json"))

    survivor, *_ = end_population(processes, run, *options, faults=f"kill {processes - 1} 15")
    last = f"network {networks - 1} (replica {number - 1}, rank {processes - 1} on "
    error_line(survivor, last)
    run_population(processes, run, *options)

    for network in range(networks):
        expected, resumed = (checkpoint(each, EPOCHS, network) for each in (uninterrupted, run))
        assert_same_bits(expected["model"], resumed["model"])
        assert expected["round"] == resumed["round"]


def test_uneven_number_of_processes_is_refused(tmp_path: Path) -> None:
    ends = run_programs([program(tmp_path / "run", *replicas(2))] * 3, timeout=PROMPT_SECONDS)
    for done in ends:
        error_line(
            done, "runtime.replicas 2 needs 2 processes for each network, and 3", "start 2, 4, 6"
        )


def test_resume_with_other_replicas_is_refused(tmp_path: Path) -> None:
    run = tmp_path / "run"
    options = ("--model.name", "resnet8", "--epochs", "1")
    run_population(1, run, *options)
    ends = run_programs([program(run, *options, *replicas(2))] * 2, timeout=PROMPT_SECONDS)
    error_line(ends[0], "runtime.replicas was 1 and is now 2", "choose another run_dir")
    assert all(done.status for done in ends)


def test_sync_bn_needs_gpus(tmp_path: Path) -> None:
    command = program(tmp_path / "run", *replicas(2), "--runtime.sync_bn", "true")
    for done in run_programs([command] * 2, timeout=PROMPT_SECONDS):
        error_line(done, "runtime.sync_bn needs GPUs")
