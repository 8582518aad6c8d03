"""Phases of a round relative to bare operations, in K gloo processes with one thread each.

ResNet-50, 25.6 million numbers. Everything is interleaved in the same processes:

- pack + exchange + blend of a round / one bare collective that moves the same bytes in one flat
  call (all_gather_single in place, or batch_isend_irecv around the ring) between buffers that have
  been touched before;
- measure (finite check and information) + distance / one torch.histc with ten bins over all numbers
  as one vector;
- ten masked passes ((w >= low) & (w < high)).sum() over every layer's weight / measure;
- peak resident memory that a round adds to its process / the buffers it may hold: networks x bucket
  (all_gather) or two buckets (p2p). This runs in separate processes in which malloc returns freed
  memory; otherwise, freed memory that malloc kept would hide a peak.

    python benchmarks/round.py
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from datetime import timedelta
from itertools import pairwise, product
from multiprocessing import get_context
from pathlib import Path

import torch
import torch.distributed as dist
from reporting import machine, ratios, spread, verdict
from torch import Tensor, nn

from dist_graft import Grafter
from dist_graft.config import ModelConfig
from dist_graft.grafting.units import graft_tensors, graft_units
from dist_graft.population.compat import all_gather_single
from dist_graft.population.runtime.process import keep_freed_memory
from dist_graft.printing import format_table
from dist_graft.training.models import build_model

EXCHANGE_TARGETS = {"all_gather": 1.3, "p2p": 1.9}
HISTC_TARGET, MASKED_TARGET, MEMORY_TARGET = 4.0, 5.0, 1.1
PHASES = ("pack", "exchange", "blend", "measure", "distance")
MEMORY_ROUNDS = 3


@dataclass(frozen=True)
class Case:
    """Exchange and bucket size of a round."""

    exchange: str
    bucket_mb: float

    def __str__(self) -> str:
        """Return the name in tables."""
        return f"{self.exchange} {self.bucket_mb:g} MiB"


@dataclass(frozen=True)
class Setup:
    """Work of every process."""

    networks: int
    cases: tuple[Case, ...]
    repetitions: int
    model: str
    channels_last: bool
    folder: str = ""
    """Folder of the rendezvous store."""


@dataclass
class Timings:
    """Seconds (memory: MiB) of each repetition."""

    phases: dict[Case, dict[str, list[float]]] = field(default_factory=dict)
    collective: dict[Case, list[float]] = field(default_factory=dict)
    histc: list[float] = field(default_factory=list)
    masked: list[float] = field(default_factory=list)
    memory: dict[Case, list[float]] = field(default_factory=dict)


def join(rank: int, setup: Setup) -> nn.Module:
    """Join the process group; returns this process's network."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        store=dist.FileStore(f"{setup.folder}/store", setup.networks),
        rank=rank,
        world_size=setup.networks,
        timeout=timedelta(seconds=300),
    )
    torch.manual_seed(rank)
    model = build_model(ModelConfig(name=setup.model), num_classes=1000, channels=3)
    return model.to(memory_format=torch.channels_last) if setup.channels_last else model


def measure_time(rank: int, setup: Setup) -> Timings:
    """Time rounds and references; every rank must call this."""
    keep_freed_memory()  # as a training run does
    model = join(rank, setup)
    start = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    leads = [model.state_dict()[unit.lead] for unit in graft_units(model)]
    numbers = torch.cat([tensor.detach().reshape(-1) for tensor in graft_tensors(model).values()])
    collectives = {name: bare(numbers, rank, setup.networks) for name, bare in BARE.items()}
    grafters = {
        case: Grafter(model, exchange=case.exchange, bucket_mb=case.bucket_mb)
        for case in setup.cases
    }
    timings = Timings()
    for repetition in range(setup.repetitions + 1):
        if repetition == 1:
            timings = Timings()
        for case, grafter in grafters.items():
            model.load_state_dict(start)  # otherwise the networks become equal
            dist.barrier()
            record = grafter.graft()
            for name, seconds in record.phase_seconds.items():
                timings.phases.setdefault(case, {}).setdefault(name, []).append(seconds)
            timings.collective.setdefault(case, []).append(
                time_together(collectives[case.exchange])
            )
        timings.histc.append(time_together(lambda: torch.histc(numbers, 10)))
        timings.masked.append(time_together(lambda: [masked_passes(lead) for lead in leads]))
    dist.destroy_process_group()
    return timings


def measure_memory(rank: int, setup: Setup) -> Timings:
    """Measure the memory of rounds; every rank must call this."""
    model = join(rank, setup)
    timings = Timings()
    for case in setup.cases:
        options = {"exchange": case.exchange, "bucket_mb": case.bucket_mb}
        Grafter(model, **options).graft()  # the first round also loads code
        # new ones, since a Grafter keeps its buffers from round to round
        timings.memory[case] = [
            peak_of_round(Grafter(model, **options)) for _ in range(MEMORY_ROUNDS)
        ]
    dist.destroy_process_group()
    return timings


def time_together(action: Callable[[], object]) -> float:
    """Time an action that all processes start at once; every rank must call this."""
    dist.barrier()
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def bare_all_gather(numbers: Tensor, rank: int, networks: int) -> Callable[[], object]:
    gathered = numbers.repeat(networks)
    local = gathered.chunk(networks)[rank]
    return lambda: all_gather_single(gathered, local, group=None)


def bare_ring(numbers: Tensor, rank: int, networks: int) -> Callable[[], object]:
    received = numbers.clone()

    def move() -> None:
        operations = [
            dist.P2POp(dist.isend, numbers, (rank + 1) % networks),
            dist.P2POp(dist.irecv, received, (rank - 1) % networks),
        ]
        for work in dist.batch_isend_irecv(operations):
            work.wait()

    return move


BARE = {"all_gather": bare_all_gather, "p2p": bare_ring}


def masked_passes(weight: Tensor) -> list[int]:
    """Count ten bins one after the other, each with a mask over the whole layer."""
    edges = torch.linspace(float(weight.min()), float(weight.max()), 11).tolist()
    return [int(((weight >= low) & (weight < high)).sum()) for low, high in pairwise(edges)]


def peak_of_round(grafter: Grafter) -> float:
    """Return the MiB that a round adds to the peak resident memory; every rank must call this."""
    dist.barrier()
    Path("/proc/self/clear_refs").write_text("5")  # reset the peak
    before = resident_kib("VmRSS")
    grafter.graft()
    return (resident_kib("VmHWM") - before) / 1024


def resident_kib(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


def in_processes(measure: Callable[[int, Setup], Timings], setup: Setup) -> list[Timings]:
    """Run a measurement in each process; returns the timings by rank."""
    with (
        tempfile.TemporaryDirectory() as folder,
        ProcessPoolExecutor(setup.networks, mp_context=get_context("spawn")) as pool,
    ):
        setups = [replace(setup, folder=folder)] * setup.networks
        return list(pool.map(measure, range(setup.networks), setups))


def mean(by_rank: list[Timings], of: Callable[[Timings], list[float]]) -> list[float]:
    """Average over the processes, repetition by repetition."""
    return [statistics.fmean(values) for values in zip(*map(of, by_rank), strict=True)]


def highest(by_rank: list[Timings], key: Case | str) -> list[float]:
    """Peak memory of the process with the highest, repetition by repetition."""
    return [max(peaks) for peaks in zip(*(each.memory[key] for each in by_rank), strict=True)]


def compare(setup: Setup) -> tuple[list[list[str]], list[str]]:
    """Return the rows of the table and the verdicts for one number of networks."""
    timed = in_processes(measure_time, setup)
    os.environ["MALLOC_MMAP_THRESHOLD_"] = str(1 << 17)
    memory = in_processes(measure_memory, setup)
    del os.environ["MALLOC_MMAP_THRESHOLD_"]
    histc = mean(timed, lambda timings: timings.histc)
    masked = mean(timed, lambda timings: timings.masked)
    rows, verdicts = [], []
    for case in setup.cases:
        phase = {
            name: mean(timed, lambda timings, c=case, n=name: timings.phases[c][n])
            for name in PHASES
        }
        collective = mean(timed, lambda timings, c=case: timings.collective[c])
        peaks = highest(memory, case)
        moving, measuring = (
            [sum(parts) for parts in zip(*(phase[name] for name in names), strict=True)]
            for names in (PHASES[:3], PHASES[3:])
        )
        buffers = case.bucket_mb * (setup.networks if case.exchange == "all_gather" else 2)
        name = f"{case} K={setup.networks}"
        seconds = [*phase.values(), collective, histc, masked]
        rows.append(
            [name, *(spread([1000 * t for t in times], 0) for times in seconds), spread(peaks, 1)]
        )
        target = EXCHANGE_TARGETS[case.exchange]
        verdicts += [
            verdict(
                f"{name}: pack + exchange + blend / bare collective",
                ratios(moving, collective),
                at_most=target,
            ),
            verdict(
                f"{name}: measure + distance / histc",
                ratios(measuring, histc),
                at_most=HISTC_TARGET,
            ),
            verdict(
                f"{name}: masked passes / measure",
                ratios(masked, phase["measure"]),
                at_least=MASKED_TARGET,
            ),
            verdict(
                f"{name}: memory / buffers",
                [peak / buffers for peak in peaks],
                at_most=MEMORY_TARGET,
            ),
        ]
    return rows, verdicts


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--networks", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--exchange", choices=tuple(BARE), nargs="+", default=list(BARE))
    parser.add_argument("--bucket_mb", type=float, nargs="+", default=[32.0])
    parser.add_argument("--repetitions", type=int, default=9)
    parser.add_argument("--model", default="resnet50")
    parser.add_argument("--contiguous", action="store_true", help="instead of channels_last")
    options = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"

    print(machine())
    print(
        f"{options.model}, {'contiguous' if options.contiguous else 'channels_last'}, 1 thread per "
        f"process; n = {options.repetitions} rounds and references, interleaved, after one warm-up "
        f"of each ({MEMORY_ROUNDS} rounds for memory); milliseconds, averaged over the processes; "
        "MiB of the process with the highest peak"
    )
    rows: list[list[str]] = []
    verdicts: list[str] = []
    for networks in options.networks:
        setup = Setup(
            networks=networks,
            cases=tuple(Case(*case) for case in product(options.exchange, options.bucket_mb)),
            repetitions=options.repetitions,
            model=options.model,
            channels_last=not options.contiguous,
        )
        new_rows, new_verdicts = compare(setup)
        rows += new_rows
        verdicts += new_verdicts
    print(format_table(["", *PHASES, "bare collective", "histc", "masked passes", "memory"], rows))
    print("\n".join(verdicts))


if __name__ == "__main__":
    main()
