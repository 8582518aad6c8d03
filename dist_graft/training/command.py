"""``dist-graft train``: train a population of networks."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser

from dist_graft.command import Command, Options
from dist_graft.config import TrainConfig
from dist_graft.config.validation import from_nested
from dist_graft.errors import ConfigError, PeerError, StoppedEarlyError, StoppedError
from dist_graft.population.runtime.process_info import ProcessInfo


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
    return process.shared(from_nested(TrainConfig, options).runtime.replicas)


def run(options: Options, process: ProcessInfo) -> Iterable[str]:
    """Train this process's network. Every rank must call this."""
    config: TrainConfig = from_nested(TrainConfig, options)

    # Check what can be checked before torch is imported.
    from dist_graft.monitoring.log import hold_warnings
    from dist_graft.population.runtime.process import die_with_launcher, leave, stop_on_signals
    from dist_graft.training.data import check_dataset_name
    from dist_graft.training.learning_rates import learning_rates

    check_dataset_name(config.data.name)
    learning_rates(config.optim, process.networks)
    if process.restarts and (Path(config.run_dir) / "STOPPED_EARLY").exists():
        raise StoppedEarlyError(
            f"{config.run_dir} was stopped early, and the launcher restarted it: nothing was done"
        )
    stop_on_signals()
    if process.launched:
        die_with_launcher()
    hold_warnings()
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # our own messages name the cause

    import torch

    from dist_graft.population.runtime.process_group import start
    from dist_graft.training.trainer import fit

    runtime = start(config.runtime, process)
    try:
        fit(config, runtime)
    except StoppedEarlyError:
        raise
    except StoppedError as error:
        gone = runtime.peers.gone() if runtime.peers else []
        if gone:
            raise PeerError(
                f"{'; '.join(gone)} exited; see its own error message, if any. Rerun the same "
                "command to resume from the latest checkpoint"
            ) from error
        raise
    except torch.OutOfMemoryError as error:
        raise ConfigError(
            f"out of GPU memory ({str(error).splitlines()[0]}): lower data.batch_size, or split "
            "the batch with optim.accumulation"
        ) from error
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
