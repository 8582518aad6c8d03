"""What users add without editing this package: "package.module:name" names an object of theirs."""

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
    """The function or class that package.module:name names.

    Modules are found as Python finds them, and then from the working directory, too.

    Raises: ValueError saying what is not there.
    """
    module_name, _, name = reference.partition(":")
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.append(here)
    try:
        module = import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise  # a module of the user's imports something that is missing
        raise ValueError(
            f"{reference!r}: there is no module {error.name}; it is looked for in the working "
            "directory and on PYTHONPATH"
        ) from error
    found = getattr(module, name, None)
    if not callable(found):
        raise ValueError(f"{reference!r}: {module.__name__} has no function or class {name!r}")
    function: Callable[..., Any] = found
    return function


def check_name(name: str, known: Collection[str]) -> None:
    """Raise ValueError unless a name is known or a reference, which may still lead nowhere."""
    if name not in known and not is_reference(name):
        ours = f"one of {', '.join(known)}, or " if known else ""
        raise ValueError(f"must be {ours}package.module:name of your own, got {name!r}")
