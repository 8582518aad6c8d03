"""Options that take effect only in a population of real processes."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from launching import run_population
from reading import assert_same_bits, checkpoint, metrics, scalars, summary

from dist_graft.run_directory import RunDirectory

NETWORKS = (0, 1)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three epochs with one round, after the second."""
    folder = tmp_path_factory.mktemp("options") / "run"
    options = (
        *("--epochs", "3", "--graft.every", "2", "--checkpoint.every", "2"),
        *("--graft.reset_momentum", "true", "--graft.criterion", "l1"),
        *("--graft.lead", "conv+linear", "--graft.amplitude", "1", "--graft.sensitivity", "0"),
        *("--data.val_fraction", "0.25", "--data.channels", "3", "--data.image_size", "32"),
        *("--optim.lrs", "[0.02, 0.3]", "--optim.schedule", "step", "--optim.step_epochs", "1"),
        *("--monitor.progress", "lines"),
    )
    run_population(2, folder, *options)
    return folder


def test_round_after_every_second_epoch(run: Path) -> None:
    for network in NETWORKS:
        rounds = [line["graft"] and line["graft"]["round"] for line in metrics(run, network)]
        assert rounds == [None, 0, None]


def test_zero_sensitivity_gives_coefficients_of_one_half(run: Path) -> None:
    for network in NETWORKS:
        assert set(metrics(run, network)[1]["graft"]["coefficient"].values()) == {0.5}


def test_linear_lead_and_l1_information(run: Path) -> None:
    graft = metrics(run, 0)[1]["graft"]
    assert list(graft["information"])[-1] == "linear"
    assert all(0 < value < 1 for value in graft["information"].values())
    tags = scalars(run / "network00")
    assert {"l1/linear", "l1/conv1", "invalid_0.1/linear"} <= set(tags)
    assert not [tag for tag in tags if tag.startswith("entropy/")]


def test_checkpoints_every_second_epoch_and_after_the_last(run: Path) -> None:
    folders = sorted(path.name for path in (run / "checkpoints").iterdir())
    assert folders == ["epoch_0002", "epoch_0003"]
    assert [checkpoint(run, epoch, 0)["round"] for epoch in (2, 3)] == [1, 1]


def test_reset_momentum(run: Path) -> None:
    for network in NETWORKS:
        assert checkpoint(run, 2, network)["optimizer"]["state"] == {}
        assert checkpoint(run, 3, network)["optimizer"]["state"]


def test_validation_split_is_evaluated(run: Path) -> None:
    for network in NETWORKS:
        for line in metrics(run, network):
            assert line["val_loss"] > 0
            hits = line["val_accuracy"] * 16 / 100
            assert hits == pytest.approx(round(hits))
        board = scalars(run / f"network{network:02d}")
        assert list(board["accuracy/val"]) == list(board["loss/val"]) == [0, 1, 2]


def test_given_learning_rates(run: Path) -> None:
    for network, initial in enumerate((0.02, 0.3)):
        rates = [line["lr"] for line in metrics(run, network)]
        assert rates == pytest.approx([initial, initial / 10, initial / 100])
    assert [row["lr"] for row in summary(run)["networks"]] == [0.02, 0.3]


def test_images_have_three_channels(run: Path) -> None:
    assert checkpoint(run, 3, 0)["model"]["conv1.weight"].shape == (16, 3, 3, 3)


def test_accuracies_are_equal_if_the_last_epoch_has_no_round(run: Path) -> None:
    for row in summary(run)["networks"]:
        assert row["accuracy_before_last_round"] == row["accuracy_after_last_round"]


def test_no_rounds_after_graft_stop(tmp_path: Path) -> None:
    """Rounds follow the first two of three epochs, also if the run resumes between the two."""
    run = tmp_path / "run"
    options = ("--epochs", "3", "--graft.stop", "2", "--checkpoint.before_last_round", "true")
    options += ("--checkpoint.keep", "3")
    before = [RunDirectory(run).before_last_round(network) for network in NETWORKS]

    def train() -> list[list[dict]]:
        """Train or resume; returns the weights before and after the last round, and at the end."""
        run_population(2, run, *options)
        for network in NETWORKS:
            rounds = [line["graft"] and line["graft"]["round"] for line in metrics(run, network)]
            assert rounds == [0, 1, None]
            assert [checkpoint(run, n, network)["round"] for n in (1, 2, 3)] == [1, 2, 2]
        saved = [torch.load(path) for path in before]
        assert [content["round"] for content in saved] == [1, 1]
        ends = [[checkpoint(run, n, network)["model"] for network in NETWORKS] for n in (2, 3)]
        return [[content["model"] for content in saved], *ends]

    uninterrupted = train()
    own, donor = (state["conv1.weight"] for state in uninterrupted[0])
    kept = metrics(run, 0)[1]["graft"]["coefficient"]["conv1"]
    torch.testing.assert_close(uninterrupted[1][0]["conv1.weight"], kept * own + (1 - kept) * donor)
    for epoch in (2, 3):
        shutil.rmtree(run / f"checkpoints/epoch_{epoch:04d}")
    for path in before:
        path.unlink()
    for states, expected in zip(train(), uninterrupted, strict=True):
        for network in NETWORKS:
            assert_same_bits(states[network], expected[network])
