"""Registry of the processes of a run: host, process id, progress, and texts they publish."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta

import torch.distributed as dist

from dist_graft.errors import SEE_PEER, PeerError, StartError
from dist_graft.population.collectives import CommunicationError, abort_nccl
from dist_graft.population.runtime.process import has_ended
from dist_graft.population.runtime.process_info import describe_process
from dist_graft.population.runtime.store import StoreClient, StoreTimeoutError
from dist_graft.printing import printable

_POLL_INTERVAL = timedelta(seconds=1)


class PeerRegistry:
    """The processes of a run, as they appear in its key-value store (ADR 14).

    Nothing here is a collective: a process can look up its peers while they are stuck or dead.

    Args:
        store: key-value store of the run.
        rank: rank of this process.
        processes: number of processes in the run.
        replicas: number of processes for each network.
        first_network: network of rank 0.
    """

    def __init__(
        self,
        store: dist.Store | StoreClient,
        rank: int,
        processes: int,
        replicas: int = 1,
        *,
        first_network: int = 0,
    ) -> None:
        self._store = store
        self.rank = rank
        self._ranks = range(processes)
        self._replicas = replicas
        self.first_network = first_network
        self._checked_in: dict[str, str] = {}  # values by key, which do not change

    @property
    def leaders(self) -> range:
        """Ranks of the processes that write their network's files."""
        return self._ranks[:: self._replicas]

    def clone(self) -> PeerRegistry:
        """Registry with a separate connection, for another thread: a wait blocks the connection."""
        return PeerRegistry(
            self._store.clone(),
            self.rank,
            len(self._ranks),
            self._replicas,
            first_network=self.first_network,
        )

    def check_in(self, timeout_seconds: float) -> None:
        """Register this process and wait until all others have registered.

        Raises: StartError naming the networks that are missing after the timeout.
        """
        self._store.set(f"process/{self.rank}", str(os.getpid()))
        self._store.set(f"host/{self.rank}", socket.gethostname())
        missing = self._wait(self._keys("host"), timeout_seconds)
        if missing:
            names = ", ".join(
                f"{rank // self._replicas} (rank {rank})" if self._replicas > 1 else str(rank)
                for rank in map(_rank_of, missing)
            )
            raise StartError(
                f"network {names} did not start within {timeout_seconds:g} s: see its output, and "
                f"check that all {len(self._ranks)} processes were started with the same "
                "MASTER_ADDR and MASTER_PORT"
            )

    # Progress

    def enter_round(self, round_: int) -> None:
        """Record that this process has reached a round."""
        self._store.set(f"round/{self.rank}", str(round_))

    def missing_from_round(self, round_: int) -> list[str]:
        """Descriptions of the processes that have not reached a round.

        Empty if the store does not respond, because the process that hosts it may have died.
        """
        return self._describe(
            lambda: (rank for rank in self._ranks if not self._has_reached(rank, round_))
        )

    def missing(self, key: str) -> list[str]:
        """Descriptions of the processes that have not published a text under the key."""
        return self._describe(lambda: map(_rank_of, self._unset(self._keys(key))))

    def dead_peers(self) -> list[str]:
        """Descriptions of the processes on this host that have ended."""
        return self._describe(lambda: self._dead(self._ranks))

    def check_alive(self) -> None:
        """Raise CommunicationError if a process on this host has ended, to end a wait for it."""
        if self.dead_peers():
            raise CommunicationError("a process ended")

    def unresponsive(self, key: str, ranks: Sequence[int], seconds: float) -> list[str]:
        """Descriptions of the ranks that do not make this same call before the timeout."""
        try:
            self._store.set(f"{key}/{self.rank}", "")
            missing = self._wait(self._keys(key, ranks), seconds)
            return [self.describe(_rank_of(key)) for key in missing]
        except RuntimeError:
            return []

    def describe(self, rank: int) -> str:
        """Network, replica if there are several, rank and host of a process."""
        host = self._read_once("host", [rank])[0]
        return describe_process(rank, self._replicas, host, first=self.first_network)

    def hosts(self) -> list[str]:
        """Hosts of all processes, by rank; waits for those that have not checked in."""
        return self._read_once("host", self._ranks)

    # Requests to stop

    def request_stop(self, reason: str) -> None:
        """Ask all processes to stop; the first request gives the reason.

        A lost store is ignored, because the next collective reports the dead process that hosted
        it.

        Raises: PeerError when the store does not respond in time.
        """
        with _reporting_store_timeout(), suppress(dist.DistNetworkError):
            if not self._store.check(["stop"]):
                self._store.set("stop", printable(reason))

    def stop_reason(self) -> str | None:
        """Reason of a requested stop; None if no process has requested it or the store is lost.

        Raises: PeerError when the store does not respond in time.
        """
        with _reporting_store_timeout(), suppress(dist.DistNetworkError):
            if self._store.check(["stop"]):
                return self._store.get("stop").decode()
        return None

    # Texts

    def publish(self, key: str, text: str) -> None:
        """Store a text of this process under the key.

        Raises: PeerError when the store is lost.
        """
        with _reporting_lost_store(key):
            self._store.set(f"{key}/{self.rank}", printable(text))

    def read(self, key: str, rank: int, timeout_seconds: float) -> str:
        """Wait for the text that one process publishes under the key.

        Raises: PeerError naming the process when it has died, or after the timeout.
        """
        return self.collect(key, timeout_seconds, ranks=[rank])[0]

    def collect(
        self,
        key: str,
        timeout_seconds: float,
        *,
        ranks: Sequence[int] | None = None,
        cancelled: Callable[[], bool] = lambda: False,
    ) -> list[str]:
        """Wait for the texts that several processes publish under the key.

        Args:
            key: key of the texts.
            timeout_seconds: timeout for all texts.
            ranks: processes to wait for; None: all.
            cancelled: polled about once a second; True ends the wait.

        Returns: the texts, in the order of the ranks.

        Raises: PeerError naming the missing processes when one of them has died, after the timeout,
            or when cancelled.
        """
        ranks = self._ranks if ranks is None else ranks
        keys = self._keys(key, ranks)
        deadline = time.monotonic() + timeout_seconds

        def gives_up() -> bool:
            return cancelled() or bool(self._unset(self._keys(key, self._dead(ranks))))

        with _reporting_lost_store(key):
            missing = [_rank_of(key) for key in self._wait(keys, timeout_seconds, gives_up)]
            if not missing:
                return [text.decode() for text in self._store.multi_get(keys)]
            dead = self._dead(missing)
            within = f" within {timeout_seconds:g} s" if time.monotonic() >= deadline else ""
            names = "; ".join(self.describe(rank) for rank in dead or missing)
            cause = "died" if dead else f"did not respond{within}"
            raise PeerError(f"{names} {cause} ({key}): {SEE_PEER}")

    def _wait(
        self,
        keys: list[str],
        timeout_seconds: float,
        gives_up: Callable[[], bool] = lambda: False,
    ) -> list[str]:
        """Wait until all keys are set; a request asks for all keys at once.

        Args:
            keys: keys of the store.
            timeout_seconds: timeout for all keys.
            gives_up: called about once a second; True ends the wait.

        Returns: the keys that are missing after the wait.
        """
        deadline = time.monotonic() + timeout_seconds
        while not self._store.check(keys):
            left = deadline - time.monotonic()
            if left <= 0:
                return self._unset(keys)
            try:  # in short waits, because Python handles signals only between them
                self._store.wait(keys, min(_POLL_INTERVAL, timedelta(seconds=left)))
            except dist.DistStoreError:
                if gives_up():
                    return self._unset(keys)
        return []

    def _keys(self, key: str, ranks: Sequence[int] | None = None) -> list[str]:
        return [f"{key}/{rank}" for rank in (self._ranks if ranks is None else ranks)]

    def _unset(self, keys: list[str]) -> list[str]:
        """The keys that are not set, in one request if there are none."""
        if not keys or self._store.check(keys):
            return []
        return [key for key in keys if not self._store.check([key])]

    def _describe(self, ranks: Callable[[], Iterable[int]]) -> list[str]:
        try:
            return [self.describe(rank) for rank in ranks()]
        except RuntimeError:  # of the store
            return []

    def _read_once(self, what: str, ranks: Sequence[int]) -> list[str]:
        """The "host" or "process" (id) of each rank; waits for those that have not checked in."""
        keys = self._keys(what, ranks)
        if unknown := [key for key in keys if key not in self._checked_in]:
            values = [value.decode() for value in self._store.multi_get(unknown)]
            self._checked_in.update(zip(unknown, values, strict=True))
        return [self._checked_in[key] for key in keys]

    def _dead(self, ranks: Sequence[int]) -> list[int]:
        """Those of the ranks whose process runs on this host and has ended."""
        hosts = self._read_once("host", ranks)
        local = [k for k, host in zip(ranks, hosts, strict=True) if host == socket.gethostname()]
        pids = self._read_once("process", local)
        return [rank for rank, pid in zip(local, pids, strict=True) if has_ended(int(pid))]

    def _has_reached(self, rank: int, round_: int) -> bool:
        key = f"round/{rank}"
        return self._store.check([key]) and int(self._store.get(key)) >= round_


def _rank_of(key: str) -> int:
    """Rank in a key of the store."""
    return int(key.rpartition("/")[2])


@contextmanager
def _reporting_store_timeout() -> Iterator[None]:
    """Convert the error of a store that does not respond into a PeerError."""
    try:
        yield
    except StoreTimeoutError as error:
        raise PeerError(
            f"{error}: its process, network 0 or the launcher, hangs, or the link to it is cut; "
            "rerun the command to resume from the latest checkpoint"
        ) from error


@contextmanager
def _reporting_lost_store(key: str) -> Iterator[None]:
    """Convert the error of a store that is lost or does not respond into a PeerError."""
    try:
        with _reporting_store_timeout():
            yield
    except dist.DistNetworkError as error:
        raise PeerError(
            f"the run's key-value store is gone ({key}): its process, network 0 or the launcher, "
            "died"
        ) from error


@contextmanager
def reporting_lost_peers(
    what: str,
    lost: Callable[[], list[str]],
    *,
    otherwise: str,
    groups: Sequence[dist.ProcessGroup | None] = (),
) -> Iterator[None]:
    """Convert the failure of a collective into a PeerError that names the lost peers.

    Args:
        what: the operation, for the message.
        lost: returns the descriptions of the lost peers.
        otherwise: named if no lost peer is known.
        groups: groups whose NCCL collectives are aborted.
    """
    try:
        yield
    except CommunicationError as error:
        names = "; ".join(lost()) or otherwise
        abort_nccl(*groups)
        raise PeerError(
            f"lost {names} during {what}: the process died or did not respond; {SEE_PEER} ({error})"
        ) from error
