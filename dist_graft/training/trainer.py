"""The story of a run, from an empty directory to its summary, as one network's process lives it."""

from __future__ import annotations

import json
import logging
import time

import torch

from dist_graft.config import TrainConfig
from dist_graft.errors import ConfigError
from dist_graft.monitoring.console import NetworkRow, ProgressBar
from dist_graft.monitoring.log import open_log
from dist_graft.monitoring.metrics import EpochMetrics
from dist_graft.population.grafter import GraftRecord
from dist_graft.population.runtime import Runtime
from dist_graft.training.assembly import (
    build_cadence,
    build_grafter,
    build_rate,
    build_rule,
    build_trainee,
    build_units,
    grafts_itself,
    lr_of,
)
from dist_graft.training.checkpoint import (
    CheckpointSet,
    clear_after,
    complete_set,
    load_network,
    prune,
    save_network,
    set_path,
    write_atomically,
)
from dist_graft.training.clock import segments
from dist_graft.training.data import Data, ensure_available, load_data
from dist_graft.training.layers import check_finite, look_at_layers, naming_epoch
from dist_graft.training.loop import Trainee, TrainResult, current_lr, evaluate, train_steps
from dist_graft.training.reporting import Reporter, graft_entry, row_of
from dist_graft.training.run_directory import RunDirectory
from dist_graft.training.scions import graft_itself
from dist_graft.training.summary import summarise


def fit(config: TrainConfig, runtime: Runtime) -> None:
    """Train this process's network, with rounds between the networks; every process calls this.

    Raises: a DistGraftError whose text says what to do; nothing finished is overwritten.
    """
    began = time.monotonic()
    network, networks = runtime.place.network, runtime.place.networks
    speaks = runtime.place.rank == 0
    directory = RunDirectory(config.run_dir)
    if speaks:
        directory.check(config, networks)
    runtime.gather([0.0], "the check of the run directory")
    folders = [directory.network(network), *([directory.population] if speaks else [])]
    log = open_log(*folders, console=speaks)

    if runtime.place.local_rank == 0:
        ensure_available(config.data)
    runtime.gather([0.0], "the preparation of the data")
    data = load_data(
        config.data,
        seed=config.seed,
        network=network,
        device=runtime.device,
        channels_last=config.runtime.channels_last,
    )
    trainee = build_trainee(config, data, runtime)
    units = build_units(config, trainee)
    cadence = build_cadence(config, networks)
    rate = build_rate(config, data.steps_per_epoch)
    grafter = None
    if not cadence.never and not grafts_itself(config):
        grafter = build_grafter(config, trainee, build_rule(config, trainee, units), runtime)

    start_epoch, round_, earlier_seconds = _resume(config, runtime, directory, trainee, log)
    if grafter:
        grafter.round = round_
        grafter.check()
    if start_epoch >= config.epochs:
        log.info("%s is complete: all of its %d epochs are done", directory.path, config.epochs)
        runtime.finish()
        return
    if speaks:
        directory.describe(config, networks)
    log.info("%s", _opening(config, runtime, data, trainee, start_epoch))
    reporter = Reporter(
        config, directory, network=network, speaks=speaks, start_epoch=start_epoch, log=log
    )
    bar = ProgressBar(config.monitor.progress, show=runtime.place.local_rank == 0)

    trained: TrainResult | None = None
    records: list[GraftRecord] = []
    lr = current_lr(trainee)
    for segment in segments(
        epochs=config.epochs,
        steps_per_epoch=data.steps_per_epoch,
        cadence=cadence,
        save_every=config.checkpoint.every,
        start_epoch=start_epoch,
    ):
        epoch = segment.epoch
        if segment.first == 0:
            bar.start(steps=data.steps_per_epoch, epoch=epoch, epochs=config.epochs)
            trained, records, lr = None, [], current_lr(trainee)
        stretch = train_steps(
            trainee,
            data,
            config.optim,
            epoch=epoch,
            first=segment.first,
            last=segment.last,
            on_step=bar.step,
        )
        trained = trained + stretch if trained else stretch

        if segment.evaluate:
            bar.stop()
            tested = evaluate(trainee, data, "test")
            validated = evaluate(trainee, data, "val") if data.has_validation else None
            layers = look_at_layers(config, trainee, units)
        if segment.round and grafter:
            steps = epoch * data.steps_per_epoch + segment.last
            with naming_epoch(epoch):
                records.append(grafter.graft(rate=rate(steps)))
            round_ = grafter.round
        elif segment.round:
            graft_itself(trainee, units, config.graft, round_)
            round_ += 1
        if segment.round and config.graft.reset_momentum:
            trainee.optimizer.state.clear()
        if not segment.evaluate:
            continue
        if not (segment.round and grafter):
            check_finite(trainee, epoch)

        metrics = EpochMetrics(
            epoch=epoch,
            lr=lr,
            train_loss=trained.loss,
            train_accuracy=trained.accuracy,
            test_loss=tested.loss,
            test_accuracy=tested.accuracy,
            val_loss=validated.loss if validated else None,
            val_accuracy=validated.accuracy if validated else None,
            images_per_second=trained.images / trained.seconds,
            graft=graft_entry(records),
        )
        reporter.network(metrics, layers)
        row = row_of(metrics, records[-1] if records else None)
        numbers = runtime.gather(row.numbers(), f"the report of epoch {epoch}")
        reporter.population(epoch, trained.seconds, [NetworkRow(*other) for other in numbers])

        seconds = earlier_seconds + time.monotonic() - began
        if segment.ends_run:
            after = evaluate(trainee, data, "test") if segment.round else tested
            summary = summarise(runtime, lr_of(config, runtime), tested, after, seconds)
            if speaks:
                write_atomically(directory.summary, (json.dumps(summary, indent=1) + "\n").encode())
            reporter.summary(summary, network)
        if segment.save:
            _save(config, runtime, directory, trainee, epoch + 1, round_, seconds)

    reporter.close()
    if speaks:
        log.info("results in %s; to look at them: tensorboard --logdir %s", *[directory.path] * 2)
    runtime.finish()


def _resume(
    config: TrainConfig,
    runtime: Runtime,
    directory: RunDirectory,
    trainee: Trainee,
    log: logging.Logger,
) -> tuple[int, int, float]:
    """Load the newest usable set; returns epochs and rounds finished, and seconds spent."""
    chosen: CheckpointSet | None = None
    if runtime.place.rank == 0:
        chosen, damaged = directory.newest_usable()
        for path in damaged:
            log.warning("%s is missing or damaged: going on from an older set", path)
        clear_after(directory.checkpoints, chosen.epoch if chosen else 0)
    mine = float(chosen.epoch) if chosen else 0.0
    epoch = int(runtime.gather([mine], "the choice of a checkpoint set")[0][0])
    if epoch == 0:
        return 0, 0, 0.0
    chosen, _ = directory.newest_usable()
    if chosen is None or chosen.epoch != epoch:
        raise ConfigError(
            f"this process does not see the checkpoint set of epoch {epoch} in "
            f"{directory.checkpoints}: all processes need the same run_dir on a shared disk"
        )
    name = f"network{runtime.place.network:02d}.pt"
    state = load_network(chosen.path / name, chosen.sha256[name], runtime.device)
    trainee.model.load_state_dict(state["model"])
    trainee.optimizer.load_state_dict(state["optimizer"])
    trainee.scheduler.load_state_dict(state["scheduler"])
    trainee.scaler.load_state_dict(state["scaler"])
    log.info("going on from %s: epoch %d, round %d", chosen.path, chosen.epoch, chosen.round)
    return chosen.epoch, chosen.round, float(state["seconds"])


def _save(
    config: TrainConfig,
    runtime: Runtime,
    directory: RunDirectory,
    trainee: Trainee,
    epochs_done: int,
    round_: int,
    seconds: float,
) -> None:
    """Write this network's file; rank 0 completes the set once all files are durable."""
    path = set_path(directory.checkpoints, epochs_done)
    state = {
        "network": runtime.place.network,
        "epoch": epochs_done,
        "step": 0,
        "round": round_,
        "model": trainee.model.state_dict(),
        "optimizer": trainee.optimizer.state_dict(),
        "scheduler": trainee.scheduler.state_dict(),
        "scaler": trainee.scaler.state_dict(),
        "seconds": seconds,
    }
    digest = save_network(path / f"network{runtime.place.network:02d}.pt", state)
    everyone = [digest]
    if runtime.roll_call:
        runtime.roll_call.post(f"saved/{path.name}", digest)
        if runtime.place.rank != 0:
            return
        everyone = runtime.roll_call.collect(f"saved/{path.name}", runtime.timeout_seconds)
    complete_set(path, epoch=epochs_done, round_=round_, sha256=everyone)
    prune(directory.checkpoints, config.checkpoint.keep)


def _opening(
    config: TrainConfig, runtime: Runtime, data: Data, trainee: Trainee, start_epoch: int
) -> str:
    networks = runtime.place.networks
    weights = sum(parameter.numel() for parameter in trainee.model.parameters())
    where = f"{runtime.device} over {runtime.backend}" if networks > 1 else str(runtime.device)
    return (
        f"{networks} x {config.model.name} ({weights:,} parameters) on {config.data.name}: "
        f"{data.train_size:,} images of {data.channels} x {data.image_size} x {data.image_size}, "
        f"{data.num_classes} classes; epochs {start_epoch + 1} to {config.epochs}; "
        f"{config.runtime.precision} on {where}, {torch.get_num_threads()} threads a process; "
        f"run directory {config.run_dir}"
    )
