"""Write docs/options.md, the page of all options, from the command line's own parser.

Run it as: python tools/make_options_page.py
"""

from __future__ import annotations

import argparse
import json
import re
import types
import typing
from collections.abc import Iterator
from pathlib import Path

from dist_graft.cli import command_parsers

PAGE = Path(__file__).parents[1] / "docs" / "options.md"

_INTRODUCTION = """\
# Every option

Written from the code by `python tools/make_options_page.py`; do not edit it by hand. Options are
given as `--section.option VALUE` on the command line, or in a YAML file with `--config FILE`:

```yaml
epochs: 40
optim:
  lr: 0.05
```

A misspelt option or a value out of range is refused before anything runs. `dist-graft COMMAND
--help` says the same as this page; `dist-graft train --print_config` prints a file to start from.
"""
_TOP = "of the run"
_MEANINGS = {"print_config": "Print the configuration that the other options give, and leave."}
"""Of what the parser itself adds."""


def page() -> str:
    """The whole page."""
    parts = [_INTRODUCTION]
    parsers = command_parsers()
    parts.append(" · ".join(f"[{name}](#dist-graft-{name})" for name in parsers) + "\n")
    for name, parser in parsers.items():
        parts.append(f"## dist-graft {name}\n\n{parser.description}\n")
        sections: dict[str, list[argparse.Action]] = {}
        for action in _shown(parser):
            section = action.dest.partition(".")[0] if "." in action.dest else _TOP
            sections.setdefault(section, []).append(action)
        train = name == "train"
        for section, actions in sections.items():
            if train:
                parts.append(f"### {section}\n")
            parts.append(_table(actions))
    return "\n".join(parts)


def _shown(parser: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    """Without help, and without what stands for a whole section."""
    for action in parser._actions:
        told = action.default != argparse.SUPPRESS or action.dest in _MEANINGS
        if told and action.dest != "help":
            yield action


def _table(actions: list[argparse.Action]) -> str:
    rows = ["| option | values | default | meaning |", "| --- | --- | --- | --- |"]
    for action in actions:
        name = action.option_strings[0] if action.option_strings else action.dest.upper()
        cells = (f"`{name}`", _values(action), _default(action), _text(action))
        rows.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(rows) + "\n"


def _values(action: argparse.Action) -> str:
    if action.dest in ("config", "print_config") or action.nargs == 0:
        return {"config": "file"}.get(action.dest, "")
    kind = getattr(action, "_typehint", None) or action.type
    return _kind(kind) + (" …" if action.nargs == "+" else "")


def _kind(kind: object) -> str:
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if origin is typing.Literal:
        return ", ".join(f"`{value}`" for value in inner)
    if origin in (typing.Union, types.UnionType):
        return ", ".join(_kind(part) for part in inner if part is not type(None))
    if origin is list:
        return f"list of {_kind(inner[0])}s"
    if origin is tuple:
        return " and ".join(_kind(part) for part in inner)
    names = {str: "text", int: "whole number", float: "number", bool: "`true`, `false`"}
    assert isinstance(kind, type), kind
    return names[kind]


def _default(action: argparse.Action) -> str:
    if not action.option_strings:
        return "required"
    if action.default in (None, argparse.SUPPRESS) or action.nargs == 0:
        return ""
    if isinstance(action.default, str):
        return f"`{action.default}`"
    return f"`{json.dumps(action.default)}`"


def _text(action: argparse.Action) -> str:
    """The help in one line."""
    words = " ".join((_MEANINGS.get(action.dest) or action.help or "").split())
    assert words, f"{action.dest} has no help"
    return re.sub(r"([<>])", r"\\\1", words)


if __name__ == "__main__":
    PAGE.write_text(page())
    print(f"wrote {PAGE}")
