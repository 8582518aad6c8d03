"""A round's parts against the least that they can be, in K gloo processes with one thread each.

ResNet-50, 25.6 million numbers. All that is compared runs in the same processes, in turn:

- pack + exchange + blend of a round, over one bare collective that moves the same bytes in one
  flat call (all_gather_single in place, or batch_isend_irecv around the ring) between buffers that
  have been touched before;
- measure (finite check and information) + distance, over one torch.histc with ten bins of all
  numbers as one vector;
- ten masked passes ((w >= low) & (w < high)).sum() over every layer's weight, over measure;
- the most resident memory that a round adds to its process, over the buffers it may hold:
  networks x bucket (all_gather) or two buckets (p2p). In processes of their own, in which malloc
  hands back what is freed: otherwise freed memory that malloc kept would hide a peak.

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
from reporting import machine, ratios, spread, table, verdict
from torch import Tensor, nn

from dist_graft import Grafter
from dist_graft.config import ModelConfig
from dist_graft.grafting.units import graft_tensors, graft_units
from dist_graft.population.runtime.process import keep_freed_memory
from dist_graft.training.models import build_model

EXCHANGE_TARGETS = {"all_gather": 1.3, "p2p": 1.9}
HISTC_TARGET, MASKED_TARGET, MEMORY_TARGET = 4.0, 5.0, 1.1
PHASES = ("pack", "exchange", "blend", "measure", "distance")
MEMORY_ROUNDS = 3


@dataclass(frozen=True)
class Case:
    """One way to run a round."""

    exchange: str
    bucket_mb: float

    def __str__(self) -> str:
        """As the tables name it."""
        return f"{self.exchange} {self.bucket_mb:g} MiB"


@dataclass(frozen=True)
class Plan:
    """What every process does."""

    networks: int
    cases: tuple[Case, ...]
    repetitions: int
    model: str
    channels_last: bool
    folder: str = ""
    """For the store that the processes meet in."""


@dataclass
class Seen:
    """Seconds (memory: MiB) of each repetition."""

    phases: dict[Case, dict[str, list[float]]] = field(default_factory=dict)
    collective: dict[Case, list[float]] = field(default_factory=dict)
    histc: list[float] = field(default_factory=list)
    masked: list[float] = field(default_factory=list)
    memory: dict[Case, list[float]] = field(default_factory=dict)


def meet(rank: int, plan: Plan) -> nn.Module:
    """Join the other processes; returns this one's network."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        store=dist.FileStore(f"{plan.folder}/store", plan.networks),
        rank=rank,
        world_size=plan.networks,
        timeout=timedelta(seconds=300),
    )
    torch.manual_seed(rank)
    model = build_model(ModelConfig(name=plan.model), num_classes=1000, channels=3)
    return model.to(memory_format=torch.channels_last) if plan.channels_last else model


def watch_time(rank: int, plan: Plan) -> Seen:
    """Time rounds and references in one of the processes; all of them must run this."""
    keep_freed_memory()  # as a run does
    model = meet(rank, plan)
    start = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    leads = [model.state_dict()[unit.lead] for unit in graft_units(model)]
    numbers = torch.cat([tensor.detach().reshape(-1) for tensor in graft_tensors(model).values()])
    collectives = {name: bare(numbers, rank, plan.networks) for name, bare in BARE.items()}
    grafters = {
        case: Grafter(model, exchange=case.exchange, bucket_mb=case.bucket_mb)
        for case in plan.cases
    }
    seen = Seen()
    for repetition in range(plan.repetitions + 1):
        if repetition == 1:
            seen = Seen()
        for case, grafter in grafters.items():
            model.load_state_dict(start)  # else the networks soon are all alike
            dist.barrier()
            record = grafter.graft()
            for name, seconds in record.phase_seconds.items():
                seen.phases.setdefault(case, {}).setdefault(name, []).append(seconds)
            seen.collective.setdefault(case, []).append(together(collectives[case.exchange]))
        seen.histc.append(together(lambda: torch.histc(numbers, 10)))
        seen.masked.append(together(lambda: [masked_passes(lead) for lead in leads]))
    dist.destroy_process_group()
    return seen


def watch_memory(rank: int, plan: Plan) -> Seen:
    """Measure the memory of rounds in one of the processes; all of them must run this."""
    model = meet(rank, plan)
    seen = Seen()
    for case in plan.cases:
        options = {"exchange": case.exchange, "bucket_mb": case.bucket_mb}
        Grafter(model, **options).graft()  # a first round also loads code
        # each time a new one: a Grafter keeps its buffers from round to round
        seen.memory[case] = [peak_of_round(Grafter(model, **options)) for _ in range(MEMORY_ROUNDS)]
    dist.destroy_process_group()
    return seen


def together(action: Callable[[], object]) -> float:
    """Seconds of an action that all processes start at once."""
    dist.barrier()
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def bare_all_gather(numbers: Tensor, rank: int, networks: int) -> Callable[[], object]:
    everyone = numbers.repeat(networks)
    own = everyone.chunk(networks)[rank]
    return lambda: dist.all_gather_single(everyone, own)


def bare_ring(numbers: Tensor, rank: int, networks: int) -> Callable[[], object]:
    theirs = numbers.clone()

    def move() -> None:
        moves = [
            dist.P2POp(dist.isend, numbers, (rank + 1) % networks),
            dist.P2POp(dist.irecv, theirs, (rank - 1) % networks),
        ]
        for work in dist.batch_isend_irecv(moves):
            work.wait()

    return move


BARE = {"all_gather": bare_all_gather, "p2p": bare_ring}


def masked_passes(weight: Tensor) -> list[int]:
    """Ten bins counted one after the other, each with a mask over the whole layer."""
    edges = torch.linspace(float(weight.min()), float(weight.max()), 11).tolist()
    return [int(((weight >= low) & (weight < high)).sum()) for low, high in pairwise(edges)]


def peak_of_round(grafter: Grafter) -> float:
    """MiB by which a round makes the process's resident memory peak."""
    dist.barrier()
    Path("/proc/self/clear_refs").write_text("5")  # the peak is now what is resident now
    before = resident_kib("VmRSS")
    grafter.graft()
    return (resident_kib("VmHWM") - before) / 1024


def resident_kib(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


def in_processes(watch: Callable[[int, Plan], Seen], plan: Plan) -> list[Seen]:
    """What each of the plan's processes saw."""
    with (
        tempfile.TemporaryDirectory() as folder,
        ProcessPoolExecutor(plan.networks, mp_context=get_context("spawn")) as pool,
    ):
        plans = [replace(plan, folder=folder)] * plan.networks
        return list(pool.map(watch, range(plan.networks), plans))


def mean(everyone: list[Seen], of: Callable[[Seen], list[float]]) -> list[float]:
    """Mean over the processes, repetition by repetition."""
    return [statistics.fmean(values) for values in zip(*map(of, everyone), strict=True)]


def compare(plan: Plan) -> tuple[list[list[str]], list[str]]:
    """Rows of the table and lines of verdicts for one number of networks."""
    timed = in_processes(watch_time, plan)
    os.environ["MALLOC_MMAP_THRESHOLD_"] = str(1 << 17)
    weighed = in_processes(watch_memory, plan)
    del os.environ["MALLOC_MMAP_THRESHOLD_"]
    histc, masked = mean(timed, lambda seen: seen.histc), mean(timed, lambda seen: seen.masked)
    rows, lines = [], []
    for case in plan.cases:
        phase = {
            name: mean(timed, lambda seen, c=case, n=name: seen.phases[c][n]) for name in PHASES
        }
        collective = mean(timed, lambda seen, c=case: seen.collective[c])
        peaks = [max(peak) for peak in zip(*(seen.memory[case] for seen in weighed), strict=True)]
        moving = [sum(parts) for parts in zip(*(phase[name] for name in PHASES[:3]), strict=True)]
        watching = [sum(parts) for parts in zip(*(phase[name] for name in PHASES[3:]), strict=True)]
        buffers = case.bucket_mb * (plan.networks if case.exchange == "all_gather" else 2)
        name = f"{case} K={plan.networks}"
        seconds = [*phase.values(), collective, histc, masked]
        rows.append(
            [name, *(spread([1000 * t for t in times], 0) for times in seconds), spread(peaks, 1)]
        )
        target = EXCHANGE_TARGETS[case.exchange]
        lines += [
            verdict(f"ratio {name}: exchange", ratios(moving, collective), at_most=target),
            verdict(f"ratio {name}: watching", ratios(watching, histc), at_most=HISTC_TARGET),
            verdict(
                f"ratio {name}: masked passes",
                ratios(masked, phase["measure"]),
                at_least=MASKED_TARGET,
            ),
            verdict(
                f"ratio {name}: memory", [peak / buffers for peak in peaks], at_most=MEMORY_TARGET
            ),
        ]
    return rows, lines


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
        f"{options.model}, {'contiguous' if options.contiguous else 'channels_last'}, 1 thread a "
        f"process; n = {options.repetitions} rounds and references in turn, after one of each "
        f"unseen ({MEMORY_ROUNDS} rounds for memory); milliseconds, means over the processes, "
        "and MiB of the process that took most"
    )
    rows: list[list[str]] = []
    lines: list[str] = []
    for networks in options.networks:
        plan = Plan(
            networks=networks,
            cases=tuple(Case(*case) for case in product(options.exchange, options.bucket_mb)),
            repetitions=options.repetitions,
            model=options.model,
            channels_last=not options.contiguous,
        )
        more_rows, more_lines = compare(plan)
        rows += more_rows
        lines += more_lines
    print(table(["", *PHASES, "bare collective", "histc", "masked passes", "memory"], rows))
    print("\n".join(lines))


if __name__ == "__main__":
    main()
