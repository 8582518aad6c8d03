"""Training and rounds on a GPU, relative to bare references on the same GPU.

Each part runs in processes of its own with a time limit, so that one that fails does not end the
others. With fewer GPUs than processes, the processes share them. NCCL then connects them by
sockets, which are slower than any real connection.

- train: images/s of the trainer's loop over whole epochs / a bare loop on one resident batch;
- round: a round / the bare collective plus one device copy of the same bytes;
- papa: images/s with a pull to the mean every 10 steps / without;
- share: images/s of several independent networks on one GPU together, with and without MPS;
- launches: kernel launches, copies and synchronizations of one round, from the profiler, beside the
  counts of launches.py.

    python benchmarks/gpu.py --json gpu.json
    python benchmarks/gpu.py --device cpu --tiny        # checks the program itself
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import io
import json
import os
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from datetime import timedelta
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import numpy as np
import torch
import torch.distributed as dist
from reporting import machine, ratios, spread, verdict
from torch.profiler import ProfilerActivity, profile
from train import BareLoop, Images

from dist_graft import Average, Graft, Grafter, Papa, Rule, Trainer, Wash
from dist_graft.config import (
    CheckpointConfig,
    DataConfig,
    ModelConfig,
    MonitorConfig,
    OptimConfig,
    RuntimeConfig,
    TrainConfig,
)
from dist_graft.grafting.units import graft_tensors
from dist_graft.population.compat import all_gather_single
from dist_graft.population.runtime.devices import shared_gpu_variables
from dist_graft.training.models import build_model

TRAIN_TARGET, ROUND_TARGET, PAPA_TARGET = 0.97, 1.3, 0.97
WARM_UP = 2
RULES: dict[str, tuple[Callable[[], Rule], str]] = {
    "graft, all_gather": (Graft, "all_gather"),
    "graft, p2p": (Graft, "p2p"),
    "average": (Average, "all_gather"),
    "papa": (Papa, "all_gather"),
    "wash": (Wash, "all_gather"),
}
LAUNCHES = {
    "cudaLaunchKernel": "launches",
    "cudaLaunchKernelExC": "launches",
    "cuLaunchKernel": "launches",
    "cuLaunchKernelEx": "launches",
    "cudaMemcpyAsync": "copies",
    "cudaMemsetAsync": "copies",
    "cudaStreamSynchronize": "syncs",
    "cudaDeviceSynchronize": "syncs",
    "cudaEventSynchronize": "syncs",
}
"""Kind of call by its name in the profiler."""

_HERE = Path(__file__).parent
_PATHS = [str(_HERE.parent), str(_HERE), *filter(None, [os.environ.get("PYTHONPATH")])]
SOURCES = {"PYTHONPATH": os.pathsep.join(_PATHS)}
"""Environment of processes that import the package and the benchmarks from the checkout."""

Result = dict[str, Any]


def large_images(root: str) -> tuple[Images, Images]:
    """Noise in the format of ImageNet's crops, as `data.name` expects it: 1,280 and 128 images."""
    del root
    generator = np.random.default_rng(0)
    train, test = (
        (
            generator.integers(0, 256, (count, 3, 224, 224), dtype=np.uint8),
            np.arange(count) % 1000,
        )
        for count in (1280, 128)
    )
    return train, test


def synchronize(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize()


# ---- The parts ---------------------------------------------------------------------------------


def train_part(model: str, compiled: str, options: argparse.Namespace) -> Result:
    """Run the trainer's loop and a bare loop in turn."""
    is_large = model == "resnet50"
    epochs = 3 if options.tiny else WARM_UP + (3 if is_large else 7)
    batch = 8 if options.tiny else 128
    loops = BareLoop()
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        config = TrainConfig(
            run_dir=f"{folder}/run",
            epochs=epochs,
            data=DataConfig(
                name="gpu:large_images" if is_large else "train:random_images",
                batch_size=batch,
                train_samples=batch * (2 if options.tiny else 10 if is_large else 39),
                test_samples=batch,
                image_size=224 if is_large else 32,
                channels=3,
            ),
            model=ModelConfig(name=model),
            optim=OptimConfig(lr=0.01),
            runtime=RuntimeConfig(
                device=options.device,
                precision="fp32" if options.device == "cpu" else "bf16",
                compile=_compile_value(compiled),
            ),
            checkpoint=CheckpointConfig(every=0),
            monitor=MonitorConfig(tensorboard=False, progress="lines"),
        )
        Trainer(config, callbacks=[loops]).fit()
    return {
        "trainer_images_per_second": loops.trainer_speeds[WARM_UP:],
        "bare_images_per_second": loops.bare_speeds[WARM_UP:],
    }


def _compile_value(name: str) -> Any:
    return {"false": False, "true": True}.get(name, name)


def compile_modes(hint: Any = None) -> list[str]:
    """Values of runtime.compile that compile, without the slow max-autotune."""
    hint = hint or get_type_hints(RuntimeConfig)["compile"]
    if hint is bool:
        return ["true"]
    if get_origin(hint) is Literal:
        return [name for name in get_args(hint) if name not in (False, "max-autotune")]
    return [mode for part in get_args(hint) for mode in compile_modes(part)]


def round_rank(rank: int, networks: int, folder: str, options: argparse.Namespace) -> Result:
    """Time rounds, and the collective and copy of the same bytes; every rank must call this."""
    device = _join(rank, networks, folder, options)
    torch.manual_seed(rank)
    name = "resnet8" if options.tiny else "resnet50"
    model = build_model(ModelConfig(name=name), num_classes=1000, channels=3)
    model = model.to(device, memory_format=torch.channels_last)
    numbers = torch.cat([tensor.detach().reshape(-1) for tensor in graft_tensors(model).values()])
    bare = {
        "all_gather": _bare_all_gather(numbers, rank, networks),
        "p2p": _bare_ring(numbers, rank, networks),
        "mean": lambda: dist.all_reduce(numbers),
    }
    sources = {"all_gather": numbers.repeat(networks), "p2p": numbers, "mean": numbers}
    copied = torch.empty_like(sources["all_gather"])
    grafters = {
        key: Grafter(model, rule=rule(), exchange=exchange)
        for key, (rule, exchange) in RULES.items()
    }
    start = {key: value.clone() for key, value in model.state_dict().items()}
    timings: dict[str, dict[str, list[float]]] = {key: {} for key in grafters}
    for _ in range(1 + (2 if options.tiny else 7)):
        for key, grafter in grafters.items():
            model.load_state_dict(start)  # otherwise the networks become equal
            # The best collective for the rule; gloo has no fused reduction of rounds.
            is_mean = key in ("average", "papa") and options.device != "cpu"
            collective = "mean" if is_mean else RULES[key][1]
            for what, action in (
                ("round", grafter.graft),
                ("collective", bare[collective]),
                ("copy", partial(copied[: len(sources[collective])].copy_, sources[collective])),
            ):
                timings[key].setdefault(what, []).append(_time_together(action, options.device))
    dist.destroy_process_group()
    return {key: {what: t[1:] for what, t in each.items()} for key, each in timings.items()}


def _join(rank: int, networks: int, folder: str, options: argparse.Namespace) -> torch.device:
    """Join the process group, with NCCL on GPUs."""
    backend, device, device_id = "gloo", torch.device("cpu"), None
    if options.device != "cpu":
        os.environ.update(shared_gpu_variables(rank, networks))
        device = device_id = torch.device("cuda", rank % torch.cuda.device_count())
        torch.cuda.set_device(device)
        backend = "cpu:gloo,cuda:nccl"
    dist.init_process_group(
        backend,
        store=dist.FileStore(f"{folder}/store", networks),
        rank=rank,
        world_size=networks,
        timeout=timedelta(seconds=60),
        device_id=device_id,
    )
    return device


def _bare_all_gather(numbers: torch.Tensor, rank: int, networks: int) -> Callable[[], object]:
    gathered = numbers.repeat(networks)
    local = gathered.chunk(networks)[rank]
    return lambda: all_gather_single(gathered, local, group=None)


def _bare_ring(numbers: torch.Tensor, rank: int, networks: int) -> Callable[[], object]:
    received = numbers.clone()

    def move() -> None:
        operations = [
            dist.P2POp(dist.isend, numbers, (rank + 1) % networks),
            dist.P2POp(dist.irecv, received, (rank - 1) % networks),
        ]
        for work in dist.batch_isend_irecv(operations):
            work.wait()

    return move


def _time_together(action: Callable[[], object], device: str) -> float:
    """Time an action that all processes start at once; every rank must call this."""
    synchronize(device)
    dist.all_reduce(torch.zeros(1))  # over gloo
    start = time.perf_counter()
    action()
    synchronize(device)
    return time.perf_counter() - start


def launches_rank(rank: int, networks: int, folder: str, options: argparse.Namespace) -> Result:
    """Count the CUDA calls of one round of each rule; every rank must call this."""
    device = _join(rank, networks, folder, options)
    counts: Result = {}
    for name in ("resnet8",) if options.tiny else ("resnet20", "resnet50"):
        for key, (rule, exchange) in RULES.items():
            model = build_model(ModelConfig(name=name), num_classes=1000, channels=3).to(device)
            grafter = Grafter(model, rule=rule(), exchange=exchange)
            grafter.graft()
            synchronize(options.device)
            on_gpu = [ProfilerActivity.CUDA] if options.device != "cpu" else []
            with profile(activities=[ProfilerActivity.CPU, *on_gpu], acc_events=True) as profiler:
                grafter.graft()
            kinds = dict.fromkeys(LAUNCHES.values(), 0)
            for event in profiler.key_averages():
                if event.key in LAUNCHES:
                    kinds[LAUNCHES[event.key]] += event.count
            counts[f"{name}, {key}"] = kinds
    dist.destroy_process_group()
    return counts


def counted_launches(networks: int, options: argparse.Namespace) -> Result:
    """Counts of launches.py for the same rounds; empty without it."""
    if importlib.util.find_spec("launches") is None:
        return {}
    launches: Any = importlib.import_module("launches")
    counts: Result = {}
    for name in ("resnet8",) if options.tiny else ("resnet20", "resnet50"):
        for key, (rule, exchange) in RULES.items():
            model = build_model(ModelConfig(name=name), num_classes=1000, channels=3)
            counting, _ = launches.count_round(rule(), model, "conv", networks, exchange=exchange)
            counts[f"{name}, {key}"] = vars(counting.counts())
    return counts


def train_population(
    networks: int, options: argparse.Namespace, *more: str, environment: dict[str, str]
) -> list[float]:
    """Images/s of all networks together, by epoch, of a training run without evaluations."""
    images, batch = (32, 8) if options.tiny else (39 * 128, 128)
    with tempfile.TemporaryDirectory() as folder:
        arguments = [
            *("--run_dir", f"{folder}/run", "--epochs", "4" if options.tiny else "8"),
            *("--data.train_samples", str(images), "--data.test_samples", str(batch)),
            *("--data.batch_size", str(batch), "--data.name", "train:random_images"),
            *("--data.image_size", "32", "--optim.lr", "0.01", "--checkpoint.every", "0"),
            *("--model.name", "resnet8" if options.tiny else "resnet20"),
            *("--monitor.tensorboard", "false", "--runtime.device", options.device, *more),
        ]
        if options.device != "cpu":
            arguments += ["--runtime.precision", "bf16"]
        port = str(_free_port())
        processes = []
        for rank in range(networks):
            place = {
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(networks),
                "LOCAL_WORLD_SIZE": str(networks),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": port,
            }
            if options.device != "cpu":
                place |= shared_gpu_variables(rank, networks)
            processes.append(
                subprocess.Popen(
                    [sys.executable, "-m", "dist_graft", "train", *arguments],
                    env=os.environ | (place if networks > 1 else {}) | SOURCES | environment,
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.PIPE,
                    text=True,
                )
            )
        try:
            for process in processes:
                _, errors = process.communicate()
                if process.returncode:
                    raise RuntimeError(errors.strip().splitlines()[-1] if errors else "no message")
        finally:
            for process in processes:
                process.kill()
                process.wait()
        speeds = []
        for rank in range(networks):
            lines = Path(f"{folder}/run/network{rank:02d}/metrics.jsonl").read_text().splitlines()
            phases = [json.loads(line)["phase_seconds"] for line in lines]
            busy = [p["data"] + p["step"] + p["round"] + p["other"] for p in phases[WARM_UP:]]
            speeds.append([images / seconds for seconds in busy])
    return [sum(epoch) for epoch in zip(*speeds, strict=True)]


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


def papa_part(options: argparse.Namespace) -> Result:
    """Train with and without pulls."""
    pulls = ("--method", "papa", "--papa.every_steps", "2" if options.tiny else "10")
    return {
        "papa": train_population(2, options, *pulls, environment={}),
        "none": train_population(2, options, "--method", "none", environment={}),
    }


def share_part(networks: int, *, mps: bool, options: argparse.Namespace) -> Result:
    """Train independent networks on one GPU."""
    with _mps_daemon() if mps else contextlib.nullcontext({}) as variables:
        one_gpu = {} if options.device == "cpu" else {"CUDA_VISIBLE_DEVICES": _first_gpu()}
        independent = ("--method", "none", "--runtime.backend", "gloo")
        environment = variables | one_gpu
        speeds = train_population(networks, options, *independent, environment=environment)
    return {"images_per_second": speeds}


def _first_gpu() -> str:
    return os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]


@contextlib.contextmanager
def _mps_daemon() -> Iterator[dict[str, str]]:
    """Run a CUDA MPS server of our own; yields the environment of its clients."""
    if shutil.which("nvidia-cuda-mps-control") is None:
        raise RuntimeError("nvidia-cuda-mps-control is not installed")
    with tempfile.TemporaryDirectory() as folder:
        names = ("CUDA_MPS_PIPE_DIRECTORY", "CUDA_MPS_LOG_DIRECTORY")
        variables = dict.fromkeys(names, folder)
        control, environment = "nvidia-cuda-mps-control", os.environ | variables
        subprocess.run([control, "-d"], env=environment, check=True, timeout=20)
        try:
            yield variables
        finally:
            subprocess.run([control], env=environment, input=b"quit\n", timeout=20, check=False)


def in_processes(
    function: Callable[..., Result], networks: int, options: argparse.Namespace
) -> list[Result]:
    """Run a function in each process of a new group; returns the results by rank."""
    with (
        tempfile.TemporaryDirectory() as folder,
        ProcessPoolExecutor(networks, mp_context=get_context("spawn")) as pool,
    ):
        futures = [pool.submit(function, k, networks, folder, options) for k in range(networks)]
        return [future.result() for future in futures]


# ---- The program ---------------------------------------------------------------------------------


def plan(options: argparse.Namespace) -> dict[str, float]:
    """Parts in order of importance, with the seconds that each needs at most."""
    if options.tiny:
        return dict.fromkeys(
            ("train resnet8 false", "round 2", "papa", "launches 2", "share 2"), 150.0
        )
    parts = {
        "train resnet20 false": 40.0,
        "round 2": 60.0,
        "papa": 60.0,
        "launches 2": 60.0,
        "train resnet50 false": 60.0,
        "share 1": 40.0,
        "share 4": 50.0,
        "share-mps 4": 60.0,
        "round 4": 80.0,
    }
    parts |= {f"train resnet20 {mode}": 100.0 for mode in compile_modes()}
    parts |= {"share 2": 40.0, "share 8": 80.0, "share-mps 2": 50.0, "share-mps 8": 80.0}
    return parts | {f"train resnet50 {mode}": 180.0 for mode in compile_modes()}


def run_part(name: str, options: argparse.Namespace) -> Result:
    """Run one part in this process."""
    kind, *arguments = name.split()
    if kind == "train":
        return train_part(*arguments, options)
    if kind == "papa":
        return papa_part(options)
    networks = int(arguments[0])
    if kind.startswith("share"):
        return share_part(networks, mps=kind == "share-mps", options=options)
    if kind == "round":
        by_rank = in_processes(round_rank, networks, options)
        return {
            key: {
                what: [
                    statistics.fmean(each)
                    for each in zip(*(r[key][what] for r in by_rank), strict=True)
                ]
                for what in first
            }
            for key, first in by_rank[0].items()
        }
    assert kind == "launches"
    counted = counted_launches(networks, options)
    return {"counted": counted, "profiled": in_processes(launches_rank, networks, options)[0]}


def start_part(name: str, seconds: float, arguments: list[str]) -> Result:
    """Run one part in a new process; its error, if it fails, is in the result."""
    began = time.perf_counter()
    command = [sys.executable, __file__, *arguments, "--part", name]
    process = subprocess.Popen(
        command,
        env=os.environ | SOURCES,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,  # its processes end with it
    )
    try:
        output, errors = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        return {"error": f"still ran after {seconds:.0f} s"}
    if process.returncode:
        sys.stderr.write(errors)
        last = errors.strip().splitlines()[-1] if errors.strip() else "no message"
        return {"error": f"exit status {process.returncode}: {last}"}
    result: Result = json.loads(output.splitlines()[-1])
    return result | {"seconds": time.perf_counter() - began}


def lines_of(name: str, result: Result) -> list[str]:
    """Lines of the summary about one part."""
    if "error" in result:
        return [f"{name}: {result['error']}"]
    kind, *_ = name.split()
    if kind == "train":
        trainer, bare = result["trainer_images_per_second"], result["bare_images_per_second"]
        return [
            f"{name}: {spread(trainer, 0)} images/s, bare loop {spread(bare, 0)}",
            verdict(f"{name}: trainer / bare loop", ratios(trainer, bare), at_least=TRAIN_TARGET),
        ]
    if kind == "papa":
        papa, none = result["papa"], result["none"]
        relative = [value / statistics.median(none) for value in papa]
        return [
            f"papa: {spread(papa, 0)} images/s of 2 networks, without pulls {spread(none, 0)}",
            verdict("papa / none", relative, at_least=PAPA_TARGET),
        ]
    if kind.startswith("share"):
        return [f"{name}: {spread(result['images_per_second'], 0)} images/s together"]
    if kind == "launches":
        return [
            f"{key}: {counts}, launches.py {result['counted'].get(key, 'not available')}"
            for key, counts in result["profiled"].items()
        ]
    found = []
    for key in RULES:
        times = result[key]
        best = [c + copy for c, copy in zip(times["collective"], times["copy"], strict=True)]
        milliseconds = {what: spread([1e3 * t for t in each], 1) for what, each in times.items()}
        found.append(f"{name}, {key}: {milliseconds} ms")
        if key != "wash":  # moves only a part of the weights
            what = f"{name}, {key}: round / (collective + copy)"
            found.append(verdict(what, ratios(times["round"], best), at_most=ROUND_TARGET))
    return found


def gpus() -> str:
    """GPUs, driver-independent versions, in one line."""
    count = torch.cuda.device_count()
    names = sorted({torch.cuda.get_device_name(index) for index in range(count)})
    return (
        f"{count} x {', '.join(names)}; CUDA {torch.version.cuda}, NCCL "
        f"{'.'.join(map(str, torch.cuda.nccl.version()))}, cuDNN {torch.backends.cudnn.version()}"
    )


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="smallest sizes, fewer parts")
    parser.add_argument("--seconds", type=float, default=3600.0, help="for all parts together")
    parser.add_argument("--json", help="file for all figures")
    parser.add_argument("--part", help="run only this part, and print its figures as JSON")
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        print("benchmarks/gpu.py: error: torch sees no GPU; use --device cpu --tiny to check this")
        return 2
    if options.part:
        print(json.dumps(run_part(options.part, options)))
        return 0

    header = machine() + (f"; {gpus()}" if options.device == "cuda" else "")
    print(header, flush=True)
    arguments = ["--device", options.device, *(["--tiny"] if options.tiny else [])]
    results: dict[str, Result] = {}
    deadline = time.monotonic() + options.seconds
    for name, seconds in plan(options).items():
        left = deadline - time.monotonic()
        if left < seconds / 2:
            results[name] = {"error": f"not run: {left:.0f} s were left"}
        else:
            results[name] = start_part(name, min(left, seconds), arguments)
        print("\n".join(lines_of(name, results[name])), flush=True)
        if options.json:
            content = {"machine": header, "parts": results}
            Path(options.json).write_text(json.dumps(content, indent=1) + "\n")
    return int(any("error" in result for result in results.values()))


if __name__ == "__main__":
    sys.exit(main())
