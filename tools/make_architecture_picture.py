"""Draw docs/pictures/architecture.svg, the rooms of the package and a tensor's way.

Run it as: python tools/make_architecture_picture.py
"""

from __future__ import annotations

from pathlib import Path

PICTURE = Path(__file__).parents[1] / "docs" / "pictures" / "architecture.svg"

_WIDTH, _HEIGHT = 900, 560
_STYLE = """
text { font: 14px sans-serif; fill: #1b2733; }
.small { font-size: 12px; fill: #44525f; }
.title { font-weight: bold; }
.room { fill: #f4f6f8; stroke: #8a97a3; }
.step { fill: #ffffff; stroke: #2f6f9f; }
.number { fill: #2f6f9f; font-weight: bold; }
.import { stroke: #8a97a3; fill: none; marker-end: url(#grey); }
.way { stroke: #2f6f9f; stroke-width: 2; fill: none; marker-end: url(#blue); }
.peer { fill: #fdf3e7; stroke: #c77c2e; }
"""


def picture() -> str:
    """The drawing as SVG."""
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" '
        f'width="{_WIDTH}" height="{_HEIGHT}" role="img">',
        "<title>Rooms of dist_graft and the way of a tensor through them</title>",
        f"<style>{_STYLE}</style>",
        f"<defs>{_tip('grey', '#8a97a3')}{_tip('blue', '#2f6f9f')}</defs>",
        f'<rect width="{_WIDTH}" height="{_HEIGHT}" fill="#ffffff"/>',
        _room(20, 16, 860, 44, "cli", "parses and checks; calls one function a command"),
        _room(20, 84, 860, 44, "analysis", "status, evaluate, inspect, export, compare, doctor"),
        _room(20, 152, 860, 110, "training", "", "the story of", "one network"),
        _step(210, 192, "1", "batch", "data"),
        _step(390, 192, "2", "step", "loop, optim"),
        _step(730, 192, "8", "record, save", "checkpointing"),
        _room(20, 286, 690, 130, "population", "", "the only room that", "communicates"),
        _step(210, 328, "4", "agree", "header"),
        _step(390, 328, "6", "exchange", "buckets"),
        _step(560, 328, "7", "blend", "in place"),
        _room(20, 440, 690, 104, "grafting", "", "pure: tensors in,", "tensors out"),
        _step(210, 470, "3", "measure", "criteria, units"),
        _step(390, 470, "5", "decide", "rules, mixing"),
        _room(730, 286, 150, 90, "monitoring", "", "log, metrics,", "TensorBoard, bar"),
        '<rect class="peer" x="730" y="440" width="150" height="104" rx="6"/>',
        _text(744, 466, "other networks", "title"),
        _text(744, 488, "in processes of"),
        _text(744, 506, "their own, the"),
        _text(744, 524, "same way"),
        *(_line(x1, y1, x2, y2, "import") for x1, y1, x2, y2 in _IMPORTS),
        *(f'<path class="way" d="{path}"/>' for path in _WAY),
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


_IMPORTS = (
    (870, 60, 870, 82),
    (870, 128, 870, 150),
    (870, 262, 870, 284),
    (30, 262, 30, 284),
    (30, 416, 30, 438),
)
_WAY = (
    "M 340 215 H 388",  # batch to step
    "M 455 238 V 268 Q 455 274 449 274 H 197 Q 190 274 190 281 V 486 Q 190 493 197 493 H 208",
    "M 275 470 V 376",  # measure to agree
    "M 340 351 H 358 Q 365 351 365 358 V 486 Q 365 493 372 493 H 388",  # agree to decide
    "M 455 470 V 376",  # decide to exchange
    "M 520 351 H 558",  # exchange to blend
    "M 625 328 V 222 Q 625 215 632 215 H 728",  # blend to record
    "M 490 374 V 421 Q 490 428 497 428 H 798 Q 805 428 805 435 V 438",  # exchange to others
)


def _tip(name: str, colour: str) -> str:
    return (
        f'<marker id="{name}" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="8" '
        f'markerHeight="8" markerUnits="userSpaceOnUse" orient="auto">'
        f'<path d="M 0 0 L 8 4 L 0 8 z" fill="{colour}"/></marker>'
    )


def _room(x: int, y: int, width: int, height: int, name: str, beside: str, *below: str) -> str:
    return "".join(
        [
            f'<rect class="room" x="{x}" y="{y}" width="{width}" height="{height}" rx="6"/>',
            _text(x + 14, y + 26, name, "title"),
            *([_text(x + 110, y + 26, beside)] if beside else []),
            *(_text(x + 14, y + 48 + 18 * line, words) for line, words in enumerate(below)),
        ]
    )


def _step(x: int, y: int, number: str, name: str, where: str) -> str:
    return (
        f'<rect class="step" x="{x}" y="{y}" width="130" height="46" rx="4"/>'
        + _text(x + 8, y + 20, number, "number")
        + _text(x + 24, y + 20, name, "")
        + _text(x + 24, y + 38, where)
    )


def _text(x: int, y: int, words: str, kind: str = "small") -> str:
    return f'<text class="{kind}" x="{x}" y="{y}">{words}</text>'


def _line(x1: int, y1: int, x2: int, y2: int, kind: str) -> str:
    return f'<path class="{kind}" d="M {x1} {y1} L {x2} {y2}"/>'


if __name__ == "__main__":
    PICTURE.write_text(picture())
    print(f"wrote {PICTURE}")
