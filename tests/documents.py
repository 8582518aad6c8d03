"""Commands, code blocks and links of the documentation, and running its Python code."""

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
from harness import RankContext, run

ROOT = Path(__file__).parents[1]
DOCUMENTS = sorted(
    path.relative_to(ROOT)
    for pattern in ("*.md", "docs/**/*.md", "launch/**/*.md", "benchmarks/*.md")
    for path in ROOT.glob(pattern)
    if "_build" not in path.parts
)
TRAINING_SCRIPTS = (
    *("launch/local.sh", "launch/multinode.sh"),
    *("launch/slurm.sbatch", "launch/slurm_array.sbatch"),
)
"""Scripts that pass their arguments to `dist-graft train`."""


@dataclass(frozen=True)
class Block:
    """A fenced code block of a document."""

    document: Path
    language: str
    text: str

    @property
    def first_line(self) -> str:
        """First line; a block that shows a whole file begins with its name in a comment."""
        return self.text.partition("\n")[0]


def text_of(document: Path) -> str:
    """Text of a document."""
    return (ROOT / document).read_text()


def prose_of(document: Path) -> str:
    """Text of a document without its fenced blocks."""
    return re.sub(r"^```.*?^```", "", text_of(document), flags=re.DOTALL | re.MULTILINE)


def blocks(document: Path, *languages: str) -> list[Block]:
    """Fenced blocks in the given languages, in order."""
    found = re.findall(r"^```([^\n]*)\n(.*?)^```", text_of(document), re.DOTALL | re.MULTILINE)
    return [Block(document, *block) for block in found if block[0] in languages]


def commands(document: Path) -> Iterator[str]:
    """Every line of the bash blocks, and inline code that starts like a command of dist_graft."""
    for block in blocks(document, "bash"):
        for line in block.text.replace("\\\n", " ").splitlines():
            if command := line.partition("#")[0].strip():
                yield " ".join(command.split())
    for code in re.findall(r"`([^`]+)`", prose_of(document)):
        words = code.split()
        is_command = words[:1] == ["dist-graft"] or {"torchrun", "dist_graft"} <= set(words)
        if len(words) > 1 and is_command:
            yield " ".join(words)


def arguments(command: str) -> list[str] | None:
    """Arguments of a command that reach dist_graft's parser; None for other programs."""
    words = shlex.split(command)
    for script in TRAINING_SCRIPTS:
        if script in words:
            return ["train", *words[words.index(script) + 1 :]]
    for program in ("dist_graft", "dist-graft"):
        if program in words:
            return words[words.index(program) + 1 :]
    return None


def links(document: Path) -> list[str]:
    """Targets of the links and pictures in the repository, without anchors."""
    targets = re.findall(r"\]\(([^)\s#]+)[^)]*\)", prose_of(document))
    return [target for target in targets if "://" not in target]


def in_two_processes(
    folder: Path, before: Sequence[str], lines: Sequence[str], after: Sequence[str]
) -> list[Any]:
    """Run lines of the documentation in the folder, in two processes of one group.

    Returns: value of `result` at the end, by rank.
    """
    program = "\n".join(["import os, torch, torch.distributed as dist", *before, *lines, *after])
    return run(_result_of, 2, str(folder), program)


def _result_of(context: RankContext, folder: str, program: str) -> Any:
    os.chdir(folder)
    sys.path.insert(0, folder)
    torch.manual_seed(context.rank)
    names: dict[str, Any] = {}
    exec(program, names)
    return names["result"]
