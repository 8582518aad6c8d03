from __future__ import annotations

import hashlib
import json
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reading import contents
from small import write_set

from dist_graft.errors import RunDirectoryError
from dist_graft.run_directory import RunDirectory, write_atomically
from dist_graft.training.checkpoint.files import (
    checkpoint_path,
    clear_newer,
    complete_checkpoints,
    damaged_file,
    load_network,
    mark_complete,
    path_after,
    prune,
    save_network,
)


class TestWritingOneFile:
    def test_it_is_there_whole_and_alone(self, tmp_path: Path) -> None:
        path = tmp_path / "new" / "folder" / "file"
        write_atomically(path, b"first")
        write_atomically(path, b"second")
        assert path.read_bytes() == b"second"
        assert list(path.parent.iterdir()) == [path]

    def test_a_file_in_the_way_of_its_folder(self, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("here")
        with pytest.raises(RunDirectoryError, match=r"file/below cannot be written.*run_dir"):
            write_atomically(tmp_path / "file" / "below", b"content")
        assert (tmp_path / "file").read_text() == "here"

    def test_what_fails_leaves_nothing_behind(self, tmp_path: Path) -> None:
        """The content could be written, but not take its place: a folder has the name."""
        (tmp_path / "name" / "full").mkdir(parents=True)
        with pytest.raises(RunDirectoryError, match="name cannot be written"):
            write_atomically(tmp_path / "name", b"content")
        assert [path.name for path in tmp_path.iterdir()] == ["name"]


class TestOneNetwork:
    def test_comes_back_bit_for_bit(self, tmp_path: Path) -> None:
        model = torch.nn.Sequential(torch.nn.Conv2d(1, 2, 3), torch.nn.BatchNorm2d(2))
        model.to(memory_format=torch.channels_last)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        model(torch.rand(4, 1, 5, 5)).sum().backward()
        optimizer.step()
        state = {
            "network": 1,
            "model": model.state_dict(),
            "optimizer": optimizer.state_dict(),
            "odd": torch.tensor([float("nan"), -0.0, 1e-45]),
            "half": torch.rand(3).bfloat16(),
        }
        digest = save_network(tmp_path / "a.pt", state)
        assert digest == hashlib.sha256((tmp_path / "a.pt").read_bytes()).hexdigest()
        loaded = load_network(tmp_path / "a.pt", digest)
        for key, value in state["model"].items():
            assert torch.equal(loaded["model"][key], value)
            assert loaded["model"][key].stride() == value.stride()
        momentum = loaded["optimizer"]["state"][0]["momentum_buffer"]
        assert torch.equal(momentum, optimizer.state[model[0].weight]["momentum_buffer"])
        assert torch.equal(loaded["odd"].view(torch.int32), state["odd"].view(torch.int32))
        assert torch.equal(loaded["half"], state["half"])
        assert loaded["network"] == 1

    @pytest.mark.parametrize("hurt", ["truncated", "flipped", "missing", "empty"])
    def test_is_not_loaded_when_damaged(self, tmp_path: Path, hurt: str) -> None:
        path = tmp_path / "a.pt"
        digest = save_network(path, {"w": torch.ones(5)})
        hurt_file(path, hurt, place=0.5)
        with pytest.raises(RunDirectoryError, match=r"a\.pt is missing or damaged"):
            load_network(path, digest)


def hurt_file(path: Path, how: str, *, place: float) -> None:
    """Truncate or flip a bit of a file somewhere (0 its start, 1 its end), or remove it."""
    content = bytearray(path.read_bytes())
    index = min(int(place * len(content)), len(content) - 1)
    if how == "missing":
        path.unlink()
    elif how == "flipped":
        content[index] ^= 4
        path.write_bytes(content)
    else:
        path.write_bytes(content[: index if how == "truncated" else 0])


HURTS = st.sampled_from(["no", "no", "truncated", "flipped", "missing", "empty"])
SETS = st.dictionaries(
    st.integers(1, 12),
    st.tuples(HURTS, st.integers(0, 1), st.floats(0, 1), st.sampled_from(["yes", "half", "no"])),
    max_size=5,
)


@settings(max_examples=30)
@given(SETS)
def test_the_newest_set_that_is_complete_and_whole_is_chosen(
    sets: dict[int, tuple[str, int, float, str]],
) -> None:
    """And the damaged files of all newer complete sets are named, the newest first."""
    with tempfile.TemporaryDirectory() as name:
        directory = RunDirectory(name)
        expected, damaged, done = None, [], False
        for epoch, (hurt, network, place, complete) in sorted(sets.items(), reverse=True):
            path = write_set(directory.checkpoints, epoch, round_=epoch // 2)
            mark, file = path / "COMPLETE.json", path / f"network{network:02d}.pt"
            if complete == "half":
                mark.write_bytes(mark.read_bytes()[:40])
            elif complete == "no":
                mark.unlink()
            if hurt != "no":
                hurt_file(file, hurt, place=place)
            if complete != "no" and not done:
                if hurt == "no" and complete == "yes":
                    expected, done = epoch, True
                else:
                    damaged.append(file if complete == "yes" else mark)
        if damaged and expected is None:
            with pytest.raises(RunDirectoryError) as caught:
                directory.newest_usable()
            assert str(damaged[0]) in str(caught.value)
            assert "another run_dir" in str(caught.value)
        else:
            chosen, found = directory.newest_usable()
            assert found == damaged
            assert (chosen and chosen.epoch) == expected
            assert chosen is None or chosen.round == chosen.epoch // 2


class TestSets:
    def test_a_set_is_invisible_until_it_is_complete(self, tmp_path: Path) -> None:
        path = checkpoint_path(tmp_path, 3)
        digests = []
        for network in range(2):
            assert complete_checkpoints(tmp_path) == []
            digests.append(save_network(path / f"network{network:02d}.pt", {"network": network}))
        assert complete_checkpoints(tmp_path) == []
        mark_complete(path, epoch=3, round_=2, sha256=digests)
        (found,) = complete_checkpoints(tmp_path)
        assert (found.path, found.epoch, found.round, found.networks) == (path, 3, 2, 2)
        assert damaged_file(found) is None

    def test_what_is_written_last(self, tmp_path: Path) -> None:
        path = write_set(tmp_path, 3)
        mark = json.loads((path / "COMPLETE.json").read_text())
        hashes = {
            file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in path.glob("*.pt")
        }
        assert mark == {
            "epoch": 3,
            "round": 3,
            "networks": 2,
            "positions": [{"epoch": 3, "step": 0}] * 2,
            "sha256": hashes,
        }
        assert len(hashes) == 2

    def test_no_folder_no_sets(self, tmp_path: Path) -> None:
        assert complete_checkpoints(tmp_path / "none") == []
        clear_newer(tmp_path / "none", None)
        prune(tmp_path / "none", 1)

    def test_sets_inside_an_epoch_follow_the_one_before_it(self, tmp_path: Path) -> None:
        names = [
            "epoch_0001",
            "epoch_0001_round_0002",
            "epoch_0001_round_0002_again_1",
            "epoch_0001_round_0002_again_2",
            "epoch_0001_round_0010",
            "epoch_0002",
        ]
        newest = None
        for epoch, round_ in ((1, None), (1, 2), (1, 2), (1, 2), (1, 10), (2, None)):
            if round_ is None:
                path = checkpoint_path(tmp_path, epoch)
            else:
                path = path_after(tmp_path, epoch, round_, newest)
            newest = path.name
            digest = save_network(path / "network00.pt", {})
            mark_complete(path, epoch=epoch, round_=round_ or 0, sha256=[digest])
        assert [found.path.name for found in complete_checkpoints(tmp_path)] == names
        clear_newer(tmp_path, complete_checkpoints(tmp_path)[2])
        assert [found.path.name for found in complete_checkpoints(tmp_path)] == names[:3]

    def test_they_are_ordered_by_number_not_by_name(self, tmp_path: Path) -> None:
        for epoch in (10000, 9999, 2):
            write_set(tmp_path, epoch)
        (tmp_path / "epoch_other").mkdir()
        assert [found.epoch for found in complete_checkpoints(tmp_path)] == [2, 9999, 10000]
        assert checkpoint_path(tmp_path, 10000).name == "epoch_10000"

    @pytest.mark.parametrize("keep", [1, 2, 3, 5])
    def test_the_newest_are_kept(self, tmp_path: Path, keep: int) -> None:
        for epoch in (1, 2, 3):
            write_set(tmp_path, epoch)
        prune(tmp_path, keep)
        assert [found.epoch for found in complete_checkpoints(tmp_path)] == [1, 2, 3][-keep:]
        assert len(list(tmp_path.iterdir())) == min(keep, 3)

    def test_room_is_made_for_the_epochs_that_follow(self, tmp_path: Path) -> None:
        """Unfinished sets go; complete ones, then damaged, are put aside and not lost."""
        for epoch in (1, 2, 3, 4):
            write_set(tmp_path, epoch)
        (checkpoint_path(tmp_path, 3) / "COMPLETE.json").unlink()
        hurt_file(checkpoint_path(tmp_path, 4) / "network00.pt", "flipped", place=0.5)
        before = contents(tmp_path)
        clear_newer(tmp_path, complete_checkpoints(tmp_path)[1])
        after = contents(tmp_path)
        assert sorted(path.name for path in tmp_path.iterdir()) == [
            "epoch_0001",
            "epoch_0002",
            "epoch_0004.damaged",
        ]
        assert sorted(after.values()) == sorted(
            digest for name, digest in before.items() if not name.startswith("epoch_0003")
        )
        assert [found.epoch for found in complete_checkpoints(tmp_path)] == [1, 2]

    def test_a_set_is_put_aside_again_after_a_second_damage(self, tmp_path: Path) -> None:
        for _ in range(2):
            write_set(tmp_path, 4)
            clear_newer(tmp_path, None)
        assert [path.name for path in tmp_path.iterdir()] == ["epoch_0004.damaged"]
