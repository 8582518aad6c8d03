"""``dist-graft train``: train a population of networks."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterable, Mapping
from typing import Any

from jsonargparse import ArgumentParser

from dist_graft.command import Command, Options
from dist_graft.config import TrainConfig
from dist_graft.config.members import member_configs
from dist_graft.config.validation import at_least, from_nested
from dist_graft.errors import ConfigError
from dist_graft.population.runtime.process_info import ProcessInfo
from dist_graft.training.help import ALIASES, add_help
from dist_graft.training.jobs import assign_network


def build_parser(settings: Mapping[str, Any]) -> ArgumentParser:
    """Build a parser with an option for every field of `TrainConfig`."""
    parser = ArgumentParser(
        description="Train a population of networks: --networks K on this machine, or one network "
        "per process under torchrun.",
        add_help=False,
        **settings,
    )
    add_help(parser)
    parser.add_argument(
        "--config",
        action="config",
        help="YAML file with options. A section may name another YAML file, relative to this one.",
    )
    parser.add_argument(
        "--networks",
        type=int | None,
        default=None,
        help="Size of the population; starts its processes on this machine. Leave it out under "
        "torchrun, which starts them itself.",
    )
    parser.add_class_arguments(TrainConfig, nested_key=None, sub_configs=True)
    return parser


def assign(options: Options, process: ProcessInfo) -> ProcessInfo:
    """Assign the process to a network, ``runtime.replicas`` processes each."""
    config, networks = read_options(options)
    if networks and process.launched:
        raise ConfigError(
            "--networks starts the processes itself, but this one was started by a launcher (RANK "
            "is set): leave out --networks, or start without torchrun"
        )
    return process if networks else assign_network(config, process)


def read_options(options: Options) -> tuple[TrainConfig, int | None]:
    """The configuration, and ``--networks``, which is no part of it."""
    values = dict(options)
    networks = values.pop("networks")
    at_least("--networks", networks, 1)
    config: TrainConfig = from_nested(TrainConfig, values)
    if networks and config.graft.exchange == "files":
        raise ConfigError(
            "--networks starts networks that run together, but with graft.exchange files each "
            "network is an independent job: start one job for each, without --networks"
        )
    return config, networks


def run(options: Options, process: ProcessInfo) -> Iterable[str]:
    """Train this process's network. Every rank must call this."""
    config, networks = read_options(options)

    # Before torch is imported: check what can be checked, and prepare the process.
    from dist_graft.monitoring.log import hold_warnings
    from dist_graft.monitoring.logger import check_loggers
    from dist_graft.population.runtime.process import (
        die_with_launcher,
        ignore_signals,
        leave,
        stop_on_signals,
    )
    from dist_graft.training.data import check_dataset_name
    from dist_graft.training.learning_rates import learning_rates

    check_dataset_name(config.data.name)
    learning_rates(config.optim, networks or process.networks)
    member_configs(config, networks or process.networks)
    check_loggers(config.monitor.loggers)
    if networks and networks * config.runtime.replicas > 1:
        # Until the launcher handles Ctrl-C, it ends the process: imports can swallow exceptions.
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        from dist_graft.training.train import train

        train(config, networks=networks)
        return ()
    stop_on_signals(at_start=True)
    if process.launched:
        die_with_launcher()
    hold_warnings()
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # our own lines say what failed

    from dist_graft.training.trainer import Trainer

    try:
        Trainer(config).fit()
    finally:
        ignore_signals()  # the run has ended; the error message is still to be printed
    if process.launched:
        leave(0)
    return ()


COMMAND = Command(
    name="train",
    help="train a population of networks",
    build_parser=build_parser,
    run=run,
    assign=assign,
    aliases=ALIASES,
)
