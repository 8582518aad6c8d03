"""Commands on real runs."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from launching import run_population
from reading import checkpoint

import dist_graft
from dist_graft import cli
from dist_graft.config import ModelConfig
from dist_graft.training.models import build_model


@pytest.fixture(scope="module")
def validated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run of two networks over two epochs with a validation split."""
    run = tmp_path_factory.mktemp("validated") / "run"
    options = ("--epochs", "2", "--data.val_fraction", "0.5", "--monitor.tensorboard", "false")
    run_population(2, run, *options, "--data.batch_size", "16")
    return run


@pytest.fixture(autouse=True)
def _restore_threads() -> Any:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def read(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(path.read_text())
    return content


def test_evaluate_equals_the_summary_after_the_last_round(
    validated: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.run(["evaluate", str(validated)]) == 0
    output = capsys.readouterr().out
    result, summary = read(validated / "evaluation.json"), read(validated / "summary.json")
    assert (result["epoch"], result["round"]) == (2, 2)
    for member, network in zip(result["members"], summary["networks"], strict=True):
        assert member["test_accuracy"] == network["accuracy_after_last_round"]
        assert member["lr"] == network["lr"]
        assert 0 <= member["val_accuracy"] <= 100
    assert result["mean_test_accuracy"] == summary["mean_accuracy_after_last_round"]
    assert result["ensemble_test_accuracy"] == summary["ensemble_accuracy_after_last_round"]
    assert set(result["greedy_soup"]["members"]) <= {0, 1}
    assert "greedy soup of" in output


def test_evaluate_without_rounds_equals_the_summary(
    independent: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = shutil.copytree(independent, tmp_path / "run")  # the fixture is shared
    assert cli.run(["evaluate", str(run), "--batch_norm_batches", "1"]) == 0
    assert "no greedy soup: the run has no validation split" in capsys.readouterr().out
    result, summary = read(run / "evaluation.json"), read(run / "summary.json")
    for member, network in zip(result["members"], summary["networks"], strict=True):
        assert member["test_accuracy"] == network["accuracy_after_last_round"]
    assert result["ensemble_test_accuracy"] == summary["ensemble_accuracy_after_last_round"]


def test_export_writes_the_weights_of_the_checkpoint(
    validated: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.run(["export", str(validated)]) == 0
    assert "weights_only=True" in capsys.readouterr().out
    model = build_model(ModelConfig(name="resnet20"), num_classes=10, channels=1)
    for network in (0, 1):
        path = validated / f"export/network{network:02d}.pt"
        model.load_state_dict(torch.load(path, weights_only=True))
        saved = checkpoint(validated, 2, network)["model"]
        assert all(torch.equal(tensor, saved[key]) for key, tensor in model.state_dict().items())


def test_exported_network_is_loaded_with_its_preprocessing(validated: Path) -> None:
    assert cli.run(["export", str(validated), "--format", "safetensors"]) == 0
    model = dist_graft.load(validated / "export/network01.safetensors")
    assert model.classes == read(validated / "classes.json")["classes"]
    saved = checkpoint(validated, 2, 1)["model"]
    expected = build_model(ModelConfig(name="resnet20"), num_classes=10, channels=1)
    expected.load_state_dict(saved)
    image = torch.randint(0, 256, (1, 28, 28), dtype=torch.uint8)
    inputs = (image / 255 - 0.286) / 0.353
    with torch.no_grad():
        torch.testing.assert_close(
            model(model.preprocess(image)[None]), expected.eval()(inputs[None])
        )


def test_inspect_two_runs(
    validated: Path, independent: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sources = (str(validated), str(independent))
    assert cli.run(["inspect", *sources, "--out", str(tmp_path / "inspect")]) == 0
    assert "layer3.2.conv2" in capsys.readouterr().out
    with (tmp_path / "inspect/inspect.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == 2 * 2 * 688
    first = checkpoint(validated, 2, 0)["model"]["conv1.weight"][0].abs().sum().item()
    assert float(lines[0]["l1_norm"]) == pytest.approx(first, rel=1e-5)
    assert {path.suffix for path in (tmp_path / "inspect").iterdir()} == {".csv", ".png"}
