"""Networks that differ in options: the recipe of PAPA with diversity, and its resumption."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import yaml
from launching import end_population, error_line, run_population
from reading import assert_same_bits, checkpoint, metrics, optimizer_tensors, session

from dist_graft import cli
from dist_graft.config import TrainConfig
from dist_graft.config.members import member_options

RECIPE = Path(__file__).parents[2] / "launch/configs/papa/cifar10_resnet20.yaml"
EPOCHS = 2
OPTIONS = (
    *("--config", str(RECIPE), "--epochs", str(EPOCHS), "--seed", "3", "--papa.every_steps", "2"),
    *("--data.name", "fashion-mini", "--data.batch_size", "8", "--model.name", "resnet8"),
    *("--checkpoint.every_minutes", "1e-6", "--checkpoint.keep", "100"),
    *("--members", "[{optim.weight_decay: 0.001}, {data.rand_augment: 5}]"),
)


@pytest.fixture(scope="module")
def diverse(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run directory of two networks after two epochs, with checkpoints inside the epochs."""
    run = tmp_path_factory.mktemp("diverse") / "run"
    run_population(2, run, *OPTIONS)
    return run


def expected(network: int) -> dict[str, object]:
    """Options of a network in the run `diverse`."""
    members = [{"optim.weight_decay": 0.001}, {"data.rand_augment": 5}]
    diversity = yaml.safe_load(RECIPE.read_text())["diversity"]
    return member_options(TrainConfig(seed=3, members=members, diversity=diversity), network)


def test_an_interrupted_run_resumes_bit_for_bit(diverse: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(diverse, run)
    inside = sorted(path.name for path in run.glob("checkpoints/epoch_0001_round_*"))
    assert inside, "no checkpoint inside the second epoch"
    for path in run.glob("checkpoints/*"):
        if path.name > inside[0]:
            shutil.rmtree(path)
    (run / "summary.json").unlink()
    run_population(2, run, *OPTIONS)
    assert f"resumed from {run}/checkpoints/{inside[0]}" in (run / "network00/log.txt").read_text()
    for network in (0, 1):
        before, after = (checkpoint(path, EPOCHS, network) for path in (diverse, run))
        assert_same_bits(before["model"], after["model"])
        assert_same_bits(optimizer_tensors(before), optimizer_tensors(after))


@pytest.mark.parametrize("network", [0, 1])
def test_the_options_of_a_network_are_in_its_files(
    diverse: Path, network: int, capsys: pytest.CaptureFixture[str]
) -> None:
    options = expected(network)
    assert options != expected(1 - network)
    stored = yaml.safe_load((diverse / "config.yaml").read_text())
    assert stored["run"]["members"][network] == options
    assert all(line["options"] == options for line in metrics(diverse, network))
    row, _ = session(diverse / f"network{network:02d}")
    assert row["mixup"] == options["data.mixup"]
    assert row["weight_decay"] == options.get("optim.weight_decay", 1e-4)
    (group,) = checkpoint(diverse, EPOCHS, network)["optimizer"]["param_groups"]
    assert group["weight_decay"] == options.get("optim.weight_decay", 1e-4)
    assert cli.run(["status", str(diverse), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["networks"][network]["options"] == options
    assert cli.run(["status", str(diverse)]) == 0
    assert f"mixup {options['data.mixup']:.3g}" in capsys.readouterr().out


def test_other_options_of_a_network_are_refused_in_a_resumed_run(diverse: Path) -> None:
    before = (diverse / "config.yaml").read_text()
    first, _ = end_population(2, diverse, *OPTIONS[:-2], "--members", "[{}, {optim.lr: 1}]")
    error_line(first, "members was [{'optim.weight_decay': 0.001}", "is now [{}, {'optim.lr': 1.0}")
    assert (diverse / "config.yaml").read_text() == before


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("[{optim.lr: 1}]", "members has length 1 for 2 networks: give one mapping per network"),
        ("[{}, {optim.lr: 0}]", "members[1]: optim.lr must be above 0"),
        ("[{}, {model.dropout: 0.5}]", "model.dropout requires a model with dropout layers"),
    ],
)
def test_an_error_ends_all_networks_with_the_same_line(
    tmp_path: Path, option: str, message: str
) -> None:
    for done in end_population(2, tmp_path / "run", "--epochs", "1", "--members", option):
        error_line(done, message)
