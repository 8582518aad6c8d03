"""Random streams as pure functions of what they are for, so that resuming needs no saved state."""

from __future__ import annotations

import hashlib


def stream_seed(purpose: str, *coordinates: int) -> int:
    """Seed of the stream for one purpose at one place, e.g. ("order", seed, network, epoch).

    Returns: an integer in [0, 2^63), the same in every process; different purposes or
    coordinates give unrelated seeds.
    """
    text = ":".join([purpose, *map(str, coordinates)])
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1
