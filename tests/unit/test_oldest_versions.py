"""tests/oldest.txt, which CI installs, has the lower bounds of setup.cfg."""

from __future__ import annotations

from configparser import ConfigParser
from pathlib import Path

from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).parents[2]


def requirements(lines: str) -> dict[str, tuple[set[str], str, Version]]:
    """(extras, operator, version) by name; every requirement has exactly one of these."""
    found = {}
    for line in filter(None, (line.partition("#")[0].strip() for line in lines.splitlines())):
        requirement = Requirement(line)
        (specifier,) = requirement.specifier
        version = Version(specifier.version)
        found[requirement.name] = (requirement.extras, specifier.operator, version)
    return found


def test_the_oldest_versions_are_the_lower_bounds() -> None:
    setup = ConfigParser()
    setup.read(ROOT / "setup.cfg")
    extras = setup["options.extras_require"]
    bounds = requirements(
        "\n".join([setup["options"]["install_requires"], extras["studies"], extras["test"]])
    )
    assert {operator for _, operator, _ in bounds.values()} == {">="}
    pinned, indirect = (ROOT / "tests/oldest.txt").read_text().split("\n\n")
    assert requirements(pinned) == {
        name: (extra, "==", version) for name, (extra, _, version) in bounds.items()
    }
    assert not requirements(indirect).keys() & bounds.keys()
