"""Writes the networks of a run in other formats, with export.json, which describes them."""

from __future__ import annotations

import hashlib
import io
import json
import warnings
from collections.abc import Collection, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor, nn

from dist_graft.analysis.export import Format
from dist_graft.analysis.run_files import read_json
from dist_graft.analysis.soups import uniform_soup
from dist_graft.analysis.stored_weights import StoredRun, architecture, classes_and_channels
from dist_graft.errors import ConfigError, RunDirectoryError
from dist_graft.monitoring.jsonl import read_json_lines
from dist_graft.references import is_reference
from dist_graft.run_directory import RunDirectory, write_atomically
from dist_graft.training.checkpoint.files import network_file
from dist_graft.training.weights import EXPORT_DESCRIPTION, State, read_description
from dist_graft.version import VERSION, versions

_SUFFIXES: dict[Format, str] = {
    "safetensors": ".safetensors",
    "pt": ".pt",
    "torch_export": ".pt2",
    "onnx": ".onnx",
}
_OF_THE_MACHINE = ("root", "workers", "download")
_OF_THE_TRAINING = (
    "epochs",
    "model",
    "optim",
    "members",
    "diversity",
    "distill",
    "init_from",
    "init_strict",
)
_REPLACED = {
    "data": (
        *("image_size", "channels", "augment", "skip_broken"),
        *("mixup", "cutmix", "random_erasing", "rand_augment"),
    ),
    "model": ("kwargs", "activation"),
    "optimizer": ("kwargs", "momentum", "nesterov", "betas", "weight_decay"),
}
"""Options replaced by an object passed to Trainer, besides its name."""
_DEFAULT_SIZE = 32
"""Image size of exported programs if the run does not record one."""


def export_run(stored: StoredRun, folder: Path, kind: Format) -> Iterator[str]:
    """Write all files of an export. Yields the path of each file of weights.

    Raises: RunDirectoryError; ConfigError if the folder holds the export of another run, the
        weights do not fit the architecture, the model cannot be exported in this format, or a
        package is missing.
    """
    before = _earlier_export(stored.path, folder)
    config, states = stored.config, list(stored.states())
    built = "model" not in stored.custom
    if not built and kind in ("torch_export", "onnx"):
        raise ConfigError(
            f"{stored.path} was trained in Python with its own model, which this command cannot "
            f"build: --format {kind} needs it; use --format safetensors, and load the weights with "
            "dist_graft.load(path, model=your_module)"
        )
    if kind == "onnx":
        _require_onnx()
    source = stored.checkpoint.path
    shape = stored.shape
    if built:
        shape = shape or classes_and_channels(states[0], source)
        for state in states:  # refuse before anything is written
            model = architecture(config.model, state, source, shape)
    stems = [network_file(network).removesuffix(".pt") for network in stored.networks]
    files = dict(zip(stems, states, strict=True))
    for network, stem in zip(stored.networks, stems, strict=True):
        if averaged := stored.averaged_state(network):
            files[f"{stem}_ema"] = averaged
    files["uniform_soup"] = uniform_soup(states)

    inputs = stored.inputs
    preprocessing = inputs.get("preprocessing") or {}
    size = preprocessing.get("image_size") or config.data.image_size or _DEFAULT_SIZE
    sha256: dict[str, str] = {}
    for stem, state in files.items():
        if kind in ("safetensors", "pt"):
            content = weights_file(state, kind)
        else:
            assert shape
            model.load_state_dict(state)
            content = _program(model.eval(), kind, (2, shape[1], size, size))
        name = f"{stem}{_SUFFIXES[kind]}"
        sha256[name] = hashlib.sha256(content).hexdigest()
        write_atomically(folder / name, content)
        yield str(folder / name)

    description = {
        "run_dir": str(stored.path.resolve()),
        "epoch": stored.checkpoint.epoch,
        "round": stored.checkpoint.round,
        "checkpoints": [
            stored.members[network].sha256[network_file(network)] for network in stored.networks
        ],
        "model": config.model.name if built else None,
        "model_arguments": {
            "num_classes": shape[0],
            "channels": shape[1],
            "activation": config.model.activation,
            "kwargs": config.model.kwargs,
        }
        if built and shape
        else None,
        "lead": config.graft.lead,
        "classes": inputs.get("classes"),
        "preprocessing": preprocessing or None,
        "metrics": {
            stem: _metrics(stored, network)
            for network, stem in zip(stored.networks, stems, strict=True)
        },
        "results": _results(stored),
        "method": {"name": config.method, "graft": asdict(config.graft)},
        "data": "custom" if "data" in stored.custom else config.data.name,
        "training": training_options(asdict(config), stored.custom),
        "sha256": sha256,
        "versions": versions(),
        "dist_graft": VERSION,
    }
    description["sha256"] = _other_formats(folder, before, description) | sha256
    write_atomically(
        folder / EXPORT_DESCRIPTION, (json.dumps(description, indent=1) + "\n").encode()
    )


def training_options(config: Mapping[str, Any], custom: Collection[str]) -> dict[str, Any]:
    """Options that a control without exchange shares with its run, without those of the machine.

    Args:
        config: of the run, nested.
        custom: what was passed to the Trainer in Python, which no option describes. Its name is
            "custom", and the options that it replaces are left out.
    """
    config = dict(config)
    for part, unused in _REPLACED.items():
        section = "optim" if part == "optimizer" else part
        if part in custom:
            used = {key: value for key, value in config[section].items() if key not in unused}
            config[section] = used | {"name": "custom"}
    data = {key: value for key, value in config["data"].items() if key not in _OF_THE_MACHINE}
    if data["name"] == "imagefolder" or is_reference(data["name"]):
        data["root_sha256"] = hashlib.sha256(str(config["data"]["root"]).encode()).hexdigest()
    shared = {key: config[key] for key in _OF_THE_TRAINING if key in config} | {
        "data": data,
        "runtime": {"precision": config["runtime"]["precision"]},
        "own": sorted(custom),
    }
    return json.loads(json.dumps(shared))  # type: ignore[no-any-return]


def _earlier_export(run: Path, folder: Path) -> dict[str, Any]:
    """Description of what the folder holds; empty if it holds no export.

    Raises: ConfigError if it is the export of another run, outside of this run's directory.
    """
    try:
        before = read_description(folder)
    except RunDirectoryError:
        return {}
    other, run = before.get("run_dir"), run.resolve()
    inside = run in folder.resolve().parents  # a run may have been moved, with its export
    if other is not None and Path(str(other)).resolve() != run and not inside:
        raise ConfigError(f"{folder} holds an export of {other}: choose another --out")
    return before


def _other_formats(
    folder: Path, before: Mapping[str, Any], description: Mapping[str, Any]
) -> dict[str, str]:
    """Checksums of the files of the same checkpoint that were exported in other formats."""
    same = all(before.get(key) == description[key] for key in ("epoch", "round", "checkpoints"))
    found = before["sha256"] if same else {}
    return {name: digest for name, digest in found.items() if (folder / name).is_file()}


def how_to_load(kind: Format, model: str | None) -> str:
    """Python expression that loads a file.

    Args:
        kind: format of the file.
        model: name of the model; None: it was built in Python.
    """
    more = ""
    if model is None:
        more = ", model=your_module"
    elif is_reference(model):
        more = ", trust_code=True"
    return {
        "safetensors": f"dist_graft.load(path{more}), or safetensors.torch.load_file(path)",
        "pt": f"dist_graft.load(path{more}), or "
        "model.load_state_dict(torch.load(path, weights_only=True))",
        "torch_export": "torch.export.load(path).module()",
        "onnx": "onnxruntime.InferenceSession(path)",
    }[kind]


def weights_file(state: State, kind: Format) -> bytes:
    """Content of a file with a plain state dict; tensors that share memory are written apart."""
    contiguous = {
        key: tensor.clone(memory_format=torch.contiguous_format) for key, tensor in state.items()
    }
    if kind == "safetensors":
        return save(contiguous, metadata={"format": "pt"})
    buffer = io.BytesIO()
    torch.save(contiguous, buffer)
    return buffer.getvalue()


def _program(model: nn.Module, kind: Format, shape: tuple[int, int, int, int]) -> bytes:
    """Export a module in evaluation mode, with a dynamic batch size."""
    example: tuple[Tensor, ...] = (torch.zeros(shape),)
    dynamic = ({0: torch.export.Dim.DYNAMIC},)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of packages, about their own future
            program = torch.export.export(model, example, dynamic_shapes=dynamic)
            if kind == "torch_export":
                buffer = io.BytesIO()
                torch.export.save(program, buffer)
                return buffer.getvalue()
            converted = torch.onnx.export(
                program,
                input_names=["images"],
                output_names=["logits"],
                dynamo=True,
                verbose=False,
            )
            assert converted
            content: bytes = converted.model_proto.SerializeToString()
            return content
    except Exception as error:  # tracing runs the model's code, which may raise anything
        first = next(iter(str(error).strip().splitlines()), "")
        raise ConfigError(
            f"the model cannot be exported as {kind} ({type(error).__name__}: {first[:200]}): use "
            "--format safetensors"
        ) from error


def _require_onnx() -> None:
    try:
        import onnx
        import onnxscript
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"--format onnx needs the package {error.name}: pip install 'dist_graft[onnx]'"
        ) from error
    del onnx, onnxscript


def _metrics(stored: StoredRun, network: int) -> dict[str, Any]:
    """Numbers of the last finished epoch in metrics.jsonl, before the round of that epoch."""
    lines = read_json_lines(RunDirectory(stored.path).metrics(network))
    last = stored.members[network].epoch - 1
    line: dict[str, Any] = next((line for line in reversed(lines) if line.get("epoch") == last), {})
    return {name: value for name, value in line.items() if isinstance(value, (int, float))}


def _results(stored: StoredRun) -> dict[str, Any]:
    """Content of summary.json and evaluation.json, if they are of the exported epoch."""
    found = {}
    for name in ("summary", "evaluation"):
        path = stored.path / f"{name}.json"
        if path.exists():
            content = read_json(path)
            epoch = stored.config.epochs if name == "summary" else content.get("epoch")
            if epoch == stored.checkpoint.epoch:
                found[name] = content
    return found
