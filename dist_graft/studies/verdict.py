"""What a contrast shows, in a plain sentence, whatever the answer."""

from __future__ import annotations

from collections.abc import Sequence

from dist_graft.studies.lines import ContrastLine

MINUS = "−"


def signed(value: float, digits: int = 2) -> str:
    """A number with its sign, as it is printed: +0.42, −0.10, 0.00."""
    text = f"{abs(value):.{digits}f}"
    if float(text) == 0:
        return text
    return f"{'+' if value > 0 else MINUS}{text}"


def enough_digits(smallest: float) -> int:
    """Decimals that show two figures of a spread, at least 1."""
    digits = 1
    while digits < 4 and smallest < 10 ** (1 - digits):
        digits += 1
    return digits


def verdict(line: ContrastLine) -> str:
    """What the seeds show about a method and its control."""
    return f"{line.contrast.method.label}, against {line.contrast.control_name}: {reading(line)}."


def reading(line: ContrastLine) -> str:
    """The verdict without the names."""
    n = line.result.n
    if n == 0:
        return "nothing to say, no seed has both runs"
    text = _reading(line)
    if n < line.planned:
        text += f" ({n} of {line.planned} seeds)"
    return text


def word(line: ContrastLine) -> str:
    """The verdict in a table's cell."""
    if line.result.n < 2:
        return "no answer"
    if not line.decision.shown:
        return "no difference shown"
    return "better" if line.result.mean > 0 else "worse"


def _reading(line: ContrastLine) -> str:
    result, n = line.result, line.result.n
    if n == 1:
        return f"{signed(result.mean)} with one seed, which shows no difference, whatever its size"
    if line.half_width is None or line.smallest is None:
        if signed(result.mean) == "0.00":
            return f"no difference at all in any of the {n} seeds"
        return (
            f"{signed(result.mean)} in each of the {n} seeds; without any spread the test says "
            "nothing, and no difference is shown"
        )
    digits = enough_digits(line.half_width)
    interval = f"{signed(result.mean, digits)} ± {line.half_width:.{digits}f}"
    if line.decision.shown:
        return f"{word(line)}, {interval} percentage points over {n} seeds"
    return (
        f"no difference that these {n} seeds can show: {interval}; they could have shown "
        f"{line.smallest:.{digits}f}"
    )


def answer(main: Sequence[ContrastLine]) -> str:
    """All comparisons with the plan's control together."""
    told = [line for line in main if line.result.n > 1]
    if not told:
        return "No method has two seeds to compare with its control: there is no answer yet."
    sentences = []
    better = [line for line in told if line.decision.shown and line.result.mean > 0]
    worse = [line for line in told if line.decision.shown and line.result.mean < 0]
    if not better and not worse:
        return (
            f"None of the {len(told)} comparisons shows a difference."
            if len(told) > 1
            else "The comparison shows no difference."
        )
    for text, lines in (("Better", better), ("Worse", worse)):
        if lines:
            names = "; ".join(line.contrast.method.label for line in lines)
            sentences.append(
                f"{text} than its control in {len(lines)} of {len(told)} comparisons: {names}."
            )
    return " ".join(sentences)


def reservations(main: Sequence[ContrastLine], further: Sequence[ContrastLine]) -> list[str]:
    """For each method that is better than its control, which others it is not better than."""
    sentences = []
    for line in main:
        if not line.decision.shown or line.result.mean < 0:
            continue
        others = [other for other in further if other.contrast.method is line.contrast.method]
        open_ = [other for other in others if not other.decision.shown]
        worse = [other for other in others if other.decision.shown and other.result.mean < 0]
        for text, rivals in (("not shown to differ from", open_), ("worse than", worse)):
            if rivals:
                names = "; ".join(other.contrast.control_name for other in rivals)
                sentences.append(f"{line.contrast.method.label} is {text}: {names}.")
    return sentences
