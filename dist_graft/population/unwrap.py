"""Removal of the wrappers that compilation and data-parallel training put around a module."""

from __future__ import annotations

import itertools

from torch import nn
from torch.nn.parallel import DistributedDataParallel


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the module inside torch.compile and DistributedDataParallel wrappers, in any order.

    Raises: ValueError naming a sharded submodule or tensor.
    """
    while True:
        if isinstance(model, DistributedDataParallel):
            model = model.module
        elif isinstance(inner := getattr(model, "_orig_mod", None), nn.Module):
            model = inner
        else:
            break
    for path, part in model.named_modules():
        if type(part).__name__ == "FullyShardedDataParallel":
            raise ValueError(
                f"{path or 'the model'} is sharded (FSDP): sharded models cannot be grafted"
            )
    for key, tensor in itertools.chain(model.named_parameters(), model.named_buffers()):
        if type(tensor).__name__ == "DTensor":
            raise ValueError(f"{key} is a DTensor: sharded models cannot be grafted")
    return model
