"""Where the networks of a run are, and whether all of them see its folder."""

from __future__ import annotations

import contextlib
import secrets
import socket
import time
from pathlib import Path

import torch

from dist_graft.errors import RunDirectoryError
from dist_graft.monitoring.console import table
from dist_graft.population.runtime.process_group import Runtime

_LAG_SECONDS = 15.0  # of a shared disk, until a new file is seen on another machine
_LOOK_EVERY = 0.2


def check_shared(folder: Path, runtime: Runtime) -> None:
    """Rank 0 leaves a token in the folder, and all read it; every network must call this.

    Raises: RunDirectoryError, in all networks alike, naming those that do not see it; PeerError
        when rank 0 refused the folder, or a network did not answer.
    """
    if runtime.process.world_size == 1:
        return
    token = secrets.token_hex(8)
    if runtime.process.rank == 0:
        _leave(folder, token)
    token = runtime.broadcast_text("the check of the run directory", token)
    lag = min(_LAG_SECONDS, runtime.timeouts.seconds / 3)
    hosts = runtime.hosts()
    # Not through the store: who keeps it may leave as soon as it knows.
    seen = runtime.gather_all_ranks(
        [float(_is_seen(folder, token, lag))], "the sight of the run directory"
    )
    if runtime.process.rank == 0:
        _token_file(folder, token).unlink(missing_ok=True)
    blind = dict.fromkeys(
        f"network {rank // runtime.process.replicas} on {host}"
        for rank, (host, (there,)) in enumerate(zip(hosts, seen, strict=True))
        if not there
    )
    if blind:
        raise RunDirectoryError(
            f"{folder} is not one folder for all: {'; '.join(blind)} cannot see within "
            f"{lag:g} s what network 0 wrote there; choose a run_dir on a disk that all "
            "machines share under the same path"
        )


def process_table(runtime: Runtime) -> str:
    """A table of the processes: network, rank, host, device; every process must call this.

    Raises: PeerError when one did not answer.
    """
    device = str(runtime.device)
    if runtime.device.type == "cuda":
        device = f"{device} ({torch.cuda.get_device_name(runtime.device)})"
    place = runtime.process
    which = (str(place.network), str(place.replica))[: 2 if place.replicas > 1 else 1]
    mine = "\t".join([*which, str(place.rank), socket.gethostname(), device])
    rows = [row.split("\t") for row in runtime.gather_texts("who runs where", mine)]
    columns = ("network", "replica")[: len(which)]
    return table((*columns, "rank", "host", "device"), rows)


def _leave(folder: Path, token: str) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _token_file(folder, token).write_text(token)
    except OSError as error:
        raise RunDirectoryError(
            f"{folder} cannot be written: {error.strerror}; choose another run_dir"
        ) from error


def _is_seen(folder: Path, token: str, lag: float) -> bool:
    deadline = time.monotonic() + lag
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError):  # not there yet, or never
            if _token_file(folder, token).read_text() == token:
                return True
        time.sleep(_LOOK_EVERY)
    return False


def _token_file(folder: Path, token: str) -> Path:
    return folder / f".shared-{token}"
