"""Data with other classes than those of the run are refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from image_folders import write_images
from launching import end_population, error_line, run_population

from dist_graft import cli

OPTIONS = (
    *("--model.name", "resnet8", "--data.name", "imagefolder", "--data.image_size", "16"),
    *("--data.workers", "0", "--data.batch_size", "4", "--monitor.loggers", "[]"),
    *("--data.train_samples", "null", "--data.test_samples", "null"),
    *("--optim.schedule", "constant"),
)
SAYS = "but the run was trained on blue, green, red: pass the root of the same data"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run directory of two networks after one epoch on three classes, in ../photos."""
    folder = tmp_path_factory.mktemp("classes")
    root = write_images(folder / "photos", "blue", "green", "red")
    run_population(2, folder / "run", *OPTIONS, "--data.root", str(root), "--epochs", "1")
    return folder / "run"


def other_data(run: Path, tmp_path: Path, *, added: bool) -> Path:
    """A copy of the run's data in which a class folder was renamed or added."""
    root = shutil.copytree(run.parent / "photos", tmp_path / "photos2")
    for split in ("train", "val"):
        if added:
            shutil.copytree(root / split / "red", root / split / "apple")
        else:
            (root / split / "red").rename(root / split / "apple")
    return root


@pytest.mark.parametrize("added", [False, True])
def test_resume_and_evaluate(
    added: bool, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = other_data(run, tmp_path, added=added)
    classes = (run / "classes.json").read_text()
    says = f"{root} has the classes apple, blue, green{', red' * added}, {SAYS}"

    ends = end_population(2, run, *OPTIONS, "--data.root", str(root), "--epochs", "2")
    for network, done in enumerate(ends):
        log = run / f"network{network:02d}/log.txt"
        assert error_line(done, log=log).endswith(says)
    assert (run / "classes.json").read_text() == classes

    assert cli.run(["evaluate", str(run), "--data.root", str(root)]) == 1
    assert says in capsys.readouterr().err
    assert not (run / "evaluation.json").exists()


def test_the_same_data_elsewhere(run: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(run, tmp_path / "run")
    root = str(shutil.copytree(run.parent / "photos", tmp_path / "moved"))
    assert cli.run(["evaluate", str(copy), "--data.root", root]) == 0
    run_population(2, copy, *OPTIONS, "--data.root", root, "--epochs", "2")
    summary = json.loads((copy / "summary.json").read_text())
    assert len(summary["networks"]) == 2
