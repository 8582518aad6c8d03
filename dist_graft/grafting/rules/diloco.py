"""DiLoCo: local training with an outer optimizer (arXiv 2311.08105)."""

# No postponed annotations: to resolve those of a class with options, jsonargparse would execute the
# block under TYPE_CHECKING and import torch.
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dist_graft.grafting.rules.base import Interval, RoundSchedule, Rule, require

if TYPE_CHECKING:
    from torch import Tensor

    from dist_graft.grafting.mixing import Mixing
    from dist_graft.grafting.units import GraftUnit


@dataclass(frozen=True, kw_only=True)
class DilocoConfig(RoundSchedule):
    """DiLoCo (arXiv 2311.08105), for method diloco; requires model.shared_init."""

    every_steps: int = 500
    """H: optimizer steps of each network between two steps of the outer optimizer."""
    outer_lr: float = 0.7
    """Learning rate of the outer optimizer, SGD with Nesterov momentum; not scheduled."""
    outer_momentum: float = 0.9
    """Nesterov momentum of the outer optimizer, in [0, 1). With outer_lr 1 and outer_momentum 0,
    all networks become their mean."""

    def __post_init__(self) -> None:
        require(self.every_steps >= 1, "every_steps", self.every_steps, "at least 1")
        require(0 < self.outer_lr < 1e6, "outer_lr", self.outer_lr, "above 0 and below 1e6")
        require(0 <= self.outer_momentum < 1, "outer_momentum", self.outer_momentum, "in [0, 1)")

    @property
    def interval(self) -> Interval:
        """Every H steps."""
        return Interval(steps=self.every_steps)


@dataclass(frozen=True, kw_only=True)
class Diloco(DilocoConfig, Rule):
    """DiLoCo (arXiv 2311.08105): an outer optimizer steps toward the mean of the networks.

    All networks start with the same weights theta, the outer weights. Every H steps, with the outer
    gradient delta = theta - 1/K sum_j theta_j, momentum mu and learning rate eta:

        v <- mu v + delta;  theta <- theta - eta (delta + mu v);  theta_k <- theta

    This is SGD with Nesterov momentum as in torch.optim.SGD, a server optimizer in the terms of
    FedOpt (arXiv 2003.00295). Buffers become their mean. The networks hold the same bits after a
    round; each keeps the state of its own optimizer (ADR 44).
    """

    options = DilocoConfig
    synchronous = True
    same_start = True

    def decide(self, information: "Tensor", round_: int) -> "Mixing":
        """Give all networks the same mean."""
        from dist_graft.grafting.mixing import EqualMean, mixing_with_mean

        del round_
        mean = mixing_with_mean(*information.shape)
        return EqualMean(shares=mean.shares, donors=mean.donors)

    def init_state(
        self, units: Sequence["GraftUnit"], tensors: Mapping[str, "Tensor"]
    ) -> dict[str, "Tensor"]:
        """Return outer weights and momentum: "outer.KEY" and "momentum.KEY", float32 or wider."""
        import torch

        state = {}
        for key in _parameters(units):
            weight = tensors[key].detach()
            outer = weight.to(torch.promote_types(weight.dtype, torch.float32), copy=True)
            state[f"outer.{key}"] = outer
            state[f"momentum.{key}"] = torch.zeros_like(outer)
        return state

    def after_exchange(
        self,
        units: Sequence["GraftUnit"],
        tensors: Mapping[str, "Tensor"],
        state: Mapping[str, "Tensor"],
    ) -> None:
        """Take the outer step from the mean, in place."""
        import torch

        keys = _parameters(units)
        weights = [tensors[key].detach() for key in keys]
        outer = [state[f"outer.{key}"] for key in keys]
        momentum = [state[f"momentum.{key}"] for key in keys]
        means = [weight.to(like.dtype) for weight, like in zip(weights, outer, strict=True)]
        step = torch._foreach_sub(outer, means)
        torch._foreach_mul_(momentum, self.outer_momentum)
        torch._foreach_add_(momentum, step)
        torch._foreach_add_(step, momentum, alpha=self.outer_momentum)
        torch._foreach_add_(outer, step, alpha=-self.outer_lr)
        torch._foreach_copy_(weights, outer)


def _parameters(units: Sequence["GraftUnit"]) -> list[str]:
    return [key for unit in units for key in unit.tensors if key not in unit.buffers]
