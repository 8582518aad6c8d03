from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from stored_runs import damage_file, evaluate_run, network, related_states, write_run
from torch import Tensor
from torch.optim.swa_utils import update_bn

from dist_graft.analysis.evaluate import evaluation_text
from dist_graft.errors import ConfigError, RunDirectoryError
from dist_graft.run_directory import RunDirectory
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

    def loss(self, state: dict[str, Tensor], split: str) -> float:
        logits, labels = self.logits(state, split)
        shifted = logits - logits.max(1, keepdims=True)
        surprise = np.log(np.exp(shifted).sum(1)) - shifted[np.arange(len(labels)), labels]
        return float(surprise.mean())


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
            assert member["test_loss"] == pytest.approx(reference.loss(state, "test"), rel=1e-5)
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
                raised = np.exp(logits - logits.max(1, keepdims=True))
                total = total + raised / raised.sum(1, keepdims=True) / 3
            expected = 100 * float((total.argmax(1) == labels).mean())
            assert evaluated[f"ensemble_test_accuracy{how}"] == expected

    def test_uniform_soup(self, evaluated: dict[str, Any], reference: Reference) -> None:
        soup = mean_of(related_states(3))
        assert evaluated["uniform_soup"] == {
            "batch_norm_as_is": reference.accuracy(soup, "test"),
            "batch_norm_reestimated": reference.accuracy(soup, "test", reestimated=True),
        }

    def test_greedy_soup_is_chosen_on_the_validation_split(
        self, evaluated: dict[str, Any], reference: Reference
    ) -> None:
        states = related_states(3)
        alone = [reference.accuracy(state, "val") for state in states]
        members: list[int] = []
        reached = -1.0
        for candidate in sorted(range(3), key=lambda k: (-alone[k], k)):
            tried = [*members, candidate]
            value = reference.accuracy(mean_of([states[k] for k in tried]), "val")
            if value >= reached:
                members, reached = tried, value
        soup = mean_of([states[k] for k in members])
        assert evaluated["greedy_soup"] == {
            "members": members,
            "batch_norm_as_is": reference.accuracy(soup, "test"),
            "batch_norm_reestimated": reference.accuracy(soup, "test", reestimated=True),
        }

    def test_numbers_above_differ(self, evaluated: dict[str, Any]) -> None:
        result = evaluated
        values = [member["test_accuracy"] for member in result["members"]]
        assert len({*values, *result["uniform_soup"].values()}) >= 4
        assert result["greedy_soup"]["members"] == [1, 0]

    def test_keys(self, evaluated: dict[str, Any], trio: Path) -> None:
        result = evaluated
        assert list(result) == [
            *("protocol", "run_dir", "epoch", "round", "members"),
            *("mean_test_accuracy", "mean_test_accuracy_reestimated"),
            *("ensemble_test_accuracy", "ensemble_test_accuracy_reestimated"),
            *("uniform_soup", "greedy_soup", "averages"),
        ]
        assert (result["protocol"], result["epoch"], result["round"]) == (1, 2, 2)
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
