"""What a run endures: faults at random times, and the weights of a run that nothing disturbed.

Trains under torchrun with restarts. At random times a process is killed or stopped, the run is
asked to leave, a file of the newest checkpoint set is damaged (and a process killed, so that the
set is needed), or the launcher is killed. A run that has left is started again by the same command,
and one that has ended is followed by another, until all faults have happened.

    python benchmarks/chaos.py --faults 100 --seed 0
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from reporting import machine, spread, table

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from launching import children, environment, is_alive, torchrun

KINDS = {"kill": 3, "corrupt": 3, "preempt": 2, "launcher": 1, "stop": 1}
"""Of ten faults; a stop takes by far the longest."""
WAYS_TO_PREEMPT = ("SIGTERM", "SIGINT", "STOP")
WAYS_TO_CORRUPT = ("truncate", "empty", "flip", "remove")
SETS_KEPT = 2
SHUTDOWN_SECONDS = 3
HANGS_AFTER = 300
"""Seconds without an end, or without training, that count as hanging."""
TRAINING = re.compile(r"epochs \d+ to \d+,")
GOING_ON = re.compile(r"going on from (\S+): epoch (\d+), step (\d+), round (\d+)")

Status = tuple[int, int, int]
"""Epoch, rounds and steps: how far a set has come."""


class HangError(Exception):
    """Nothing happened for too long."""


@dataclass
class Tally:
    """What became of the faults of one kind."""

    injected: int = 0
    recovered: int = 0
    lost: list[float] = field(default_factory=list)
    """Seconds by which the set that was gone on from is older than the fault."""
    away: list[float] = field(default_factory=list)
    """Seconds from the fault to the next step."""


class Run:
    """One training run, started as often as it takes."""

    def __init__(self, path: Path, options: argparse.Namespace) -> None:
        self.path = path
        self._command = command(path, options)
        self._said = path.with_suffix(".out")
        self._launcher: subprocess.Popen[bytes] | None = None
        self._damaged: set[int] = set()
        """Of damaged sets: when they were declared complete, in ns; their names come again."""
        self.began = time.time()

    def start(self) -> None:
        """Start the launcher."""
        with self._said.open("ab") as said:
            self._launcher = subprocess.Popen(
                self._command, env=environment(), stdout=said, stderr=said
            )

    @property
    def launcher(self) -> subprocess.Popen[bytes]:
        """The newest."""
        assert self._launcher is not None
        return self._launcher

    @property
    def ended(self) -> bool:
        """Whether the launcher has."""
        return self.launcher.poll() is not None

    @property
    def finished(self) -> bool:
        """Whether there is nothing left to do."""
        return self.launcher.poll() == 0

    @property
    def starts(self) -> int:
        """How often training was under way."""
        return len(TRAINING.findall(self.said()))

    def said(self) -> str:
        """All that its processes printed."""
        return self._said.read_text(errors="replace")

    def workers(self) -> list[int]:
        """Process ids in the order of the ranks."""
        try:
            return children(self.launcher)
        except (FileNotFoundError, ProcessLookupError):  # one ended meanwhile
            return []

    def gone_on_from(self) -> list[Status]:
        """Where each start went on, if not at the beginning."""
        found = GOING_ON.findall(self.said())
        return [(int(epoch), int(round_), int(step)) for _, epoch, step, round_ in found]

    def sets(self) -> dict[Status, tuple[float, Path]]:
        """Complete sets that were not damaged, oldest first: the time of their birth, the folder.

        A set between epochs stands where its first network stands.
        """
        found = {}
        for path in self.path.glob("checkpoints/epoch_*/COMPLETE.json"):
            with contextlib.suppress(OSError, ValueError):  # being replaced
                content, born = json.loads(path.read_text()), path.stat()
                if born.st_mtime_ns not in self._damaged:
                    first = content["positions"][0]
                    standing = (first["epoch"], content["round"], first["step"])
                    found[standing] = born.st_mtime, path.parent
        return dict(sorted(found.items()))

    def damage(self, folder: Path, how: str, draw: random.Random) -> None:
        """Harm one file of a set."""
        born = (folder / "COMPLETE.json").stat()
        self._damaged.add(born.st_mtime_ns)
        victim = draw.choice(sorted(folder.iterdir()))
        if how == "remove":
            victim.unlink()
            return
        content = bytearray(victim.read_bytes())
        if how == "flip":
            content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
        else:
            del content[len(content) // 2 if how == "truncate" else 0 :]
        victim.write_bytes(content)
        os.utime(victim, ns=(born.st_atime_ns, born.st_mtime_ns))

    def weights(self) -> list[dict[str, torch.Tensor]]:
        """Of all networks, at the end."""
        *_, (_, newest) = self.sets().values()
        return [
            torch.load(path, weights_only=True)["model"]
            for path in sorted(newest.glob("network*.pt"))
        ]


def command(path: Path, options: argparse.Namespace) -> list[str]:
    """Of one run: small, with rounds and checkpoint sets inside its epochs."""
    argv = torchrun(
        options.networks * options.replicas,
        path,
        *("--runtime.replicas", str(options.replicas)),
        *("--epochs", str(options.epochs), "--seed", "7", "--method", options.method),
        *("--data.train_samples", "512", "--data.batch_size", "16", "--model.name", "resnet8"),
        *("--graft.every_steps", "10", "--checkpoint.every_minutes", "0.02"),
        *("--checkpoint.keep", str(SETS_KEPT), "--runtime.timeout_seconds", "20"),
    )
    at = argv.index("--standalone") + 1
    restarts = ["--max-restarts=1000", f"--shutdown-timeout={SHUTDOWN_SECONDS}"]
    return [*argv[:at], *restarts, *argv[at:]]


class Chaos:
    """Hits runs until all faults have happened.

    Args:
        options: of the command line.
    """

    def __init__(self, options: argparse.Namespace) -> None:
        self._options = options
        self._draw = random.Random(options.seed)
        self.tallies = {kind: Tally() for kind in KINDS}
        self.ways: Counter[str] = Counter()
        ten = [kind for number in range(3) for kind, many in KINDS.items() if number < many]
        self.to_come = [ten[number % len(ten)] for number in range(options.faults)]
        self._draw.shuffle(self.to_come)
        self.beyond = 0
        """Faults after which a set older than the newest complete one was gone on from."""
        self.orphans = 0
        self.hangs = 0

    def live_through(self, run: Run) -> None:
        """One run from its start to its end, with the faults that fall into it."""
        run.start()
        try:
            while self._trains(run, 0):
                pause = self._draw.uniform(0, self._options.pause)
                self._until(run, lambda: run.ended, pause, hangs=False)
                if not self.to_come:
                    self._until(run, lambda: run.ended, self._options.epochs * HANGS_AFTER)
                elif not run.ended:
                    self._fault(run)
        finally:
            run.launcher.kill()

    def _fault(self, run: Run) -> None:
        kind = self.to_come.pop()
        workers, sets, starts = run.workers(), run.sets(), run.starts
        processes = self._options.networks * self._options.replicas
        if len(workers) < processes or (kind == "corrupt" and len(sets) < SETS_KEPT):
            self.to_come.insert(0, kind)  # between two lives, or nothing to go on from
            return
        went_on = len(run.gone_on_from())
        at, clock = time.time(), time.monotonic()
        try:
            way = self._act(run, kind, sets)
        except FileNotFoundError:  # the set went, since a newer one is complete
            self.to_come.insert(0, kind)
            return
        self.ways[way] += 1
        tally = self.tallies[kind]
        tally.injected += 1
        if kind in ("preempt", "launcher"):
            self._until(run, lambda: run.ended)
            gone = self._until(run, lambda: not any(map(is_alive, workers)), 30, hangs=False)
            self.orphans += not gone
            if not run.finished:
                run.start()
        if self._trains(run, starts):
            tally.away.append(time.monotonic() - clock)
            resumed = run.gone_on_from()[went_on:]
            if sets and (not resumed or resumed[-1] < max(sets)):
                self.beyond += 1
                newest = sets[max(sets)][1].name
                print(f"{way}: {newest} was complete; went on from {resumed}: {run.said()[-3000:]}")
            known = sets | run.sets()
            since = known[resumed[-1]][0] if resumed and resumed[-1] in known else run.began
            tally.lost.append(max(0.0, at - since))
        tally.recovered += 1

    def _act(self, run: Run, kind: str, sets: dict[Status, tuple[float, Path]]) -> str:
        """Do it; returns in which way."""
        worker = self._draw.choice(run.workers())
        if kind == "launcher":
            run.launcher.kill()
            return "kill -9 of torchrun"
        if kind == "preempt":
            way = self._draw.choice(WAYS_TO_PREEMPT)
            if way == "STOP":
                (run.path / "STOP").touch()
                return "STOP file"
            run.launcher.send_signal(signal.Signals[way])
            return f"{way} to torchrun"
        number = signal.SIGSTOP if kind == "stop" else signal.SIGKILL
        way = f"{number.name} to a process"
        if kind == "corrupt":
            way = self._draw.choice(WAYS_TO_CORRUPT)
            newest = sets.pop(max(sets))[1]
            run.damage(newest, way, self._draw)
            way = f"{way} a file of the newest set"
        os.kill(worker, number)
        return way

    def _trains(self, run: Run, starts: int) -> bool:
        """Wait for training to be under way once more; False when the run is finished."""
        self._until(run, lambda: run.ended or run.starts > starts)
        if run.ended and not run.finished:
            raise RuntimeError(f"the run gave up: {run.said()[-3000:]}")
        return not run.ended

    def _until(
        self,
        run: Run,
        condition: Callable[[], bool],
        seconds: float = HANGS_AFTER,
        *,
        hangs: bool = True,
    ) -> bool:
        deadline = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > deadline:
                if not hangs:
                    return False
                self.hangs += 1
                raise HangError(f"nothing for {seconds:g} s: {run.said()[-3000:]}")
            time.sleep(0.01)
        return True


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--faults", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0, help="of the times and the victims")
    parser.add_argument("--networks", type=int, default=2)
    parser.add_argument("--replicas", type=int, default=1, help="processes of each network")
    parser.add_argument("--epochs", type=int, default=12, help="of a run")
    parser.add_argument("--method", default="graft")
    parser.add_argument("--pause", type=float, default=5.0, help="longest seconds between faults")
    options = parser.parse_args()

    print(machine())
    print(
        f"{options.networks} x resnet8 on 512 images of fashion-mini, processes of a network: "
        f"{options.replicas}, method {options.method}, "
        f"{options.epochs} epochs of 32 steps, rounds every 10 steps, checkpoint sets every 1.2 s "
        f"and every epoch; a fault 0 to {options.pause:g} s after training is under way; "
        f"seed {options.seed}",
        flush=True,
    )
    began = time.monotonic()
    chaos = Chaos(options)
    equal = []
    with tempfile.TemporaryDirectory() as folder:
        undisturbed = Run(Path(folder) / "undisturbed", options)
        undisturbed.start()
        undisturbed.launcher.wait()
        expected = undisturbed.weights()
        while chaos.to_come:
            run = Run(Path(folder) / f"run{len(equal)}", options)
            try:
                chaos.live_through(run)
            except HangError as hang:
                print(hang)
                continue
            equal.append(same(expected, run.weights()))
            print(f"run {len(equal)}: {len(chaos.to_come)} faults to come", file=sys.stderr)
    print(
        table(
            ("", "injected", "recovered", "s of work lost", "s until the next step"),
            [
                (
                    kind,
                    str(tally.injected),
                    str(tally.recovered),
                    spread(tally.lost, 1) if tally.lost else "-",
                    spread(tally.away, 1) if tally.away else "-",
                )
                for kind, tally in chaos.tallies.items()
            ],
        )
    )
    print("ways: " + ", ".join(f"{way} {count}" for way, count in sorted(chaos.ways.items())))
    injected = sum(tally.injected for tally in chaos.tallies.values())
    recovered = sum(tally.recovered for tally in chaos.tallies.values())
    print(f"faults: {injected}, recoveries: {recovered}, in {time.monotonic() - began:.0f} s")
    for name, count in (
        ("faults that cost more than the work since the newest complete set", chaos.beyond),
        ("processes that outlived a launcher", chaos.orphans),
        ("hangs", chaos.hangs),
    ):
        print(f"{name}: {count} (target 0): {'missed' if count else 'ok'}")
    print(
        f"runs whose final weights are those of the undisturbed run, bit for bit: {sum(equal)} of "
        f"{len(equal)}: {'ok' if equal and all(equal) else 'missed'}"
    )


def same(expected: list[dict[str, torch.Tensor]], found: list[dict[str, torch.Tensor]]) -> bool:
    """Whether all weights of all networks are equal, bit for bit."""
    return len(expected) == len(found) and all(
        one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)
        for one, other in zip(expected, found, strict=True)
    )


if __name__ == "__main__":
    main()
