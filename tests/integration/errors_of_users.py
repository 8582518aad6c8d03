"""Functions of a user that fail."""

from __future__ import annotations

from typing import NoReturn


def no_memory(_: str) -> NoReturn:
    raise MemoryError


def no_model(**_: int) -> NoReturn:
    raise ZeroDivisionError


def no_rule() -> NoReturn:
    raise ZeroDivisionError
