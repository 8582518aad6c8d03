"""``dist-graft status``: progress of a run, or how it ended, from the files in its directory."""

from __future__ import annotations

import json
import math
import os
import socket
import statistics
import sys
import time
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from jsonargparse import ArgumentParser

from dist_graft.analysis.run_files import (
    Fields,
    NetworkFiles,
    RunFiles,
    read_run,
    run_paths,
    section,
)
from dist_graft.command import Command, Options
from dist_graft.config.validation import above_zero
from dist_graft.errors import SEE_PEER
from dist_graft.monitoring.console import duration
from dist_graft.monitoring.status_file import ENDED, HEARTBEAT_SECONDS
from dist_graft.population.runtime.lease import LeaseInfo
from dist_graft.population.runtime.process_info import ProcessInfo
from dist_graft.printing import format_metric, format_number, format_table, metric_header

State = Literal["starting", "running", "finished", "stopped", "failed", "died"]
ACTIVE: tuple[State, ...] = ("starting", "running")

_DEAD_AFTER_SECONDS = 90.0  # shared filesystems may show an old version of a file for a minute
_ALIVE_WITHIN_SECONDS = 2 * HEARTBEAT_SECONDS + 1
_CONSEQUENCES = ("stopped by ", SEE_PEER, "the run's key-value store is gone")
"""Parts of the messages of processes that ended because another one had failed."""
_EVENTS_SHOWN = 5
_SILENCE_SHOWN_SECONDS = 30.0
_CLEAR_SCREEN = "\x1b[H\x1b[2J"


def build_parser(settings: Mapping[str, Any]) -> ArgumentParser:
    """Build the parser of the command's options."""
    parser = ArgumentParser(
        description="Show the progress of a run, or how it ended, from the files it wrote; for a "
        "folder of runs, show the state of each.",
        **settings,
    )
    add = parser.add_argument
    add("run", type=str, help="run directory, or a folder of run directories")
    add("--watch", action="store_true", help="wait for the run to start, and repeat until it ends")
    add("--every", type=float, default=5.0, help="seconds between repetitions")
    add("--json", action="store_true", help="print one JSON object per repetition, for scripts")
    return parser


def run(options: Options, process: ProcessInfo) -> Iterator[str]:
    """Show the status once, or repeatedly until the run, or all runs of a folder, have ended.

    Raises: RunDirectoryError if there is no run, unless it is waited for.
    """
    del process
    above_zero("every", options["every"])
    path, watch, as_json = Path(options["run"]), options["watch"], options["json"]
    clear = _CLEAR_SCREEN if watch and not as_json and sys.stdout.isatty() else ""
    waiting = False
    while True:
        paths, now = run_paths(path), time.time()
        if not paths and watch:
            if not waiting and not as_json:
                yield f"{clear}waiting for a run to start in {path}"
            waiting = True
            time.sleep(options["every"])
            continue
        runs = [(files, judge(files, now)) for files in map(read_run, paths or [path])]
        one = paths in ([], [path])
        if as_json:
            known = [facts(*each, now) for each in runs]
            yield json.dumps(known[0] if one else known, indent=None if watch else 1)
        else:
            yield clear + (status_text(*runs[0], now) if one else overview(runs, now))
        if not watch or not any(run_status.state in ACTIVE for _, run_status in runs):
            return
        time.sleep(options["every"])


COMMAND = Command(
    name="status",
    help="show the progress of a run",
    build_parser=build_parser,
    run=run,
    only_prints=True,
)

# ------------------------------------------------------------------------------------------------
# State of a run
# ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class RunStatus:
    """State of a run as a whole."""

    state: State
    words: str
    """The state in one line, with its cause and what to do."""
    alive: frozenset[int]
    """Networks whose processes are running."""


def judge(run: RunFiles, now: float) -> RunStatus:
    """Determine the status of a run at Unix time `now`."""
    alive = frozenset(files.network for files in run.networks if _is_alive(files, now))
    died = [
        files
        for files in run.networks
        if files.phase is not None and files.phase not in ENDED and files.network not in alive
    ]
    errors = {files.network: error for files in run.networks if (error := _error(files))}
    state, words = _state(run, alive, died, errors, now)
    return RunStatus(state=state, words=words, alive=alive)


def _state(
    run: RunFiles,
    alive: Collection[int],
    died: list[NetworkFiles],
    errors: Mapping[int, str],
    now: float,
) -> tuple[State, str]:
    resume = (
        f"rerun the same command to resume from {run.checkpoint}"
        if run.checkpoint
        else "there is no checkpoint to resume from"
    )
    if run.of_jobs:
        return _state_of_jobs(run, alive, errors)
    if alive:
        lost = [*(files.network for files in died), *(k for k in errors if k not in alive)]
        without = f", but without {_names(lost)}" if lost else ""
        phases = {files.phase for files in run.networks if files.network in alive}
        if phases == {"starting"}:
            return "starting", f"starting: loading data and connecting the networks{without}"
        return "running", f"running{without}"

    finished = [files.last_epoch["epoch"] + 1 for files in run.networks if files.last_epoch]
    if run.summary and max([*finished, run.checkpoint_epoch]) >= max(1, run.epochs):
        return "finished", "finished: all epochs are done; see summary.json for the results"
    if run.stopped is not None and not died:
        return "stopped", " ".join(run.stopped.split()) or f"stopped early; {resume}"

    causes = {k: e for k, e in errors.items() if not any(part in e for part in _CONSEQUENCES)}
    if causes or (errors and not died):
        network, error = next(iter((causes or errors).items()))
        known = error.startswith(f"network {network} (")  # errors in log.txt name the process
        return "failed", f"failed: {'' if known else f'network {network}: '}{error}; {resume}"
    if died:
        silent = [seconds for files in died if (seconds := _silent_seconds(files, now)) is not None]
        return "died", (
            f"died: last heartbeat of {_names([files.network for files in died])} "
            f"{duration(min(silent, default=0))} ago, without an error message (killed, out of "
            f"memory, or the machine failed); {resume}"
        )
    if {files.phase for files in run.networks} == {"stopped"}:  # a start has removed the marker
        return "stopped", f"stopped early; {resume}"
    return "died", f"exited before the last epoch, for an unknown reason; {resume}"


def _state_of_jobs(
    run: RunFiles, alive: Collection[int], errors: Mapping[int, str]
) -> tuple[State, str]:
    """State of a population whose networks are independent jobs."""
    presence = {files.network: _presence(files, alive, run.epochs) for files in run.networks}
    groups = [
        (word, [network for network, found in presence.items() if found == word])
        for word in ("running", "finished", "left", "not started")
    ]
    counted = "; ".join(f"{_names(found)} {word}" for word, found in groups if found)
    if alive:
        phases = {files.phase for files in run.networks if files.network in alive}
        return ("starting" if phases == {"starting"} else "running"), counted
    if all(word == "finished" for word in presence.values()):
        missing = "" if run.summary else f"; dist-graft evaluate {run.path} computes the results"
        return "finished", f"finished: all jobs are done{missing}"
    stopped = [files for files in run.networks if files.phase == "stopped"]
    stopped += [files for files in run.networks if _has_epochs_left(files, run.epochs)]
    failed = {network: errors[network] for network in errors if presence[network] == "left"}
    for files in stopped:
        failed.pop(files.network, None)
    causes = "".join(f"; network {network}: {error}" for network, error in failed.items())
    state: State = "failed" if failed else "stopped" if stopped else "died"
    return state, f"no job is running: {counted}{causes}; start the jobs again to resume"


def _presence(files: NetworkFiles, alive: Collection[int], epochs: int) -> str:
    """Whether the job of a network is running, finished, has left, or was never started."""
    if files.network in alive:
        return "running"
    if files.phase is None and not files.last_epoch:
        return "not started"
    if files.phase == "finished" and not _has_epochs_left(files, epochs):
        return "finished"
    return "left"


def _has_epochs_left(files: NetworkFiles, epochs: int) -> bool:
    """Whether a job finished, and the population now trains for more epochs."""
    trained = files.last_epoch["epoch"] + 1 if files.last_epoch else epochs
    return files.phase == "finished" and trained < epochs


def _is_alive(files: NetworkFiles, now: float) -> bool:
    silent = _silent_seconds(files, now)
    if silent is None or files.phase in ENDED:
        return False
    return silent < _ALIVE_WITHIN_SECONDS or (silent < _DEAD_AFTER_SECONDS and not _is_gone(files))


def _silent_seconds(files: NetworkFiles, now: float) -> float | None:
    """Seconds since the network's process wrote status.json; None if it never did."""
    written = _as_float(files.status.get("time"))
    return None if written is None else max(0.0, now - written)


def _is_gone(files: NetworkFiles) -> bool:
    """Whether the process ran on this host and no longer exists."""
    pid = files.status.get("pid")
    if files.status.get("host") != socket.gethostname() or not isinstance(pid, int):
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except (PermissionError, OverflowError):
        return False
    return False


def _error(files: NetworkFiles) -> str | None:
    """Why a network's process failed, from its log or from status.json."""
    if files.phase == "finished":  # the log's error is of a later start that was refused
        return None
    if files.error or files.phase != "failed":
        return files.error
    return str(files.status.get("reason") or "no reason given")


def _names(networks: Collection[int]) -> str:
    plural = "s" if len(networks) > 1 else ""
    return f"network{plural} {', '.join(map(str, sorted(networks)))}"


# ------------------------------------------------------------------------------------------------
# Output
# ------------------------------------------------------------------------------------------------


def status_text(run: RunFiles, run_status: RunStatus, now: float) -> str:
    """State, table of the networks, final accuracies, latest events and unreadable files."""
    known = facts(run, run_status, now)
    left = known["seconds_left"]
    differ = any(row["options"] for row in known["networks"])
    metric = metric_header(known["metric"])
    lines = [
        f"{run.path}: {run_status.words}{'' if left is None else f', {duration(left)} left'}",
        f"{len(run.networks)} x {known['model'] or '?'} on {known['data'] or '?'}, method "
        f"{known['method'] or '?'}; latest checkpoint: {run.checkpoint or 'none'}",
        format_table(
            (
                *("network", "host", "phase", "epoch", "step", f"test {metric}"),
                *("lr", "images/s", "last round", "events"),
                *(("options",) if differ else ()),
                *(("job", "lag", "lease", "checkpoint") if run.of_jobs else ()),
            ),
            [
                (
                    *_row(row, known["epochs"] or "?", known["metric"]),
                    *((_options_text(row["options"]),) if differ else ()),
                    *(_job_row(row) if run.of_jobs else ()),
                )
                for row in known["networks"]
            ],
        ),
    ]
    final = [
        f"{of} {known['metric']} after last round {format_metric(value, known['metric'])}"
        for of in ("mean", "ensemble")
        if (value := _as_float(known["final"].get(f"{of}_{known['metric']}_after_last_round")))
        is not None
    ]
    if final and run_status.state == "finished":
        lines.append(", ".join(final))
    for event in run.events[-_EVENTS_SHOWN:]:
        epoch = _as_int(event.get("epoch"))
        when = f"epoch {epoch + 1}" if epoch is not None else "unknown epoch"
        lines.append(f"{when}: {event.get('text', event.get('kind'))}")
    lines += [f"! {problem}" for problem in run.problems]
    if run_status.state in ACTIVE:
        lines.append(f"to stop the run after a checkpoint: touch {run.path / 'STOP'}")
    return "\n".join(lines)


def overview(runs: Sequence[tuple[RunFiles, RunStatus]], now: float) -> str:
    """Table of several runs: state, finished epochs, mean of the test metric, time left."""
    rows = []
    of_runs = [facts(files, run_status, now) for files, run_status in runs]
    only_accuracy = all(known["metric"] == "accuracy" for known in of_runs)
    for (files, run_status), known in zip(runs, of_runs, strict=True):
        networks = known["networks"]
        values = [row["test_metric"] for row in networks if row["test_metric"] is not None]
        mean = format_metric(statistics.fmean(values) if values else None, known["metric"])
        epochs = min((row["epochs_finished"] for row in networks), default=0)
        left = known["seconds_left"]
        rows.append(
            (
                files.path.name,
                run_status.state,
                str(len(networks)),
                str(known["model"] or "?"),
                str(known["method"] or "?"),
                f"{epochs}/{known['epochs'] or '?'}",
                mean if only_accuracy or not values else f"{mean} {metric_header(known['metric'])}",
                "-" if left is None else duration(left),
            )
        )
    header = ("run", "state", "networks", "model", "method", "epochs")
    mean_header = "mean test %" if only_accuracy else "mean test"
    return format_table((*header, mean_header, "time left"), rows)


def facts(run: RunFiles, run_status: RunStatus, now: float) -> dict[str, Any]:
    """Content of the JSON output. Unknown values are None."""
    metric = _metric(run)
    networks = [_network_facts(run, run_status, files, metric, now) for files in run.networks]
    left = [row["seconds_left"] for row in networks if row["seconds_left"] is not None]
    return {
        "run": str(run.path),
        "state": run_status.state,
        "words": run_status.words,
        "epochs": run.epochs or None,
        "model": _name_in(run.config, "model"),
        "data": _name_in(run.config, "data"),
        "method": run.config.get("method"),
        "metric": metric,
        "seconds_left": max(left) if left and run_status.state in ACTIVE else None,
        "latest_checkpoint": run.checkpoint,
        "networks": networks,
        "final": {k: v for k, v in run.summary.items() if k.startswith(("mean_", "ensemble_"))},
        "events": run.events,
        "problems": run.problems,
    }


def _network_facts(
    run: RunFiles, run_status: RunStatus, files: NetworkFiles, metric: str, now: float
) -> dict[str, Any]:
    status, last, graft = files.status, files.last_epoch, files.last_round
    alive = files.network in run_status.alive
    values = map(_as_float, section(graft, "coefficient").values())
    coefficients = [value for value in values if value is not None]
    rounds = _as_int(status.get("rounds"))
    own_events = [event for event in run.events if event.get("network") == files.network]
    finished = last["epoch"] + 1 if last else 0
    return {
        "network": files.network,
        "host": status.get("host"),
        "phase": files.phase,
        "alive": alive,
        "silent_seconds": None if files.phase in ENDED else _silent_seconds(files, now),
        "epochs_finished": finished,
        "epoch": status.get("epoch", max(0, finished - 1)),
        "step": status.get("step"),
        "steps_per_epoch": status.get("steps_per_epoch") or None,
        "test_accuracy": _as_float(last.get("test_accuracy")),
        "test_metric": _as_float(last.get(f"test_{metric}")),
        "lr": _as_float(last.get("lr")),
        "images_per_second": _as_float(status.get("images_per_second") if alive else None)
        or _as_float(last.get("images_per_second")),
        "round": rounds - 1 if rounds else _as_int(graft.get("round")),
        "donor": _as_int(graft.get("donor")),
        "donor_epoch": _as_float(graft.get("donor_epoch")),
        "lag": _as_float(graft.get("lag")),
        "presence": _presence(files, run_status.alive, run.epochs),
        "job": files.lease.job if files.lease else None,
        "lease": _lease_text(files.lease),
        "checkpoint": files.checkpoint if run.of_jobs else run.checkpoint,
        "smallest_coefficient": min(coefficients, default=None),
        "largest_coefficient": max(coefficients, default=None),
        "seconds_left": _as_float(status.get("seconds_left")) if alive else None,
        "options": _options_in(run.config, files.network),
        "events": dict(Counter(str(event.get("kind")) for event in own_events)),
    }


def _metric(run: RunFiles) -> str:
    """Name of the first metric of the run: accuracy, unless the user's task has another one."""
    keys = [key for files in run.networks for key in files.last_epoch if key.startswith("test_")]
    first = next((key.removeprefix("test_") for key in keys if key != "test_loss"), None)
    known = run.summary.get("metric", first)
    if isinstance(known, str):
        return known
    return "loss" if keys else "accuracy"


def _row(row: dict[str, Any], epochs: object, metric: str) -> tuple[str, ...]:
    ended = row["phase"] in ENDED or row["phase"] is None
    current = row["epoch"] + 1 if isinstance(row["epoch"], int) else "?"
    return (
        str(row["network"]),
        str(row["host"] or "-"),
        _phase_text(row),
        f"{row['epochs_finished'] if ended else current}/{epochs}",
        f"{row['step']}/{row['steps_per_epoch']}" if row["steps_per_epoch"] else "-",
        format_metric(row["test_metric"], metric),
        "-" if row["lr"] is None else f"{row['lr']:.4g}",
        format_number(row["images_per_second"], 0),
        _round_text(row),
        ", ".join(f"{n} x {kind}" if n > 1 else kind for kind, n in row["events"].items()) or "-",
    )


def _options_text(options: Mapping[str, Any]) -> str:
    """Options of one network without their sections."""
    texts = (
        f"{name.rpartition('.')[2]} {f'{value:.3g}' if isinstance(value, float) else value}"
        for name, value in options.items()
    )
    return ", ".join(texts) or "-"


def _options_in(config: Fields, network: int) -> dict[str, Any]:
    """Options of one network that members or diversity set."""
    members = section(config, "run").get("members")
    if not isinstance(members, list) or network >= len(members):
        return {}
    options = members[network]
    return {str(k): v for k, v in options.items()} if isinstance(options, dict) else {}


def _job_row(row: dict[str, Any]) -> tuple[str, ...]:
    lag = row["lag"]
    return (
        str(row["job"] or "-"),
        "-" if lag is None else f"{lag:g}",
        str(row["lease"] or "-"),
        str(row["checkpoint"] or "-"),
    )


def _lease_text(lease: LeaseInfo | None) -> str | None:
    if lease is None:
        return None
    age = duration(lease.heartbeat_age)
    return f"expired, {age} old" if lease.expired else f"held, {age} old"


def _phase_text(row: dict[str, Any]) -> str:
    silent = row["silent_seconds"]
    if row["presence"] == "not started":
        return "not started"
    if row["phase"] in ENDED or row["phase"] is None:
        return row["phase"] or "?"
    if not row["alive"]:
        return "dead"
    if silent is not None and silent > _SILENCE_SHOWN_SECONDS:
        return f"silent {duration(silent)}"
    return str(row["phase"])


def _round_text(row: dict[str, Any]) -> str:
    if row["round"] is None:
        return "-"
    if row["smallest_coefficient"] is None:
        return str(row["round"])
    low, high = row["smallest_coefficient"], row["largest_coefficient"]
    if row["donor"] is None and low == 1:
        return f"{row['round']}: no donor"
    donor = "?" if row["donor"] is None else row["donor"]
    return f"{row['round']}: kept {low:.2f}-{high:.2f}, rest of {donor}"


def _as_float(value: object) -> float | None:
    """A finite number, or None for anything else that the file may hold."""
    with suppress(OverflowError):
        if isinstance(value, (int, float)) and math.isfinite(value):
            return float(value)
    return None


def _as_int(value: object) -> int | None:
    return value if isinstance(value, int) else None


def _name_in(config: Fields, part: str) -> Any:
    custom = section(config, "run").get("custom")
    if isinstance(custom, list) and part in custom:
        return f"custom {part}"  # given in Python, so the configured name was not used
    return section(config, part).get("name")
