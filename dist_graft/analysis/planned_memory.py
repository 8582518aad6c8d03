"""Memory of a process of a population that has not been started."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from dist_graft.analysis.plan import PlanOptions
from dist_graft.config import ModelConfig
from dist_graft.grafting.rules import RULES
from dist_graft.grafting.units import graft_tensors, graft_units
from dist_graft.population.round.buckets import cut_buckets
from dist_graft.population.round.exchange import Exchange, bucket_limit, held_bytes
from dist_graft.training.models import build_model, model_names

_OPTIMIZER_STATES = {"sgd": 1, "adamw": 2}  # numbers per weight


def build(name: str, classes: int | None = None) -> nn.Module:
    """Build a model without memory for its weights, unless its initialization reads them.

    Raises: ConfigError for an unknown name.
    """
    config, num_classes = ModelConfig(name=name), classes or (10 if name in model_names() else 1000)
    try:
        with torch.device("meta"):
            return build_model(config, num_classes=num_classes, channels=3)
    except NotImplementedError:  # the meta device has no values to read
        return build_model(config, num_classes=num_classes, channels=3)


def memory(options: PlanOptions, model: nn.Module) -> tuple[dict[str, int], dict[str, int]]:
    """Bytes in each process, by name: what a checkpoint stores, too, and gradients."""
    state = RULES[options.method]().init_state(graft_units(model), graft_tensors(model))
    parameters = list(model.parameters())
    trained = sum(parameter.nbytes for parameter in parameters if parameter.requires_grad)
    stored = {
        "parameters and buffers": sum(each.nbytes for each in (*parameters, *model.buffers())),
        f"optimizer ({options.optimizer})": _OPTIMIZER_STATES[options.optimizer] * trained,
        f"state of {options.method}": sum(tensor.nbytes for tensor in state.values()),
    }
    gradients = {"gradients": trained}
    if options.replicas > 1:
        gradients["gradient buckets of DDP"] = trained
    return stored, gradients


def bucket_bytes(options: PlanOptions, mixed: Sequence[Tensor], exchange: Exchange) -> int:
    """Bytes of the buckets in each process in a round that mixes these tensors."""
    replicas, on_host = options.replicas, options.backend == "gloo"
    allowed = max(1, int(options.bucket_mb * 2**20))
    buckets = cut_buckets(
        [tensor.numel() for tensor in mixed],
        [tensor.dtype for tensor in mixed],
        bucket_bytes=bucket_limit(exchange, allowed, on_host=on_host),
        share=replicas - 1,  # the largest
        shares=replicas,
    )
    return held_bytes(
        buckets, exchange, networks=options.networks, on_host=on_host, replicas=replicas
    )
