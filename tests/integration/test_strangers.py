"""On one machine a run listens on the loopback interface only, and survives strangers' bytes."""

from __future__ import annotations

import re
import socket
import subprocess
import sys
from collections.abc import Collection
from contextlib import ExitStack, suppress
from pathlib import Path

from launching import PAIR, children, program, running, wait_for_end, wait_until
from reading import assert_same_bits, checkpoint

BYTES = (
    *(b"GET / HTTP/1.1\r\n\r\n", b"\0" * 64, b"\xff" * 64, b"\x01", b"", bytes(range(256)) * 16),
    *(number.to_bytes(8, "little") for number in range(4)),
)
"""A browser, short and long garbage, and small numbers, as gloo's own connections begin."""


def listening(pids: Collection[int]) -> list[tuple[str, int]]:
    """Address and port of each socket on which the processes listen."""
    text = subprocess.run(["ss", "-Hltnp"], capture_output=True, text=True, check=True).stdout
    rows = [line.split() for line in text.splitlines()]
    found = []
    for row in rows:
        if {int(pid) for pid in re.findall(r"pid=(\d+)", row[-1])} & set(pids):
            address, _, port = row[3].rpartition(":")
            found.append((address, int(port)))
    return found


def is_loopback(address: str) -> bool:
    plain = address.strip("[]").removeprefix("::ffff:")
    return plain == "::1" or plain.startswith("127.")


def send_bytes(port: int, connections: ExitStack) -> None:
    """Send each of BYTES on a connection of its own; half of them stay open."""
    for number, content in enumerate(BYTES):
        with suppress(OSError):
            client = socket.create_connection(("127.0.0.1", port), timeout=5)
            connections.enter_context(client)
            client.sendall(content)
            if number % 2:
                client.close()


def test_strangers_neither_end_a_run_nor_change_a_weight(by_peers: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    commands = [program(run, *PAIR, "--graft.exchange", "p2p")] * 2
    with running(commands) as processes, ExitStack() as connections:
        log = run / "network00/log.txt"
        wait_until(lambda: log.exists() and "epoch" in log.read_text(), "the start")
        sockets = listening([process.pid for process in processes])
        assert len(sockets) >= 3  # the store, and gloo in each process
        assert all(is_loopback(address) for address, _ in sockets), sockets
        for _, port in sockets:
            send_bytes(port, connections)
        for process in processes:
            done = wait_for_end(process, 120)
            assert done.status == 0, done
    for network in (0, 1):
        before, after = (checkpoint(path, 3, network) for path in (by_peers, run))
        assert_same_bits(before["model"], after["model"])


def test_the_launcher_listens_on_loopback(tmp_path: Path) -> None:
    run = tmp_path / "run"
    launcher = [sys.executable, "-m", "dist_graft.population.runtime.torchrun", "--standalone"]
    command = [*launcher, "--nproc-per-node=2", *program(run, "--epochs", "400")[1:]]
    with running([command]) as (process,):
        wait_until((run / "config.yaml").exists, "the start", meanwhile=[process])
        sockets = listening([process.pid, *children(process)])
        assert len(sockets) >= 3
        assert all(is_loopback(address) for address, _ in sockets), sockets
        process.terminate()
        wait_for_end(process, 60)
