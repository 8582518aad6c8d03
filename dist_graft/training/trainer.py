"""The story of a run, from an empty directory to its summary, as one network's process lives it."""

from __future__ import annotations

import logging
import socket
import time
from functools import partial

import torch

from dist_graft.config import TrainConfig
from dist_graft.config.validation import step_range
from dist_graft.errors import RoundStoppedError
from dist_graft.monitoring.console import NetworkRow, ProgressBar
from dist_graft.monitoring.log import open_log
from dist_graft.monitoring.profiler import StepProfile
from dist_graft.monitoring.status_file import StatusFile
from dist_graft.population.runtime.checkpoint_requests import SaveRequests
from dist_graft.population.runtime.process import leave
from dist_graft.population.runtime.process_group import Runtime
from dist_graft.population.runtime.process_info import ProcessInfo
from dist_graft.population.runtime.stop_requests import StopRequests
from dist_graft.printing import tell
from dist_graft.training.builders import (
    build_cadence,
    build_grafter,
    build_rate,
    build_rule,
    build_train_state,
    build_units,
    grafts_itself,
    lr_of,
)
from dist_graft.training.checkpoint.manager import CheckpointManager
from dist_graft.training.course import Course
from dist_graft.training.data import Data, ImageData, ensure_available, load_data
from dist_graft.training.layer_stats import check_sound, layer_stats, what_is_lost
from dist_graft.training.loop import TrainState
from dist_graft.training.reporting import Reporter, epoch_metrics, row_of
from dist_graft.training.run_directory import RunDirectory
from dist_graft.training.schedule import segments
from dist_graft.training.self_grafting import self_graft
from dist_graft.training.shared_directory import check_shared, process_table
from dist_graft.training.summary import ensemble_accuracy, summarise


def fit(config: TrainConfig, runtime: Runtime) -> None:
    """Train this process's network, with rounds between the networks; every process calls this.

    Raises: a DistGraftError whose text says what to do; nothing finished is overwritten.
    """
    began = time.monotonic()
    network, networks = runtime.process.network, runtime.process.networks
    speaks = runtime.process.rank == 0
    directory = RunDirectory(config.run_dir)
    if speaks:
        directory.check(config, networks)
        if not runtime.process.restarts:
            directory.forget_stop()
    check_shared(directory.path, runtime)
    folders = [
        *([directory.network(network)] if runtime.process.is_leader else []),
        *([directory.population] if speaks else []),
    ]
    log = open_log(*folders, console=speaks)
    bar = ProgressBar(config.monitor.progress, show=runtime.process.local_rank == 0)
    status = directory.status(network) if runtime.process.is_leader else None
    with StatusFile(status, network, bar) as live:
        _live_through(config, runtime, directory, log, live, began)


def _live_through(
    config: TrainConfig,
    runtime: Runtime,
    directory: RunDirectory,
    log: logging.Logger,
    live: StatusFile,
    began: float,
) -> None:
    network, networks = runtime.process.network, runtime.process.networks
    speaks = runtime.process.rank == 0
    if runtime.process.local_rank == 0:
        ensure_available(config.data)
    runtime.gather([0.0], "the preparation of the data")
    data = load_data(
        config.data,
        seed=config.seed,
        network=network,
        device=runtime.device,
        channels_last=config.runtime.channels_last,
        replica=runtime.process.replica,
        replicas=runtime.process.replicas,
    )
    trainee = build_train_state(config, data, runtime)
    units = build_units(config, trainee)
    cadence = build_cadence(config, networks)
    grafter = None
    if not cadence.never and not grafts_itself(config):
        grafter = build_grafter(config, trainee, build_rule(config, trainee, units), runtime)

    endures = config.on_divergence == "exclude" or (config.on_divergence == "heal" and grafter)

    checkpoints = CheckpointManager(config, runtime, directory, trainee, log)
    progress = checkpoints.resume()
    start = progress.position
    if grafter:
        grafter.round = start.round
        grafter.check()
    if start.epoch >= config.epochs:
        log.info("%s is complete: all of its %d epochs are done", directory.path, config.epochs)
        runtime.finish()
        return
    if speaks:
        directory.describe(config, networks)
    log.info("%s", _opening(config, runtime, data, trainee, start.epoch))
    if runtime.process.world_size > 1:
        log.info("%s", process_table(runtime))
    hosts = runtime.hosts()[:: runtime.process.replicas]
    reporter = Reporter(config, directory, runtime.process, start=start, hosts=hosts, log=log)
    course = Course(
        config=config,
        runtime=runtime,
        trainee=trainee,
        data=data,
        grafter=grafter,
        rate=build_rate(config, data.steps_per_epoch),
        checkpoints=checkpoints,
        stops=build_stop_requests(config, runtime, directory),
        saves=SaveRequests(config.checkpoint.every_minutes, runtime.peers, asks=speaks),
        live=live,
        progress=progress,
        profile=build_profile(config, data, runtime, directory, log),
        began=began - progress.seconds,
        round=start.round,
    )
    live.prepare(
        epochs=config.epochs,
        steps_per_epoch=data.steps_per_epoch,
        batch_size=config.data.batch_size,
        rounds=start.round,
    )
    course.stops.listen()
    if checkpoints.loaded:
        reporter.resumed(checkpoints.loaded, start)

    for segment in segments(
        epochs=config.epochs,
        steps_per_epoch=data.steps_per_epoch,
        cadence=cadence,
        save_every=config.checkpoint.every,
        start=start,
    ):
        epoch = segment.epoch
        if segment.first == 0:
            course.begin_epoch()
        if segment.first == 0 or (epoch, segment.first) == (start.epoch, start.step):
            live.begin(epoch, segment.first)
        course.train(segment)
        if segment.evaluate and not course.stopping():
            tested, validated = course.evaluate()
            layers = layer_stats(config, trainee, units)
            runtime.learn_own(course.whole)
        try:
            record = course.meet(segment)
        except RoundStoppedError:
            reporter.close()
            course.leave()
        if record:
            reporter.round(epoch, record)
        if segment.round and not grafter:
            with course.times.phase("round"):
                self_graft(trainee, units, config.graft, course.round)
            course.round += 1
        live.met(course.round)
        if segment.round and config.graft.reset_momentum:
            trainee.optimizer.state.clear()
        if not segment.evaluate:
            continue

        metrics = epoch_metrics(
            *(epoch, course.lr, course.trained, tested, validated, course.progress.rounds),
            *(layers, course.times.reset()),
        )
        reporter.network(metrics, layers)
        reporter.skipped(epoch, data.skipped)
        lost = what_is_lost(trainee, loss=course.progress.diverged)
        row = row_of(metrics, busy=course.busy, whole=course.whole, sound=not lost)
        numbers = runtime.gather(row.numbers(), f"the report of epoch {epoch}")
        everyone = [NetworkRow(*other) for other in numbers]
        ensemble = ensemble_accuracy(runtime, tested, epoch)
        runtime.learn(max(other.epoch_seconds for other in everyone))
        reporter.population(epoch, course.round, course.trained.seconds, everyone, ensemble)
        check_sound(everyone, epoch, network, lost, may_go_on=bool(endures))

        if segment.ends_run:
            after = course.test() if segment.round else tested
            summary = summarise(
                runtime, lr_of(config, runtime), tested, after, course.seconds, sound=not lost
            )
            reporter.summary(summary)
        if segment.save:
            course.finish_epoch(epoch)

    if course.profile:
        course.profile.finish()
    reporter.close()
    checkpoints.finish()
    reporter.finish()
    if speaks:
        log.info("results in %s; to look at them: tensorboard --logdir %s", *[directory.path] * 2)
    runtime.finish()


def build_profile(
    config: TrainConfig,
    data: Data,
    runtime: Runtime,
    directory: RunDirectory,
    log: logging.Logger,
) -> StepProfile | None:
    """What profiles the steps that the configuration asks for, if any."""
    steps = config.monitor.profile_steps
    if steps is None or not runtime.process.is_leader:
        return None
    path = directory.network(runtime.process.network) / "trace.json.gz"
    first, last = step_range("monitor.profile_steps", steps)
    profile = StepProfile(first, last, path, runtime.device, log)
    profile.check(config.epochs * data.steps_per_epoch)
    return profile


def build_stop_requests(
    config: TrainConfig, runtime: Runtime, directory: RunDirectory
) -> StopRequests:
    """Listens for whoever wants the run to stop."""
    grace = config.checkpoint.grace_seconds
    return StopRequests(
        directory.stop,
        runtime.peers,
        grace_seconds=grace,
        late=partial(_leave_without_peers, runtime.process, grace),
    )


def _leave_without_peers(process: ProcessInfo, seconds: float) -> None:
    """End a process that was asked to stop, and whose peers do not agree to."""
    tell(
        f"dist-graft: error: {process}: could not stop in good order within {seconds:g} s "
        "(--checkpoint.grace_seconds); the same command goes on from the newest checkpoint"
    )
    leave(1)


def _opening(
    config: TrainConfig, runtime: Runtime, data: ImageData, trainee: TrainState, start_epoch: int
) -> str:
    """The first lines: what, where, how many, how to stop, where to look."""
    process, run_dir = runtime.process, config.run_dir
    weights = sum(parameter.numel() for parameter in trainee.model.parameters())
    device = runtime.device.type
    where = f"{device} over {runtime.backend}" if process.world_size > 1 else device
    counted = f"processes, {process.replicas} a network," if process.replicas > 1 else "networks"
    return "\n".join(
        [
            f"{process.networks} x {config.model.name} ({weights:,} parameters), method "
            f"{config.method}, epochs {start_epoch + 1} to {config.epochs}, in {run_dir}",
            f"data     {config.data.name}: {data.train_size:,} images of {data.channels} x "
            f"{data.image_size} x {data.image_size}, {data.num_classes} classes",
            f"where    {process.local_world_size} of {process.world_size} {counted} on "
            f"{socket.gethostname()}; {where}, {config.runtime.precision}, "
            f"{torch.get_num_threads()} threads each",
            f"to stop  Ctrl-C, or touch {RunDirectory(run_dir).stop}; the same command goes on",
            f"to look  dist-graft status {run_dir}; tensorboard --logdir {run_dir}",
        ]
    )
