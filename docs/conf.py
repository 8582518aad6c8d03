"""Configuration of the documentation site.

sphinx-build -W --keep-going -b html docs docs/_build/html
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from myst_parser.parsers.sphinx_ import MystParser

from dist_graft.version import VERSION

if TYPE_CHECKING:
    from docutils import nodes
    from sphinx.application import Sphinx

project = "dist_graft"
version = release = VERSION
extensions = ["myst_parser", "sphinx.ext.autodoc"]
exclude_patterns = ["_build"]
source_suffix = {".md": "markdown", ".rst": "restructuredtext", ".ipynb": "notebook"}

html_theme = "furo"
html_title = f"dist_graft {VERSION}"
html_copy_source = False
html_show_copyright = False
html_static_path = ["static"]
html_css_files = ["tables.css"]

myst_heading_anchors = 3
suppress_warnings = ["myst.header"]  # generated reports start some tables below a smaller heading

default_role = "code"
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 88

_CODE = re.compile(r"(``.*?``|`.*?`)")
_ENTRY = re.compile(r"    ([*\w]+(?:, [*\w]+)*)(?: \((.*?)\))?: (.*)")
_FIELDS = {"Args": "param", "Attributes": "var", "Raises": "raises"}
_SECTION = re.compile(r"(Args|Attributes|Returns|Raises):(?: +(.*))?")


def _to_rst(lines: list[str]) -> Iterator[str]:
    """Translate a docstring: plain text, code in backticks, Args/Returns/Raises sections."""
    section = ""
    for line in lines:
        if match := _SECTION.fullmatch(line):
            section, text = match[1], _escape(match[2] or "")
            yield ""
            if section == "Returns":
                yield f":returns: {text}"
            elif section == "Raises" and text:
                error, when = re.split(r",? ", text, maxsplit=1)
                yield f":raises {error}: {when}"
        elif section in _FIELDS and (match := _ENTRY.fullmatch(line)):
            names, type_, text = match.groups()
            yield f":{_FIELDS[section]} {_escape(names)}: {_escape(text)}"
            if type_:
                yield f":vartype {names}: {type_}"
        elif line and not line.startswith(" "):
            if section:
                yield ""
            section = ""
            yield _escape(line)
        else:  # indented text continues a section, or is a code block
            yield _escape(line) if section else line


def _escape(text: str) -> str:
    """Escape the markup of reStructuredText outside of code."""
    parts = _CODE.split(text)
    parts[::2] = [re.sub(r"([*|]|_(?!\w))", r"\\\1", part) for part in parts[::2]]
    return "".join(parts)


def _translate_docstring(
    app: Sphinx, what: str, name: str, obj: object, options: Any, lines: list[str]
) -> None:
    lines[:] = [*_to_rst(lines), ""]


class NotebookParser(MystParser):  # type: ignore[misc]
    """Notebooks with their stored output, as Markdown."""

    supported = ("notebook",)

    def parse(self, inputstring: str, document: nodes.document) -> None:
        """Parse the notebook's JSON."""
        parts = [part for cell in json.loads(inputstring)["cells"] for part in _to_markdown(cell)]
        super().parse("\n\n".join(parts), document)


def _to_markdown(cell: dict[str, Any]) -> Iterator[str]:
    """Source of a cell, its pictures, and what it printed."""
    source = "".join(cell["source"])
    if cell["cell_type"] == "markdown":
        yield source
        return
    has_commands = re.search(r"^!", source, re.MULTILINE)
    yield f"```{'text' if has_commands else 'python'}\n{source}\n```"
    for output in cell["outputs"]:
        if picture := output.get("data", {}).get("image/png"):
            yield f"![output](data:image/png;base64,{''.join(picture).strip()})"
        elif output.get("name") == "stdout":
            yield f"```text\n{''.join(output['text'])}```"


def setup(app: Sphinx) -> None:
    """Register the translation of docstrings, and notebooks."""
    app.connect("autodoc-process-docstring", _translate_docstring)
    app.add_source_parser(NotebookParser)
