from __future__ import annotations

import logging
from collections.abc import Iterator
from functools import partial

import pytest
import torch.distributed as dist

from dist_graft.population.runtime.peers import PeerRegistry
from dist_graft.population.runtime.timeouts import Timeouts


class Lines(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        assert record.levelno == logging.WARNING
        self.texts.append(record.getMessage())


@pytest.fixture
def said() -> Iterator[list[str]]:
    """What the run's log is told."""
    handler = Lines()
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
def test_it_follows_the_longest_epoch(
    first: float, epochs: float, lengths: list[float], expected: float
) -> None:
    timeouts = Timeouts(first, epochs=epochs)
    for length in lengths:
        timeouts.observe_epoch(length)
    assert timeouts.seconds == expected


def test_until_all_told_of_an_epoch_ones_own_only_lengthens_it() -> None:
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


@pytest.mark.parametrize(("longest", "from_then"), [(0.0, 30.0), (7.0, 30.0), (100.0, 100.0)])
def test_a_remark_is_made_once_and_not_before_its_time(
    said: list[str], longest: float, from_then: float
) -> None:
    timeouts, asked = Timeouts(600, epochs=5), []
    timeouts.observe_epoch(longest)
    waited = timeouts.warn_when_slow(
        "round 3", lambda: asked.append(1) or ["network 1", "network 4"]
    )
    waited(from_then - 0.1)
    assert not said
    assert not asked
    waited(from_then)
    waited(10 * from_then)
    assert said == [
        f"round 3: waiting for network 1; network 4 since {from_then:.0f} s; gives up after "
        f"{timeouts.seconds:.0f} s"
    ]
    assert len(asked) == 1


def test_each_wait_has_a_remark_of_its_own(said: list[str]) -> None:
    timeouts = Timeouts(600, epochs=5)
    for what in ("round 3", "round 4"):
        timeouts.warn_when_slow(what, list)(40)
    assert [text.partition(":")[0] for text in said] == ["round 3", "round 4"]
    assert "waiting for the other networks since 40 s" in said[0]


def test_it_names_those_who_have_not_come(said: list[str]) -> None:
    store = dist.HashStore()
    for network in range(3):
        store.set(f"host/{network}", f"host{network}")
    peers = PeerRegistry(store, 1, 3)
    peers.publish("the report", "")
    waited = Timeouts(600, epochs=5).warn_when_slow(
        "the report", partial(peers.missing, "the report")
    )
    waited(50)
    assert "waiting for network 0 (rank 0 on host0); network 2 (rank 2 on host2) since" in said[0]
