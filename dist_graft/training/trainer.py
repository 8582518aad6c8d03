"""The story of a run, from an empty directory to its summary, as one network's process lives it."""

from __future__ import annotations

import json
import logging
import time
from typing import Any

import torch

from dist_graft.config import TrainConfig
from dist_graft.errors import ConfigError, NonFiniteError
from dist_graft.monitoring.console import NetworkRow, epoch_text, progress_bar, summary_text
from dist_graft.monitoring.log import open_log
from dist_graft.monitoring.metrics import EpochMetrics, MetricsFile
from dist_graft.monitoring.tensorboard import LayerView, NetworkBoard, PopulationBoard
from dist_graft.population.grafter import GraftRecord
from dist_graft.population.runtime import Runtime
from dist_graft.training.assembly import (
    build_grafter,
    build_rule,
    build_trainee,
    build_units,
    epochs_between_rounds,
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
from dist_graft.training.layers import check_finite, count_invalid, layer_information
from dist_graft.training.loop import Trainee, evaluate, train_steps
from dist_graft.training.run_directory import RunDirectory
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
    log = open_log(directory.network(network), console=speaks)

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
    units, rule = build_units(config, trainee), build_rule(config)
    round_every = epochs_between_rounds(config, networks)
    grafter = build_grafter(config, trainee, rule, runtime) if round_every else None

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
    metrics_file = MetricsFile(
        directory.network(network) / "metrics.jsonl", start_epoch=start_epoch
    )
    board = population_board = None
    if config.monitor.tensorboard:
        board = NetworkBoard(directory.network(network), start_epoch=start_epoch)
        if speaks:
            population_board = PopulationBoard(directory.population, start_epoch=start_epoch)

    for segment in segments(
        epochs=config.epochs,
        steps_per_epoch=data.steps_per_epoch,
        round_every=round_every,
        save_every=config.checkpoint.every,
        start_epoch=start_epoch,
    ):
        epoch = segment.epoch
        lr = float(trainee.optimizer.param_groups[0]["lr"])
        bar = None
        if runtime.place.local_rank == 0:
            bar = progress_bar(
                config.monitor.progress,
                steps=segment.last - segment.first,
                epoch=epoch,
                epochs=config.epochs,
            )
        trained = train_steps(
            trainee,
            data,
            config.optim,
            epoch=epoch,
            first=segment.first,
            last=segment.last,
            on_step=bar.update if bar else None,
        )
        if bar:
            bar.close()
        tested = evaluate(trainee, data, "test")
        validated = evaluate(trainee, data, "val") if data.has_validation else None
        invalid = count_invalid(trainee, units)

        record = None
        if segment.round and grafter:
            try:
                record = grafter.graft()
            except NonFiniteError as error:
                raise NonFiniteError(f"epoch {epoch}: {error}") from error
            if config.graft.reset_momentum:
                trainee.optimizer.state.clear()
            round_ = grafter.round
            information = record.information
        else:
            check_finite(trainee, epoch)
            information = layer_information(trainee, units, rule)

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
            graft=_graft_entry(record),
        )
        metrics_file.write(metrics)
        if board:
            layers = LayerView(
                criterion=config.graft.criterion, information=information, invalid=invalid
            )
            board.epoch(metrics, layers)
        row = NetworkRow(
            lr=lr,
            train_loss=trained.loss,
            train_accuracy=trained.accuracy,
            test_loss=tested.loss,
            test_accuracy=tested.accuracy,
            images_per_second=metrics.images_per_second,
            donor=record.donor if record else -1,
            smallest_coefficient=min(record.coefficient.values()) if record else 1.0,
            largest_coefficient=max(record.coefficient.values()) if record else 1.0,
        )
        numbers = runtime.gather(row.numbers(), f"the report of epoch {epoch}")
        everyone = [NetworkRow(*other) for other in numbers]
        log.info("%s", epoch_text(epoch, config.epochs, trained.seconds, everyone))
        if population_board:
            population_board.epoch(epoch, [other.test_accuracy for other in everyone])

        seconds = earlier_seconds + time.monotonic() - began
        if segment.ends_run:
            after = evaluate(trainee, data, "test") if record else tested
            summary = summarise(runtime, lr_of(config, runtime), tested, after, seconds)
            if board:
                board.after_last_round(after.accuracy, epoch)
            if population_board:
                for when in ("before_last_round", "after_last_round"):
                    population_board.ensemble(when, summary[f"ensemble_accuracy_{when}"], epoch)
            if speaks:
                write_atomically(directory.summary, (json.dumps(summary, indent=1) + "\n").encode())
            log.info("%s", summary_text(summary))
        if segment.save:
            _save(config, runtime, directory, trainee, epoch + 1, round_, seconds)

    if board:
        board.close()
    if population_board:
        population_board.close()
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


def _graft_entry(record: GraftRecord | None) -> dict[str, Any] | None:
    if record is None:
        return None
    return {
        "round": record.round,
        "donor": record.donor,
        "seconds": record.seconds,
        "phase_seconds": record.phase_seconds,
        "bytes": record.bytes_received,
        "coefficient": record.coefficient,
        "information": record.information,
        "distance": record.distance,
    }
