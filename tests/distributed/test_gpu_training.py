"""Training runs on a GPU, over NCCL and gloo; some of them also run on the CPU."""

from __future__ import annotations

import math
import os
import shutil
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import pytest
from documents import ROOT
from launching import (
    FAULTY,
    PROMPT_SECONDS,
    end_population,
    error_line,
    program,
    run_population,
    running,
    wait_for_end,
)
from reading import assert_same_bits, checkpoint, metrics, optimizer_tensors

from dist_graft.config import RuntimeConfig

STEPS, EPOCHS = 8, 2
OPTIONS = (
    *("--epochs", str(EPOCHS), "--data.train_samples", str(32 * STEPS), "--optim.lr", "0.05"),
    *("--model.name", "resnet8", "--checkpoint.keep", str(EPOCHS)),
)
LATER_STEPS = 64
COMPILE_SECONDS = 250
ON_TESTS_PATH = {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}:{os.environ.get('PYTHONPATH', '')}"}
ON_GPU = pytest.param("cuda", marks=pytest.mark.gpu)
ON_BOTH = ("cpu", ON_GPU)


def compile_modes(hint: Any = None) -> list[str]:
    """Values of runtime.compile that compile, from the option's type."""
    hint = hint or get_type_hints(RuntimeConfig)["compile"]
    if hint is bool:
        return ["true"]
    if get_origin(hint) is Literal:
        names = [str(value).lower() for value in get_args(hint)]
        return [name for name in names if name != "false"]
    return sorted({name for part in get_args(hint) for name in compile_modes(part)})


def losses(run: Path, networks: int = 2) -> list[float]:
    return [metrics(run, network)[-1]["test_loss"] for network in range(networks)]


def assert_equal_up_to_rounding(run: Path) -> None:
    """With K = 2 both networks hold the same weights after the last round."""
    first, second = (checkpoint(run, EPOCHS, network)["model"] for network in (0, 1))
    for key in ("conv1.weight", "bn1.running_var"):
        assert (first[key] - second[key]).abs().max() < 1e-5


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run of two networks on the GPU, fp32, with the backend that is chosen automatically."""
    run = tmp_path_factory.mktemp("reference") / "run"
    run_population(2, run, *OPTIONS, device="cuda")
    return run


@pytest.mark.gpu
def test_networks_communicate_over_nccl(reference: Path) -> None:
    assert "nccl" in (reference / "network00/log.txt").read_text()
    assert_equal_up_to_rounding(reference)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("options", "tolerance"),
    [
        ("--runtime.precision bf16", 0.1),
        ("--runtime.precision fp16", 0.2),  # the loss scaler skips steps until it has settled
        ("--runtime.channels_last false", 0.05),
        ("--runtime.backend gloo", 0.05),
        ("--graft.exchange p2p", 0.05),
        *((f"--runtime.compile {mode}", 0.05) for mode in compile_modes()),
    ],
)
def test_option_trains_as_the_reference(
    options: str, tolerance: float, reference: Path, tmp_path: Path
) -> None:
    arguments = (*OPTIONS, *options.split())
    run_population(2, tmp_path / "run", *arguments, device="cuda", limit=COMPILE_SECONDS)
    assert losses(tmp_path / "run") == pytest.approx(losses(reference), rel=tolerance)
    assert_equal_up_to_rounding(tmp_path / "run")


@pytest.mark.gpu
def test_synchronized_batch_norm_of_two_replicas(reference: Path, tmp_path: Path) -> None:
    options = ("--runtime.replicas", "2", "--runtime.sync_bn", "true")
    run_population(4, tmp_path / "run", *OPTIONS, *options, device="cuda")
    assert losses(tmp_path / "run") == pytest.approx(losses(reference), rel=0.05)


@pytest.mark.gpu
@pytest.mark.parametrize("method", ["average", "papa", "wash"])
def test_methods(method: str, tmp_path: Path) -> None:
    run_population(4, tmp_path / "run", *OPTIONS, "--method", method, device="cuda")
    assert all(map(math.isfinite, losses(tmp_path / "run", 4)))


@pytest.mark.timeout(2 * COMPILE_SECONDS + 60)
@pytest.mark.parametrize(
    ("device", "options"),
    [
        pytest.param("cpu", "--runtime.precision bf16", marks=pytest.mark.slow),
        *(
            pytest.param("cuda", options, marks=pytest.mark.gpu)
            for options in (
                "",
                "--runtime.precision bf16",
                *(
                    f"--runtime.compile {mode}"
                    for mode in compile_modes()
                    if mode != "max-autotune"  # chooses kernels by their speed
                ),
            )
        ),
    ],
)
def test_a_resumed_run_has_the_same_bits(device: str, options: str, tmp_path: Path) -> None:
    straight, resumed = tmp_path / "straight", tmp_path / "resumed"
    arguments = (*OPTIONS, "--runtime.deterministic", "true", *options.split())
    run_population(2, straight, *arguments, device=device, limit=COMPILE_SECONDS)
    first = straight / "checkpoints/epoch_0001"
    shutil.copytree(first, resumed / "checkpoints/epoch_0001")
    shutil.copy(straight / "config.yaml", resumed)
    arguments += ("--resume", "must")
    run_population(2, resumed, *arguments, device=device, limit=COMPILE_SECONDS)
    for network in (0, 1):
        one, other = (checkpoint(run, EPOCHS, network) for run in (straight, resumed))
        assert_same_bits(one["model"], other["model"])
        assert_same_bits(optimizer_tensors(one), optimizer_tensors(other))


@pytest.mark.parametrize(
    ("device", "way"),
    [
        pytest.param("cpu", "stop", marks=pytest.mark.slow),
        *(pytest.param("cuda", way, marks=pytest.mark.gpu) for way in ("kill", "stop")),
    ],
)
def test_a_network_that_fails_ends_the_run(device: str, way: str, tmp_path: Path) -> None:
    """A killed network at once, a stopped one after the timeout."""
    seconds = 10 if device == "cuda" else 5
    options = (
        *(*OPTIONS, "--data.train_samples", str(32 * LATER_STEPS), "--epochs", "40"),
        *("--runtime.timeout_seconds", str(seconds), "--runtime.device", device),
        *("--runtime.timeout_epochs", "1", "--checkpoint.every", "0"),
    )
    train = program(tmp_path / "run", *options)
    command = [train[0], FAULTY, way, "1", str(STEPS), "--", *train[3:]]
    with running([command] * 2, device=device) as (survivor, failed):
        done = wait_for_end(survivor, 60 + PROMPT_SECONDS + seconds)
        failed.kill()
    error_line(done, "network 1")


@pytest.mark.parametrize("device", ON_BOTH)
def test_a_network_without_memory_ends_the_run(device: str, tmp_path: Path) -> None:
    peer, out_of_memory = end_population(
        2,
        tmp_path / "run",
        *(*OPTIONS, "--model.name", "gpu_models:Hungry"),
        device=device,
        **ON_TESTS_PATH,
    )
    error_line(out_of_memory, "out of GPU memory", "data.batch_size")
    error_line(peer, "network 1")
