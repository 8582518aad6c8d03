"""Command line: parses the arguments, runs one command, reports errors in one line.

To add a command, define a `dist_graft.command.Command` in a new module and list it in
`COMMANDS`. Nothing here imports torch, so that ``--help`` and invalid options respond
immediately.
"""

from __future__ import annotations

import difflib
import importlib.util
import os
import re
import sys
import traceback
from argparse import SUPPRESS, Action, ArgumentError
from collections.abc import Iterator, Sequence
from typing import Any

from jsonargparse import ArgumentParser

from dist_graft.analysis import (
    doctor,
    evaluate,
    export,
    inspect_filters,
    plan,
    predict,
    push,
    status,
)
from dist_graft.command import Command
from dist_graft.config.parsing import (
    PARSER_SETTINGS,
    append_repeated,
    did_you_mean,
    prepare_parsing,
)
from dist_graft.errors import (
    ConfigError,
    DistGraftError,
    NetworkFailedError,
    StartError,
    StoppedAtStartError,
    StoppedEarlyError,
    StoppedError,
    UserCodeError,
    error_text,
)
from dist_graft.population.runtime.process_info import ProcessInfo, read_process_info
from dist_graft.printing import print_line, printable
from dist_graft.studies import command as compare
from dist_graft.training import command as train
from dist_graft.training.data import command as prepare
from dist_graft.version import versions

COMMANDS: dict[str, Command] = {
    command.name: command
    for command in (
        train.COMMAND,
        prepare.COMMAND,
        evaluate.COMMAND,
        inspect_filters.COMMAND,
        export.COMMAND,
        predict.COMMAND,
        push.COMMAND,
        compare.COMMAND,
        status.COMMAND,
        doctor.COMMAND,
        plan.COMMAND,
    )
}
"""Subcommands by name, in the order of ``dist-graft --help``."""


def run(argv: Sequence[str]) -> int:
    """Run one command and return the exit status.

    A user error is reported in one line: on standard error, in the log of a run that has started,
    and in torchrun's summary of failures.
    """
    process = ProcessInfo()
    try:
        process = read_process_info()
        name, options = _parse(argv)
        command = COMMANDS[name]
        if command.assign:
            process = command.assign(options, process)
        elif process.networks > 1:
            raise StartError(f"{name} runs in one process: start it without torchrun")
        for text in command.run(options, process):
            if not _print(text) and command.only_prints:
                break
        return 0
    except DistGraftError as error:
        if isinstance(error, StoppedEarlyError) and process.launched and process.local_rank == 0:
            from dist_graft.population.runtime.process import terminate_launcher

            terminate_launcher(process.restarts)
        if isinstance(error, NetworkFailedError) and error.traceback:
            print_line(error.traceback)
        if isinstance(error, UserCodeError) and (text := error.user_traceback()):
            print_line(text)
        is_stop = isinstance(error, StoppedError)
        return _fail(error, error.exit_status, process, root_cause=not is_stop)
    except KeyboardInterrupt:
        return 130
    except Exception as error:  # noqa: BLE001  a bug: print the traceback, but fail like the others
        traceback.print_exc()
        return _fail(error, 1, process)


def _print(text: str) -> bool:
    """Print a text, and return whether somebody reads it."""
    try:
        print(printable(text), flush=True)
    except BrokenPipeError:  # the reader, such as head, has exited
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return False
    return True


def _fail(
    error: Exception,
    status: int,
    process: ProcessInfo,
    *,
    root_cause: bool = True,
) -> int:
    # root_cause: whether torchrun's summary of failures may show the message.
    line = error_text(error)
    if process.world_size > 1:
        line = f"{process}: {line}"
    is_stop = isinstance(error, StoppedAtStartError | StoppedEarlyError)
    severity = "" if is_stop else "error: "
    print_line(f"dist-graft: {severity}{line}")
    if process.launched:
        from dist_graft.population.runtime.process import leave, report_failure

        if root_cause:  # otherwise torchrun shows the message of the process that failed first
            report_failure(line)
        leave(status)
    return status


def _parse(argv: Sequence[str]) -> tuple[str, dict[str, Any]]:
    """Name and options of the command."""
    parser = _build_parser()
    try:
        parsed = parser.parse_args(append_repeated(argv))
    except ArgumentError as error:
        raise ConfigError(_explain(str(error), argv, _subparsers(parser))) from error
    options = parsed[parsed.command].clone(with_meta=False).as_dict()
    options.pop("config", None)
    return parsed.command, options


class _VersionAction(Action):
    """Prints the versions on demand, because finding them imports torch."""

    def __init__(self, option_strings: Sequence[str], dest: str, **settings: Any) -> None:
        super().__init__(option_strings, SUPPRESS, nargs=0, default=SUPPRESS, **settings)

    def __call__(self, parser: Any, *_: Any) -> None:
        _print("\n".join(f"{name} {version}" for name, version in versions().items()))
        parser.exit()


class _CompletionAction(Action):
    """Prints a script for tab completion in a shell."""

    def __init__(self, option_strings: Sequence[str], dest: str, **settings: Any) -> None:
        shells = ("bash", "zsh", "tcsh")
        super().__init__(option_strings, SUPPRESS, default=SUPPRESS, choices=shells, **settings)

    def __call__(self, parser: Any, _: Any, shell: Any, *__: Any) -> None:
        if importlib.util.find_spec("shtab") is None:
            raise StartError("--print_completion needs shtab: pip install 'dist_graft[completion]'")
        _print(parser.get_completion_script(f"shtab-{shell}"))
        sys.exit()  # the parser cannot be used after that, not even its exit


def command_parsers() -> dict[str, ArgumentParser]:
    """Parser of each command, by the command's name."""
    return _subparsers(_build_parser())


def _build_parser() -> ArgumentParser:
    prepare_parsing()
    parser = ArgumentParser(
        prog="dist-graft",
        description="Train a population of networks that graft each other.",
        **PARSER_SETTINGS,
    )
    parser.add_argument("--version", action=_VersionAction, help="print all relevant versions")
    parser.add_argument(
        "--print_completion",
        action=_CompletionAction,
        help="print a script for tab completion (extra completion)",
    )
    subcommands = parser.add_subcommands(dest="command", required=True)
    for command in COMMANDS.values():
        subparser = command.build_parser(PARSER_SETTINGS)
        subcommands.add_subcommand(command.name, subparser, help=command.help)
    return parser


def _subparsers(parser: ArgumentParser) -> dict[str, ArgumentParser]:
    subcommands: Any = next(a for a in parser._actions if a.dest == "command")
    return dict(subcommands._name_parser_map)


_KINDS = {
    "<class 'int'>": "a whole number",
    "<class 'float'>": "a number",
    "<class 'bool'>": "true or false",
}


def _explain(message: str, argv: Sequence[str], parsers: dict[str, ArgumentParser]) -> str:
    """The parser's message in the user's terms, with the option that was probably meant."""
    command = re.search(r"argument command: invalid choice: '(.*?)'", message)
    if command or message.startswith('expected "command"'):
        problem = "no command is given"
        if command:
            near = difflib.get_close_matches(command[1], COMMANDS, n=1)
            meant = f"; did you mean {near[0]}?" if near else ""
            problem = f"there is no command {command[1]!r}{meant}"
        return f"{problem}; commands: {', '.join(COMMANDS)}"
    name = argv[0] if argv and argv[0] in COMMANDS else "train"
    section = re.match(r'Parser key "(\w+)":\s+Unable to load config (\S+)\s+- (.*)', message, re.S)
    if section:
        key, file, cause = section.groups()
        missing = f"there is no YAML file {file}; set its options with --{key}.NAME VALUE"
        message = f"section {key}: {missing if 'Unable to load' in cause else f'{file}: {cause}'}"
    required = re.match(r"the following arguments are required: (.*)", message)
    if required:
        keys = [key.rpartition(".")[2] for key in required[1].split(", ")]
        shown = [
            [*action.option_strings, action.dest.upper()][0]
            for action in parsers[name]._actions
            if action.dest in keys
        ]
        message = f"missing: {', '.join(shown)}"
    valued = re.match(r"argument (--\w+): ignored explicit argument '(.*)'", message)
    if valued:
        message = f"{valued[1]} takes no value, got {valued[2]}"
    single = re.match(
        r'Parser key "([\w.]+)":\s+Expected an? (.*)\. Got value: (.*)', message, re.S
    )
    if single:
        key, kind, value = single.groups()
        choices = re.match(r"typing.Literal\[(.*)\]", kind)
        listed = choices[1].replace("'", "") if choices else ""
        legal = f"one of {listed}" if listed else _KINDS.get(kind)
        if legal:
            message = f"--{key} must be {legal}, got {value.strip()}"
    union = re.match(
        r'Parser key "([\w.]+)":.*?Subtypes:\s*\[(.*?)\].*Given value:\s*(.*)', message, re.S
    )
    if union:
        key, listed, value = union.groups()
        kinds = [kind for kind in re.findall(r"class '([\w.]+)'", listed) if kind != "NoneType"]
        if kinds:
            message = f"--{key} must be {' or '.join(kinds)}, got {value.strip()}"
    nested = re.match(r'Parser key "([\w.]+)":.*NestedArg\(key=\'([\w.]+)\'', message, re.S)
    if nested:
        message = f"unrecognized arguments: --{'.'.join(nested.groups())}; use --{nested.group(1)}"
    hint = did_you_mean(message, _option_names(parsers[name]), COMMANDS[name].aliases)
    how = "--help all" if name == "train" else "--help"
    return f"{message}{hint}; dist-graft {name} {how} lists all options"


def _option_names(parser: ArgumentParser) -> Iterator[str]:
    for action in parser._actions:
        yield from (option.removeprefix("--") for option in action.option_strings)
