"""The host never waits without end behind a collective on a device; the device here is a fake."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.distributed as dist
from architectures import build
from harness import RankContext, result_or_error, run

from dist_graft import Grafter
from dist_graft.population import collectives
from dist_graft.population.collectives import CommunicationError, abort_nccl, wait_for_device
from dist_graft.population.round import exchange
from dist_graft.population.runtime import peers as peers_module
from dist_graft.population.runtime import process_group
from dist_graft.population.runtime.peers import PeerRegistry
from dist_graft.population.runtime.replicas import Replicas
from dist_graft.population.runtime.timeouts import Timeouts

GPU = torch.device("cuda", 0)


class FakeEvent:
    """An event of a device that finishes after some queries; None: never, as behind a dead peer."""

    def __init__(self, queries: int | None, error: str = "") -> None:
        self.queries = queries
        self._error = error

    def query(self) -> bool:
        if self.queries == 0 and self._error:
            raise RuntimeError(self._error)
        if self.queries:
            self.queries -= 1
        return self.queries == 0


@pytest.fixture
def record(monkeypatch: pytest.MonkeyPatch) -> Callable[[FakeEvent], FakeEvent]:
    """Function that sets the event of the next wait. The peers are looked at often."""

    def record(event: FakeEvent) -> FakeEvent:
        monkeypatch.setattr(collectives, "record_event", lambda device: event)
        return event

    monkeypatch.setattr(collectives, "_POLL_SECONDS", 0.01)
    return record


def test_a_wait_ends_when_the_device_has_finished(
    record: Callable[[FakeEvent], FakeEvent],
) -> None:
    event = record(FakeEvent(20))
    wait_for_device(GPU, 60)
    assert event.queries == 0
    event = record(FakeEvent(5))
    wait_for_device(torch.device("cpu"), 60)
    assert event.queries == 5


def test_a_wait_ends_at_the_timeout(record: Callable[[FakeEvent], FakeEvent]) -> None:
    record(FakeEvent(None))
    with pytest.raises(CommunicationError, match=r"no response within 0\.05 s"):
        wait_for_device(GPU, 0.05)


def wait_with_the_timeout_of_the_group(context: RankContext) -> object:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(collectives, "record_event", lambda device: FakeEvent(None))
        return result_or_error(lambda: wait_for_device(GPU, None, group=dist.group.WORLD))


def test_without_a_timeout_of_its_own_a_wait_has_that_of_the_group() -> None:
    """As in a Grafter in a user's own loop: nothing but the process group knows a timeout."""
    [error] = run(wait_with_the_timeout_of_the_group, 1, group_timeout=1)
    assert error == ("CommunicationError", "no response within 1 s")


def test_a_wait_ends_when_a_peer_has_died(record: Callable[[FakeEvent], FakeEvent]) -> None:
    waits: list[float] = []

    def on_wait(waited: float) -> None:
        waits.append(waited)
        if len(waits) == 3:
            raise CommunicationError("a process ended")

    record(FakeEvent(None))
    with pytest.raises(CommunicationError, match="a process ended"):
        wait_for_device(GPU, 60, on_wait)
    assert waits[0] >= 0.01
    assert waits[2] >= 0.03


def test_an_error_of_the_device_ends_the_wait(record: Callable[[FakeEvent], FakeEvent]) -> None:
    record(FakeEvent(0, "NCCL error: remote process exited"))
    with pytest.raises(CommunicationError, match="remote process exited"):
        wait_for_device(GPU, 60)


def test_signals_are_handled_during_a_wait(record: Callable[[FakeEvent], FakeEvent]) -> None:
    event = record(FakeEvent(None))

    def finish(*_: object) -> None:
        event.queries = 1

    before = signal.signal(signal.SIGUSR2, finish)
    try:
        wait_for_device(GPU, 60, lambda _: os.kill(os.getpid(), signal.SIGUSR2))
    finally:
        signal.signal(signal.SIGUSR2, before)


class FakeGroup:
    """A process group whose abort hangs until it is released."""

    def __init__(self, *, hangs: bool = False) -> None:
        self.aborted = False
        self.released = threading.Event()
        if not hangs:
            self.released.set()

    def abort(self) -> None:
        self.aborted = True
        self.released.wait()


@pytest.fixture
def nccl(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeGroup]:
    group = FakeGroup(hangs=True)
    monkeypatch.setattr(
        dist,
        "get_backend_config",
        lambda found: "cpu:gloo,cuda:nccl" if found is group else "cpu:gloo",
    )
    yield group
    group.released.set()


def test_only_nccl_is_aborted_and_an_abort_that_hangs_is_left(
    nccl: FakeGroup, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(collectives, "_ABORT_SECONDS", 0.05)
    gloo = FakeGroup()
    abort_nccl(nccl, None, gloo)  # type: ignore[arg-type]
    assert nccl.aborted
    assert not gloo.aborted


def wait_for_a_step(context: RankContext, dies: bool) -> object:
    """Rank 1 dies or hangs; rank 0 waits for a device that never finishes."""
    peers = PeerRegistry(context.store, context.rank, 2, replicas=2)
    peers.check_in(60)
    replicas = Replicas(dist.group.WORLD, Timeouts(60 if dies else 0.5, epochs=1), peers)
    if context.rank == 1:
        if dies:
            os._exit(0)
        context.store.wait(["done"])
        return None
    collectives.record_event = lambda device: FakeEvent(None)
    aborted: list[object] = []
    peers_module.abort_nccl = lambda *groups: aborted.extend(groups)
    found = result_or_error(lambda: replicas.wait_for_device(GPU))
    context.store.set("done", "")
    return found, aborted == [dist.group.WORLD]


@pytest.mark.parametrize("dies", [True, False])
def test_the_process_that_a_step_waits_for_is_named(dies: bool) -> None:
    (found, aborted), _ = run(wait_for_a_step, 2, dies, ending=[1] if dies else [])
    kind, text = found
    assert kind == "PeerError"
    assert text.startswith("lost network 0 (replica 1, rank 1 on ")
    assert "during a step" in text
    assert ("a process ended" if dies else "no response within 0.5 s") in text
    assert aborted


def graft_on_a_device(context: RankContext) -> object:
    """Rank 0's device never finishes the transfers of round 0."""
    peers = PeerRegistry(context.store, context.rank, 2)
    peers.check_in(60)
    if context.rank == 0:
        collectives.record_event = lambda device: FakeEvent(None)
        exchange.wait_for_device = lambda _, *rest, **more: wait_for_device(GPU, *rest, **more)
    grafter = Grafter(build("plain", context.rank), peers=peers, timeouts=Timeouts(1, epochs=1))
    return result_or_error(lambda: grafter.graft().round)


def test_a_round_waits_for_the_device_before_it_reads_from_it() -> None:
    (kind, text), other = run(graft_on_a_device, 2)
    assert kind == "PeerError"
    assert "round 0 failed, a peer died or did not respond" in text
    assert "no response within 1 s" in text
    assert other == 0


def test_the_watchdog_of_nccl_comes_after_our_own_timeout() -> None:
    limits = [process_group._group_timeout(600, nccl=nccl) for nccl in (False, True)]
    assert [limit.total_seconds() for limit in limits] == [600, 1200]
