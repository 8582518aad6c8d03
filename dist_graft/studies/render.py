"""Paragraphs, tables and pictures as Markdown, and as one HTML file that needs no other."""

from __future__ import annotations

import base64
import html
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Heading:
    """Of a section; level 1 is the title."""

    level: int
    text: str


@dataclass(frozen=True)
class Paragraph:
    """A paragraph, or something that should be seen first."""

    text: str
    kind: Literal["text", "verdict", "small"] = "text"


@dataclass(frozen=True)
class Items:
    """A list."""

    texts: Sequence[str]


@dataclass(frozen=True)
class Table:
    """Cells of text; numbers are aligned to the right."""

    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    dense: bool = False


@dataclass(frozen=True)
class Picture:
    """A PNG, with what it shows."""

    name: str
    """Of its file, without the ending."""
    png: bytes
    caption: str


@dataclass(frozen=True)
class Code:
    """Text as it is."""

    text: str


Block = Heading | Paragraph | Items | Table | Picture | Code


def markdown(blocks: Sequence[Block], pictures: str) -> str:
    """The blocks as Markdown; `pictures` is the folder of the PNG files, as seen from the text."""
    return "\n\n".join(_markdown(block, pictures) for block in blocks) + "\n"


def _markdown(block: Block, pictures: str) -> str:
    match block:
        case Heading(level, text):
            return f"{'#' * level} {text}"
        case Paragraph(text, kind):
            return f"**{text}**" if kind == "verdict" else text
        case Items(texts):
            return "\n".join(f"- {text}" for text in texts)
        case Table(header, rows):
            lines = [header, ["---"] * len(header), *rows]
            return "\n".join(f"| {' | '.join(map(_cell, line))} |" for line in lines)
        case Picture(name, _, caption):
            return f"![{caption}]({pictures}/{name}.png)\n\n{caption}"
        case Code(text):
            return f"```text\n{text.rstrip()}\n```"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


_STYLE = """
:root { color-scheme: light; }
body { font: 16px/1.5 system-ui, sans-serif; color: #1a1a1a; background: #fff;
  max-width: 60rem; margin: 2rem auto; padding: 0 1.5rem; }
h1 { font-size: 1.7rem; line-height: 1.25; } h2 { font-size: 1.25rem; margin-top: 2.4rem;
  border-bottom: 1px solid #ccc; padding-bottom: .2rem; }
p.verdict { font-size: 1.1rem; font-weight: 600; border-left: .3rem solid #0072b2;
  padding: .1rem 0 .1rem 1rem; }
p.small, figcaption { font-size: .85rem; color: #444; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .88rem; margin: 1rem 0;
  font-variant-numeric: tabular-nums; }
table.dense { font-size: .72rem; }
th { text-align: left; border-bottom: 2px solid #444; vertical-align: bottom; }
td { border-bottom: 1px solid #ddd; vertical-align: top; }
th, td { padding: .25rem .7rem .25rem 0; }
.number { text-align: right; } td.number { white-space: nowrap; }
td:first-child { min-width: 7rem; }
figure { margin: 1.2rem 0; } img { max-width: 100%; height: auto; }
pre { font-size: .75rem; background: #f5f5f5; padding: .8rem; white-space: pre-wrap;
  overflow-wrap: anywhere; }
@media print {
  body { max-width: none; margin: 0; font-size: 10pt; }
  figure, tr, p.verdict { break-inside: avoid; } h2 { break-after: avoid; }
  .scroll { overflow: visible; } table { font-size: 8pt; } table.dense { font-size: 6.5pt; }
}
"""

_NUMBER = re.compile(r"[<+−-]?[\d.,]+(\s*(±|\()\s*[\d.,]+\)?)?( %| s| h| min)?|–|")


def page(title: str, blocks: Sequence[Block]) -> str:
    """The blocks as a whole HTML document, pictures inside."""
    body = "\n".join(_html(block) for block in blocks)
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{html.escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n"
        f"<body>\n{body}\n</body>\n</html>\n"
    )


def _html(block: Block) -> str:
    match block:
        case Heading(level, text):
            return f"<h{level}>{html.escape(text)}</h{level}>"
        case Paragraph(text, kind):
            attribute = "" if kind == "text" else f' class="{kind}"'
            return f"<p{attribute}>{html.escape(text)}</p>"
        case Items(texts):
            return f"<ul>{''.join(f'<li>{html.escape(text)}</li>' for text in texts)}</ul>"
        case Table():
            return _html_table(block)
        case Picture(_, png, caption):
            data = base64.b64encode(png).decode()
            alternative = html.escape(caption, quote=True)
            return (
                f'<figure><img alt="{alternative}" src="data:image/png;base64,{data}">'
                f"<figcaption>{html.escape(caption)}</figcaption></figure>"
            )
        case Code(text):
            return f"<pre>{html.escape(text.rstrip())}</pre>"


def _html_table(table: Table) -> str:
    columns = range(len(table.header))
    numeric = [all(_NUMBER.fullmatch(row[column]) for row in table.rows) for column in columns]

    def line(tag: str, cells: Sequence[str]) -> str:
        starts = [
            f'<{tag} class="number">' if numeric[column] else f"<{tag}>" for column in columns
        ]
        return "".join(
            f"{start}{html.escape(cell)}</{tag}>" for start, cell in zip(starts, cells, strict=True)
        )

    rows = "\n".join(f"<tr>{line('td', row)}</tr>" for row in table.rows)
    attribute = ' class="dense"' if table.dense else ""
    return (
        f'<div class="scroll"><table{attribute}><thead><tr>{line("th", table.header)}</tr></thead>'
        f"\n<tbody>\n{rows}\n</tbody></table></div>"
    )
