"""The texts of the repository: their commands, code blocks, headings and links."""

from __future__ import annotations

import os
import re
import shlex
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from harness import Place, run

ROOT = Path(__file__).parents[1]
DOCUMENTS = sorted(
    path.relative_to(ROOT)
    for pattern in ("*.md", "docs/**/*.md", "launch/**/*.md", "benchmarks/*.md")
    for path in ROOT.glob(pattern)
)
TRAINING_SCRIPTS = ("launch/local.sh", "launch/multinode.sh", "launch/slurm.sbatch")
"""What follows them on a command line is for `dist-graft train`."""


@dataclass(frozen=True)
class Block:
    """A fenced block of a document."""

    document: Path
    language: str
    text: str


def text_of(document: Path) -> str:
    """What a document says."""
    return (ROOT / document).read_text()


def blocks(document: Path, *languages: str) -> list[Block]:
    """The fenced blocks in some languages, in order."""
    found = re.findall(r"^```(\w*)\n(.*?)^```", text_of(document), re.DOTALL | re.MULTILINE)
    return [Block(document, *block) for block in found if block[0] in languages]


def commands(document: Path) -> Iterator[str]:
    """Every line of the bash blocks, and inline code that begins as a command of ours does."""
    for block in blocks(document, "bash"):
        for line in block.text.replace("\\\n", " ").splitlines():
            if command := line.partition("#")[0].strip():
                yield " ".join(command.split())
    prose = re.sub(r"^```.*?^```", "", text_of(document), flags=re.DOTALL | re.MULTILINE)
    for code in re.findall(r"`([^`]+)`", prose):
        words = code.split()
        ours = words[:1] == ["dist-graft"] or {"torchrun", "dist_graft"} <= set(words)
        if len(words) > 1 and ours:
            yield " ".join(words)


def arguments(command: str) -> list[str] | None:
    """What reaches our command line; None for a command that is not ours."""
    words = shlex.split(command)
    for script in TRAINING_SCRIPTS:
        if script in words:
            return ["train", *words[words.index(script) + 1 :]]
    for ours in ("dist_graft", "dist-graft"):
        if ours in words:
            return words[words.index(ours) + 1 :]
    return None


def headings(document: Path) -> set[str]:
    """Anchors of a document, as GitHub and most viewers make them."""
    prose = re.sub(r"^```.*?^```", "", text_of(document), flags=re.DOTALL | re.MULTILINE)
    anchors: set[str] = set()
    for heading in re.findall(r"^#+ (.*)$", prose, re.MULTILINE):
        plain = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading).replace("`", "")
        anchor = re.sub(r"[^\w\- ]", "", plain.strip().lower()).replace(" ", "-")
        count = sum(1 for known in anchors if re.fullmatch(rf"{re.escape(anchor)}(-\d+)?", known))
        anchors.add(f"{anchor}-{count}" if count else anchor)
    return anchors


def links(document: Path) -> list[str]:
    """Targets inside the repository, as they are written."""
    prose = re.sub(r"^```.*?^```", "", text_of(document), flags=re.DOTALL | re.MULTILINE)
    targets = re.findall(r"\]\(([^)\s]+)[^)]*\)", prose)
    return [t for t in targets if "://" not in t and not t.startswith("mailto:")]


def in_two_processes(
    folder: Path, before: Sequence[str], lines: Sequence[str], after: Sequence[str]
) -> list[Any]:
    """Run documentation's lines between ours, in the folder, in two processes of one group.

    Returns: what `told` is at the end, by rank.
    """
    whole = "\n".join(["import os, torch, torch.distributed as dist", *before, *lines, *after])
    return run(_told_by, 2, str(folder), whole)


def _told_by(place: Place, folder: str, program: str) -> Any:
    os.chdir(folder)
    sys.path.insert(0, folder)
    torch.manual_seed(place.rank)
    names: dict[str, Any] = {}
    exec(program, names)
    return names["told"]
