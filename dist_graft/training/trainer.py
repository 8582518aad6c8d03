"""The training loop of one network in a population.

Methods are in the order of their calls. To follow one epoch, start at `train_epoch`. Every
collective is a visible line in this file, in `population/grafter.py` (rounds) or in
`population/runtime/replicas.py` (processes of one network); callbacks never communicate.
"""

from __future__ import annotations

import json
import math
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from dist_graft.config import TrainConfig
from dist_graft.config.members import differing_options, member_options
from dist_graft.errors import (
    DistGraftError,
    LeaseHeldError,
    LeaseLostError,
    RoundStoppedError,
    RunDirectoryError,
    StoppedAtStartError,
    StoppedEarlyError,
    UserCodeError,
    caught,
    mark_common,
)
from dist_graft.monitoring.callback import Callback
from dist_graft.monitoring.chart_layout import PHASES
from dist_graft.monitoring.jsonl import finite_or_none
from dist_graft.monitoring.log import append_error, close_log, hold_warnings, open_log
from dist_graft.monitoring.logger import check_loggers
from dist_graft.monitoring.metrics import EpochReport, LayerStats, NetworkRow, network_row
from dist_graft.phase_timer import PhaseTimer, profiler_label
from dist_graft.population.round.file_choice import Place
from dist_graft.population.round.files import JobState
from dist_graft.population.round.record import GraftRecord
from dist_graft.population.runtime.lease import Lease, is_taken_over, sees_lease
from dist_graft.population.runtime.process import (
    SIGNALS,
    die_with_launcher,
    handle_signals,
    stop_on_signals,
)
from dist_graft.population.runtime.process_group import Runtime, start
from dist_graft.population.runtime.process_info import ProcessInfo, read_process_info
from dist_graft.population.runtime.replicas import Replicas
from dist_graft.population.runtime.stop_requests import GracePeriod, SignalMonitor, StopRequests
from dist_graft.run_directory import RunDirectory, write_atomically
from dist_graft.training.builders import (
    build_data,
    build_rounds,
    build_state,
    build_task,
    built_in_callbacks,
    dropout_layers,
)
from dist_graft.training.callbacks import CallbackList, load_callbacks
from dist_graft.training.checkpoint.files import complete_checkpoints
from dist_graft.training.checkpoint.manager import CheckpointManager, Progress
from dist_graft.training.checkpoint.writer import to_host_memory
from dist_graft.training.classes import refuse_other_classes
from dist_graft.training.data import ImageData, check_dataset_name, ensure_available
from dist_graft.training.data.batches import batch_size
from dist_graft.training.data.datasets import Datasets
from dist_graft.training.failures import explain, leave_without_peers
from dist_graft.training.job_summary import (
    add_probabilities,
    finished_summaries,
    next_or_error,
    no_ensemble,
    population_summary,
    row_of,
    states_around_round,
)
from dist_graft.training.jobs import assign_network, claim_network, is_job
from dist_graft.training.layer_stats import check_finite, layer_stats, naming_epoch, non_finite_part
from dist_graft.training.learning_rates import initial_rates
from dist_graft.training.opening import (
    configs_of_networks,
    options_text,
    prepare_directory,
    refuse_other_lengths,
    refuse_stopped,
    refuse_unshared,
)
from dist_graft.training.reporting import (
    epoch_metrics,
    log_start,
    process_row,
    process_table,
    rate_hint,
    warn_of_learning_rates,
    warn_of_skipped_images,
)
from dist_graft.training.resuming import restore
from dist_graft.training.schedule import Position, Segment, epoch_segments
from dist_graft.training.self_grafting import self_graft
from dist_graft.training.state import Predictor
from dist_graft.training.step import (
    ENSEMBLE_CHUNK,
    EvalResult,
    RunningSums,
    evaluate,
    merge_eval_results,
    merge_train_results,
    seed_step,
    train_step,
)
from dist_graft.training.summary import (
    check_equal_samples,
    ensemble_chunks,
    primary_metric,
    summarize,
)
from dist_graft.training.task import LossFunction, MetricFunction, correct
from dist_graft.training.weights import initialize

_VOTES_PER_EPOCH = 19
"""Points inside an epoch where the networks agree on a checkpoint (checkpoint.every_minutes)."""
_MAX_LAG_SECONDS = 15.0
"""Maximum time until a shared disk shows a new file on another machine."""


class Trainer:
    """Trains one network of a population; every process of the run creates one.

    Start the processes with torchrun or `dist_graft.launch`; a process alone trains one network.
    The configuration provides what is not passed: without arguments, this is `dist-graft train`.

    Args:
        config: all options; see `TrainConfig`.
        model: () -> nn.Module, called under the network's seed. All networks need the same
            architecture. Default: `config.model`.
        data: map-style datasets of (input, target) pairs. Default: `config.data`.
        loss: (output, target) -> scalar tensor, the mean over the batch. Default: cross entropy.
        metrics: by name, (output, target) -> (sum, count) on the device. The value of a metric is
            the total sum over the total count. Default: accuracy in percent, unless `loss` is
            given.
        optimizer: (module, lr) -> optimizer. Default: `config.optim`. The schedule of
            `config.optim` applies in any case.
        callbacks: called after the built-in ones and those of `config.callbacks`.

    Attributes:
        config (TrainConfig): all options.
        member_config (TrainConfig): all options, with this network's own (members, diversity).
        process (ProcessInfo): rank, network, replica and world size.
        directory (RunDirectory): paths of the run.
        log (logging.Logger): writes to the network's log.txt; on rank 0 also to the console.
        model (nn.Module): the plain module of this process's network.
        state (TrainState): model, optimizer, scheduler, loss scaler and moving average.
        data: batches and their number.
        epoch (int): current epoch, 0-based.
        step (int): steps finished in the current epoch.
        global_step (int): steps finished in the run.
        round (int): rounds finished in the run.
        summary (dict): final results; empty before the end of the last epoch.
        resumed_from (Path | None): checkpoint that was restored.
    """

    def __init__(
        self,
        config: TrainConfig | None = None,
        *,
        model: Callable[[], nn.Module] | None = None,
        data: Datasets | None = None,
        loss: LossFunction | None = None,
        metrics: Mapping[str, MetricFunction] | None = None,
        optimizer: Callable[[nn.Module, float], torch.optim.Optimizer] | None = None,
        callbacks: Sequence[Callback] = (),
    ) -> None:
        self.config = config or TrainConfig()
        self.process = ProcessInfo()
        self.directory = RunDirectory(self.config.run_dir)
        self.task = build_task(self.config, loss, metrics)
        self._loss, self._metrics = loss, metrics
        self._make_model = model
        self._datasets = data
        self._make_optimizer = optimizer
        self._user_callbacks = callbacks
        passed = {
            "model": model,
            "data": data,
            "loss": loss,
            "metrics": metrics,
            "optimizer": optimizer,
        }
        self.custom = [name for name, value in passed.items() if value is not None]
        self._reset()

    def _reset(self) -> None:
        """Reset what an earlier call of `fit` has changed."""
        self.member_config = self.config
        self.progress = Progress()
        self.stopping = False
        self.summary: dict[str, Any] = {}
        self.resumed_from: Path | None = None
        self.timer = PhaseTimer(PHASES)
        self._summary_error: RunDirectoryError | None = None
        self._has_log = False
        self._explained: tuple[BaseException, BaseException] | None = None
        self._lease: Lease | None = None
        self._lease_token = ""
        self._signals: SignalMonitor | None = None
        self._announce_signal: Callable[[signal.Signals], object] = lambda number: None
        self._start_time = self._last_checkpoint = time.monotonic()
        self._epoch_start: float | None = None
        self._busy_seconds = 0.0
        self._votes_after = 0
        self._unhealed = False

    @property
    def model_name(self) -> str:
        """Name of the architecture."""
        if self._make_model is None:
            return self.config.model.name
        return getattr(self._make_model, "__name__", type(self._make_model).__name__)

    # ---- Position --------------------------------------------------------------------------------

    @property
    def model(self) -> nn.Module:
        """The plain module of this process's network."""
        return self.state.model

    @property
    def device(self) -> torch.device:
        """Device of this process."""
        return self.runtime.device

    @property
    def epoch(self) -> int:
        """Current epoch, 0-based."""
        return self.progress.position.epoch

    @property
    def step(self) -> int:
        """Steps finished in the current epoch."""
        return self.progress.position.step

    @property
    def round(self) -> int:
        """Rounds finished in the run."""
        return self.progress.position.round

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps in an epoch."""
        return self.data.steps_per_epoch

    @property
    def global_step(self) -> int:
        """Steps finished in the run."""
        return self.epoch * self.steps_per_epoch + self.step

    @property
    def lease_lost(self) -> bool:
        """Whether another run has taken over the run directory; then nothing may be written."""
        if self._lease:
            return self._lease.lost
        return bool(self._lease_token) and is_taken_over(self.directory.lease, self._lease_token)

    def _check_lease(self) -> None:
        """Raise LeaseLostError if another run has taken over the run directory."""
        if self.lease_lost:
            raise LeaseLostError(
                f"{self.directory.own} was taken over by another run while this one did not "
                "respond: nothing more was written; see dist-graft status"
            )

    # ---- The run ---------------------------------------------------------------------------------

    def fit(self) -> None:
        """Train for `config.epochs` epochs; every process of the run must call this.

        Resumes from the latest checkpoint in the run directory. SIGINT, SIGTERM, SIGUSR1, SIGHUP
        (unless it is ignored) and the file STOP in the run directory stop the run after a step,
        with a checkpoint.

        Raises: StoppedEarlyError after such a stop; PeerError when another process exited or did
            not respond in time; another DistGraftError that says what to do.
        """
        handlers = {number: signal.getsignal(number) for number in SIGNALS}
        self._reset()
        try:
            with mark_common():
                self._start_process()
            try:
                self._open_run()
                self._fit()
            except BaseException as error:
                explained = self._explain(error)
                if self._has_log and not isinstance(explained, LeaseHeldError):
                    process = str(self.process) if self.process.world_size > 1 else ""
                    folder = self.directory.network(self.process.network)
                    append_error(folder, explained, process=process)
                    if isinstance(explained, StoppedAtStartError) and self.process.is_main:
                        with suppress(RunDirectoryError):  # the start removed the marker
                            write_atomically(self.directory.stopped, f"{explained}\n".encode())
                if explained is error:
                    raise
                raise explained from error
        except StoppedAtStartError as error:
            if complete_checkpoints(self.directory.checkpoints):
                error.exit_status = StoppedEarlyError.exit_status
            raise
        finally:
            self._explained = None  # its traceback refers to all tensors
            if self._signals:
                self._signals.close()
                self._grace.cancel()
            close_log()
            if self._lease:
                self._lease.release()
            if not self.process.launched:  # a launcher may still signal a process that exits
                for number, handler in handlers.items():
                    signal.signal(number, handler or signal.SIG_DFL)

    def _fit(self) -> None:
        """Build, resume, and train the remaining epochs; report errors to the callbacks."""
        try:
            self.callbacks.call("setup", self)
            with mark_common():
                self._build()
            self._resume()
            if self.epoch < self.config.epochs:
                self._announce()
                self.stop_requests.install_handlers()
                self.callbacks.call("on_fit_start", self)
                for epoch in range(self.epoch, self.config.epochs):
                    self.train_epoch(epoch)
                self._finish()
            else:
                self.log.info("%s is complete: %d epochs", self.directory.path, self.epoch)
                if self.directory.job is not None and not self.directory.summary.exists():
                    self._finish_job()
                if self.process.is_main and not self.directory.summary.exists():
                    self.log.warning(
                        "%s is missing; dist-graft evaluate %s computes the accuracies again",
                        self.directory.summary,
                        self.directory.path,
                    )
            self.runtime.shutdown()
        except BaseException as error:
            if not isinstance(error, LeaseLostError):
                self.callbacks.call("on_exception", self, self._explain(error))
            raise
        finally:
            if not self.process.launched:  # a launched process is about to exit
                self.checkpoints.close()
            self.callbacks.call("teardown", self)

    def _explain(self, error: BaseException) -> BaseException:
        """The error to report, which stays the same when peers end meanwhile.

        From now on, signals do not interrupt the main thread: a launcher stops all processes when
        the first one has ended.
        """
        handle_signals(lambda *_: None)
        if self._explained is None or self._explained[0] is not error:
            self._explained = error, explain(error, self.runtime.peers, self.process)
        return self._explained[1]

    # ---- Start -----------------------------------------------------------------------------------

    def _start_process(self) -> None:
        """Read rank and network from the environment, and connect to the other processes."""
        self.process = assign_network(self.config, read_process_info())
        if self._datasets is None:
            check_dataset_name(self.config.data.name)
        check_loggers(self.config.monitor.loggers)
        configs = configs_of_networks(
            *(self.config, self.process.networks),
            datasets=self._datasets,
            loss=self._loss,
            metrics=self._metrics,
            model_by_name=self._make_model is None,
            optimizer_by_name=self._make_optimizer is None,
        )
        rates = initial_rates(self.config, self.process.networks)
        refuse_stopped(self.directory, self.process)
        stop_on_signals(at_start=True)
        self._handle_signals()
        if self.process.launched:
            die_with_launcher()
        hold_warnings()
        options = options_text(self.config)
        self.runtime: Runtime = start(self.config.runtime, self.process, options)
        self.replicas: Replicas = self.runtime.replicas
        if is_job(self.config):
            self._claim_network()
        self.max_lr = rates[self.process.network]
        self.member_config = configs[self.process.network]
        self.task = build_task(self.member_config, self._loss, self._metrics)

    def _claim_network(self) -> None:
        """Take the lease of this job's network, and send its number to all processes of the job.

        Raises: LeaseHeldError or RunDirectoryError, on all replicas.
        """

        def claim() -> str:
            network, self._lease = claim_network(self.config, self.process)
            return str(network)

        network = int(self.runtime.call_on_main(claim, "the lease of this job's network"))
        self.process = replace(self.process, first_network=network)
        self.runtime = replace(self.runtime, process=self.process)
        if self.runtime.peers:
            self.runtime.peers.first_network = network
        self.directory = RunDirectory(self.config.run_dir, job=network)
        refuse_stopped(self.directory, self.process)

    def _handle_signals(self) -> None:
        """Start the grace period at the first signal, wherever the main thread is."""
        seconds = self.config.checkpoint.grace_seconds
        self._grace = GracePeriod(seconds, lambda: leave_without_peers(self.process, seconds))

        def on_signal(number: signal.Signals) -> None:
            self._grace.start()
            self._announce_signal(number)

        self._signals = SignalMonitor(on_signal)

    def _open_run(self) -> None:
        """Check the run directory, open the log, and create the callbacks."""
        self._open_directory()
        folders = []
        if self.process.is_leader:
            folders.append(self.directory.network(self.process.network))
        if self.process.is_main and self.directory.job is None:
            folders.append(self.directory.population)
        self.log = open_log(*folders, console=self.process.is_main)
        self._has_log = True  # an earlier error leaves nothing in the folder
        self.stop_requests = StopRequests(
            dict.fromkeys((self.directory.stop, self.directory.stop_job)),
            self.runtime.peers,
            grace=self._grace,
            on_poll=self._check_lease,
            ignored=[] if self.directory.job is None else [self.directory.stop],
        )
        self._announce_signal = self.stop_requests.announce
        self.run_events, built_in = built_in_callbacks(self.config, self.process)
        user = [*load_callbacks(self.config.callbacks), *self._user_callbacks]
        self.callbacks = CallbackList(built_in, user)
        self.checkpoints = CheckpointManager(
            self.config, self.runtime, self.directory, self.log, check=self._check_lease
        )

    def _open_directory(self) -> None:
        """Take the lease of the run directory, and check that all processes see it. A collective.

        Raises: RunDirectoryError or ConfigError, on all ranks, if the run cannot start there.
        """

        def take_and_prepare() -> str:
            self._lease = self._lease or Lease(self.directory.lease).acquire()
            try:
                prepare_directory(self.directory, self.config, self.process)
            except DistGraftError:
                self._lease.undo()
                raise
            return self._lease.token

        what = "the opening of the run directory"
        self._lease_token = self.runtime.call_on_main(take_and_prepare, what)
        lag = min(_MAX_LAG_SECONDS, self.runtime.timeouts.seconds / 3)
        hosts = self.runtime.hosts()
        # Not through the store: the process that hosts it may exit as soon as it has the answers.
        seen = self.runtime.gather_all_ranks(
            [float(sees_lease(self.directory.lease, self._lease_token, lag))],
            "the check of the run directory's visibility",
        )
        refuse_unshared(self.directory.path, seen, hosts, self.process.replicas, lag)

    def _build(self) -> None:
        """Load the data and build the network, its graft units and its grafter."""
        config, runtime = self.config, self.runtime
        with caught() as found:
            if self._datasets is None and self.process.local_rank == 0:
                ensure_available(config.data)
        runtime.raise_together(found.error, "the preparation of the data")
        with caught(UserCodeError) as found:  # which ends this process at once, with its traceback
            self.data = build_data(self.member_config, self._datasets, runtime)
            refuse_other_classes(self.directory, self.data, config.data.root)
        runtime.raise_together(found.error, "the loading of the data")
        refuse_other_lengths(runtime, self.data)
        self.state = build_state(
            *(self.member_config, self.data, runtime, self._make_model, self._make_optimizer),
            lr=self.max_lr,
        )
        if "model.dropout" in differing_options(config):
            dropout_layers(self.model)  # fails on all ranks, not only where it is set
        self.state.train_forward = self.replicas.wrap(self.state.forward)
        self.units, self.criterion, self.cadence, self.rate, self.grafter = build_rounds(
            config, self.state, runtime, self.steps_per_epoch
        )
        self._tolerant = config.on_divergence == "exclude" or (
            config.on_divergence == "heal" and self.grafter is not None
        )

    def _resume(self) -> None:
        """Restore the latest checkpoint, if there is one; all networks load the same one."""
        name = self.runtime.call_on_main(self.checkpoints.choose, "the search for a checkpoint")
        if name:
            with caught() as found:
                loaded = self.checkpoints.load(name, self.config.resume_networks)
                self.progress = restore(
                    *loaded,
                    state=self.state,
                    grafter=self.grafter,
                    replicas=self.replicas,
                    steps_per_epoch=self.steps_per_epoch,
                )
                # A network that was alone has had no rounds; those inside an epoch are counted.
                place = self.progress.position
                due = self.cadence.rounds_before(place.epoch, place.step, self.steps_per_epoch)
                self.progress.position = replace(place, round=max(place.round, due))
            self.runtime.raise_together(found.error, f"the restoring of {name}")
            self.resumed_from, _, origin = loaded
            if origin is not None:
                self.log.info("%s", origin)
            # Networks that stopped at different steps must take part in the same votes.
            steps = self.runtime.gather([float(self.step)], "the steps of the networks")
            self._votes_after = int(max(step for (step,) in steps))
            self.log.info(
                "resumed from %s: epoch %d, step %d, round %d",
                self.resumed_from,
                self.epoch,
                self.step,
                self.round,
            )
        else:
            if self.config.init_from:
                with caught() as found:
                    done = initialize(self.model, self.config, self.process.network)
                self.runtime.raise_together(found.error, "the initial weights")
                self.log.info("%s", done)
                self.state.reset_optimizer()  # its moving average starts from the same weights
                if self.grafter:
                    self.grafter.reset_rule_state()
            if self.config.population.join == "donor":
                self._join()
        self._start_time -= self.progress.seconds
        if self.grafter:
            self.grafter.round = self.round
            self.grafter.check()  # a collective: models and options must be the same

    def _join(self) -> None:
        """Start with the weights and the epoch of the network that has trained farthest.

        A collective of the network's replicas.
        """
        found = None
        if self.grafter:
            found = self.grafter.join(self._job_state(0))
        if found is None:
            self.log.info("no other network has published weights: starting from the beginning")
            return
        donor, place = found
        epoch = min(place.epoch, self.config.epochs - 1)
        rounds = self.cadence.rounds_before(epoch, 0, self.steps_per_epoch)
        self.progress = Progress(Position(epoch, 0, rounds))
        self.state.reset_optimizer()
        self.state.skip_to(epoch * self.steps_per_epoch)
        self.log.info("joined with the weights of network %d after %g epochs", donor, place.epochs)

    def _announce(self) -> None:
        """Write config.yaml and classes.json, and log the configuration and the processes."""
        self._check_lease()
        if self.process.is_main:
            self.directory.write_config(self.config, self.process.networks, self.custom)
            if isinstance(self.data, ImageData):
                self.directory.write_classes(self.data.classes, asdict(self.data.preprocessing))
        log_start(self)
        self.hosts = self.runtime.hosts()[:: self.process.replicas]
        if self.process.world_size > 1:
            row = process_row(self.process, self.device)
            rows = self.runtime.gather_texts("the table of processes", row)
            self.log.info("%s", process_table(self.process, rows))

    # ---- One epoch -------------------------------------------------------------------------------

    def train_epoch(self, epoch: int) -> None:
        """Train one epoch: steps with rounds between them, evaluation, report and checkpoint."""
        # ---- Start: at step 0, or at the step where a resumed epoch continues ----
        if self.step == 0:
            self._busy_seconds, self._epoch_start = 0.0, time.monotonic()
            self.progress = Progress(
                lr=self.state.lr,
                position=Position(epoch, 0, self.round),
                diverged=self.progress.diverged,
            )
        self._report_checkpoint()
        self.callbacks.call("on_epoch_start", self)

        segments = epoch_segments(
            epoch,
            epochs=self.config.epochs,
            steps_per_epoch=self.steps_per_epoch,
            cadence=self.cadence,
            save_every=self.config.checkpoint.every,
            votes=_VOTES_PER_EPOCH if self.config.checkpoint.every_minutes else 0,
            votes_after=self._votes_after,
            first=self.step,
            rounds=self.round,
        )
        with closing(self.data.train_batches(epoch, self.step, self.steps_per_epoch)) as batches:
            for segment in segments:
                # ---- Steps ----
                self.train_segment(segment, batches)

                # ---- Evaluation, at the end of the epoch and before its round ----
                if segment.evaluate and not self.stopping:
                    results = self.evaluate(last=epoch + 1 == self.config.epochs)
                    layers = layer_stats(self.config, self.state, self.units)
                    self.runtime.observe_local_epoch(self._epoch_seconds)

                # ---- Round, or the agreement to stop, which ends the run here ----
                self.graft_round(segment)

                # ---- Checkpoint, if one is due by rank 0's clock ----
                due = False
                if segment.vote:
                    due = self._vote(f"a checkpoint at step {segment.last} of epoch {epoch}")
                if due and not segment.evaluate and not self._unhealed:
                    self.save()

        # ---- Report ----
        finite = self._report_epoch(epoch, results, layers)

        # ---- Summary, after the last round ----
        if epoch + 1 == self.config.epochs:
            after = results["test"]
            if segment.round:
                after = self._evaluate_split("test", max_numbers=math.inf)
            self._summarize(results["test"], after, finite=finite)

        # ---- Checkpoint ----
        self._votes_after = 0
        self.progress = Progress(
            Position(epoch + 1, 0, self.round), diverged=self.progress.diverged
        )
        self._unhealed = self._awaits_healing(finite)
        if (segment.save or due) and not self._unhealed:
            self.save()

    def _awaits_healing(self, finite: bool) -> bool:
        """Whether the last finite checkpoint must remain: of a job that has found no donor."""
        if self.directory.job is None or self.config.on_divergence != "heal":
            return False
        (diverged,) = self.replicas.agree([not finite])
        return diverged

    @property
    def _epoch_seconds(self) -> float:
        """Seconds since the epoch started; 0 if this process resumed in the middle of it."""
        return time.monotonic() - self._epoch_start if self._epoch_start else 0.0

    def train_segment(self, segment: Segment, batches: Iterator[tuple[Any, Any]]) -> None:
        """Take the steps of a segment; stop after the current step if a stop is requested."""
        start = time.perf_counter()
        data_seconds, steps = 0.0, 0
        sums = RunningSums(self.task, self.device)
        self.model.train()
        for step in range(segment.first, segment.last):
            # ---- Batch ----
            batch_start = time.perf_counter()
            with profiler_label("data"):
                inputs, targets = next(batches)
            data_seconds += time.perf_counter() - batch_start

            # ---- Step; replicas average their gradients in the backward pass ----
            seed_step(
                *(self.config.seed, self.process.network, segment.epoch, step),
                replica=self.replicas.index,
            )
            with profiler_label("step"):
                if batch_size(targets):
                    train_step(
                        self.state,
                        self.task,
                        inputs,
                        targets,
                        config=self.member_config.optim,
                        part=self.data.part(step),
                        sums=sums,
                        replicas=self.replicas,
                    )
                self.state.scheduler.step()
            steps += 1
            self.progress.position = Position(segment.epoch, step + 1, self.round)
            self.callbacks.call("on_step_end", self)

            # ---- Stop? The replicas of a network agree, so that all take the same steps ----
            (self.stopping,) = self.replicas.agree([self.stop_requests.requested()])
            if self.stopping:
                break

        # ---- Results, over all replicas ----
        self.replicas.wait_for_device(self.device)
        seconds = time.perf_counter() - start
        result = sums.result(steps=steps, seconds=seconds, data_seconds=data_seconds)
        rows = self.replicas.gather(result.row(), "the results of some steps")
        result = merge_train_results(result, rows)
        self._busy_seconds += result.seconds
        self.timer.add("data", result.data_seconds)
        self.timer.add("step", result.seconds - result.data_seconds)
        progress = self.progress
        progress.trained = progress.trained + result if progress.trained else result
        progress.diverged |= self.state.has_diverged(result.loss)

    def evaluate(self, *, last: bool = False) -> dict[str, EvalResult]:
        """Evaluate the network on the "test" and "val" splits, and its moving average on "test".

        A collective of the network's replicas. Their batch-norm statistics are averaged.

        Args:
            last: whether the final ensemble needs the probabilities on "test", however many.
        """
        start = time.monotonic()
        self.callbacks.call("on_evaluate_start", self)
        with self.timer.phase("evaluation"):
            self.replicas.average_buffers(self.state.model_and_average())
            limit = math.inf if last else ENSEMBLE_CHUNK
            results = {"test": self._evaluate_split("test", max_numbers=limit)}
            if self.data.has_validation:
                results["val"] = self._evaluate_split("val")
            if self.state.averaged:
                results["ema_test"] = self._evaluate_split("test", self.state.averaged)
        self._busy_seconds += time.monotonic() - start
        metrics = {
            f"{split}_{name}": value
            for split, result in results.items()
            for name, value in {"loss": result.loss, **result.metrics}.items()
        }
        self.callbacks.call("on_evaluate_end", self, metrics)
        return results

    def _evaluate_split(
        self, split: Any, predictor: Predictor | None = None, *, max_numbers: float = 0
    ) -> EvalResult:
        """Evaluate one split. A collective of the network's replicas, which share the samples.

        Each replica keeps the probabilities of its own samples, if there are at most `max_numbers`.
        """
        local = evaluate(
            *(predictor or self.state, self.data, split, self.task),
            max_numbers=max_numbers,
            spool=self.directory.network(self.process.network),
        )
        rows = self.replicas.gather(local.row(), "an evaluation")
        return merge_eval_results(local, rows, classification=self.task.classification)

    def graft_round(self, segment: Segment) -> None:
        """Graft with the other networks if a round is due. A collective where they synchronize.

        Raises: StoppedEarlyError, on all ranks, if one of them requests a stop; after a checkpoint.
        """
        self._check_lease()
        if segment.round or segment.evaluate:
            self.callbacks.call("on_round_start", self)
        if not self.stopping:  # a request that came during the evaluation
            (self.stopping,) = self.replicas.agree([self.stop_requests.requested()])
        record: GraftRecord | None = None
        averaged = self.state.averaged if self.config.graft.ema else None
        try:
            if segment.round and self.grafter:
                steps = segment.epoch * self.steps_per_epoch + segment.last
                hint = rate_hint(self.config, self.process, segment.epoch)
                with naming_epoch(segment.epoch, hint), self.timer.phase("round"):
                    record = self.grafter.graft(
                        rate=self.rate(steps),
                        stop=self.stopping,
                        diverged=self.progress.diverged,
                        also=[averaged.model] if averaged else [],
                        job=self._job_state(steps),
                    )
            elif segment.evaluate or self.stopping:
                self._vote(f"the end of epoch {segment.epoch}")
        except RoundStoppedError:
            self._stop_early()

        if record:
            if self.process.network in record.healed:
                self.state.reset_optimizer()
            self.progress.diverged = False
            self.progress.add_round(record)
            self.callbacks.call("on_round_end", self, record)
        elif segment.round:
            with self.timer.phase("round"):
                self_graft(self.state, self.units, self.config.graft, self.round)
            self.progress.count_round()
        if segment.round and self.config.graft.reset_momentum:
            self.state.clear_optimizer()

    def _job_state(self, steps: int) -> JobState | None:
        """Position of this job after so many steps; None if all networks run together."""
        if self.directory.job is None:
            return None
        resume = self.checkpoints.resume_position()
        return JobState(
            place=self._place(*divmod(steps, self.steps_per_epoch)),
            lr=self.state.lr,
            resume=self._place(resume.epoch, resume.step),
            should_stop=self.stop_requests.requested,
        )

    def _place(self, epoch: int, step: int) -> Place:
        epochs, step = divmod(step, self.steps_per_epoch)
        return Place(epoch + epochs, step, self.steps_per_epoch)

    def _vote(self, what: str) -> bool:
        """Agree with the other networks whether to stop, and whether a checkpoint is due.

        A collective. Networks that do not graft synchronize only here.
        """
        minutes = self.config.checkpoint.every_minutes
        elapsed = time.monotonic() - self._last_checkpoint
        due = minutes is not None and elapsed >= 60 * minutes and not self.checkpoints.busy
        votes = self.runtime.gather([float(self.stopping), float(due)], what)
        if any(stop for stop, _ in votes):
            self._stop_early()
        return bool(votes[0][1])

    def save(self) -> None:
        """Save a checkpoint in the background; every process must call this at the same position.

        Raises: RunDirectoryError, on all ranks, when too many checkpoints failed in a row.
        """
        self._check_lease()
        with self.timer.phase("checkpoint"):
            self.checkpoints.settle()
        self._report_checkpoint()
        self._check_lease()
        self.progress.seconds = time.monotonic() - self._start_time
        if self.step:
            self.progress.buffers = self.replicas.gather_buffers(self.state.model_and_average())
        with self.timer.phase("checkpoint"):
            self.checkpoints.save(self.progress, self._state_dict())
        self._last_checkpoint = time.monotonic()

    def _state_dict(self) -> dict[str, Any]:
        """The training state, and what the rule keeps from round to round."""
        rule = self.grafter.rule_state if self.grafter else {}
        return self.state.state_dict() | ({"rule": rule} if rule else {})

    def _report_checkpoint(self) -> None:
        """Report the checkpoints that have been completed to the callbacks."""
        for path in self.checkpoints.newly_completed():
            self.callbacks.call("on_checkpoint", self, path)

    # ---- Results of an epoch and of the run ------------------------------------------------------

    def _report_epoch(
        self, epoch: int, results: Mapping[str, EvalResult], layers: LayerStats
    ) -> bool:
        """Pass the results of all networks to the callbacks. A collective.

        Returns: whether this network is finite.
        Raises: NonFiniteError, on all ranks, when diverged networks end the run.
        """
        # ---- This network ----
        self._check_lease()
        trained = self.progress.trained
        assert trained is not None
        warn_of_skipped_images(self.log, self.data, epoch)
        metrics = epoch_metrics(
            epoch,
            self.progress,
            results,
            layers,
            phase_seconds=self.timer.reset(),
            options=member_options(self.config, self.process.network),
        )
        metric = next(iter(self.task.metrics), None)
        non_finite = non_finite_part(self.state, loss=self.progress.diverged)
        row = network_row(
            metrics,
            metric=metric,
            busy_seconds=self._busy_seconds,
            epoch_seconds=self._epoch_seconds,
            finite=not non_finite,
        )

        # ---- All networks ----
        gathered = self.runtime.gather(row.numbers(), f"the report of epoch {epoch}")
        networks = [NetworkRow(*numbers) for numbers in gathered]
        ensemble = self._epoch_ensemble(results["test"], epoch)
        self.runtime.observe_epoch(max(other.epoch_seconds for other in networks))
        warn_of_learning_rates(self, epoch, networks)
        report = EpochReport(
            metrics=metrics,
            layers=layers,
            networks=networks,
            metric=metric,
            ensemble_accuracy=ensemble,
            seconds=trained.seconds,
            first_network=self.process.first_network,
        )
        self._check_lease()
        self.callbacks.call("on_epoch_end", self, report)
        if self._ends_when_diverged(epoch):
            with naming_epoch(epoch, rate_hint(self.config, self.process, epoch)):
                check_finite(
                    networks,
                    self.process.network,
                    non_finite,
                    tolerant=self._tolerant and self.directory.job is None,
                    first=self.process.first_network,
                )
        return not non_finite

    def _ends_when_diverged(self, epoch: int) -> bool:
        """Whether networks that are not finite after an epoch can end the run.

        Those of other jobs may be finite, and heal a job until its last epoch.
        """
        if self.directory.job is None or not self._tolerant:
            return True
        return self.config.on_divergence == "heal" and epoch + 1 == self.config.epochs

    def _epoch_ensemble(self, tested: EvalResult, epoch: int) -> float | None:
        """Accuracy of the ensemble after an epoch, in percent. A collective.

        None if it would be expensive, or the networks were tested on different samples.
        """
        if not self.task.classification or self.directory.job is not None:
            return None
        kept = 0 if tested.probabilities is None else tested.probabilities.numel()
        kept *= kept <= ENSEMBLE_CHUNK  # also in the last epoch, so that all have the same charts
        rows = self.runtime.gather_all_ranks([float(kept)], f"the test images of epoch {epoch}")
        replicas = self.process.replicas
        shards = [{size for (size,) in rows[replica::replicas]} for replica in range(replicas)]
        if any(len(sizes) > 1 or 0 in sizes for sizes in shards):
            return None
        return self._ensemble_accuracy(tested, f"the ensemble of epoch {epoch}")

    def _ensemble_accuracy(self, tested: EvalResult, what: str) -> float:
        """Accuracy of the networks' summed probabilities, in percent. A collective.

        Each replica sums its own test samples over the networks, a chunk at a time. All networks
        must have been tested on the same number of samples.
        """
        right = samples = 0
        for part, labels in ensemble_chunks(tested):
            total = self.runtime.sum_over_networks(part, what)
            right += int(correct(total, labels))
            samples += len(labels)
        return self._pooled_accuracy(right, samples, what)

    def _pooled_accuracy(self, right: int, samples: int, what: str) -> float:
        """Accuracy over all replicas of the network, in percent. A collective of the replicas."""
        counts = self.runtime.replicas.gather([float(right), float(samples)], what)
        return 100 * (sum(row[0] for row in counts) / sum(row[1] for row in counts))

    def _summarize(self, before: EvalResult, after: EvalResult, *, finite: bool) -> None:
        """Write summary.json, or keep what a job will add to it. A collective.

        Args:
            before: test results before the last round.
            after: test results after the last round.
            finite: whether the network's weights and loss are finite.
        """
        metric, value = primary_metric(before)
        numbers = [
            self.max_lr,
            value,
            primary_metric(after)[1],
            float(finite),
            float(before.samples),
        ]
        rows = self.runtime.gather(numbers, "the summary")
        check_equal_samples(rows)
        ensembles = None
        if self.task.classification and self.directory.job is None:
            ensembles = []
            for when, result in (("before", before), ("after", after)):
                what = f"the ensemble {when} the last round"
                ensembles.append(self._ensemble_accuracy(result, what))
        seconds = time.monotonic() - self._start_time
        first = self.process.first_network
        self.summary = summarize(metric, rows, ensembles=ensembles, seconds=seconds, first=first)
        self._check_lease()
        if self.directory.job is not None:
            self.summary |= {"samples": before.samples, "epochs": self.config.epochs}
        elif self.process.is_main:
            self.summary["events"] = self.run_events.events
            self._write_summary(self.directory.summary, self.summary)

    # ---- End of the run --------------------------------------------------------------------------

    def _finish(self) -> None:
        """Wait for the last checkpoint, and report the end of training."""
        failure = self._summary_error
        try:
            self.checkpoints.finish()
        except RunDirectoryError as error:
            failure = error
        self._report_checkpoint()
        if self.grafter:
            self.grafter.flush()
        if self.directory.job is not None:
            self._finish_job()
            failure = failure or self._summary_error
        self.callbacks.call("on_fit_end", self)
        if failure:
            raise failure
        if self.process.is_main:
            path, board = self.directory.path, "tensorboard" in self.config.monitor.loggers
            view = f"; to view them: tensorboard --logdir {path}" if board else ""
            self.log.info("results in %s%s", path, view)

    def _finish_job(self) -> None:
        """Write this network's summary, and that of the population if all jobs have finished.

        A collective of the network's replicas.
        """
        found = None
        if self.process.is_main:
            if self.summary:
                self._write_summary(self.directory.summary_job, self.summary)
            found = finished_summaries(self.directory, self.process.networks, self.config.epochs)
        text = self.runtime.broadcast_text("the summary of the population", json.dumps(found))
        summaries = json.loads(text)
        if not summaries:
            return
        check_equal_samples([row_of(summary) for summary in summaries])
        ensembles = None
        if self.task.classification:
            ensembles = self._job_ensembles()
        self.summary = population_summary(self.directory, summaries, ensembles)
        if self.process.is_main:
            self._write_summary(self.directory.summary, self.summary)

    def _job_ensembles(self) -> list[float] | None:
        """Accuracy of the ensemble before and after the last round, in percent.

        All networks are evaluated here. None, with a warning, if weights of one are missing. A
        collective of the network's replicas.
        """
        networks, last = self.process.networks, self.config.epochs
        own = to_host_memory(self.model.state_dict())
        has_round = self.cadence.after_epoch(last - 1, self.steps_per_epoch) and self.grafter
        place = self._place(last, 0) if has_round else None
        accuracies = []
        try:
            for states in states_around_round(self.directory, networks, place):
                sums: list[tuple[Tensor, Tensor]] = []
                for _ in range(networks):
                    state, problem = next_or_error(states)
                    (missing,) = self.replicas.agree([problem is not None])
                    if missing:
                        self.log.warning("%s", no_ensemble(self.directory, problem))
                        return None
                    self.model.load_state_dict(state, strict=False)
                    result = self._evaluate_split("test", max_numbers=math.inf)
                    sums = add_probabilities(sums, result)
                right = sum(int(correct(total, labels)) for total, labels in sums)
                samples = sum(len(labels) for _, labels in sums)
                accuracies.append(self._pooled_accuracy(right, samples, "the ensemble"))
        finally:
            self.model.load_state_dict(own)
        return [accuracies[0], accuracies[-1]]

    def _write_summary(self, path: Path, summary: Mapping[str, Any]) -> None:
        text = json.dumps(finite_or_none(summary), indent=1) + "\n"
        try:
            write_atomically(path, text.encode())
        except RunDirectoryError as error:  # raised once the checkpoint is saved
            self._summary_error = error

    def _stop_early(self) -> NoReturn:
        """Save a checkpoint at the current position, and end the run on all ranks. A collective."""
        self._check_lease()
        self.progress.seconds = time.monotonic() - self._start_time
        self.progress.buffers = self.replicas.gather_buffers(self.state.model_and_average())
        self.checkpoints.abandon()
        self.checkpoints.settle(last=True)
        name = self.runtime.broadcast_text(
            "the name of the last checkpoint", self.checkpoints.next_path(self.progress).name
        )
        path = self.checkpoints.save_and_wait(name, self.progress, self._state_dict())
        if self.grafter:
            self.grafter.flush()
        reason = self.stop_requests.reason or self.stop_requests.peer_reason()
        if self.process.is_main:
            self.checkpoints.mark_stopped(reason, path)
        # Exit together: a launcher kills the processes that outlive the first one, and the one that
        # hosts the store must not exit before the others have read it for the last time.
        self.runtime.gather([0.0], "the end of the stop")
        self._report_checkpoint()
        raise StoppedEarlyError(
            f"stopped early by {reason}; everything is saved in {path}: rerun the command to resume"
        )
