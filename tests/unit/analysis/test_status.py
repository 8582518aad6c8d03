from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from dist_graft.analysis.status.judging import State, judge
from dist_graft.analysis.status.reading import read_run
from dist_graft.analysis.status.showing import as_json, as_text
from dist_graft.errors import RunDirectoryError
from dist_graft.training.checkpoint.files import complete_set

NOW = 1_800_000_000.0
GRAFT = {"round": 2, "donor": 1, "coefficient": {"conv1": 0.41, "conv2": 0.6}}
GONE = 2**22 + 1
"""No process has this id: it is above the largest that Linux gives."""


def make_run(path: Path, *, epochs: int = 4, finished: int = 3, networks: int = 2) -> Path:
    """What a run of so many networks has written after so many epochs."""
    config = {"run_dir": str(path), "epochs": epochs, "method": "graft"}
    config |= {"model": {"name": "resnet20"}, "data": {"name": "fashion-mini"}}
    (path / "population").mkdir(parents=True)
    (path / "config.yaml").write_text(yaml.safe_dump(config | {"run": {"networks": networks}}))
    event = {"kind": "slow", "epoch": 1, "round": 1, "network": 0, "text": "network 0 is slow"}
    (path / "population/events.jsonl").write_text(json.dumps(event) + "\n")
    for network in range(networks):
        folder = path / f"network{network:02d}"
        folder.mkdir()
        (folder / "log.txt").write_text("2027-01-15 08:00:00,000 INFO epoch 1\n")
        lines = [
            {"epoch": e, "lr": 0.1, "test_accuracy": 50.0 + e, "images_per_second": 321.4}
            | {"graft": GRAFT | {"donor": 1 - network}}
            for e in range(finished)
        ]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if finished:
        folder = path / "checkpoints" / f"epoch_{finished:04d}"
        complete_set(folder, epoch=finished, round_=finished, sha256=["0"] * networks)
    return path


def say(path: Path, network: int, **words: Any) -> None:
    """Leave a status.json; by default of a process on this host that just took a step."""
    told = {"network": network, "host": socket.gethostname(), "pid": os.getpid()}
    told |= {"phase": "training", "epoch": 3, "epochs": 4, "step": 17, "steps_per_epoch": 40}
    told |= {"rounds": 3, "images_per_second": 400.0, "seconds_left": 75.0, "time": NOW - 3}
    (path / f"network{network:02d}/status.json").write_text(json.dumps(told | words))


def summarise(path: Path) -> None:
    finals = {"mean_accuracy_after_last_round": 61.0, "ensemble_accuracy_after_last_round": 62.5}
    (path / "summary.json").write_text(json.dumps(finals | {"networks": []}))


def look(path: Path) -> tuple[State, str]:
    """The state and the whole text."""
    run = read_run(path)
    verdict = judge(run, NOW)
    json.loads(as_json(run, verdict, NOW, indent=None))
    return verdict.state, as_text(run, verdict, NOW)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return make_run(tmp_path / "run")


class TestWhatBecameOfARun:
    def test_it_goes_on(self, run: Path) -> None:
        say(run, 0)
        say(run, 1, step=16, seconds_left=80.0)
        state, text = look(run)
        first, what, header, *rows = text.splitlines()
        assert state == "running"
        assert first == f"{run}: running, 1 min 20 s left"
        assert what == (
            "2 x resnet20 on fashion-mini, method graft; newest checkpoint set: epoch_0003"
        )
        assert header.split()[:5] == ["network", "host", "now", "epoch", "step"]
        assert rows[0].split()[2:8] == ["training", "4/4", "17/40", "52.00", "0.1", "400"]
        assert rows[0].split()[8:] == ["2:", "kept", "0.41-0.60,", "rest", "of", "1", "slow"]
        assert "epoch 2: network 0 is slow" in rows
        assert rows[-1] == f"to stop it in good order: touch {run}/STOP"

    def test_it_starts(self, tmp_path: Path) -> None:
        run = make_run(tmp_path / "run", finished=0)
        (run / "config.yaml").unlink()
        for network in range(2):
            say(run, network, phase="starting", epochs=0, steps_per_epoch=0, step=0)
        assert look(run)[0] == "starting"

    def test_it_is_finished(self, run: Path) -> None:
        make_run_end(run)
        state, text = look(run)
        assert state == "finished"
        assert "mean accuracy after last round 61.00" in text
        assert "ensemble accuracy after last round 62.50" in text

    def test_one_of_an_older_version_is_finished_without_its_last_words(
        self, tmp_path: Path
    ) -> None:
        run = make_run(tmp_path / "run", finished=4)
        summarise(run)
        assert look(run)[0] == "finished"

    def test_a_finished_one_that_got_more_epochs_is_not_finished(self, run: Path) -> None:
        summarise(run)
        assert look(run)[0] == "died"

    def test_it_was_stopped(self, run: Path) -> None:
        for network in range(2):
            say(run, network, phase="stopped", reason="stopped early by SIGTERM")
        (run / "STOPPED_EARLY").write_text("stopped early by SIGTERM: goes on from there\n")
        state, text = look(run)
        assert state == "stopped"
        assert text.startswith(f"{run}: stopped early by SIGTERM: goes on from there\n")

    def test_it_failed_and_the_log_says_why(self, run: Path) -> None:
        """The network that failed first, not the one that its launcher then ended."""
        say(run, 0, phase="failed", reason="stopped by SIGTERM")
        say(run, 1, phase="failed", reason="its own words")
        with (run / "network01/log.txt").open("a") as log:
            log.write("ERROR network 1 (rank 1 on b): out of GPU memory\n")
        state, text = look(run)
        assert state == "failed"
        assert "failed: network 1: network 1 (rank 1 on b): out of GPU memory; the same " in text
        assert "goes on from epoch_0003" in text.splitlines()[0]

    def test_a_start_that_was_refused_while_it_goes_on_changes_nothing(self, run: Path) -> None:
        say(run, 0)
        say(run, 1)
        with (run / "network00/log.txt").open("a") as log:
            log.write("ERROR run holds a run with another configuration\n")
        assert look(run)[0] == "running"

    @pytest.mark.parametrize(
        ("words", "state"),
        [
            ({"time": NOW - 60}, "running"),
            ({"time": NOW - 60, "pid": GONE}, "died"),
            ({"time": NOW - 5, "pid": GONE}, "running"),  # perhaps of another pid namespace
            ({"time": NOW - 60, "pid": GONE, "host": "elsewhere"}, "running"),
            ({"time": NOW - 200, "host": "elsewhere"}, "died"),
            ({"time": NOW - 200}, "died"),
            ({"time": NOW + 30, "host": "a clock that is ahead"}, "running"),
        ],
    )
    def test_signs_of_life(self, run: Path, words: dict[str, Any], state: State) -> None:
        for network in range(2):
            say(run, network, **words)
        found, text = look(run)
        assert found == state
        if state == "died":
            assert "networks 0, 1 gave the last sign of life" in text
            assert "killed, out of memory" in text

    def test_one_that_died_beside_one_that_lives(self, run: Path) -> None:
        say(run, 0)
        say(run, 1, time=NOW - 200)
        state, text = look(run)
        assert state == "running"
        assert text.splitlines()[0].startswith(f"{run}: running, but without network 1")
        assert "dead" in text


def make_run_end(run: Path) -> None:
    for network in range(2):
        say(run, network, phase="finished", step=40, seconds_left=None, rounds=4)
        with (run / f"network{network:02d}/metrics.jsonl").open("a") as file:
            file.write(json.dumps({"epoch": 3, "test_accuracy": 60.0, "graft": None}) + "\n")
    summarise(run)


class TestBrokenFiles:
    def test_no_run_at_all(self, tmp_path: Path) -> None:
        for path in (tmp_path, tmp_path / "nothing"):
            with pytest.raises(RunDirectoryError, match="is no run directory"):
                read_run(path)

    @pytest.mark.parametrize("short", [1, 30])
    def test_a_line_that_is_being_written_is_not_there_yet(self, run: Path, short: int) -> None:
        path = run / "network01/metrics.jsonl"
        path.write_bytes(path.read_bytes()[:-short])
        found = read_run(run)
        assert not found.problems
        assert [network.last["epoch"] for network in found.networks if network.last] == [2, 1]

    def test_a_torn_line_is_named_and_the_one_before_it_counts(self, run: Path) -> None:
        path = run / "network01/metrics.jsonl"
        path.write_bytes(path.read_bytes()[:-30] + b"\n")
        say(run, 0)
        say(run, 1)
        text = look(run)[1]
        assert f"! {path}: 1 of the last 3 lines cannot be read" in text
        assert "51.00" in text

    def test_a_long_file_is_read_from_its_end(self, run: Path) -> None:
        path = run / "network00/metrics.jsonl"
        lines = [{"epoch": e, "test_accuracy": 1.0, "more": "x" * 900} for e in range(600)]
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
        found = read_run(run)
        assert not found.problems
        assert found.networks[0].last is not None
        assert found.networks[0].last["epoch"] == 599

    @pytest.mark.parametrize("folder", ["network01", "population", "checkpoints"])
    def test_a_folder_that_is_missing(self, run: Path, folder: str) -> None:
        subprocess.run(["rm", "-r", str(run / folder)], check=True)
        assert look(run)[0] == "died"

    @given(data=st.data())
    def test_nothing_that_is_in_a_file_is_an_error_of_ours(
        self, data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
    ) -> None:
        """Any file cut off, filled with bytes, or with values of any type."""
        run = make_run(tmp_path_factory.mktemp("run") / "run")
        make_run_end(run)
        files = sorted(path for path in run.rglob("*") if path.is_file())
        path = data.draw(st.sampled_from(files))
        content = path.read_bytes()
        how = data.draw(st.sampled_from(["cut", "bytes", "values"]))
        if how == "cut":
            path.write_bytes(content[: data.draw(st.integers(0, len(content)))])
        elif how == "bytes":
            path.write_bytes(data.draw(st.binary(max_size=60)))
        else:
            odd = st.sampled_from(["null", "[]", '"x"', "{}", "-1", "1e999", "true"])
            values = re.compile(rb'(?<=: )("[^"]*"|[\d.]+|\{\}|null)')
            path.write_bytes(values.sub(lambda _: data.draw(odd).encode(), content))
        try:
            state, text = look(run)
        except RunDirectoryError:
            raise AssertionError("a run directory was not recognised") from None
        assert state in ("finished", "died", "failed")
        assert text


def status(path: Path, *options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "dist_graft", "status", str(path), *options],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


class TestTheCommand:
    def test_as_numbers(self, run: Path) -> None:
        make_run_end(run)
        told = json.loads(status(run, "--json").stdout)
        assert told["state"] == "finished"
        assert told["final"]["mean_accuracy_after_last_round"] == 61.0
        assert [row["events"] for row in told["networks"]] == [{"slow": 1}, {}]
        assert told["networks"][1]["round"] == 3
        assert told["seconds_left"] is None

    def test_watching_ends_with_the_run(self, run: Path) -> None:
        make_run_end(run)
        done = status(run, "--watch")
        assert done.returncode == 0
        assert done.stdout.startswith(f"{run}: finished")
        assert "\x1b" not in done.stdout

    def test_what_is_no_run_ends_with_one_line(self, tmp_path: Path) -> None:
        done = status(tmp_path)
        assert done.returncode == 1
        assert done.stderr.startswith("dist-graft: error: ")
        assert len(done.stderr.splitlines()) == 1

    def test_it_loads_no_torch(self, run: Path) -> None:
        program = (
            "import sys\nfrom dist_graft.cli import run\n"
            f"assert run(['status', {str(run)!r}]) == 0\n"
            "assert not {'torch', 'torchvision', 'numpy', 'tensorboard'} & set(sys.modules)\n"
        )
        subprocess.run([sys.executable, "-c", program], timeout=60, check=True)
