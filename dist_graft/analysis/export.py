"""``dist-graft export``: write the networks of a run as files of weights or as programs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from jsonargparse import ArgumentParser

from dist_graft.command import Command, Options, add_run_arguments
from dist_graft.population.runtime.process_info import ProcessInfo

Format = Literal["safetensors", "pt", "torch_export", "onnx"]


def build_parser(settings: Mapping[str, Any]) -> ArgumentParser:
    """Build the parser of the command's options."""
    parser = ArgumentParser(
        description="Write the weights of each network (networkNN), the moving average of its "
        "weights if the run has one (networkNN_ema), the average of the networks' weights "
        "(uniform_soup), and export.json, which describes the files.",
        **settings,
    )
    add_run_arguments(parser)
    parser.add_argument(
        "--format",
        type=Format,
        default="pt",
        help="safetensors or pt: plain state dicts; torch_export: programs for torch.export.load; "
        "onnx: ONNX models (extra onnx)",
    )
    parser.add_argument(
        "--out", type=str | None, default=None, help="output folder; unset: RUN/export"
    )
    return parser


def run(options: Options, process: ProcessInfo) -> Iterator[str]:
    """Export a run. Yields the files and how to load them.

    Weights are plain state dicts of contiguous CPU tensors. Programs map images
    [N, channels, image_size, image_size] to logits [N, num_classes] in evaluation mode; N is
    dynamic. The batch norm statistics of the soup are averaged, too.

    Raises: RunDirectoryError; ConfigError if the folder holds the export of another run, the
        weights do not fit the run's architecture, the model cannot be exported in this format, or
        a package is missing.
    """
    del process
    from dist_graft.analysis.exporting import export_run, how_to_load
    from dist_graft.analysis.stored_weights import open_run

    stored = open_run(Path(options["run"]), options["checkpoint"])
    folder = Path(options["out"] or stored.path / "export")
    yield from export_run(stored, folder, options["format"])
    name = None if "model" in stored.custom else stored.config.model.name
    hint = how_to_load(options["format"], name)
    yield f"{name or 'custom model'} after {stored.checkpoint.epoch} epochs; load it with {hint}"


COMMAND = Command(
    name="export",
    help="write the networks as state dicts, torch.export programs, or ONNX models",
    build_parser=build_parser,
    run=run,
)
