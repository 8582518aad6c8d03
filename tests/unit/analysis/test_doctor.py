from __future__ import annotations

import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from launching import ERROR, Done, run_program

from dist_graft.analysis import doctor
from dist_graft.population.runtime.selftest import run_selftest


def examined(run: Path, *options: str, **environment: str) -> Done:
    command = [sys.executable, "-m", "dist_graft", "doctor", "--run_dir", str(run), *options]
    return run_program(command, timeout=150, **environment)


def states(done: Done) -> dict[str, str]:
    """State of each check by name."""
    found = re.findall(r"(?m)^(ok|note|broken) +(\S+(?: \S+)*)  +", done.output)
    return {name: state for state, name in found}


def test_working_machine(tmp_path: Path) -> None:
    done = examined(tmp_path / "runs" / "run")
    assert done.status == 0, done
    assert states(done)["run directory"] == states(done)["round over gloo"] == "ok"
    assert done.output.splitlines()[-1].startswith("This machine can train: dist-graft train --net")
    assert not list(tmp_path.iterdir()), "files were left behind"


def test_broken_machine(tmp_path: Path) -> None:
    """With an unusable disk and network interface, all checks run and the command fails."""
    (tmp_path / "file").write_text("")
    done = examined(tmp_path / "file", GLOO_SOCKET_IFNAME="nonesuch0")
    assert done.status == 1
    assert states(done)["run directory"] == states(done)["round over gloo"] == "broken"
    assert states(done)["versions"] == "ok"
    assert "run directory: choose another --run_dir" in done.output
    assert "GLOO_SOCKET_IFNAME" in done.output
    assert done.errors.splitlines() == [
        f"{ERROR}broken: run directory, round over gloo; see the advice above"
    ]


def test_round_times_out() -> None:
    well, text = run_selftest("gloo", seconds=0.01)
    assert not well
    assert text == "the processes did not end within 0.01 s"


def test_port_of_torchrun_is_in_use(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen(1)
        monkeypatch.setattr(doctor, "_PORT", other.getsockname()[1])
        found = doctor.check_ports()
    assert found.state == "note"
    assert "--master-port" in found.advice


def test_version_prints_all_versions() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "dist_graft", "--version"],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    installed = dict(line.split(maxsplit=1) for line in done.stdout.splitlines())
    assert list(installed) == ["dist_graft", "torch", "python", "cuda", "nccl"]
    assert all(re.match(r"\d+\.\d+|none", version) for version in installed.values()), installed
