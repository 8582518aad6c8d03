"""Blocks of a report, rendered as Markdown and as one self-contained HTML file."""

from __future__ import annotations

import base64
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import jinja2

from dist_graft.printing import markdown_table

_NUMBER = re.compile(r"[<+−-]?[\d.,]+(\s*(±|\()\s*[\d.,]+\)?)?( %| s| h| min)?|–|")


@dataclass(frozen=True)
class Heading:
    """Heading of a section; level 1 is the title."""

    kind: ClassVar = "heading"
    level: int
    text: str


@dataclass(frozen=True)
class Paragraph:
    """Paragraph of text."""

    kind: ClassVar = "paragraph"
    text: str
    style: Literal["", "summary", "small"] = ""


@dataclass(frozen=True)
class Items:
    """Bulleted list."""

    kind: ClassVar = "items"
    texts: Sequence[str]


@dataclass(frozen=True)
class Table:
    """Table of text cells; HTML aligns columns of numbers to the right."""

    kind: ClassVar = "table"
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    dense: bool = False

    @property
    def numeric(self) -> list[bool]:
        """Whether each column contains only numbers."""
        columns = range(len(self.header))
        return [all(_NUMBER.fullmatch(row[column]) for row in self.rows) for column in columns]


@dataclass(frozen=True)
class Picture:
    """PNG image with its caption."""

    kind: ClassVar = "picture"
    name: str
    """File name without the suffix."""
    png: bytes
    caption: str

    @property
    def data_uri(self) -> str:
        """The image as a data URI."""
        return f"data:image/png;base64,{base64.b64encode(self.png).decode()}"


@dataclass(frozen=True)
class Code:
    """Preformatted text."""

    kind: ClassVar = "code"
    text: str


Block = Heading | Paragraph | Items | Table | Picture | Code


def to_html(title: str, blocks: Sequence[Block]) -> str:
    """Render the blocks as an HTML document with embedded images."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("dist_graft.studies"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        keep_trailing_newline=True,
    )
    return environment.get_template("report.html.j2").render(title=title, blocks=blocks)


def to_markdown(blocks: Sequence[Block]) -> str:
    """Render the blocks as Markdown that links to the images in pictures/."""
    return "\n\n".join(map(_markdown, blocks)) + "\n"


def _markdown(block: Block) -> str:
    match block:
        case Heading(level, text):
            return f"{'#' * level} {text}"
        case Paragraph(text, style):
            return f"**{text}**" if style == "summary" else text
        case Items(texts):
            return "\n".join(f"- {text}" for text in texts)
        case Table(header, rows):
            return markdown_table(header, rows)
        case Picture(name, _, caption):
            return f"![{caption}](pictures/{name}.png)\n\n{caption}"
        case Code(text):
            return f"```text\n{text.rstrip()}\n```"
