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
from dist_graft.population.store import AnsweringStore, StoreSilentError
from dist_graft.population.wire import WireError

_LOOK_AGAIN = timedelta(seconds=1)


class RollCall:
    """Each network's host and the last round it reached.

    Args:
        store: of the run; every process has one.
        network: of this process.
        networks: size of the population.
    """

    def __init__(self, store: dist.Store | AnsweringStore, network: int, networks: int) -> None:
        self._store = store
        self._network = network
        self._networks = networks

    def apart(self) -> RollCall:
        """The same over a connection of its own, for another thread, as a wait blocks one."""
        return RollCall(self._store.clone(), self._network, self._networks)

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

    def silent(self, what: str) -> list[str]:
        """The networks that have not left a text, each with rank and host."""
        try:
            missing = [k for k in range(self._networks) if not self._store.check([f"{what}/{k}"])]
            return [self.describe(k) for k in missing]
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
        return f"network {network} (rank {network} on {self._host(network)})"

    def hosts(self) -> list[str]:
        """Of all networks, in their order; waits for those that did not check in."""
        return [self._host(network) for network in range(self._networks)]

    def ask_to_stop(self, why: str) -> None:
        """Leave word for all networks that the run is to stop."""
        self._store.set("stop", why)

    def asked_to_stop(self) -> str | None:
        """Why the run is to stop, if any network was asked to.

        Nobody, when the store is gone: so is who kept it, and the next meeting says so.

        Raises: PeerError when the store does not answer in time.
        """
        try:
            return self._store.get("stop").decode() if self._store.check(["stop"]) else None
        except StoreSilentError as error:
            raise self._cut_off(error) from error
        except dist.DistNetworkError:
            return None

    def post(self, what: str, value: str) -> None:
        """Leave a text for the other networks to read.

        Raises: PeerError when the store is gone.
        """
        with self._reachable(what):
            self._store.set(f"{what}/{self._network}", value)

    def hear(self, what: str, network: int, timeout_seconds: float) -> str:
        """What one network has left, once it has.

        Raises: PeerError naming the network, when it died or after the time-out.
        """
        return self._answers(what, [network], timeout_seconds)[0]

    def collect(
        self, what: str, timeout_seconds: float, *, given_up: Callable[[], bool] = lambda: False
    ) -> list[str]:
        """Everyone's text, in the order of the networks, once all have left theirs.

        Raises: PeerError naming the networks that did not, when one died, after the time-out, or
            about a second after `given_up`.
        """
        return self._answers(what, range(self._networks), timeout_seconds, given_up)

    def heard(self, what: str, network: int) -> bool:
        """Whether a network has left a text; no, when the store is gone.

        Raises: PeerError when the store does not answer in time.
        """
        try:
            return self._store.check([f"{what}/{network}"])
        except StoreSilentError as error:
            raise self._cut_off(error) from error
        except dist.DistNetworkError:
            return False

    def _answers(
        self,
        what: str,
        networks: Sequence[int],
        timeout_seconds: float,
        given_up: Callable[[], bool] = lambda: False,
    ) -> list[str]:
        keys = {network: f"{what}/{network}" for network in networks}
        deadline = time.monotonic() + timeout_seconds
        with self._reachable(what):
            while True:
                left = min(_LOOK_AGAIN.total_seconds(), deadline - time.monotonic())
                missing = self._wait(list(keys.values()), left)
                if not missing:
                    return [self._store.get(key).decode() for key in keys.values()]
                silent = [network for network, key in keys.items() if key in missing]
                dead = [network for network in silent if self._is_gone(network)]
                late = time.monotonic() >= deadline
                if dead or late or given_up():
                    who = "; ".join(self.describe(network) for network in dead or silent)
                    within = f" within {timeout_seconds:g} s" if late else ""
                    why = "died" if dead else f"did not answer{within}"
                    raise PeerError(f"{who} {why} ({what}); its own output says why")

    @contextmanager
    def _reachable(self, what: str) -> Iterator[None]:
        try:
            yield
        except StoreSilentError as error:
            raise self._cut_off(error) from error
        except dist.DistNetworkError as error:
            raise PeerError(
                f"the run's key-value store is gone ({what}): who kept it, network 0 or the "
                "launcher, died"
            ) from error

    def _cut_off(self, error: StoreSilentError) -> PeerError:
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

    def _host(self, network: int) -> str:
        return self._store.get(f"host/{network}").decode()

    def _is_gone(self, network: int) -> bool:
        if self._host(network) != socket.gethostname():
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


@contextmanager
def naming_missing(roll_call: RollCall | None, round_: int, what: str) -> Iterator[None]:
    """Turn the failure of a round's collective into a PeerError that says who is missing.

    Args:
        roll_call: of the run; None when nobody knows.
        round_: which the missing networks have not reached.
        what: failed.
    """
    try:
        yield
    except WireError as error:
        absent = (roll_call.gone() or roll_call.absent(round_)) if roll_call else []
        who = "; ".join(absent) or "a network that had reached it"
        raise PeerError(
            f"{what} failed, a peer died or did not answer: {who}; its own output says why "
            f"({error})"
        ) from error
