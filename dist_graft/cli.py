"""The command line: parses, validates, calls one function for each command.

Nothing here or above the functions that run a command imports torch, so that help and mistakes
are answered at once.
"""

from __future__ import annotations

import os
import re
import sys
import traceback
from argparse import SUPPRESS, Action, ArgumentError
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ArgumentParser

from dist_graft.analysis import commands as analysis
from dist_graft.config import TrainConfig
from dist_graft.config.parsing import (
    PARSER_SETTINGS,
    append_repeated,
    did_you_mean,
    prepare_parsing,
)
from dist_graft.config.validation import from_nested
from dist_graft.errors import (
    ConfigError,
    DistGraftError,
    StoppedEarlyError,
    StoppedError,
)
from dist_graft.population.runtime.process_info import ProcessInfo, read_process_info
from dist_graft.printing import tell
from dist_graft.version import versions


def run(argv: Sequence[str]) -> int:
    """Run one command; returns the exit status.

    An error of the user's making ends with one line that says what to do: on standard error, in
    the network's log.txt when a run directory is known, and in torchrun's table of failures.
    """
    process = ProcessInfo()
    try:
        process = read_process_info()
        command, options = _parse(argv)
        if command == "prepare":
            from dist_graft.training.data.prepare import prepare

            print(prepare(options["name"], root=options["root"], source=options["source"]))
            return 0
        if command in analysis.COMMANDS:
            told = analysis.COMMANDS[command](options, process)
            for text in [told] if isinstance(told, str) else told:
                _show(text)
            return 0
        config = from_nested(TrainConfig, options)
        process = process.with_replicas(config.runtime.replicas)
        return _train(config, process)
    except StoppedEarlyError as error:
        if process.launched and process.local_rank == 0:
            from dist_graft.population.runtime.process import terminate_launcher

            terminate_launcher()
        return _fail(str(error), error.exit_status, process, argv, root_cause=False)
    except StoppedError as error:
        return _fail(str(error), error.exit_status, process, argv, root_cause=False)
    except DistGraftError as error:
        return _fail(str(error), error.exit_status, process, argv)
    except KeyboardInterrupt:  # of a command that needs no farewell
        return 130
    except Exception as error:  # noqa: BLE001  a defect of ours: told in full, and left at once
        traceback.print_exc()
        return _fail(f"unexpected {type(error).__name__}: {error}", 1, process, argv)


def _show(text: str) -> None:
    try:
        print(text, flush=True)
    except BrokenPipeError:  # the reader, such as head, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _train(config: TrainConfig, process: ProcessInfo) -> int:
    from dist_graft.population.runtime.process import leave
    from dist_graft.training.trainer import Trainer

    Trainer(config).fit()
    if process.launched:
        leave(0)
    return 0


def _fail(
    message: str, status: int, process: ProcessInfo, argv: Sequence[str], *, root_cause: bool = True
) -> int:
    line = " ".join(message.split())
    if process.world_size > 1:
        line = f"{process}: {line}"
    tell(f"dist-graft: error: {line}")
    run_dir = _mentioned(argv, "--run_dir") or _run_dir_in_file(_mentioned(argv, "--config"))
    if run_dir and "train" in argv:
        from dist_graft.monitoring.log import append_line

        append_line(Path(run_dir) / f"network{process.network:02d}", f"ERROR {line}")
    if process.launched:
        from dist_graft.population.runtime.process import leave, report_failure

        if root_cause:  # else the line of whoever failed first is the one to show
            report_failure(line)
        leave(status)
    return status


def _parse(argv: Sequence[str]) -> tuple[str, dict[str, Any]]:
    parser = _parser()
    try:
        parsed = parser.parse_args(append_repeated(argv))
    except ArgumentError as error:
        raise ConfigError(_explain(str(error), argv)) from error
    command = parsed.command
    options = parsed[command].clone(with_meta=False).as_dict()
    options.pop("config", None)
    return command, options


class _Versions(Action):
    """Looks the versions up only when they are asked for: that imports torch."""

    def __init__(self, option_strings: Sequence[str], dest: str, **settings: Any) -> None:
        super().__init__(option_strings, SUPPRESS, nargs=0, default=SUPPRESS, **settings)

    def __call__(self, parser: Any, *_: Any) -> None:
        _show("\n".join(f"{name} {version}" for name, version in versions().items()))
        parser.exit()


def command_parsers() -> dict[str, ArgumentParser]:
    """The parser of each command, by its name."""
    subcommands: Any = next(a for a in _parser()._actions if a.dest == "command")
    return dict(subcommands._name_parser_map)


def _parser() -> ArgumentParser:
    prepare_parsing()
    settings = PARSER_SETTINGS
    parser = ArgumentParser(
        prog="dist-graft",
        description="Train a population of networks that graft each other.",
        **settings,
    )
    parser.add_argument("--version", action=_Versions, help="print all versions that matter")
    commands = parser.add_subcommands(dest="command", required=True)

    train = ArgumentParser(
        description="Train one network a process; start with torchrun for more than one.",
        **settings,
    )
    train.add_argument(
        "--config",
        action="config",
        help="YAML file with options; a section may be the name of a YAML file beside it.",
    )
    train.add_class_arguments(TrainConfig, nested_key=None, sub_configs=True)
    commands.add_subcommand("train", train, help="train a population")

    prepare = ArgumentParser(description="Put a data set where training finds it.", **settings)
    prepare.add_argument("name", type=str, help="fashion-mnist, cifar10 or cifar100")
    prepare.add_argument("--root", type=str, default="data", help="folder that holds data sets")
    prepare.add_argument(
        "--source", type=str | None, default=None, help="folder with the original files"
    )
    commands.add_subcommand("prepare", prepare, help="put a data set where training finds it")
    analysis.add_parsers(commands, settings)
    return parser


def _explain(message: str, argv: Sequence[str]) -> str:
    """The parser's message, with the option that was probably meant."""
    if argv and argv[0] in ("prepare", *analysis.COMMANDS):
        return f"{message}; dist-graft {argv[0]} --help lists all options"
    section = re.match(r'Parser key "(\w+)":\s+Unable to load config (\S+)\s+- (.*)', message, re.S)
    if section:
        name, file, why = section.groups()
        unread = f"there is no file of options {file}: its options are --{name}.NAME VALUE"
        message = f"section {name}: {unread if 'Unable to load' in why else f'{file}: {why}'}"
    return f"{message}{did_you_mean(message)}; dist-graft train --help lists all options"


def _mentioned(argv: Sequence[str], option: str) -> str | None:
    """An option's value, read without the parser, for errors that the parser itself finds."""
    for index, word in enumerate(argv):
        if word == option and index + 1 < len(argv):
            return argv[index + 1]
        if word.startswith(f"{option}="):
            return word.partition("=")[2]
    return None


def _run_dir_in_file(path: str | None) -> str | None:
    """The run directory that a configuration file names, if it can be read at all."""
    try:
        options = yaml.safe_load(Path(path).read_text()) if path else None
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return None
    run_dir = options.get("run_dir") if isinstance(options, dict) else None
    return run_dir if isinstance(run_dir, str) else None
