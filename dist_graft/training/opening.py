"""Opens a run directory: checks and preparations before a run starts or resumes."""

from __future__ import annotations

from collections.abc import Mapping

from dist_graft.config import TrainConfig
from dist_graft.config.members import member_configs
from dist_graft.errors import RunDirectoryError, StoppedEarlyError
from dist_graft.population.runtime.lease import Lease, this_process
from dist_graft.population.runtime.process_info import ProcessInfo
from dist_graft.run_directory import RunDirectory
from dist_graft.training.builders import build_task
from dist_graft.training.checkpoint.files import complete_checkpoints
from dist_graft.training.checkpoint.membership import archive_networks, pending_change
from dist_graft.training.data.datasets import Datasets, refuse_image_options
from dist_graft.training.references import check_names
from dist_graft.training.task import LossFunction, MetricFunction


def configs_of_networks(
    config: TrainConfig,
    networks: int,
    *,
    datasets: Datasets | None,
    loss: LossFunction | None,
    metrics: Mapping[str, MetricFunction] | None,
    model_by_name: bool,
    optimizer_by_name: bool,
) -> list[TrainConfig]:
    """Return the configuration of each network. Every process checks all of them.

    Raises: ConfigError if the options of a network do not fit its task or data.
    """
    configs = member_configs(config, networks)
    for each in configs:
        build_task(each, loss, metrics)
        check_names(each, model=model_by_name and datasets is None, optimizer=optimizer_by_name)
        if datasets is not None:
            refuse_image_options(each.data)
    return configs


def refuse_stopped(directory: RunDirectory, process: ProcessInfo) -> None:
    """Raise StoppedEarlyError if a launcher has restarted a run that was asked to stop."""
    if process.restarts and directory.stopped.exists():
        raise StoppedEarlyError(
            f"{directory.own} was asked to stop, and the launcher started it again: left unchanged"
        )


def take_lease(directory: RunDirectory) -> Lease:
    """Take the lease of a run directory, on rank 0.

    Raises: LeaseHeldError if another run uses it; RunDirectoryError if it cannot be written.
    """
    lease = Lease(directory.lease, holder=this_process())
    lease.acquire()
    return lease


def prepare_directory(directory: RunDirectory, config: TrainConfig, process: ProcessInfo) -> None:
    """Prepare the directory of a new or resumed run, on rank 0, which holds its lease.

    Raises: RunDirectoryError if it holds another run, or `resume` forbids the start; ConfigError
        if `resume_networks` does not fit.
    """
    change = pending_change(directory, config, process.networks)
    directory.check(config, process.networks, changes=change is not None)
    if config.resume == "must" and not complete_checkpoints(directory.checkpoints):
        raise RunDirectoryError(
            f"{directory.path} holds no complete checkpoint to resume from (--resume must)"
        )
    if change:
        archive_networks(directory, change)
    if not process.restarts:
        directory.clear_stop()
