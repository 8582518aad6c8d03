"""Signals to real loader workers, sent by a process that is not their trainer."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from launching import is_alive, wait_until

from dist_graft.config import DataConfig
from dist_graft.population.runtime.process import SIGNALS
from dist_graft.training.data import load_data

OPENING = """
import multiprocessing, signal, sys
import torch
from dist_graft.config import DataConfig
from dist_graft.training.data import load_data

torch.set_num_threads(1)
config = DataConfig(name="imagefolder", root=sys.argv[1], workers=2, image_size=16, batch_size=1)
data = load_data(config, seed=0, network=0, device=torch.device("cpu"), channels_last=False)
"""
TAKES_TURNS = """
batches = data.train_batches(0, 0, 12)
next(batches)
print(*[process.pid for process in multiprocessing.active_children()], flush=True)
sys.stdin.readline()
print(sum(1 for _ in zip(batches, range(10))), flush=True)
raise RuntimeError("the traceback keeps the loader alive")
"""
MANY_LOADERS = """
print("ready", flush=True)
for epoch in range(5):
    assert len(list(data.train_batches(epoch, 0, 12))) == 12
print("done", flush=True)
"""
Trainer = subprocess.Popen[str]


@contextlib.contextmanager
def trainer(program: str, root: Path) -> Iterator[Trainer]:
    with subprocess.Popen(
        [sys.executable, "-c", OPENING + program, str(root)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def first_line(process: Trainer) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def send_all(pids: list[int]) -> None:
    for pid in pids:
        for number in SIGNALS:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)


def test_only_the_trainer_ends_its_loader_workers(image_root):
    with trainer(TAKES_TURNS, image_root) as process:
        pids = [int(pid) for pid in first_line(process).split()]
        send_all(pids)
        out, errors = process.communicate("\n", timeout=60)
        assert out == "10\n", errors
        assert errors.strip().endswith("RuntimeError: the traceback keeps the loader alive")
        assert len(pids) == 2
        assert not any(map(is_alive, pids))


def test_a_worker_is_shielded_from_its_first_moment(image_root):
    with trainer(MANY_LOADERS, image_root) as process:
        assert first_line(process) == "ready"
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
        signalled = set()
        while process.poll() is None:
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                pids = [int(pid) for pid in children.read_text().split()]
                send_all(pids)
                signalled.update(pids)
            time.sleep(0.001)
        out, errors = process.communicate(timeout=60)
        assert (process.returncode, out) == (0, "done\n"), errors
        assert len(signalled) == 10


def test_workers_end_when_their_trainer_is_killed(image_root):
    with trainer(TAKES_TURNS, image_root) as process:
        pids = [int(pid) for pid in first_line(process).split()]
        send_all(pids)
        assert all(map(is_alive, pids))
        process.kill()
        wait_until(lambda: not any(map(is_alive, pids)), "the end of the workers", seconds=30)


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_end_when_their_batches_are_not_wanted_any_more(image_root, workers):
    config = DataConfig(
        name="imagefolder", root=str(image_root), workers=workers, image_size=16, batch_size=1
    )
    data = load_data(config, seed=0, network=0, device=torch.device("cpu"), channels_last=False)
    batches = data.train_batches(0, 0, 12)
    next(batches)
    pids = [process.pid for process in multiprocessing.active_children()]
    assert len(pids) == workers
    del batches
    assert not any(map(is_alive, pids))


def test_the_trainer_takes_its_signals_while_workers_are_alive(image_root):
    taken = []
    before = signal.signal(signal.SIGUSR1, lambda number, _: taken.append(number))
    try:
        config = DataConfig(name="imagefolder", root=str(image_root), workers=1, image_size=16)
        data = load_data(config, seed=0, network=0, device=torch.device("cpu"), channels_last=False)
        batches = data.train_batches(0, 0, 1)
        next(batches)
        signal.raise_signal(signal.SIGUSR1)
        assert taken == [signal.SIGUSR1]
        del batches
    finally:
        signal.signal(signal.SIGUSR1, before)
