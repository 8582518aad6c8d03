"""Training state of one network, and how to run its forward pass."""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from dist_graft.config.runtime import CompileMode
from dist_graft.errors import ConfigError
from dist_graft.training.optimizers import check_optimizer_state, option_names
from dist_graft.training.teachers import Teachers

Precision = Literal["fp32", "bf16", "fp16"]
_Tensors = tuple[Tensor, ...] | list[Tensor]
_MAX_GRAPHS = 64
"""Shapes after which torch stops compiling and runs further ones without; its default is 8."""
MIN_LOSS_SCALE = 1e-4
"""Loss scale below which fp16 gradients underflow; it starts at 65,536."""


@dataclass(kw_only=True)
class Predictor:
    """A module with the precision and device of its forward pass."""

    model: nn.Module
    """The plain module: its weights are grafted and saved."""
    forward: nn.Module
    """The module itself, or its compiled form."""
    precision: Precision
    device: torch.device
    cuda_graphs: bool = False
    """Whether `forward` runs as CUDA graphs."""

    def begin_step(self) -> None:
        """Declare that the outputs of earlier forward passes are not needed any more.

        Otherwise CUDA graphs cannot tell a new step from a further chunk of an accumulated batch.
        """
        if self.cuda_graphs:
            torch.compiler.cudagraph_mark_step_begin()

    def autocast(self) -> contextlib.AbstractContextManager[object]:
        """Context of a forward pass in the configured precision."""
        if self.precision == "fp32":
            return contextlib.nullcontext()
        dtype = torch.bfloat16 if self.precision == "bf16" else torch.float16
        return torch.autocast(self.device.type, dtype)


@dataclass(kw_only=True)
class TrainState(Predictor):
    """Everything that training changes and a checkpoint restores, for one network."""

    optimizer: torch.optim.Optimizer
    scheduler: LambdaLR
    scaler: torch.amp.GradScaler
    """Scales the loss in fp16; disabled otherwise."""
    seed: int
    network: int
    train_forward: nn.Module
    """Forward pass in training: `forward`, or its data-parallel wrapper."""
    teachers: Teachers | None = None
    """Frozen networks to distill from."""
    ema: AveragedModel | None = None
    """Exponential moving average of the weights; None without `optim.ema_decay`."""
    _initial_optimizer: dict[str, Any] = field(init=False, repr=False)
    """State of the optimizer before the first step: empty unless its constructor fills it."""

    def __post_init__(self) -> None:
        self._initial_optimizer = copy.deepcopy(self.optimizer.state_dict())

    @property
    def lr(self) -> float:
        """Learning rate of the next step."""
        return float(self.optimizer.param_groups[0]["lr"])

    @property
    def loss_scale_collapsed(self) -> bool:
        """Whether the loss scale is so small, after skipped steps, that gradients underflow."""
        return self.scaler.is_enabled() and self.scaler.get_scale() < MIN_LOSS_SCALE

    def has_diverged(self, loss: float) -> bool:
        """Whether training has diverged. In fp16, loss scaling skips single non-finite steps."""
        if self.scaler.is_enabled():
            return self.loss_scale_collapsed
        return not math.isfinite(loss)

    @property
    def scaler_reads_gradients(self) -> bool:
        """Whether an fp16 step waits for the gradients: fused optimizers skip it on the device."""
        fused = getattr(self.optimizer, "_step_supports_amp_scaling", False)
        return self.scaler.is_enabled() and not fused

    @property
    def averaged(self) -> Predictor | None:
        """The moving average of the weights as a predictor; None without one."""
        if self.ema is None:
            return None
        module = self.ema.module
        assert isinstance(module, nn.Module)
        return Predictor(model=module, forward=module, precision=self.precision, device=self.device)

    def reset_optimizer(self) -> None:
        """Reset optimizer state, loss scale and moving average after the weights were replaced."""
        self.clear_optimizer()
        fresh = torch.amp.GradScaler(self.device.type, enabled=self.scaler.is_enabled())
        self.scaler.load_state_dict(fresh.state_dict())
        if self.ema is not None:
            self.ema.module.load_state_dict(self.model.state_dict())

    def clear_optimizer(self) -> None:
        """Reset the optimizer to its state before the first step; its options stay as they are.

        Options are the learning rates and all arguments of the constructor. Any other entry of a
        parameter group is state, such as the step count of a schedule-free optimizer.
        """
        options = option_names(self.optimizer)
        groups = [
            initial | {name: group[name] for name in options if name in group}
            for initial, group in zip(
                self._initial_optimizer["param_groups"], self.optimizer.param_groups, strict=True
            )
        ]
        state = copy.deepcopy(self._initial_optimizer["state"])  # the optimizer changes it in place
        self.optimizer.load_state_dict({"state": state, "param_groups": groups})

    def skip_to(self, steps: int, initial_lrs: Sequence[float | Tensor] | None = None) -> None:
        """Set the learning rate of the step that follows this many steps.

        Args:
            steps: of the run.
            initial_lrs: new initial learning rate of each parameter group; None: as they are.
        """
        scheduler = self.scheduler
        if initial_lrs is not None:
            scheduler.base_lrs = list(initial_lrs)
            for group, initial in zip(self.optimizer.param_groups, initial_lrs, strict=True):
                group["initial_lr"] = initial
        factors = [factor(steps) for factor in scheduler.lr_lambdas]
        rates = [lr * factor for lr, factor in zip(scheduler.base_lrs, factors, strict=True)]
        scheduler.last_epoch, scheduler._last_lr = steps, rates
        for group, lr in zip(self.optimizer.param_groups, rates, strict=True):
            group["lr"] = lr

    def model_and_average(self) -> nn.Module:
        """One module that holds the model and its moving average, if there is one."""
        return self.model if self.ema is None else nn.ModuleList([self.model, self.ema.module])

    def state_dict(self) -> dict[str, Any]:
        """State of model, optimizer, scheduler, loss scaler and moving average.

        Raises: ConfigError if a checkpoint cannot hold the state of a user's optimizer.
        """
        check_optimizer_state(self.optimizer)
        state = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "scaler": self.scaler.state_dict(),
        }
        return state if self.ema is None else state | {"ema": self.ema.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned; other keys are ignored."""
        self.model.load_state_dict(state["model"])
        self._load_optimizer(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        self.scaler.load_state_dict(state["scaler"])
        if self.ema is not None:
            self.ema.load_state_dict(state["ema"])

    def continue_from(self, state: dict[str, Any]) -> None:
        """Restore what another network's `state_dict` returned, but keep the optimizer's options.

        Raises: ConfigError if that network has another optimizer.
        """
        groups = self.optimizer.param_groups
        own = [{name: group[name] for name in group if name != "params"} for group in groups]
        names = [set(group) - {"params"} for group in state["optimizer"]["param_groups"]]
        if names != [set(group) for group in own]:
            raise ConfigError(
                "resume_networks cannot continue a network that had another optimizer: pass its "
                "optim.name"
            )
        self.load_state_dict(state)
        for group, options in zip(self.optimizer.param_groups, own, strict=True):
            group.update(options)

    def _load_optimizer(self, saved: dict[str, Any]) -> None:
        """Load the optimizer's state; whether its kernels are fused depends on this device only."""
        groups = [dict(group) for group in saved["param_groups"]]
        for group, current in zip(groups, self.optimizer.param_groups, strict=False):
            if "fused" in current:
                group["fused"] = current["fused"]
        self.optimizer.load_state_dict({**saved, "param_groups": groups})


def compiled(model: nn.Module, mode: bool | CompileMode) -> nn.Module:
    """Compile a module as `runtime.compile` says; it shares parameters and buffers with `model`.

    Shapes are static: each batch size has its own graph, whichever came first. Otherwise torch
    would compile a graph for all sizes at the second size that it sees, and a run that resumes just
    before an evaluation would use other graphs, and get other bits, than an uninterrupted one.
    Rounds may change weights in place, also between replays of a CUDA graph, whose inputs they are.
    """
    if not mode:
        return model
    torch._dynamo.config.recompile_limit = _MAX_GRAPHS
    forward = torch.compile(model, dynamic=False, mode=None if mode is True else mode)
    return cast(nn.Module, forward)


def uses_cuda_graphs(mode: bool | CompileMode, device: torch.device) -> bool:
    """Whether the module that `compiled` returns runs as CUDA graphs."""
    return isinstance(mode, str) and device.type == "cuda"


def moving_average(model: nn.Module, decay: float) -> AveragedModel:
    """Exponential moving average of parameters and buffers, updated once per optimizer step.

    Integers and booleans, such as tables of indices, are copied: torch would round their average
    down.
    """
    blend = get_ema_multi_avg_fn(decay)

    @torch.no_grad()
    def update(averages: _Tensors, current: _Tensors, count: Tensor | int) -> None:
        if averages[0].is_floating_point() or averages[0].is_complex():
            blend(averages, current, count)
        else:
            for average, tensor in zip(averages, current, strict=True):
                average.copy_(tensor)

    return AveragedModel(model, multi_avg_fn=update, use_buffers=True)
