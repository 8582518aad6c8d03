"""When the launcher binds processes to the NUMA nodes of their GPUs, and when it gives up."""

from __future__ import annotations

import threading
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch.distributed as dist

from dist_graft.population.runtime import torchrun


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Two NUMA nodes of four cores, each with two GPUs. Returns the folder of the nodes."""
    nodes, devices = tmp_path / "node", tmp_path / "devices"
    for node, cores in enumerate(("0-1,4,5", "2-3,6-7")):
        (nodes / f"node{node}").mkdir(parents=True)
        (nodes / f"node{node}" / "cpulist").write_text(f"{cores}\n")
    for gpu in range(4):
        folder = devices / f"0000:1{gpu}:00.0"
        folder.mkdir(parents=True)
        (folder / "numa_node").write_text(f"{gpu // 2}\n")
    monkeypatch.setattr(torchrun, "_NUMA_NODES", nodes)
    monkeypatch.setattr(torchrun, "_PCI_DEVICES", devices)
    monkeypatch.setattr("shutil.which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr("os.sched_getaffinity", lambda process: set(range(8)))
    monkeypatch.setattr("torch.cuda.device_count", lambda: 4)
    monkeypatch.setattr(
        "torch.cuda.get_device_properties",
        lambda gpu: SimpleNamespace(pci_domain_id=0, pci_bus_id=0x10 + gpu, pci_device_id=0),
    )
    return nodes


@pytest.mark.parametrize("processes", ["auto", "gpu", "4", "1"])
def test_each_process_is_bound_to_the_node_of_its_gpu(machine: Path, processes: str) -> None:
    assert torchrun._cores_near(1) == {0, 1, 4, 5}
    assert torchrun._cores_near(2) == {2, 3, 6, 7}
    assert torchrun._numa_binding(processes) == "node"


@pytest.mark.parametrize("processes", ["5", "cpu"])
def test_processes_without_a_gpu_of_their_own_are_not_bound(machine: Path, processes: str) -> None:
    assert torchrun._numa_binding(processes) is None


@pytest.mark.parametrize("missing", ["numactl", "GPUs", "cores near a GPU", "node of a GPU"])
def test_no_binding_where_torchrun_would_fail(
    machine: Path, missing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if missing == "numactl":
        monkeypatch.setattr("shutil.which", lambda name: None)
    elif missing == "GPUs":
        monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    elif missing == "cores near a GPU":
        monkeypatch.setattr("os.sched_getaffinity", lambda process: {0, 1, 4})
    else:
        (torchrun._PCI_DEVICES / "0000:13:00.0/numa_node").unlink()
    assert torchrun._numa_binding("auto") is None


def test_no_binding_with_one_node(machine: Path) -> None:
    (machine / "node1").rename(machine / "possible")
    assert torchrun._numa_binding("auto") is None


@pytest.mark.parametrize(
    ("option", "binding"), [((), "node"), (("--numa-binding=socket",), "socket")]
)
def test_the_option_of_torchrun(
    machine: Path, option: tuple[str, ...], binding: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    started = []
    monkeypatch.setattr(torchrun, "run", started.append)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert torchrun.main(["--nproc-per-node=4", *option, "program.py"]) == 0
    assert [options.numa_binding for options in started] == [binding]


def test_the_launcher_waits_for_other_machines_as_long_as_the_store_responds(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    store = dist.TCPStore(
        "127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=60)
    )
    looks, looked_often = iter([True]), threading.Event()
    answers, failed = [], threading.Event()
    ask = torchrun._is_store

    def is_store(host: str, port: int) -> bool:
        answers.append(ask(host, port))
        if len(answers) == 4:
            looked_often.set()
        return answers[-1]

    monkeypatch.setattr(torchrun, "_has_processes", lambda: next(looks, False))
    monkeypatch.setattr(torchrun, "_is_store", is_store)
    monkeypatch.setattr(torchrun, "_EXIT_SECONDS", 2.0)
    monkeypatch.setattr(torchrun, "_CONNECT_SECONDS", 60.0)
    monkeypatch.setattr(torchrun, "_fail", lambda line: failed.set())
    watch = threading.Thread(target=torchrun._watch, args=(f"127.0.0.1:{store.port}", 60.0))
    watch.start()
    try:
        assert looked_often.wait(120)
        assert all(answers[:4])
        assert not failed.is_set()
    finally:
        del store
        watch.join()  # before the patches end: the real function ends the process
    assert failed.is_set()
