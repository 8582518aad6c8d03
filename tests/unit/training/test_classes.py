from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from image_folders import write_images

from dist_graft.config import DataConfig
from dist_graft.errors import DataError, RunDirectoryError
from dist_graft.run_directory import RunDirectory
from dist_graft.training.checkpoint.files import mark_complete, save_network
from dist_graft.training.classes import refuse_other_classes
from dist_graft.training.data import load_data

TRAINED_ON = ("blue", "green", "red")


def add_checkpoint(directory: RunDirectory) -> None:
    folder = directory.checkpoints / "epoch_0001"
    digest = save_network(folder / "network00.pt", {"network": 0})
    mark_complete(folder, epoch=1, round_=1, sha256=[digest])


@pytest.fixture
def directory(tmp_path: Path) -> RunDirectory:
    """A run with a checkpoint that was trained on three classes."""
    run = RunDirectory(tmp_path / "run")
    run.write_classes(TRAINED_ON, {})
    add_checkpoint(run)
    return run


def check(directory: RunDirectory, root: Path) -> None:
    config = DataConfig(name="imagefolder", root=str(root), image_size=16, workers=0)
    device = torch.device("cpu")
    data = load_data(config, seed=0, network=0, device=device, channels_last=False)
    refuse_other_classes(directory, data, config.root)


@pytest.mark.parametrize("classes", [("apple", "blue", "green"), ("blue", "green"), ("blue",)])
def test_other_classes(classes: tuple[str, ...], directory: RunDirectory, tmp_path: Path) -> None:
    root = write_images(tmp_path / "photos2", *classes)
    with pytest.raises(DataError) as caught:
        check(directory, root)
    assert str(caught.value) == (
        f"{root} has the classes {', '.join(classes)}, but the run was trained on blue, green, "
        "red: pass the root of the same data"
    )


def test_the_same_classes_elsewhere(directory: RunDirectory, tmp_path: Path) -> None:
    check(directory, write_images(tmp_path / "moved", *TRAINED_ON))


@pytest.mark.parametrize(
    ("removed", "added", "says"),
    [
        ("n07", "m", "40 classes, but the run was trained on 40; the first that differs is m"),
        ("n39", None, "39 classes, but the run was trained on 40; the first that differs is none"),
    ],
)
def test_of_a_long_list_the_first_difference_is_named(
    removed: str, added: str | None, says: str, directory: RunDirectory, tmp_path: Path
) -> None:
    before = [f"n{number:02d}" for number in range(40)]
    directory.write_classes(before, {})
    names = [name for name in (*before, added) if name and name != removed]
    root = write_images(tmp_path / "photos2", *names, count=1)
    with pytest.raises(DataError) as caught:
        check(directory, root)
    old = "n00" if added else "n39"  # m comes first
    advice = "pass the root of the same data"
    assert str(caught.value) == f"{root} has {says}, which was {old}: {advice}"


def test_names_need_not_be_utf8(directory: RunDirectory, tmp_path: Path) -> None:
    name = os.fsdecode(b"caf\xe9")
    root = write_images(tmp_path / "photos2", name)
    with pytest.raises(DataError, match=r"has the classes caf\\xe9, but the run was trained on"):
        check(directory, root)
    directory.write_classes([name], {})
    check(directory, root)


def test_a_run_that_was_never_trained_takes_other_classes(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "run")
    run.write_classes(TRAINED_ON, {})
    check(run, write_images(tmp_path / "photos2", "apple", "blue"))


def test_a_job_without_a_checkpoint_joins_networks_that_have_one(tmp_path: Path) -> None:
    first, second = (RunDirectory(tmp_path / "run", job=network) for network in (0, 1))
    first.write_classes(TRAINED_ON, {})
    add_checkpoint(first)
    with pytest.raises(DataError, match="the run was trained on blue, green, red"):
        check(second, write_images(tmp_path / "photos2", "apple", "blue"))


def test_a_run_of_an_older_version_is_not_checked(directory: RunDirectory, tmp_path: Path) -> None:
    directory.classes.unlink()
    check(directory, write_images(tmp_path / "photos2", "apple", "blue"))


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"classes": 3}'])
def test_damaged_classes(content: str, directory: RunDirectory, tmp_path: Path) -> None:
    directory.classes.write_text(content)
    with pytest.raises(RunDirectoryError, match=r"classes\.json cannot be read \(.*restore"):
        check(directory, write_images(tmp_path / "moved", *TRAINED_ON))
