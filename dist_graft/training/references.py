"""Checks the names in a configuration before a run writes anything."""

from __future__ import annotations

from dist_graft.config import TrainConfig
from dist_graft.config.train import callback_with_arguments
from dist_graft.config.validation import own
from dist_graft.references import is_reference
from dist_graft.training.data.base import transform_function
from dist_graft.training.learning_rates import schedule
from dist_graft.training.models import check_model_name
from dist_graft.training.optimizers import optimizer_call, refuse_optimizer_options
from dist_graft.training.task import refuse_loss_of_classes


def check_names(config: TrainConfig, *, model: bool, optimizer: bool) -> None:
    """Check everything that the configuration names.

    Of optim.loss, which `build_task` checks, only whether it takes the targets of mixed images.

    Args:
        config: of one network.
        model: whether `config.model` is used.
        optimizer: whether the optimizer of `config.optim` is used.

    Raises: ConfigError naming the option; FunctionError if the function of optim.schedule fails.
    """
    if model:
        check_model_name(config.model.name)
    if optimizer:
        optimizer_call(config.optim)
    else:
        refuse_optimizer_options(config.optim)
    if config.optim.loss is not None and config.data.mixes:
        refuse_loss_of_classes(config.optim)
    schedule(config.optim, epochs=1, steps_per_epoch=1)
    if config.data.transform is not None:
        transform_function(config.data)
    named = {
        "method": config.method,
        "graft.rule": config.graft.rule,
        "graft.criterion": config.graft.criterion,
        "graft.topology": config.graft.topology,
        "data.name": config.data.name,
    }
    for option, name in named.items():
        if name is not None and is_reference(name):
            own(option, name)
    for entry in config.callbacks:
        own("callbacks", callback_with_arguments(entry)[0])
