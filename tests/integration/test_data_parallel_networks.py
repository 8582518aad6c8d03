"""Several processes train each network: --runtime.replicas."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import pytest
import torch
from launching import (
    PROMPTLY,
    background,
    children,
    end_of,
    finish,
    program,
    saved,
    together,
    told,
    torchrun,
    wait_until,
)
from reading import assert_same_bits, checkpoint, metrics, scalars

WITHOUT_STATISTICS = """
from torch import nn


def network(num_classes, channels):
    return nn.Sequential(
        nn.Conv2d(channels, 8, 3, stride=2), nn.GroupNorm(2, 8), nn.ReLU(),
        nn.Conv2d(8, 16, 3, stride=2), nn.GroupNorm(2, 16), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, num_classes),
    )
"""
SAME = (
    *("--model.name", "group_norm:network", "--epochs", "2", "--graft.every_steps", "3"),
    # the last batch has one image: fewer than processes, so that each computes all of it
    *("--data.train_samples", "97", "--optim.accumulation", "2", "--optim.clip_norm", "1"),
)
EPOCHS = 3
LONG = (
    *("--model.name", "resnet8", "--epochs", str(EPOCHS), "--data.train_samples", "480"),
    *("--data.batch_size", "15", "--graft.every_steps", "7", "--runtime.timeout_seconds", "60"),
)


def replicas(number: int) -> tuple[str, str]:
    return "--runtime.replicas", str(number)


@pytest.mark.parametrize(("networks", "number"), [(2, 2), (1, 3)])
def test_replicas_change_no_more_than_the_order_of_sums(
    networks: int, number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "group_norm.py").write_text(WITHOUT_STATISTICS)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    alone, shared = tmp_path / "alone", tmp_path / "shared"
    together(networks, alone, *SAME)
    together(networks * number, shared, *SAME, *replicas(number))
    for network in range(networks):
        first, second = (checkpoint(run, 2, network) for run in (alone, shared))
        assert first["round"] == second["round"] == (2 if networks > 1 else 0)
        for key, value in first["model"].items():
            torch.testing.assert_close(second["model"][key], value, rtol=1e-3, atol=1e-5)
        for one, other in zip(metrics(alone, network), metrics(shared, network), strict=True):
            for what in ("lr", "train_loss", "train_accuracy", "test_loss", "test_accuracy"):
                assert other[what] == pytest.approx(one[what], rel=1e-3)
            if networks > 1:
                assert other["graft"]["bytes"] == one["graft"]["bytes"]
                for unit, share in one["graft"]["coefficient"].items():
                    assert other["graft"]["coefficient"][unit] == pytest.approx(share, abs=1e-3)
    folders = sorted(path.name for path in shared.glob("network*"))
    assert folders == [f"network{network:02d}" for network in range(networks)]
    table = (shared / "network00/log.txt").read_text()
    assert "network  replica  rank  host  device" in table
    # the networks write no more, and the story has no more in it, than those of one process each
    for folder in (*folders, "population"):
        assert set(scalars(shared / folder)) == set(scalars(alone / folder))


@pytest.mark.slow
@pytest.mark.parametrize(("networks", "number"), [(2, 2), (1, 3)])
def test_a_run_that_is_stopped_or_loses_a_process_goes_on_bit_for_bit(
    networks: int, number: int, tmp_path: Path
) -> None:
    """With batch norm, whose statistics differ from process to process inside an epoch."""
    processes = networks * number
    straight, stopped, killed = (tmp_path / name for name in ("straight", "stopped", "killed"))
    options = (*LONG, *replicas(number))
    together(processes, straight, *options)

    with background([torchrun(processes, stopped, *options)]) as (launcher,):
        wait_until(saved(stopped, 1), "the first set", meanwhile=[launcher])
        os.kill(children(launcher)[processes - 1], signal.SIGUSR1)
        done = end_of(launcher, 25)
    assert "stopped early by SIGUSR1" in done.errors, done
    assert list(stopped.glob("checkpoints/epoch_000[12]_round_*/COMPLETE.json"))
    together(processes, stopped, *options)

    faulty = Path(__file__).parents[1] / "distributed/faulty.py"
    plain = torchrun(processes, killed, *options)
    split = plain.index("train")
    command = [*plain[: split - 2], "--max-restarts=1", str(faulty)]
    command += ["kill", str(processes - 1), "50", "--", *plain[split:]]
    done = finish(command, timeout=200)
    assert done.status == 0, done
    assert f"network {networks - 1} (replica {number - 1}, rank {processes - 1} on " in done.errors

    for network in range(networks):
        whole = checkpoint(straight, EPOCHS, network)
        for run in (stopped, killed):
            resumed = checkpoint(run, EPOCHS, network)
            assert_same_bits(whole["model"], resumed["model"])
            assert whole["round"] == resumed["round"]


def test_numbers_of_processes_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    with background([program(tmp_path / "run", *replicas(2))] * 3) as processes:
        ends = [end_of(process, PROMPTLY) for process in processes]
    for done in ends:
        told(done, "runtime.replicas 2 needs 2 processes for each network, and 3", "start 2, 4, 6")


def test_another_number_of_replicas_is_refused(tmp_path: Path) -> None:
    run = tmp_path / "run"
    short = ("--model.name", "resnet8", "--epochs", "1")
    assert finish([sys.executable, *program(run, *short)[1:]], timeout=60).status == 0
    with background([program(run, *short, *replicas(2))] * 2) as processes:
        ends = [end_of(process, PROMPTLY) for process in processes]
    told(ends[0], "runtime.replicas was 1 and is now 2", "choose another run_dir")
    assert all(done.status for done in ends)


def test_batch_statistics_over_replicas_need_gpus(tmp_path: Path) -> None:
    command = program(tmp_path / "run", *replicas(2), "--runtime.sync_bn", "true")
    with background([command] * 2) as processes:
        for process in processes:
            told(end_of(process, PROMPTLY), "runtime.sync_bn needs GPUs")
