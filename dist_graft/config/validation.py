"""Validation of option values, and configurations from nested dictionaries."""

from __future__ import annotations

import dataclasses
import inspect
import json
import math
import typing
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from dist_graft.errors import ConfigError
from dist_graft.references import check_name, resolve

_LARGEST = 2**31 - 1
_LARGEST_FLOAT32 = 3.4e38
MAX_SECONDS = 1e8
"""Longest timeout, about three years; clocks and threads overflow beyond."""


def require(ok: bool, name: str, value: object, legal: str) -> None:
    """Raise ConfigError with the option's name, value and legal range, unless ok."""
    if not ok:
        raise ConfigError(f"{name} must be {legal}, got {value!r}")


def nearest_names(names: Sequence[str]) -> str:
    """The part of an error message that suggests similar names; empty without any."""
    return f"nearest: {', '.join(names)}; " if names else ""


def at_least(name: str, value: float | None, least: float) -> None:
    """Require a number from `least` to 2^31 - 1. None, for unset, is accepted."""
    if value is not None:
        require(least <= value < math.inf, name, value, f"at least {least}")
        require(value <= _LARGEST, name, value, f"at most {_LARGEST}")


def above_zero(name: str, value: float | None) -> None:
    """Require a number greater than 0 that float32 can hold. None, for unset, is accepted."""
    if value is not None:
        require(0 < value < math.inf, name, value, "above 0")
        require(value < _LARGEST_FLOAT32, name, value, f"below {_LARGEST_FLOAT32:g}")


def at_most(name: str, value: float | None, most: float) -> None:
    """Require a number of at most `most`. None, for unset, is accepted."""
    if value is not None:
        require(value <= most, name, value, f"at most {most:g}")


def step_range(name: str, value: str) -> tuple[int, int]:
    """Parse a range of steps A:B with 0 <= A < B.

    Raises: ConfigError naming the option.
    """
    first, colon, last = value.partition(":")
    legal = bool(colon) and all(
        number.isascii() and number.isdigit() and len(number) < 16 for number in (first, last)
    )
    require(
        legal and int(first) < int(last),
        name,
        value,
        "A:B with integers 0 <= A < B (steps A to B - 1 of the run, counted from 0)",
    )
    return int(first), int(last)


def known_or_own(option: str, name: str, known: Collection[str]) -> None:
    """Require a known name or a reference package.module:name."""
    try:
        check_name(name, known)
    except ValueError as error:
        raise ConfigError(f"{option} {error}") from error


def check_kwargs(option: str, kwargs: Mapping[str, Any], reserved: Mapping[str, str]) -> None:
    """Check an option with additional arguments of a function; config.yaml must be able to hold it.

    Args:
        option: its name.
        kwargs: its value.
        reserved: arguments that it must not contain, and what sets them.

    Raises: ConfigError naming the option.
    """
    given = [f"{name} (set by {by})" for name, by in reserved.items() if name in kwargs]
    require(not given, option, kwargs, f"without {' and '.join(given)}")
    try:
        json.dumps(kwargs)
    except TypeError as error:
        raise ConfigError(f"{option} must hold plain values, got {kwargs!r}") from error


@contextmanager
def fitting_kwargs(name: str, kwargs: Mapping[str, Any]) -> Iterator[None]:
    """Report an error of a model's function that was called with kwargs as a ConfigError."""
    try:
        yield
    except (TypeError, ValueError, RuntimeError, ZeroDivisionError) as error:
        if not kwargs:
            raise
        raise ConfigError(f"model.kwargs {dict(kwargs)} do not fit {name}: {error}") from error


def own(option: str, reference: str) -> Callable[..., Any]:
    """Import the object of an option's reference package.module:name.

    Raises: ConfigError if it does not exist.
    """
    try:
        return resolve(reference)
    except ValueError as error:
        raise ConfigError(f"{option} {error}") from error


def own_function(
    option: str, reference: str, kwargs: Mapping[str, Any], *, arguments: int
) -> Callable[..., Any]:
    """Import the function of an option's reference, to be called with `kwargs`.

    Args:
        option: its name; `kwargs` are those of the option NAME_kwargs.
        reference: its value, package.module:name.
        kwargs: arguments by name.
        arguments: number of positional arguments.

    Raises: ConfigError if it does not exist or does not take these arguments.
    """
    function = own(option, reference)
    check_call(f"{option} {reference}", function, (None,) * arguments, kwargs)
    return function


def check_call(
    what: str, function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]
) -> None:
    """Raise ConfigError unless the function takes these arguments; does not call it."""
    try:
        signature = inspect.signature(function)
    except ValueError:  # some functions written in C have none
        return
    try:
        signature.bind(*args, **kwargs)
    except TypeError as error:
        given = ", ".join([*(["..."] * len(args)), *(f"{name}=..." for name in kwargs)])
        raise ConfigError(f"{what} cannot be called as function({given}): {error}") from error


def from_nested(kind: type[Any], values: Mapping[str, Any]) -> Any:
    """Create a configuration dataclass from nested dictionaries.

    Raises: ConfigError for a value out of range; TypeError for an unknown name.
    """
    types = typing.get_type_hints(kind)
    return kind(**{name: _as_field(name, types.get(name), value) for name, value in values.items()})


def _as_field(name: str, kind: Any, value: Any) -> Any:
    if dataclasses.is_dataclass(kind):
        if not isinstance(value, Mapping):
            raise ConfigError(f"{name} must be a section with options, got {value!r}")
        try:
            return from_nested(typing.cast("type[Any]", kind), value)
        except ConfigError:
            raise
        except ValueError as error:  # the options of a rule do not know their section
            raise ConfigError(f"{name}.{error}") from error
    return tuple(value) if typing.get_origin(kind) is tuple else value
