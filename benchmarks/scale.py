"""How a round grows with the number of networks: K = 1, 2, 4, 8 gloo processes, one thread each.

For each K and exchange, in the same processes and in turn:

- a round: wall time, CPU time of a network, bytes that each process receives;
- the bare collective that moves the same bytes in one flat call (see round.py), and the bare work:
  finite check, information, one copy, one distance and one interpolation of all numbers at once;
- what the round should take: the plan's bytes at the bare ring's bandwidth, and the bare work;
- in processes of their own, the most resident memory that a round adds, beside the buckets that
  the plan foresees; seconds from the start of the processes until their first round may begin.

With more processes than cores the wall time grows with K whatever the exchange; the CPU time of a
network then shows what the exchange itself costs.

    python benchmarks/scale.py --picture docs/pictures/scale.png
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from reporting import machine, ratios, spread, table, verdict
from round import BARE, MEMORY_ROUNDS, Plan, in_processes, mean, meet, peak_of_round, together
from torch import Tensor, nn

from dist_graft import Graft, Grafter
from dist_graft.analysis.plan import Layout, Round, build, plan_round, size_of
from dist_graft.grafting.information import is_finite
from dist_graft.grafting.units import graft_tensors, graft_units

BUCKET_MB = 32.0  # the default; in host memory a bucket takes 16 at most
COLOURS = {"all_gather": ("#D55E00", "s"), "p2p": ("#0072B2", "o")}  # of Okabe and Ito


@dataclass(frozen=True)
class Population(Plan):
    """What every process does, and when it was asked to start."""

    began: float = 0.0
    """Seconds since 1970."""


@dataclass
class Seen:
    """Of one process; lists are by repetition, seconds or MiB."""

    start_up: float = 0.0
    rounds: dict[str, list[float]] = field(default_factory=dict)
    moving: dict[str, list[float]] = field(default_factory=dict)
    cpu: dict[str, list[float]] = field(default_factory=dict)
    bare: dict[str, list[float]] = field(default_factory=dict)
    work: list[float] = field(default_factory=list)
    received: dict[str, int] = field(default_factory=dict)
    memory: dict[str, list[float]] = field(default_factory=dict)


def watch_time(rank: int, plan: Population) -> Seen:
    """Time rounds and references in one of the processes; all of them must run this."""
    model = meet(rank, plan)
    dist.barrier()
    start_up = time.time() - plan.began
    start = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    numbers = torch.cat([tensor.detach().reshape(-1) for tensor in graft_tensors(model).values()])
    work = bare_work(model, numbers)
    bare = {name: of(numbers, rank, plan.networks) for name, of in BARE.items()}
    grafters = {name: Grafter(model, exchange=name, bucket_mb=BUCKET_MB) for name in BARE}
    for repetition in range(plan.repetitions + 1):
        if repetition <= 1:  # the first one is not seen
            seen = Seen(start_up)
        for name, grafter in grafters.items():
            model.load_state_dict(start)
            dist.barrier()
            cpu = time.process_time()
            record = grafter.graft()
            seen.cpu.setdefault(name, []).append(time.process_time() - cpu)
            seen.rounds.setdefault(name, []).append(record.seconds)
            parts = (record.phase_seconds.get(phase, 0.0) for phase in ("pack", "exchange"))
            seen.moving.setdefault(name, []).append(sum(parts))
            seen.received[name] = record.bytes_received
            if plan.networks > 1:
                seen.bare.setdefault(name, []).append(together(bare[name]))
        seen.work.append(together(work))
    dist.destroy_process_group()
    return seen


def bare_work(model: nn.Module, numbers: Tensor) -> partial[None]:
    """What a round computes, without buckets and pieces."""
    rule, units, tensors = Graft(), graft_units(model), graft_tensors(model)
    theirs, buffer = numbers.flip(0), numbers.clone()

    def work() -> None:
        assert all(is_finite(tensor) for tensor in tensors.values())
        rule.measure(units, tensors)
        buffer.copy_(numbers)
        torch.dist(numbers, theirs)
        torch.lerp(numbers, theirs, 0.5, out=buffer)

    return partial(work)


def watch_memory(rank: int, plan: Population) -> Seen:
    """Measure the memory of rounds in one of the processes; all of them must run this."""
    model = meet(rank, plan)
    seen = Seen()
    for name in BARE:
        build_grafter = partial(Grafter, model, exchange=name, bucket_mb=BUCKET_MB)
        build_grafter().graft()  # a first round also loads code
        seen.memory[name] = [peak_of_round(build_grafter()) for _ in range(MEMORY_ROUNDS)]
    dist.destroy_process_group()
    return seen


@dataclass(frozen=True)
class Row:
    """Of one K and one exchange."""

    networks: int
    exchange: str
    received: int
    """Bytes."""
    seconds: list[float]
    moving: list[float]
    bare: list[float]
    cpu: list[float]
    """Seconds of one network."""
    planned: list[float]
    """Seconds."""
    memory: list[float]
    """MiB."""
    buckets: float
    """MiB that the plan foresees."""
    start_up: float


def planned(plan: Population, exchange: str) -> Round:
    """The plan of a round."""
    return plan_round(
        Layout(plan.networks, 1, plan.networks),
        size_of(build(plan.model)),
        exchange=exchange,
        topology="ring",
        on_host=True,
        bucket_bytes=int(BUCKET_MB * 2**20),
    )


def look(plan: Population) -> list[Row]:
    """Rows of one number of networks."""
    timed = in_processes(watch_time, plan)
    os.environ["MALLOC_MMAP_THRESHOLD_"] = str(1 << 17)
    weighed = in_processes(watch_memory, plan)
    del os.environ["MALLOC_MMAP_THRESHOLD_"]
    work = mean(timed, lambda seen: seen.work)
    rows = []
    for name in BARE:
        ring = mean(timed, lambda seen: seen.bare["p2p"]) if plan.networks > 1 else []
        round_ = planned(plan, name) if ring else None
        networks_moved = round_.exchanged.gpu / planned(plan, "p2p").exchanged.gpu if round_ else 0
        peaks = zip(*(seen.memory[name] for seen in weighed), strict=True)
        rows.append(
            Row(
                networks=plan.networks,
                exchange=name,
                received=timed[0].received[name],
                seconds=mean(timed, lambda seen, n=name: seen.rounds[n]),
                moving=mean(timed, lambda seen, n=name: seen.moving[n]),
                bare=mean(timed, lambda seen, n=name: seen.bare[n]) if ring else [],
                cpu=mean(timed, lambda seen, n=name: seen.cpu[n]),
                planned=[networks_moved * a + b for a, b in zip(ring, work, strict=True)]
                if ring
                else work,
                memory=[max(peak) for peak in peaks],
                buckets=round_.buffers / 2**20 if round_ else 0.0,
                start_up=max(seen.start_up for seen in timed),
            )
        )
    return rows


def page(rows: list[Row]) -> str:
    header = (
        *("", "received, MB", "round, ms", "planned, ms", "CPU of a network, ms"),
        *("travelling / bare", "memory, MiB", "buckets", "start-up, s"),
    )
    return table(
        header,
        [
            (
                f"{row.exchange} K={row.networks}",
                f"{row.received / 1e6:.0f}",
                spread([1e3 * one for one in row.seconds], 0),
                spread([1e3 * one for one in row.planned], 0),
                spread([1e3 * one for one in row.cpu], 0),
                spread(ratios(row.moving, row.bare)) if row.bare else "",
                spread(row.memory, 1),
                f"{row.buckets:.0f}",
                f"{row.start_up:.1f}",
            )
            for row in rows
        ],
    )


def verdicts(rows: list[Row]) -> list[str]:
    """Lines of what should hold."""
    lines = []
    for row in rows:
        if row.bare:
            name = f"{row.exchange} K={row.networks}"
            held = [peak / row.buckets for peak in row.memory]
            lines.append(verdict(f"ratio {name}: memory over buckets", held, at_most=1.1))
            off = ratios(row.seconds, row.planned)
            lines.append(verdict(f"ratio {name}: round over plan", off, at_most=1.5))
    for name, target in (("p2p", 1.5), ("all_gather", None)):
        mine = [row for row in rows if row.exchange == name and row.bare]
        if len(mine) < 2:
            continue
        few, many = mine[0], mine[-1]
        growth = ratios(many.cpu, few.cpu)
        told = f"{name}: CPU of a network, K={many.networks} over K={few.networks}"
        bytes_ = many.received / few.received
        if target:
            lines.append(verdict(told, growth, at_most=target))
        else:
            lines.append(f"{told}: {spread(growth)}, bytes {bytes_:.1f} times as many")
    return lines


def draw(rows: list[Row], path: Path, model: str, repetitions: int) -> None:
    """The picture: five charts, each exchange with its own colour and marker, plans dashed."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 6.6), layout="constrained")
    charts = figure.subplots(2, 3).flat
    time_, cpu, against, memory, start, notes = charts
    for name, (colour, marker) in COLOURS.items():
        mine = [row for row in rows if row.exchange == name]
        several = [row for row in mine if row.bare]
        ks = [row.networks for row in mine]
        look_ = {"color": colour, "marker": marker, "label": name}
        _with_range(time_, ks, [row.seconds for row in mine], look_)
        plan_ = {"color": colour, "linestyle": "--", "label": f"{name}, planned"}
        time_.plot(ks, [statistics.median(row.planned) for row in mine], **plan_)
        _with_range(cpu, ks, [row.cpu for row in mine], look_)
        megabytes = [row.received / 1e6 for row in several]
        _with_range(against, megabytes, [row.moving for row in several], look_)
        if name == "all_gather":  # with p2p each receives as much whatever K is
            for row, place in zip(several, megabytes, strict=True):
                at, label = (place, statistics.median(row.moving)), f"K = {row.networks}"
                against.annotate(label, at, (6, -10), textcoords="offset points", fontsize=8)
        _with_range(memory, ks, [row.memory for row in mine], look_)
        memory.plot(ks, [row.buckets for row in mine], **(plan_ | {"label": f"{name}, buckets"}))
    firsts = [row for row in rows if row.exchange == "p2p"]
    start.plot([r.networks for r in firsts], [r.start_up for r in firsts], "k-^")
    for chart, title, unit in (
        (time_, "A round", "seconds"),
        (cpu, "CPU time of one network in a round", "seconds"),
        (against, "Packing and travelling, by bytes received", "seconds"),
        (memory, "Memory that a round adds to a process", "MiB"),
        (start, "From the start until all have met", "seconds"),
    ):
        chart.set_title(title, fontsize=10)
        chart.set_ylabel(unit)
        chart.set_ylim(bottom=0)
        chart.grid(alpha=0.3)
        if chart is against:
            chart.set_xlabel("MB received by each process")
        else:
            chart.set_xlabel("networks, K")
            chart.set_xticks(sorted({row.networks for row in rows}))
    notes.axis("off")
    handles, labels = time_.get_legend_handles_labels()
    notes.legend(handles, labels, loc="upper left", frameon=False)
    cores = len(os.sched_getaffinity(0))
    notes.text(
        0.02,
        0.42,
        f"{model}, gloo, one thread a process, {cores} cores;\n"
        f"medians of {repetitions} rounds, bars from least to most.\n"
        "In the chart of memory, dashed: the buckets.\n"
        f"Beyond K = {cores} the networks share the cores, so\n"
        "wall time may grow with K for that alone.",
        fontsize=9,
        va="top",
        transform=notes.transAxes,
    )
    figure.savefig(path, dpi=110)


def _with_range(chart: object, places: list[float], values: list[list[float]], look_: dict) -> None:
    middle = [statistics.median(each) for each in values]
    below = [m - min(each) for m, each in zip(middle, values, strict=True)]
    above = [max(each) - m for m, each in zip(middle, values, strict=True)]
    chart.errorbar(places, middle, yerr=(below, above), capsize=3, **look_)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--networks", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--model", default="resnet18")
    parser.add_argument("--picture", type=Path, help="PNG file that is written")
    options = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    print(machine())
    print(
        f"{options.model}, channels_last, 1 thread a process, graft.bucket_mb {BUCKET_MB:g}; "
        f"n = {options.repetitions} rounds and references in turn, after one of each unseen "
        f"({MEMORY_ROUNDS} rounds for memory); means over the processes, memory of the process "
        "that took most"
    )
    rows: list[Row] = []
    for networks in sorted(options.networks):
        rows += look(
            Population(
                networks=networks,
                cases=(),
                repetitions=options.repetitions,
                model=options.model,
                channels_last=True,
                began=time.time(),
            )
        )
    print(page(rows))
    print("\n".join(verdicts(rows)))
    if options.picture:
        draw(rows, options.picture, options.model, options.repetitions)


if __name__ == "__main__":
    main()
