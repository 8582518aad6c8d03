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
from small import write_checkpoint

from dist_graft.errors import RunDirectoryError
from dist_graft.training.checkpoint.files import (
    checkpoint_path,
    clear_newer,
    complete_checkpoints,
    damaged_file,
    load_network,
    mark_complete,
    newest_usable,
    path_after,
    prune,
    save_network,
)


class TestOneNetwork:
    def test_it_is_loaded_bit_for_bit(self, tmp_path: Path) -> None:
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

    @pytest.mark.parametrize("how", ["truncated", "flipped", "missing", "empty"])
    def test_a_damaged_file_is_an_error(self, tmp_path: Path, how: str) -> None:
        path = tmp_path / "a.pt"
        digest = save_network(path, {"w": torch.ones(5)})
        damage(path, how, place=0.5)
        with pytest.raises(RunDirectoryError, match=r"a\.pt is missing or damaged"):
            load_network(path, digest)


def damage(path: Path, how: str, *, place: float) -> None:
    """Truncate a file or flip a bit at a relative position in [0, 1], or remove it."""
    content = bytearray(path.read_bytes())
    index = min(int(place * len(content)), len(content) - 1)
    if how == "missing":
        path.unlink()
    elif how == "flipped":
        content[index] ^= 4
        path.write_bytes(content)
    else:
        path.write_bytes(content[: index if how == "truncated" else 0])


DAMAGES = st.sampled_from(["no", "no", "truncated", "flipped", "missing", "empty"])
CHECKPOINTS = st.dictionaries(
    st.integers(1, 12),
    st.tuples(DAMAGES, st.integers(0, 1), st.floats(0, 1), st.sampled_from(["yes", "half", "no"])),
    max_size=5,
)


@settings(max_examples=30)
@given(CHECKPOINTS)
def test_the_newest_intact_checkpoint_is_chosen(
    checkpoints: dict[int, tuple[str, int, float, str]],
) -> None:
    """Returns the damaged files of newer complete checkpoints, newest first."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        expected, damaged, done = None, [], False
        for epoch, (how, network, place, complete) in sorted(checkpoints.items(), reverse=True):
            path = write_checkpoint(folder, epoch, round_=epoch // 2)
            mark, file = path / "COMPLETE.json", path / f"network{network:02d}.pt"
            if complete == "half":
                mark.write_bytes(mark.read_bytes()[:40])
            elif complete == "no":
                mark.unlink()
            if how != "no":
                damage(file, how, place=place)
            if complete != "no" and not done:
                if how == "no" and complete == "yes":
                    expected, done = epoch, True
                else:
                    damaged.append(file if complete == "yes" else mark)
        if damaged and expected is None:
            with pytest.raises(RunDirectoryError) as caught:
                newest_usable(folder)
            assert str(damaged[0]) in str(caught.value)
            assert "another run_dir" in str(caught.value)
        else:
            chosen, found = newest_usable(folder)
            assert found == damaged
            assert (chosen and chosen.epoch) == expected
            assert chosen is None or chosen.round == chosen.epoch // 2


class TestCheckpoints:
    def test_a_checkpoint_is_ignored_until_it_is_complete(self, tmp_path: Path) -> None:
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

    def test_the_content_of_complete_json(self, tmp_path: Path) -> None:
        path = write_checkpoint(tmp_path, 3)
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

    def test_without_a_folder_there_are_no_checkpoints(self, tmp_path: Path) -> None:
        assert complete_checkpoints(tmp_path / "none") == []
        clear_newer(tmp_path / "none", None)
        prune(tmp_path / "none", 1)

    def test_checkpoints_inside_an_epoch_follow_the_one_before_it(self, tmp_path: Path) -> None:
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

    def test_they_are_ordered_by_number(self, tmp_path: Path) -> None:
        for epoch in (10000, 9999, 2):
            write_checkpoint(tmp_path, epoch)
        (tmp_path / "epoch_other").mkdir()
        assert [found.epoch for found in complete_checkpoints(tmp_path)] == [2, 9999, 10000]
        assert checkpoint_path(tmp_path, 10000).name == "epoch_10000"

    @pytest.mark.parametrize("keep", [1, 2, 3, 5])
    def test_prune_keeps_the_newest(self, tmp_path: Path, keep: int) -> None:
        for epoch in (1, 2, 3):
            write_checkpoint(tmp_path, epoch)
        prune(tmp_path, keep)
        assert [found.epoch for found in complete_checkpoints(tmp_path)] == [1, 2, 3][-keep:]
        assert len(list(tmp_path.iterdir())) == min(keep, 3)

    def test_prune_keeps_the_last_two_inside_an_epoch(self, tmp_path: Path) -> None:
        for epoch, round_ in ((40, None), (50, None), (70, 3), (88, 5), (90, 9)):
            path = checkpoint_path(tmp_path, epoch, round_)
            digest = save_network(path / "network00.pt", {})
            mark_complete(path, epoch=epoch, round_=round_ or epoch, sha256=[digest])
        prune(tmp_path, 2)
        assert [found.epoch for found in complete_checkpoints(tmp_path)] == [40, 50, 88, 90]
        prune(tmp_path, 1)
        assert [found.epoch for found in complete_checkpoints(tmp_path)] == [50, 90]

    def test_prune_deletes_checkpoints_inside_an_epoch_first(self, tmp_path: Path) -> None:
        """A run that stopped in epochs 1 and 3 ends with the checkpoints of one that did not."""
        for epoch, round_ in ((1, None), (1, 1), (2, None), (3, None), (3, 3), (3, 4), (4, None)):
            path = checkpoint_path(tmp_path, epoch, round_)
            digest = save_network(path / "network00.pt", {})
            mark_complete(path, epoch=epoch, round_=round_ or epoch, sha256=[digest])
            prune(tmp_path, 3)
            assert complete_checkpoints(tmp_path)[-1].path == path
        names = [found.path.name for found in complete_checkpoints(tmp_path)]
        assert names == ["epoch_0002", "epoch_0003", "epoch_0004"]

    def test_clear_newer(self, tmp_path: Path) -> None:
        """Incomplete checkpoints are deleted, damaged ones are renamed."""
        for epoch in (1, 2, 3, 4):
            write_checkpoint(tmp_path, epoch)
        (checkpoint_path(tmp_path, 3) / "COMPLETE.json").unlink()
        damage(checkpoint_path(tmp_path, 4) / "network00.pt", "flipped", place=0.5)
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

    def test_a_second_damaged_checkpoint_replaces_the_first(self, tmp_path: Path) -> None:
        for _ in range(2):
            write_checkpoint(tmp_path, 4)
            clear_newer(tmp_path, None)
        assert [path.name for path in tmp_path.iterdir()] == ["epoch_0004.damaged"]
