"""``dist-graft train``: train a population of networks."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from typing import Any

from jsonargparse import ArgumentParser

from dist_graft.command import Command, Options
from dist_graft.config import TrainConfig
from dist_graft.config.validation import from_nested
from dist_graft.population.runtime.process_info import ProcessInfo
from dist_graft.training.jobs import assign_network


def build_parser(settings: Mapping[str, Any]) -> ArgumentParser:
    """Build a parser with an option for every field of `TrainConfig`."""
    parser = ArgumentParser(
        description="Train one network per process. Start with torchrun to train more than one.",
        **settings,
    )
    parser.add_argument(
        "--config",
        action="config",
        help="YAML file with options. A section may name another YAML file, relative to this one.",
    )
    parser.add_class_arguments(TrainConfig, nested_key=None, sub_configs=True)
    return parser


def assign(options: Options, process: ProcessInfo) -> ProcessInfo:
    """Assign the process to a network, ``runtime.replicas`` processes each."""
    return assign_network(from_nested(TrainConfig, options), process)


def run(options: Options, process: ProcessInfo) -> Iterable[str]:
    """Train this process's network. Every rank must call this."""
    config: TrainConfig = from_nested(TrainConfig, options)

    # Before torch is imported: check what can be checked, and prepare the process.
    from dist_graft.monitoring.log import hold_warnings
    from dist_graft.population.runtime.process import (
        die_with_launcher,
        ignore_signals,
        leave,
        stop_on_signals,
    )
    from dist_graft.training.data import check_dataset_name
    from dist_graft.training.learning_rates import learning_rates

    check_dataset_name(config.data.name)
    learning_rates(config.optim, process.networks)
    stop_on_signals()
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
)
