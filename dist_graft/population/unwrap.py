"""A user's own module, out of what training wraps around it."""

from __future__ import annotations

import itertools

from torch import nn
from torch.nn.parallel import DistributedDataParallel


def unwrapped(model: nn.Module) -> nn.Module:
    """The user's own module, out of any order of compile and data-parallel wrappers.

    Raises: ValueError naming a part that is sharded.
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
                f"{path or 'the model'} is sharded (FSDP), which grafting cannot blend"
            )
    sharded = itertools.chain(model.named_parameters(), model.named_buffers())
    for key, tensor in sharded:
        if type(tensor).__name__ == "DTensor":
            raise ValueError(f"{key} is a sharded DTensor, which grafting cannot blend")
    return model
