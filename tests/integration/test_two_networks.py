"""Files of a run with two networks."""

from __future__ import annotations

import hashlib
import json
import math
import re
import shutil
import socket
import statistics
from pathlib import Path

import pytest
import torch
from launching import PAIR, SMALL, run_population
from reading import (
    assert_same_bits,
    checkpoint,
    contents,
    event_rows,
    layout,
    metrics,
    pictures,
    scalars,
    session,
    summary,
    texts,
)
from torch import Tensor

from dist_graft import Graft, cli, graft_units, mix
from dist_graft.config import DataConfig, ModelConfig
from dist_graft.monitoring.chart_layout import PHASES, custom_scalars
from dist_graft.training.command import read_options
from dist_graft.training.data import load_data
from dist_graft.training.models import build_model

NETWORKS = (0, 1)
METRICS_CONTRACT = {
    *("epoch", "lr", "train_loss", "train_accuracy", "test_loss", "test_accuracy"),
    *("images_per_second", "graft"),
}
MORE_METRICS = {"val_loss", "val_accuracy", "phase_seconds", "information"}
ROUND_CONTRACT = {"round", "donor", "seconds", "bytes", "coefficient", "information", "distance"}
BY_UNIT = ("coefficient", "information", "distance")
UNITS = graft_units(build_model(ModelConfig(name="resnet20"), num_classes=10, channels=1))
NAMES = [unit.name for unit in UNITS]


def test_files_of_the_contract_and_no_others(pair: Path) -> None:
    found = {re.sub(r"tfevents\..*", "tfevents", name) for name in contents(pair)}
    assert found - {"population/log.txt"} == {
        "config.yaml",
        "classes.json",
        "summary.json",
        *(f"network{k:02d}/metrics.jsonl" for k in NETWORKS),
        *(f"network{k:02d}/log.txt" for k in NETWORKS),
        *(f"network{k:02d}/status.json" for k in NETWORKS),
        *(f"network{k:02d}/events.out.tfevents" for k in NETWORKS),
        "population/events.out.tfevents",
        "population/events.jsonl",
        *(f"checkpoints/epoch_000{n}/network{k:02d}.pt" for n in (2, 3) for k in NETWORKS),
        *(f"checkpoints/epoch_000{n}/COMPLETE.json" for n in (2, 3)),
    }


def test_population_log(pair: Path) -> None:
    assert "epoch 3/3" in (pair / "population/log.txt").read_text()


def test_each_network_logs_every_epoch(pair: Path) -> None:
    for network in NETWORKS:
        log = (pair / f"network{network:02d}/log.txt").read_text()
        assert [log.count(f"epoch {epoch}/3") for epoch in (1, 2, 3)] == [1, 1, 1]


def test_only_one_process_prints(pair: Path) -> None:
    output = (pair.parent / "output.txt").read_text()
    assert [output.count(f"epoch {epoch}/3") for epoch in (1, 2, 3)] == [1, 1, 1]
    assert output.count("ensemble") == 1
    assert f"tensorboard --logdir {pair}" in output


def test_saved_configuration_equals_the_options(pair: Path) -> None:
    options = ["--run_dir", str(pair), *SMALL, *PAIR, "--data.root", str(Path("data").absolute())]
    configs = [
        read_options(cli._parse(["train", *argv])[1])[0]
        for argv in (options, ["--config", str(pair / "config.yaml")])
    ]
    assert configs[0] == configs[1]
    assert configs[0].optim.lr_diversity == "cosine"


class TestMetrics:
    @pytest.mark.parametrize("network", NETWORKS)
    def test_one_line_per_epoch_with_the_keys_of_the_contract(
        self, pair: Path, network: int
    ) -> None:
        lines = metrics(pair, network)
        assert [line["epoch"] for line in lines] == [0, 1, 2]
        for line in lines:
            assert set(line) == METRICS_CONTRACT | MORE_METRICS
            assert set(line["graft"]) == ROUND_CONTRACT | {"phase_seconds", "rounds", "healed_from"}
            assert line["val_loss"] is line["val_accuracy"] is None
            for split, images in (("train", 64), ("test", 40)):
                hits = line[f"{split}_accuracy"] * images / 100
                assert hits == pytest.approx(round(hits))
                assert 0 <= hits <= images
                assert line[f"{split}_loss"] > 0
            assert line["images_per_second"] > 0
            assert set(line["phase_seconds"]) == set(PHASES)
            assert line["phase_seconds"]["step"] > 0
            assert line["phase_seconds"]["evaluation"] > 0
            assert line["information"] == pytest.approx(line["graft"]["information"])

    @pytest.mark.parametrize("network", NETWORKS)
    def test_rounds(self, pair: Path, network: int) -> None:
        for number, line in enumerate(metrics(pair, network)):
            graft = line["graft"]
            assert graft["round"] == number
            assert graft["donor"] == 1 - network
            assert graft["seconds"] > 0
            assert all(list(graft[name]) == NAMES for name in BY_UNIT)
            assert all(0.3 < value < 0.7 for value in graft["coefficient"].values())
            assert all(0 < value < math.log(10) for value in graft["information"].values())
            assert all(value > 0 for value in graft["distance"].values())

    def test_both_networks_record_the_same_round(self, pair: Path) -> None:
        for first, second in zip(*(metrics(pair, k) for k in NETWORKS), strict=True):
            one, other = first["graft"], second["graft"]
            for unit in NAMES:
                assert one["coefficient"][unit] + other["coefficient"][unit] == pytest.approx(1)
                assert one["distance"][unit] == pytest.approx(other["distance"][unit])
                difference = one["information"][unit] - other["information"][unit]
                expected = 0.4 / math.pi * math.atan(5 * difference) + 0.5
                assert one["coefficient"][unit] == pytest.approx(expected)

    def test_bytes_of_a_round(self, pair: Path) -> None:
        """All weights and running statistics of the donor, in fp32."""
        state = checkpoint(pair, 3, 0)["model"]
        size = sum(value.numel() * 4 for value in state.values() if value.is_floating_point())
        assert {line["graft"]["bytes"] for k in NETWORKS for line in metrics(pair, k)} == {size}

    def test_different_learning_rates(self, pair: Path) -> None:
        for network, initial in enumerate((0.05, 0.1)):
            rates = [line["lr"] for line in metrics(pair, network)]
            expected = [initial * (1 + math.cos(math.pi * epoch / 3)) / 2 for epoch in range(3)]
            assert rates == pytest.approx(expected)
            assert summary(pair)["networks"][network]["lr"] == pytest.approx(initial)

    def test_data_order_differs_between_networks(self, pair: Path) -> None:
        first, second = (metrics(pair, network)[2]["train_loss"] for network in NETWORKS)
        assert first != second


class TestCheckpoints:
    @pytest.mark.parametrize("epoch", [2, 3])
    @pytest.mark.parametrize("network", NETWORKS)
    def test_keys_of_the_contract(self, pair: Path, epoch: int, network: int) -> None:
        state = checkpoint(pair, epoch, network)
        contract = {"network", "epoch", "step", "round", "model", "optimizer", "scheduler"}
        assert contract <= set(state)
        assert (state["network"], state["epoch"], state["round"]) == (network, epoch, epoch)
        assert state["step"] == 0
        assert state["scheduler"]["last_epoch"] == 2 * epoch
        model = build_model(ModelConfig(name="resnet20"), num_classes=10, channels=1)
        model.load_state_dict(state["model"])
        assert len(state["optimizer"]["state"]) == len(list(model.parameters()))

    @pytest.mark.parametrize("epoch", [2, 3])
    def test_complete_json_has_the_checksum_of_every_file(self, pair: Path, epoch: int) -> None:
        folder = pair / "checkpoints" / f"epoch_{epoch:04d}"
        content = json.loads((folder / "COMPLETE.json").read_text())
        assert (content["epoch"], content["round"], content["networks"]) == (epoch, epoch, 2)
        assert content["sha256"] == {
            f"network{k:02d}.pt": hashlib.sha256(
                (folder / f"network{k:02d}.pt").read_bytes()
            ).hexdigest()
            for k in NETWORKS
        }

    def test_momentum_is_not_exchanged(self, pair: Path) -> None:
        first, second = (checkpoint(pair, 3, network)["optimizer"]["state"] for network in NETWORKS)
        assert not torch.allclose(first[0]["momentum_buffer"], second[0]["momentum_buffer"])


class TestRounds:
    """`independent` has the weights before the first round."""

    def test_first_round_equals_mix(self, by_peers: Path, independent: Path) -> None:
        """Bit for bit, from the weights before the round."""
        before = [checkpoint(independent, 1, network)["model"] for network in NETWORKS]
        after = [checkpoint(by_peers, 1, network)["model"] for network in NETWORKS]
        rule = Graft()
        information = torch.stack([rule.measure(UNITS, state) for state in before])
        expected = mix(before, UNITS, rule.decide(information, 0))
        for network in NETWORKS:
            assert_same_bits(after[network], expected[network])
            assert not torch.equal(after[network]["conv1.weight"], before[network]["conv1.weight"])

    def test_networks_are_equal_after_a_round(self, by_peers: Path, independent: Path) -> None:
        """To within 2 ulp of the larger input, including batch-norm statistics."""
        before = [checkpoint(independent, 1, network)["model"] for network in NETWORKS]
        first, second = (checkpoint(by_peers, 1, network)["model"] for network in NETWORKS)
        for key, value in first.items():
            if value.is_floating_point():
                size = torch.maximum(*(state[key].abs() for state in before))
                ulp = torch.finfo(torch.float32).eps * size.double()
                assert ((value.double() - second[key].double()).abs() <= 2 * ulp).all(), key
            else:
                assert torch.equal(value, second[key]), key

    @pytest.mark.parametrize("epoch", [2, 3])
    def test_p2p_and_all_gather_give_the_same_bits(
        self, pair: Path, by_peers: Path, epoch: int
    ) -> None:
        for network in NETWORKS:
            states = (checkpoint(run, epoch, network)["model"] for run in (pair, by_peers))
            assert_same_bits(*states)


class TestSummary:
    def test_keys(self, pair: Path) -> None:
        found = summary(pair)
        assert set(found) == {
            *("networks", "wall_seconds", "diverged", "events"),
            *(f"{name}_accuracy_{when}_last_round" for name in ("mean", "ensemble")
              for when in ("before", "after")),
        }  # fmt: skip
        assert [row["network"] for row in found["networks"]] == [0, 1]
        assert found["wall_seconds"] > 0
        for row in found["networks"]:
            assert set(row) == {
                *("network", "lr"),
                *("accuracy_before_last_round", "accuracy_after_last_round"),
            }

    @pytest.mark.parametrize("when", ["before", "after"])
    def test_mean(self, pair: Path, when: str) -> None:
        found = summary(pair)
        members = [row[f"accuracy_{when}_last_round"] for row in found["networks"]]
        assert found[f"mean_accuracy_{when}_last_round"] == pytest.approx(statistics.mean(members))

    def test_accuracy_before_the_last_round_is_that_of_the_last_epoch(self, pair: Path) -> None:
        for network, row in enumerate(summary(pair)["networks"]):
            assert row["accuracy_before_last_round"] == metrics(pair, network)[-1]["test_accuracy"]

    def test_accuracy_after_the_last_round_is_that_of_the_saved_weights(self, pair: Path) -> None:
        found, members, labels = summary(pair), [], torch.tensor([])
        for network, row in enumerate(found["networks"]):
            scores, labels = predictions(checkpoint(pair, 3, network)["model"])
            assert row["accuracy_after_last_round"] == percent(scores, labels)
            members.append(scores)
        ensemble = percent(torch.stack(members).mean(0), labels)
        assert found["ensemble_accuracy_after_last_round"] == ensemble


@torch.no_grad()
def predictions(state: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Return the class probabilities and the labels of the run's test images."""
    model = build_model(ModelConfig(name="resnet20"), num_classes=10, channels=1).eval()
    model.load_state_dict(state)
    data = load_data(
        DataConfig(train_samples=64, test_samples=40, batch_size=40),
        seed=0,
        network=0,
        device=torch.device("cpu"),
        channels_last=False,
    )
    inputs, labels = next(data.eval_batches("test"))
    return model(inputs).softmax(1), labels


def percent(scores: Tensor, labels: Tensor) -> float:
    return 100 * int((scores.argmax(1) == labels).sum()) / len(labels)


class TestTensorBoard:
    def test_tags_are_equal_for_all_networks(self, pair: Path) -> None:
        first, second = (scalars(pair / f"network{network:02d}") for network in NETWORKS)
        assert set(first) == set(second)
        singles = {
            *("loss/train", "loss/test", "accuracy/train", "accuracy/test"),
            *("learning_rate", "images_per_second"),
        }
        kinds = ("coefficient", "entropy", "distance", "invalid_0.1", "invalid_0.01")
        by_unit = {f"{kind}/{unit}" for kind in kinds for unit in NAMES}
        assert singles | by_unit <= set(first)
        for tag in singles | by_unit:
            assert list(first[tag]) == list(second[tag]) == [0, 1, 2], tag

    @pytest.mark.parametrize("network", NETWORKS)
    def test_scalars_equal_the_metrics(self, pair: Path, network: int) -> None:
        board = scalars(pair / f"network{network:02d}")
        for epoch, line in enumerate(metrics(pair, network)):
            expected = {
                "loss/train": line["train_loss"],
                "loss/test": line["test_loss"],
                "accuracy/train": line["train_accuracy"],
                "accuracy/test": line["test_accuracy"],
                "learning_rate": line["lr"],
                "images_per_second": line["images_per_second"],
            }
            for unit in NAMES:
                expected[f"coefficient/{unit}"] = line["graft"]["coefficient"][unit]
                expected[f"entropy/{unit}"] = line["graft"]["information"][unit]
                expected[f"distance/{unit}"] = line["graft"]["distance"][unit]
            for tag, value in expected.items():
                assert board[tag][epoch] == pytest.approx(value, rel=1e-6), tag

    @pytest.mark.parametrize("network", NETWORKS)
    def test_invalid_filters(self, pair: Path, network: int) -> None:
        """At most the number of filters, and no more at the lower threshold."""
        board = scalars(pair / f"network{network:02d}")
        state = checkpoint(pair, 3, network)["model"]
        for epoch in range(3):
            for unit in NAMES:
                low, high = (board[f"invalid_{at}/{unit}"][epoch] for at in ("0.01", "0.1"))
                assert 0 <= low <= high <= len(state[f"{unit}.weight"])

    def test_population_scalars(self, pair: Path) -> None:
        board = scalars(pair / "population")
        for epoch in range(3):
            members = [metrics(pair, k)[epoch]["test_accuracy"] for k in NETWORKS]
            for name, value in (
                ("mean", statistics.mean(members)),
                ("min", min(members)),
                ("max", max(members)),
                ("standard_deviation", statistics.stdev(members)),
            ):
                found = board[f"population/test_accuracy_{name}"][epoch]
                assert found == pytest.approx(value, abs=1e-4)
            hits = board["population/ensemble_test_accuracy"][epoch] * 40 / 100
            assert hits == pytest.approx(round(hits), abs=1e-4)
        last = board["population/ensemble_test_accuracy"][2]
        assert last == pytest.approx(summary(pair)["ensemble_accuracy_before_last_round"])

    @pytest.mark.parametrize("network", NETWORKS)
    def test_time_shares_and_layer_summaries(self, pair: Path, network: int) -> None:
        board = scalars(pair / f"network{network:02d}")
        for epoch, line in enumerate(metrics(pair, network)):
            shares = [board[f"time_share/{phase}"][epoch] for phase in PHASES]
            assert sum(shares) == pytest.approx(100)
            graft = line["graft"]
            distance = math.hypot(*graft["distance"].values())
            assert board["layers/distance_to_donor"][epoch] == pytest.approx(distance, rel=1e-6)
            for tag, name in (("coefficient", "coefficient"), ("entropy", "information")):
                mean = statistics.mean(graft[name].values())
                assert board[f"layers/{tag}_mean"][epoch] == pytest.approx(mean, rel=1e-6)

    @pytest.mark.parametrize("network", NETWORKS)
    def test_heat_maps_of_the_last_epoch(self, pair: Path, network: int) -> None:
        found = pictures(pair / f"network{network:02d}")
        assert {tag: max(steps) for tag, steps in found.items()} == {
            "heat_map/coefficient": 2,
            "heat_map/entropy": 2,
        }

    def test_drawing_of_the_last_round(self, pair: Path) -> None:
        (images,) = pictures(pair / "population").values()
        assert max(images) == 2

    @pytest.mark.parametrize("network", NETWORKS)
    def test_hyperparameters_and_results(self, pair: Path, network: int) -> None:
        folder = pair / f"network{network:02d}"
        row, ended = session(folder)
        accuracies = summary(pair)["networks"][network]
        assert ended
        assert row["lr"] == pytest.approx(accuracies["lr"])
        assert (row["model"], row["method"], row["seed"]) == ("resnet20", "graft", 5)
        for when in ("before", "after"):
            values = scalars(folder)[f"final/test_accuracy_{when}_last_round"]
            assert values == {2: pytest.approx(accuracies[f"accuracy_{when}_last_round"])}

    def test_texts(self, pair: Path) -> None:
        found = texts(pair / "population")
        assert found["run/configuration"][0] == f"```\n{(pair / 'config.yaml').read_text()}```"
        assert f"| torch | {torch.__version__} |" in found["run/versions"][0]
        rows = [f"| {network} | {socket.gethostname()} |" for network in NETWORKS]
        assert found["run/hosts"][0].splitlines()[2:] == rows
        assert not event_rows(pair)

    def test_layout(self, pair: Path) -> None:
        expected = custom_scalars("entropy", validation=False, rounds=True)
        assert layout(pair / "population") == {
            category: {title: tags for title, (_, tags) in charts.items()}
            for category, charts in expected.items()
        }


def test_rerunning_a_finished_run_changes_nothing(pair: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(pair, run)
    before = contents(run, without=("log.txt", "status.json"))
    done, _ = run_population(2, run, *PAIR)
    assert f"{run} is complete: 3 epochs" in done.output
    assert contents(run, without=("log.txt", "status.json")) == before
