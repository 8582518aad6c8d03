"""Models of the GPU tests, named as package.module:name on the command line."""

from __future__ import annotations

import os

import torch
from tiny_network import TinyNetwork
from torch import Tensor


class Hungry(TinyNetwork):
    """Runs out of memory in the first step of network 1."""

    def forward(self, inputs: Tensor) -> Tensor:
        if os.environ.get("RANK") == "1" and self.training:
            if inputs.device.type == "cpu":
                raise torch.OutOfMemoryError("simulated: 1 PiB")
            torch.empty(1 << 50, dtype=torch.uint8, device=inputs.device)
        return super().forward(inputs)
