"""Injects faults at random times and compares the final weights with an undisturbed run.

Trains under torchrun with restarts. At random times, a process is killed or stopped, the run is
preempted, a file of the newest checkpoint is corrupted (and a process killed, so that the run has
to resume), or the launcher is killed. A run that has exited is restarted with the same command, and
a finished run is followed by another, until all faults have been injected.

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
from reporting import machine, spread

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from launching import children, environment, is_alive, torchrun

from dist_graft.printing import format_table

KINDS = {"kill": 3, "corrupt": 3, "preempt": 2, "launcher": 1, "stop": 1}
"""Kinds of ten faults; a stop takes by far the longest."""
PREEMPTIONS = ("SIGTERM", "SIGINT", "STOP")
CORRUPTIONS = ("truncate", "empty", "flip", "remove")
KEPT_CHECKPOINTS = 2
SHUTDOWN_SECONDS = 3
HANG_SECONDS = 300
"""Time without an exit, or without training, that counts as a hang."""
TRAINING = re.compile(r"epochs \d+ to \d+,")
RESUMED = re.compile(r"resumed from (\S+): epoch (\d+), step (\d+), round (\d+)")

Progress = tuple[int, int, int]
"""Epoch, round and step of a checkpoint."""


class HangError(Exception):
    """No exit, or no training, within HANG_SECONDS."""


@dataclass
class Tally:
    """Outcome of the faults of one kind."""

    injected: int = 0
    recovered: int = 0
    lost: list[float] = field(default_factory=list)
    """Seconds between the checkpoint that was resumed and the fault."""
    recovery: list[float] = field(default_factory=list)
    """Seconds from the fault to the next training step."""


class Run:
    """One training run, restarted as often as needed."""

    def __init__(self, path: Path, options: argparse.Namespace) -> None:
        self.path = path
        self._command = command(path, options)
        self._output = path.with_suffix(".out")
        self._launcher: subprocess.Popen[bytes] | None = None
        self._corrupted: set[int] = set()
        """When corrupted checkpoints were completed, in ns; names are reused."""
        self.start_time = time.time()

    def start(self) -> None:
        """Start a launcher."""
        with self._output.open("ab") as output:
            self._launcher = subprocess.Popen(
                self._command, env=environment(), stdout=output, stderr=output
            )

    @property
    def launcher(self) -> subprocess.Popen[bytes]:
        """The newest launcher."""
        assert self._launcher is not None
        return self._launcher

    @property
    def exited(self) -> bool:
        """Whether the launcher has exited."""
        return self.launcher.poll() is not None

    @property
    def finished(self) -> bool:
        """Whether the training is complete."""
        return self.launcher.poll() == 0

    @property
    def starts(self) -> int:
        """How often training has started."""
        return len(TRAINING.findall(self.output()))

    def output(self) -> str:
        """Return everything that its processes printed."""
        return self._output.read_text(errors="replace")

    def workers(self) -> list[int]:
        """Return the process ids by rank."""
        try:
            return children(self.launcher)
        except (FileNotFoundError, ProcessLookupError):  # one exited meanwhile
            return []

    def resumes(self) -> list[Progress]:
        """Return the progress of each checkpoint that was resumed."""
        found = RESUMED.findall(self.output())
        return [(int(epoch), int(round_), int(step)) for _, epoch, step, round_ in found]

    def checkpoints(self) -> dict[Progress, tuple[float, Path]]:
        """Return time and folder of the complete, uncorrupted checkpoints, oldest first.

        The key is the progress of the first network.
        """
        found = {}
        for path in self.path.glob("checkpoints/epoch_*/COMPLETE.json"):
            with contextlib.suppress(OSError, ValueError):  # being removed
                content, stat = json.loads(path.read_text()), path.stat()
                if stat.st_mtime_ns not in self._corrupted:
                    first = content["positions"][0]
                    progress = (first["epoch"], content["round"], first["step"])
                    found[progress] = stat.st_mtime, path.parent
        return dict(sorted(found.items()))

    def corrupt(self, folder: Path, how: str, generator: random.Random) -> None:
        """Corrupt one file of a checkpoint."""
        stat = (folder / "COMPLETE.json").stat()
        self._corrupted.add(stat.st_mtime_ns)
        victim = generator.choice(sorted(folder.iterdir()))
        if how == "remove":
            victim.unlink()
            return
        content = bytearray(victim.read_bytes())
        if how == "flip":
            content[generator.randrange(len(content))] ^= 1 << generator.randrange(8)
        else:
            del content[len(content) // 2 if how == "truncate" else 0 :]
        victim.write_bytes(content)
        os.utime(victim, ns=(stat.st_atime_ns, stat.st_mtime_ns))

    def weights(self) -> list[dict[str, torch.Tensor]]:
        """Return the final state dicts of all networks."""
        *_, (_, newest) = self.checkpoints().values()
        return [
            torch.load(path, weights_only=True)["model"]
            for path in sorted(newest.glob("network*.pt"))
        ]


def command(path: Path, options: argparse.Namespace) -> list[str]:
    """Return the command of a small run with rounds and checkpoints inside its epochs."""
    argv = torchrun(
        options.networks * options.replicas,
        path,
        *("--runtime.replicas", str(options.replicas)),
        *("--epochs", str(options.epochs), "--seed", "7", "--method", options.method),
        *("--data.train_samples", "512", "--data.batch_size", "16", "--model.name", "resnet8"),
        *("--graft.every_steps", "10", "--checkpoint.every_minutes", "0.02"),
        *("--checkpoint.keep", str(KEPT_CHECKPOINTS), "--runtime.timeout_seconds", "20"),
    )
    at = argv.index("--standalone") + 1
    restarts = ["--max-restarts=1000", f"--shutdown-timeout={SHUTDOWN_SECONDS}"]
    return [*argv[:at], *restarts, *argv[at:]]


class Chaos:
    """Injects faults into runs until all have happened.

    Args:
        options: parsed command line.
    """

    def __init__(self, options: argparse.Namespace) -> None:
        self._options = options
        self._generator = random.Random(options.seed)
        self.tallies = {kind: Tally() for kind in KINDS}
        self.actions: Counter[str] = Counter()
        ten = [kind for number in range(3) for kind, count in KINDS.items() if number < count]
        self.pending = [ten[number % len(ten)] for number in range(options.faults)]
        self._generator.shuffle(self.pending)
        self.excess_losses = 0
        """Faults after which a checkpoint older than the newest complete one was resumed."""
        self.orphans = 0
        self.hangs = 0

    def disturb(self, run: Run) -> None:
        """Start a run and inject faults until it has finished."""
        run.start()
        try:
            while self._wait_for_training(run, 0):
                pause = self._generator.uniform(0, self._options.pause)
                self._wait(run, lambda: run.exited, pause, required=False)
                if not self.pending:
                    self._wait(run, lambda: run.exited, self._options.epochs * HANG_SECONDS)
                elif not run.exited:
                    self._inject_next(run)
        finally:
            run.launcher.kill()

    def _inject_next(self, run: Run) -> None:
        kind = self.pending.pop()
        workers, checkpoints, starts = run.workers(), run.checkpoints(), run.starts
        processes = self._options.networks * self._options.replicas
        if len(workers) < processes or (kind == "corrupt" and len(checkpoints) < KEPT_CHECKPOINTS):
            self.pending.insert(0, kind)  # restarting, or nothing to resume
            return
        resumes_before = len(run.resumes())
        fault_time, start = time.time(), time.monotonic()
        try:
            action = self._inject(run, kind, checkpoints)
        except FileNotFoundError:  # removed, since a newer checkpoint is complete
            self.pending.insert(0, kind)
            return
        self.actions[action] += 1
        tally = self.tallies[kind]
        tally.injected += 1
        if kind in ("preempt", "launcher"):
            self._wait(run, lambda: run.exited)
            all_gone = self._wait(run, lambda: not any(map(is_alive, workers)), 30, required=False)
            self.orphans += not all_gone
            if not run.finished:
                run.start()
        if self._wait_for_training(run, starts):
            tally.recovery.append(time.monotonic() - start)
            resumed = run.resumes()[resumes_before:]
            if checkpoints and (not resumed or resumed[-1] < max(checkpoints)):
                self.excess_losses += 1
                newest = checkpoints[max(checkpoints)][1].name
                print(f"{action}: {newest} was complete; resumed {resumed}: {run.output()[-3000:]}")
            known = checkpoints | run.checkpoints()
            since = known[resumed[-1]][0] if resumed and resumed[-1] in known else run.start_time
            tally.lost.append(max(0.0, fault_time - since))
        tally.recovered += 1

    def _inject(self, run: Run, kind: str, checkpoints: dict[Progress, tuple[float, Path]]) -> str:
        """Inject a fault; returns its description."""
        worker = self._generator.choice(run.workers())
        if kind == "launcher":
            run.launcher.kill()
            return "kill -9 of torchrun"
        if kind == "preempt":
            how = self._generator.choice(PREEMPTIONS)
            if how == "STOP":
                (run.path / "STOP").touch()
                return "STOP file"
            run.launcher.send_signal(signal.Signals[how])
            return f"{how} to torchrun"
        number = signal.SIGSTOP if kind == "stop" else signal.SIGKILL
        action = f"{number.name} to a process"
        if kind == "corrupt":
            how = self._generator.choice(CORRUPTIONS)
            newest = checkpoints.pop(max(checkpoints))[1]
            run.corrupt(newest, how, self._generator)
            action = f"{how} a file of the newest checkpoint"
        os.kill(worker, number)
        return action

    def _wait_for_training(self, run: Run, starts: int) -> bool:
        """Wait until training has started again; False if the run is finished."""
        self._wait(run, lambda: run.exited or run.starts > starts)
        if run.exited and not run.finished:
            raise RuntimeError(f"the run failed: {run.output()[-3000:]}")
        return not run.exited

    def _wait(
        self,
        run: Run,
        condition: Callable[[], bool],
        seconds: float = HANG_SECONDS,
        *,
        required: bool = True,
    ) -> bool:
        deadline = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > deadline:
                if not required:
                    return False
                self.hangs += 1
                raise HangError(f"no progress for {seconds:g} s: {run.output()[-3000:]}")
            time.sleep(0.01)
        return True


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--faults", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0, help="of times and targets")
    parser.add_argument("--networks", type=int, default=2)
    parser.add_argument("--replicas", type=int, default=1, help="processes per network")
    parser.add_argument("--epochs", type=int, default=12, help="per run")
    parser.add_argument("--method", default="graft")
    parser.add_argument("--pause", type=float, default=5.0, help="maximum seconds between faults")
    options = parser.parse_args()

    print(machine())
    print(
        f"{options.networks} x resnet8 on 512 images of fashion-mini, processes per network: "
        f"{options.replicas}, method {options.method}, "
        f"{options.epochs} epochs of 32 steps, rounds every 10 steps, checkpoints at the first "
        f"shared step after 1.2 s and every epoch; a fault 0 to {options.pause:g} s after training "
        f"starts; seed {options.seed}",
        flush=True,
    )
    start = time.monotonic()
    chaos = Chaos(options)
    equal = []
    with tempfile.TemporaryDirectory() as folder:
        undisturbed = Run(Path(folder) / "undisturbed", options)
        undisturbed.start()
        undisturbed.launcher.wait()
        expected = undisturbed.weights()
        while chaos.pending:
            run = Run(Path(folder) / f"run{len(equal)}", options)
            try:
                chaos.disturb(run)
            except HangError as hang:
                print(hang)
                continue
            equal.append(bitwise_equal(expected, run.weights()))
            print(f"run {len(equal)}: {len(chaos.pending)} faults left", file=sys.stderr)
    print(
        format_table(
            ("", "injected", "recovered", "work lost, s", "recovery, s"),
            [
                (
                    kind,
                    str(tally.injected),
                    str(tally.recovered),
                    spread(tally.lost, 1) if tally.lost else "-",
                    spread(tally.recovery, 1) if tally.recovery else "-",
                )
                for kind, tally in chaos.tallies.items()
            ],
        )
    )
    print(
        "actions: "
        + ", ".join(f"{action} {count}" for action, count in sorted(chaos.actions.items()))
    )
    injected = sum(tally.injected for tally in chaos.tallies.values())
    recovered = sum(tally.recovered for tally in chaos.tallies.values())
    print(f"faults: {injected}, recoveries: {recovered}, in {time.monotonic() - start:.0f} s")
    for name, count in (
        (
            "faults that cost more than the work since the newest complete checkpoint",
            chaos.excess_losses,
        ),
        ("processes that outlived a launcher", chaos.orphans),
        ("hangs", chaos.hangs),
    ):
        print(f"{name}: {count} (target 0): {'missed' if count else 'ok'}")
    print(
        f"runs with final weights bitwise equal to the undisturbed run: {sum(equal)} of "
        f"{len(equal)}: {'ok' if equal and all(equal) else 'missed'}"
    )


def bitwise_equal(
    expected: list[dict[str, torch.Tensor]], found: list[dict[str, torch.Tensor]]
) -> bool:
    """Return whether all weights of all networks are bitwise equal."""
    return len(expected) == len(found) and all(
        one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)
        for one, other in zip(expected, found, strict=True)
    )


if __name__ == "__main__":
    main()
