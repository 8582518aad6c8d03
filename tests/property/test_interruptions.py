"""The final weights do not depend on when and how a run is interrupted."""

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
from typing import Literal, get_args

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
from dist_graft.training.checkpoint.files import COMPLETE, complete_checkpoints
from dist_graft.training.trainer import Trainer

EPOCHS, STEPS = 3, 4
Interruption = Literal["die", "stop", "die and damage", "die and lose COMPLETE.json"]
KINDS: tuple[Interruption, ...] = get_args(Interruption)
INTERRUPTIONS = st.lists(
    st.tuples(st.sampled_from(KINDS), st.integers(1, EPOCHS * STEPS)), min_size=1, max_size=4
)


class DiedError(BaseException):
    """Simulates the death of the process."""


def config(folder: Path, *, every_steps: int, every: int) -> TrainConfig:
    """Configure one network that grafts itself, inside its epochs and at their ends."""
    return TrainConfig(
        run_dir=str(folder),
        epochs=EPOCHS,
        data=DataConfig(train_samples=16 * STEPS, test_samples=20, batch_size=16),
        model=ModelConfig(name="resnet8"),
        optim=OptimConfig(accumulation=2),
        graft=GraftConfig(source="noise", threshold=4.0, every_steps=every_steps),
        runtime=RuntimeConfig(device="cpu", threads=1),
        checkpoint=CheckpointConfig(every=every, grace_seconds=3600),
        monitor=MonitorConfig(tensorboard=False, progress="lines"),
    )


@contextmanager
def after_step(step: int, action: Callable[[], None]) -> Iterator[None]:
    """Call a function after the given number of optimizer steps."""
    steps = itertools.count(1)

    def hook(*_: object) -> None:
        if next(steps) == step:
            action()

    handle = register_optimizer_step_post_hook(hook)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        handle.remove()
        for number, handler in handlers.items():
            signal.signal(number, handler)
        for thread in threading.enumerate():  # a write in progress finishes
            if thread.name.startswith("checkpoint"):
                thread.join()


def die() -> None:
    raise DiedError


def damage(folder: Path, kind: Interruption) -> None:
    """Corrupt the newest checkpoint or make it incomplete, depending on the kind."""
    checkpoints = complete_checkpoints(folder / "checkpoints")
    if not checkpoints:
        return
    if kind == "die and lose COMPLETE.json":
        (checkpoints[-1].path / COMPLETE).unlink()
    elif kind == "die and damage" and len(checkpoints) > 1:  # a run without any other refuses
        path = checkpoints[-1].path / "network00.pt"
        path.write_bytes(path.read_bytes()[:-1])


def train(run: TrainConfig, interruptions: Sequence[tuple[Interruption, int]]) -> dict[str, Tensor]:
    """Train with one interruption per start, then to the end; returns the final weights."""
    for kind, step in interruptions:
        action = die if kind != "stop" else lambda: os.kill(os.getpid(), signal.SIGTERM)
        try:
            with after_step(step, action):
                Trainer(run).fit()
        except (DiedError, StoppedEarlyError):
            damage(Path(run.run_dir), kind)
    with after_step(0, die):
        Trainer(run).fit()
    weights: dict[str, Tensor] = checkpoint(Path(run.run_dir), EPOCHS, 0)["model"]
    return weights


@cache
def uninterrupted(every_steps: int) -> dict[str, Tensor]:
    with tempfile.TemporaryDirectory() as folder:
        return train(config(Path(folder) / "run", every_steps=every_steps, every=1), [])


@pytest.mark.slow
@settings(max_examples=12)
@given(INTERRUPTIONS, st.sampled_from([0, 3, 4]), st.sampled_from([0, 1, 2]))
def test_final_weights_do_not_depend_on_interruptions(
    interruptions: list[tuple[Interruption, int]], every_steps: int, every: int
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        run = config(Path(folder) / "run", every_steps=every_steps, every=every)
        assert_same_bits(uninterrupted(every_steps), train(run, interruptions))


def test_rounds_change_the_weights() -> None:
    first, second = uninterrupted(0), uninterrupted(3)
    assert any(not torch.equal(first[key], second[key]) for key in first)
