"""The story of a run, from an empty directory to its summary, as one network's process lives it."""

from __future__ import annotations

import json
import logging
import statistics
import time
from typing import Any

import torch

from dist_graft.config import TrainConfig
from dist_graft.draws import stream_seed
from dist_graft.errors import ConfigError, NonFiniteError
from dist_graft.grafting.criteria import invalid_filters, is_finite
from dist_graft.grafting.rules import Ring
from dist_graft.grafting.units import GraftUnit, graft_tensors, graft_units
from dist_graft.monitoring.console import progress_bar, table
from dist_graft.monitoring.log import open_log
from dist_graft.monitoring.metrics import EpochMetrics, MetricsFile
from dist_graft.monitoring.tensorboard import LayerView, NetworkBoard, PopulationBoard
from dist_graft.population.grafter import Grafter, GraftRecord
from dist_graft.population.runtime import Runtime
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
from dist_graft.training.learning_rates import learning_rates
from dist_graft.training.loop import EvalResult, Trainee, accuracy, evaluate, train_steps
from dist_graft.training.models import build_model
from dist_graft.training.optim import build_optimizer, build_scheduler
from dist_graft.training.run_directory import RunDirectory

INVALID_THRESHOLDS = (0.1, 0.01)
"""L1 norms below which a filter counts as invalid, as in arXiv 2001.05868."""


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
    units = _graft_units(config, trainee)
    rounds = config.graft.every if config.method == "graft" and networks > 1 else 0
    rule = Ring(
        amplitude=config.graft.amplitude,
        sensitivity=config.graft.sensitivity,
        num_bins=config.graft.num_bins,
        criterion=config.graft.criterion,
    )
    grafter = None
    if rounds:
        grafter = Grafter(
            trainee.model,
            lead=config.graft.lead,
            exchange=config.graft.exchange,
            bucket_mb=config.graft.bucket_mb,
            rule=rule,
            roll_call=runtime.roll_call,
        )

    start_epoch, round_, earlier_seconds = _resume(config, runtime, directory, trainee, log)
    if grafter:
        grafter.round = round_
    if start_epoch >= config.epochs:
        log.info("%s is complete: all of its %d epochs are done", directory.path, config.epochs)
        runtime.finish()
        return
    if speaks:
        directory.describe(config, networks)
    _say_hello(log, config, runtime, data, trainee, start_epoch)
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
        round_every=rounds,
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
        layers = _look_at_layers(config, trainee, units, rule, segment.round, epoch)

        record = None
        if segment.round and grafter:
            try:
                record = grafter.graft()
            except NonFiniteError as error:
                raise NonFiniteError(f"epoch {epoch}: {error}") from error
            if config.graft.reset_momentum:
                trainee.optimizer.state.clear()
            round_ = grafter.round
            layers = LayerView(
                criterion=layers.criterion, information=record.information, invalid=layers.invalid
            )

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
            board.epoch(metrics, layers)
        row = [
            lr,
            trained.loss,
            trained.accuracy,
            tested.loss,
            tested.accuracy,
            metrics.images_per_second,
            -1 if record is None else record.donor,
            min(record.coefficient.values()) if record else 1.0,
            max(record.coefficient.values()) if record else 1.0,
        ]
        everyone = runtime.gather(row, f"the report of epoch {epoch}")
        log.info("%s", _epoch_text(epoch, config.epochs, trained.seconds, everyone))
        if population_board:
            population_board.epoch(epoch, [other[4] for other in everyone])

        seconds = earlier_seconds + time.monotonic() - began
        if segment.ends_run:
            after = evaluate(trainee, data, "test") if record else tested
            summary = _summarise(runtime, lr_of(config, runtime), tested, after, seconds)
            if board:
                board.after_last_round(after.accuracy, epoch)
            if population_board:
                for when in ("before_last_round", "after_last_round"):
                    population_board.ensemble(when, summary[f"ensemble_accuracy_{when}"], epoch)
            if speaks:
                write_atomically(directory.summary, (json.dumps(summary, indent=1) + "\n").encode())
            log.info("%s", _summary_text(summary))
        if segment.save:
            _save(config, runtime, directory, trainee, epoch + 1, round_, seconds)

    if board:
        board.close()
    if population_board:
        population_board.close()
    if speaks:
        log.info("results in %s; to look at them: tensorboard --logdir %s", *[directory.path] * 2)
    runtime.finish()


def build_trainee(config: TrainConfig, data: Data, runtime: Runtime) -> Trainee:
    """This process's network with its optimizer, as it is before the first step."""
    network = runtime.place.network
    torch.manual_seed(stream_seed("init", config.seed, 0 if config.model.shared_init else network))
    model = build_model(config.model, num_classes=data.num_classes, channels=data.channels)
    model.to(runtime.device)
    if config.runtime.channels_last:
        model.to(memory_format=torch.channels_last)
    optimizer = build_optimizer(config.optim, model, lr=lr_of(config, runtime))
    return Trainee(
        model=model,
        forward=torch.compile(model) if config.runtime.compile else model,
        optimizer=optimizer,
        scheduler=build_scheduler(
            config.optim,
            optimizer,
            epochs=config.epochs,
            steps_per_epoch=data.steps_per_epoch,
        ),
        scaler=torch.amp.GradScaler(
            runtime.device.type, enabled=config.runtime.precision == "fp16"
        ),
        precision=config.runtime.precision,
        device=runtime.device,
        seed=config.seed,
        network=network,
    )


def lr_of(config: TrainConfig, runtime: Runtime) -> float:
    """Largest learning rate of this process's network."""
    return learning_rates(config.optim, runtime.place.networks)[runtime.place.network]


def _graft_units(config: TrainConfig, trainee: Trainee) -> list[GraftUnit]:
    try:
        return graft_units(trainee.model, lead=config.graft.lead)
    except ValueError as error:
        raise ConfigError(f"model {config.model.name} cannot be grafted: {error}") from error


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


def _look_at_layers(
    config: TrainConfig,
    trainee: Trainee,
    units: list[GraftUnit],
    rule: Ring,
    round_follows: bool,
    epoch: int,
) -> LayerView:
    """Information and invalid filters per unit; a weight that is not finite ends the run."""
    tensors = graft_tensors(trainee.model)
    information = {}
    if not round_follows:  # else the round agrees on it, and the others hear of it
        for key, tensor in tensors.items():
            if not is_finite(tensor):
                raise NonFiniteError(
                    f"epoch {epoch}: network {trainee.network} has a weight that is not finite in "
                    f"{key}: a lower learning rate, warm-up or clipping may help"
                )
        for unit in units:
            filters = unit.filters(tensors[unit.lead].detach())
            information[unit.name] = float(rule.information(filters))
    invalid = {
        threshold: {
            unit.name: int(invalid_filters(unit.filters(tensors[unit.lead]), threshold))
            for unit in units
        }
        for threshold in INVALID_THRESHOLDS
    }
    return LayerView(criterion=config.graft.criterion, information=information, invalid=invalid)


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


def _summarise(
    runtime: Runtime, lr: float, before: EvalResult, after: EvalResult, seconds: float
) -> dict[str, Any]:
    """Accuracies of all networks, their mean and their ensemble (mean probability): a collective."""
    rows = runtime.gather([lr, before.accuracy, after.accuracy], "the summary")
    summary: dict[str, Any] = {
        "networks": [
            {
                "network": network,
                "lr": row[0],
                "accuracy_before_last_round": row[1],
                "accuracy_after_last_round": row[2],
            }
            for network, row in enumerate(rows)
        ]
    }
    for column, (when, result) in enumerate(
        (("before_last_round", before), ("after_last_round", after)), start=1
    ):
        summary[f"mean_accuracy_{when}"] = statistics.fmean(row[column] for row in rows)
        scores = runtime.sum(result.probabilities, "the ensemble")
        summary[f"ensemble_accuracy_{when}"] = accuracy(scores, result.labels)
    return summary | {"wall_seconds": seconds}


def _say_hello(
    log: logging.Logger,
    config: TrainConfig,
    runtime: Runtime,
    data: Data,
    trainee: Trainee,
    start_epoch: int,
) -> None:
    networks = runtime.place.networks
    weights = sum(parameter.numel() for parameter in trainee.model.parameters())
    log.info(
        "%d x %s (%s parameters) on %s: %s images of %d x %d x %d, %d classes; epoch %d to %d; "
        "%s on %s, %d threads a process; run directory %s",
        networks,
        config.model.name,
        f"{weights:,}",
        config.data.name,
        f"{data.train_size:,}",
        data.channels,
        data.image_size,
        data.image_size,
        data.num_classes,
        start_epoch + 1,
        config.epochs,
        config.runtime.precision,
        f"{runtime.device} over {runtime.backend}" if networks > 1 else str(runtime.device),
        torch.get_num_threads(),
        config.run_dir,
    )


def _epoch_text(epoch: int, epochs: int, seconds: float, everyone: list[list[float]]) -> str:
    header = ("network", "lr", "train loss", "train %", "test loss", "test %", "images/s", "keeps")
    rows = []
    for network, (lr, loss, train, test_loss, test, speed, donor, low, high) in enumerate(everyone):
        keeps = "all" if donor < 0 else f"{low:.2f}-{high:.2f}, rest of {donor:.0f}"
        rows.append(
            (
                str(network),
                f"{lr:.4g}",
                f"{loss:.4f}",
                f"{train:.2f}",
                f"{test_loss:.4f}",
                f"{test:.2f}",
                f"{speed:.0f}",
                keeps,
            )
        )
    return f"epoch {epoch + 1}/{epochs} ({seconds:.1f} s)\n{table(header, rows)}"


def _summary_text(summary: dict[str, Any]) -> str:
    header = ("test accuracy, %", "before the last round", "after it")
    whens = ("accuracy_before_last_round", "accuracy_after_last_round")
    rows = [
        (f"network {row['network']} (lr {row['lr']:.4g})", *(f"{row[when]:.2f}" for when in whens))
        for row in summary["networks"]
    ]
    for name in ("mean", "ensemble"):
        rows.append((name, *(f"{summary[f'{name}_{when}']:.2f}" for when in whens)))
    return table(header, rows)
