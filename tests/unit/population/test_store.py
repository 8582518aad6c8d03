from __future__ import annotations

from datetime import timedelta

import pytest
import torch.distributed as dist

from dist_graft.errors import PeerError
from dist_graft.population.runtime.peers import PeerRegistry
from dist_graft.population.runtime.store import StoreClient, StoreTimeoutError


@pytest.fixture
def store() -> dist.Store:
    store = dist.HashStore()
    store.set_timeout(timedelta(seconds=2))  # how long a get of what is not there blocks its thread
    return store


def test_it_answers_as_the_store_does(store: dist.Store) -> None:
    answering = StoreClient(store, lambda: 30)
    answering.set("key", "text")
    assert answering.get("key") == b"text"
    assert answering.check(["key"])
    assert not answering.check(["key", "other"])
    answering.wait(["key"], timedelta(seconds=30))
    with pytest.raises(dist.DistStoreError):
        answering.wait(["other"], timedelta(seconds=0.1))
    assert answering.check(["key"])


def test_silence_is_an_error_and_the_store_is_not_asked_again(store: dist.Store) -> None:
    answering = StoreClient(store, lambda: 0.1)
    answering.set("key", "text")
    for question in ("nobody sets this", "key"):
        with pytest.raises(StoreTimeoutError, match=r"did not answer within 0\.1 s"):
            answering.get(question)


def test_a_network_that_the_store_does_not_answer_is_told_what_may_be_wrong(
    store: dist.Store,
) -> None:
    answering = StoreClient(store, lambda: 0.1)
    peers = PeerRegistry(answering, 1, 2)
    with pytest.raises(StoreTimeoutError):
        answering.get("nobody sets this")
    for ask in (
        peers.stop_reason,
        lambda: peers.is_published("save 1", 0),
        lambda: peers.publish("the report", ""),
        lambda: peers.read("the report", 0, 5),
    ):
        with pytest.raises(PeerError, match="hangs, or the link to it is cut"):
            ask()
    assert peers.missing("the report") == []
