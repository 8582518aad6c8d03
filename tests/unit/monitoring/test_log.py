from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest

from dist_graft.errors import RunDirectoryError, StoppedEarlyError
from dist_graft.monitoring.log import append_error, close_log, open_log


@pytest.fixture(autouse=True)
def _closed() -> Iterator[None]:
    yield
    close_log()


def test_the_first_network_also_speaks_on_the_console(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    open_log(tmp_path / "network00", console=True).info("two words\nand a line")
    assert capsys.readouterr().out == "two words\nand a line\n"
    assert (tmp_path / "network00/log.txt").read_text().endswith("INFO two words\nand a line\n")


def test_the_others_write_only(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    open_log(tmp_path / "network01", console=False).info("words")
    captured = capsys.readouterr()
    assert captured.out == captured.err == ""
    assert "words" in (tmp_path / "network01/log.txt").read_text()


def test_a_log_is_continued(tmp_path: Path) -> None:
    for word in ("first", "second"):
        open_log(tmp_path, console=False).info(word)
        close_log()
    first, second = (tmp_path / "log.txt").read_text().splitlines()
    assert first.endswith("INFO first")
    assert second.endswith("INFO second")


def test_a_second_run_in_one_process_does_not_write_into_the_first_log(tmp_path: Path) -> None:
    open_log(tmp_path / "a", console=False)
    open_log(tmp_path / "b", console=False).info("words")
    assert (tmp_path / "a/log.txt").read_text() == ""
    assert (tmp_path / "b/log.txt").read_text().count("words") == 1


def test_it_leaves_other_loggers_alone(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    open_log(tmp_path, console=False).info("words")
    assert caplog.text == ""
    assert logging.getLogger().level == logging.WARNING


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("here")
    with pytest.raises(RunDirectoryError, match=r"network00 cannot be written.*another run_dir"):
        open_log(tmp_path / "file" / "network00", console=False)


def test_a_deleted_log_is_created_again(tmp_path: Path) -> None:
    log = open_log(tmp_path / "run/network00", console=False)
    log.info("first")
    (tmp_path / "run").rename(tmp_path / "vanished")
    log.info("second")
    log.info("third")
    words = [
        [line.rpartition(" ")[2] for line in (tmp_path / name).read_text().splitlines()]
        for name in ("vanished/network00/log.txt", "run/network00/log.txt")
    ]
    assert words == [["first"], ["second", "third"]]


def test_a_log_that_cannot_be_recreated_is_reported_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log = open_log(tmp_path / "run/network00", console=False)
    (tmp_path / "run").rename(tmp_path / "vanished")
    (tmp_path / "run").write_text("in the way")
    for word in ("first", "second"):
        log.info(word)
    assert capsys.readouterr().err.count("log.txt cannot be written: ") == 1


def test_errors_are_added(tmp_path: Path) -> None:
    stopped = StoppedEarlyError("stopped early")
    append_error(tmp_path / "new", stopped, process="network 1")
    append_error(tmp_path / "new", ValueError("of\nours"))
    first, second = (tmp_path / "new/log.txt").read_text().splitlines()
    assert first == "INFO network 1: stopped early"
    assert second == "ERROR unexpected ValueError: of ours"


def test_an_error_that_cannot_be_written_is_dropped(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("here")
    append_error(tmp_path / "file" / "network00", ValueError())
    assert (tmp_path / "file").read_text() == "here"
