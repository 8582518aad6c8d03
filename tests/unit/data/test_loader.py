"""Lifetime of real loader workers, and signals from processes other than their trainer."""

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
from torch.utils.data import Dataset

from dist_graft.config import DataConfig
from dist_graft.population.runtime.process import SIGNALS
from dist_graft.population.runtime.process_info import ProcessInfo
from dist_graft.training.data import Data, load_data, loader
from dist_graft.training.data.datasets import DatasetData, Datasets
from dist_graft.training.data.loader import too_many_workers

PREAMBLE = """
import multiprocessing, signal, sys
import torch
from dist_graft.config import DataConfig
from dist_graft.training.data import load_data

config = DataConfig(name="imagefolder", root=sys.argv[1], workers=2, image_size=16, batch_size=1)
data = load_data(config, seed=0, network=0, device=torch.device("cpu"), channels_last=False)
"""
WAITS_BETWEEN_BATCHES = """
batches = data.train_batches(0, 0, 12)
next(batches)
print(*[process.pid for process in multiprocessing.active_children()], flush=True)
sys.stdin.readline()
print(sum(1 for _ in zip(batches, range(10))), flush=True)
raise RuntimeError("the traceback keeps the loader alive")
"""
FIVE_EPOCHS = """
print("ready", flush=True)
for epoch in range(5):
    batches = data.train_batches(epoch, 0, 12)
    next(batches)
    sys.stdin.readline()
    assert len(list(batches)) == 11
print("done", flush=True)
"""
Trainer = subprocess.Popen[str]


@contextlib.contextmanager
def trainer(program: str, root: Path) -> Iterator[Trainer]:
    with subprocess.Popen(
        [sys.executable, "-c", PREAMBLE + program, str(root)],
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
    with trainer(WAITS_BETWEEN_BATCHES, image_root) as process:
        pids = [int(pid) for pid in first_line(process).split()]
        send_all(pids)
        out, errors = process.communicate("\n", timeout=60)
        assert out == "10\n", errors
        assert errors.strip().endswith("RuntimeError: the traceback keeps the loader alive")
        assert len(pids) == 2
        assert not any(map(is_alive, pids))


def test_a_worker_is_shielded_from_its_start(image_root):
    with trainer(FIVE_EPOCHS, image_root) as process:
        assert first_line(process) == "ready"
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
        signalled: set[int] = set()
        for epoch in range(5):
            while len(signalled) < 2 * (epoch + 1) and process.poll() is None:
                with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                    pids = [int(pid) for pid in children.read_text().split()]
                    send_all(pids)
                    signalled.update(pids)
                time.sleep(0.001)
            assert process.stdin is not None
            process.stdin.write("\n")
            process.stdin.flush()
        out, errors = process.communicate(timeout=60)
        assert (process.returncode, out) == (0, "done\n"), errors
        assert len(signalled) == 10


def test_workers_end_when_their_trainer_is_killed(image_root):
    with trainer(WAITS_BETWEEN_BATCHES, image_root) as process:
        pids = [int(pid) for pid in first_line(process).split()]
        send_all(pids)
        assert all(map(is_alive, pids))
        process.kill()
        wait_until(lambda: not any(map(is_alive, pids)), "the end of the workers", seconds=30)


def folder_images(root: Path, workers: int) -> Data:
    config = DataConfig(
        name="imagefolder", root=str(root), workers=workers, image_size=16, batch_size=1
    )
    return load_data(config, seed=0, network=0, device=torch.device("cpu"), channels_last=False)


class Slow(Dataset[tuple[int, int]]):
    """Far more samples than a test can read."""

    def __len__(self) -> int:
        return 1000

    def __getitem__(self, index: int) -> tuple[int, int]:
        time.sleep(0.1)
        return index, index


def slow_samples(_: Path, workers: int) -> Data:
    return DatasetData(
        Datasets(train=Slow(), test=Slow()),
        DataConfig(workers=workers, batch_size=1),
        seed=0,
        network=0,
        device=torch.device("cpu"),
    )


def worker_pids() -> list[int]:
    return [process.pid for process in multiprocessing.active_children() if process.pid]


@pytest.mark.parametrize("make", [folder_images, slow_samples])
@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("split", ["train", "test"])
def test_closing_the_batches_ends_the_workers(image_root, make, workers, split):
    data = make(image_root, workers)
    every = (0, 0, data.steps_per_epoch)
    batches = data.train_batches(*every) if split == "train" else data.eval_batches("test")
    next(batches)
    pids = worker_pids()
    assert len(pids) == workers
    began = time.monotonic()
    batches.close()
    assert not any(map(is_alive, pids))
    assert time.monotonic() - began < 30, "the workers loaded the whole epoch"
    assert list(batches) == []


@pytest.mark.parametrize("make", [folder_images, slow_samples])
def test_one_iterator_serves_a_whole_epoch(image_root, make):
    data = make(image_root, 1)
    batches = data.train_batches(0, 0, data.steps_per_epoch)
    assert worker_pids() == [], "nothing starts before the first batch"
    pids = set()
    for _ in range(8):
        next(batches)
        pids.update(worker_pids())
    assert len(pids) == 1
    batches.close()


def test_workers_end_after_the_last_batch(image_root):
    data = folder_images(image_root, 2)
    assert len(list(data.train_batches(0, 0, 12))) == 12
    assert worker_pids() == []


def test_the_trainer_receives_signals_while_workers_are_alive(image_root):
    received = []
    before = signal.signal(signal.SIGUSR1, lambda number, _: received.append(number))
    try:
        batches = folder_images(image_root, 1).train_batches(0, 0, 1)
        next(batches)
        signal.raise_signal(signal.SIGUSR1)
        assert received == [signal.SIGUSR1]
        batches.close()
    finally:
        signal.signal(signal.SIGUSR1, before)


class TestNumberOfWorkers:
    """On a machine with 8 cores."""

    @pytest.fixture(autouse=True)
    def cores(self, monkeypatch, tmp_path):
        """Return a function that sets the number of cores."""
        for name in ("SLURM_CPUS_ON_NODE", "RANK", "WORLD_SIZE", "TORCHELASTIC_RUN_ID"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setattr(loader, "_CPU_QUOTA", tmp_path / "cpu.max")

        def set_cores(number):
            monkeypatch.setattr("os.sched_getaffinity", lambda process: set(range(number)))

        set_cores(8)
        return set_cores

    @pytest.fixture
    def processes(self, monkeypatch):
        def set_processes(number):
            monkeypatch.setenv("RANK", "0")
            monkeypatch.setenv("WORLD_SIZE", str(number))

        return set_processes

    @pytest.mark.parametrize(
        ("number", "here", "workers"), [(8, 1, 7), (8, 2, 3), (8, 4, 1), (2, 4, 1), (64, 2, 16)]
    )
    def test_auto(self, number, here, workers, cores, processes, image_root):
        cores(number)
        processes(here)
        config = DataConfig(name="imagefolder", root=str(image_root))
        data = load_data(config, seed=0, network=0, device=torch.device("cpu"), channels_last=False)
        assert data.workers == workers

    @pytest.mark.parametrize(
        ("quota", "workers"),
        [("max 100000", 3), ("400000 100000", 1), ("590000 100000", 2), ("1600000 100000", 3)],
    )
    def test_auto_within_the_quota_of_a_container(self, quota, workers, processes, tmp_path):
        (tmp_path / "cpu.max").write_text(f"{quota}\n")
        processes(2)
        assert datasets_with(workers="auto").workers == workers

    @pytest.mark.parametrize(("option", "workers"), [(None, 0), (0, 0), (40, 40), ("auto", 7)])
    def test_datasets_from_python(self, option, workers):
        assert datasets_with(workers=option).workers == workers

    def test_only_a_surplus_is_a_warning(self):
        two, three = ProcessInfo(0, 2, 0, 2), ProcessInfo(0, 6, 0, 3)
        assert too_many_workers(4, two) == too_many_workers(0, three) == ""
        assert too_many_workers(3, three).startswith(
            "loader workers on this machine: 9 (data.workers 3 in each of 3 processes), cores: 8;"
        )

    def test_torch_does_not_warn(self, cores):
        """Warnings are errors in tests."""
        cores(1)
        batches = datasets_with(workers=2, batch_size=500).train_batches(0, 0, 1)
        batch = iter(batches)
        with contextlib.closing(batches):
            next(batch)


def datasets_with(**options):
    """The `Data` of a thousand samples."""
    samples = [(index, index) for index in range(1000)]
    return DatasetData(
        Datasets(train=Listed(samples), test=Listed(samples)),
        DataConfig(**options),
        seed=0,
        network=0,
        device=torch.device("cpu"),
    )


class Listed(list):
    """A list is a map-style dataset."""
