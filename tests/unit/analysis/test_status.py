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

from dist_graft.analysis.run_files import read_run, run_paths
from dist_graft.analysis.status import State, facts, judge, status_text
from dist_graft.errors import DataError, PeerError, RunDirectoryError
from dist_graft.monitoring.log import append_error
from dist_graft.population.collectives import CommunicationError
from dist_graft.population.runtime.peers import reporting_lost_peers
from dist_graft.training.checkpoint.files import mark_complete

NOW = 1_800_000_000.0
GRAFT = {"round": 2, "donor": 1, "coefficient": {"conv1": 0.41, "conv2": 0.6}}
UNUSED_PID = 2**22 + 1
"""Larger than any process id of Linux."""


def make_run(path: Path, *, epochs: int = 4, finished: int = 3, networks: int = 2) -> Path:
    """Write the files of a run after some epochs."""
    config = {"run_dir": "run", "epochs": epochs, "method": "graft"}
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
        mark_complete(folder, epoch=finished, round_=finished, sha256=["0"] * networks)
    return path


def write_status(path: Path, network: int, **fields: Any) -> None:
    """Write status.json, by default of a live process on this host."""
    status = {"network": network, "host": socket.gethostname(), "pid": os.getpid()}
    status |= {"phase": "training", "epoch": 3, "epochs": 4, "step": 17, "steps_per_epoch": 40}
    status |= {"rounds": 3, "images_per_second": 400.0, "seconds_left": 75.0, "time": NOW - 3}
    (path / f"network{network:02d}/status.json").write_text(json.dumps(status | fields))


def write_summary(path: Path) -> None:
    finals = {"mean_accuracy_after_last_round": 61.0, "ensemble_accuracy_after_last_round": 62.5}
    (path / "summary.json").write_text(json.dumps(finals | {"networks": []}))


def status_of(path: Path) -> tuple[State, str]:
    """State and output of a run."""
    run = read_run(path)
    run_status = judge(run, NOW)
    json.dumps(facts(run, run_status, NOW))
    return run_status.state, status_text(run, run_status, NOW)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return make_run(tmp_path / "run")


class TestState:
    def test_running(self, run: Path) -> None:
        write_status(run, 0)
        write_status(run, 1, step=16, seconds_left=80.0)
        state, text = status_of(run)
        first, what, header, *rows = text.splitlines()
        assert state == "running"
        assert first == f"{run}: running, 1 min 20 s left"
        assert what == ("2 x resnet20 on fashion-mini, method graft; latest checkpoint: epoch_0003")
        assert header.split()[:5] == ["network", "host", "phase", "epoch", "step"]
        assert rows[0].split()[2:8] == ["training", "4/4", "17/40", "52.00", "0.1", "400"]
        assert rows[0].split()[8:] == ["2:", "kept", "0.41-0.60,", "rest", "of", "1", "slow"]
        assert "epoch 2: network 0 is slow" in rows
        assert rows[-1] == f"to stop the run after a checkpoint: touch {run}/STOP"

    def test_starting(self, tmp_path: Path) -> None:
        run = make_run(tmp_path / "run", finished=0)
        (run / "config.yaml").unlink()
        for network in range(2):
            write_status(run, network, phase="starting", epochs=0, steps_per_epoch=0, step=0)
        assert status_of(run)[0] == "starting"

    def test_finished(self, run: Path) -> None:
        finish_run(run)
        state, text = status_of(run)
        assert state == "finished"
        assert "mean accuracy after last round 61.00" in text
        assert "ensemble accuracy after last round 62.50" in text

    def test_finished_without_status_files(self, tmp_path: Path) -> None:
        run = make_run(tmp_path / "run", finished=4)
        write_summary(run)
        assert status_of(run)[0] == "finished"

    def test_finished_run_with_more_epochs_is_not_finished(self, run: Path) -> None:
        write_summary(run)
        assert status_of(run)[0] == "died"

    @pytest.mark.parametrize(("epochs", "state"), [(3, "finished"), (4, "stopped")])
    def test_a_job_that_has_epochs_left(self, epochs: int, state: State, tmp_path: Path) -> None:
        """Another job has continued the population for more epochs, and finished them."""
        run = make_run(tmp_path / "run", epochs=epochs)
        config = yaml.safe_load((run / "config.yaml").read_text())
        config |= {"graft": {"exchange": "files"}, "population": {"size": 2}}
        (run / "config.yaml").write_text(yaml.safe_dump(config))
        line = {"epoch": epochs - 1, "lr": 0.1, "test_accuracy": 60.0}
        with (run / "network00/metrics.jsonl").open("a") as file:
            file.write(json.dumps(line) + "\n")
        for network in range(2):
            write_status(run, network, phase="finished")
        found, text = status_of(run)
        assert found == state
        assert ("network 1 left" in text) == (state == "stopped")

    def test_stopped(self, run: Path) -> None:
        for network in range(2):
            write_status(run, network, phase="stopped", reason="stopped early by SIGTERM")
        (run / "STOPPED_EARLY").write_text("stopped early by SIGTERM: goes on from there\n")
        state, text = status_of(run)
        assert state == "stopped"
        assert text.startswith(f"{run}: stopped early by SIGTERM: goes on from there\n")

    def test_stopped_while_it_starts_again(self, run: Path) -> None:
        """The start has removed the marker, and no network has written its status yet."""
        for network in range(2):
            write_status(run, network, phase="stopped", reason="stopped early by SIGTERM")
        state, text = status_of(run)
        assert state == "stopped"
        assert text.startswith(f"{run}: stopped early; rerun the same command to resume from ")

    def test_failed_with_the_reason_in_the_log(self, run: Path) -> None:
        """The cause is shown, not the network that the launcher terminated afterwards."""
        write_status(run, 0, phase="failed", reason="stopped by SIGTERM")
        write_status(run, 1, phase="failed", reason="in status.json")
        with (run / "network01/log.txt").open("a") as log:
            log.write("ERROR network 1 (rank 1 on b): out of GPU memory\n")
        state, text = status_of(run)
        assert state == "failed"
        assert "failed: network 1 (rank 1 on b): out of GPU memory; rerun " in text
        assert "rerun the same command to resume from epoch_0003" in text.splitlines()[0]

    def test_the_metric_of_another_task(self, run: Path) -> None:
        for network in (0, 1):
            path = run / f"network{network:02d}/metrics.jsonl"
            line = {"epoch": 3, "test_loss": 0.5, "test_iou": 0.123456, "test_dice": 0.9}
            path.write_text(json.dumps(line) + "\n")
        summary = {"metric": "iou", "mean_iou_after_last_round": 0.125}
        (run / "summary.json").write_text(json.dumps(summary))
        state, text = status_of(run)
        assert state == "finished"
        assert "test iou" in text
        assert text.count(" 0.1235 ") == 2
        assert "mean iou after last round 0.125" in text.splitlines()

    def test_the_cause_is_shown_and_not_its_consequences(self, run: Path) -> None:
        with pytest.raises(PeerError) as lost:  # noqa: SIM117
            with reporting_lost_peers("the check", list, otherwise="network 1"):
                raise CommunicationError("connection closed by peer")
        logged = (lost.value, DataError("a.png cannot be decoded"))
        for network, error in enumerate(logged):
            write_status(run, network, phase="failed", reason=str(error))
            append_error(run / f"network{network:02d}", error)
        state, text = status_of(run)
        assert state == "failed"
        assert "failed: network 1: a.png cannot be decoded" in text.splitlines()[0]

    def test_folders_of_other_programs_are_no_runs(self, tmp_path: Path) -> None:
        checkpoint = tmp_path / "lightning/network00/checkpoints/last.ckpt"
        checkpoint.parent.mkdir(parents=True)
        checkpoint.touch()
        assert run_paths(tmp_path) == []
        with pytest.raises(RunDirectoryError, match="is not a run directory"):
            read_run(tmp_path / "lightning")

    def test_networks_of_an_earlier_start_that_failed_are_left_out(self, run: Path) -> None:
        (run / "network02").mkdir()
        write_status(run, 2, phase="failed", reason="model.kwargs do not fit resnet20")
        _, text = status_of(run)
        assert "\n2 x resnet20" in text

    def test_running_although_a_second_start_was_refused(self, run: Path) -> None:
        write_status(run, 0)
        write_status(run, 1)
        with (run / "network00/log.txt").open("a") as log:
            log.write("ERROR run holds a run with another configuration\n")
        assert status_of(run)[0] == "running"

    @pytest.mark.parametrize(
        ("fields", "state"),
        [
            ({"time": NOW - 60}, "running"),
            ({"time": NOW - 60, "pid": UNUSED_PID}, "died"),
            ({"time": NOW - 5, "pid": UNUSED_PID}, "running"),  # perhaps in another pid namespace
            ({"time": NOW - 60, "pid": UNUSED_PID, "host": "elsewhere"}, "running"),
            ({"time": NOW - 200, "host": "elsewhere"}, "died"),
            ({"time": NOW - 200}, "died"),
            ({"time": NOW + 30, "host": "with a clock ahead"}, "running"),
        ],
    )
    def test_signs_of_life(self, run: Path, fields: dict[str, Any], state: State) -> None:
        for network in range(2):
            write_status(run, network, **fields)
        found, text = status_of(run)
        assert found == state
        if state == "died":
            assert "died: last heartbeat of networks 0, 1" in text
            assert "killed, out of memory" in text

    def test_running_without_a_network_that_died(self, run: Path) -> None:
        write_status(run, 0)
        write_status(run, 1, time=NOW - 200)
        state, text = status_of(run)
        assert state == "running"
        assert text.splitlines()[0].startswith(f"{run}: running, but without network 1")
        assert "dead" in text


def finish_run(run: Path) -> None:
    for network in range(2):
        write_status(run, network, phase="finished", step=40, seconds_left=None, rounds=4)
        with (run / f"network{network:02d}/metrics.jsonl").open("a") as file:
            file.write(json.dumps({"epoch": 3, "test_accuracy": 60.0, "graft": None}) + "\n")
    write_summary(run)


class TestBrokenFiles:
    def test_not_a_run_directory(self, tmp_path: Path) -> None:
        for path in (tmp_path, tmp_path / "nothing"):
            with pytest.raises(RunDirectoryError, match="is not a run directory"):
                read_run(path)

    @pytest.mark.parametrize("short", [1, 30])
    def test_unfinished_line_is_ignored(self, run: Path, short: int) -> None:
        path = run / "network01/metrics.jsonl"
        path.write_bytes(path.read_bytes()[:-short])
        found = read_run(run)
        assert not found.problems
        assert [network.last_epoch["epoch"] for network in found.networks] == [2, 1]

    def test_damaged_line_is_reported_and_skipped(self, run: Path) -> None:
        path = run / "network01/metrics.jsonl"
        path.write_bytes(path.read_bytes()[:-30] + b"\n")
        write_status(run, 0)
        write_status(run, 1)
        text = status_of(run)[1]
        assert f"! {path}: 1 of the last 3 lines cannot be read" in text
        assert "51.00" in text

    def test_long_file_is_read_from_its_end(self, run: Path) -> None:
        path = run / "network00/metrics.jsonl"
        lines = [{"epoch": e, "test_accuracy": 1.0, "more": "x" * 900} for e in range(600)]
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
        found = read_run(run)
        assert not found.problems
        assert found.networks[0].last_epoch["epoch"] == 599

    @pytest.mark.parametrize("folder", ["network01", "population", "checkpoints"])
    def test_missing_folder(self, run: Path, folder: str) -> None:
        subprocess.run(["rm", "-r", str(run / folder)], check=True)
        assert status_of(run)[0] == "died"

    @given(data=st.data())
    def test_any_content_is_tolerated(
        self, data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
    ) -> None:
        """Any file may be cut off, replaced by bytes, or hold values of other types."""
        run = make_run(tmp_path_factory.mktemp("run") / "run")
        finish_run(run)
        files = sorted(path for path in run.rglob("*") if path.is_file())
        path = data.draw(st.sampled_from(files))
        content = path.read_bytes()
        damage = data.draw(st.sampled_from(["cut", "bytes", "values"]))
        if damage == "cut":
            path.write_bytes(content[: data.draw(st.integers(0, len(content)))])
        elif damage == "bytes":
            path.write_bytes(data.draw(st.binary(max_size=60)))
        else:
            odd = st.sampled_from(["null", "[]", '"x"', "{}", "-1", "1e999", "true"])
            values = re.compile(rb'(?<=: )("[^"]*"|[\d.]+|\{\}|null)')
            path.write_bytes(values.sub(lambda _: data.draw(odd).encode(), content))
        try:
            state, text = status_of(run)
        except RunDirectoryError:
            raise AssertionError("run directory not recognized") from None
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


class TestCommand:
    def test_json(self, run: Path) -> None:
        finish_run(run)
        content = json.loads(status(run, "--json").stdout)
        assert content["state"] == "finished"
        assert content["final"]["mean_accuracy_after_last_round"] == 61.0
        assert [row["events"] for row in content["networks"]] == [{"slow": 1}, {}]
        assert content["networks"][1]["round"] == 3
        assert content["seconds_left"] is None

    def test_options_in_which_networks_differ(self, run: Path) -> None:
        assert status(run).stdout.splitlines()[2].endswith(" events")
        config = yaml.safe_load((run / "config.yaml").read_text())
        members = [{"optim.weight_decay": 0.00012345, "data.rand_augment": "2,9"}, {}]
        config["run"]["members"] = members
        (run / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
        table = status(run).stdout.splitlines()
        assert table[2].endswith(" options")
        assert table[3].endswith("  weight_decay 0.000123, rand_augment 2,9")
        assert table[4].endswith(" -")
        content = json.loads(status(run, "--json").stdout)
        assert [row["options"] for row in content["networks"]] == members

    def test_watch_ends_with_the_run(self, run: Path) -> None:
        finish_run(run)
        done = status(run, "--watch")
        assert done.returncode == 0
        assert done.stdout.startswith(f"{run}: finished")
        assert "\x1b" not in done.stdout

    def test_a_folder_of_runs(self, tmp_path: Path) -> None:
        for name in ("second", "first"):
            make_run(tmp_path / name)
        (tmp_path / "notes").mkdir()
        write_summary(tmp_path / "first")
        finish_run(tmp_path / "second")
        done = status(tmp_path)
        assert done.returncode == 0, done
        rows = [line.split() for line in done.stdout.splitlines()]
        assert [row[0] for row in rows[1:]] == ["first", "second"]
        assert rows[1][1:] == [*("died", "2", "resnet20", "graft", "3/4", "52.00", "-")]
        known = json.loads(status(tmp_path, "--json").stdout)
        assert [row["run"] for row in known] == [str(tmp_path / n) for n in ("first", "second")]

    def test_watch_waits_for_a_run_that_starts(self, tmp_path: Path) -> None:
        command = [sys.executable, "-m", "dist_graft", "status", str(tmp_path / "run")]
        with subprocess.Popen(
            [*command, "--watch", "--every", "0.1"], stdout=subprocess.PIPE, text=True
        ) as process:
            assert process.stdout is not None
            assert "waiting for a run to start in" in process.stdout.readline()
            finish_run(make_run(tmp_path / "new"))
            (tmp_path / "new").rename(tmp_path / "run")
            output = process.stdout.read()
        assert process.returncode == 0
        assert "finished" in output

    def test_not_a_run_directory_is_an_error_of_one_line(self, tmp_path: Path) -> None:
        done = status(tmp_path)
        assert done.returncode == 1
        assert done.stderr.startswith("dist-graft: error: ")
        assert len(done.stderr.splitlines()) == 1

    def test_torch_is_not_imported(self, run: Path) -> None:
        program = (
            "import sys\nfrom dist_graft.cli import run\n"
            f"assert run(['status', {str(run)!r}]) == 0\n"
            "assert not {'torch', 'torchvision', 'numpy', 'tensorboard'} & set(sys.modules)\n"
        )
        subprocess.run([sys.executable, "-c", program], timeout=60, check=True)
