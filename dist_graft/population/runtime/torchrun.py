"""torchrun with one-line errors: ``python -m dist_graft.population.runtime.torchrun OPTIONS``.

Differs from torchrun in five ways: no traceback of the launcher, an immediate error for an
unusable rendezvous address, an exit when the rendezvous store becomes unreachable,
--numa-binding=node by default where it applies, and SIGHUP stays ignored under nohup.
``--standalone`` listens on the loopback interface only.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import sys
import threading
import time
import uuid
from datetime import timedelta
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.elastic.rendezvous import RendezvousConnectionError, RendezvousTimeoutError
from torch.distributed.run import parse_args, run

from dist_graft.population.collectives import first_line
from dist_graft.population.runtime.launch import LOOPBACK_RENDEZVOUS
from dist_graft.population.runtime.process import has_ended, leave, not_ignored
from dist_graft.population.runtime.store import call_with_timeout
from dist_graft.printing import print_line

_CONNECT_SECONDS = 5.0
_JOIN_SECONDS = 600.0  # torchrun's default
_EXIT_SECONDS = 15.0  # from the end of the processes and the loss of the store
_NUMA_NODES = Path("/sys/devices/system/node")
_PCI_DEVICES = Path("/sys/bus/pci/devices")


def main(argv: list[str]) -> int:
    """Run torchrun with its options; returns the exit status, or ends the process."""
    options = parse_args(argv)
    if options.standalone:  # torchrun's own rendezvous listens on all interfaces
        options.standalone = False
        options.rdzv_backend, options.rdzv_id = LOOPBACK_RENDEZVOUS, uuid.uuid4().hex
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # torchrun's default, without its notice
    signals = [signal.Signals[name.strip()] for name in options.signals_to_handle.split(",")]
    options.signals_to_handle = ",".join(number.name for number in not_ignored(signals))
    options.numa_binding = options.numa_binding or _numa_binding(options.nproc_per_node)
    endpoint = options.rdzv_endpoint
    conf = dict(pair.split("=", 1) for pair in options.rdzv_conf.split(",") if pair)
    join_seconds = float(conf.get("join_timeout", _JOIN_SECONDS))
    if endpoint:
        _check_endpoint(endpoint)
        threading.Thread(target=_watch, args=(endpoint, join_seconds), daemon=True).start()
    try:
        run(options)
    except ChildFailedError as error:
        print_line(error)  # torchrun's table of failures
        return 1
    except SignalException as error:
        print_line(
            f"the launcher received {error.sigval.name} and stopped its processes", sys.stdout
        )
        return 128 + error.sigval
    except (RendezvousConnectionError, RendezvousTimeoutError) as error:
        _fail(_rendezvous_failed(endpoint, join_seconds), error.__cause__ or error)
    return 0


def _numa_binding(processes: str) -> str | None:
    """Return "node" if each process can be bound to the cores near its GPU.

    None if there is one NUMA node only, or fewer GPUs than processes. None also where torchrun
    would fail: without numactl, or without an allowed core near one of the GPUs.

    Args: processes: torchrun's --nproc-per-node.
    """
    if len(list(_NUMA_NODES.glob("node[0-9]*"))) < 2 or shutil.which("numactl") is None:
        return None
    gpus = torch.cuda.device_count()
    count = int(processes) if processes.isdecimal() else gpus
    if not 0 < count <= gpus or processes == "cpu":
        return None
    allowed = os.sched_getaffinity(0)
    return "node" if all(allowed & _cores_near(gpu) for gpu in range(count)) else None


def _cores_near(gpu: int) -> set[int]:
    """Cores of the NUMA node of a GPU; empty if unknown."""
    device: Any = torch.cuda.get_device_properties(gpu)
    address = f"{device.pci_domain_id:04x}:{device.pci_bus_id:02x}:{device.pci_device_id:02x}.0"
    try:
        node = max(0, int((_PCI_DEVICES / address / "numa_node").read_text()))
        ranges = (_NUMA_NODES / f"node{node}" / "cpulist").read_text().strip()
    except OSError:
        return set()
    cores: set[int] = set()
    for part in filter(None, ranges.split(",")):
        first, _, last = part.partition("-")
        cores.update(range(int(first), int(last or first) + 1))
    return cores


def _check_endpoint(endpoint: str) -> None:
    """End the process if the machines cannot use this rendezvous address."""
    host, _, port = endpoint.rpartition(":")
    here = socket.gethostname()
    for name in (host, here):
        try:
            socket.getaddrinfo(name, port)
        except OSError as error:
            _fail(
                f"the name {name} cannot be resolved on {here}: set HEAD to the name of one of "
                "the machines, and make their names known to each other (DNS or /etc/hosts)",
                error,
            )
    try:
        socket.create_connection((host, int(port)), _CONNECT_SECONDS).close()
    except OSError:
        return  # not started yet
    if not _is_store(host, int(port)):
        _fail(
            f"port {port} of {host} belongs to another program: set PORT to a free one, the same "
            "on all machines"
        )


def _is_store(host: str, port: int) -> bool:
    """Whether a key-value store responds; torch bounds the wait for a connection only."""
    timeout = timedelta(seconds=_CONNECT_SECONDS)

    def request() -> None:
        dist.TCPStore(host, port, wait_for_workers=False, timeout=timeout).check([""])

    try:
        # A TCPStore would print a failed connection.
        socket.create_connection((host, port), _CONNECT_SECONDS).close()
        call_with_timeout(request, _CONNECT_SECONDS)
    except (OSError, RuntimeError):  # TimeoutError is an OSError
        return False
    return True


def _rendezvous_failed(endpoint: str, seconds: float) -> str:
    return (
        f"{socket.gethostname()} could not connect to the other machines at {endpoint} within "
        f"{seconds:g} s: start all NODES with the same HEAD, PORT and JOB; HEAD must be the name "
        "of one of them, and PORT open between them"
    )


def _watch(endpoint: str, join_seconds: float) -> None:
    """End this launcher if the rendezvous fails, or its store is lost after the processes ended.

    torchrun waits without a timeout for a rendezvous store whose link was cut. As long as the store
    responds, torchrun may be waiting for the other machines.
    """
    host, _, port = endpoint.rpartition(":")
    began = time.monotonic()
    while not _has_processes():
        if time.monotonic() > began + join_seconds + _CONNECT_SECONDS:
            _fail(_rendezvous_failed(endpoint, join_seconds))
        time.sleep(1)
    last_seen = time.monotonic()
    while time.monotonic() < last_seen + _EXIT_SECONDS:
        time.sleep(1)
        if _has_processes() or _is_store(host, int(port)):
            last_seen = time.monotonic()
    _fail(
        f"{socket.gethostname()} lost the connection to {endpoint}, and its processes have ended: "
        "see their output for the cause, and rerun the command to resume from the latest checkpoint"
    )


def _has_processes() -> bool:
    """Whether a child of this process is running (Linux)."""
    for children in Path("/proc/self/task").glob("*/children"):
        try:
            pids = children.read_text().split()
        except (FileNotFoundError, ProcessLookupError):  # of a thread that has just ended
            continue
        if not all(has_ended(int(pid)) for pid in pids):
            return True
    return False


def _fail(line: str, error: BaseException | None = None) -> NoReturn:
    """Print one line and end the process, even if its threads are blocked."""
    cause = f" ({first_line(error)})" if error else ""
    print_line(f"dist-graft: error: {line}{cause}")
    leave(1)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
