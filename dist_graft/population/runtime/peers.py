"""Who takes part, where they run and how far they have come, through the run's key-value store."""

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

_LOOK_AGAIN = timedelta(seconds=1)


class PeerRegistry:
    """Each process's host and the last round it reached.

    Args:
        store: of the run; every process has one.
        rank: of this process.
        processes: of the run.
        replicas: processes of each network.
    """

    def __init__(
        self, store: dist.Store | StoreClient, rank: int, processes: int, replicas: int = 1
    ) -> None:
        self._store = store
        self.rank = rank
        self._processes = range(processes)
        self._replicas = replicas

    @property
    def leaders(self) -> range:
        """The process of each network that writes its files."""
        return self._processes[:: self._replicas]

    def clone(self) -> PeerRegistry:
        """The same over a connection of its own, for another thread, as a wait blocks one."""
        return PeerRegistry(self._store.clone(), self.rank, len(self._processes), self._replicas)

    def check_in(self, timeout_seconds: float) -> None:
        """Say where this process runs and wait until all others have said so.

        Raises: StartError naming the networks that did not, after the time-out.
        """
        self._store.set(f"process/{self.rank}", str(os.getpid()))
        self._store.set(f"host/{self.rank}", socket.gethostname())
        missing = self._wait([f"host/{rank}" for rank in self._processes], timeout_seconds)
        if missing:
            ranks = [int(key.removeprefix("host/")) for key in missing]
            names = ", ".join(
                f"{rank // self._replicas} (rank {rank})" if self._replicas > 1 else str(rank)
                for rank in ranks
            )
            raise StartError(
                f"network {names} did not start within {timeout_seconds:g} s: see its output, and "
                f"check that {len(self._processes)} processes were started with the same "
                "MASTER_ADDR and MASTER_PORT"
            )

    def enter_round(self, round_: int) -> None:
        """Say that this process has reached a round."""
        self._store.set(f"round/{self.rank}", str(round_))

    def missing_from_round(self, round_: int) -> list[str]:
        """The networks that have not reached a round, each with rank and host.

        Empty when the store does not answer either: its host is then gone.
        """
        try:
            return [self.describe(k) for k in self._processes if not self._reached(k, round_)]
        except RuntimeError:
            return []

    def missing(self, what: str) -> list[str]:
        """The networks that have not left a text, each with rank and host."""
        try:
            missing = [k for k in self._processes if not self._store.check([f"{what}/{k}"])]
            return [self.describe(k) for k in missing]
        except RuntimeError:
            return []

    def dead_peers(self) -> list[str]:
        """The networks of this machine whose process is no more, each with rank and host."""
        try:
            return [self.describe(k) for k in self._processes if self._is_gone(k)]
        except RuntimeError:
            return []

    def unresponsive(self, what: str, ranks: Sequence[int], seconds: float) -> list[str]:
        """Those of the processes that do not say this within so many seconds; says it, too."""
        try:
            self._store.set(f"{what}/{self.rank}", "")
            missing = self._wait([f"{what}/{rank}" for rank in ranks], seconds)
            return [self.describe(int(key.rpartition("/")[2])) for key in missing]
        except RuntimeError:
            return []

    def describe(self, rank: int) -> str:
        """A process: its network, replica where there are several, rank and host."""
        network, replica = divmod(rank, self._replicas)
        which = f"replica {replica}, " if self._replicas > 1 else ""
        return f"network {network} ({which}rank {rank} on {self._host(rank)})"

    def hosts(self) -> list[str]:
        """Of all processes, in their order; waits for those that did not check in."""
        return [self._host(rank) for rank in self._processes]

    def request_stop(self, why: str) -> None:
        """Leave word for all networks that the run is to stop.

        Nobody hears it when the store is gone: so is who kept it, and the next meeting says so.

        Raises: PeerError when the store does not answer in time.
        """
        try:
            self._store.set("stop", why)
        except StoreTimeoutError as error:
            raise self._cut_off(error) from error
        except dist.DistNetworkError:
            return

    def stop_reason(self) -> str | None:
        """Why the run is to stop, if any network was asked to.

        Nobody, when the store is gone: so is who kept it, and the next meeting says so.

        Raises: PeerError when the store does not answer in time.
        """
        try:
            return self._store.get("stop").decode() if self._store.check(["stop"]) else None
        except StoreTimeoutError as error:
            raise self._cut_off(error) from error
        except dist.DistNetworkError:
            return None

    def publish(self, what: str, value: str) -> None:
        """Leave a text for the other networks to read.

        Raises: PeerError when the store is gone.
        """
        with self._reachable(what):
            self._store.set(f"{what}/{self.rank}", value)

    def read(self, what: str, rank: int, timeout_seconds: float) -> str:
        """What one process has left, once it has.

        Raises: PeerError naming it, when it died or after the time-out.
        """
        return self._answers(what, [rank], timeout_seconds)[0]

    def collect(
        self,
        what: str,
        timeout_seconds: float,
        *,
        ranks: Sequence[int] | None = None,
        cancelled: Callable[[], bool] = lambda: False,
    ) -> list[str]:
        """Everyone's text, in the order of their ranks, once all have left theirs.

        Args:
            what: they were to leave.
            timeout_seconds: to wait for it.
            ranks: ranks; None: of all processes.
            cancelled: whether to wait no more.

        Raises: PeerError naming those that did not, when one died, after the time-out, or
            about a second after `cancelled`.
        """
        ranks = self._processes if ranks is None else ranks
        return self._answers(what, ranks, timeout_seconds, cancelled)

    def is_published(self, what: str, rank: int) -> bool:
        """Whether a process has left a text; no, when the store is gone.

        Raises: PeerError when the store does not answer in time.
        """
        try:
            return self._store.check([f"{what}/{rank}"])
        except StoreTimeoutError as error:
            raise self._cut_off(error) from error
        except dist.DistNetworkError:
            return False

    def _answers(
        self,
        what: str,
        ranks: Sequence[int],
        timeout_seconds: float,
        cancelled: Callable[[], bool] = lambda: False,
    ) -> list[str]:
        keys = {rank: f"{what}/{rank}" for rank in ranks}
        deadline = time.monotonic() + timeout_seconds
        with self._reachable(what):
            while True:
                left = min(_LOOK_AGAIN.total_seconds(), deadline - time.monotonic())
                missing = self._wait(list(keys.values()), left)
                if not missing:
                    return [self._store.get(key).decode() for key in keys.values()]
                silent = [rank for rank, key in keys.items() if key in missing]
                dead = [rank for rank in silent if self._is_gone(rank)]
                late = time.monotonic() >= deadline
                if dead or late or cancelled():
                    who = "; ".join(self.describe(rank) for rank in dead or silent)
                    within = f" within {timeout_seconds:g} s" if late else ""
                    why = "died" if dead else f"did not answer{within}"
                    raise PeerError(f"{who} {why} ({what}); its own output says why")

    @contextmanager
    def _reachable(self, what: str) -> Iterator[None]:
        try:
            yield
        except StoreTimeoutError as error:
            raise self._cut_off(error) from error
        except dist.DistNetworkError as error:
            raise PeerError(
                f"the run's key-value store is gone ({what}): who kept it, network 0 or the "
                "launcher, died"
            ) from error

    def _cut_off(self, error: StoreTimeoutError) -> PeerError:
        return PeerError(
            f"{error}: who keeps it, network 0 or its launcher, hangs, or the link to it is cut; "
            "the same command goes on from the newest checkpoint"
        )

    def _wait(self, keys: list[str], timeout_seconds: float) -> list[str]:
        """Wait until all keys are there; returns those that are not after the time-out."""
        deadline = time.monotonic() + timeout_seconds
        while missing := [key for key in keys if not self._store.check([key])]:
            left = deadline - time.monotonic()
            if left <= 0:
                return missing
            try:  # not for long, so that signals are served
                self._store.wait(missing, min(_LOOK_AGAIN, timedelta(seconds=left)))
            except dist.DistStoreError:
                continue
        return []

    def _host(self, rank: int) -> str:
        return self._store.get(f"host/{rank}").decode()

    def _is_gone(self, rank: int) -> bool:
        if self._host(rank) != socket.gethostname():
            return False
        return has_ended(int(self._store.get(f"process/{rank}")))

    def _reached(self, rank: int, round_: int) -> bool:
        key = f"round/{rank}"
        return self._store.check([key]) and int(self._store.get(key)) >= round_


@contextmanager
def naming_missing_peers(peers: PeerRegistry | None, round_: int, what: str) -> Iterator[None]:
    """Turn the failure of a round's collective into a PeerError that says who is missing.

    Args:
        peers: of the run; None when nobody knows.
        round_: which the missing networks have not reached.
        what: failed.
    """
    try:
        yield
    except CommunicationError as error:
        absent = (peers.dead_peers() or peers.missing_from_round(round_)) if peers else []
        who = "; ".join(absent) or "a network that had reached it"
        raise PeerError(
            f"{what} failed, a peer died or did not answer: {who}; its own output says why "
            f"({error})"
        ) from error
