"""What a network weighs and what an image costs it, from the real one without its memory."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from dist_graft.analysis.planning.options import PlanOptions
from dist_graft.config import ModelConfig
from dist_graft.errors import ConfigError
from dist_graft.grafting.units import graft_tensors
from dist_graft.training.models import build_model, model_names

_BACKWARD = 2  # passes as dear as the forward pass: by inputs and by weights


@dataclass(frozen=True)
class Sizes:
    """Of one network."""

    elements: tuple[int, ...]
    """Of each tensor that a round blends, in order."""
    dtypes: tuple[torch.dtype, ...]
    """Of each of these tensors."""
    parameters: int
    parameter_bytes: int
    trained_bytes: int
    """Of the parameters that ask for a gradient."""
    buffer_bytes: int
    """Of all buffers, those that no round blends included."""

    @property
    def round_bytes(self) -> int:
        """What a round blends: all floating parameters and buffers."""
        pairs = zip(self.elements, self.dtypes, strict=True)
        return sum(count * dtype.itemsize for count, dtype in pairs)


@dataclass(frozen=True)
class Images:
    """What an epoch is made of."""

    size: int
    """Pixels of a side."""
    count: int
    classes: int


def images_of(options: PlanOptions) -> Images:
    """What the options say, else CIFAR for small-image networks and ImageNet for all others."""
    size, count, classes = (
        (32, 50_000, 10) if options.model in model_names() else (224, 1_281_167, 1000)
    )
    return Images(options.image_size or size, options.images or count, options.classes or classes)


def build(name: str, classes: int) -> nn.Module:
    """The network on the meta device; in memory where it reads its own weights while it is built.

    Raises: ConfigError for a name that is unknown.
    """
    config = ModelConfig(name=name)
    try:
        with torch.device("meta"):
            return build_model(config, num_classes=classes, channels=3)
    except NotImplementedError:
        return build_model(config, num_classes=classes, channels=3)


def sizes_of(model: nn.Module) -> Sizes:
    """Count a network's tensors; tied ones once."""
    blended = graft_tensors(model).values()
    parameters = list(model.parameters())
    return Sizes(
        elements=tuple(tensor.numel() for tensor in blended),
        dtypes=tuple(tensor.dtype for tensor in blended),
        parameters=sum(parameter.numel() for parameter in parameters),
        parameter_bytes=sum(parameter.nbytes for parameter in parameters),
        trained_bytes=sum(p.nbytes for p in parameters if p.requires_grad),
        buffer_bytes=sum(buffer.nbytes for buffer in model.buffers()),
    )


def operations_per_image(model: nn.Module, size: int) -> float:
    """Floating-point operations of a training step for each image: forward and backward.

    Raises: ConfigError when the network takes no images of this size.
    """
    device = next(model.parameters()).device
    batch = torch.empty(2, 3, size, size, device=device)
    try:
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(batch)
    except (RuntimeError, ValueError) as error:
        raise ConfigError(
            f"the network takes no images of {size} x {size} pixels: give --image-size, or "
            f"--epoch-seconds ({str(error).splitlines()[0]})"
        ) from error
    return float((1 + _BACKWARD) * counter.get_total_flops() / len(batch))
