"""``dist-graft predict``: classify images with exported networks."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser

from dist_graft.command import Command, Options
from dist_graft.config.validation import at_least
from dist_graft.errors import ConfigError, DataError
from dist_graft.population.runtime.process_info import ProcessInfo
from dist_graft.printing import format_table


def build_parser(settings: Mapping[str, Any]) -> ArgumentParser:
    """Build the parser of the command's options."""
    parser = ArgumentParser(
        description="Classify images with an exported network, or with the mean probabilities of "
        "several.",
        **settings,
    )
    add = parser.add_argument
    add(
        "paths",
        type=str,
        nargs="+",
        metavar="EXPORT [EXPORT ...] IMAGE",
        help="exported files, or folders (for their first network), then images or folders of them",
    )
    add("--top", type=int, default=5, help="number of classes for each image")
    add("--json", action="store_true", help="print a JSON list")
    add(
        "--trust_code",
        action="store_true",
        help="allow an export to call its own model function, package.module:name",
    )
    return parser


def run(options: Options, process: ProcessInfo) -> Iterator[str]:
    """Classify images. Yields a table of the most probable classes, or JSON.

    Raises: DistGraftError.
    """
    del process
    at_least("top", options["top"], 1)
    paths = [Path(path) for path in options["paths"]]
    for path in paths:
        if not path.exists():
            raise DataError(f"{path} does not exist")
    from dist_graft.analysis.exported import is_export, predict

    exports = [path for path in paths if is_export(path)]
    if not exports:
        raise ConfigError(
            f"{paths[0]} is neither an exported folder nor a file in one: run dist-graft export"
        )
    images = [image for path in paths if path not in exports for image in _images(path)]
    if not images:
        raise ConfigError("no images: pass the exports first, then the images to classify")
    results = predict(exports, images, top=options["top"], trust_code=options["trust_code"])
    if options["json"]:
        yield json.dumps(results, indent=1)
        return
    rows = [
        (
            result["image"] if rank == 1 else "",
            str(rank),
            each["name"],
            f"{each['probability']:.4f}",
        )
        for result in results
        for rank, each in enumerate(result["classes"], 1)
    ]
    yield format_table(("image", "rank", "class", "probability"), rows)


def _images(path: Path) -> list[Path]:
    """The images below a folder, or the file itself."""
    if not path.is_dir():
        return [path]
    from torchvision.datasets.folder import IMG_EXTENSIONS

    from dist_graft.training.data.image_files import image_names

    images = [path / name for name in image_names(path)]
    if not images:
        raise DataError(f"{path} has no images ({', '.join(IMG_EXTENSIONS)})")
    return images


COMMAND = Command(
    name="predict",
    help="classify images with exported networks",
    build_parser=build_parser,
    run=run,
)
