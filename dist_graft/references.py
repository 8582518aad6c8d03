"""References package.module:name to user-defined functions and classes."""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection
from importlib import import_module
from pathlib import Path
from typing import Any


def is_reference(name: str) -> bool:
    """Whether a name has the form package.module:name."""
    return ":" in name


def resolve(reference: str) -> Callable[..., Any]:
    """Import the function or class package.module:name.

    The working directory is appended to `sys.path`.

    Raises: ValueError if the module does not exist or has no such function or class.
    """
    module_name, _, name = reference.partition(":")
    working_directory = str(Path.cwd())
    if working_directory not in sys.path:
        sys.path.append(working_directory)
    try:
        module = import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise  # the user's module imports something that is missing
        raise ValueError(
            f"{reference!r}: there is no module {error.name} in the working directory or on "
            "PYTHONPATH"
        ) from error
    function = getattr(module, name, None)
    if not callable(function):
        raise ValueError(f"{reference!r}: {module.__name__} has no function or class {name!r}")
    resolved: Callable[..., Any] = function
    return resolved


def check_name(name: str, known: Collection[str]) -> None:
    """Raise ValueError unless a name is known or a reference. References are not resolved."""
    if name not in known and not is_reference(name):
        names = f"one of {', '.join(known)}, or " if known else ""
        raise ValueError(f"must be {names}a reference package.module:name, got {name!r}")
