"""The story of a run, from an empty directory to its summary, as one network's process lives it."""

from __future__ import annotations

import json
import socket
import sys
import time
from functools import partial

import torch

from dist_graft.config import TrainConfig
from dist_graft.errors import RoundStoppedError
from dist_graft.monitoring.console import NetworkRow, ProgressBar
from dist_graft.monitoring.log import open_log
from dist_graft.monitoring.metrics import EpochMetrics
from dist_graft.population.place import Place
from dist_graft.population.process import leave
from dist_graft.population.runtime import Runtime
from dist_graft.population.stopping import StopRequests
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
from dist_graft.training.checkpoint import write_atomically
from dist_graft.training.checkpointing import Checkpoints, Progress
from dist_graft.training.clock import Position, segments
from dist_graft.training.data import Data, ensure_available, load_data
from dist_graft.training.layers import check_finite, look_at_layers, naming_epoch
from dist_graft.training.loop import Trainee, current_lr, evaluate, train_steps
from dist_graft.training.reporting import Reporter, row_of, with_round
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

    checkpoints = Checkpoints(config, runtime, directory, trainee, log)
    progress = checkpoints.resume()
    start, earlier_seconds = progress.position, progress.seconds
    round_ = start.round
    if grafter:
        grafter.round = round_
        grafter.check()
    if start.epoch >= config.epochs:
        log.info("%s is complete: all of its %d epochs are done", directory.path, config.epochs)
        runtime.finish()
        return
    if speaks:
        directory.describe(config, networks)
        directory.stopped.unlink(missing_ok=True)
    log.info("%s", _opening(config, runtime, data, trainee, start.epoch))
    reporter = Reporter(
        config, directory, network=network, speaks=speaks, start_epoch=start.epoch, log=log
    )
    bar = ProgressBar(config.monitor.progress, show=runtime.place.local_rank == 0)
    requests = StopRequests(
        directory.stop,
        runtime.roll_call,
        grace_seconds=config.checkpoint.grace_seconds,
        late=partial(_leave_without_peers, runtime.place, config.checkpoint.grace_seconds),
    )
    requests.listen()

    for segment in segments(
        epochs=config.epochs,
        steps_per_epoch=data.steps_per_epoch,
        cadence=cadence,
        save_every=config.checkpoint.every,
        start=start,
    ):
        epoch = segment.epoch
        if segment.first == 0:
            progress = Progress(lr=current_lr(trainee))
        if segment.first == 0 or (epoch, segment.first) == (start.epoch, start.step):
            bar.start(
                steps=data.steps_per_epoch, done=segment.first, epoch=epoch, epochs=config.epochs
            )
        stretch = train_steps(
            trainee,
            data,
            config.optim,
            epoch=epoch,
            first=segment.first,
            last=segment.last,
            on_step=bar.step,
            stop=requests.asked,
        )
        progress.trained = progress.trained + stretch if progress.trained else stretch
        progress.position = Position(epoch, segment.first + stretch.steps, round_)
        progress.seconds = earlier_seconds + time.monotonic() - began

        if segment.evaluate and not requests.asked():
            bar.stop()
            tested = evaluate(trainee, data, "test")
            validated = evaluate(trainee, data, "val") if data.has_validation else None
            layers = look_at_layers(config, trainee, units)
        # Here the networks meet, and all go on or all stop.
        stop = requests.asked()
        if segment.round and grafter:
            steps = epoch * data.steps_per_epoch + segment.last
            try:
                with naming_epoch(epoch):
                    record = grafter.graft(rate=rate(steps), stop=stop)
            except RoundStoppedError:
                stop = True
            else:
                progress.rounds = with_round(progress.rounds, record)
                round_ = grafter.round
        elif segment.evaluate or stop:
            votes = runtime.gather([float(stop)], f"the end of epoch {epoch}")
            stop = [1.0] in votes
        if stop:
            bar.stop()
            reporter.close()
            checkpoints.leave(progress, requests.reason or requests.heard())
        if segment.round and not grafter:
            graft_itself(trainee, units, config.graft, round_)
            round_ += 1
        if segment.round and config.graft.reset_momentum:
            trainee.optimizer.state.clear()
        if not segment.evaluate:
            continue
        if not (segment.round and grafter):
            check_finite(trainee, epoch)

        trained = progress.trained
        metrics = EpochMetrics(
            epoch=epoch,
            lr=progress.lr or 0.0,
            train_loss=trained.loss,
            train_accuracy=trained.accuracy,
            test_loss=tested.loss,
            test_accuracy=tested.accuracy,
            val_loss=validated.loss if validated else None,
            val_accuracy=validated.accuracy if validated else None,
            images_per_second=trained.images / trained.seconds,
            graft=progress.rounds,
        )
        reporter.network(metrics, layers)
        numbers = runtime.gather(row_of(metrics).numbers(), f"the report of epoch {epoch}")
        reporter.population(epoch, trained.seconds, [NetworkRow(*other) for other in numbers])

        seconds = earlier_seconds + time.monotonic() - began
        if segment.ends_run:
            after = evaluate(trainee, data, "test") if segment.round else tested
            summary = summarise(runtime, lr_of(config, runtime), tested, after, seconds)
            if speaks:
                write_atomically(directory.summary, (json.dumps(summary, indent=1) + "\n").encode())
            reporter.summary(summary, network)
        if segment.save:
            checkpoints.save(Progress(Position(epoch + 1, 0, round_), seconds))

    reporter.close()
    if speaks:
        log.info("results in %s; to look at them: tensorboard --logdir %s", *[directory.path] * 2)
    runtime.finish()


def _leave_without_peers(place: Place, seconds: float) -> None:
    """End a process that was asked to stop, and whose peers do not agree to."""
    print(
        f"dist-graft: error: network {place.network} (rank {place.rank} on {socket.gethostname()})"
        f": could not stop in good order within {seconds:g} s (--checkpoint.grace_seconds); the "
        "same command goes on from the newest checkpoint",
        file=sys.stderr,
        flush=True,
    )
    leave(1)


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
