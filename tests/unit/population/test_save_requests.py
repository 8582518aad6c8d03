from __future__ import annotations

from collections.abc import Iterator
from datetime import timedelta
from types import SimpleNamespace

import pytest
import torch.distributed as dist

from dist_graft.population.runtime import checkpoint_requests as saving
from dist_graft.population.runtime.checkpoint_requests import SaveRequests
from dist_graft.population.runtime.peers import PeerRegistry

AT_ONCE = 1e-300
"""Minutes that are over at the next look."""


@pytest.fixture(params=["hash", "tcp"])
def store(request: pytest.FixtureRequest) -> Iterator[dist.Store]:
    if request.param == "hash":
        store: dist.Store = dist.HashStore()
        store.set_timeout(timedelta(seconds=20))
        yield store
    else:
        yield dist.TCPStore(
            "127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=20)
        )


def pair(store: dist.Store, minutes: float | None = AT_ONCE) -> tuple[SaveRequests, SaveRequests]:
    """Of the network that asks, and of another."""
    asking, other = (
        SaveRequests(minutes, PeerRegistry(store, network, 2), asks=network == 0)
        for network in (0, 1)
    )
    return asking, other


def looks(requests: SaveRequests, *, busy: bool = False) -> bool:
    """Whether one of a few looks says that a set is due: a clock may stand still between two."""
    return any(requests.due(busy=busy) for _ in range(100))


def test_what_the_asker_calls_a_set_everybody_calls_it(store: dist.Store) -> None:
    asking, other = pair(store)
    for number in range(3):
        assert (asking.count, other.count) == (number, number)
        assert not looks(other)
        assert looks(asking)
        assert asking.agreed(f"set {number}", 20) == f"set {number}"
        assert looks(other)
        assert other.agreed("a name of its own", 20) == f"set {number}"
        asking.done()
        other.done()


def test_who_was_told_at_a_meeting_takes_part_without_having_looked(store: dist.Store) -> None:
    asking, other = pair(store)
    asking.agreed("name", 20)
    asking.done()
    assert other.agreed("own", 20) == "name"
    other.done()
    assert not looks(other)


def test_not_while_the_set_before_is_being_written(store: dist.Store) -> None:
    asking, other = pair(store)
    assert not looks(asking, busy=True)
    asking.agreed("name", 20)
    assert not looks(other, busy=True)
    assert looks(other)
    assert looks(asking)


def test_never_without_minutes(store: dist.Store) -> None:
    asking, other = pair(store, None)
    PeerRegistry(store, 0, 2).publish("save 1", "name")
    assert not looks(asking)
    assert not looks(other)


def test_a_network_alone_names_its_sets_itself() -> None:
    alone = SaveRequests(AT_ONCE, None, asks=True)
    assert looks(alone)
    assert alone.agreed("name", 0) == "name"
    alone.done()
    assert alone.count == 1
    assert looks(alone)


class TestTime:
    """Told by a clock that stands still: nobody waits for minutes."""

    @pytest.fixture
    def clock(self, monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
        clock = SimpleNamespace(now=1000.0)
        monkeypatch.setattr(saving, "time", SimpleNamespace(monotonic=lambda: clock.now))
        return clock

    def test_the_minutes_count_from_the_last_set(self, clock: SimpleNamespace) -> None:
        alone = SaveRequests(10, None, asks=True)
        for since, event in ((0.0, "done"), (300.0, "saved"), (0.0, "done")):
            clock.now += since
            getattr(alone, event)()
            clock.now += 599
            assert not alone.due(busy=False)
            clock.now += 1
            assert alone.due(busy=False)
        assert alone.count == 2

    def test_the_store_is_asked_once_a_second_at_most(self, clock: SimpleNamespace) -> None:
        store = dist.HashStore()
        asking, other = pair(store, 10)
        asking.agreed("name", 20)
        clock.now += 0.9
        assert not other.due(busy=False)
        clock.now += 0.1
        assert other.due(busy=False)
        assert not other.due(busy=False)
