"""Reports of a run: the first lines of its log, and the results of an epoch."""

from __future__ import annotations

import logging
import math
import socket
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from dist_graft.config import TrainConfig
from dist_graft.config.members import member_options
from dist_graft.monitoring.metrics import EpochMetrics, LayerStats, NetworkRow
from dist_graft.population.runtime.process_info import ProcessInfo
from dist_graft.printing import format_table
from dist_graft.training.builders import describe_data
from dist_graft.training.checkpoint.manager import Progress
from dist_graft.training.data import Data
from dist_graft.training.data.loader import too_many_workers
from dist_graft.training.learning_rates import initial_rates
from dist_graft.training.step import EvalResult

if TYPE_CHECKING:
    from dist_graft.training.trainer import Trainer

_LARGE_TEST_LOSS = 100.0
"""Cross entropy that only diverging networks reach; guessing gives ln(classes)."""


def log_start(trainer: Trainer) -> None:
    """Log the run, the options of this network, and a warning if there are too many workers."""
    config, process, log = trainer.config, trainer.process, trainer.log
    log.info("%s", startup_message(trainer))
    if own := member_options(config, process.network):
        options = ", ".join(f"{name} {value}" for name, value in own.items())
        log.info("options of network %d: %s", process.network, options)
    warning = too_many_workers(trainer.data.workers, process)
    if warning and process.is_main:
        log.warning("%s", warning)
    rounds = trainer.cadence.rounds_before(config.epochs, 0, trainer.steps_per_epoch)
    if not (rounds or trainer.cadence.never) and process.is_main:
        log.warning(
            "no round takes place before the run ends, after %d steps: shorten the interval "
            "between rounds, or train longer",
            config.epochs * trainer.steps_per_epoch,
        )


def startup_message(trainer: Trainer) -> str:
    """First lines of the log: model, data, devices, and how to stop and monitor the run."""
    config, process, data = trainer.config, trainer.process, trainer.data
    run_dir = trainer.directory.path
    weights = sum(parameter.numel() for parameter in trainer.model.parameters())
    device, runtime, threads = trainer.device.type, trainer.runtime, torch.get_num_threads()
    where = f"{device} over {runtime.backend}" if process.world_size > 1 else device
    counted = f"processes, {process.replicas} per network," if process.replicas > 1 else "networks"
    who = f"{process.local_world_size} of {process.world_size} {counted}"
    stop, look = trainer.directory.stop, f"dist-graft status {run_dir}"
    if "tensorboard" in config.monitor.loggers:
        look += f"; tensorboard --logdir {run_dir}"
    if trainer.directory.job is not None:
        replicas = f", {process.replicas} processes," if process.replicas > 1 else ""
        who = f"network {process.network} of {process.networks}{replicas}"
        stop = trainer.directory.stop_job
    return "\n".join(
        [
            f"{process.networks} x {trainer.model_name} ({weights:,} parameters), method "
            f"{config.method}, epochs {trainer.epoch + 1} to {config.epochs}, in {run_dir}",
            f"data     {describe_data(config, data)}",
            f"where    {who} on "
            f"{socket.gethostname()}; {where}, {config.runtime.precision}, "
            f"{threads} thread{'s' if threads > 1 else ''} each",
            f"to stop  Ctrl-C, or touch {stop}; rerun the command to resume",
            f"to look  {look}",
        ]
    )


def process_row(process: ProcessInfo, device: torch.device) -> str:
    """This process's row of `process_table`, as text."""
    name = str(device)
    if device.type == "cuda":
        name = f"{name} ({torch.cuda.get_device_name(device)})"
    replica = (str(process.replica),) if process.replicas > 1 else ()
    return "\t".join(
        [str(process.network), *replica, str(process.rank), socket.gethostname(), name]
    )


def process_table(process: ProcessInfo, rows: list[str]) -> str:
    """Table of the processes of a run, from their rows by rank."""
    replica = ("replica",) if process.replicas > 1 else ()
    header = ("network", *replica, "rank", "host", "device")
    return format_table(header, [text.split("\t") for text in rows])


def warn_of_skipped_images(log: logging.Logger, data: Data, epoch: int) -> None:
    """Warn about broken images that were skipped (data.skip_broken)."""
    skipped: Mapping[str, str] = getattr(data, "skipped", {})
    if skipped:
        path, reason = next(iter(skipped.items()))
        log.warning(
            "epoch %d: broken images skipped so far: %d, the first is %s (%s)",
            epoch,
            len(skipped),
            path,
            reason,
        )


def warn_of_learning_rates(trainer: Trainer, epoch: int, networks: Sequence[NetworkRow]) -> None:
    """Warn about each network whose test loss after the first epoch shows divergence.

    Rank 0 logs all networks, other ranks their own.
    """
    process = trainer.process
    largest = _LARGE_TEST_LOSS if trainer.task.classification else math.inf
    rates = initial_rates(trainer.config, process.networks)
    for network, row in enumerate(networks, process.first_network):
        listed = process.is_main or network == process.network
        if epoch == 0 and listed and not row.test_loss <= largest:
            trainer.log.warning(
                "network %d: test loss %.3g after the first epoch; if it does not recover, use "
                "a lower learning rate (optim.lr is %g)",
                *(network, row.test_loss, rates[network]),
            )


def rate_hint(config: TrainConfig, process: ProcessInfo, epoch: int) -> str:
    """The learning rates, for errors of networks that diverge in the first epoch; else empty."""
    if epoch:
        return ""
    rates = initial_rates(config, process.networks)
    largest = max(rates)
    up_to = "up to " if min(rates) < largest else ""
    return f" (optim.lr is {up_to}{largest:g})"


def epoch_metrics(
    epoch: int,
    progress: Progress,
    results: Mapping[str, EvalResult],
    layers: LayerStats,
    *,
    phase_seconds: dict[str, float],
    options: Mapping[str, Any],
) -> EpochMetrics:
    """Results of one network in one epoch.

    Args:
        epoch: finished epoch.
        progress: with the results of training and of the rounds.
        results: of `Trainer.evaluate`.
        layers: information of the layers, before the round.
        phase_seconds: seconds of each phase.
        options: of this network.
    """
    trained, lr = progress.trained, progress.lr
    assert trained is not None
    assert lr is not None
    splits = {name: {"loss": result.loss, **result.metrics} for name, result in results.items()}
    return EpochMetrics(
        epoch=epoch,
        lr=lr,
        train={"loss": trained.loss, **trained.metrics},
        test=splits["test"],
        val=splits.get("val"),
        ema_test=splits.get("ema_test"),
        images_per_second=trained.samples / trained.seconds,
        phase_seconds=phase_seconds,
        information=dict(layers.information),
        graft=progress.rounds,
        options=options,
    )
