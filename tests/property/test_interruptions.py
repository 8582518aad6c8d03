"""Wherever a run is interrupted, and in whatever way, its final weights are the same."""

from __future__ import annotations

import itertools
import os
import signal
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Literal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reading import assert_same_bits, checkpoint
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook

from dist_graft.config import (
    CheckpointConfig,
    DataConfig,
    GraftConfig,
    ModelConfig,
    MonitorConfig,
    OptimConfig,
    RuntimeConfig,
    TrainConfig,
)
from dist_graft.errors import StoppedEarlyError
from dist_graft.population.runtime.process_group import start
from dist_graft.population.runtime.process_info import ProcessInfo
from dist_graft.training.checkpoint.files import COMPLETE, complete_checkpoints
from dist_graft.training.trainer import fit

EPOCHS, STEPS = 3, 4
Way = Literal["die", "stop", "die and damage", "die and cut off"]
WAYS: tuple[Way, ...] = ("die", "stop", "die and damage", "die and cut off")
INTERRUPTIONS = st.lists(
    st.tuples(st.sampled_from(WAYS), st.integers(1, EPOCHS * STEPS)), min_size=1, max_size=4
)


class DiedError(BaseException):
    """Stands for the end of the process."""


def config(folder: Path, *, every_steps: int, every: int) -> TrainConfig:
    """One network that grafts itself, inside its epochs and at their ends."""
    return TrainConfig(
        run_dir=str(folder),
        epochs=EPOCHS,
        data=DataConfig(train_samples=16 * STEPS, test_samples=20, batch_size=16),
        model=ModelConfig(name="resnet8"),
        optim=OptimConfig(accumulation=2),
        graft=GraftConfig(source="noise", threshold=4.0, every_steps=every_steps),
        runtime=RuntimeConfig(device="cpu", threads=1),
        checkpoint=CheckpointConfig(every=every, grace_seconds=3600),
        monitor=MonitorConfig(tensorboard=False, progress="none"),
    )


@contextmanager
def after_step(step: int, act: Callable[[], None]) -> Iterator[None]:
    """Do something after so many optimizer steps."""
    steps = itertools.count(1)

    def hook(*_: object) -> None:
        if next(steps) == step:
            act()

    handle = register_optimizer_step_post_hook(hook)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        handle.remove()
        for number, handler in handlers.items():
            signal.signal(number, handler)
        for thread in threading.enumerate():  # what was written when the process died is written
            if thread.name.startswith("checkpoint"):
                thread.join()


def die() -> None:
    raise DiedError


def harm(folder: Path, way: Way) -> None:
    """Make the newest set unusable, or one that is not complete yet."""
    sets = complete_checkpoints(folder / "checkpoints")
    if not sets:
        return
    if way == "die and cut off":
        (sets[-1].path / COMPLETE).unlink()
    elif way == "die and damage":
        path = sets[-1].path / "network00.pt"
        path.write_bytes(path.read_bytes()[:-1])


def live(run: TrainConfig, interruptions: Sequence[tuple[Way, int]]) -> dict[str, Tensor]:
    """Train with interruptions, one a life; the last life is let be. Returns the final weights."""
    for way, step in interruptions:
        act = die if way != "stop" else lambda: os.kill(os.getpid(), signal.SIGTERM)
        try:
            with after_step(step, act):
                fit(run, start(run.runtime, ProcessInfo()))
        except (DiedError, StoppedEarlyError):
            harm(Path(run.run_dir), way)
    with after_step(0, die):
        fit(run, start(run.runtime, ProcessInfo()))
    weights: dict[str, Tensor] = checkpoint(Path(run.run_dir), EPOCHS, 0)["model"]
    return weights


@cache
def undisturbed(every_steps: int) -> dict[str, Tensor]:
    with tempfile.TemporaryDirectory() as folder:
        return live(config(Path(folder) / "run", every_steps=every_steps, every=1), [])


@pytest.mark.slow
@settings(max_examples=12)
@given(INTERRUPTIONS, st.sampled_from([0, 3, 4]), st.sampled_from([0, 1, 2]))
def test_any_interruptions_leave_the_final_weights_as_they_are(
    interruptions: list[tuple[Way, int]], every_steps: int, every: int
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        run = config(Path(folder) / "run", every_steps=every_steps, every=every)
        assert_same_bits(undisturbed(every_steps), live(run, interruptions))


def test_the_rounds_matter() -> None:
    first, second = undisturbed(0), undisturbed(3)
    assert any(not torch.equal(first[key], second[key]) for key in first)
