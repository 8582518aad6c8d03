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
    store.set_timeout(timedelta(seconds=2))  # for a get of a key that is not set
    return store


def test_requests_are_forwarded_to_the_store(store: dist.Store) -> None:
    client = StoreClient(store, lambda: 30)
    client.set("key", "text")
    assert client.get("key") == b"text"
    client.set("second", "")
    assert client.multi_get(["second", "key"]) == [b"", b"text"]
    assert client.check(["key"])
    assert not client.check(["key", "other"])
    client.wait(["key"], timedelta(seconds=30))
    with pytest.raises(dist.DistStoreError):
        client.wait(["other"], timedelta(seconds=0.1))
    assert client.check(["key"])


def test_a_store_that_timed_out_is_not_used_again(store: dist.Store) -> None:
    seconds = 30.0
    client = StoreClient(store, lambda: seconds)
    client.set("key", "text")
    seconds = 0.1
    for key in ("never set", "key"):
        with pytest.raises(StoreTimeoutError, match=r"did not respond within 0\.1 s"):
            client.get(key)


def test_a_store_timeout_names_possible_causes(
    store: dist.Store,
) -> None:
    client = StoreClient(store, lambda: 0.1)
    peers = PeerRegistry(client, 1, 2)
    with pytest.raises(StoreTimeoutError):
        client.get("never set")
    for request in (
        peers.stop_reason,
        lambda: peers.publish("the report", ""),
        lambda: peers.read("the report", 0, 5),
    ):
        with pytest.raises(PeerError, match="hangs, or the link to it is cut"):
            request()
    assert peers.missing("the report") == []
