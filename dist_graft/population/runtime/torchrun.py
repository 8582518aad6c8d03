"""torchrun, whose failures end with one line that says what to do: python -m of this module."""

from __future__ import annotations

import os
import queue
import socket
import sys
import threading
import time
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.elastic.rendezvous import RendezvousConnectionError, RendezvousTimeoutError
from torch.distributed.run import parse_args, run

from dist_graft.population.runtime.process import leave
from dist_graft.printing import tell

_ANSWER_SECONDS = 5.0  # for a store that is there
_JOIN_SECONDS = 600.0  # torchrun's own default
_PARTING_SECONDS = 15.0  # from the end of the processes to that of their launcher


def launch(argv: list[str]) -> int:
    """Run torchrun with its options, no restarts; returns the exit status, or ends the process.

    What became of the processes is shown in torchrun's table, without its traceback.
    """
    options = parse_args(argv)
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # as torchrun does, which tells of it at length
    head = options.rdzv_endpoint
    conf = dict(pair.split("=", 1) for pair in options.rdzv_conf.split(",") if pair)
    if head:
        refuse_wrong_address(head)
        threading.Thread(target=watch, args=(head, conf), daemon=True).start()
    try:
        run(options)
    except ChildFailedError as error:
        tell(error)
        return 1
    except SignalException as error:
        tell(f"the launcher got {error.sigval.name} and ended its processes", sys.stdout)
        return 128 + error.sigval
    except (RendezvousConnectionError, RendezvousTimeoutError) as error:
        give_up(_lonely(head, conf), error.__cause__ or error)
    return 0


def refuse_wrong_address(head: str) -> None:
    """End the process at once where the machines cannot meet at this address."""
    host, _, port = head.rpartition(":")
    here = socket.gethostname()
    for name in (host, here):
        try:
            socket.getaddrinfo(name, port)
        except OSError as error:
            give_up(
                f"the name {name} leads to no address on {here}: set HEAD to the name of one of "
                "the machines, and let DNS or /etc/hosts of each know the names of all",
                error,
            )
    try:
        socket.create_connection((host, int(port)), _ANSWER_SECONDS).close()
    except OSError:
        return  # not there yet
    if not _keeps_a_store(host, int(port)):
        give_up(
            f"port {port} of {host} belongs to another program: set PORT to a free one, the same "
            "on all machines"
        )


def watch(head: str, conf: Mapping[str, str]) -> None:
    """End the process when the machines do not meet, or when it outlives its processes.

    torchrun waits without end for a store that was cut off.
    """
    began = time.monotonic()
    while not _processes():
        if time.monotonic() > began + _patience(conf) + _ANSWER_SECONDS:
            give_up(_lonely(head, conf))
        time.sleep(1)
    last = time.monotonic()
    while time.monotonic() < last + _PARTING_SECONDS:
        time.sleep(1)
        if _processes():
            last = time.monotonic()
    give_up(
        f"{socket.gethostname()} lost {head}, and its processes have ended: their own output says "
        "why; the same command goes on from the newest checkpoint"
    )


def give_up(line: str, error: BaseException | None = None) -> None:
    """End the process with one line."""
    reason = f" ({str(error).splitlines()[0]})" if error and str(error) else ""
    tell(f"dist-graft: error: {line}{reason}")
    leave(1)


def _lonely(head: str, conf: Mapping[str, str]) -> str:
    return (
        f"{socket.gethostname()} did not meet the other machines at {head} within "
        f"{_patience(conf):g} s: start all NODES with the same HEAD, PORT and JOB; HEAD must be "
        "the name of one of them, and PORT open between them"
    )


def _patience(conf: Mapping[str, str]) -> float:
    return float(conf.get("join_timeout", _JOIN_SECONDS))


def _keeps_a_store(host: str, port: int) -> bool:
    """Whether a store answers; asked in a thread, because nothing bounds that wait."""
    answers: queue.SimpleQueue[bool] = queue.SimpleQueue()
    seconds = timedelta(seconds=_ANSWER_SECONDS)

    def ask() -> None:
        try:
            store = dist.TCPStore(host, port, wait_for_workers=False, timeout=seconds)
            store.check([""])
        except RuntimeError:
            answers.put(False)
        else:
            answers.put(True)

    threading.Thread(target=ask, daemon=True).start()
    try:
        return answers.get(timeout=_ANSWER_SECONDS)
    except queue.Empty:
        return False


def _processes() -> list[str]:
    """Process ids of the children that run."""
    found = []
    for children in Path("/proc/self/task").glob("*/children"):
        try:
            pids = children.read_text().split()
            found += [pid for pid in pids if _runs(pid)]
        except (FileNotFoundError, ProcessLookupError):
            continue
    return found


def _runs(pid: str) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"


if __name__ == "__main__":
    sys.exit(launch(sys.argv[1:]))
