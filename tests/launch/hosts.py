"""Two hosts on this machine: network namespaces connected by a virtual cable."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from debian import cannot, need

NAMES = ("alpha", "beta")
ADDRESSES = ("10.77.0.1", "10.77.0.2")


def need_hosts() -> None:
    """Fail in CI, and skip elsewhere, if network namespaces are not available."""
    if os.geteuid():
        cannot("network namespaces need root")
    need(("ip", "unshare"), ("iproute2", "util-linux"))


class TwoHosts:
    """The hosts alpha and beta.

    Args:
        mark: unique among the pairs on this machine.
    """

    def __init__(self, mark: str) -> None:
        self._spaces = [f"{name}{mark}" for name in NAMES]
        self._files = [Path("/etc/netns") / space for space in self._spaces]
        """Files that ip netns exec mounts over /etc."""
        self._ends = [f"{name[0]}{mark}" for name in NAMES]

    def connect(self) -> None:
        """Create both hosts and connect them."""
        known = [f"{address} {name}" for name, address in zip(NAMES, ADDRESSES, strict=True)]
        for space, files in zip(self._spaces, self._files, strict=True):
            _ip("netns", "add", space)
            files.mkdir(parents=True)
            (files / "hosts").write_text("\n".join(["127.0.0.1 localhost", *known, ""]))
        one, other = self._ends
        _ip("link", "add", one, "type", "veth", "peer", "name", other)
        for space, end, address in zip(self._spaces, self._ends, ADDRESSES, strict=True):
            _ip("link", "set", end, "netns", space)
            _ip("-n", space, "addr", "add", f"{address}/24", "dev", end)
            _ip("-n", space, "link", "set", end, "up")
            _ip("-n", space, "link", "set", "lo", "up")

    def cut(self) -> None:
        """Silently drop all packets between the hosts, as a dead switch does."""
        for space, other in zip(self._spaces, reversed(ADDRESSES), strict=True):
            _ip("-n", space, "route", "add", "blackhole", f"{other}/32")

    def on(self, host: int, command: Sequence[str]) -> list[str]:
        """Command that runs a command on a host, with the host's name."""
        named = f'hostname {NAMES[host]} && exec "$0" "$@"'
        inside = ["ip", "netns", "exec", self._spaces[host], "unshare", "--uts", "sh", "-c", named]
        return [*inside, *command]

    def interface(self, host: int) -> str:
        """Network interface of a host."""
        return self._ends[host]

    def remove(self) -> None:
        """Remove the hosts."""
        for space in self._spaces:
            subprocess.run(["ip", "netns", "del", space], check=False, capture_output=True)
        for files in self._files:
            shutil.rmtree(files, ignore_errors=True)


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, timeout=20)


@contextmanager
def two_hosts() -> Iterator[TwoHosts]:
    """Two hosts that reach only each other."""
    hosts = TwoHosts(str(os.getpid()))
    try:
        try:
            hosts.connect()
        except subprocess.CalledProcessError as error:
            cannot(f"no network namespaces: {error.stderr.decode().strip()}")
        yield hosts
    finally:
        hosts.remove()
