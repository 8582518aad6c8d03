from __future__ import annotations

import os
import pickle
from collections import defaultdict
from pathlib import Path

import pytest
import torch
from PIL import Image
from torchvision.datasets import ImageFolder

from dist_graft.config import DataConfig
from dist_graft.errors import DataError
from dist_graft.training.data import load_data
from dist_graft.training.data.image_files import ImageFiles

COUNTS = {"cat": 7, "dog": 4, "eel": 1}


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """Three classes, with folders inside them, a link, and files that are no images."""
    for name, count in COUNTS.items():
        for number in range(count):
            folder = tmp_path / "train" / name / ("deep/er" if number % 3 == 2 else "")
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"{number}.{'JPEG' if number % 2 else 'png'}").touch()
    (tmp_path / "train/cat/notes.txt").touch()
    (tmp_path / "train/README").touch()
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked/far.png").touch()
    (tmp_path / "train/dog/link").symlink_to(tmp_path / "linked")
    return tmp_path / "train"


def test_the_files_are_those_of_torchvision_round_robin_over_the_classes(tree: Path) -> None:
    expected = ImageFolder(str(tree))
    groups = defaultdict(list)
    for path, label in expected.samples:
        groups[label].append((Path(path), label))
    files = ImageFiles.read(tree)
    assert files.classes == expected.classes
    assert len(files) == len(expected.samples) == 13
    ranks = range(max(map(len, groups.values())))
    assert [files[index] for index in range(13)] == [
        groups[label][rank] for rank in ranks for label in groups if rank < len(groups[label])
    ]
    assert pickle.loads(pickle.dumps(files))[12] == files[12]  # a spawned worker


def test_a_file_takes_14_bytes_and_its_name() -> None:
    names = [f"{index:020}.jpg" for index in range(1000)]
    files = ImageFiles.of_classes(Path("train"), [("a", names[:400]), ("b", names[400:])])
    arrays = files.starts.nbytes + files.lengths.nbytes + files.labels.nbytes
    assert (len(files.names), arrays) == (24 * 1000, 14 * 1000)
    assert files[0] == (Path("train/a", names[0]), 0)
    assert files[999] == (Path("train/b", names[999]), 1)


def latin(text: str) -> str:
    """A file name in Latin-1, which is not UTF-8."""
    return os.fsdecode(text.encode("latin-1"))


def test_names_that_are_not_utf8(tmp_path: Path) -> None:
    for split in ("train", "val"):
        folder = tmp_path / split / latin("hérisson")
        folder.mkdir(parents=True)
        for name in ("bébé", "vieux"):
            Image.new("RGB", (20, 20)).save(folder / f"{latin(name)}.png")
    broken = tmp_path / "train" / latin("hérisson") / f"{latin('bébé')}.png"
    broken.write_bytes(b"damaged")
    config = DataConfig(
        name="imagefolder", root=str(tmp_path), image_size=16, workers=1, skip_broken=True
    )
    data = load_data(config, seed=0, network=0, device=torch.device("cpu"), channels_last=False)
    ((_, labels),) = data.train_batches(0, 0, 1)
    ((_, tested),) = data.eval_batches("test")
    assert (len(labels), len(tested)) == (1, 2)
    shown = f"{tmp_path}/train/h\\xe9risson/b\\xe9b\\xe9.png"
    assert data.skipped == {shown: "unknown image format"}
    (tmp_path / "val" / latin("hérisson")).rename(tmp_path / "val/other")
    with pytest.raises(DataError, match=r"h\\xe9risson is missing"):
        load_data(config, seed=0, network=0, device=torch.device("cpu"), channels_last=False)
