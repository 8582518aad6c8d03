from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from dist_graft.errors import RunDirectoryError
from dist_graft.monitoring.jsonl import JsonLinesFile


def everything(_: dict[str, Any]) -> bool:
    return True


def numbers(path: Path) -> list[int]:
    assert path.read_text().endswith("\n")
    return [json.loads(line)["number"] for line in path.read_text().splitlines()]


def test_unwritten_lines_are_written_first_and_in_order(tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    first = JsonLinesFile(path, keep=everything)
    assert first.kept == []
    for number in range(6):
        first.write({"number": number})
    second = JsonLinesFile(path, keep=lambda line: line["number"] % 2 == 0)
    assert second.kept == [{"number": number} for number in (0, 2, 4)]
    second.write({"number": 9})
    assert numbers(path) == [0, 2, 4, 9]
    assert [entry.name for entry in tmp_path.iterdir()] == ["lines.jsonl"]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_nonfinite_numbers_become_null(tmp_path: Path, value: float) -> None:
    path = tmp_path / "lines.jsonl"
    JsonLinesFile(path, keep=everything).write({"a": value, "b": {"c": {"d": value}, "e": 1.5}})
    line = json.loads(path.read_text(), parse_constant=pytest.fail)
    assert line == {"a": None, "b": {"c": {"d": None}, "e": 1.5}}


@pytest.mark.parametrize(
    "line",
    [b"5", b"[]", b"null", b"{}", b'{"number": null}', b'{"number": 1', b"\0\0", b"\xff\xfe{"],
)
def test_lines_that_cannot_be_read_are_dropped(tmp_path: Path, line: bytes) -> None:
    """Truncated lines, lines of other content, and zeros after a power failure."""
    path = tmp_path / "lines.jsonl"
    JsonLinesFile(path, keep=everything).write({"number": 3})
    good = path.read_bytes()
    path.write_bytes(line + b"\n" + good + line)
    assert JsonLinesFile(path, keep=lambda found: found["number"] < 4).kept == [{"number": 3}]
    assert path.read_bytes() == good


def test_unwritten_lines_are_written_with_the_next_one(tmp_path: Path) -> None:
    """A folder of the same name makes writing fail. No line is lost once it is removed."""
    path = tmp_path / "lines.jsonl"
    file = JsonLinesFile(path, keep=everything)
    path.unlink()
    path.mkdir()
    for number in (0, 1):
        with pytest.raises(RunDirectoryError, match=r"lines\.jsonl cannot be written: Is a dir"):
            file.write({"number": number})
    path.rmdir()
    file.write({"number": 2})
    file.write({"number": 3})
    assert numbers(path) == [0, 1, 2, 3]


FULL = """
import resource, sys
from pathlib import Path
from dist_graft.errors import RunDirectoryError
from dist_graft.monitoring.jsonl import JsonLinesFile
path, room = Path(sys.argv[1]), int(sys.argv[2])
file = JsonLinesFile(path, keep=lambda line: True)
file.write({"number": 0})
whole = path.read_bytes()
resource.setrlimit(resource.RLIMIT_FSIZE, (len(whole) + room, resource.RLIM_INFINITY))
for number in (1, 2):
    try:
        file.write({"number": number})
    except RunDirectoryError as error:
        print(error)
    assert path.read_bytes() == whole, path.read_bytes()
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
file.write({"number": 3})
"""


@pytest.mark.parametrize("room", [0, 1, 7])
def test_a_full_disk_leaves_no_partial_line(tmp_path: Path, room: int) -> None:
    """The bytes that still fit are removed again."""
    path = tmp_path / "lines.jsonl"
    done = subprocess.run(
        [sys.executable, "-c", FULL, str(path), str(room)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(f"{path} cannot be written: File too large; free space") == 2
    assert numbers(path) == [0, 1, 2, 3]


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("here")
    with pytest.raises(RunDirectoryError, match=r"lines\.jsonl cannot be written.*run_dir"):
        JsonLinesFile(tmp_path / "file" / "lines.jsonl", keep=everything)
