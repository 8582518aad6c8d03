"""A population of jobs that come and go (graft.exchange files): speed, faults, cost of a round.

slow: images/s of three networks beside a fourth one that runs at a third of their speed, over those
    of four independent networks; and the same for networks that run together.
chaos: kills, stops, removes and replaces jobs, starts them late, damages publications, fills the
    disk of the exchange folder and expires leases, at random times.
round: training stall caused by a round's publication over a plain copy of the weights (ResNet-50).
start: rounds of many networks in one folder, and the file operations of one of them.

    python benchmarks/churn.py all
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import multiprocessing
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from reporting import machine, ratios, spread, verdict

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from launching import environment, run_program, torchrun

from dist_graft import Callback, Grafter, Trainer
from dist_graft.config import ModelConfig
from dist_graft.population.round.publications import Publication, PublicationError
from dist_graft.population.runtime.process import keep_freed_memory
from dist_graft.training.checkpoint.files import complete_checkpoints
from dist_graft.training.models import build_model

HERE = Path(__file__).parent
NETWORKS = 4
SMALL = (
    *("--model.name", "resnet8", "--data.test_samples", "64", "--data.batch_size", "32"),
    *("--runtime.device", "cpu", "--runtime.threads", "1", "--monitor.tensorboard", "false"),
    *("--optim.schedule", "constant", "--optim.lr", "0.02"),
)
EPOCHS, HANG_SECONDS = 40, 600
FILES = ("--graft.exchange", "files", "--population.size", str(NETWORKS))


# ------------------------------------------------------------------------------------------------
# Callbacks of the jobs
# ------------------------------------------------------------------------------------------------


class Slow(Callback):
    """Sleeps after every step of network 3 for twice the step's time."""

    def on_epoch_start(self, trainer: Trainer) -> None:
        self._last = time.perf_counter()

    def on_step_end(self, trainer: Trainer) -> None:
        if trainer.process.network == NETWORKS - 1:
            time.sleep(2 * (time.perf_counter() - self._last))
        self._last = time.perf_counter()


class RoundLog(Callback):
    """Appends start, donor and digest of every round to RUN/rounds.jsonl."""

    def on_round_end(self, trainer: Trainer, record: Any) -> None:
        line = {"start": time.time() - record.seconds, "digest": record.digest}
        line |= {"network": record.network, "donor": record.donor}
        with (trainer.directory.path / "rounds.jsonl").open("a") as file:
            file.write(json.dumps(line) + "\n")


# ------------------------------------------------------------------------------------------------
# Jobs
# ------------------------------------------------------------------------------------------------


def main_of_job(arguments: list[str], output: str) -> None:
    """Entry point of a job's process, forked from a server that has imported torch."""
    sys.path.insert(0, str(HERE))
    opened = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(opened, 1)
    os.dup2(opened, 2)
    from dist_graft.cli import run

    status = run(arguments)
    sys.stdout.flush()
    os._exit(status)


class Jobs:
    """Jobs of one population."""

    def __init__(self, run: Path, *options: str) -> None:
        self.run = run
        self._options = options
        self.epochs = EPOCHS
        self._context: Any = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(["dist_graft.training.trainer", "dist_graft.cli"])
        self.running: dict[int, Any] = {}

    def arguments(self, network: int) -> list[str]:
        """Command line of a job."""
        own = ("--population.network", str(network), "--epochs", str(self.epochs))
        return ["train", "--run_dir", str(self.run), *SMALL, *self._options, *FILES, *own]

    def start(self, network: int) -> Any:
        """Start the job of a network; a second one for the same network replaces it here."""
        output = str(self.run.with_suffix(f".{network}.out"))
        process = self._context.Process(target=main_of_job, args=(self.arguments(network), output))
        process.start()
        self.running[network] = process
        return process

    def output(self, network: int) -> str:
        """Return what all jobs of a network printed."""
        path = self.run.with_suffix(f".{network}.out")
        return path.read_text(errors="replace") if path.exists() else ""

    def wait(self, seconds: float) -> list[int]:
        """Wait for all jobs; returns the networks that still run."""
        deadline = time.monotonic() + seconds
        for process in self.running.values():
            process.join(max(0.0, deadline - time.monotonic()))
        return [network for network, process in self.running.items() if process.is_alive()]


def lines(path: Path) -> list[dict[str, Any]]:
    """Objects of a JSON Lines file."""
    text = path.read_text() if path.exists() else ""
    return [json.loads(line) for line in text.splitlines()]


# ------------------------------------------------------------------------------------------------
# One slow network
# ------------------------------------------------------------------------------------------------


def throughput(run: Path, network: int, samples: int) -> float:
    """Images/s over all epochs but the first, with rounds, evaluations and waits."""
    epochs = lines(run / f"network{network:02d}" / "metrics.jsonl")[1:]
    return samples * len(epochs) / sum(sum(line["phase_seconds"].values()) for line in epochs)


def slow(repetitions: int, folder: Path) -> None:
    """Compare the fast networks' throughput beside a slow one with that of independent ones."""
    samples, epochs = 512, 8
    options = ("--data.train_samples", str(samples), "--callbacks", "churn:Slow")
    found: dict[str, list[float]] = {"independent": [], "jobs": [], "together": []}
    for number in range(repetitions):
        for kind, values in found.items():
            run = folder / f"{kind}{number}"
            if kind == "together":
                command = torchrun(NETWORKS, run, *SMALL, *options, "--epochs", str(epochs))
                done = run_program(command, timeout=1200, PYTHONPATH=f"{HERE}:{Path.cwd()}")
                assert done.status == 0, done.errors
            else:
                method = ("--method", "none") if kind == "independent" else ()
                jobs = Jobs(run, *options, *method)
                jobs.epochs = epochs
                for network in range(NETWORKS):
                    jobs.start(network)
                assert not jobs.wait(1200)
            values.append(
                statistics.fmean(throughput(run, network, samples) for network in range(3))
            )
    for kind, values in found.items():
        print(f"  {kind:12} {spread(values, 0)} images/s of each fast network")
    base = found["independent"]
    jobs_ratio, together = (ratios(found[kind], base) for kind in ("jobs", "together"))
    print(verdict("jobs / independent", jobs_ratio, at_least=0.97))
    print(f"together / independent: {spread(together)} (reported)")


# ------------------------------------------------------------------------------------------------
# Chaos
# ------------------------------------------------------------------------------------------------


class Chaos:
    """Random events in the life of a population, and what must hold in spite of them."""

    def __init__(self, run: Path, jobs: Jobs, generator: random.Random, *, full: bool) -> None:
        self.run = run
        self.jobs = jobs
        self._random = generator
        self.counts: Counter[str] = Counter()
        self.removed: int | None = None
        self.damaged: dict[str, float] = {}
        """Time at which publications were damaged, by digest."""
        self.problems: list[str] = []
        self.lost: list[float] = []
        kinds: dict[str, Callable[[], bool]] = {
            "kill and start again": self.kill,
            "stop and continue": self.stop,
            "torn publication": lambda: self.damage(torn=True),
            "changed publication": lambda: self.damage(torn=False),
            "expired lease": self.expire_lease,
            "late start": self.start_late,
            "removed for good": self.remove,
            "replaced": self.replace,
        }
        if full:
            kinds["full disk"] = self.fill_disk
        self.kinds = kinds

    def alive(self) -> list[int]:
        """Networks with a job."""
        return [k for k, process in self.jobs.running.items() if process.is_alive()]

    def event(self) -> None:
        """Let something happen, if it is possible now."""
        kind = self._random.choice(list(self.kinds))
        self.counts[kind] += self.kinds[kind]()

    def start_all(self) -> list[int]:
        """Start every network whose job has ended, and return all but the removed one."""
        survivors = [network for network in range(NETWORKS) if network != self.removed]
        for network in survivors:
            if network not in self.alive():
                self.jobs.start(network)
        return survivors

    def kill(self) -> bool:
        """Kill a job, and start it again."""
        network = self._kill_one()
        if network is not None:
            self.jobs.start(network)
        return network is not None

    def replace(self) -> bool:
        """Kill a job, lose its state, and start another one for its network."""
        network = self._kill_one()
        if network is None:
            return False
        shutil.rmtree(self.run / f"network{network:02d}", ignore_errors=True)
        self.jobs.start(network)
        return True

    def remove(self) -> bool:
        """Kill a job for good, once."""
        if self.removed is not None or sum(self.counts.values()) < 20:
            return False
        self.removed = self._kill_one()
        if self.removed is None:
            return False
        del self.jobs.running[self.removed]
        return True

    def start_late(self) -> bool:
        """Start a network that was never started, or whose job has ended in an error."""
        ended = [k for k, p in self.jobs.running.items() if not p.is_alive() and p.exitcode]
        missing = [k for k in range(NETWORKS) if k not in self.jobs.running and k != self.removed]
        if not (missing or ended):
            return False
        self.jobs.start(self._random.choice(missing or ended))
        return True

    def stop(self) -> bool:
        """Stop a job for two seconds."""
        if not (alive := self.alive()):
            return False
        process = self.jobs.running[self._random.choice(alive)]
        os.kill(process.pid, signal.SIGSTOP)
        time.sleep(2)
        os.kill(process.pid, signal.SIGCONT)
        return True

    def damage(self, *, torn: bool) -> bool:
        """Truncate a publication in place, or change one of its bytes."""
        paths = sorted(self.run.glob("exchange/*/epoch_*.safetensors"))
        if not paths:
            return False
        path = self._random.choice(paths)
        try:
            with Publication(path) as publication:
                digest = publication.published.digest
            content = bytearray(path.read_bytes())
            if torn:
                os.truncate(path, self._random.randrange(len(content)))
            else:
                header = int.from_bytes(content[:8], "little")
                position = self._random.randrange(8 + header, len(content))
                with path.open("r+b") as file:
                    file.seek(position)
                    file.write(bytes([content[position] ^ 1]))
        except (OSError, PublicationError):
            return False  # already damaged, or just replaced
        self.damaged[digest] = time.time()
        return True

    def expire_lease(self) -> bool:
        """Age the lease of a job, and let another job take its network over."""
        alive = self.alive()
        path = None if not alive else self.run / f"network{alive[0]:02d}" / "lease.json"
        if path is None or not path.exists():
            return False
        old = self.jobs.running[alive[0]]
        os.kill(old.pid, signal.SIGSTOP)  # or it would refresh the lease
        past = time.time() - 3600
        with contextlib.suppress(OSError):
            os.utime(path, (past, past))
        token = path.read_text()
        self.jobs.start(alive[0])
        while path.exists() and path.read_text() == token:
            time.sleep(0.1)
        os.kill(old.pid, signal.SIGCONT)
        old.join(60)
        if old.exitcode in (None, 0):
            self.problems.append(f"network {alive[0]}: its job did not notice the other one")
        return True

    def fill_disk(self) -> bool:
        """Fill the disk of the exchange folder for two seconds."""
        filler = self.run / "exchange" / "filler"
        with contextlib.suppress(OSError), filler.open("wb") as file:
            while True:
                file.write(b"\0" * 65536)
                file.flush()
        time.sleep(2)
        filler.unlink()
        return True

    def _kill_one(self) -> int | None:
        """Kill a job, and check that the next one will lose no more than since its checkpoint."""
        if not (alive := self.alive()):
            return None
        network = self._random.choice(alive)
        process = self.jobs.running[network]
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        found = complete_checkpoints(self.run / f"network{network:02d}" / "checkpoints")
        if found:
            written = (found[-1].path / "COMPLETE.json").stat().st_mtime
            self.lost.append(time.time() - written)
        return network


@contextlib.contextmanager
def small_disk(path: Path) -> Iterator[bool]:
    """Mount a small disk; False if that is not allowed."""
    path.mkdir(parents=True)
    command = ["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", str(path)]
    mounted = subprocess.run(command, capture_output=True, check=False).returncode == 0
    try:
        yield mounted
    finally:
        if mounted:
            subprocess.run(["umount", "-l", str(path)], check=False)


def chaos(events: int, seed: int, folder: Path) -> None:
    """Inject random events, and check what must hold."""
    run, generator = folder / "chaos", random.Random(seed)
    jobs = Jobs(run, "--data.train_samples", "256", "--callbacks", "churn:RoundLog")
    with small_disk(run / "exchange") as full:
        population = Chaos(run, jobs, generator, full=full)
        start = time.monotonic()
        for network in range(NETWORKS - 1):
            jobs.start(network)
        while sum(population.counts.values()) < events:
            time.sleep(generator.uniform(0, 2))
            if not population.alive():  # all have finished: train for longer
                jobs.epochs += EPOCHS
                population.start_all()
            population.event()
        seconds = time.monotonic() - start
        survivors = population.start_all()
        hanging = jobs.wait(HANG_SECONDS)
        for network in hanging:
            jobs.running[network].kill()
        statuses = {network: jobs.running[network].exitcode for network in survivors}
        failed = {k: jobs.output(k)[-300:] for k, status in statuses.items() if status}
        report(population, hanging, failed, seconds, full=full)


def report(
    population: Chaos, hanging: list[int], failed: dict[int, str], seconds: float, *, full: bool
) -> None:
    """Print the events, and whether everything held."""
    for kind, count in population.counts.items():
        print(f"  {kind:22} {count}")
    rounds = lines(population.run / "rounds.jsonl")
    damaged = population.damaged
    used = [each for each in rounds if each["start"] > damaged.get(each["digest"], math.inf)]
    donors = sum(each["donor"] >= 0 for each in rounds)
    skipped = sum(population.jobs.output(k).count("is skipped") for k in range(NETWORKS))
    print(f"  {sum(population.counts.values())} events in {seconds:.0f} s, {len(rounds)} rounds")
    print(f"  {donors} rounds had a donor; warnings of files that were skipped: {skipped}")
    if not full:
        print("  full disk: not tried, mounting a small disk is not allowed here")
    if population.lost:
        print(f"  work since the checkpoint at a kill: {spread(population.lost, 1)} s")
    for name, bad in (
        ("jobs that hang", hanging),
        ("surviving networks that do not finish", failed),
        ("blends of a damaged file", used),
        ("other problems", population.problems),
    ):
        print(f"{name}: {len(bad)}: {'ok' if not bad else f'missed {bad}'}")


# ------------------------------------------------------------------------------------------------
# Cost of a round
# ------------------------------------------------------------------------------------------------


def stall(repetitions: int, folder: Path) -> None:
    """Time the publication of a ResNet-50 beside the training, over a copy of its weights."""
    keep_freed_memory()
    torch.set_num_threads(1)
    model = build_model(ModelConfig(name="torchvision/resnet50"), num_classes=1000, channels=3)
    tensors = [tensor for tensor in model.state_dict().values() if tensor.is_floating_point()]
    size = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    copies, publications, blends = [], [], []
    donor = Grafter(model, exchange="files", directory=folder, network=0, networks=2)
    recipient = Grafter(model, exchange="files", directory=folder, network=1, networks=2)
    for number in range(repetitions + 1):
        start = time.perf_counter()
        held = [tensor.clone() for tensor in tensors]
        copied = time.perf_counter() - start
        del held
        publication = donor.graft().phase_seconds["pack"]
        donor.flush()
        record = recipient.graft()
        recipient.flush()
        if number:  # without the warm-up
            copies.append(copied)
            publications.append(publication)
            blends.append(record.phase_seconds["blend"])
    print(
        f"  {size / 1e6:.0f} MB: copy {spread([1e3 * each for each in copies], 1)} ms, publication "
    )
    print(f"  {spread([1e3 * each for each in publications], 1)} ms, read, check and blend ")
    print(f"  {spread([1e3 * each for each in blends], 0)} ms")
    print(
        verdict("stall caused by the publication / copy", ratios(publications, copies), at_most=1.2)
    )


def many(networks: int, rounds: int, folder: Path) -> None:
    """Run rounds of many small networks in one folder, and count file operations."""
    operations: Counter[str] = Counter()

    def count(event: str, arguments: tuple[Any, ...]) -> None:
        watched = ("open", "os.listdir", "os.scandir", "os.rename", "os.remove", "os.mkdir")
        if event in watched and str(arguments[0]).startswith(str(folder)):
            operations[event] += 1

    sys.addaudithook(count)
    per_round = {}
    for size in (networks // 4, networks):
        shared = folder / str(size)
        model = build_model(ModelConfig(name="resnet8"), num_classes=10, channels=1)
        grafters = [
            Grafter(model, exchange="files", directory=shared, network=k, networks=size)
            for k in range(size)
        ]
        start = time.perf_counter()
        for _ in range(rounds):
            for grafter in grafters:
                grafter.graft()
                grafter.flush()
        seconds = time.perf_counter() - start
        operations.clear()
        grafters[0].graft()
        grafters[0].flush()
        per_round[size] = sum(operations.values())
        print(
            f"  {size} networks: {1e3 * seconds / rounds / size:.1f} ms per network and round; "
            f"file operations of one round: {per_round[size]} ({dict(operations)})"
        )
    few, all_ = per_round.values()
    print(verdict(f"file operations with {networks} / {networks // 4}", [all_ / few], at_most=1))


def main() -> None:
    """Run the chosen parts."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("part", choices=("slow", "chaos", "round", "start", "all"))
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--events", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--networks", type=int, default=32)
    options = parser.parse_args()
    os.environ.update(environment())
    print(machine())
    parts: dict[str, Callable[[Path], None]] = {
        "slow": lambda folder: slow(options.repetitions, folder),
        "chaos": lambda folder: chaos(options.events, options.seed, folder),
        "round": lambda folder: stall(3 * options.repetitions, folder),
        "start": lambda folder: many(options.networks, 5, folder),
    }
    for name, part in parts.items():
        if options.part in (name, "all"):
            print(f"{name}:")
            with tempfile.TemporaryDirectory() as folder:
                part(Path(folder))


if __name__ == "__main__":
    main()
