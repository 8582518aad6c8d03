"""Choice between cache-sized loops (CPU) and multi-tensor operations (accelerators)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from torch import Tensor

_forced = False


def multi_tensor(tensors: Iterable[Tensor]) -> bool:
    """Whether to process tensors, which are on one device, together: it is not the CPU.

    An accelerator is limited by kernel launches, so a few operations should process all tensors.
    On the CPU, one tensor at a time is faster, in parts that fit in a core's cache.
    """
    return _forced or any(tensor.device.type != "cpu" for tensor in tensors)


@contextmanager
def forced_multi_tensor() -> Iterator[None]:
    """Take the accelerators' branch for tensors on the CPU too, in tests."""
    global _forced  # noqa: PLW0603
    _forced = True
    try:
        yield
    finally:
        _forced = False
