"""The optimizer of a network: SGD, AdamW, another one of torch.optim, or a user-defined one."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from dist_graft.config import OptimConfig
from dist_graft.config.validation import check_call, nearest_names, own
from dist_graft.errors import ConfigError, user_code
from dist_graft.references import is_reference

_BY_NAME: dict[str, Callable[..., torch.optim.Optimizer]] = {
    name.lower(): kind
    for name, kind in vars(torch.optim).items()
    if inspect.isclass(kind)
    and issubclass(kind, torch.optim.Optimizer)
    and kind is not torch.optim.Optimizer
}
_UNSUITABLE = {
    "lbfgs": "it evaluates the loss several times in a step (step() needs a closure)",
    "sparseadam": "it requires sparse gradients",
}
_FUSED = ("sgd", "adam", "adamw")
"""Optimizers with a fused step on any GPU, which in fp16 can skip it on the device."""
_KERNELS = {"fused", "foreach", "capturable", "differentiable"}
"""Arguments that select the kernels."""


def optimizer_call(
    config: OptimConfig,
) -> tuple[Callable[..., torch.optim.Optimizer], dict[str, Any]]:
    """Return the class or function that creates the optimizer, and its keyword arguments.

    Raises: ConfigError if it does not exist, or the options do not fit.
    """
    make, name = _find(config.name), config.name
    arguments: dict[str, Any] = {"lr": config.lr, **config.kwargs}
    try:
        accepted = inspect.signature(make).parameters
    except ValueError as error:
        raise ConfigError(f"optim.name {name} must be a class or function: {error}") from error
    if "weight_decay" in accepted or any(
        parameter.kind is parameter.VAR_KEYWORD for parameter in accepted.values()
    ):
        arguments["weight_decay"] = config.weight_decay
    elif config.weight_decay != OptimConfig.weight_decay:
        raise ConfigError(
            f"optim.weight_decay does not apply to optim.name {name}, which has no such argument: "
            "leave it unset"
        )
    if name == "sgd":
        arguments |= {"momentum": config.momentum, "nesterov": config.nesterov}
    elif name == "adamw":
        arguments["betas"] = config.betas
    check_call(f"optim.name {name}", make, [None], arguments)
    return make, arguments


def refuse_optimizer_options(config: OptimConfig) -> None:
    """Raise ConfigError if the options choose an optimizer, which Trainer(optimizer=) replaces."""
    for option in ("name", "kwargs"):
        value = getattr(config, option)
        if value != getattr(OptimConfig(), option):
            raise ConfigError(
                f"optim.{option} {value} does not apply with Trainer(optimizer=): leave out one"
            )


def _find(name: str) -> Callable[..., torch.optim.Optimizer]:
    if is_reference(name):
        return own("optim.name", name)
    if name in _UNSUITABLE:
        raise ConfigError(f"optim.name {name} is not supported: {_UNSUITABLE[name]}")
    if name not in _BY_NAME:
        suitable = [known for known in _BY_NAME if known not in _UNSUITABLE]
        near = difflib.get_close_matches(name, suitable)
        raise ConfigError(
            f"optim.name {name!r} is unknown; {nearest_names(near)}known: "
            f"{', '.join(sorted(suitable))}, or a reference package.module:name"
        )
    return _BY_NAME[name]


def build_optimizer(
    config: OptimConfig, model: nn.Module, *, lr: float, fused: bool = False
) -> torch.optim.Optimizer:
    """Create the optimizer of all parameters that require a gradient.

    Args:
        config: name and options of the optimizer.
        model: its parameters.
        lr: initial learning rate.
        fused: use the fused step if optimizer and parameters support it. In fp16, steps are then
            skipped on the device, so the host does not wait for the gradients.

    Raises: ConfigError if the name is unknown, or config.kwargs or the parameters do not fit;
        FunctionError if a user's function fails.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    make, arguments = optimizer_call(config)
    arguments["lr"] = lr
    if (
        fused
        and config.name in _FUSED
        and not _KERNELS & set(config.kwargs)
        and all(parameter.is_floating_point() for parameter in parameters)
    ):
        arguments["fused"] = True
    if is_reference(config.name):
        with user_code(f"optim.name {config.name}"):
            optimizer = make(parameters, **arguments)
    else:
        try:
            optimizer = make(parameters, **arguments)
        except (TypeError, ValueError, RuntimeError) as error:
            raise ConfigError(f"optim.name {config.name}: {error}") from error
    return checked_optimizer(f"optim.name {config.name}", optimizer)


def checked_optimizer(what: str, optimizer: Any) -> torch.optim.Optimizer:
    """Return the optimizer.

    Raises: ConfigError unless it is a torch.optim.Optimizer whose step() has no required argument.
    """
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise ConfigError(f"{what} must return a torch.optim.Optimizer, got {optimizer!r}")
    required = [
        name
        for name, parameter in inspect.signature(optimizer.step).parameters.items()
        if parameter.default is parameter.empty
        and parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD)
    ]
    if required:
        raise ConfigError(
            f"{what} is not supported: {type(optimizer).__name__}.step() requires the argument "
            f"{required[0]}"
        )
    return optimizer


def option_names(optimizer: torch.optim.Optimizer) -> set[str]:
    """Entries of param_groups that are options: learning rates, and arguments of constructors."""
    names = {"lr", "initial_lr"}
    for kind in type(optimizer).__mro__:
        if issubclass(kind, torch.optim.Optimizer):
            names.update(inspect.signature(kind).parameters)
    return names - {"params"}


def check_optimizer_state(optimizer: torch.optim.Optimizer) -> None:
    """Raise ConfigError unless a checkpoint can hold the optimizer's state.

    It can hold what torch.load(weights_only=True) reads: tensors, plain values, and lists, tuples
    and dicts of them.
    """
    if type(optimizer).__module__.startswith("torch.optim"):
        return
    found = _unloadable(optimizer.state_dict())
    if found is not None:
        raise ConfigError(
            f"optimizer {type(optimizer).__name__} keeps a {type(found).__name__} in its state, "
            "which a checkpoint cannot hold: use tensors, numbers, strings, and lists or dicts of "
            "them"
        )


def _unloadable(value: Any) -> Any:
    """First part of a state that is not a tensor or plain value; None if there is none."""
    if isinstance(value, torch.Tensor) or type(value) in (bool, int, float, str, type(None)):
        return None
    if type(value) in (list, tuple):
        parts = value
    elif isinstance(value, dict):
        parts = [*value, *value.values()]
    else:
        return value
    return next((found for found in map(_unloadable, parts) if found is not None), None)
