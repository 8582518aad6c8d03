from __future__ import annotations

import logging
from collections.abc import Iterator
from functools import partial

import pytest
import torch.distributed as dist

from dist_graft.population.runtime.peers import PeerRegistry
from dist_graft.population.runtime.timeouts import Timeouts


class RecordWarnings(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        assert record.levelno == logging.WARNING
        self.texts.append(record.getMessage())


@pytest.fixture
def warnings() -> Iterator[list[str]]:
    """Messages in the run's log."""
    handler = RecordWarnings()
    logging.getLogger("dist_graft").addHandler(handler)
    yield handler.texts
    logging.getLogger("dist_graft").removeHandler(handler)


@pytest.mark.parametrize(
    ("first", "epochs", "lengths", "expected"),
    [
        (600, 5, [], 600),
        (600, 5, [0.0], 600),
        (600, 5, [2.0], 60),
        (600, 5, [100.0], 500),
        (600, 5, [100.0, 20.0], 500),
        (600, 5, [20.0, 1000.0], 5000),
        (600, 1.5, [100.0], 150),
        (20, 5, [2.0], 20),
        (20, 5, [100.0], 500),
    ],
)
def test_the_timeout_follows_the_longest_epoch(
    first: float, epochs: float, lengths: list[float], expected: float
) -> None:
    timeouts = Timeouts(first, epochs=epochs)
    for length in lengths:
        timeouts.observe_epoch(length)
    assert timeouts.seconds == expected


def test_the_local_epoch_only_lengthens_the_timeout_until_all_have_reported() -> None:
    timeouts = Timeouts(600, epochs=5)
    timeouts.observe_local_epoch(2.0)
    assert timeouts.seconds == 600
    timeouts.observe_local_epoch(1000.0)
    assert timeouts.seconds == 5000
    timeouts.observe_epoch(1200.0)
    assert timeouts.seconds == 6000
    timeouts = Timeouts(600, epochs=5)
    timeouts.observe_local_epoch(2.0)
    timeouts.observe_epoch(3.0)
    assert timeouts.seconds == 60


@pytest.mark.parametrize(("longest", "warns_after"), [(0.0, 30.0), (7.0, 30.0), (100.0, 100.0)])
def test_a_slow_peer_is_warned_about_once(
    warnings: list[str], longest: float, warns_after: float
) -> None:
    timeouts, calls = Timeouts(600, epochs=5), []
    timeouts.observe_epoch(longest)
    waited = timeouts.warn_when_slow(
        "round 3", lambda: calls.append(1) or ["network 1", "network 4"]
    )
    waited(warns_after - 0.1)
    assert not warnings
    assert not calls
    waited(warns_after)
    waited(10 * warns_after)
    assert warnings == [
        f"round 3: waiting for network 1; network 4 for {warns_after:.0f} s; timeout after "
        f"{timeouts.seconds:.0f} s"
    ]
    assert len(calls) == 1


def test_each_wait_has_its_own_warning(warnings: list[str]) -> None:
    timeouts = Timeouts(600, epochs=5)
    for what in ("round 3", "round 4"):
        timeouts.warn_when_slow(what, list)(40)
    assert [text.partition(":")[0] for text in warnings] == ["round 3", "round 4"]
    assert "waiting for the other networks for 40 s" in warnings[0]


def test_the_warning_names_the_missing_peers(warnings: list[str]) -> None:
    store = dist.HashStore()
    for network in range(3):
        store.set(f"host/{network}", f"host{network}")
    peers = PeerRegistry(store, 1, 3)
    peers.publish("the report", "")
    waited = Timeouts(600, epochs=5).warn_when_slow(
        "the report", partial(peers.missing, "the report")
    )
    waited(50)
    assert "waiting for network 0 (rank 0 on host0); network 2 (rank 2 on host2) for" in warnings[0]
