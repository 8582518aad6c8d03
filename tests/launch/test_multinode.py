"""launch/multinode.sh and launch/local.sh on this machine alone."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from launching import (
    Done,
    checkpoint_is_complete,
    error_line,
    free_port,
    run_program,
    running,
    wait_for_end,
    wait_until,
)
from reading import summary

ROOT = Path(__file__).parents[2]
SMALL = (
    *("--model.name", "resnet8", "--data.train_samples", "64", "--data.test_samples", "40"),
    *("--data.batch_size", "32", "--epochs", "1"),
    *("--runtime.device", "cpu", "--runtime.threads", "1"),
)


def multinode(run: Path, **settings: str) -> Done:
    """Run the script on one of two machines; the other one never starts."""
    place = {"HEAD": "localhost", "PORT": str(free_port()), "NODES": "2", "PROCESSES": "1"}
    place |= {"JOIN_TIMEOUT": "3", "RUN_DIR": str(run), "PYTHON": sys.executable} | settings
    return run_program([str(ROOT / "launch/multinode.sh"), *SMALL], timeout=60, **place)


def test_a_host_name_without_an_address(tmp_path: Path) -> None:
    done = multinode(tmp_path / "run", HEAD="nowhere.invalid")
    assert done.status == 1
    error_line(
        done, "the name nowhere.invalid cannot be resolved", "set HEAD to the name of one of"
    )


def test_a_port_that_another_program_uses(tmp_path: Path) -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        port = str(listener.getsockname()[1])
        done = multinode(tmp_path / "run", PORT=port)
    assert done.status == 1
    error_line(
        done, f"port {port} of localhost belongs to another program", "set PORT to a free one"
    )


def test_machines_that_do_not_start(tmp_path: Path) -> None:
    done = multinode(tmp_path / "run", PORT="29999")
    assert done.status == 1
    error_line(
        done,
        "could not connect to the other machines at localhost:29999 within 3 s",
        "start all NODES",
    )


def test_a_job_that_fails_before_the_others_end(tmp_path: Path) -> None:
    """local.sh waits for the jobs in the order of their numbers."""
    job = tmp_path / "python"
    job.write_text(
        '#!/bin/sh\ncd "$FOLDER"\n'
        'case "$*" in *"population.network 0"*) until [ -e ended ]; do sleep 0.1; done;;\n'
        "*) touch ended; exit 3;; esac\n"
    )
    job.chmod(0o755)
    places = {"JOBS": "2", "PYTHON": str(job), "FOLDER": str(tmp_path)}
    done = run_program([str(ROOT / "launch/local.sh")], timeout=60, **places)
    assert done.status == 3


@pytest.mark.parametrize(
    ("visible", "seen"), [(None, ["0", "1", "0"]), ("6,7", ["6", "7", "6"]), ("", [""] * 3)]
)
def test_jobs_share_the_gpus_that_are_visible(
    visible: str | None, seen: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    programs = {
        "nvidia-smi": "printf 'GPU 0\\nGPU 1\\n'",
        "python": 'case "$*" in *"population.network 0"*) k=0;; *"population.network 1"*) k=1;; '
        '*) k=2;; esac; echo "$CUDA_VISIBLE_DEVICES" > "$FOLDER/seen$k"',
    }
    for name, text in programs.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    environment = {key: value for key, value in os.environ.items() if "VISIBLE" not in key}
    environment |= {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}
    environment |= {"JOBS": "3", "PYTHON": str(tmp_path / "python"), "FOLDER": str(tmp_path)}
    subprocess.run([str(ROOT / "launch/local.sh")], env=environment, check=True, timeout=60)
    assert [(tmp_path / f"seen{k}").read_text().strip() for k in range(3)] == seen


@pytest.mark.parametrize("setting", ["HEAD", "NODES"])
def test_a_missing_setting(setting: str, tmp_path: Path) -> None:
    done = multinode(tmp_path / "run", **{setting: ""})
    assert done.status == 1
    (line,) = done.errors.splitlines()
    assert setting in line


@pytest.mark.parametrize("script", ["local.sh", "multinode.sh"])
def test_a_missing_virtual_environment(script: str, tmp_path: Path) -> None:
    settings = {"HEAD": "localhost", "NODES": "1", "VENV": str(tmp_path)}
    done = run_program([str(ROOT / "launch" / script)], timeout=60, **settings)
    assert done.status == 1
    error_line(done, f"{tmp_path}/bin/python not found on ", "run launch/quickstart.sh to create")


def test_local_run(tmp_path: Path) -> None:
    run = tmp_path / "run"
    settings = {"PROCESSES": "2", "PYTHON": sys.executable}
    script = [str(ROOT / "launch/local.sh"), *SMALL, "--run_dir", str(run)]
    done = run_program(script, timeout=150, **settings)
    assert done.status == 0, done
    assert len(summary(run)["networks"]) == 2
    here = socket.gethostname()
    places = [line.split() for line in done.output.splitlines() if here in line.split()]
    assert places == [["0", "0", here, "cpu"], ["1", "1", here, "cpu"]]


def test_a_failed_process_ends_its_launcher_without_a_traceback(tmp_path: Path) -> None:
    script = [str(ROOT / "launch/local.sh"), *SMALL, "--run_dir", str(tmp_path / "run")]
    settings = {"PROCESSES": "2", "PYTHON": sys.executable}
    done = run_program([*script, "--optim.lr", "1e30"], timeout=150, **settings)
    assert done.status == 1
    error_line(done, "has a weight", "not finite")
    assert "Traceback" not in done.errors
    assert "has a weight" in done.errors[done.errors.index("FAILED") :]


def test_a_signal_ends_the_launcher_without_a_traceback(tmp_path: Path) -> None:
    run = tmp_path / "run"
    script = [str(ROOT / "launch/local.sh"), *SMALL, "--epochs", "100000", "--run_dir", str(run)]
    settings = {"PROCESSES": "1", "PYTHON": sys.executable}
    with running([script], **settings) as (launcher,):
        wait_until(checkpoint_is_complete(run, 1), "the first checkpoint", meanwhile=[launcher])
        launcher.send_signal(signal.SIGTERM)
        done = wait_for_end(launcher, 60)
    assert done.status == 128 + signal.SIGTERM
    assert "Traceback" not in done.errors
    assert (run / "STOPPED_EARLY").exists()
