"""Run directories with untrained networks, all different."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dist_graft.analysis import evaluation, export
from dist_graft.config import DataConfig, ModelConfig, OptimConfig, RuntimeConfig, TrainConfig
from dist_graft.population.runtime.process_info import ProcessInfo
from dist_graft.run_directory import RunDirectory
from dist_graft.training.checkpoint.files import checkpoint_path, mark_complete, save_network
from dist_graft.training.models import build_model

SMALL = {"train_samples": 60, "test_samples": 48, "batch_size": 20}


def network(seed: int, *, name: str = "resnet20", channels: int = 1) -> nn.Module:
    """A network with random weights and running statistics."""
    torch.manual_seed(seed)
    model = build_model(ModelConfig(name=name), num_classes=10, channels=channels)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
            module.num_batches_tracked.fill_(seed + 1)
    return model


def related_states(count: int) -> list[dict[str, Tensor]]:
    """State dicts around the weights of one network, so that their average is meaningful.

    Of three, the greedy soup skips one and takes a later one.
    """
    first = network(0).state_dict()
    states = []
    for number, spread in enumerate((0.1, 0.3, 0.6)[:count]):
        generator = torch.Generator().manual_seed(number)
        state = {key: tensor.clone() for key, tensor in first.items()}
        for key, tensor in state.items():
            if tensor.dim() > 1:
                noise = torch.randn(tensor.shape, generator=generator)
                tensor.add_(noise * tensor.std(), alpha=spread)
            elif key.endswith("tracked"):
                tensor.add_(number)
        states.append(state)
    return states


def write_run(
    folder: Path,
    states: list[dict[str, Tensor]],
    *,
    epochs: tuple[int, ...] = (2,),
    model: str = "resnet20",
    model_kwargs: dict[str, object] | None = None,
    precision: str = "fp32",
    lrs: list[float] | None = None,
    custom: tuple[str, ...] = (),
    **data: object,
) -> Path:
    """Write a run directory with a checkpoint of the same weights for each number of epochs."""
    config = TrainConfig(
        run_dir=str(folder),
        model=ModelConfig(name=model, kwargs=model_kwargs or {}),
        data=DataConfig(**{**SMALL, **data}),  # type: ignore[arg-type]
        optim=OptimConfig(lrs=lrs),
        runtime=RuntimeConfig(device="cpu", threads=1, precision=precision),  # type: ignore[arg-type]
    )
    directory = RunDirectory(str(folder))
    directory.write_config(config, len(states), custom)
    for epoch in epochs:
        path = checkpoint_path(directory.checkpoints, epoch)
        sums = [
            save_network(path / f"network{number:02d}.pt", {"network": number, "model": state})
            for number, state in enumerate(states)
        ]
        mark_complete(path, epoch=epoch, round_=epoch, sha256=sums)
    return folder


def export_run(
    run: Path, *, checkpoint: str | None = None, out: Path | None = None, kind: str = "pt"
) -> str:
    """Export a run and return the printed text."""
    options = {
        "run": str(run),
        "checkpoint": checkpoint,
        "out": out and str(out),
        "format": kind,
    }
    return "\n".join(export.run(options, ProcessInfo()))


def evaluate_run(run: Path, **changes: object) -> dict[str, Any]:
    """Evaluate a run with changed options, by default with those of the run."""
    names = ("checkpoint", "device", "precision", "batch_size", "batch_norm_batches")
    options = {"run": str(run), "data": {"root": None}, "last_checkpoints": 0}
    options |= {**dict.fromkeys(names), **changes}
    return evaluation.evaluate_run(options)


def damage_file(path: Path) -> None:
    """Flip one bit in the middle of a file."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))
