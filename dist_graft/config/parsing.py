"""Strict parsing of options and YAML files into configuration dataclasses."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import re
import typing
from argparse import ArgumentError
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import yaml
from jsonargparse import ArgumentParser, get_loader, set_loader, set_parsing_settings

from dist_graft.config import TrainConfig
from dist_graft.config.validation import from_nested
from dist_graft.errors import ConfigError

PARSER_SETTINGS: Mapping[str, Any] = {"allow_abbrev": False, "exit_on_error": False}
"""Settings of every parser."""

SECTIONS = tuple(
    field.name
    for field in dataclasses.fields(TrainConfig)
    if dataclasses.is_dataclass(field.default_factory)
)
"""Sections of TrainConfig. In a YAML file each may be the name of another YAML file."""

_yaml_load = get_loader("yaml")


def prepare_parsing() -> None:
    """Make jsonargparse read YAML strictly and use the docstrings of fields as help."""
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    set_loader("yaml", load_strictly, (yaml.YAMLError,))


def load_strictly(text: str) -> Any:
    """Load YAML as jsonargparse does, but refuse duplicate keys.

    The section `run` that is added to a run directory's config.yaml is removed, so that the file
    can be used with ``--config``.

    Raises: yaml.YAMLError.
    """
    node = yaml.compose(text, Loader=yaml.SafeLoader)
    if node is not None:
        _refuse_duplicates(node)
    value = _yaml_load(text)
    if isinstance(value, dict) and "run_dir" in value:
        value.pop("run", None)
    return value


def _refuse_duplicates(node: yaml.Node) -> None:
    if isinstance(node, yaml.MappingNode):
        seen = set()
        for key, value in node.value:
            if key.value in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"key {key.value!r} is given twice", key.start_mark
                )
            seen.add(key.value)
            _refuse_duplicates(value)
    elif isinstance(node, yaml.SequenceNode):
        for value in node.value:
            _refuse_duplicates(value)


def from_mapping(kind: type[Any], values: Mapping[str, Any]) -> Any:
    """Create a configuration dataclass from the content of a YAML file, checking names and types.

    Raises: ConfigError for an unknown name, a wrong type or a value out of range.
    """
    try:
        parsed = _parser(typing.cast("Callable[..., Any]", kind)).parse_object(dict(values))
    except ArgumentError as error:
        message = " ".join(str(error).replace("typing.", "").split())
        hint = did_you_mean(message, option_names(kind)).replace("--", "")
        raise ConfigError(message + hint) from error
    return from_nested(kind, parsed.as_dict())


@functools.cache
def _parser(kind: Callable[..., Any]) -> ArgumentParser:
    prepare_parsing()
    parser = ArgumentParser(**PARSER_SETTINGS)
    parser.add_class_arguments(kind, nested_key=None)
    return parser


def option_names(kind: type[Any] = TrainConfig) -> Iterator[str]:
    """Names of all options of a configuration, without the leading dashes."""
    return (name for name, _ in _options(kind))


def _options(kind: type[Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Name and type of every option."""
    types = typing.get_type_hints(kind)
    for field in dataclasses.fields(kind):
        if dataclasses.is_dataclass(types[field.name]):
            section = typing.cast("type[Any]", types[field.name])
            yield from _options(section, f"{prefix}{field.name}.")
        else:
            yield f"{prefix}{field.name}", types[field.name]


def append_repeated(argv: Sequence[str]) -> list[str]:
    """Make options repeatable: `--name VALUE` becomes `--name+=VALUE`.

    Applies to `callbacks` and options of type list[str]. Values are appended to those of a
    configuration file. A YAML list (`--name "[a, b]"`) replaces them.
    """
    repeatable = {f"--{name}" for name, kind in _options(TrainConfig) if kind == list[str]}
    repeatable.add("--callbacks")
    rewritten: list[str] = []
    words = iter(argv)
    for word in words:
        option, equals, value = word.partition("=")
        if option not in repeatable:
            rewritten.append(word)
            continue
        if not equals:
            value = next(words, "")
        appends = "+" if value and not value.startswith("[") else ""
        rewritten.append(f"{option}{appends}={value}")
    return rewritten


def did_you_mean(
    message: str, options: Iterable[str], aliases: Mapping[str, str] | None = None
) -> str:
    """Suggest an option for the unknown one in a parser's message, or return an empty string.

    Args:
        message: the parser's message.
        options: names of all options, without dashes.
        aliases: names that other programs use, and the options that they mean here.
    """
    unknown = re.search(r"(?:arguments?: --|[Oo]ption ')([\w.-]+)", message)
    if unknown:
        name = unknown.group(1)
        meant = (aliases or {}).get(name.replace("-", "_"))
        near = [meant] if meant else difflib.get_close_matches(name, list(options), n=1)
        if near and near[0] != name:
            return f"; did you mean --{near[0]}?"
    return ""
