"""A small job, including process start, relative to two bare programs and to the original scripts.

The job trains two ResNet-20 in two processes for three epochs of 2,048 Fashion-MNIST images at
3 x 32 x 32, batch 128, with an evaluation on 500 images and a round after every epoch, and one
thread per process. It is interleaved with two concurrent copies of `bare.py`, which only train and
evaluate on the same images. The method's original scripts took 53.7 s for the same job (fp32) on an
idle machine of the kind that this project is developed on (2 cores). On other or busy machines that
ratio says little; use the ratio to the bare programs.

    python benchmarks/job.py --root data
"""

from __future__ import annotations

import argparse
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from reporting import machine, ratios, spread, verdict

from dist_graft.printing import format_table

ORIGINAL_SECONDS = 53.7
ORIGINAL_TARGETS = {"fp32": 0.6, "bf16": 0.4}
BARE_TARGET = 1.25
NETWORKS, EPOCHS, TRAIN_SAMPLES, TEST_SAMPLES = 2, 3, 2048, 500
BARE = Path(__file__).with_name("bare.py")


@dataclass
class Side:
    """Wall and CPU seconds (all processes together) of each repetition."""

    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)

    def add(self, action: Callable[[], None]) -> None:
        """Run and time an action that waits for its child processes."""
        cpu, start = children_cpu(), time.perf_counter()
        action()
        self.wall.append(time.perf_counter() - start)
        self.cpu.append(children_cpu() - cpu)


def children_cpu() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def run(commands: Sequence[Sequence[str]]) -> None:
    """Run programs concurrently and wait for all of them.

    Their output goes to a file, so that none blocks on a full pipe.

    Raises: RuntimeError with the output if one of them fails.
    """
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryFile("w+") as output:
        processes = [
            subprocess.Popen(command, env=environment, stdout=output, stderr=subprocess.STDOUT)
            for command in commands
        ]
        statuses = [process.wait() for process in processes]
        if any(statuses):
            output.seek(0)
            raise RuntimeError(f"{' '.join(commands[0])} failed:\n{output.read()}")


def run_job(root: str, precision: str) -> None:
    options = {
        "data.name": "fashion-mnist",
        "data.root": root,
        "data.train_samples": TRAIN_SAMPLES,
        "data.test_samples": TEST_SAMPLES,
        "data.image_size": 32,
        "data.channels": 3,
        "data.batch_size": 128,
        "model.name": "resnet20",
        "epochs": EPOCHS,
        "runtime.device": "cpu",
        "runtime.threads": 1,
        "runtime.precision": precision,
    }
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={NETWORKS}"]
    with tempfile.TemporaryDirectory() as run_dir:
        command = [sys.executable, *launcher, "-m", "dist_graft", "train", "--run_dir", run_dir]
        for name, value in options.items():
            command += [f"--{name}", str(value)]
        run([command])


def run_bare_programs(root: str, precision: str) -> None:
    options = {
        "root": root,
        "precision": precision,
        "epochs": EPOCHS,
        "train_samples": TRAIN_SAMPLES,
        "test_samples": TEST_SAMPLES,
    }
    command = [sys.executable, str(BARE)]
    for name, value in options.items():
        command += [f"--{name}", str(value)]
    run([[*command, "--seed", str(seed)] for seed in range(NETWORKS)])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--root", default="data", help="folder of the images, prepared if empty")
    parser.add_argument("--precision", choices=("fp32", "bf16"), nargs="+")
    parser.add_argument("--repetitions", type=int, default=3)
    options = parser.parse_args()
    prepare = [sys.executable, "-m", "dist_graft", "prepare", "fashion-mnist"]
    run([[*prepare, "--root", options.root]])

    print(machine())
    print(
        f"{NETWORKS} x ResNet-20, {EPOCHS} epochs of {TRAIN_SAMPLES:,} images, 1 thread per "
        f"process; n = {options.repetitions} of each, interleaved, no warm-up; seconds"
    )
    precisions = options.precision or ("fp32", "bf16")
    jobs = {precision: Side() for precision in precisions}
    bares = {precision: Side() for precision in precisions}
    for _ in range(options.repetitions):
        for kind in precisions:
            jobs[kind].add(lambda kind=kind: run_job(options.root, kind))
            bares[kind].add(lambda kind=kind: run_bare_programs(options.root, kind))
    rows = [
        (f"{name}, {kind}", spread(side[kind].wall, 1), spread(side[kind].cpu, 1))
        for kind in precisions
        for name, side in (("job", jobs), ("two bare programs", bares))
    ]
    print(format_table(("", "wall", "CPU"), rows))
    for kind in precisions:
        to_original = [wall / ORIGINAL_SECONDS for wall in jobs[kind].wall]
        print(
            verdict(
                f"job {kind} / original scripts ({ORIGINAL_SECONDS} s on an idle machine)",
                to_original,
                at_most=ORIGINAL_TARGETS[kind],
            )
        )
        to_bare = ratios(jobs[kind].wall, bares[kind].wall)
        print(verdict(f"job {kind} / two bare programs", to_bare, at_most=BARE_TARGET))


if __name__ == "__main__":
    main()
