"""A run at a glance: as a table, and as numbers for scripts."""

from __future__ import annotations

import json
import math
from collections import Counter
from typing import Any

from dist_graft.analysis.status.judging import (
    UNDER_WAY,
    Verdict,
    phase_of,
    silent_seconds,
)
from dist_graft.analysis.status.reading import Fields, NetworkFiles, RunFiles
from dist_graft.monitoring.console import duration, table
from dist_graft.monitoring.status_file import ENDED

_EVENTS_SHOWN = 5
_SILENCE_SHOWN = 30.0
_HEADER = (
    *("network", "host", "now", "epoch", "step", "test %", "lr", "images/s"),
    *("last round", "events"),
)


def facts(run: RunFiles, verdict: Verdict, now: float) -> dict[str, Any]:
    """All that the table shows, as JSON can hold it; what is unknown is null."""
    networks = [_facts_of(run, verdict, files, now) for files in run.networks]
    left = [row["seconds_left"] for row in networks if row["seconds_left"] is not None]
    summary = run.summary or {}
    return {
        "run": str(run.path),
        "state": verdict.state,
        "words": verdict.words,
        "epochs": run.epochs or None,
        "model": _at(run.config, "model", "name"),
        "data": _at(run.config, "data", "name"),
        "method": run.config.get("method"),
        "seconds_left": max(left) if left and verdict.state in UNDER_WAY else None,
        "newest_set": run.newest_set,
        "networks": networks,
        "final": {
            key: value for key, value in summary.items() if key.startswith(("mean_", "ensemble_"))
        },
        "events": run.events,
        "problems": run.problems,
    }


def _facts_of(run: RunFiles, verdict: Verdict, files: NetworkFiles, now: float) -> dict[str, Any]:
    standing, last, graft = files.standing or {}, files.last or {}, files.last_round or {}
    alive = files.network in verdict.alive
    kept = _numbers(graft.get("coefficient"))
    rounds = _whole(standing.get("rounds"))
    told = _whole(graft.get("round"))
    kinds = Counter(
        str(event.get("kind")) for event in run.events if event.get("network") == files.network
    )
    finished = last["epoch"] + 1 if last else 0
    return {
        "network": files.network,
        "host": standing.get("host"),
        "phase": phase_of(files),
        "alive": alive,
        "silent_seconds": None if phase_of(files) in ENDED else silent_seconds(files, now),
        "epochs_finished": finished,
        "epoch": standing.get("epoch", max(0, finished - 1)),
        "step": standing.get("step"),
        "steps_per_epoch": standing.get("steps_per_epoch") or None,
        "test_accuracy": _number(last.get("test_accuracy")),
        "lr": _number(last.get("lr")),
        "images_per_second": _number(standing.get("images_per_second") if alive else None)
        or _number(last.get("images_per_second")),
        "round": rounds - 1 if rounds else told,
        "donor": _whole(graft.get("donor")),
        "smallest_coefficient": min(kept, default=None),
        "largest_coefficient": max(kept, default=None),
        "seconds_left": _number(standing.get("seconds_left")) if alive else None,
        "events": dict(kinds),
    }


def as_json(run: RunFiles, verdict: Verdict, now: float, *, indent: int | None) -> str:
    """The facts as one JSON object."""
    return json.dumps(facts(run, verdict, now), indent=indent)


def as_text(run: RunFiles, verdict: Verdict, now: float) -> str:
    """The facts as a table, with what there is to know beside it."""
    told = facts(run, verdict, now)
    epochs = told["epochs"] or "?"
    lines = [f"{run.path}: {verdict.words}{_left(told)}"]
    lines.append(
        f"{len(run.networks)} x {told['model'] or '?'} on {told['data'] or '?'}, method "
        f"{told['method'] or '?'}; newest checkpoint set: {run.newest_set or 'none'}"
    )
    lines.append(table(_HEADER, [_row(row, epochs) for row in told["networks"]]))
    if told["final"] and verdict.state == "finished":
        lines.append(
            ", ".join(f"{key.replace('_', ' ')} {_fixed(value, 2)}" for key, value in _final(told))
        )
    for event in run.events[-_EVENTS_SHOWN:]:
        epoch = _whole(event.get("epoch"))
        when = f"epoch {epoch + 1}" if epoch is not None else "at some time"
        lines.append(f"{when}: {event.get('text', event.get('kind'))}")
    lines += [f"! {problem}" for problem in run.problems]
    if verdict.state in UNDER_WAY:
        lines.append(f"to stop it in good order: touch {run.path / 'STOP'}")
    return "\n".join(lines)


def _final(told: dict[str, Any]) -> list[tuple[str, Any]]:
    return [
        (key, value) for key, value in told["final"].items() if key.endswith("after_last_round")
    ]


def _left(told: dict[str, Any]) -> str:
    left = told["seconds_left"]
    return "" if left is None else f", {duration(left)} left"


def _row(row: dict[str, Any], epochs: object) -> tuple[str, ...]:
    ended = row["phase"] in ENDED
    steps = f"{row['step']}/{row['steps_per_epoch']}" if row["steps_per_epoch"] else "-"
    under_way = row["epoch"] + 1 if isinstance(row["epoch"], int) else "?"
    return (
        str(row["network"]),
        str(row["host"] or "-"),
        _now(row),
        f"{row['epochs_finished'] if ended or row['phase'] is None else under_way}/{epochs}",
        steps,
        _fixed(row["test_accuracy"], 2),
        "-" if row["lr"] is None else f"{row['lr']:.4g}",
        _fixed(row["images_per_second"], 0),
        _round(row),
        ", ".join(f"{n} x {kind}" if n > 1 else kind for kind, n in row["events"].items()) or "-",
    )


def _now(row: dict[str, Any]) -> str:
    silent = row["silent_seconds"]
    if row["phase"] is None:
        return "?"
    if row["phase"] in ENDED:
        return str(row["phase"])
    if not row["alive"]:
        return "dead"
    if silent is not None and silent > _SILENCE_SHOWN:
        return f"silent {duration(silent)}"
    return str(row["phase"])


def _round(row: dict[str, Any]) -> str:
    if row["round"] is None:
        return "-"
    if row["smallest_coefficient"] is None:
        return str(row["round"])
    low, high = row["smallest_coefficient"], row["largest_coefficient"]
    donor = "?" if row["donor"] is None else row["donor"]
    return f"{row['round']}: kept {low:.2f}-{high:.2f}, rest of {donor}"


def _fixed(value: object, digits: int) -> str:
    number = _number(value)
    return "-" if number is None else f"{number:.{digits}f}"


def _number(value: object) -> float | None:
    known = isinstance(value, (int, float)) and math.isfinite(value)
    return float(value) if known and isinstance(value, (int, float)) else None


def _whole(value: object) -> int | None:
    return value if isinstance(value, int) else None


def _numbers(values: object) -> list[float]:
    found = [_number(value) for value in values.values()] if isinstance(values, dict) else []
    return [value for value in found if value is not None]


def _at(config: Fields, section: str, name: str) -> Any:
    inner = config.get(section)
    return inner.get(name) if isinstance(inner, dict) else None
