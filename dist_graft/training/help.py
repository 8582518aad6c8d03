"""``dist-graft train --help``: the options that matter first, all others by section."""

from __future__ import annotations

from argparse import SUPPRESS, Action
from collections.abc import Sequence
from typing import Any

from jsonargparse import ArgumentParser

from dist_graft.errors import ConfigError

FREQUENT = (
    "config",
    "networks",
    "run_dir",
    "epochs",
    "seed",
    "resume",
    "method",
    "data.name",
    "data.root",
    "data.batch_size",
    "data.workers",
    "model.name",
    "init_from",
    "optim.lr",
    "optim.lr_diversity",
    "graft.every",
    "runtime.device",
    "runtime.precision",
    "checkpoint.every",
)
"""Options that ``--help`` shows."""
ALIASES = {
    "lr": "optim.lr",
    "learning_rate": "optim.lr",
    "lrs": "optim.lrs",
    "weight_decay": "optim.weight_decay",
    "wd": "optim.weight_decay",
    "momentum": "optim.momentum",
    "batch_size": "data.batch_size",
    "workers": "data.workers",
    "num_workers": "data.workers",
    "dataset": "data.name",
    "data_dir": "data.root",
    "mixup": "data.mixup",
    "cutmix": "data.cutmix",
    "reprob": "data.random_erasing",
    "smoothing": "optim.label_smoothing",
    "drop": "model.dropout",
    "arch": "model.name",
    "pretrained": "init_from",
    "device": "runtime.device",
    "precision": "runtime.precision",
    "output": "run_dir",
    "output_dir": "run_dir",
    "nproc": "networks",
    "num_networks": "networks",
}
"""Names that other programs use, without dashes, and the options that they mean here."""


class HelpAction(Action):
    """Prints the help of the frequent options, of one section, or of all options, and exits."""

    def __init__(self, option_strings: Sequence[str], dest: str, **settings: Any) -> None:
        super().__init__(option_strings, SUPPRESS, nargs="?", default=SUPPRESS, **settings)

    def __call__(self, parser: Any, namespace: Any, what: Any, option_string: Any = None) -> None:
        """Print the help and exit."""
        del namespace, option_string
        sections = section_names(parser)
        if what not in (None, "all", *sections):
            raise ConfigError(
                f"--help {what}: there is no such section; --help all shows all options, --help "
                f"SECTION those of {', '.join(sections)}"
            )
        for action in parser._actions:
            name = action.dest
            if what is None:
                shown = name in FREQUENT
            else:
                shown = what == "all" or name.partition(".")[0] == what
            if not shown:
                action.help = SUPPRESS
        parser.usage = (
            "dist-graft train [--networks K] [--config FILE] [--SECTION.OPTION VALUE ...]"
        )
        parser.epilog = (
            f"--help SECTION shows the options of one section ({', '.join(sections)}); --help all, "
            "those of all. --print_config prints the configuration."
        )
        for group in parser._action_groups:
            if all(action.help == SUPPRESS for action in group._group_actions):
                group.title = group.description = None
        parser.print_help()
        parser.exit()


def section_names(parser: ArgumentParser) -> list[str]:
    """Names of the sections of options, in the parser's order."""
    return list(dict.fromkeys(a.dest.partition(".")[0] for a in parser._actions if "." in a.dest))


def add_help(parser: ArgumentParser) -> None:
    """Add ``--help`` to a parser that was built without it."""
    parser.add_argument(
        "-h",
        "--help",
        action=HelpAction,
        metavar="all|SECTION",
        help="show this help, that of a section, or all options",
    )
