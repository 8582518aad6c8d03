"""Which checkpoint a run resumes from, and how many failures it tolerates."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from small import make_runtime, write_checkpoint

from dist_graft.config import CheckpointConfig, TrainConfig
from dist_graft.errors import ConfigError, RunDirectoryError
from dist_graft.run_directory import RunDirectory
from dist_graft.training.checkpoint.files import mark_complete, save_network
from dist_graft.training.checkpoint.manager import CheckpointManager, Progress
from dist_graft.training.schedule import Position
from dist_graft.training.step import TrainResult


def manager(run: Path, *, network: int = 0, config: TrainConfig | None = None) -> CheckpointManager:
    """The manager of one of two networks."""
    directory, log = RunDirectory(run), logging.getLogger("manager")
    return CheckpointManager(config or TrainConfig(), make_runtime(network, 2), directory, log)


def at(epoch: int, step: int = 0, round_: int = 0) -> Progress:
    return Progress(Position(epoch, step, round_), lr=0.1 if step else None)


class TestChoice:
    def test_a_damaged_checkpoint_is_a_warning(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        assert manager(tmp_path).choose() == ""
        for epoch in (1, 2):
            path = write_checkpoint(tmp_path / "checkpoints", epoch)
        (path / "network01.pt").write_bytes(b"")
        assert manager(tmp_path).choose() == "epoch_0001"
        assert f"{path / 'network01.pt'} is missing or damaged" in caplog.messages[0]

    def test_a_network_loads_its_own_file(self, tmp_path: Path) -> None:
        path = write_checkpoint(tmp_path / "checkpoints", 1)
        for network in range(2):
            found, state, _ = manager(tmp_path, network=network).load("epoch_0001")
            assert (found, state["network"]) == (path, network)

    def test_a_network_reads_no_file_but_its_own(self, tmp_path: Path) -> None:
        """Rank 0 has verified all files: with 64 networks, each would otherwise read 64 files."""
        path = write_checkpoint(tmp_path / "checkpoints", 1)
        (path / "network00.pt").unlink()
        found, state, _ = manager(tmp_path, network=1).load("epoch_0001")
        assert (found, state["network"]) == (path, 1)

    def test_a_file_that_only_one_process_reads_as_damaged(self, tmp_path: Path) -> None:
        path = write_checkpoint(tmp_path / "checkpoints", 1)
        assert manager(tmp_path).choose() == "epoch_0001"
        (path / "network01.pt").write_bytes(b"")
        with pytest.raises(RunDirectoryError) as caught:
            manager(tmp_path, network=1).load("epoch_0001")
        for part in (f"{path / 'network01.pt'} is intact on rank 0", "network 1 (rank 1 on "):
            assert part in str(caught.value)

    def test_a_checkpoint_that_one_process_does_not_see(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match="does not see the checkpoint epoch_0001"):
            manager(tmp_path).load("epoch_0001")

    def test_files_in_another_order_are_an_error(self, tmp_path: Path) -> None:
        path = tmp_path / "checkpoints" / "epoch_0001"
        digests = [save_network(path / f"network0{k}.pt", {"network": 1 - k}) for k in range(2)]
        mark_complete(path, epoch=1, round_=1, sha256=digests)
        with pytest.raises(RunDirectoryError, match="holds network 1, not network 0"):
            manager(tmp_path).load("epoch_0001")


class TestSaving:
    def test_checkpoints_inside_an_epoch_never_replace_one_another(self, tmp_path: Path) -> None:
        saver = manager(tmp_path, config=TrainConfig(checkpoint=CheckpointConfig(keep=9)))
        names, reported = [], []
        for progress in (at(0, 1), at(0, 2), at(0, 3, 1), at(1, 0, 1)):
            names.append(saver.next_path(progress).name)
            saver.save(progress, {"w": torch.ones(3)})
            saver.settle()
            reported += saver.newly_completed()
            assert saver.newly_completed() == []
        assert names == [
            *("epoch_0000_round_0000", "epoch_0000_round_0000_again_1"),
            *("epoch_0000_round_0001", "epoch_0001"),
        ]
        assert reported == [tmp_path / "checkpoints" / name for name in names]

    def test_failures_in_a_row(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        options = CheckpointConfig(max_failures=1)
        saver = manager(tmp_path, config=TrainConfig(checkpoint=options))
        for epoch in (1, 4, 5, 6):
            path = tmp_path / f"checkpoints/epoch_{epoch:04d}/network00.pt"
            (path / "in the way").mkdir(parents=True)
        saver.save(at(1), {})
        assert "Is a directory" in saver.settle()
        assert "epoch_0001 is not complete" in caplog.messages[0]
        saver.save(at(3), {})
        assert saver.settle() == ""  # a success starts the count again
        saver.save(at(4), {})
        assert "Is a directory" in saver.settle()
        assert saver.settle() == ""  # nothing was written, so the count stays
        saver.save(at(5), {})
        with pytest.raises(RunDirectoryError, match=r"2 checkpoints in a row .*max_failures 1"):
            saver.settle()
        saver.save(at(6), {})
        with pytest.raises(RunDirectoryError, match="the last checkpoint is not complete"):
            saver.finish()

    def test_a_stop_that_cannot_be_saved(self, tmp_path: Path) -> None:
        saver = manager(tmp_path)
        (tmp_path / "checkpoints/epoch_0001/network00.pt/in the way").mkdir(parents=True)
        with pytest.raises(RunDirectoryError, match="the run stops, but its state was not saved"):
            saver.save_and_wait("epoch_0001", at(1), {})


class TestProgress:
    def test_it_is_restored(self) -> None:
        trained = TrainResult(1.0, 3, {"iou": 0.5}, {"iou": 10.0}, 2, 5.0, 0.5)
        progress = Progress(
            Position(1, 2, 3), 4.0, 0.1, trained, {"rounds": 1}, True, torch.ones(1, 2)
        )
        restored = Progress.from_state_dict(progress.state_dict())
        assert restored.state_dict() == progress.state_dict()
        assert restored.trained == trained

    def test_version_0_1_0_knew_accuracy_only(self) -> None:
        trained = {"loss": 2.0, "accuracy": 25.0, "images": 48, "steps": 3, "seconds": 1.0}
        state = Progress(Position(1, 3, 4), lr=0.1).state_dict() | {"trained": trained}
        del state["buffers"]
        restored = Progress.from_state_dict(state)
        assert restored.trained == TrainResult(
            2.0, 48, {"accuracy": 25.0}, {"accuracy": 48.0}, steps=3, seconds=1.0
        )
        assert restored.buffers is None
