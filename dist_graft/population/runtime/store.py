"""The run's key-value store, for whose answers nobody waits without end."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from datetime import timedelta
from typing import TypeVar

import torch.distributed as dist

_Answer = TypeVar("_Answer")


class StoreTimeoutError(dist.DistNetworkError):
    """The store did not answer in time; it is not asked again."""


class StoreClient:
    """A store whose silence is an error after a while.

    A store's own time-out does not bound the wait for an answer that was lost on a dead link. So it
    is asked in a thread, which stays behind when no answer comes.

    Args:
        store: to be asked, by this object alone.
        seconds: how long to wait for an answer, now.
    """

    def __init__(self, store: dist.Store, seconds: Callable[[], float]) -> None:
        self._store = store
        self._seconds = seconds
        self._questions: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._silent = False
        threading.Thread(target=self._ask, daemon=True).start()

    def set(self, key: str, value: str) -> None:
        """Store a text."""
        self._answer(lambda: self._store.set(key, value))

    def get(self, key: str) -> bytes:
        """What is stored, once it is."""
        return self._answer(lambda: self._store.get(key))

    def check(self, keys: list[str]) -> bool:
        """Whether all keys are there."""
        return self._answer(lambda: self._store.check(keys))

    def wait(self, keys: list[str], timeout: timedelta) -> None:
        """Wait until all keys are there.

        Raises: DistStoreError after the time-out.
        """
        self._answer(lambda: self._store.wait(keys, timeout), timeout.total_seconds())

    def clone(self) -> StoreClient:
        """The same store over a connection of its own."""
        return StoreClient(self._answer(self._store.clone), self._seconds)

    def _answer(self, question: Callable[[], _Answer], longer: float = 0.0) -> _Answer:
        answers: queue.SimpleQueue[_Answer | RuntimeError] = queue.SimpleQueue()

        def ask() -> None:
            try:
                answers.put(question())
            except RuntimeError as error:
                answers.put(error)

        seconds = self._seconds()
        if not self._silent:
            self._questions.put(ask)
            try:
                answer = answers.get(timeout=seconds + longer)
            except queue.Empty:
                self._silent = True
        if self._silent:
            raise StoreTimeoutError(
                f"the run's key-value store did not answer within {seconds:g} s"
            )
        if isinstance(answer, RuntimeError):
            raise answer
        return answer

    def _ask(self) -> None:
        while True:
            self._questions.get()()
