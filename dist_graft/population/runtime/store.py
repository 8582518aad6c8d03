"""Key-value store client with a response timeout."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from datetime import timedelta
from typing import TypeVar

import torch.distributed as dist

_Response = TypeVar("_Response")


class StoreTimeoutError(dist.DistNetworkError):
    """The store did not respond in time; later requests fail at once."""


class StoreClient:
    """Client whose requests fail when the store does not respond in time.

    The timeout of a `torch.distributed.Store` does not bound the wait for a response that was lost
    on a dead link. Requests are therefore made in a thread, which is abandoned when no response
    comes.

    Args:
        store: used by this client only.
        seconds: returns the current timeout.
    """

    def __init__(self, store: dist.Store, seconds: Callable[[], float]) -> None:
        self._store = store
        self._seconds = seconds
        self._requests: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._has_timed_out = False
        threading.Thread(target=self._serve, daemon=True).start()

    def set(self, key: str, value: str) -> None:
        """Store a value."""
        self._request(lambda: self._store.set(key, value))

    def get(self, key: str) -> bytes:
        """Value of a key; waits until it is set."""
        return self._request(lambda: self._store.get(key))

    def check(self, keys: list[str]) -> bool:
        """Whether all keys are set."""
        return self._request(lambda: self._store.check(keys))

    def wait(self, keys: list[str], timeout: timedelta) -> None:
        """Wait until all keys are set.

        Raises: DistStoreError after the timeout.
        """
        self._request(lambda: self._store.wait(keys, timeout), timeout.total_seconds())

    def clone(self) -> StoreClient:
        """Client of the same store with its own connection."""
        return StoreClient(self._request(self._store.clone), self._seconds)

    def _request(self, function: Callable[[], _Response], extra_seconds: float = 0.0) -> _Response:
        responses: queue.SimpleQueue[_Response | RuntimeError] = queue.SimpleQueue()

        def serve() -> None:
            try:
                responses.put(function())
            except RuntimeError as error:
                responses.put(error)

        seconds = self._seconds()
        if not self._has_timed_out:
            self._requests.put(serve)
            try:
                response = responses.get(timeout=seconds + extra_seconds)
            except queue.Empty:
                self._has_timed_out = True
        if self._has_timed_out:
            raise StoreTimeoutError(
                f"the run's key-value store did not answer within {seconds:g} s"
            )
        if isinstance(response, RuntimeError):
            raise response
        return response

    def _serve(self) -> None:
        while True:
            self._requests.get()()
