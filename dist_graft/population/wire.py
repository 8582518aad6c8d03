"""The one place that tells a failure on the way to the peers from any other failure."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class WireError(Exception):
    """A collective failed: a peer died, or did not answer in time; the text is the backend's."""


@contextmanager
def on_the_wire() -> Iterator[None]:
    """Around collectives and nothing else: their RuntimeError becomes a WireError."""
    try:
        yield
    except RuntimeError as error:
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise WireError(first) from error
