"""Writes checkpoint sets beside the training: one thread, one set at a time."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Hashable, Mapping
from concurrent.futures import Future
from copy import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dist_graft.errors import DistGraftError, RunDirectoryError
from dist_graft.grafting.units import storage_key
from dist_graft.population.runtime.peers import PeerRegistry
from dist_graft.training.checkpoint.files import complete_set, discard, prune, save_network
from dist_graft.training.schedule import Position

_WRITTEN = "complete"


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What became of a set, the same for every network."""

    path: Path
    failure: str = ""
    """Why it is not complete; empty when it is."""


class CheckpointWriter:
    """Writes one network's file of each set; the first process completes a set.

    The sums travel through the run's key-value store, over a connection of the thread's own.

    Args:
        network: of this process.
        peers: of the run; None for a process alone.
        leads: whether this process writes the file, among those that train the network.
        seconds: how long to wait for the other networks' files, asked when it matters.
        keep: newest sets that stay.
    """

    def __init__(
        self,
        network: int,
        peers: PeerRegistry | None,
        *,
        leads: bool = True,
        seconds: Callable[[], float],
        keep: int,
    ) -> None:
        self._network = network
        self._leads = leads
        self._roll_call = peers.clone() if peers else None
        self._seconds = seconds
        self._keep = keep
        self._given_up = threading.Event()
        self._under_way: Future[Outcome] | None = None
        self._thread: threading.Thread | None = None

    def start(self, label: str, path: Path, position: Position, state: Mapping[str, Any]) -> None:
        """Copy the state to host memory, and write it in the background.

        Args:
            label: of the set, the same for every network and of no other set of the process.
            path: of the set.
            position: of this network.
            state: what torch.save can write; it may change as soon as this returns.
        """
        assert self._under_way is None
        copied = in_host_memory(state) if self._leads else {}
        under_way: Future[Outcome] = Future()
        self._given_up.clear()
        returning = threading.Event()

        def write() -> None:
            returning.wait()  # else the interpreter may serve this thread first for a while
            try:
                under_way.set_result(self._write(label, path, position, copied))
            except BaseException as error:  # noqa: BLE001  told to who waits for it
                under_way.set_exception(error)

        self._thread = threading.Thread(target=write, name=f"checkpoint {label}", daemon=True)
        self._under_way = under_way
        try:
            self._thread.start()
        finally:
            returning.set()

    @property
    def busy(self) -> bool:
        """Whether a set is under way."""
        return self._under_way is not None and not self._under_way.done()

    def give_up(self) -> None:
        """Do not wait for the files of networks that may never write theirs."""
        self._given_up.set()

    def result(self) -> Outcome | None:
        """What became of the set under way, once that is known; None when there is none.

        Raises: PeerError when another network died or did not answer.
        """
        under_way, self._under_way = self._under_way, None
        if under_way is None or self._thread is None:
            return None
        self._thread.join()  # whose last act is to free the copies
        return under_way.result()

    def _write(
        self, label: str, path: Path, position: Position, state: Mapping[str, Any]
    ) -> Outcome:
        told = self._save(path, position, state) if self._leads else ""
        peers = self._roll_call
        if peers:
            peers.publish(f"{label} written", told)
        if peers and peers.rank != 0:
            # Longer than the first process waits for everyone's files, for it to say who is late.
            verdict = peers.read(f"{label} complete", 0, 2 * self._seconds())
        else:
            verdict = self._complete(label, path, position, told)
            if peers:
                peers.publish(f"{label} complete", verdict)
        return Outcome(path=path, failure="" if verdict == _WRITTEN else verdict)

    def _save(self, path: Path, position: Position, state: Mapping[str, Any]) -> str:
        try:
            digest = save_network(path / f"network{self._network:02d}.pt", state)
        except RunDirectoryError as error:
            return f"failed {error}"
        return f"{digest} {position.epoch} {position.step}"

    def _complete(self, label: str, path: Path, position: Position, told: str) -> str:
        try:
            texts = [told]
            if self._roll_call:
                texts = self._roll_call.collect(
                    f"{label} written",
                    self._seconds(),
                    ranks=self._roll_call.leaders,
                    cancelled=self._given_up.is_set,
                )
            failed = [text.removeprefix("failed ") for text in texts if text.startswith("failed ")]
            if failed:
                raise RunDirectoryError(failed[0])
            saved = [text.split() for text in texts]
            complete_set(
                path,
                epoch=position.epoch,
                round_=position.round,
                sha256=[digest for digest, _, _ in saved],
                positions=[(int(epoch), int(step)) for _, epoch, step in saved],
            )
        except DistGraftError as error:
            discard(path)
            return str(error)
        with contextlib.suppress(OSError):  # more sets than wanted are no harm
            prune(path.parent, self._keep)
        return _WRITTEN


@torch.no_grad()
def in_host_memory(value: Any) -> Any:
    """A copy whose tensors are on the CPU; those that are the same stay the same one."""
    return _copied(value, {})


def _copied(part: Any, copies: dict[Hashable, Tensor]) -> Any:
    if isinstance(part, Tensor):
        place = (storage_key(part), part.shape, part.stride())
        if place not in copies:
            copies[place] = part.to("cpu", copy=True)
        return copies[place]
    if isinstance(part, dict):
        whole = copy(part)  # with what a state dict holds beside its keys
        whole.update((key, _copied(inner, copies)) for key, inner in part.items())
        return whole
    if isinstance(part, list | tuple):
        return type(part)(_copied(inner, copies) for inner in part)
    return part
