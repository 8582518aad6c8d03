"""``dist-graft doctor``: check whether this machine can train, and suggest fixes."""

from __future__ import annotations

import os
import shutil
import socket
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from jsonargparse import ArgumentParser

from dist_graft.command import Command, Options
from dist_graft.config import TrainConfig
from dist_graft.config.validation import above_zero
from dist_graft.errors import StartError
from dist_graft.population.runtime.process_info import ProcessInfo
from dist_graft.printing import format_bytes
from dist_graft.version import versions

_SHARED_MEMORY = Path("/dev/shm")
_SMALL_SHARED_MEMORY = 512 * 2**20
_SMALL_DISK = 2**30
_TEST_FILE_BYTES = 32 * 2**20
_SLOW_DISK = 10 * 2**20  # bytes per second
_PORT = 29500  # torchrun's default


def build_parser(settings: Mapping[str, Any]) -> ArgumentParser:
    """Build the parser of the command's options."""
    parser = ArgumentParser(
        description="Check whether this machine can train: GPUs, ports, shared memory, disk, and a "
        "round between two processes. Fails if something is broken, and suggests how to fix it.",
        **settings,
    )
    add = parser.add_argument
    add("--run_dir", type=str, default=TrainConfig.run_dir, help="folder whose disk is checked")
    add(
        "--timeout_seconds",
        type=float,
        default=120.0,
        help="limit for starting two processes and one round between them",
    )
    return parser


def run(options: Options, process: ProcessInfo) -> Iterator[str]:
    """Run all checks. Yields a line per check, then advice.

    Raises: StartError, at the end, if something is broken.
    """
    del process
    seconds, run_dir = options["timeout_seconds"], options["run_dir"]
    above_zero("timeout_seconds", seconds)
    import torch

    gpus = torch.cuda.device_count()
    backends = ["gloo", "nccl"] if gpus > 1 else ["gloo"]
    checks: dict[str, Callable[[], CheckResult]] = {
        "versions": check_versions,
        "processors": check_processors,
        "GPUs": check_gpus,
        "ports": check_ports,
        "shared memory": check_shared_memory,
        "run directory": partial(check_disk, Path(run_dir)),
        **{f"round over {name}": partial(check_round, name, seconds) for name in backends},
    }
    results = {}
    for name, check in checks.items():
        results[name] = result = check()
        yield f"{result.state:<6}  {name:<16}  {result.text}"
    yield ""
    yield from (f"{name}: {result.advice}" for name, result in results.items() if result.advice)
    broken = [name for name, result in results.items() if result.state == "broken"]
    if broken:
        raise StartError(f"broken: {', '.join(broken)}; see the advice above")
    yield (
        f"This machine can train: dist-graft train --networks {max(2, gpus)} --run_dir {run_dir}"
    )


COMMAND = Command(
    name="doctor",
    help="check whether this machine can train",
    build_parser=build_parser,
    run=run,
)


@dataclass(frozen=True)
class CheckResult:
    """Result of one check."""

    state: Literal["ok", "note", "broken"]
    """note: works, with a limitation."""
    text: str
    advice: str = ""


def check_versions() -> CheckResult:
    """Report the installed versions."""
    return CheckResult("ok", ", ".join(f"{k} {v}" for k, v in versions().items()))


def check_processors() -> CheckResult:
    """Count the cores that this process may use."""
    cores = ProcessInfo().cpu_share()
    if cores == 1:
        return CheckResult(
            "note",
            "1 core",
            "all networks share one core, so training them together is no faster than one by one",
        )
    return CheckResult("ok", f"{cores} cores for this process")


def check_gpus() -> CheckResult:
    """Compute a sum on each GPU that torch sees."""
    import torch

    count = torch.cuda.device_count()
    if not count:
        if Path("/dev/nvidiactl").exists() or shutil.which("nvidia-smi"):
            return CheckResult(
                "broken",
                f"a driver is installed, but torch {torch.__version__} sees no GPU",
                "check CUDA_VISIBLE_DEVICES and nvidia-smi; the driver may be too old for this "
                "build of torch; to train without a GPU, use --runtime.device cpu",
            )
        return CheckResult("note", "none", "training runs on the CPU with gloo")
    names = []
    for index in range(count):
        try:
            torch.ones(1000, device=f"cuda:{index}").sum().item()
            free, _ = torch.cuda.mem_get_info(index)
        except RuntimeError as error:
            return CheckResult(
                "broken",
                f"cuda:{index} fails: {str(error).splitlines()[0]}",
                "check the GPU with nvidia-smi, or exclude it with CUDA_VISIBLE_DEVICES",
            )
        names.append(f"{torch.cuda.get_device_name(index)} ({format_bytes(free)} free)")
    return CheckResult("ok", ", ".join(names))


def check_ports() -> CheckResult:
    """Connect to a port of this machine, resolve its host name, and look for torchrun's port."""
    with socket.socket() as listener, socket.socket() as caller:
        listener.bind(("127.0.0.1", 0))
        listener.listen(1)
        caller.settimeout(5)
        try:
            caller.connect(listener.getsockname())
        except OSError as error:
            return CheckResult(
                "broken",
                f"cannot connect to an open port of 127.0.0.1: {error}",
                "allow local connections in the firewall or container",
            )
    host = socket.gethostname()
    try:
        socket.getaddrinfo(host, None)
    except OSError as error:
        return CheckResult(
            "note",
            f"open; the host name {host} cannot be resolved ({error})",
            f"to train on several machines, add {host} to /etc/hosts, or set GLOO_SOCKET_IFNAME "
            "and NCCL_SOCKET_IFNAME to the network interface",
        )
    with socket.socket() as probe:
        taken = probe.connect_ex(("127.0.0.1", _PORT)) == 0
    if taken:
        return CheckResult(
            "note",
            f"open; {_PORT} is in use",
            "start torchrun with --standalone, or with another --master-port",
        )
    return CheckResult("ok", f"open; {host} can be resolved")


def check_shared_memory() -> CheckResult:
    """Measure the free shared memory, which NCCL and data loader workers need."""
    try:
        with tempfile.TemporaryFile(dir=_SHARED_MEMORY) as file:
            file.write(b"x")
        free = shutil.disk_usage(_SHARED_MEMORY).free
    except OSError as error:
        return CheckResult(
            "broken",
            f"{_SHARED_MEMORY} cannot be written: {error.strerror}",
            "mount a tmpfs there; start containers with --ipc=host or --shm-size=8g",
        )
    text = f"{_SHARED_MEMORY} has {format_bytes(free)} free"
    if free < _SMALL_SHARED_MEMORY:
        return CheckResult(
            "note",
            text,
            "low for data loader workers and NCCL: start containers with --shm-size=8g, or use "
            "--data.workers 0, which needs none",
        )
    return CheckResult("ok", text)


def check_disk(run_dir: Path) -> CheckResult:
    """Measure the free space and the write speed of the run directory's disk."""
    folder = run_dir
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    try:
        with tempfile.TemporaryDirectory(prefix=".dist_graft_", dir=folder) as scratch:
            speed = _write_speed(Path(scratch))
        free = shutil.disk_usage(folder).free
    except OSError as error:
        return CheckResult(
            "broken",
            f"{folder} cannot be written: {error.strerror}",
            "choose another --run_dir, or free space there",
        )
    text = f"{folder.resolve()}: {format_bytes(speed)}/s, {format_bytes(free)} free"
    if free < _SMALL_DISK:
        return CheckResult("note", text, "low on space: free some, or lower --checkpoint.keep")
    if speed < _SLOW_DISK:
        return CheckResult(
            "note",
            text,
            "a slow disk: checkpoints are written in the background, but a larger "
            "--checkpoint.every helps",
        )
    return CheckResult("ok", text)


def _write_speed(folder: Path) -> float:
    """Write, sync and rename a file as checkpoints are written. Returns bytes per second."""
    content = os.urandom(2**20)
    began = time.perf_counter()
    with (folder / "written").open("wb") as file:
        for _ in range(_TEST_FILE_BYTES // len(content)):
            file.write(content)
        file.flush()
        os.fsync(file.fileno())
    (folder / "written").rename(folder / "renamed")
    return _TEST_FILE_BYTES / (time.perf_counter() - began)


def check_round(backend: str, seconds: float) -> CheckResult:
    """Run a round between two processes of this machine."""
    from dist_graft.population.runtime.selftest import run_selftest

    works, text = run_selftest(backend, seconds=seconds)
    if works:
        return CheckResult("ok", text)
    interface = f"{backend.upper()}_SOCKET_IFNAME"
    return CheckResult(
        "broken",
        text,
        f"two processes of this machine cannot graft: if they do not connect, set {interface} to a "
        "network interface (lo always works on one machine); if they are slow, raise "
        "--timeout_seconds",
    )
