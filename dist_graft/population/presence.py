"""Who takes part, where they run and how far they have come, through the run's key-value store."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Sequence
from datetime import timedelta

import torch.distributed as dist

from dist_graft.errors import PeerError, StartError

_LOOK_AGAIN = timedelta(seconds=1)


class RollCall:
    """Each network's host and the last round it reached.

    Args:
        store: of the run; every process has one.
        network: of this process.
        networks: size of the population.
    """

    def __init__(
        self, store: dist.TCPStore | dist.PrefixStore, network: int, networks: int
    ) -> None:
        self._store = store
        self._network = network
        self._networks = networks

    def check_in(self, timeout_seconds: float) -> None:
        """Say where this network runs and wait until all others have said so.

        Raises: StartError naming the networks that did not, after the time-out.
        """
        self._store.set(f"process/{self._network}", str(os.getpid()))
        self._store.set(f"host/{self._network}", socket.gethostname())
        missing = self._wait([f"host/{k}" for k in range(self._networks)], timeout_seconds)
        if missing:
            names = ", ".join(key.removeprefix("host/") for key in missing)
            raise StartError(
                f"network {names} did not start within {timeout_seconds:g} s: see its output, and "
                f"check that {self._networks} processes were started with the same "
                "MASTER_ADDR and MASTER_PORT"
            )

    def arrive(self, round_: int) -> None:
        """Say that this network has reached a round."""
        self._store.set(f"round/{self._network}", str(round_))

    def absent(self, round_: int) -> list[str]:
        """The networks that have not reached a round, each with rank and host.

        Empty when the store does not answer either: its host is then gone.
        """
        try:
            return [self.describe(k) for k in range(self._networks) if not self._reached(k, round_)]
        except RuntimeError:
            return []

    def gone(self) -> list[str]:
        """The networks of this machine whose process is no more, each with rank and host."""
        try:
            return [self.describe(k) for k in range(self._networks) if self._is_gone(k)]
        except RuntimeError:
            return []

    def describe(self, network: int) -> str:
        """A network with its rank and host."""
        host = self._store.get(f"host/{network}").decode()
        return f"network {network} (rank {network} on {host})"

    def ask_to_stop(self, why: str) -> None:
        """Leave word for all networks that the run is to stop."""
        self._store.set("stop", why)

    def asked_to_stop(self) -> str | None:
        """Why the run is to stop, if any network was asked to.

        Nobody, when the store does not answer: who kept it is gone, and the next meeting says so.
        """
        try:
            return self._store.get("stop").decode() if self._store.check(["stop"]) else None
        except dist.DistNetworkError:
            return None

    def post(self, what: str, value: str) -> None:
        """Leave a text for the other networks to read."""
        self._store.set(f"{what}/{self._network}", value)

    def hear(self, what: str, network: int, timeout_seconds: float) -> str:
        """What one network has left, once it has.

        Raises: PeerError naming the network, when it died or after the time-out.
        """
        return self._answers(what, [network], timeout_seconds)[0]

    def collect(self, what: str, timeout_seconds: float) -> list[str]:
        """Everyone's text, in the order of the networks, once all have left theirs.

        Raises: PeerError naming the networks that did not, when one died or after the time-out.
        """
        return self._answers(what, range(self._networks), timeout_seconds)

    def _answers(self, what: str, networks: Sequence[int], timeout_seconds: float) -> list[str]:
        keys = {network: f"{what}/{network}" for network in networks}
        deadline = time.monotonic() + timeout_seconds
        try:
            while True:
                left = min(_LOOK_AGAIN.total_seconds(), deadline - time.monotonic())
                missing = self._wait(list(keys.values()), left)
                if not missing:
                    return [self._store.get(key).decode() for key in keys.values()]
                silent = [network for network, key in keys.items() if key in missing]
                dead = [network for network in silent if self._is_gone(network)]
                if dead or time.monotonic() >= deadline:
                    who = "; ".join(self.describe(network) for network in dead or silent)
                    why = "died" if dead else f"did not answer within {timeout_seconds:g} s"
                    raise PeerError(f"{who} {why} ({what}); its own output says why")
        except dist.DistNetworkError as error:
            raise PeerError(
                f"the run's key-value store is gone ({what}): who kept it, network 0 or the "
                "launcher, died"
            ) from error

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

    def _is_gone(self, network: int) -> bool:
        if self._store.get(f"host/{network}").decode() != socket.gethostname():
            return False
        try:
            os.kill(int(self._store.get(f"process/{network}")), 0)
        except ProcessLookupError:
            return True
        except PermissionError:  # alive, and somebody else's by now
            return True
        return False

    def _reached(self, network: int, round_: int) -> bool:
        key = f"round/{network}"
        return self._store.check([key]) and int(self._store.get(key)) >= round_
