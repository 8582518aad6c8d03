"""Without rounds, each network of a population trains as it would alone."""

from __future__ import annotations

from pathlib import Path

import torch
from launching import Train
from reading import assert_same_bits, checkpoint, metrics, scalars, summary

NETWORKS = (0, 1)


def test_first_network_is_bitwise_equal_to_a_single_one(
    independent: Path, train: Train, tmp_path: Path
) -> None:
    lr = str(metrics(independent, 0)[0]["lr"])
    assert train(tmp_path / "run", "--epochs", "3", "--seed", "5", "--optim.lr", lr).status == 0
    together, single = (checkpoint(run, 3, 0) for run in (independent, tmp_path / "run"))
    assert_same_bits(together["model"], single["model"])
    assert together["round"] == single["round"] == 0


def test_networks_differ(independent: Path) -> None:
    first, second = (checkpoint(independent, 3, k)["model"]["conv1.weight"] for k in NETWORKS)
    assert not torch.allclose(first, second)


def test_no_rounds_are_recorded(independent: Path) -> None:
    for network in NETWORKS:
        assert {line["graft"] for line in metrics(independent, network)} == {None}
        tags = scalars(independent / f"network{network:02d}")
        assert not [tag for tag in tags if tag.startswith(("coefficient/", "distance/", "round/"))]
        assert "entropy/conv1" in tags


def test_accuracies_before_and_after_the_last_round_are_equal(independent: Path) -> None:
    found = summary(independent)
    for row in found["networks"]:
        assert row["accuracy_before_last_round"] == row["accuracy_after_last_round"]
    for name in ("mean", "ensemble"):
        accuracies = {found[f"{name}_accuracy_{when}_last_round"] for when in ("before", "after")}
        assert len(accuracies) == 1
