"""Small networks with every kind of tensor in a round."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

State = dict[str, Tensor]


def plain() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 7, 3),
        nn.BatchNorm2d(7),
        nn.ReLU(),
        nn.Conv2d(7, 5, 3),
        nn.BatchNorm2d(5),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(5, 3),
    )


def channels_last() -> nn.Module:
    return plain().to(memory_format=torch.channels_last)


def bfloat16() -> nn.Module:
    return plain().to(torch.bfloat16)


def mixed_types() -> nn.Module:
    """Four dtypes, interleaved in the state dict."""
    model = plain()
    model[1].to(torch.float64)
    model[3].to(torch.bfloat16)
    model[7].to(torch.float16)
    return model


def grouped() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(4, 6, 3, groups=2),
        nn.Conv2d(6, 6, 3, groups=6, bias=False),
        nn.ConvTranspose2d(6, 9, 2, groups=3),
        nn.ConvTranspose1d(9, 4, 1),
        nn.Conv1d(4, 2, 3),
        nn.Conv3d(2, 3, 2, bias=False),
    )


def tied() -> nn.Module:
    model = nn.Sequential(
        nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3)
    )
    model[2].weight = model[0].weight
    return model


class NormFirst(nn.Module):
    """Norm before the first convolution, frozen and empty tensors, all kinds of buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(3)
        self.stem = nn.Conv2d(3, 4, 3, bias=False).requires_grad_(False)
        self.gain = nn.Parameter(torch.tensor(1.0))
        self.register_buffer("nothing", torch.empty(0, 3))
        self.register_buffer("steps", torch.zeros(3, dtype=torch.int32))
        self.register_buffer("mask", torch.zeros(3, dtype=torch.bool))
        self.register_buffer("mean", torch.zeros(3, dtype=torch.float64))
        self.register_buffer("scratch", torch.zeros(5), persistent=False)
        self.head = nn.Conv2d(4, 2, 1)


class Encoder(nn.Module):
    """Attention and MLPs, for lead = conv+linear."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2)
        self.head = nn.Linear(8, 3)


def large() -> nn.Module:
    """One tensor that is larger than a group."""
    return nn.Sequential(nn.Conv2d(128, 129, 3, bias=False), nn.BatchNorm2d(129))


ARCHITECTURES: dict[str, Callable[[], nn.Module]] = {
    "plain": plain,
    "channels_last": channels_last,
    "bfloat16": bfloat16,
    "mixed_types": mixed_types,
    "grouped": grouped,
    "tied": tied,
    "norm_first": NormFirst,
    "encoder": Encoder,
    "large": large,
}


def build(name: str, network: int) -> nn.Module:
    """Build an architecture with random values that differ between networks, also in buffers."""
    torch.manual_seed(network)
    model = ARCHITECTURES[name]()
    disturb_(model, network)
    return model


def lead_of(name: str) -> str:
    return "conv+linear" if name == "encoder" else "conv"


def disturb_(model: nn.Module, seed: int) -> None:
    """Perturb every tensor of the module, like training between two rounds."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for value in {id(value): value for value in _tensors(model)}.values():
            if value.is_floating_point():
                noise = torch.randn(value.shape, generator=generator, dtype=torch.float64)
                value.add_(noise.to(value) * 0.1)
            elif value.dtype == torch.bool:
                value.logical_not_()
            else:
                value.add_(1 + seed)


def snapshot(model: nn.Module) -> State:
    """Copy the state dict to the CPU, preserving the memory format."""
    return {key: value.detach().clone().cpu() for key, value in model.state_dict().items()}


def places(model: nn.Module) -> dict[str, tuple[int, tuple[int, ...]]]:
    """Address and strides of each tensor."""
    return {
        key: (value.data_ptr(), value.stride())
        for key, value in model.state_dict(keep_vars=True).items()
    }


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Whether dtype, shape, memory order and all bits are equal, including the sign of zero."""
    return (
        one.dtype == other.dtype
        and one.shape == other.shape
        and one.stride() == other.stride()
        and torch.equal(_bytes(one), _bytes(other))
    )


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.contiguous().flatten().view(torch.uint8)


def _tensors(model: nn.Module) -> list[Tensor]:
    return [*model.parameters(), *model.buffers()]
