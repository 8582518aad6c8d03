"""Training and resuming a single network, in this process."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from launching import SMALL, Train, error_line, run_program
from reading import (
    assert_same_bits,
    checkpoint,
    metrics,
    optimizer_tensors,
    scalars,
    summary,
)

EVERY_OPTION = (
    *("--optim.schedule", "constant", "--optim.warmup_epochs", "1.5", "--optim.clip_norm", "0.5"),
    *("--optim.accumulation", "2", "--optim.label_smoothing", "0.1"),
    *("--data.val_fraction", "0.25", "--runtime.precision", "bf16"),
)


def assert_same_end(first: Path, second: Path, epochs: int) -> None:
    states = [checkpoint(run, epochs, 0) for run in (first, second)]
    assert_same_bits(states[0]["model"], states[1]["model"])
    moments = [optimizer_tensors(state) for state in states]
    assert moments[0]
    assert_same_bits(*moments)


def test_without_torchrun_one_network_is_trained(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "dist_graft", "train", "--epochs", "1", *SMALL]
    done = run_program(command, timeout=60, cwd=tmp_path)
    assert done.status == 0, done
    assert done.errors == ""
    run = tmp_path / "runs/run"
    assert sorted(path.name for path in run.iterdir() if path.name.startswith("network")) == [
        "network00"
    ]
    (line,) = metrics(run, 0)
    assert line["graft"] is None
    found = summary(run)
    (row,) = found["networks"]
    accuracies = {row[name] for name in row if name.startswith("accuracy")}
    accuracies |= {value for name, value in found.items() if "accuracy" in name}
    assert accuracies == {line["test_accuracy"]}


def test_same_command_gives_same_weights(train: Train, tmp_path: Path) -> None:
    for name, seed in (("a", "0"), ("b", "0"), ("c", "1")):
        assert train(tmp_path / name, "--epochs", "1", "--seed", seed).status == 0
    assert_same_end(tmp_path / "a", tmp_path / "b", 1)
    first, third = (checkpoint(tmp_path / name, 1, 0)["model"] for name in ("a", "c"))
    assert not torch.allclose(first["conv1.weight"], third["conv1.weight"])


@pytest.mark.parametrize("optimizer", [["--optim.nesterov", "true"], ["--optim.name", "adamw"]])
def test_additional_epochs_equal_one_run(
    train: Train, tmp_path: Path, optimizer: list[str]
) -> None:
    """With every option that keeps state or draws random numbers."""
    options = (*EVERY_OPTION, *optimizer, "--optim.lr", "0.01")
    assert train(tmp_path / "single", "--epochs", "2", *options).status == 0
    for epochs in ("1", "2"):
        done = train(tmp_path / "extended", "--epochs", epochs, *options)
        assert done.status == 0, done
    assert_same_end(tmp_path / "single", tmp_path / "extended", 2)
    assert [line["epoch"] for line in metrics(tmp_path / "extended", 0)] == [0, 1]
    assert list(scalars(tmp_path / "extended/network00")["accuracy/val"]) == [0, 1]
    assert "epochs: 2" in (tmp_path / "extended/config.yaml").read_text()


def test_saved_configuration_starts_the_same_run(train: Train, tmp_path: Path) -> None:
    assert train(tmp_path / "a", "--epochs", "1", "--optim.lr", "0.07").status == 0
    config, other = str(tmp_path / "a/config.yaml"), str(tmp_path / "b")
    assert train(tmp_path / "b", "--config", config, "--run_dir", other).status == 0
    assert_same_end(tmp_path / "a", tmp_path / "b", 1)


@pytest.mark.parametrize("damage", ["truncated", "missing", "incomplete"])
def test_damaged_checkpoint_falls_back_to_previous(
    train: Train, tmp_path: Path, damage: str
) -> None:
    run = tmp_path / "run"
    assert train(run, "--epochs", "2").status == 0
    expected = checkpoint(run, 2, 0)["model"]
    newest = run / "checkpoints/epoch_0002"
    file = newest / ("COMPLETE.json" if damage == "incomplete" else "network00.pt")
    if damage == "truncated":
        file.write_bytes(file.read_bytes()[:-100])
    else:
        file.unlink()
    done = train(run, "--epochs", "2")
    assert done.status == 0, done
    assert f"resumed from {run}/checkpoints/epoch_0001" in done.output
    if damage != "incomplete":
        assert f"{file} is missing or damaged" in done.output
    assert_same_bits(checkpoint(run, 2, 0)["model"], expected)
    assert [line["epoch"] for line in metrics(run, 0)] == [0, 1]
    assert list(scalars(run / "network00")["accuracy/test"]) == [0, 1]


def test_tensorboard_can_be_disabled(train: Train, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert train(run, "--epochs", "1", "--monitor.tensorboard", "false").status == 0
    assert not list(run.rglob("events.out*"))


def test_profiling_changes_no_weights(train: Train, tmp_path: Path) -> None:
    """Across the end of an epoch, and with or without profiling after a resume."""
    plain, profiled = tmp_path / "plain", tmp_path / "profiled"
    steady = ("--optim.schedule", "constant")
    assert train(plain, "--epochs", "2", *steady).status == 0
    done = train(profiled, "--epochs", "1", *steady, "--monitor.profile_steps", "1:2")
    assert done.status == 0, done
    (profiled / "network00/trace.json.gz").unlink()
    done = train(profiled, "--epochs", "2", *steady, "--monitor.profile_steps", "1:3")
    assert "profile of steps 2 to 2" in done.output
    assert (profiled / "network00/trace.json.gz").stat().st_size > 1000
    assert_same_bits(checkpoint(profiled, 2, 0)["model"], checkpoint(plain, 2, 0)["model"])


def test_profile_steps_past_the_run_are_refused(train: Train, tmp_path: Path) -> None:
    done = train(tmp_path / "run", "--epochs", "1", "--monitor.profile_steps", "2:4")
    error_line(done, "monitor.profile_steps starts at step 2", "steps 0 to 1")


@pytest.mark.parametrize(("every", "keep", "epochs"), [(0, 2, [3]), (2, 5, [2, 3]), (1, 1, [3])])
def test_kept_checkpoints(
    train: Train, tmp_path: Path, every: int, keep: int, epochs: list[int]
) -> None:
    options = ("--checkpoint.every", str(every), "--checkpoint.keep", str(keep))
    assert train(tmp_path / "run", "--epochs", "3", *options).status == 0
    found = sorted(path.name for path in (tmp_path / "run/checkpoints").iterdir())
    assert found == [f"epoch_{epoch:04d}" for epoch in epochs]


@pytest.mark.parametrize(
    ("batch_size", "name", "position"),
    [("64", "epoch_0001", (1, 0)), ("32", "epoch_0000_round_0000", (0, 1))],
)
def test_checkpoints_by_the_clock(
    train: Train, tmp_path: Path, batch_size: str, name: str, position: tuple[int, int]
) -> None:
    """At the end of an epoch, and at steps inside it."""
    run = tmp_path / "run"
    options = ("--checkpoint.every", "0", "--checkpoint.every_minutes", "1e-6")
    options += ("--checkpoint.keep", "9", "--data.batch_size", batch_size)
    assert train(run, "--epochs", "2", *options).status == 0
    saved = sorted(path.name for path in (run / "checkpoints").iterdir())
    assert (saved[0], saved[-1]) == (name, "epoch_0002")
    state = torch.load(run / "checkpoints" / name / "network00.pt", weights_only=True)
    assert (state["epoch"], state["step"]) == position
