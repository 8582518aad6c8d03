from __future__ import annotations

import ctypes
import multiprocessing
import os
import queue
import signal
import threading
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import pytest
import torch.distributed as dist

from dist_graft.population.runtime.peers import PeerRegistry
from dist_graft.population.runtime.process import SIGNALS
from dist_graft.population.runtime.stop_requests import GracePeriod, SignalMonitor, StopRequests


@pytest.fixture(autouse=True)
def _handlers() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def expired() -> threading.Event:
    return threading.Event()


@pytest.fixture
def store() -> dist.HashStore:
    store = dist.HashStore()
    store.set_timeout(timedelta(seconds=5))
    return store


def requests(
    folder: Path, expired: threading.Event, peers: PeerRegistry | None = None, grace: float = 60
) -> StopRequests:
    return StopRequests([folder / "STOP"], peers, grace=GracePeriod(grace, expired.set))


def test_no_stop_is_requested(tmp_path: Path, expired: threading.Event) -> None:
    here = requests(tmp_path, expired)
    here.install_handlers()
    assert not here.requested()
    assert here.reason is None


@pytest.mark.parametrize("number", SIGNALS)
def test_the_first_signal_requests_a_stop_and_later_ones_are_ignored(
    number: signal.Signals, tmp_path: Path, expired: threading.Event
) -> None:
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # tests may run under nohup
    here = requests(tmp_path, expired)
    here.install_handlers()
    os.kill(os.getpid(), number)
    assert here.requested()
    for other in SIGNALS:
        os.kill(os.getpid(), other)
    assert here.requested()
    assert here.reason == number.name


def test_a_file_requests_a_stop(tmp_path: Path, expired: threading.Event) -> None:
    (tmp_path / "STOP").touch()
    here = requests(tmp_path, expired)
    assert here.requested()
    assert str(tmp_path / "STOP") in str(here.reason)


def test_an_ignored_file_requests_nothing_until_it_is_touched(
    tmp_path: Path, expired: threading.Event
) -> None:
    ignored, own = tmp_path / "STOP", tmp_path / "network00" / "STOP"
    own.parent.mkdir()

    def job() -> StopRequests:
        grace = GracePeriod(60, expired.set)
        return StopRequests([ignored, own], None, grace=grace, ignored=[ignored])

    ignored.touch()
    before, later = job(), job()
    assert not before.requested()
    os.utime(ignored, (0, 0))
    assert later.requested()
    own.touch()
    there = job()
    assert there.requested()
    assert str(own) in str(there.reason)


def test_a_signal_to_one_process_reaches_all(
    tmp_path: Path, expired: threading.Event, store: dist.HashStore
) -> None:
    here, there = (requests(tmp_path, expired, PeerRegistry(store, k, 2)) for k in (0, 1))
    here.install_handlers()
    os.kill(os.getpid(), signal.SIGUSR1)
    assert here.requested()
    assert there.peer_reason() == "SIGUSR1"
    assert there.requested()
    assert there.reason == "SIGUSR1"


def test_the_store_is_polled_at_most_once_a_second(
    tmp_path: Path, expired: threading.Event, store: dist.HashStore
) -> None:
    peers = PeerRegistry(store, 0, 1)
    here = requests(tmp_path, expired, peers)
    assert not here.requested()
    peers.request_stop("SIGTERM")
    assert not here.requested()


def test_the_grace_period_expires_after_a_request(tmp_path: Path, expired: threading.Event) -> None:
    (tmp_path / "STOP").touch()
    here = requests(tmp_path, expired, grace=0.01)
    assert not expired.is_set()
    assert here.requested()
    assert expired.wait(10)


def test_a_cancelled_grace_period_does_not_expire(expired: threading.Event) -> None:
    grace = GracePeriod(60, expired.set)
    grace.start()
    grace.start()
    grace.cancel()
    grace._timer.join(10)
    assert not grace._timer.is_alive()
    assert not expired.is_set()
    before = GracePeriod(0.0, expired.set)
    before.cancel()
    before.start()
    assert not expired.wait(0.1)


@pytest.fixture
def noticed() -> Iterator[queue.SimpleQueue[signal.Signals]]:
    """Signals that a monitor has noticed."""
    numbers: queue.SimpleQueue[signal.Signals] = queue.SimpleQueue()
    monitor = SignalMonitor(numbers.put)
    yield numbers
    monitor.close()
    assert signal.set_wakeup_fd(-1) == -1


def test_a_signal_is_noticed_while_the_main_thread_is_blocked(
    tmp_path: Path,
    expired: threading.Event,
    store: dist.HashStore,
    noticed: queue.SimpleQueue[signal.Signals],
) -> None:
    here, there = (requests(tmp_path, expired, PeerRegistry(store, k, 2)) for k in (0, 1))
    here.install_handlers()

    reading, writing = os.pipe()

    def announce() -> None:
        signal.pthread_kill(threading.get_ident(), signal.SIGUSR1)
        here.announce(noticed.get(timeout=30))
        os.write(writing, b".")

    thread = threading.Thread(target=announce)
    thread.start()
    byte = ctypes.create_string_buffer(1)
    assert ctypes.CDLL(None).read(reading, byte, 1) == 1  # outside of Python until it is announced
    assert there.peer_reason() == "SIGUSR1"
    thread.join()
    for end in (reading, writing):
        os.close(end)


def test_signals_to_forked_processes_are_not_noticed(
    noticed: queue.SimpleQueue[signal.Signals],
) -> None:
    here = os.getpid()
    for number in SIGNALS:
        signal.signal(number, lambda *_: None if os.getpid() == here else os._exit(0))

    def stop() -> None:
        os.kill(os.getpid(), signal.SIGUSR1)

    process = multiprocessing.get_context("fork").Process(target=stop)
    process.start()
    process.join(30)
    assert process.exitcode == 0
    os.kill(here, signal.SIGTERM)
    assert noticed.get(timeout=30) == signal.SIGTERM
