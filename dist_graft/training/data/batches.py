"""Operations on a batch of nested tensors, as `torch.utils.data.default_collate` returns it.

Leaves with a batch dimension are tensors, and lists of strings.
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from typing import Any

from torch import Tensor


def map_tensors(function: Callable[[Tensor], Any], batch: Any) -> Any:
    """Apply a function to every tensor in nested dicts, tuples and lists; keep everything else."""
    return _map(lambda leaf: function(leaf) if isinstance(leaf, Tensor) else leaf, batch)


def batch_size(batch: Any) -> int:
    """Size of the first dimension of the first leaf of a batch.

    Raises: ValueError if the batch has no leaf.
    """
    sizes: list[int] = []
    _map(lambda leaf: sizes.append(len(leaf)), batch)
    if not sizes:
        raise ValueError(f"a batch must contain tensors, got {batch!r}")
    return sizes[0]


def split_batch(batch: Any, parts: int) -> Iterator[Any]:
    """Split every leaf of a batch along its first dimension, as `Tensor.tensor_split` does."""
    size = batch_size(batch)
    start = 0
    for part in range(parts):
        stop = start + size // parts + (part < size % parts)
        yield _map(operator.itemgetter(slice(start, stop)), batch)
        start = stop


def _map(function: Callable[[Any], Any], batch: Any) -> Any:
    if isinstance(batch, Tensor) or _is_strings(batch):
        return function(batch)
    if isinstance(batch, MutableMapping):
        mapped = copy.copy(batch)  # keeps the type
        mapped.update({key: _map(function, value) for key, value in batch.items()})
        return mapped
    if isinstance(batch, Mapping):
        return {key: _map(function, value) for key, value in batch.items()}
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):  # a namedtuple
        return type(batch)(*(_map(function, value) for value in batch))
    if isinstance(batch, (tuple, list)):
        return type(batch)(_map(function, value) for value in batch)
    return batch


def _is_strings(batch: Any) -> bool:
    return isinstance(batch, list) and all(isinstance(value, (str, bytes)) for value in batch)
