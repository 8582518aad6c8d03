"""Callbacks of an epoch in which every collective and every access to the store raises."""

from __future__ import annotations

import inspect
from pathlib import Path

import pytest
import torch.distributed as dist

import dist_graft
from dist_graft.config import DataConfig, ModelConfig, RuntimeConfig
from dist_graft.population.runtime.store import StoreClient
from dist_graft.training.callbacks import CallbackList

COLLECTIVES = (
    *("all_gather", "all_gather_into_tensor", "all_gather_object", "all_gather_single"),
    *("all_reduce", "all_to_all", "barrier", "batch_isend_irecv", "broadcast", "gather"),
    *("broadcast_object_list", "monitored_barrier", "new_group", "recv"),
    *("reduce", "reduce_scatter", "reduce_scatter_single", "scatter", "send"),
)


class ReadsProperties(dist_graft.Callback):
    """Reads every property of the trainer and of its parts in every hook of training."""


def read_properties(callback: ReadsProperties, trainer: dist_graft.Trainer, *_: object) -> None:
    parts = (trainer, trainer.state, trainer.data, trainer.checkpoints, trainer.grafter)
    parts += (trainer.runtime, trainer.replicas, trainer.runtime.timeouts, trainer.process)
    for part in parts:
        for name, member in inspect.getmembers(type(part)):
            if isinstance(member, property):
                getattr(part, name)


HOOKS = [name for name in vars(dist_graft.Callback) if name.startswith("on_")]
for hook in HOOKS:
    setattr(ReadsProperties, hook, read_properties)


class Communicates(dist_graft.Callback):
    """Calls a collective, which callbacks must not do."""

    def on_step_end(self, trainer: dist_graft.Trainer) -> None:
        dist.barrier()


def train(run_dir: str, kind: type[dist_graft.Callback]) -> int:
    """Train with all built-in callbacks, which may not communicate; returns the steps taken."""
    in_callback = False

    def refuse(name, function):
        def guarded(*args, **kwargs):
            if in_callback:
                raise RuntimeError(f"a callback called {name}")
            return function(*args, **kwargs)

        return guarded

    for name in COLLECTIVES:
        if hasattr(dist, name):  # some names are new in torch 2.13
            setattr(dist, name, refuse(name, getattr(dist, name)))
    StoreClient._request = refuse("the store", StoreClient._request)
    call = CallbackList.call

    def flagged(self, *args):
        nonlocal in_callback
        in_callback = True
        try:
            call(self, *args)
        finally:
            in_callback = False

    CallbackList.call = flagged
    config = dist_graft.TrainConfig(
        run_dir=run_dir,
        epochs=1,
        data=DataConfig(train_samples=48, test_samples=16, batch_size=16),
        model=ModelConfig(name="resnet8"),
        runtime=RuntimeConfig(device="cpu", threads=1, replicas=2),
    )
    trainer = dist_graft.Trainer(config, callbacks=[kind()])
    trainer.fit()
    assert (
        "failed" not in (trainer.directory.network(trainer.process.network) / "log.txt").read_text()
    )
    return trainer.global_step


def test_no_callback_and_no_property_communicates(tmp_path: Path) -> None:
    assert len(HOOKS) > 8
    steps = dist_graft.launch(train, str(tmp_path / "run"), ReadsProperties, networks=2, replicas=2)
    assert steps == [3] * 4


def test_a_callback_that_communicates_is_noticed(tmp_path: Path) -> None:
    with pytest.raises(dist_graft.NetworkFailedError, match="a callback called barrier"):
        dist_graft.launch(train, str(tmp_path / "run"), Communicates, networks=2, replicas=2)
