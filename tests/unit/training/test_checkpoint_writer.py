"""Checkpoints written in the background by networks of one process, over a real store."""

from __future__ import annotations

import gc
import os
import pickle
import socket
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from reading import contents
from small import write_checkpoint
from torch import nn

from dist_graft.errors import PeerError
from dist_graft.population.runtime.peers import PeerRegistry
from dist_graft.training.checkpoint.files import (
    checkpoint_path,
    complete_checkpoints,
    damaged_file,
    load_network,
)
from dist_graft.training.checkpoint.writer import CheckpointWriter, Outcome, to_host_memory
from dist_graft.training.schedule import Position

MakeWriters = Callable[..., list[CheckpointWriter]]


@pytest.fixture
def make_writers(store: dist.Store) -> MakeWriters:
    """One writer per network, all in this process."""

    def make(networks: int = 2, *, seconds: float = 60.0, keep: int = 2) -> list[CheckpointWriter]:
        for network in range(networks):
            store.set(f"host/{network}", socket.gethostname())
            store.set(f"process/{network}", str(os.getpid()))
        return [
            CheckpointWriter(
                network, PeerRegistry(store, network, networks), seconds=lambda: seconds, keep=keep
            )
            for network in range(networks)
        ]

    return make


def state_of(network: int, value: float = 1.0) -> dict[str, Any]:
    return {"network": network, "w": torch.full((50,), value + network)}


def save(
    writers: list[CheckpointWriter], path: Path, position: Position | None = None
) -> list[Outcome]:
    for network, writer in enumerate(writers):
        writer.start(path.name, path, position or Position(1, 0, 1), state_of(network))
    outcomes = [writer.result() for writer in writers]
    assert all(outcomes)
    return [outcome for outcome in outcomes if outcome]


def test_a_checkpoint_of_all_networks(tmp_path: Path, make_writers: MakeWriters) -> None:
    writers, path = make_writers(3), checkpoint_path(tmp_path, 2, 5)
    for network, writer in enumerate(writers):
        writer.start("label", path, Position(2, 10 + network, 5), state_of(network))
    assert [writer.result() for writer in writers] == [Outcome(path=path)] * 3
    (found,) = complete_checkpoints(tmp_path)
    assert (found.path, found.epoch, found.round, found.networks) == (path, 2, 5, 3)
    assert damaged_file(found) is None
    text = (path / "COMPLETE.json").read_text()
    assert all(f'"step": {10 + network}' in text for network in range(3))
    for network in range(3):
        name = f"network{network:02d}.pt"
        loaded = load_network(path / name, found.sha256[name])
        assert loaded["network"] == network
        assert torch.equal(loaded["w"], state_of(network)["w"])
    assert len(list(path.iterdir())) == 4


def test_a_single_network(tmp_path: Path) -> None:
    writer = CheckpointWriter(0, None, seconds=lambda: 0.0, keep=1)
    assert writer.result() is None
    assert not writer.busy
    for epoch in (1, 2):
        writer.start("a", checkpoint_path(tmp_path, epoch), Position(epoch, 0, epoch), state_of(0))
        assert writer.result() == Outcome(path=checkpoint_path(tmp_path, epoch))
        assert writer.result() is None
    assert [found.epoch for found in complete_checkpoints(tmp_path)] == [2]


def test_it_is_busy_until_the_checkpoint_is_complete(
    tmp_path: Path, make_writers: MakeWriters
) -> None:
    first, second = make_writers()
    second.start("label", tmp_path / "epoch_0001", Position(1, 0, 1), state_of(1))
    assert second.busy
    assert complete_checkpoints(tmp_path) == []
    first.start("label", tmp_path / "epoch_0001", Position(1, 0, 1), state_of(0))
    assert first.result() == second.result() == Outcome(path=tmp_path / "epoch_0001")
    assert not first.busy
    assert not second.busy


def test_later_changes_are_not_saved(tmp_path: Path, make_writers: MakeWriters) -> None:
    writers, path = make_writers(), checkpoint_path(tmp_path, 1)
    for network, writer in enumerate(writers):
        state = state_of(network)
        writer.start("label", path, Position(1, 0, 1), state)
        state["w"].fill_(-1.0)
        state["network"] = 9
    assert [writer.result() for writer in writers] == [Outcome(path=path)] * 2
    for network in range(2):
        loaded = torch.load(path / f"network{network:02d}.pt", weights_only=True)
        assert loaded["network"] == network
        assert (loaded["w"] == 1.0 + network).all()


@pytest.mark.parametrize("networks", [2, 3])
@pytest.mark.parametrize("failing", [0, 1])
def test_one_failure_makes_the_checkpoint_incomplete_for_all(
    tmp_path: Path, make_writers: MakeWriters, networks: int, failing: int
) -> None:
    """Its files are deleted, older checkpoints are kept, and the next one succeeds."""
    write_checkpoint(tmp_path, 1, networks=networks)
    before, writers = contents(tmp_path), make_writers(networks, keep=1)
    path = checkpoint_path(tmp_path, 2)
    (path / f"network{failing:02d}.pt" / "in the way").mkdir(parents=True)
    outcomes = save(writers, path)
    assert len(set(outcomes)) == 1
    assert outcomes[0].path == path
    assert f"network{failing:02d}.pt cannot be written: Is a directory" in outcomes[0].failure
    assert contents(tmp_path) == before
    assert not path.exists()
    later = checkpoint_path(tmp_path, 3)
    assert save(writers, later, Position(3, 0, 3)) == [Outcome(path=later)] * networks
    assert [found.epoch for found in complete_checkpoints(tmp_path)] == [3]


def test_complete_json_that_cannot_be_written(
    tmp_path: Path, make_writers: MakeWriters, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_checkpoint(tmp_path, 1)
    before, path = contents(tmp_path), checkpoint_path(tmp_path, 2)
    monkeypatch.setattr("secrets.token_hex", lambda length: "taken")
    (path / ".COMPLETE.json.taken").mkdir(parents=True)
    first, second = save(make_writers(), path)
    assert first == second
    assert "COMPLETE.json cannot be written" in first.failure
    assert [found.epoch for found in complete_checkpoints(tmp_path)] == [1]
    assert contents(tmp_path) == before


@pytest.mark.parametrize("keep", [1, 2, 5])
def test_the_newest_checkpoints_are_kept(
    tmp_path: Path, make_writers: MakeWriters, keep: int
) -> None:
    """An older incomplete one is deleted."""
    (checkpoint_path(tmp_path, 1, 3) / "half").mkdir(parents=True)
    writers = make_writers(keep=keep)
    for epoch in (2, 3, 4):
        outcomes = save(writers, checkpoint_path(tmp_path, epoch), Position(epoch, 0, epoch))
        assert not any(outcome.failure for outcome in outcomes)
    assert (
        sorted(path.name for path in tmp_path.iterdir())
        == [f"epoch_{epoch:04d}" for epoch in (2, 3, 4)][-keep:]
    )


def test_abandon_ends_the_wait_for_other_networks(
    tmp_path: Path, make_writers: MakeWriters
) -> None:
    """Older checkpoints are kept, and saving the next one waits again."""
    write_checkpoint(tmp_path, 1)
    first, second = make_writers()
    path = checkpoint_path(tmp_path, 2)
    first.start("lost", path, Position(2, 0, 2), state_of(0))
    first.abandon()
    outcome = first.result()
    assert outcome
    assert "network 1 (rank 1 on" in outcome.failure
    assert "did not respond" in outcome.failure
    assert [found.epoch for found in complete_checkpoints(tmp_path)] == [1]
    later = checkpoint_path(tmp_path, 3)
    assert save([first, second], later) == [Outcome(path=later)] * 2


def test_a_network_that_does_not_write_is_named_after_the_timeout(
    tmp_path: Path, make_writers: MakeWriters
) -> None:
    first, second = make_writers(seconds=0.05)
    first.start("one", checkpoint_path(tmp_path, 1), Position(1, 0, 1), state_of(0))
    outcome = first.result()
    assert outcome
    assert "network 1 (rank 1 on" in outcome.failure
    second.start("two", checkpoint_path(tmp_path, 2), Position(2, 0, 1), state_of(1))
    with pytest.raises(PeerError, match=r"network 0 \(rank 0 on .*did not respond within"):
        second.result()
    assert complete_checkpoints(tmp_path) == []


def test_errors_other_than_of_the_disk_are_raised(tmp_path: Path) -> None:
    writer = CheckpointWriter(0, None, seconds=lambda: 0.0, keep=1)
    writer.start("a", checkpoint_path(tmp_path, 1), Position(), {"state": lambda: None})
    with pytest.raises((AttributeError, pickle.PicklingError), match="lambda"):
        writer.result()
    assert complete_checkpoints(tmp_path) == []


def test_the_thread_ends_before_the_result_is_returned(
    make_writers: MakeWriters, tmp_path: Path
) -> None:
    """A thread that still frees its copies aborts an interpreter that exits."""
    (writer,) = make_writers(1)
    writer.start("a", checkpoint_path(tmp_path, 1), Position(1), {"weight": torch.rand(1000, 1000)})
    writer.result()
    assert not [one for one in threading.enumerate() if one.name.startswith("checkpoint ")]


class TestToHostMemory:
    def test_tensors_that_share_storage_share_their_copy(self) -> None:
        weight = nn.Parameter(torch.rand(3, 4))
        copied = to_host_memory({"a": weight, "b": [weight.detach(), torch.rand(3, 4)]})
        assert copied["a"] is copied["b"][0]
        assert copied["b"][1] is not copied["a"]
        assert torch.equal(copied["a"], weight)
        assert copied["a"].data_ptr() != weight.data_ptr()
        assert not copied["a"].requires_grad

    def test_views_of_other_shapes(self) -> None:
        weight = torch.arange(16.0).view(4, 4)
        views = {
            "whole": weight,
            "flat": weight.view(-1),
            "turned": weight.t(),
            "row": weight[0],
            "every other": weight.view(-1)[::2],
            "bits": weight.view(torch.int32),
            "none": weight[:0],
            "of another type": weight[:0].int(),
        }
        copied = to_host_memory(views)
        for name, view in views.items():
            assert copied[name].dtype == view.dtype, name
            assert torch.equal(copied[name], view), name
        assert copied["turned"].stride() == (1, 4)

    def test_strides_and_bits_are_kept(self) -> None:
        image = torch.rand(2, 3, 4, 5).to(memory_format=torch.channels_last)
        odd = torch.tensor([float("nan"), -0.0, 1e-45])
        copied = to_host_memory([image, odd, torch.tensor(2**60), torch.tensor(True)])
        assert copied[0].stride() == image.stride()
        assert torch.equal(copied[1].view(torch.int32), odd.view(torch.int32))
        assert copied[2].item() == 2**60
        assert copied[3].item() is True

    def test_the_copies_are_freed_with_their_last_reference(self) -> None:
        """Immediately, not when garbage is collected: the next checkpoint needs the memory."""
        copied = to_host_memory({"model": [torch.rand(3, 4)]})
        copy = weakref.ref(copied["model"][0])
        gc.disable()
        try:
            del copied
            assert copy() is None
        finally:
            gc.enable()

    def test_a_state_dict_keeps_its_metadata(self) -> None:
        model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2))
        state = model.state_dict()
        copied = to_host_memory(state)
        assert isinstance(copied, OrderedDict)
        assert list(copied) == list(state)
        assert copied._metadata == state._metadata
        assert all(torch.equal(copied[key], state[key]) for key in state)
        model.load_state_dict(copied)

    def test_later_changes_of_the_original_have_no_effect(self) -> None:
        model = nn.Conv2d(1, 2, 3)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        model(torch.rand(1, 1, 3, 3)).sum().backward()
        optimizer.step()
        whole = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "at": (1, 2.5)}
        copied = to_host_memory(whole)
        weight = model.weight.detach().clone()
        momentum = optimizer.state[model.weight]["momentum_buffer"].clone()
        with torch.no_grad():
            model.weight.fill_(7.0)
        optimizer.state[model.weight]["momentum_buffer"].fill_(7.0)
        optimizer.param_groups[0]["lr"] = 7.0
        whole["model"]["more"] = torch.zeros(1)
        assert torch.equal(copied["model"]["weight"], weight)
        assert torch.equal(copied["optimizer"]["state"][0]["momentum_buffer"], momentum)
        assert copied["optimizer"]["param_groups"][0]["lr"] == 0.1
        assert copied["at"] == (1, 2.5)
        assert "more" not in copied["model"]
