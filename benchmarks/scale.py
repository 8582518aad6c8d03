"""Cost of a round as the number of networks grows: K = 1, 2, 4, 8 gloo processes, one thread each.

For each K and exchange, interleaved in the same processes:

- a round: wall time, CPU time of a network, bytes received by each process;
- the bare collective that moves the same bytes in one flat call (see round.py), and the bare work:
  finite check, information, one copy, one distance, and one interpolation of all numbers at once;
- the estimate of a round: the bytes received at the bandwidth of the bare ring, plus the bare work;
- in separate processes, the peak resident memory that a round adds, next to the size of its
  buckets; and the seconds from starting the processes until their first round can begin.

With more processes than cores, the wall time grows with K whatever the exchange; the CPU time of a
network then shows the cost of the exchange itself.

    python benchmarks/scale.py --picture docs/pictures/scale.png
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from reporting import machine, ratios, spread, verdict
from round import (
    BARE,
    MEMORY_ROUNDS,
    Setup,
    highest,
    in_processes,
    join,
    mean,
    peak_of_round,
    time_together,
)
from torch import Tensor, nn

from dist_graft import Graft, Grafter
from dist_graft.analysis.plan import PlanOptions
from dist_graft.analysis.planned_memory import bucket_bytes
from dist_graft.grafting.information import is_finite
from dist_graft.grafting.units import graft_tensors, graft_units
from dist_graft.printing import format_table

BUCKET_MB = 32.0  # the default; in host memory a bucket has at most 16 MiB
COLORS = {"all_gather": ("#D55E00", "s"), "p2p": ("#0072B2", "o")}  # of Okabe and Ito


@dataclass(frozen=True)
class TimedSetup(Setup):
    """Work of every process, and when the processes were started."""

    start_time: float = 0.0
    """Seconds since the epoch."""


@dataclass
class Timings:
    """Of one process; lists are by repetition, in seconds or MiB."""

    start_up: float = 0.0
    rounds: dict[str, list[float]] = field(default_factory=dict)
    moving: dict[str, list[float]] = field(default_factory=dict)
    cpu: dict[str, list[float]] = field(default_factory=dict)
    bare: dict[str, list[float]] = field(default_factory=dict)
    work: list[float] = field(default_factory=list)
    received: dict[str, int] = field(default_factory=dict)
    bucket_bytes: dict[str, int] = field(default_factory=dict)
    network_bytes: int = 0
    memory: dict[str, list[float]] = field(default_factory=dict)


def measure_time(rank: int, setup: TimedSetup) -> Timings:
    """Time rounds and references; every rank must call this."""
    model = join(rank, setup)
    dist.barrier()
    start_up = time.time() - setup.start_time
    start = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    tensors = list(graft_tensors(model).values())
    numbers = torch.cat([tensor.detach().reshape(-1) for tensor in tensors])
    work = bare_work(model, numbers)
    bare = {name: build(numbers, rank, setup.networks) for name, build in BARE.items()}
    grafters = {name: Grafter(model, exchange=name, bucket_mb=BUCKET_MB) for name in BARE}
    for repetition in range(setup.repetitions + 1):
        if repetition <= 1:  # without the warm-up
            timings = Timings(start_up)
        for name, grafter in grafters.items():
            model.load_state_dict(start)
            dist.barrier()
            cpu = time.process_time()
            record = grafter.graft()
            timings.cpu.setdefault(name, []).append(time.process_time() - cpu)
            timings.rounds.setdefault(name, []).append(record.seconds)
            parts = (record.phase_seconds.get(phase, 0.0) for phase in ("pack", "exchange"))
            timings.moving.setdefault(name, []).append(sum(parts))
            timings.received[name] = record.bytes_received
            if setup.networks > 1:
                timings.bare.setdefault(name, []).append(time_together(bare[name]))
        timings.work.append(time_together(work))
    timings.network_bytes = numbers.nbytes
    options = PlanOptions(
        networks=setup.networks, model=setup.model, backend="gloo", bucket_mb=BUCKET_MB
    )
    timings.bucket_bytes = {name: bucket_bytes(options, tensors, name) for name in BARE}
    dist.destroy_process_group()
    return timings


def bare_work(model: nn.Module, numbers: Tensor) -> partial[None]:
    """Build a function that computes what a round computes, without buckets."""
    rule, units, tensors = Graft(), graft_units(model), graft_tensors(model)
    received, buffer = numbers.flip(0), numbers.clone()

    def work() -> None:
        assert all(is_finite(tensor) for tensor in tensors.values())
        rule.measure(units, tensors)
        buffer.copy_(numbers)
        torch.dist(numbers, received)
        torch.lerp(numbers, received, 0.5, out=buffer)

    return partial(work)


def measure_memory(rank: int, setup: TimedSetup) -> Timings:
    """Measure the memory of rounds; every rank must call this."""
    model = join(rank, setup)
    timings = Timings()
    for name in BARE:
        build_grafter = partial(Grafter, model, exchange=name, bucket_mb=BUCKET_MB)
        build_grafter().graft()  # the first round also loads code
        timings.memory[name] = [peak_of_round(build_grafter()) for _ in range(MEMORY_ROUNDS)]
    dist.destroy_process_group()
    return timings


@dataclass(frozen=True)
class Row:
    """Results of one K and one exchange; times in seconds, memory in MiB."""

    networks: int
    exchange: str
    received: int
    """Bytes."""
    rounds: list[float]
    moving: list[float]
    """Pack + exchange."""
    bare: list[float]
    cpu: list[float]
    """Of one network."""
    estimated: list[float]
    memory: list[float]
    buckets: float
    start_up: float

    def __str__(self) -> str:
        """Return the name in tables."""
        return f"{self.exchange} K={self.networks}"


def measure(setup: TimedSetup) -> list[Row]:
    """Return the rows of one number of networks."""
    timed = in_processes(measure_time, setup)
    os.environ["MALLOC_MMAP_THRESHOLD_"] = str(1 << 17)
    memory = in_processes(measure_memory, setup)
    del os.environ["MALLOC_MMAP_THRESHOLD_"]
    several, first = setup.networks > 1, timed[0]
    work = mean(timed, lambda timings: timings.work)
    ring = mean(timed, lambda timings: timings.bare["p2p"]) if several else [0.0] * len(work)
    return [
        Row(
            networks=setup.networks,
            exchange=name,
            received=first.received[name],
            rounds=mean(timed, lambda timings, n=name: timings.rounds[n]),
            moving=mean(timed, lambda timings, n=name: timings.moving[n]),
            bare=mean(timed, lambda timings, n=name: timings.bare[n]) if several else [],
            cpu=mean(timed, lambda timings, n=name: timings.cpu[n]),
            estimated=[
                first.received[name] / first.network_bytes * ring_seconds + work_seconds
                for ring_seconds, work_seconds in zip(ring, work, strict=True)
            ],
            memory=highest(memory, name),
            buckets=first.bucket_bytes[name] / 2**20 if several else 0.0,
            start_up=max(timings.start_up for timings in timed),
        )
        for name in BARE
    ]


def table_of(rows: list[Row]) -> str:
    header = (
        *("", "received, MB", "round, ms", "estimated, ms", "CPU of a network, ms"),
        *("pack + exchange / bare", "memory, MiB", "buckets, MiB", "start-up, s"),
    )
    return format_table(
        header,
        [
            (
                str(row),
                f"{row.received / 1e6:.0f}",
                *(
                    spread([1e3 * seconds for seconds in column], 0)
                    for column in (row.rounds, row.estimated, row.cpu)
                ),
                spread(ratios(row.moving, row.bare)) if row.bare else "",
                spread(row.memory, 1),
                f"{row.buckets:.0f}",
                f"{row.start_up:.1f}",
            )
            for row in rows
        ],
    )


def verdicts(rows: list[Row]) -> list[str]:
    """Compare the results with their targets, one line each."""
    lines = []
    for row in rows:
        if row.bare:
            memory = [peak / row.buckets for peak in row.memory]
            lines.append(verdict(f"{row}: memory / buckets", memory, at_most=1.1))
            slower = ratios(row.rounds, row.estimated)
            lines.append(verdict(f"{row}: round / estimate", slower, at_most=1.5))
    for name in ("p2p", "all_gather"):
        several = [row for row in rows if row.exchange == name and row.bare]
        if len(several) < 2:
            continue
        few, many = several[0], several[-1]
        growth = ratios(many.cpu, few.cpu)
        title = f"{name}: CPU of a network, K={many.networks} / K={few.networks}"
        if name == "p2p":
            lines.append(verdict(title, growth, at_most=1.5))
        else:
            lines.append(f"{title}: {spread(growth)}, bytes: {many.received / few.received:.1f}")
    return lines


def draw(rows: list[Row], path: Path, model: str, repetitions: int) -> None:
    """Draw five charts; each exchange has a color and a marker, estimates are dashed."""
    figure = Figure(figsize=(11, 6.6), layout="constrained")
    time_chart, cpu_chart, bytes_chart, memory_chart, start_chart, notes = figure.subplots(
        2, 3
    ).flat
    for name, (color, marker) in COLORS.items():
        of_exchange = [row for row in rows if row.exchange == name]
        several = [row for row in of_exchange if row.bare]
        ks = [row.networks for row in of_exchange]
        solid = {"color": color, "marker": marker, "label": name}
        dashed = {"color": color, "linestyle": "--"}
        _plot_range(time_chart, ks, [row.rounds for row in of_exchange], solid)
        estimates = [statistics.median(row.estimated) for row in of_exchange]
        time_chart.plot(ks, estimates, label=f"{name}, estimated", **dashed)
        _plot_range(cpu_chart, ks, [row.cpu for row in of_exchange], solid)
        megabytes = [row.received / 1e6 for row in several]
        _plot_range(bytes_chart, megabytes, [row.moving for row in several], solid)
        if name == "all_gather":  # with p2p, the bytes received do not depend on K
            for row, x in zip(several, megabytes, strict=True):
                at, label = (x, statistics.median(row.moving)), f"K = {row.networks}"
                bytes_chart.annotate(label, at, (6, -10), textcoords="offset points", fontsize=8)
        _plot_range(memory_chart, ks, [row.memory for row in of_exchange], solid)
        memory_chart.plot(ks, [row.buckets for row in of_exchange], **dashed)
    starts = {row.networks: row.start_up for row in rows}
    start_chart.plot(list(starts), list(starts.values()), "k-^")
    for chart, title, unit in (
        (time_chart, "Round", "seconds"),
        (cpu_chart, "CPU time of one network in a round", "seconds"),
        (bytes_chart, "Pack + exchange, by bytes received", "seconds"),
        (memory_chart, "Memory that a round adds to a process", "MiB"),
        (start_chart, "Start-up until all processes have joined", "seconds"),
    ):
        chart.set_title(title, fontsize=10)
        chart.set_ylabel(unit)
        chart.set_ylim(bottom=0)
        chart.grid(alpha=0.3)
        if chart is bytes_chart:
            chart.set_xlabel("MB received by each process")
        else:
            chart.set_xlabel("networks, K")
            chart.set_xticks(list(starts))
    notes.axis("off")
    notes.legend(*time_chart.get_legend_handles_labels(), loc="upper left", frameon=False)
    cores = len(os.sched_getaffinity(0))
    notes.text(
        0.02,
        0.42,
        f"{model}, gloo, one thread per process, {cores} cores;\n"
        f"medians of {repetitions} rounds, bars from min to max.\n"
        "Memory, dashed: size of the buckets.\n"
        f"Beyond K = {cores}, the networks share the cores,\n"
        "so wall time may grow with K for that reason alone.",
        fontsize=9,
        va="top",
        transform=notes.transAxes,
    )
    figure.savefig(path, dpi=110)


def _plot_range(
    chart: Axes, xs: Sequence[float], values: Sequence[Sequence[float]], style: dict[str, Any]
) -> None:
    medians = [statistics.median(each) for each in values]
    below = [median - min(each) for median, each in zip(medians, values, strict=True)]
    above = [max(each) - median for median, each in zip(medians, values, strict=True)]
    chart.errorbar(xs, medians, yerr=(below, above), capsize=3, **style)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--networks", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--model", default="resnet18")
    parser.add_argument("--picture", type=Path, help="PNG file to write")
    options = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    print(machine())
    print(
        f"{options.model}, channels_last, 1 thread per process, graft.bucket_mb {BUCKET_MB:g}; "
        f"n = {options.repetitions} rounds and references, interleaved, after one warm-up of each "
        f"({MEMORY_ROUNDS} rounds for memory); averages over the processes, memory of the process "
        "with the highest peak"
    )
    rows: list[Row] = []
    for networks in sorted(options.networks):
        rows += measure(
            TimedSetup(
                networks=networks,
                cases=(),
                repetitions=options.repetitions,
                model=options.model,
                channels_last=True,
                start_time=time.time(),
            )
        )
    print(table_of(rows))
    print("\n".join(verdicts(rows)))
    if options.picture:
        draw(rows, options.picture, options.model, options.repetitions)


if __name__ == "__main__":
    main()
