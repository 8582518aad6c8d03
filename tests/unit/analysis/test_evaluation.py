from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from stored_runs import damage_file, evaluate_run, network, related_states, write_run
from torch import Tensor
from torch.optim.swa_utils import update_bn

from dist_graft.analysis.calibration import calibration_error, negative_log_likelihood
from dist_graft.analysis.evaluate import evaluation_text
from dist_graft.config import OptimConfig
from dist_graft.errors import ConfigError, RunDirectoryError
from dist_graft.run_directory import RunDirectory
from dist_graft.training.checkpoint.last_round import load_weights_before
from dist_graft.training.data import load_data

CPU = torch.device("cpu")
Scores = tuple[NDArray[np.float64], NDArray[np.int64]]


class Reference:
    """Reference implementation: plain loops and torch's update_bn."""

    def __init__(self, run: Path) -> None:
        config, _ = RunDirectory(run).read_config()
        self.data = load_data(config.data, seed=0, network=0, device=CPU, channels_last=True)

    def logits(self, state: dict[str, Tensor], split: str, *, reestimated: bool = False) -> Scores:
        model = network(0)
        model.load_state_dict(state)
        if reestimated:
            steps = self.data.steps_per_epoch
            update_bn((images for images, _ in self.data.train_batches(0, 0, steps)), model)
        model.eval()
        with torch.no_grad():
            parts = [(model(images), labels) for images, labels in self.data.eval_batches(split)]
        logits = torch.cat([part for part, _ in parts]).double().numpy()
        return logits, torch.cat([labels for _, labels in parts]).numpy()

    def accuracy(self, state: dict[str, Tensor], split: str, *, reestimated: bool = False) -> float:
        logits, labels = self.logits(state, split, reestimated=reestimated)
        return 100 * float((logits.argmax(1) == labels).mean())

    def probabilities(
        self, state: dict[str, Tensor], split: str = "test", *, reestimated: bool = False
    ) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
        logits, labels = self.logits(state, split, reestimated=reestimated)
        return softmax(logits), labels

    def training_loss(self, state: dict[str, Tensor]) -> float:
        """On all training batches, after batch norm was re-estimated on them."""
        model = network(0)
        model.load_state_dict(state)
        batches = list(self.data.train_batches(0, 0, self.data.steps_per_epoch))
        update_bn((images for images, _ in batches), model)
        model.eval()
        with torch.no_grad():
            logits = torch.cat([model(images) for images, _ in batches]).double().numpy()
        labels = torch.cat([labels for _, labels in batches]).numpy()
        return surprise(softmax(logits), labels)


def softmax(logits: NDArray[np.float64]) -> NDArray[np.float64]:
    raised = np.exp(logits - logits.max(1, keepdims=True))
    return raised / raised.sum(1, keepdims=True)


def surprise(probabilities: NDArray[np.float64], labels: NDArray[np.int64]) -> float:
    return float(-np.log(probabilities[np.arange(len(labels)), labels]).mean())


def reference_calibration_error(
    probabilities: NDArray[np.float64], labels: NDArray[np.int64]
) -> float:
    """Bins as Guo et al. write them: ((m - 1) / M, m / M]."""
    confidence, right = probabilities.max(1), probabilities.argmax(1) == labels
    total = 0.0
    for m in range(1, 16):
        chosen = (confidence > (m - 1) / 15) & (confidence <= m / 15)
        if chosen.any():
            gap = right[chosen].mean() - confidence[chosen].mean()
            total += chosen.sum() / len(labels) * abs(gap)
    return 100 * total


def mean_of(states: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {
        key: torch.from_numpy(
            np.asarray(np.mean([state[key].numpy().astype(np.float64) for state in states], axis=0))
        ).to(tensor.dtype)
        for key, tensor in states[0].items()
    }


@pytest.fixture(scope="module")
def evaluated(trio: Path) -> dict[str, Any]:
    """Content of evaluation.json."""
    result = evaluate_run(trio)
    assert json.loads((trio / "evaluation.json").read_text()) == result
    return result


@pytest.fixture(scope="module")
def reference(trio: Path) -> Reference:
    return Reference(trio)


class TestNumbers:
    def test_members(self, evaluated: dict[str, Any], reference: Reference) -> None:
        for member, state in zip(evaluated["members"], related_states(3), strict=True):
            assert member["test_accuracy"] == reference.accuracy(state, "test")
            reestimated = reference.accuracy(state, "test", reestimated=True)
            assert member["test_accuracy_reestimated"] == reestimated
            assert member["val_accuracy"] == reference.accuracy(state, "val")
            scores = reference.probabilities(state)
            assert member["test_loss"] == pytest.approx(surprise(*scores), rel=1e-5)
            error = reference_calibration_error(*scores)
            assert member["test_calibration_error"] == pytest.approx(error, rel=1e-4)
        assert [member["network"] for member in evaluated["members"]] == [0, 1, 2]
        assert [member["lr"] for member in evaluated["members"]] == [0.1, 0.2, 0.3]

    def test_mean(self, evaluated: dict[str, Any]) -> None:
        for how in ("", "_reestimated"):
            mean = np.mean([member[f"test_accuracy{how}"] for member in evaluated["members"]])
            assert evaluated[f"mean_test_accuracy{how}"] == pytest.approx(mean, rel=1e-12)

    def test_ensemble_averages_probabilities(
        self, evaluated: dict[str, Any], reference: Reference
    ) -> None:
        for how in ("", "_reestimated"):
            total = np.zeros(())
            for state in related_states(3):
                logits, labels = reference.logits(state, "test", reestimated=bool(how))
                total = total + softmax(logits) / 3
            expected = 100 * float((total.argmax(1) == labels).mean())
            assert evaluated[f"ensemble_test_accuracy{how}"] == expected
            if not how:
                loss, error = surprise(total, labels), reference_calibration_error(total, labels)
                assert evaluated["ensemble_test_loss"] == pytest.approx(loss, rel=1e-5)
                found = evaluated["ensemble_test_calibration_error"]
                assert found == pytest.approx(error, rel=1e-4)

    def test_disagreement_is_the_mean_over_pairs(
        self, evaluated: dict[str, Any], reference: Reference
    ) -> None:
        predictions = [reference.probabilities(s)[0].argmax(1) for s in related_states(3)]
        shares = [np.mean(predictions[a] != predictions[b]) for a, b in ((0, 1), (0, 2), (1, 2))]
        assert evaluated["disagreement"] == pytest.approx(100 * np.mean(shares))
        assert len(set(shares)) > 1

    def test_barrier_between_neighbors(
        self, evaluated: dict[str, Any], reference: Reference
    ) -> None:
        states = related_states(3)
        ends = [reference.training_loss(state) for state in states]
        expected = []
        for first, second in ((0, 1), (1, 2), (2, 0)):
            excess = [0.0]
            for position in (0.25, 0.5, 0.75):
                between = {
                    key: tensor + position * (states[second][key] - tensor)
                    if tensor.is_floating_point()
                    else tensor
                    for key, tensor in states[first].items()
                }
                straight = (1 - position) * ends[first] + position * ends[second]
                excess.append(reference.training_loss(between) - straight)
            expected.append(max(excess))
        barrier = evaluated["barrier"]
        assert [pair["networks"] for pair in barrier["pairs"]] == [[0, 1], [1, 2], [2, 0]]
        found = [pair["barrier"] for pair in barrier["pairs"]]
        assert found == pytest.approx(expected, abs=1e-3)
        assert max(found) > 0.01
        assert barrier["mean"] == pytest.approx(np.mean(found))
        assert (barrier["split"], barrier["batches"]) == ("train", 2)

    def test_barrier_before_the_last_round(self, tmp_path: Path) -> None:
        states = related_states(3)
        run = write_run(tmp_path / "run", states)
        for number, state in enumerate(states):
            path = RunDirectory(run).before_last_round(number)
            path.parent.mkdir()
            torch.save({"round": 1, "model": state}, path)
        result = evaluate_run(run, batch_norm_batches=1)
        mean = result["barrier"]["mean"]
        assert mean > 0
        assert result["barrier_before_last_round"] == result["barrier"], "the same weights here"
        lines = evaluation_text(result).splitlines()
        assert f"loss barrier before the last round: {mean:.4f}" in lines

        (run / "network01/before_last_round.pt").unlink()
        assert evaluate_run(run, batch_norm_batches=1)["barrier_before_last_round"] is None

    def test_weights_before_another_round(self, tmp_path: Path) -> None:
        path = RunDirectory(tmp_path).before_last_round(1)
        path.parent.mkdir()
        torch.save({"round": 4, "model": {"a": torch.ones(1)}}, path)
        assert load_weights_before(tmp_path, 1, 4) == {"a": torch.ones(1)}
        assert load_weights_before(tmp_path, 1, 3) is None
        assert load_weights_before(tmp_path, 0, 4) is None
        path.write_bytes(b"damaged")
        with pytest.raises(RunDirectoryError, match=r"before_last_round\.pt is damaged: delete it"):
            load_weights_before(tmp_path, 1, 4)

    def test_uniform_soup(self, evaluated: dict[str, Any], reference: Reference) -> None:
        soup = mean_of(related_states(3))
        scores = reference.probabilities(soup, reestimated=True)
        assert evaluated["uniform_soup"] == {
            "batch_norm_as_is": reference.accuracy(soup, "test"),
            "batch_norm_reestimated": reference.accuracy(soup, "test", reestimated=True),
            "test_loss": pytest.approx(surprise(*scores), rel=1e-4),
            "test_calibration_error": pytest.approx(reference_calibration_error(*scores), rel=1e-3),
        }

    def test_greedy_soup_is_chosen_on_the_validation_split(
        self, evaluated: dict[str, Any], reference: Reference
    ) -> None:
        states = related_states(3)
        alone = [reference.accuracy(state, "val", reestimated=True) for state in states]
        members: list[int] = []
        reached = -1.0
        for candidate in sorted(range(3), key=lambda k: (-alone[k], k)):
            tried = [*members, candidate]
            soup = mean_of([states[k] for k in tried])
            value = reference.accuracy(soup, "val", reestimated=True)
            if value >= reached:
                members, reached = tried, value
        soup = mean_of([states[k] for k in members])
        found = evaluated["greedy_soup"]
        assert found["members"] == members
        assert found["batch_norm_as_is"] == reference.accuracy(soup, "test")
        reestimated = reference.accuracy(soup, "test", reestimated=True)
        assert found["batch_norm_reestimated"] == reestimated

    def test_numbers_above_differ(self, evaluated: dict[str, Any]) -> None:
        result = evaluated
        values = [member["test_accuracy"] for member in result["members"]]
        soups = [result["uniform_soup"][f"batch_norm_{how}"] for how in ("as_is", "reestimated")]
        assert len({*values, *soups}) >= 4
        assert 1 < len(result["greedy_soup"]["members"]) <= 3

    def test_keys(self, evaluated: dict[str, Any], trio: Path) -> None:
        result = evaluated
        assert list(result) == [
            *("protocol", "run_dir", "epoch", "round", "members"),
            *("mean_test_accuracy", "mean_test_accuracy_reestimated"),
            *("ensemble_test_accuracy", "ensemble_test_accuracy_reestimated"),
            *("ensemble_test_loss", "ensemble_test_loss_reestimated"),
            "ensemble_test_calibration_error",
            "ensemble_test_calibration_error_reestimated",
            *("disagreement", "barrier", "barrier_before_last_round"),
            *("uniform_soup", "greedy_soup", "averages"),
        ]
        assert (result["protocol"], result["epoch"], result["round"]) == (4, 2, 2)
        assert result["run_dir"] == str(trio)

    def test_table(self, evaluated: dict[str, Any]) -> None:
        result = evaluated
        lines = evaluation_text(result).splitlines()
        for member in result["members"]:
            line = next(line for line in lines if f"network {member['network']} (lr" in line)
            for name in ("test_accuracy", "test_accuracy_reestimated", "val_accuracy"):
                assert f" {member[name]:.2f}" in line
        ensemble = next(line for line in lines if "ensemble" in line)
        assert f"{result['ensemble_test_accuracy']:.2f}" in ensemble
        chosen = "+".join(map(str, result["greedy_soup"]["members"]))
        soup = next(line for line in lines if f"greedy soup of {chosen}" in line)
        assert f" {result['greedy_soup']['batch_norm_reestimated']:.2f}" in soup
        assert f" {result['disagreement']:.2f} %" in lines[-1]
        assert f" {result['barrier']['mean']:.4f}" in lines[-1]


class TestWithoutValidation:
    def test_no_greedy_soup(self, tmp_path: Path) -> None:
        run = write_run(tmp_path / "run", [network(0).state_dict()])
        result = evaluate_run(run, batch_norm_batches=1)
        text = evaluation_text(result)
        assert result["greedy_soup"] is None
        assert result["members"][0]["val_accuracy"] is None
        assert "no validation split (data.val_fraction is 0)" in text
        assert "greedy soup of" not in text

    def test_one_network_is_its_own_soup_and_ensemble(self, tmp_path: Path) -> None:
        run = write_run(tmp_path / "run", [network(0).state_dict()])
        result = evaluate_run(run, batch_norm_batches=1)
        alone = result["members"][0]["test_accuracy"]
        assert result["mean_test_accuracy"] == alone
        assert result["ensemble_test_accuracy"] == alone
        assert result["uniform_soup"]["batch_norm_as_is"] == alone
        assert result["ensemble_test_loss"] == pytest.approx(result["members"][0]["test_loss"])
        assert result["disagreement"] is None
        assert result["barrier"] is None
        assert "barrier" not in evaluation_text(result)


class TestNotFinite:
    def test_a_network_with_nan_leaves_scores_unknown(self, tmp_path: Path) -> None:
        states = related_states(2)
        states[1]["conv1.weight"][0] = math.nan
        run = write_run(tmp_path / "run", states)
        evaluate_run(run, batch_norm_batches=1)
        result = json.loads((run / "evaluation.json").read_text(), parse_constant=pytest.fail)
        first = result["members"][0]
        assert first["test_calibration_error"] is not None
        assert result["members"][1]["test_calibration_error"] is None
        for name in ("accuracy", "loss", "calibration_error"):  # without the second one
            assert result[f"ensemble_test_{name}"] == pytest.approx(first[f"test_{name}"])
        assert result["barrier"]["mean"] is None
        assert result["uniform_soup"]["test_calibration_error"] is None
        assert " - " in evaluation_text(result)

    def test_without_a_finite_network(self, tmp_path: Path) -> None:
        states = related_states(2)
        for state in states:
            state["conv1.weight"][0] = math.nan
        result = evaluate_run(write_run(tmp_path / "run", states), batch_norm_batches=1)
        assert result["ensemble_test_accuracy"] == result["members"][1]["test_accuracy"]
        assert result["ensemble_test_loss"] is None


@pytest.mark.parametrize("optim", [OptimConfig(lrs=[0.1, 0.2]), OptimConfig()])
def test_rates_of_another_number_of_networks_are_unknown(
    optim: OptimConfig, tmp_path: Path
) -> None:
    """A checkpoint of three networks, in a run that has continued with two."""
    run = write_run(tmp_path / "run", related_states(3))
    directory = RunDirectory(run)
    config, _ = directory.read_config()
    members = [] if optim.lrs else [{"optim.lr": 0.1}, {"optim.lr": 0.2}]
    directory.write_config(replace(config, optim=optim, members=members), 2)
    result = evaluate_run(run, batch_norm_batches=1)
    assert [member["lr"] for member in result["members"]] == [None] * 3
    assert "network 2 (lr -)" in evaluation_text(result)


class TestCalibration:
    def test_by_hand(self) -> None:
        # Confidence 0.9 in bin 14 of 15: one of two is right; 0.6 in bin 9: right
        probabilities = torch.tensor([[0.9, 0.1], [0.9, 0.1], [0.4, 0.6], [0.4, 0.6]])
        labels = torch.tensor([0, 1, 1, 1])
        assert calibration_error(probabilities, labels) == pytest.approx(100 * (0.4 + 0.4) / 2)
        assert negative_log_likelihood(probabilities, labels) == pytest.approx(
            -(math.log(0.9) + math.log(0.1) + 2 * math.log(0.6)) / 4
        )

    def test_gaps_of_one_bin_cancel(self) -> None:
        probabilities = torch.tensor([[0.5, 0.5]] * 4)
        assert calibration_error(probabilities, torch.tensor([0, 1, 0, 1])) == pytest.approx(0)

    def test_certain_predictions(self) -> None:
        certain = torch.tensor([[1.0, 0.0], [1.0, 0.0]])
        assert calibration_error(certain, torch.tensor([0, 0])) == 0
        assert calibration_error(certain, torch.tensor([1, 1])) == 100
        assert 80 < negative_log_likelihood(certain, torch.tensor([1, 1])) < math.inf


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run of one network with two checkpoints."""
    folder = tmp_path_factory.mktemp("options") / "run"
    return write_run(folder, [network(0).state_dict()], epochs=(1, 3))


class TestOptions:
    def test_older_checkpoint(self, run: Path) -> None:
        result = evaluate_run(run, checkpoint="epoch_0001", batch_norm_batches=1)
        assert result["epoch"] == 1

    def test_missing_checkpoint(self, run: Path) -> None:
        with pytest.raises(RunDirectoryError, match=r"'epoch_0002', only epoch_0001, epoch_00"):
            evaluate_run(run, checkpoint="epoch_0002")

    def test_batch_size_does_not_change_accuracies(self, run: Path) -> None:
        accuracies = []
        for batch_size in (None, 7):
            result = evaluate_run(run, batch_size=batch_size, batch_norm_batches=1)
            accuracies.append(result["members"])
        assert accuracies[0][0]["test_accuracy"] == accuracies[1][0]["test_accuracy"]

    def test_fp16_needs_a_gpu(self, run: Path) -> None:
        with pytest.raises(ConfigError, match="fp16 needs a GPU"):
            evaluate_run(run, precision="fp16")

    def test_data_from_elsewhere(self, tmp_path: Path) -> None:
        run = write_run(tmp_path / "run", [network(0).state_dict()], name="fashion-mnist")
        with pytest.raises(Exception, match="elsewhere"):
            evaluate_run(run, data={"root": str(tmp_path / "elsewhere")})


class TestErrors:
    def test_not_a_run_directory(self, tmp_path: Path) -> None:
        with pytest.raises(RunDirectoryError, match=f"{tmp_path} is not a run directory"):
            evaluate_run(tmp_path)

    def test_no_complete_checkpoint(self, tmp_path: Path) -> None:
        run = write_run(tmp_path / "run", [network(0).state_dict()], epochs=())
        with pytest.raises(RunDirectoryError, match="no complete checkpoint"):
            evaluate_run(run)

    def test_invalid_config(self, tmp_path: Path) -> None:
        run = write_run(tmp_path / "run", [network(0).state_dict()])
        (run / "config.yaml").write_text("epochs: 3\n")
        with pytest.raises(RunDirectoryError, match=r"config\.yaml cannot be read"):
            evaluate_run(run)

    def test_damaged_checkpoint(self, tmp_path: Path) -> None:
        run = write_run(tmp_path / "run", [network(0).state_dict()])
        path = run / "checkpoints/epoch_0002/network00.pt"
        damage_file(path)
        with pytest.raises(
            RunDirectoryError, match=f"{path} is missing or damaged: .*--checkpoint"
        ):
            evaluate_run(run)
        assert not (run / "evaluation.json").exists()

    def test_wrong_architecture(self, tmp_path: Path) -> None:
        run = write_run(tmp_path / "run", [network(0).state_dict()], model="resnet32")
        with pytest.raises(ConfigError, match="does not hold the weights of this architecture"):
            evaluate_run(run)
