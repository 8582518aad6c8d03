"""A run that resumes with fewer, more or other networks."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from launching import end_population, error_line, run_population
from reading import assert_same_bits, checkpoint, metrics, optimizer_tensors

from dist_graft.config import ModelConfig
from dist_graft.training.checkpoint.files import mark_complete, save_network
from dist_graft.training.data.order import stream_seed
from dist_graft.training.models import build_model

OPTIONS = ("--method", "none", "--optim.schedule", "constant", "--checkpoint.keep", "3")
THREE = (*OPTIONS, "--epochs", "2", "--model.name", "resnet8")
LONGER = (*OPTIONS, "--epochs", "3", "--model.name", "resnet8")


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run directory of three independent networks after two epochs."""
    run = tmp_path_factory.mktemp("three") / "run"
    run_population(3, run, *THREE)
    return run


def resumed(three: Path, run: Path, processes: int, networks: str) -> Path:
    """Copy the run, and train it for one more epoch with other networks."""
    shutil.copytree(three, run)
    run_population(processes, run, *LONGER, "--resume_networks", networks)
    return run


def by_hand(three: Path, run: Path, states: list[dict[str, Any]]) -> Path:
    """Put the states into a new run of as many networks, and train it for one more epoch."""
    run_population(len(states), run, *THREE, "--epochs", "1")
    folder = run / "checkpoints" / "epoch_0002"
    digests = [
        save_network(folder / f"network{network:02d}.pt", {**state, "network": network})
        for network, state in enumerate(states)
    ]
    mark_complete(folder, epoch=2, round_=0, sha256=digests)
    run_population(len(states), run, *LONGER)
    return run


def assert_equal_ends(run: Path, other: Path, networks: int) -> None:
    for network in range(networks):
        first, second = (checkpoint(each, 3, network) for each in (run, other))
        assert_same_bits(first["model"], second["model"])
        assert_same_bits(optimizer_tensors(first), optimizer_tensors(second))
        for name in ("base_lrs", "last_epoch", "_last_lr"):
            assert first["scheduler"][name] == second["scheduler"][name]


def without_optimizer(state: Mapping[str, Any], **more: Any) -> dict[str, Any]:
    return {**state, "optimizer": {**state["optimizer"], "state": {}}, **more}


def test_fewer_networks(three: Path, tmp_path: Path) -> None:
    run = resumed(three, tmp_path / "run", 2, "[0,2]")
    states = [checkpoint(three, 2, network) for network in (0, 2)]
    assert_equal_ends(run, by_hand(three, tmp_path / "by hand", states), 2)
    archive = run / "before_epoch_0002"
    assert [len(metrics(archive, network)) for network in range(3)] == [2, 2, 2]
    assert [[line["epoch"] for line in metrics(run, network)] for network in range(2)] == [[2], [2]]

    run_population(2, run, *LONGER, "--epochs", "4", "--resume_networks", "[0,2]")
    assert [line["epoch"] for line in metrics(run, 1)] == [2, 3], "it was changed once more"
    ends = end_population(3, run, *LONGER, "--epochs", "5")
    error_line(ends[0], "holds a run of 2 networks", "--resume_networks")


def test_more_networks(three: Path, tmp_path: Path) -> None:
    run = resumed(three, tmp_path / "run", 3, "[1,fresh]")
    state = checkpoint(three, 2, 1)
    torch.manual_seed(stream_seed("init", 0, 1))
    fresh = build_model(ModelConfig(name="resnet8"), num_classes=10, channels=1).state_dict()
    states = [state, without_optimizer(state, model=fresh), without_optimizer(state)]
    assert_equal_ends(run, by_hand(three, tmp_path / "by hand", states), 3)


def test_too_few_processes_are_refused(three: Path, tmp_path: Path) -> None:
    """Other refusals: test_refused_starts.py."""
    run = shutil.copytree(three, tmp_path / "run")
    ends = end_population(2, run, *LONGER, "--resume_networks", "[0,1,2]")
    error_line(ends[0], "resume_networks names 3 networks, but 2 were started: start at least 3")
    assert all(end.status for end in ends)
    assert not list(run.glob("before_*"))
    assert len(metrics(run, 2)) == 2


def test_a_new_run_is_refused(tmp_path: Path) -> None:
    ends = end_population(2, tmp_path / "run", *LONGER, "--resume_networks", "[0,1]")
    error_line(ends[0], "resume_networks requires a checkpoint")
    assert all(end.status for end in ends)


def test_a_second_attempt_to_move_the_folders(three: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(three, run)
    (run / "before_epoch_0002").mkdir()
    (run / "network00").rename(run / "before_epoch_0002/network00")  # the first attempt's
    run_population(2, run, *LONGER, "--resume_networks", "[1,2]")
    moved = [len(metrics(run / "before_epoch_0002", network)) for network in range(3)]
    assert moved == [2, 2, 2]
    assert len(metrics(run, 0)) == 1


def test_a_grown_population_resumes_inside_an_epoch_bit_for_bit(tmp_path: Path) -> None:
    """One network has had no rounds; the rounds of the grown population are not repeated."""
    options = ("--model.name", "resnet8", "--optim.schedule", "constant", "--method", "papa")
    options += ("--papa.every_steps", "2", "--papa.beta", "0.5", "--data.batch_size", "4")
    run, again = tmp_path / "run", tmp_path / "again"
    run_population(1, run, *options, "--epochs", "1")
    options += ("--checkpoint.keep", "100")
    grown = (*options, "--epochs", "2", "--checkpoint.every_minutes", "1e-6")
    grown += ("--resume_networks", "[0]")
    run_population(2, run, *grown)
    shutil.copytree(run, again)
    saved = sorted(again.glob("checkpoints/epoch_0001_round_*"))
    steps = [torch.load(path / "network00.pt", weights_only=True)["step"] for path in saved]
    # Just after a round
    chosen = next(p.name for p, step in zip(saved, steps, strict=True) if step % 2 == 0)
    for path in again.glob("checkpoints/*"):
        if path.name > chosen:
            shutil.rmtree(path)
    (again / "summary.json").unlink()
    run_population(2, again, *grown)
    log = (again / "network00/log.txt").read_text()
    assert f"resumed from {again}/checkpoints/{chosen}" in log
    for network in range(2):
        first, second = (checkpoint(each, 2, network) for each in (run, again))
        assert first["round"] == second["round"]
        assert_same_bits(first["model"], second["model"])
        assert_same_bits(optimizer_tensors(first), optimizer_tensors(second))
