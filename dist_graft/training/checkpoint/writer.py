"""Writes checkpoints in the background: one thread, one checkpoint at a time."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Hashable, Mapping, Sequence
from concurrent.futures import Future
from copy import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dist_graft.errors import DistGraftError, LeaseLostError, RunDirectoryError
from dist_graft.grafting.units import storage_key
from dist_graft.population.runtime.peers import PeerRegistry
from dist_graft.training.checkpoint.files import (
    discard_incomplete,
    mark_complete,
    network_file,
    prune,
    save_network,
)
from dist_graft.training.schedule import Position

_COMPLETE = "complete"
_FAILED = "failed "
_CLOSE_SECONDS = 5.0


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """Result of writing one checkpoint, identical on all ranks."""

    path: Path
    failure: str = ""
    """Why it is not complete; empty on success."""


class CheckpointWriter:
    """Writes one network's file of each checkpoint; rank 0 marks the checkpoint complete.

    Checksums travel through the run's key-value store, on a connection that only the writer's
    thread uses.

    Args:
        network: index of this process's network.
        peers: registry of the run; None for a process alone.
        is_leader: whether this process writes its network's file.
        seconds: returns how long to wait for the files of the other networks.
        keep: number of newest checkpoints to keep.
        first: number of the first network in the checkpoint.
        check: called before a file is written; raises RunDirectoryError to refuse it.
    """

    def __init__(
        self,
        network: int,
        peers: PeerRegistry | None,
        *,
        is_leader: bool = True,
        seconds: Callable[[], float],
        keep: int,
        first: int = 0,
        check: Callable[[], object] = lambda: None,
    ) -> None:
        self._network = network
        self._is_leader = is_leader
        self._peers = peers.clone() if peers else None
        self._seconds = seconds
        self._keep = keep
        self._first = first
        self._check = check
        self._abandoned = threading.Event()
        self.resumed_networks: Sequence[int | str] | None = None
        """As in `Checkpoint`."""
        self.completed: list[Path] = []
        """Checkpoints that are complete, in order."""
        self._pending: Future[Outcome] | None = None
        self._thread: threading.Thread | None = None

    def start(self, label: str, path: Path, position: Position, state: Mapping[str, Any]) -> None:
        """Copy the state to host memory, and start writing it.

        Args:
            label: unique per checkpoint, identical on all ranks.
            path: folder of the checkpoint.
            position: of this network.
            state: content of the file; the caller may change it once this returns.
        """
        assert self._pending is None
        copied = to_host_memory(state) if self._is_leader else {}
        pending: Future[Outcome] = Future()
        self._abandoned.clear()
        returning = threading.Event()

        def write() -> None:
            returning.wait()  # otherwise the interpreter may run this thread first for a while
            try:
                pending.set_result(self._write(label, path, position, copied))
            except BaseException as error:  # noqa: BLE001  re-raised by `result`
                pending.set_exception(error)

        self._thread = threading.Thread(target=write, name=f"checkpoint {label}", daemon=True)
        self._pending = pending
        try:
            self._thread.start()
        finally:
            returning.set()

    @property
    def busy(self) -> bool:
        """Whether a checkpoint is being written."""
        return self._pending is not None and not self._pending.done()

    def abandon(self) -> None:
        """Stop waiting for the files of other networks, which may never be written."""
        self._abandoned.set()

    def close(self) -> None:
        """Abandon the checkpoint that is being written, and wait a few seconds for its thread."""
        self.abandon()
        if self._thread is not None:
            self._thread.join(_CLOSE_SECONDS)

    def result(self) -> Outcome | None:
        """Wait for the checkpoint that is being written; None when there is none.

        Raises: PeerError when another network exited or did not respond.
        """
        pending, self._pending = self._pending, None
        if pending is None or self._thread is None:
            return None
        self._thread.join()  # also frees the copied state
        return pending.result()

    def _write(
        self, label: str, path: Path, position: Position, state: Mapping[str, Any]
    ) -> Outcome:
        written = self._save(path, position, state) if self._is_leader else ""
        peers = self._peers
        if peers:
            peers.publish(f"{label} written", written)
        if peers and peers.rank != 0:
            # Longer than rank 0 waits for the files, so that rank 0 can name the rank that is late.
            verdict = peers.read(f"{label} complete", 0, 2 * self._seconds())
        else:
            verdict = self._complete(label, path, position, written)
            if peers:
                peers.publish(f"{label} complete", verdict)
        if verdict == _COMPLETE:
            self.completed.append(path)
            return Outcome(path=path)
        return Outcome(path=path, failure=verdict)

    def _save(self, path: Path, position: Position, state: Mapping[str, Any]) -> str:
        try:
            self._check()
            digest = save_network(path / network_file(self._network), state)
        except RunDirectoryError as error:
            return f"{_FAILED}{error}"
        return f"{digest} {position.epoch} {position.step}"

    def _complete(self, label: str, path: Path, position: Position, written: str) -> str:
        try:
            texts = [written]
            if self._peers:
                texts = self._peers.collect(
                    f"{label} written",
                    self._seconds(),
                    ranks=self._peers.leaders,
                    cancelled=self._abandoned.is_set,
                )
            for text in texts:
                if text.startswith(_FAILED):
                    raise RunDirectoryError(text.removeprefix(_FAILED))
            saved = [text.split() for text in texts]
            self._check()
            mark_complete(
                path,
                epoch=position.epoch,
                round_=position.round,
                sha256=[digest for digest, _, _ in saved],
                first=self._first,
                positions=[(int(epoch), int(step)) for _, epoch, step in saved],
                resumed_networks=self.resumed_networks,
            )
        except DistGraftError as error:
            if not isinstance(error, LeaseLostError):
                discard_incomplete(path)
            return str(error)
        with contextlib.suppress(OSError):  # a leftover checkpoint does no harm
            prune(path.parent, self._keep)
        return _COMPLETE


@torch.no_grad()
def to_host_memory(value: Any) -> Any:
    """Copy a nested structure to the CPU. Tensors that share storage share their copy."""
    return _copy(value, {})


def _copy(part: Any, copies: dict[Hashable, Tensor]) -> Any:
    if isinstance(part, Tensor):
        key = (storage_key(part), part.shape, part.stride())
        if key not in copies:
            copies[key] = part.to("cpu", copy=True)
        return copies[key]
    if isinstance(part, dict):
        copied = copy(part)  # keeps the attributes of a state dict
        copied.update((key, _copy(inner, copies)) for key, inner in part.items())
        return copied
    if isinstance(part, list | tuple):
        return type(part)(_copy(inner, copies) for inner in part)
    return part
