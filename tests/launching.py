"""Start training runs as a user does, on data small enough for seconds."""

from __future__ import annotations

import os
import random
import re
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from harness import Done, Program

from dist_graft.population.runtime.devices import shared_gpu_variables

SMALL = (
    *("--data.train_samples", "64", "--data.test_samples", "40", "--data.batch_size", "32"),
    *("--model.name", "resnet20", "--runtime.device", "cpu", "--runtime.threads", "1"),
)
_RANDOM = random.SystemRandom()
PAIR = ("--epochs", "3", "--seed", "5", "--optim.lr_diversity", "cosine")
"""Options of the two-network run that most tests examine."""
PROMPT_SECONDS = 20
"""Seconds within which an error must end a process."""
LAUNCHED = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
FAULTY, BLOCKING = (
    str(Path(__file__).with_name("distributed") / name) for name in ("faulty.py", "blocking.py")
)
ERROR = "dist-graft: error: "
Process = subprocess.Popen[str] | Program
Train = Callable[..., Done]
"""Type of the fixture `train`: (run directory, *options) -> Done."""


def environment(*, device: str = "cpu", **more: str) -> dict[str, str]:
    """This environment without the variables of a launcher and, on the CPU, without GPUs."""
    kept = {name: value for name, value in os.environ.items() if name not in LAUNCHED}
    return kept | ({"CUDA_VISIBLE_DEVICES": ""} if device == "cpu" else {}) | more


def program(run: Path, *options: str) -> list[str]:
    """Command of one training process."""
    return [sys.executable, "-m", "dist_graft", "train", "--run_dir", str(run), *SMALL, *options]


def torchrun(networks: int, run: Path, *options: str, restarts: int = 0) -> list[str]:
    """Command of a training run of several networks."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={networks}"]
    launcher += [f"--max-restarts={restarts}"] * bool(restarts)
    return [sys.executable, *launcher, *program(run, *options)[1:]]


def faulty(networks: int, run: Path, faults: str, *options: str, restarts: int = 0) -> list[str]:
    """Command of a run with faults under torchrun; `faults` is WAY NETWORK STEP ... (faulty.py)."""
    command = torchrun(networks, run, *options, restarts=restarts)
    train = command.index("train")
    assert command[train - 2 : train] == ["-m", "dist_graft"]
    return [*command[: train - 2], FAULTY, *faults.split(), "--", *command[train:]]


def run_program(
    command: Sequence[str], *, timeout: float, cwd: Path | None = None, **more: str
) -> Done:
    """Run a program to its end."""
    (done,) = run_programs([command], timeout=timeout, cwd=cwd, **more)
    return done


def run_programs(
    commands: Sequence[Sequence[str]], *, timeout: float, cwd: Path | None = None, **more: str
) -> list[Done]:
    """Run programs to their end, with RANK etc. if there are several."""
    with running(commands, cwd=cwd, **more) as processes:
        return [wait_for_end(process, timeout) for process in processes]


def run_population(
    processes: int,
    run: Path,
    *options: str,
    device: str = "cpu",
    faults: str = "",
    limit: float = 150,
    **more: str,
) -> list[Done]:
    """Run a population without a launcher, with RANK and WORLD_SIZE set by hand.

    It may have faults: WAY NETWORK STEP ... (faulty.py).
    """
    ends = end_population(
        processes, run, *options, device=device, faults=faults, limit=limit, **more
    )
    assert not any(end.status for end in ends), ends
    return ends


def end_population(
    processes: int,
    run: Path,
    *options: str,
    device: str = "cpu",
    faults: str = "",
    limit: float = 150,
    **more: str,
) -> list[Done]:
    """Run a population as `run_population` does; it may fail."""
    command = program(run, "--runtime.device", device, *options)
    if faults:
        command = [sys.executable, FAULTY, *faults.split(), "--", *command[3:]]
    with running([command] * processes, device=device, **more) as started:
        return [wait_for_end(process, limit) for process in started]


def wait_for_end(process: Process, timeout: float) -> Done:
    """Wait for a program and read its output."""
    output, errors = process.communicate(timeout=timeout)
    status = process.returncode
    assert status is not None
    return Done(status, output, errors)


@contextmanager
def running(
    commands: Sequence[Sequence[str]],
    *,
    cwd: Path | None = None,
    new_session: bool = False,
    device: str = "cpu",
    **more: str,
) -> Iterator[list[Process]]:
    """Run programs in the background, with RANK etc. if there are several; killed on exit.

    A program of ours is forked from a server that has imported torch, unless its session or the
    start of Python matters.
    """
    processes: list[Process] = []
    try:
        for command, place in zip(commands, by_hand(len(commands), device), strict=True):
            variables = place | more
            if not new_session and _can_be_forked(command, variables):
                processes.append(Program(command, variables, cwd))
                continue
            processes.append(
                subprocess.Popen(
                    command,
                    env=variables,
                    cwd=cwd,
                    start_new_session=new_session,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    text=True,
                )
            )
        yield processes
    finally:
        for process in processes:
            process.kill()
        for process in processes:
            process.communicate()


def _can_be_forked(command: Sequence[str], variables: Mapping[str, str]) -> bool:
    """Whether a forked process is the same: the command imports torch, after a usual start."""
    python, *words = command
    ours = words[:2] == ["-m", "dist_graft"] or words[:1] in ([FAULTY], [BLOCKING])
    folders = filter(None, variables.get("PYTHONPATH", "").split(os.pathsep))
    usual = not any(Path(folder, "sitecustomize.py").exists() for folder in folders)
    trains = "train" in words and "--networks" not in words
    return python == sys.executable and ours and trains and usual


def by_hand(processes: int, device: str = "cpu") -> list[dict[str, str]]:
    """Environment of each process; without RANK for a single one."""
    if processes == 1:
        return [environment(device=device)]
    place = {"WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1"}
    place |= {"MASTER_PORT": str(free_port())}
    if device != "cpu":
        place |= {"LOCAL_WORLD_SIZE": str(processes)}
    places = [environment(device=device, **place, RANK=str(rank)) for rank in range(processes)]
    if device == "cpu":
        return places
    return [
        place | {"LOCAL_RANK": str(rank)} | shared_gpu_variables(rank, processes)
        for rank, place in enumerate(places)
    ]


def free_port() -> int:
    """An even port that nothing listens on, nor on the next one.

    It is below those that the system assigns, so that no other program gets it before it is used.
    """
    for _ in range(1000):
        port = _RANDOM.randrange(12000, 32000, 2)
        with socket.socket() as first, socket.socket() as second, suppress(OSError):
            first.bind(("127.0.0.1", port))
            second.bind(("127.0.0.1", port + 1))
            return port
    raise OSError("no free port was found")


def wait_until(
    condition: Callable[[], bool],
    what: str,
    *,
    seconds: float = 90,
    meanwhile: Sequence[Process] = (),
) -> None:
    """Poll a condition; fails after the timeout, or when a program ends."""
    deadline = time.monotonic() + seconds
    while not condition():
        for process in meanwhile:
            ended = process.poll() is not None
            assert not ended, f"the program ended before {what}: {process.communicate()}"
        assert time.monotonic() < deadline, f"{what} did not happen in {seconds} s"
        time.sleep(0.01)


def checkpoint_is_complete(run: Path, epochs: int) -> Callable[[], bool]:
    """Return a function that tells whether a checkpoint after that many epochs, or more, exists."""

    def is_complete() -> bool:  # of later epochs, too: only the newest ones are kept
        found = (run / "checkpoints").glob("epoch_[0-9][0-9][0-9][0-9]*/COMPLETE.json")
        return any(int(path.parent.name[6:10]) >= epochs for path in found)

    return is_complete


def children(process: Process) -> list[int]:
    """Process ids of a launcher's workers, by rank."""
    lists = map(read_proc, Path(f"/proc/{process.pid}/task").glob("*/children"))
    workers = {}
    for pid in (int(child) for pids in lists for child in pids.split()):
        rank = re.search(r"\0RANK=(\d+)", read_proc(Path(f"/proc/{pid}/environ")))
        if rank:
            workers[int(rank.group(1))] = pid
    return [workers[rank] for rank in sorted(workers)]


def is_alive(pid: int) -> bool:
    """Whether a process exists and is not a zombie."""
    state = read_proc(Path(f"/proc/{pid}/stat")).rpartition(")")[2].split()
    return bool(state) and state[0] not in "ZX"


def read_proc(path: Path) -> str:
    """Content of a file below /proc; empty when its process or thread has ended."""
    try:
        return path.read_text(errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return ""


def error_line(done: Done, *parts: str, log: Path | None = None) -> str:
    """Error line of a failed program, checked for what it must contain.

    Also checks that there is no traceback of ours, and that the log has the line.
    """
    assert done.status != 0, done
    ours = re.findall(r'File ".*[/\\]dist_graft[/\\].*', done.errors + done.output)
    assert not ours, f"a traceback of ours: {done.errors}"
    lines = [line for line in done.errors.splitlines() if line.startswith(ERROR)]
    assert lines, done
    first = lines[0].removeprefix(ERROR)
    for part in parts:
        assert part in first
    if log:
        assert first in log.read_text()
    return first
