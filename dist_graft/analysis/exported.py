"""Exported networks as modules: `dist_graft.load`."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from dist_graft.analysis.stored_weights import architecture, exported_model, load_state
from dist_graft.errors import ConfigError, RunDirectoryError
from dist_graft.references import is_reference
from dist_graft.training.data.preprocessing import DAMAGED, Preprocessing
from dist_graft.training.weights import (
    EXPORT_DESCRIPTION,
    WEIGHT_SUFFIXES,
    exported_files,
    read_description,
    read_weights,
)

if TYPE_CHECKING:
    from PIL.Image import Image

_BATCH = 32
"""Images that `predict` passes to a network at once."""


class ExportedModel(nn.Module):
    """A trained network in evaluation mode, with its image preprocessing.

    Attributes:
        model (nn.Module): the plain module.
        classes (list[str] | None): name of each class; None if the run did not record them.
        description (dict): content of export.json.
    """

    def __init__(self, model: nn.Module, description: dict[str, Any]) -> None:
        super().__init__()
        self.model = model
        self.description = description
        self.classes: list[str] | None = description.get("classes")
        values = description.get("preprocessing")
        try:
            self._preprocessing = Preprocessing.from_json(values) if values else None
        except DAMAGED as error:
            raise RunDirectoryError(f"{EXPORT_DESCRIPTION}: preprocessing: {error}") from error
        self.eval().requires_grad_(requires_grad=False)

    def preprocess(self, image: str | Path | Image | Tensor) -> Tensor:
        """Prepare one image like the run's test images.

        Args: image: path of a file, PIL image, or uint8 tensor [1 or 3, height, width].
        Returns: float32 [channels, image_size, image_size].
        Raises: DataError if the image cannot be read; ConfigError if the run did not record how its
            images were prepared.
        """
        if self._preprocessing is None:
            raise ConfigError(
                "this export does not say how its images were prepared (its run used its own "
                "data, or an older version): prepare them yourself and call the module"
            )
        return self._preprocessing(image)

    def forward(self, inputs: Tensor) -> Tensor:
        """Logits [N, num_classes] of prepared images [N, channels, image_size, image_size]."""
        logits: Tensor = self.model(inputs)
        return logits

    @torch.no_grad()
    def probabilities(self, images: Sequence[str | Path | Image | Tensor]) -> Tensor:
        """Prepare images and return the probability of each class, [N, num_classes] on the CPU."""
        device = next(self.parameters()).device
        batch = torch.stack([self.preprocess(image) for image in images])
        logits: Tensor = self(batch.to(device))
        return logits.float().softmax(dim=1).cpu()


def load(
    path: str | Path, *, model: nn.Module | None = None, trust_code: bool = False
) -> ExportedModel:
    """Load an exported network on the CPU, in evaluation mode. Only tensors are unpickled.

    Args:
        path: file of an export in the format safetensors or pt, or its folder: its first network.
        model: module that takes the weights, in place. None: built from export.json.
        trust_code: build a model that export.json names as package.module:name, which imports and
            calls this function.

    Raises: RunDirectoryError if there is no export, or it is damaged; ConfigError if the weights
        need another format or another model.
    """
    file = Path(path)
    if file.is_dir():
        file = exported_files(file)[0]
    elif file.suffix not in WEIGHT_SUFFIXES:
        raise ConfigError(f"{file} is neither an exported folder nor a .safetensors or .pt file")
    description = read_description(file.parent)
    verified_content(file, description)
    state = read_weights(file)
    if model is not None:
        load_state(model, state, file)
        return ExportedModel(model, description)
    config, shape = exported_model(description, file.parent)
    if is_reference(config.name) and not trust_code:
        raise ConfigError(
            f"{file.parent} needs to call your model function {config.name}: pass trust_code if "
            "you trust this export, or model= in Python"
        )
    return ExportedModel(architecture(config, state, file, shape), description)


def is_export(path: Path) -> bool:
    """Whether a path is an exported folder or a file of weights in one."""
    folder = path if path.is_dir() else path.parent
    return (folder / EXPORT_DESCRIPTION).is_file() and (
        path.is_dir() or path.suffix in WEIGHT_SUFFIXES
    )


def verified_content(file: Path, description: dict[str, Any]) -> bytes:
    """Content of an exported file.

    Raises: RunDirectoryError if it is missing, or is not the file that export.json describes.
    """
    try:
        content = file.read_bytes()
    except OSError as error:
        raise RunDirectoryError(f"{file} cannot be read: {error.strerror}") from error
    if hashlib.sha256(content).hexdigest() != description["sha256"].get(file.name):
        raise RunDirectoryError(
            f"{file} is not the file that {EXPORT_DESCRIPTION} describes: export the run again"
        )
    return content


def predict(
    exports: Sequence[Path], images: Sequence[Path], *, top: int, trust_code: bool = False
) -> list[dict[str, Any]]:
    """The most probable classes of each image; of several exports, by their mean probability.

    Args:
        exports: as `load` accepts them.
        images: files.
        top: number of classes for each image.
        trust_code: see `load`.

    Raises: ConfigError if the networks have different classes; DataError naming an image that
        cannot be read; otherwise as `load`.
    """
    total: Tensor | None = None
    classes: list[str] | None = None
    for export in exports:
        network = load(export, trust_code=trust_code)
        parts = [
            network.probabilities(images[start : start + _BATCH])
            for start in range(0, len(images), _BATCH)
        ]
        probabilities = torch.cat(parts)
        if total is None:
            total, classes = probabilities, network.classes
        elif probabilities.shape == total.shape and network.classes == classes:
            total += probabilities
        else:
            raise ConfigError(f"{exports[0]} and {export} have different classes")
    assert total is not None
    names = classes or [str(index) for index in range(total.shape[1])]
    values, indices = (total / len(exports)).topk(min(top, total.shape[1]), dim=1)
    return [
        {
            "image": str(image),
            "classes": [
                {"index": index, "name": names[index], "probability": value}
                for index, value in zip(row, shares, strict=True)
            ],
        }
        for image, row, shares in zip(images, indices.tolist(), values.tolist(), strict=True)
    ]
