"""Files that carry a network's weights to other jobs."""

from __future__ import annotations

import errno
import logging
import os
import threading
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from dist_graft.population.round import publications
from dist_graft.population.round.file_choice import Place, Published
from dist_graft.population.round.publications import (
    Publication,
    PublicationError,
    Publisher,
    publication_path,
    published_places,
    write_publication,
)

PLACE = Place(3, 2, 4)
INFORMATION = (0.1, 1 / 3, 2.0)


def tensors() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    image = torch.randn(2, 3, 4, 4, generator=generator)
    return {
        "conv.weight": image.to(memory_format=torch.channels_last),
        "bn.scale": torch.randn(2, generator=generator).bfloat16(),
        "scalar": torch.tensor(0.5, dtype=torch.float64),
        "empty": torch.zeros(0, 2),
    }


def published(place: Place = PLACE, **values: object) -> Published:
    standard = {"round": 7, "schema": "abc", "information": INFORMATION, "lr": 0.1}
    return Published(network=1, place=place, **standard | values)  # type: ignore[arg-type]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return write_publication(tmp_path / "network01", published(resume=Place(2)), tensors())


def read_all(path: Path) -> dict[str, Tensor]:
    with Publication(path) as publication:
        return {key: publication.read(key) for key in publication.keys}


def test_a_publication_holds_the_exact_weights(path: Path) -> None:
    assert path.name == "epoch_0003_step_2.safetensors"
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    for found in (read_all(path), load_file(path)):
        assert set(found) == set(tensors())
        for key, tensor in tensors().items():
            assert found[key].dtype == tensor.dtype
            assert torch.equal(found[key], tensor)


def test_a_publication_describes_its_network(path: Path) -> None:
    with Publication(path) as publication:
        found = publication.published
    assert found == published(resume=Place(2), digest=found.digest)
    assert (found.place.epochs, found.place.steps_per_epoch) == (3.5, 4)
    metadata = safe_open(path, "pt").metadata()
    assert {"epoch", "step", "round", "information", "schema", "lr", "dist_graft"} < set(metadata)
    assert metadata["sha256"] == found.digest


def test_the_same_weights_have_the_same_digest(path: Path, tmp_path: Path) -> None:
    again = write_publication(tmp_path / "again", published(resume=Place(2)), tensors())
    other = write_publication(tmp_path / "other", published(resume=Place(1)), tensors())
    digests = []
    for each in (path, again, other):
        with Publication(each) as publication:
            digests.append(publication.published.digest)
    assert digests[0] == digests[1] != digests[2]


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_no_changed_byte_reaches_a_reader(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    folder = tmp_path_factory.mktemp("flipped")
    path = write_publication(folder, published(), tensors())
    content = bytearray(path.read_bytes())
    header = int.from_bytes(content[:8], "little")
    position = data.draw(st.integers(0, len(content) - 1))
    content[position] ^= data.draw(st.integers(1, 255))
    path.write_bytes(content)
    padding = range(8 + len(content[8 : 8 + header].rstrip()), 8 + header)
    try:
        with Publication(path) as publication:
            publication.check_tensors(tensors())
            found = {key: publication.read(key) for key in tensors()}
            described = publication.published
    except PublicationError:
        return
    assert described == published(digest=described.digest) or position in padding
    for key, tensor in tensors().items():
        assert torch.equal(found[key], tensor)


@settings(max_examples=30, deadline=None)
@given(part=st.floats(0, 1, exclude_max=True))
def test_a_truncated_file_is_refused(tmp_path_factory: pytest.TempPathFactory, part: float) -> None:
    path = write_publication(tmp_path_factory.mktemp("cut"), published(), tensors())
    os.truncate(path, int(part * path.stat().st_size))
    with pytest.raises(PublicationError):
        read_all(path)


def test_other_things_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "epoch_0001.safetensors"
    for content in (b"", b"1234567", b"\xff" * 100, (2).to_bytes(8, "little") + b"[]"):
        path.write_bytes(content)
        with pytest.raises(PublicationError, match=r"truncated|safetensors|another program"):
            Publication(path)
    save_file(tensors() | {"conv.weight": torch.ones(1)}, path)
    with pytest.raises(PublicationError, match="another program"):
        Publication(path)
    path.unlink()
    with pytest.raises(PublicationError, match="No such file"):
        Publication(path)
    os.mkfifo(path)
    with pytest.raises(PublicationError, match="not a file"):
        Publication(path)
    with pytest.raises(PublicationError, match="not a file"):
        Publication(tmp_path)


def test_a_file_that_shrinks_while_it_is_open_raises_an_error(path: Path) -> None:
    with Publication(path) as publication:
        os.truncate(path, 8)
        with pytest.raises(PublicationError, match="truncated"):
            publication.read("conv.weight")


def test_weights_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    bad = tensors() | {"scalar": torch.tensor(float("nan"), dtype=torch.float64)}
    path = write_publication(tmp_path, published(), bad)
    with Publication(path) as publication, pytest.raises(PublicationError, match="scalar is not"):
        publication.read("scalar")


@pytest.mark.parametrize(
    ("key", "tensor"),
    [("scalar", torch.tensor(0.5)), ("empty", torch.zeros(0, 3)), ("more", torch.zeros(1))],
)
def test_other_tensors_are_refused_by_name(path: Path, key: str, tensor: Tensor) -> None:
    with Publication(path) as publication, pytest.raises(PublicationError, match=key):
        publication.check_tensors(tensors() | {key: tensor})


class TestPublisher:
    def publish(self, publisher: Publisher, *epochs: int, needed_from: int | None = None) -> None:
        floor = None if needed_from is None else Place(needed_from)
        for epoch in epochs:
            publisher.publish(published(Place(epoch)), tensors(), floor)
            publisher.flush()

    def epochs(self, folder: Path) -> list[int]:
        return [place.epoch for place in published_places(folder, 1)]

    def test_the_newest_two_stay(self, tmp_path: Path) -> None:
        self.publish(Publisher(tmp_path, keep_all=False), 1, 2, 3, 4)
        assert self.epochs(tmp_path) == [3, 4]

    def test_what_a_network_may_still_need_stays(self, tmp_path: Path) -> None:
        publisher = Publisher(tmp_path, keep_all=True)
        self.publish(publisher, 1, 2, 3, 4, needed_from=0)
        assert self.epochs(tmp_path) == [1, 2, 3, 4]
        self.publish(publisher, 5, needed_from=3)
        assert self.epochs(tmp_path) == [3, 4, 5]

    def test_publications_of_lost_work_are_deleted(self, tmp_path: Path) -> None:
        publisher = Publisher(tmp_path, keep_all=False)
        self.publish(publisher, 4, 5)
        publisher.discard_after(Place(4))
        assert self.epochs(tmp_path) == [4]

    def test_files_of_a_killed_job_are_deleted(self, tmp_path: Path) -> None:
        (tmp_path / ".epoch_0001.safetensors.99").write_text("half")
        self.publish(Publisher(tmp_path, keep_all=False), 2)
        assert [path.name for path in tmp_path.iterdir()] == ["epoch_0002.safetensors"]

    def test_a_newer_publication_replaces_one_that_waits(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        started, proceed = threading.Event(), threading.Event()

        def slow(folder: Path, published: Published, tensors: dict[str, Tensor]) -> Path:
            started.set()
            assert proceed.wait(30)
            return write_publication(folder, published, tensors)

        monkeypatch.setattr(publications, "write_publication", slow)
        publisher = Publisher(tmp_path, keep_all=False)
        for epoch in (1, 2, 3):
            publisher.publish(published(Place(epoch)), tensors(), None)
            assert started.wait(30)
        proceed.set()
        publisher.flush()
        assert self.epochs(tmp_path) == [1, 3]

    def test_a_full_disk_is_a_warning_and_the_publication_is_tried_again(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(publications, "_RETRY_SECONDS", 0.01)
        failures = iter([OSError(errno.ENOSPC, "No space left on device")] * 2)

        def full_at_first(folder: Path, published: Published, tensors: dict[str, Tensor]) -> Path:
            if error := next(failures, None):
                raise error
            written.set()
            return write_publication(folder, published, tensors)

        written = threading.Event()
        monkeypatch.setattr(publications, "write_publication", full_at_first)
        publisher = Publisher(tmp_path, keep_all=True)
        with caplog.at_level(logging.WARNING, logger="dist_graft"):
            publisher.publish(published(Place(1)), tensors(), Place(0))
            assert written.wait(30)
            publisher.flush()
        assert self.epochs(tmp_path) == [1]
        first, last = caplog.messages
        assert f"{publication_path(tmp_path, Place(1))} cannot be written: No space left" in first
        assert "training continues" in first
        assert "publishing resumed" in last

    def test_flush_ends_on_a_disk_that_refuses(self, tmp_path: Path) -> None:
        folder = tmp_path / "network01"
        folder.write_text("a file where the folder should be")
        publisher = Publisher(folder, keep_all=True)
        publisher.publish(published(Place(1)), tensors(), Place(0))
        publisher.flush()
        assert folder.is_file()
