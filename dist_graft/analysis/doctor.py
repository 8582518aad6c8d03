"""Whether this machine can train: what is there, what works, and what to do about the rest."""

from __future__ import annotations

import os
import shutil
import socket
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from dist_graft.errors import StartError
from dist_graft.population.runtime.process_info import ProcessInfo
from dist_graft.population.runtime.selftest import run_selftest
from dist_graft.version import versions

_SHARED_MEMORY = Path("/dev/shm")
_SMALL_SHARED_MEMORY = 512 * 2**20
_LITTLE_SPACE = 2**30
_WRITTEN = 32 * 2**20
_SLOW_WRITING = 10 * 2**20
_PORT = 29500  # torchrun's own when it is not told another


@dataclass(frozen=True)
class Finding:
    """What one check found."""

    name: str
    state: Literal["ok", "note", "broken"]
    """note: works, and there is something to know."""
    text: str
    advice: str = ""

    def line(self) -> str:
        """As it is printed."""
        return f"{self.state:<6}  {self.name:<16}  {self.text}"


def examine(run_dir: str, *, seconds: float) -> Iterator[str]:
    """Check one thing after the other; yields lines, the last of which say what to do.

    Args:
        run_dir: folder whose disk is tried; nothing stays there.
        seconds: that a round between two processes may take.

    Raises: StartError, at the end, when something is broken.
    """
    findings = []
    checks: tuple[Callable[[], Finding], ...] = (
        check_versions,
        check_processors,
        check_gpus,
        check_ports,
        check_shared_memory,
        lambda: check_disk(Path(run_dir)),
        *(lambda backend=backend: check_round(backend, seconds) for backend in backends()),
    )
    for check in checks:
        finding = check()
        findings.append(finding)
        yield finding.line()
    yield ""
    yield from (f"{finding.name}: {finding.advice}" for finding in findings if finding.advice)
    broken = [finding.name for finding in findings if finding.state == "broken"]
    if broken:
        raise StartError(f"broken: {', '.join(broken)}; what to do is said above")
    networks = max(2, torch.cuda.device_count())
    yield (
        "All is well. To train: torchrun --standalone "
        f"--nproc-per-node={networks} -m dist_graft train --run_dir {run_dir}"
    )


def backends() -> list[str]:
    """Those that two processes can use here."""
    return ["gloo", "nccl"] if torch.cuda.device_count() > 1 else ["gloo"]


def check_versions() -> Finding:
    """What is installed."""
    return Finding("versions", "ok", ", ".join(f"{k} {v}" for k, v in versions().items()))


def check_processors() -> Finding:
    """Cores that this process may use."""
    cores = ProcessInfo().cpu_share()
    if cores == 1:
        return Finding(
            "processors",
            "note",
            "1 core",
            "one core is shared by all networks of the machine: more than one trains no faster",
        )
    return Finding("processors", "ok", f"{cores} cores for this process")


def check_gpus() -> Finding:
    """GPUs that torch sees, each tried with one sum."""
    count = torch.cuda.device_count()
    if not count:
        if Path("/dev/nvidiactl").exists() or shutil.which("nvidia-smi"):
            return Finding(
                "GPUs",
                "broken",
                f"there is a driver, and torch {torch.__version__} sees no GPU",
                "check CUDA_VISIBLE_DEVICES and nvidia-smi; torch may need another build, or the "
                "driver be older than its CUDA; with --runtime.device cpu it trains without",
            )
        return Finding("GPUs", "note", "none", "training runs on the CPU, over gloo")
    names = []
    for index in range(count):
        try:
            total = torch.ones(1000, device=f"cuda:{index}").sum().item()
            free, _ = torch.cuda.mem_get_info(index)
        except RuntimeError as error:
            return Finding(
                "GPUs",
                "broken",
                f"cuda:{index} does not compute: {str(error).splitlines()[0]}",
                "see what nvidia-smi says of it, or leave it out with CUDA_VISIBLE_DEVICES",
            )
        assert total == 1000
        names.append(f"{torch.cuda.get_device_name(index)} ({free / 2**30:.0f} GiB free)")
    return Finding("GPUs", "ok", ", ".join(names))


def check_ports() -> Finding:
    """Whether processes of this machine reach each other, and the host its own name."""
    with socket.socket() as listener, socket.socket() as caller:
        listener.bind(("127.0.0.1", 0))
        listener.listen(1)
        caller.settimeout(5)
        try:
            caller.connect(listener.getsockname())
        except OSError as error:
            return Finding(
                "ports",
                "broken",
                f"a port of 127.0.0.1 that is open cannot be reached: {error}",
                "a firewall or container forbids connections to the machine itself: allow them",
            )
    host = socket.gethostname()
    try:
        socket.getaddrinfo(host, None)
    except OSError as error:
        return Finding(
            "ports",
            "note",
            f"open; the host's name {host} has no address ({error})",
            f"for runs over several machines add {host} to /etc/hosts, or name the network "
            "interface in GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME",
        )
    with socket.socket() as probe:
        taken = probe.connect_ex(("127.0.0.1", _PORT)) == 0
    if taken:
        return Finding(
            "ports",
            "note",
            f"open; {_PORT} is taken",
            "start torchrun with --standalone, or with another --master-port",
        )
    return Finding("ports", "ok", f"open; {host} has an address")


def check_shared_memory() -> Finding:
    """Room for what processes of one machine share: NCCL, and images from loader processes."""
    try:
        with tempfile.TemporaryFile(dir=_SHARED_MEMORY) as file:
            file.write(b"x")
        free = shutil.disk_usage(_SHARED_MEMORY).free
    except OSError as error:
        return Finding(
            "shared memory",
            "broken",
            f"{_SHARED_MEMORY} cannot be written: {error.strerror}",
            "mount a tmpfs there; a container needs --ipc=host or --shm-size=8g",
        )
    size = f"{_SHARED_MEMORY} has {_bytes(free)} free"
    if free < _SMALL_SHARED_MEMORY:
        return Finding(
            "shared memory",
            "note",
            size,
            "little for loader processes and NCCL: a container gets more with --shm-size=8g, and "
            "--data.workers 0 needs none",
        )
    return Finding("shared memory", "ok", size)


def check_disk(run_dir: Path) -> Finding:
    """Whether the run directory's disk can be written, how fast, and how much is free."""
    folder = run_dir
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    try:
        with tempfile.TemporaryDirectory(prefix=".dist_graft_", dir=folder) as scratch:
            speed = _write_speed(Path(scratch))
        free = shutil.disk_usage(folder).free
    except OSError as error:
        return Finding(
            "run directory",
            "broken",
            f"{folder} cannot be written: {error.strerror}",
            "choose another --run_dir, or free space there",
        )
    text = f"{folder.resolve()}: {_bytes(speed)}/s, {_bytes(free)} free"
    if free < _LITTLE_SPACE:
        return Finding(
            "run directory", "note", text, "little space: free some, or lower --checkpoint.keep"
        )
    if speed < _SLOW_WRITING:
        return Finding(
            "run directory",
            "note",
            text,
            "a slow disk: sets are written beside the training, but a larger --checkpoint.every "
            "helps",
        )
    return Finding("run directory", "ok", text)


def _write_speed(folder: Path) -> float:
    """Bytes a second, durable and renamed as a checkpoint file is."""
    content = os.urandom(2**20)
    began = time.perf_counter()
    with (folder / "written").open("wb") as file:
        for _ in range(_WRITTEN // len(content)):
            file.write(content)
        file.flush()
        os.fsync(file.fileno())
    (folder / "written").rename(folder / "renamed")
    return _WRITTEN / (time.perf_counter() - began)


def check_round(backend: str, seconds: float) -> Finding:
    """A real round between two processes."""
    well, text = run_selftest(backend, seconds=seconds)
    name = f"round over {backend}"
    if well:
        return Finding(name, "ok", text)
    interface = f"{backend.upper()}_SOCKET_IFNAME"
    return Finding(
        name,
        "broken",
        text,
        f"two processes of this machine could not graft: if they do not connect, name a network "
        f"interface in {interface} (lo always works on one machine); if they are slow, allow "
        "more --timeout_seconds",
    )


def _bytes(number: float) -> str:
    gib = number / 2**30
    return f"{gib:.1f} GiB" if gib >= 1 else f"{number / 2**20:.0f} MiB"
