"""Each method on real processes: what metrics.jsonl contains, and exact resume."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from launching import Train, run_population
from reading import assert_same_bits, checkpoint, metrics, optimizer_tensors

from dist_graft.config import ModelConfig
from dist_graft.grafting.units import graft_tensors, graft_units
from dist_graft.training.models import build_model

TINY = (
    *("--data.batch_size", "16", "--data.test_samples", "40", "--monitor.tensorboard", "false"),
    *("--optim.schedule", "constant"),
)
STEPS = 4
"""Per epoch: 64 images in batches of 16."""
PAPA = ("--method", "papa", "--papa.every_steps", "3", "--papa.beta", "0.5")
WASH = ("--method", "wash", "--wash.probability", "0.05")
AVERAGE = ("--method", "average")
DILOCO = (
    *("--method", "diloco", "--diloco.every_steps", "4", "--diloco.outer_lr", "0.5"),
    *("--model.shared_init", "true"),
)
QSR = (  # lr 0.1 in the first epoch, 0.05 in the second: intervals of 2 and (0.09 / 0.05)^2 steps
    *("--graft.every_steps", "2", "--graft.qsr_alpha", "0.09", "--optim.lr_diversity", "cosine"),
    *("--optim.schedule", "step", "--optim.step_epochs", "1", "--optim.step_factor", "0.5"),
)
RANDOM = ("--graft.every_steps", "3", "--graft.topology", "random")
NOISE = ("--graft.source", "noise", "--graft.threshold")


def uninterrupted(folder: Path, *options: str) -> Path:
    """Train two networks for two epochs without interruption; returns the run directory."""
    run = folder / "uninterrupted"
    run_population(2, run, *TINY, "--epochs", "2", *options)
    return run


@pytest.fixture(scope="module")
def papa(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return uninterrupted(tmp_path_factory.mktemp("papa"), *PAPA)


@pytest.fixture(scope="module")
def wash(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return uninterrupted(tmp_path_factory.mktemp("wash"), *WASH)


@pytest.fixture(scope="module")
def average(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return uninterrupted(tmp_path_factory.mktemp("average"), *AVERAGE)


@pytest.fixture(scope="module")
def diloco(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return uninterrupted(tmp_path_factory.mktemp("diloco"), *DILOCO)


@pytest.fixture(scope="module")
def random_donors(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return uninterrupted(tmp_path_factory.mktemp("random"), *RANDOM)


@pytest.fixture(scope="module")
def bytes_of_a_network() -> int:
    model = build_model(ModelConfig(name="resnet20"), num_classes=10, channels=1)
    return sum(tensor.numel() * tensor.element_size() for tensor in graft_tensors(model).values())


def entries(run: Path, network: int) -> list[dict[str, Any]]:
    """Return the entry of the rounds of each epoch."""
    return [line["graft"] for line in metrics(run, network)]


def distance(run: Path) -> float:
    """Return the largest final difference between the two networks' first convolutions."""
    first, second = (checkpoint(run, 2, k)["model"]["conv1.weight"] for k in (0, 1))
    return float((first - second).abs().max())


def assert_resumes_exactly(run: Path, tmp_path: Path, *options: str) -> None:
    """Remove the last checkpoint, resume from the first, and compare with the removed one."""
    resumed = tmp_path / "resumed"
    shutil.copytree(run, resumed)
    shutil.rmtree(resumed / "checkpoints/epoch_0002")
    run_population(2, resumed, *TINY, *options, "--epochs", "2")
    for network in (0, 1):
        first, second = (checkpoint(folder, 2, network) for folder in (run, resumed))
        for tensors in ("model", "rule"):
            assert_same_bits(first.get(tensors, {}), second.get(tensors, {}))
        moments = optimizer_tensors(first)
        assert moments
        assert_same_bits(moments, optimizer_tensors(second))
        assert first["round"] == second["round"]
        for one, other in zip(entries(run, network), entries(resumed, network), strict=True):
            for what in ("round", "rounds", "bytes", "coefficient", "donor", "distance"):
                assert one[what] == other[what]


@pytest.mark.parametrize("network", [0, 1])
def test_papa_rounds(papa: Path, bytes_of_a_network: int, network: int) -> None:
    """After steps 3 and 6 of 8: one per epoch, with a share of one quarter of the other network."""
    rounds = entries(papa, network)
    assert [entry["round"] for entry in rounds] == [0, 1]
    assert [entry["rounds"] for entry in rounds] == [1, 1]
    for entry in rounds:
        assert entry["bytes"] == bytes_of_a_network
        assert set(entry["coefficient"].values()) == {0.75}
        assert entry["information"] == {}
        assert min(entry["distance"].values()) > 0
    assert checkpoint(papa, 2, network)["round"] == 2


def test_papa_networks_stay_different(papa: Path) -> None:
    assert distance(papa) > 1e-3


def test_papa_resumes_exactly(papa: Path, tmp_path: Path) -> None:
    assert_resumes_exactly(papa, tmp_path, *PAPA)


@pytest.mark.parametrize("network", [0, 1])
def test_wash_rounds(wash: Path, bytes_of_a_network: int, network: int) -> None:
    rounds = entries(wash, network)
    assert [entry["round"] for entry in rounds] == [STEPS - 1, 2 * STEPS - 1]
    for entry in rounds:
        assert entry["rounds"] == STEPS
        assert entry["bytes"] % 4 == 0
        # at most 5% of the first layer's scalars are exchanged, and none of the last layer's
        assert 0 < entry["bytes"] < 0.05 * STEPS * bytes_of_a_network
        assert entry["distance"] == {}
        coefficients = list(entry["coefficient"].values())
        assert coefficients[0] == pytest.approx(1 - 0.05 / 2)
        assert coefficients == sorted(coefficients)
        assert coefficients[-1] == 1.0
    assert checkpoint(wash, 2, network)["round"] == 2 * STEPS


def test_wash_exchanges_equal_bytes(wash: Path) -> None:
    first, second = ([entry["bytes"] for entry in entries(wash, k)] for k in (0, 1))
    assert first == second


def test_wash_resumes_exactly(wash: Path, tmp_path: Path) -> None:
    assert_resumes_exactly(wash, tmp_path, *WASH)


def test_average_makes_the_networks_equal(average: Path, bytes_of_a_network: int) -> None:
    for network in (0, 1):
        rounds = entries(average, network)
        assert [(entry["round"], entry["rounds"]) for entry in rounds] == [(0, 1), (1, 1)]
        assert {entry["bytes"] for entry in rounds} == {bytes_of_a_network}
        assert {share for entry in rounds for share in entry["coefficient"].values()} == {0.5}
    assert distance(average) < 1e-6


def test_diloco_networks_are_equal_after_a_round(diloco: Path, bytes_of_a_network: int) -> None:
    first, second = (checkpoint(diloco, 2, network) for network in (0, 1))
    assert first["round"] == 2
    assert_same_bits(first["model"], second["model"])
    assert_same_bits(first["rule"], second["rule"])
    assert not torch.equal(
        *(optimizer_tensors(one)["0.momentum_buffer"] for one in (first, second))
    )
    outer = first["rule"]["outer.conv1.weight"]
    assert torch.equal(outer, first["model"]["conv1.weight"])
    assert first["rule"]["momentum.conv1.weight"].any()
    for network in (0, 1):
        assert {entry["bytes"] for entry in entries(diloco, network)} == {bytes_of_a_network}


def test_diloco_resumes_exactly(diloco: Path, tmp_path: Path) -> None:
    assert_resumes_exactly(diloco, tmp_path, *DILOCO)


def test_intervals_grow_as_the_learning_rates_fall(tmp_path: Path) -> None:
    """Networks with different learning rates have rounds at the same steps, also when resumed."""
    run = uninterrupted(tmp_path, *QSR)
    for network, lr in ((0, 0.05), (1, 0.1)):
        assert [line["lr"] for line in metrics(run, network)] == [lr, lr / 2]
        assert [entry["rounds"] for entry in entries(run, network)] == [2, 2]  # 2, 4, 7, 8
    assert_resumes_exactly(run, tmp_path, *QSR)


def test_random_donors(random_donors: Path, bytes_of_a_network: int) -> None:
    model = build_model(ModelConfig(name="resnet20"), num_classes=10, channels=1)
    names = [unit.name for unit in graft_units(model)]
    for network in (0, 1):
        rounds = entries(random_donors, network)
        assert [(entry["round"], entry["rounds"]) for entry in rounds] == [(0, 1), (1, 1)]
        for entry in rounds:
            assert entry["donor"] == 1 - network
            assert entry["bytes"] == bytes_of_a_network
            assert list(entry["coefficient"]) == list(entry["information"]) == names
            assert all(0.3 <= share <= 0.7 for share in entry["coefficient"].values())
    coefficients = [list(entries(random_donors, k)[1]["coefficient"].values()) for k in (0, 1)]
    assert [one + other for one, other in zip(*coefficients, strict=True)] == pytest.approx(
        [1.0] * len(names)
    )


def test_noise_with_a_single_network(train: Train, tmp_path: Path) -> None:
    """Noise changes invalid filters only; without any, the run equals plain training."""
    finals = {}
    for name, options in (
        ("plain", ("--method", "none")),
        ("none", (*NOISE, "1e-9")),
        ("all", (*NOISE, "1e9")),
    ):
        done = train(tmp_path / name, *TINY, "--epochs", "2", *options)
        assert done.status == 0, done
        assert [line["graft"] for line in metrics(tmp_path / name, 0)] == [None, None]
        finals[name] = checkpoint(tmp_path / name, 2, 0)
    assert [finals[name]["round"] for name in ("plain", "none", "all")] == [0, 2, 2]
    assert_same_bits(finals["plain"]["model"], finals["none"]["model"])
    plain, noisy = (finals[name]["model"]["conv1.weight"] for name in ("plain", "all"))
    assert 0.5 < float((plain - noisy).std()) < 3


def test_distillation(average: Path, train: Train, tmp_path: Path) -> None:
    teacher = average / "checkpoints/epoch_0002/network00.pt"
    digest = hashlib.sha256(teacher.read_bytes()).digest()
    distill = ("--distill.teachers", f"[{teacher}]", "--distill.weight")
    losses, weights = {}, {}
    for name, options in (("plain", ()), ("0", (*distill, "0")), ("1", (*distill, "1"))):
        done = train(tmp_path / name, *TINY, "--epochs", "1", *options)
        assert done.status == 0, done
        (line,) = metrics(tmp_path / name, 0)
        losses[name] = line["train_loss"]
        weights[name] = checkpoint(tmp_path / name, 1, 0)["model"]
    assert_same_bits(weights["plain"], weights["0"])
    assert losses["0"] == pytest.approx(losses["plain"])
    assert losses["1"] > losses["0"] + 1
    assert not torch.equal(weights["1"]["conv1.weight"], weights["0"]["conv1.weight"])
    assert hashlib.sha256(teacher.read_bytes()).digest() == digest
