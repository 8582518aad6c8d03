"""Opens a run: checks of options and run directory before a run starts or resumes."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from dist_graft.config import TrainConfig
from dist_graft.config.members import member_configs
from dist_graft.config.train import callback_with_arguments
from dist_graft.config.validation import own
from dist_graft.errors import DataError, RunDirectoryError, StoppedEarlyError
from dist_graft.population.runtime.process_group import Runtime
from dist_graft.population.runtime.process_info import ProcessInfo
from dist_graft.references import is_reference
from dist_graft.run_directory import RunDirectory, as_plain, flatten
from dist_graft.training.builders import build_task
from dist_graft.training.checkpoint.files import complete_checkpoints
from dist_graft.training.checkpoint.membership import archive_networks, pending_change
from dist_graft.training.data import Data
from dist_graft.training.data.base import transform_function
from dist_graft.training.data.datasets import Datasets, refuse_image_options
from dist_graft.training.learning_rates import lr_factor
from dist_graft.training.models import check_model_name
from dist_graft.training.optimizers import optimizer_call, refuse_optimizer_options
from dist_graft.training.task import LossFunction, MetricFunction, refuse_loss_of_classes

_PER_PROCESS = (
    *("run_dir", "data.root", "data.workers", "runtime.device", "runtime.threads"),
    "population.network",
)
"""Options that may differ between the processes of a run."""


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


def check_names(config: TrainConfig, *, model: bool, optimizer: bool) -> None:
    """Check everything that the configuration names.

    For optim.loss, only whether it accepts targets of mixed images; `build_task` checks the rest.

    Args:
        config: of one network.
        model: whether `config.model` is used.
        optimizer: whether the optimizer of `config.optim` is used.

    Raises: ConfigError naming the option; FunctionError if the function of optim.schedule fails.
    """
    if model:
        check_model_name(config.model.name)
    if optimizer:
        optimizer_call(config.optim)
    else:
        refuse_optimizer_options(config.optim)
    if config.optim.loss is not None and config.data.mixes:
        refuse_loss_of_classes(config.optim)
    lr_factor(config.optim, epochs=1, steps_per_epoch=1)
    if config.data.transform is not None:
        transform_function(config.data)
    named = {
        "method": config.method,
        "graft.rule": config.graft.rule,
        "graft.criterion": config.graft.criterion,
        "graft.topology": config.graft.topology,
        "data.name": config.data.name,
    }
    for option, name in named.items():
        if name is not None and is_reference(name):
            own(option, name)
    for entry in config.callbacks:
        own("callbacks", callback_with_arguments(entry)[0])


def refuse_other_lengths(runtime: Runtime, data: Data) -> None:
    """Raise DataError, on all ranks, if an epoch does not have equally many steps everywhere.

    Rounds and checkpoints inside an epoch follow its steps. A collective.
    """
    rows = runtime.gather_all_ranks([float(data.steps_per_epoch)], "the lengths of an epoch")
    lengths = [int(steps) for (steps,) in rows]
    if len(set(lengths)) > 1:
        raise DataError(
            f"an epoch has different numbers of steps on different ranks ({lengths}): give all "
            "networks, on all machines, equally many training samples"
        )


def options_text(config: TrainConfig) -> str:
    """The options that all processes must share, as JSON."""
    options = dict(flatten(as_plain(config)))
    return json.dumps({name: options[name] for name in options if name not in _PER_PROCESS})


def refuse_stopped(directory: RunDirectory, process: ProcessInfo) -> None:
    """Raise StoppedEarlyError if a launcher has restarted a run that was asked to stop."""
    if process.restarts and directory.stopped.exists():
        raise StoppedEarlyError(
            f"{directory.own} was asked to stop, but the launcher restarted it; nothing was changed"
        )


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


def refuse_unshared(
    folder: Path, seen: Sequence[Sequence[float]], hosts: Sequence[str], replicas: int, lag: float
) -> None:
    """Raise RunDirectoryError if some processes did not see rank 0's lease within `lag` seconds.

    Args:
        folder: the run directory.
        seen: for each rank, whether it sees the lease.
        hosts: host of each rank.
        replicas: processes per network.
        lag: time limit in seconds.
    """
    blind = [
        f"network {rank // replicas} on {host}"
        for rank, (host, (sees,)) in enumerate(zip(hosts, seen, strict=True))
        if not sees
    ]
    if blind:
        raise RunDirectoryError(
            f"{folder} is not shared by all processes: {'; '.join(dict.fromkeys(blind))} did not "
            f"see within {lag:g} s what network 0 wrote there; choose a run_dir on a disk that all "
            "machines mount under the same path"
        )
