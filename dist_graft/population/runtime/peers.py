"""Registry of the processes of a run: host, process id, progress, and texts they publish."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta

import torch.distributed as dist

from dist_graft.errors import PeerError, StartError
from dist_graft.population.collectives import CommunicationError
from dist_graft.population.runtime.process import has_ended
from dist_graft.population.runtime.store import StoreClient, StoreTimeoutError

_POLL_INTERVAL = timedelta(seconds=1)


class PeerRegistry:
    """The processes of a run, as they appear in its key-value store (ADR 14).

    Nothing here is a collective: a process can look up its peers while they are stuck or dead.

    Args:
        store: key-value store of the run.
        rank: of this process.
        processes: number of processes in the run.
        replicas: processes of each network.
    """

    def __init__(
        self, store: dist.Store | StoreClient, rank: int, processes: int, replicas: int = 1
    ) -> None:
        self._store = store
        self.rank = rank
        self._ranks = range(processes)
        self._replicas = replicas

    @property
    def leaders(self) -> range:
        """Ranks of the processes that write their network's files."""
        return self._ranks[:: self._replicas]

    def clone(self) -> PeerRegistry:
        """Registry with its own connection, for another thread: a wait blocks the connection."""
        return PeerRegistry(self._store.clone(), self.rank, len(self._ranks), self._replicas)

    def check_in(self, timeout_seconds: float) -> None:
        """Register this process and wait until all others have registered.

        Raises: StartError naming the networks that are missing after the timeout.
        """
        self._store.set(f"process/{self.rank}", str(os.getpid()))
        self._store.set(f"host/{self.rank}", socket.gethostname())
        missing = self._wait([f"host/{rank}" for rank in self._ranks], timeout_seconds)
        if missing:
            ranks = [int(key.removeprefix("host/")) for key in missing]
            names = ", ".join(
                f"{rank // self._replicas} (rank {rank})" if self._replicas > 1 else str(rank)
                for rank in ranks
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

        Empty when the store does not respond, because its host may be the one that is gone.
        """
        return self._describe_where(lambda rank: not self._has_reached(rank, round_))

    def missing(self, key: str) -> list[str]:
        """Descriptions of the processes that have not published a text under the key."""
        return self._describe_where(lambda rank: not self._store.check([f"{key}/{rank}"]))

    def dead_peers(self) -> list[str]:
        """Descriptions of the processes on this host that have ended."""
        return self._describe_where(self._is_dead)

    def unresponsive(self, key: str, ranks: Sequence[int], seconds: float) -> list[str]:
        """Descriptions of the ranks that do not make this same call within so many seconds."""
        try:
            self._store.set(f"{key}/{self.rank}", "")
            missing = self._wait([f"{key}/{rank}" for rank in ranks], seconds)
            return [self.describe(int(key.rpartition("/")[2])) for key in missing]
        except RuntimeError:
            return []

    def describe(self, rank: int) -> str:
        """Network, replica where there are several, rank and host of a process."""
        network, replica = divmod(rank, self._replicas)
        which = f"replica {replica}, " if self._replicas > 1 else ""
        return f"network {network} ({which}rank {rank} on {self._host(rank)})"

    def hosts(self) -> list[str]:
        """Hosts of all processes, by rank; waits for those that have not checked in."""
        return [self._host(rank) for rank in self._ranks]

    # Requests to stop

    def request_stop(self, reason: str) -> None:
        """Ask all processes to stop.

        A store that is gone is ignored: the next collective reports the dead process that kept it.

        Raises: PeerError when the store does not respond in time.
        """
        try:
            self._store.set("stop", reason)
        except StoreTimeoutError as error:
            raise _store_unreachable(error) from error
        except dist.DistNetworkError:
            return

    def stop_reason(self) -> str | None:
        """Why the run should stop; None when no process has requested it or the store is gone.

        Raises: PeerError when the store does not respond in time.
        """
        try:
            return self._store.get("stop").decode() if self._store.check(["stop"]) else None
        except StoreTimeoutError as error:
            raise _store_unreachable(error) from error
        except dist.DistNetworkError:
            return None

    # Texts

    def publish(self, key: str, text: str) -> None:
        """Store a text of this process under the key.

        Raises: PeerError when the store is gone.
        """
        with self._reporting_lost_store(key):
            self._store.set(f"{key}/{self.rank}", text)

    def is_published(self, key: str, rank: int) -> bool:
        """Whether a process has published a text under the key; False when the store is gone.

        Raises: PeerError when the store does not respond in time.
        """
        try:
            return self._store.check([f"{key}/{rank}"])
        except StoreTimeoutError as error:
            raise _store_unreachable(error) from error
        except dist.DistNetworkError:
            return False

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
            key: of the texts.
            timeout_seconds: for all of them.
            ranks: to wait for; None: all.
            cancelled: polled about once a second; True ends the wait.

        Returns: the texts, in the order of the ranks.

        Raises: PeerError naming the missing processes when one of them has died, after the timeout,
            or when cancelled.
        """
        keys = {rank: f"{key}/{rank}" for rank in (self._ranks if ranks is None else ranks)}
        deadline = time.monotonic() + timeout_seconds
        with self._reporting_lost_store(key):
            while True:
                left = min(_POLL_INTERVAL.total_seconds(), deadline - time.monotonic())
                unset = self._wait(list(keys.values()), left)
                if not unset:
                    return [self._store.get(key).decode() for key in keys.values()]
                missing = [rank for rank, key in keys.items() if key in unset]
                dead = [rank for rank in missing if self._is_dead(rank)]
                is_late = time.monotonic() >= deadline
                if dead or is_late or cancelled():
                    names = "; ".join(self.describe(rank) for rank in dead or missing)
                    within = f" within {timeout_seconds:g} s" if is_late else ""
                    cause = "died" if dead else f"did not answer{within}"
                    raise PeerError(f"{names} {cause} ({key}): see its output for the cause")

    @contextmanager
    def _reporting_lost_store(self, key: str) -> Iterator[None]:
        """Turn the errors of a store that is gone or does not respond into a PeerError."""
        try:
            yield
        except StoreTimeoutError as error:
            raise _store_unreachable(error) from error
        except dist.DistNetworkError as error:
            raise PeerError(
                f"the run's key-value store is gone ({key}): its process, network 0 or the "
                "launcher, died"
            ) from error

    def _wait(self, keys: list[str], timeout_seconds: float) -> list[str]:
        """Wait until all keys are set; returns those that are not after the timeout."""
        deadline = time.monotonic() + timeout_seconds
        while missing := [key for key in keys if not self._store.check([key])]:
            left = deadline - time.monotonic()
            if left <= 0:
                return missing
            try:  # in short waits, because Python handles signals only in between
                self._store.wait(missing, min(_POLL_INTERVAL, timedelta(seconds=left)))
            except dist.DistStoreError:
                continue
        return []

    def _describe_where(self, matches: Callable[[int], bool]) -> list[str]:
        try:
            return [self.describe(rank) for rank in self._ranks if matches(rank)]
        except RuntimeError:  # of the store
            return []

    def _host(self, rank: int) -> str:
        return self._store.get(f"host/{rank}").decode()

    def _is_dead(self, rank: int) -> bool:
        if self._host(rank) != socket.gethostname():
            return False
        return has_ended(int(self._store.get(f"process/{rank}")))

    def _has_reached(self, rank: int, round_: int) -> bool:
        key = f"round/{rank}"
        return self._store.check([key]) and int(self._store.get(key)) >= round_


def _store_unreachable(error: StoreTimeoutError) -> PeerError:
    return PeerError(
        f"{error}: its process, network 0 or the launcher, hangs, or the link to it is cut; rerun "
        "the command to resume from the latest checkpoint"
    )


@contextmanager
def naming_missing_peers(peers: PeerRegistry | None, round_: int, what: str) -> Iterator[None]:
    """Turn the failure of a round's collective into a PeerError that names the missing peers.

    Args:
        peers: of the run; None: the error names nobody.
        round_: that the missing processes have not reached.
        what: the operation, for the message.
    """
    try:
        yield
    except CommunicationError as error:
        missing = (peers.dead_peers() or peers.missing_from_round(round_)) if peers else []
        names = "; ".join(missing) or "a network that had reached it"
        raise PeerError(
            f"{what} failed, a peer died or did not answer: {names}; see its output for the cause "
            f"({error})"
        ) from error
