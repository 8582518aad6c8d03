"""results.csv and curves.csv: a line for each run, appended as it ends, never rewritten."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from dist_graft.errors import RunDirectoryError
from dist_graft.studies.outcomes import THRESHOLDS, CurvePoint

Phase = Literal["search", "best_lr", "comparison"]
OUTCOMES = (
    "largest_lr_member",
    "mean_of_members",
    "ensemble",
    "uniform_soup",
    "uniform_soup_as_is",
    "greedy_soup",
)
FILTERS = ("filters", *(f"invalid_{threshold:g}" for threshold in THRESHOLDS))


@dataclass(frozen=True, kw_only=True)
class Row:
    """One run. Accuracies are percentages of the split, after the last round."""

    key: str
    """Hash of all that its numbers follow from."""
    phase: Phase
    arm: str
    role: Literal["method", "control"]
    networks: int
    seed: int
    status: Literal["ok", "failed"]
    split: Literal["test", "validation"]
    outcomes: Mapping[str, float] = field(default_factory=dict)
    """By the names in OUTCOMES."""
    members: Sequence[float] = ()
    learning_rates: Sequence[float] = ()
    filters: Mapping[str, int] = field(default_factory=dict)
    """By the names in FILTERS, of the member with the largest learning rate."""
    wall_seconds: float = 0.0
    """Of training, all attempts."""
    core_seconds: float = 0.0
    """Processor time of training, all its processes and attempts."""
    epochs: int = 0
    finished: str = ""
    """UTC."""
    versions: str = ""
    commit: str = ""
    error: str = ""
    """Why the run failed, or what could not be told of it."""


_COLUMNS = tuple(
    column
    for entry in fields(Row)
    for column in {"outcomes": OUTCOMES, "filters": FILTERS}.get(entry.name, (entry.name,))
)
_CURVE_COLUMNS = ("key", "epoch", "largest_lr_member", "mean_of_members")


class Results:
    """The lines of a folder; of several with one key the last one counts.

    Args:
        folder: that holds results.csv and curves.csv, or will.

    Raises: RunDirectoryError when results.csv is not one of ours.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / "results.csv"
        self._curves_path = folder / "curves.csv"
        self.rows: dict[str, Row] = {}
        self.curves: dict[str, list[CurvePoint]] = {}
        try:
            for line in _read(self._path, _COLUMNS):
                row = _row(line)
                self.rows[row.key] = row
            for line in _read(self._curves_path, _CURVE_COLUMNS):
                point = CurvePoint(
                    int(line["epoch"]), *(float(line[c]) for c in _CURVE_COLUMNS[2:])
                )
                curve = self.curves.setdefault(line["key"], [])
                del curve[point.epoch :]  # a curve that is given again starts anew
                curve.append(point)
        except (ValueError, KeyError, TypeError) as error:
            raise RunDirectoryError(
                f"{self._path} is not one of this version ({error}): choose another folder"
            ) from error

    def add(self, row: Row, curve: Sequence[CurvePoint] = ()) -> None:
        """Append a run; the line is on the disk, whole, before this returns."""
        points = [
            (row.key, p.epoch, f"{p.largest_lr_member:.6g}", f"{p.mean_of_members:.6g}")
            for p in curve
        ]
        _append(self._curves_path, _CURVE_COLUMNS, points)
        _append(self._path, _COLUMNS, [_cells(row)])
        self.rows[row.key] = row
        if curve:
            self.curves[row.key] = list(curve)

    def has(self, key: str) -> bool:
        """Whether the run has come to its end; one that failed is tried again."""
        row = self.rows.get(key)
        return row is not None and row.status == "ok"


def _cells(row: Row) -> list[str]:
    cells: list[str] = []
    for entry in fields(Row):
        value = getattr(row, entry.name)
        if entry.name == "outcomes":
            cells += [f"{value[name]:.6g}" if name in value else "" for name in OUTCOMES]
        elif entry.name == "filters":
            cells += [str(value.get(name, "")) for name in FILTERS]
        elif entry.name in ("members", "learning_rates"):
            cells.append(" ".join(f"{number:.6g}" for number in value))
        elif isinstance(value, float):
            cells.append(f"{value:.2f}")
        else:
            cells.append(str(value))
    return cells


def _row(line: Mapping[str, str]) -> Row:
    values: dict[str, Any] = {}
    for entry in fields(Row):
        name = entry.name
        if name == "outcomes":
            values[name] = {key: float(line[key]) for key in OUTCOMES if line[key]}
        elif name == "filters":
            values[name] = {key: int(line[key]) for key in FILTERS if line[key]}
        elif name in ("members", "learning_rates"):
            values[name] = [float(number) for number in line[name].split()]
        elif name in ("networks", "seed", "epochs"):
            values[name] = int(line[name])
        elif name in ("wall_seconds", "core_seconds"):
            values[name] = float(line[name])
        else:
            values[name] = line[name]
    return Row(**values)


def _read(path: Path, columns: Sequence[str]) -> list[dict[str, str]]:
    if not path.exists():
        return []
    text = path.read_text()
    whole = text[: text.rfind("\n") + 1]  # a line without its end was cut off by a crash
    reader = csv.DictReader(io.StringIO(whole))
    if reader.fieldnames is not None and tuple(reader.fieldnames) != tuple(columns):
        raise ValueError("other columns")
    return list(reader)


def _append(path: Path, columns: Sequence[str], lines: Sequence[Sequence[object]]) -> None:
    """Add lines with one write, after a line that a crash cut off is removed."""
    if not lines:
        return
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    content = path.read_bytes() if path.exists() else b""
    if b"\n" not in content:
        writer.writerow(columns)
    writer.writerows(lines)
    try:
        with path.open("r+b" if path.exists() else "wb", buffering=0) as file:
            file.truncate(content.rfind(b"\n") + 1)
            file.seek(0, os.SEEK_END)
            file.write(buffer.getvalue().encode())
            os.fsync(file.fileno())
    except OSError as error:
        raise RunDirectoryError(f"{path} cannot be written: {error.strerror}") from error
