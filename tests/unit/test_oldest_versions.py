"""The versions that CI installs: tests/oldest.txt and tests/constraints.txt."""

from __future__ import annotations

from configparser import ConfigParser
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
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


def test_constraints_have_all_requirements() -> None:
    setup = ConfigParser()
    setup.read(ROOT / "setup.cfg")
    groups = [setup["options"]["install_requires"], *setup["options.extras_require"].values()]
    lines = (ROOT / "tests/constraints.txt").read_text().splitlines()
    pinned = {
        canonicalize_name(name): version
        for name, _, version in (line.partition("==") for line in lines if "==" in line)
    }
    for line in filter(None, "\n".join(groups).splitlines()):
        requirement = Requirement(line)
        name = canonicalize_name(requirement.name)
        if name != "dist-graft":
            assert requirement.specifier.contains(pinned[name]), line
