"""Slurm cluster of two nodes on this machine, for the duration of a block."""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import socket
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from debian import cannot, need
from launching import environment, free_port, is_alive, wait_until

PROGRAMS = (
    *("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "scancel", "squeue"),
    "taskset",
)
_CONFIGURATION = """
ClusterName=two
GresTypes=gpu
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
CryptoType=crypto/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=batch_sched_delay=0,sched_interval=2,sched_min_interval=0
SlurmdParameters=config_overrides
MpiDefault=none
JobRequeue=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
ReturnToService=2
KillWait=5
SlurmdTimeout=10
NodeName=n[1-2] NodeHostname={host} NodeAddr=127.0.0.1 Port=[{first}-{second}] CPUs=6 Gres=gpu:2
PartitionName=low Nodes=ALL Default=YES PriorityTier=1 GraceTime=60 State=UP
PartitionName=high Nodes=ALL PriorityTier=10 State=UP
"""


def need_slurm() -> None:
    """Install Slurm if it is missing; if that fails, fail in CI and skip elsewhere."""
    if os.geteuid():
        cannot("a Slurm of our own needs root")
    need(PROGRAMS, ("slurm-wlm", "munge", "util-linux"))


class Slurm:
    """Cluster with the nodes n1 and n2.

    Args:
        folder: for configuration, logs and state.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._environment = environment(SLURM_CONF=str(folder / "slurm.conf"))
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}

    def start(self) -> None:
        """Start the authentication, the controller and both nodes."""
        key = self.folder / "munge.key"
        key.write_bytes(secrets.token_bytes(128))
        key.chmod(0o600)
        own = [f"--{name}={self.folder}/munge.{name.partition('-')[0]}" for name in
               ("key-file", "socket", "pid-file", "log-file", "seed-file")]  # fmt: skip
        self._daemon("munged", "--foreground", "--force", *own)
        wait_until((self.folder / "munge.socket").exists, "munged", seconds=10)
        first = free_port()
        (self.folder / "slurm.conf").write_text(
            _CONFIGURATION.format(
                folder=self.folder,
                host=socket.gethostname().partition(".")[0],
                port=free_port(),
                first=first,
                second=first + 1,
            )
        )
        # Any device file serves as a GPU.
        (self.folder / "gres.conf").write_text("Name=gpu File=/dev/null\nName=gpu File=/dev/zero\n")
        (self.folder / "state").mkdir()
        self._daemon("slurmctld", "-D")
        for node in ("n1", "n2"):
            self.start_node(node)
        wait_until(
            lambda: (
                self.command("sinfo", "-h", "-p", "low", "-o", "%D %t", check=False) == "2 idle"
            ),
            "two idle nodes",
            seconds=30,
        )

    def start_node(self, node: str) -> None:
        """Start a node's slurmd."""
        self._daemon(node, "-D", "-N", node, program="slurmd")

    def kill_node(self, node: str) -> None:
        """Kill a node's slurmd, as a crash would."""
        daemon = self._daemons.pop(node)
        daemon.kill()
        daemon.wait()

    def stop(self) -> None:
        """Kill the daemons and the remaining processes of their jobs."""
        for daemon in self._daemons.values():
            daemon.kill()
            daemon.wait()
        for pid in self.processes(f"SLURM_CONF={self.folder / 'slurm.conf'}"):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def command(self, *words: str, check: bool = True, **more: str) -> str:
        """Output of a Slurm command."""
        done = subprocess.run(
            words,
            env=self._environment | more,
            check=False,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=60,
        )
        assert not (check and done.returncode), f"{words}: {done.stdout}"
        return done.stdout.strip()

    def submit(self, script: Sequence[str], *options: str, **more: str) -> str:
        """Submit a script with its arguments; returns the job id."""
        answer = self.command("sbatch", "--parsable", *options, *script, **more)
        return answer.splitlines()[-1]

    def job(self, number: str) -> Mapping[str, str]:
        """Properties of a job."""
        text = self.command("scontrol", "show", "job", number)
        return dict(word.split("=", 1) for word in text.split() if "=" in word)

    def ended(self, number: str) -> bool:
        """Whether a job has ended."""
        return self.job(number)["JobState"] in (
            *("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED"),
        )

    def processes(self, variable: str) -> list[int]:
        """Ids of the processes with this in their environment, e.g. SLURM_JOB_ID=3."""
        found = []
        for place in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):
                pid = int(place.name)
                variables = (place / "environ").read_bytes().split(b"\0")
                if variable.encode() in variables and is_alive(pid):
                    found.append(pid)
        return found

    def logs(self) -> str:
        """Logs of the daemons, for a failure."""
        return "\n".join(path.read_text()[-3000:] for path in sorted(self.folder.glob("*.log")))

    def _daemon(self, name: str, *options: str, program: str = "") -> None:
        """Start a daemon on one core, which its jobs inherit: other tests have the others."""
        core = ("taskset", "--cpu-list", str(min(os.sched_getaffinity(0))))
        with (self.folder / f"{name}.out").open("ab") as output:
            self._daemons[name] = subprocess.Popen(
                [*core, program or name, *options],
                env=self._environment,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )


@contextmanager
def two_nodes() -> Iterator[Slurm]:
    """Slurm cluster of two nodes; all of its processes are killed on exit."""
    folder = Path(tempfile.mkdtemp(prefix="slurm", dir="/tmp"))  # a socket's path must be short
    slurm = Slurm(folder)
    try:
        try:
            slurm.start()
        except (OSError, AssertionError) as error:
            cannot(f"Slurm does not start: {error}; {slurm.logs()}")
        yield slurm
    except BaseException:
        print(slurm.logs())
        raise
    finally:
        slurm.stop()
        shutil.rmtree(folder, ignore_errors=True)
