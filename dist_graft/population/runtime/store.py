"""Key-value store client with a response timeout."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from datetime import timedelta
from typing import TypeVar

import torch.distributed as dist

_Response = TypeVar("_Response")


class StoreTimeoutError(dist.DistError):
    """The store did not respond in time; later requests fail at once."""


def _start_thread(call: Callable[[], None]) -> None:
    threading.Thread(target=call, daemon=True).start()


def call_with_timeout(
    function: Callable[[], _Response],
    seconds: float,
    submit: Callable[[Callable[[], None]], None] = _start_thread,
) -> _Response:
    """Call a function in another thread, which is abandoned if it does not return in time.

    Args:
        function: a call that torch may block beyond its timeout.
        seconds: timeout.
        submit: passes the call to a thread; default: a new one.

    Raises: TimeoutError after the timeout, or the RuntimeError of the function.
    """
    responses: queue.SimpleQueue[_Response | RuntimeError] = queue.SimpleQueue()

    def call() -> None:
        try:
            responses.put(function())
        except RuntimeError as error:
            responses.put(error)

    submit(call)
    try:
        response = responses.get(timeout=seconds)
    except queue.Empty:
        raise TimeoutError from None
    if isinstance(response, RuntimeError):
        raise response
    return response


class StoreClient:
    """Client whose requests fail when the store does not respond in time.

    The timeout of a `torch.distributed.Store` does not bound the wait for a response that was lost
    on a dead link. Requests are therefore made in a thread, which is abandoned after the timeout.

    Args:
        store: used by this client only.
        seconds: returns the current timeout.
    """

    def __init__(self, store: dist.Store, seconds: Callable[[], float]) -> None:
        self._store = store
        self._seconds = seconds
        self._requests: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._has_timed_out = False
        _start_thread(self._serve)

    def set(self, key: str, value: str) -> None:
        """Store a value."""
        self._request(lambda: self._store.set(key, value))

    def get(self, key: str) -> bytes:
        """Value of a key; waits until it is set."""
        return self._request(lambda: self._store.get(key))

    def multi_get(self, keys: list[str]) -> list[bytes]:
        """Values of several keys in one request; waits until all are set."""
        return self._request(lambda: self._store.multi_get(keys))

    def check(self, keys: list[str]) -> bool:
        """Whether all keys are set."""
        return self._request(lambda: self._store.check(keys))

    def wait(self, keys: list[str], timeout: timedelta) -> None:
        """Wait until all keys are set.

        Raises: DistStoreError after the timeout.
        """
        self._request(lambda: self._store.wait(keys, timeout), timeout.total_seconds())

    def clone(self) -> StoreClient:
        """Client of the same store with a separate connection."""
        return StoreClient(self._request(self._store.clone), self._seconds)

    def _request(self, function: Callable[[], _Response], extra_seconds: float = 0.0) -> _Response:
        seconds = self._seconds()
        if not self._has_timed_out:
            try:
                return call_with_timeout(function, seconds + extra_seconds, self._requests.put)
            except TimeoutError:
                self._has_timed_out = True
        raise StoreTimeoutError(f"the run's key-value store did not respond within {seconds:g} s")

    def _serve(self) -> None:
        while True:
            self._requests.get()()
