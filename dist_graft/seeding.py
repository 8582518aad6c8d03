"""Seeds as pure functions of purpose and coordinates, so that resuming needs no RNG state."""

from __future__ import annotations

import hashlib


def stream_seed(purpose: str, *coordinates: int) -> int:
    """Seed of the random stream for one purpose, e.g. ("order", seed, network, epoch).

    Returns: a hash of the arguments in [0, 2^63), the same in every process.
    """
    text = ":".join([purpose, *map(str, coordinates)])
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1
