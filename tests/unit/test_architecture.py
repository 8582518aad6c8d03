"""Only `population` communicates, knows no method by name, and light modules import no torch."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest
import torch.distributed as dist

PACKAGE = Path(__file__).parents[2] / "dist_graft"
FILES = sorted(PACKAGE.rglob("*.py"))
COMMUNICATES = ("torch.distributed", "torch.nn.parallel")


def relative_name(path: Path) -> str:
    return str(path.relative_to(PACKAGE.parent))


def imported_names(source: str) -> set[str]:
    """Dotted names that a file imports, or uses as attributes of an imported name."""
    names: dict[str, str] = {}
    found = set()
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                found.add(alias.name)
                first = alias.name.partition(".")[0]
                names[alias.asname or first] = alias.name if alias.asname else first
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                found.add(f"{node.module}.{alias.name}")
                names[alias.asname or alias.name] = f"{node.module}.{alias.name}"
    for node in ast.walk(tree):
        parts, inner = [], node
        while isinstance(inner, ast.Attribute):
            parts.append(inner.attr)
            inner = inner.value
        if parts and isinstance(inner, ast.Name) and inner.id in names:
            found.add(".".join([names[inner.id], *reversed(parts)]))
        elif isinstance(node, ast.Call) and "import" in ast.unparse(node.func):
            found.update(a.value for a in node.args if isinstance(a, ast.Constant))
    return {name for name in found if isinstance(name, str)}


def communicates(source: str) -> bool:
    return any(
        name == module or name.startswith(f"{module}.")
        for name in imported_names(source)
        for module in COMMUNICATES
    )


@pytest.mark.parametrize(
    "source",
    [
        "import torch.distributed",
        "import torch.distributed as dist",
        "from torch import distributed",
        "from torch import distributed as dist",
        "from torch.distributed import all_reduce",
        "from torch.distributed.elastic.multiprocessing.errors import record",
        "import torch\ntorch.distributed.barrier()",
        "import torch as t\nt.distributed.barrier()",
        "from torch.nn.parallel import DistributedDataParallel",
        "from torch import nn\nnn.parallel.DistributedDataParallel",
        "import importlib\nimportlib.import_module('torch.distributed')",
        "__import__('torch.distributed')",
    ],
)
def test_communication_is_detected(source):
    assert communicates(source)


def test_other_code_is_not_detected():
    assert not communicates("import torch\nfrom torch import nn\ntorch.rand(2)\nnn.Linear(1, 1)")
    assert not communicates("import distributed\ndistributed.barrier()")
    assert not communicates("command = ['python', '-m', 'torch.distributed.run']")


@pytest.mark.parametrize(
    "path", [path for path in FILES if "population" not in path.parts], ids=relative_name
)
def test_only_population_communicates(path):
    assert not communicates(path.read_text())


def test_population_communicates():
    assert any(communicates(path.read_text()) for path in (PACKAGE / "population").rglob("*.py"))


def checked_classes(source: str) -> set[str]:
    """Names of the classes that a file passes to isinstance, issubclass or `type(x) is`."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("isinstance", "issubclass"):
            classes: list[ast.expr] = node.args[1:]
        elif isinstance(node, ast.Compare) and ast.unparse(node.left).startswith("type("):
            classes = node.comparators
        else:
            continue
        parts = [part for each in classes for part in ast.walk(each)]
        found |= {part.id for part in parts if isinstance(part, ast.Name)}
        found |= {part.attr for part in parts if isinstance(part, ast.Attribute)}
    return found


def test_checks_of_classes_are_detected():
    source = "isinstance(x, A | b.C)\nissubclass(y, (D, E))\ntype(x) is F\nisinstance(G, int)"
    assert checked_classes(source) == {"A", "b", "C", "D", "E", "F", "int"}


@pytest.mark.parametrize("path", sorted((PACKAGE / "population").rglob("*.py")), ids=relative_name)
def test_population_does_not_test_for_methods(path):
    """A Mixing and a rule declare how they are exchanged (ADR 24)."""
    methods = {
        node.name
        for file in (PACKAGE / "grafting").rglob("*.py")
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.ClassDef)
    }
    assert {"Mixing", "ScalarSwap", "Rule", "Graft"} <= methods
    assert not checked_classes(path.read_text()) & methods


@pytest.mark.parametrize("path", FILES, ids=relative_name)
def test_no_collective_pickles(path):
    """Collectives of objects send pickles."""
    names = {name.rpartition(".")[2] for name in imported_names(path.read_text())}
    assert not {name for name in names if "object" in name and name in vars(dist)}


def test_collectives_of_objects_are_detected():
    source = "import torch.distributed as dist\ndist.all_gather_object([], 0)"
    assert "torch.distributed.all_gather_object" in imported_names(source)
    assert "all_gather_object" in vars(dist)


def modules_after(statement: str) -> set[str]:
    """Modules loaded in a new interpreter after a statement."""
    program = f"import sys\n{statement}\nprint(*sys.modules)"
    ended = subprocess.run(
        [sys.executable, "-c", program],
        cwd=PACKAGE.parent,
        check=True,
        capture_output=True,
        text=True,
        timeout=60,
    )
    return set(ended.stdout.split())


@pytest.mark.parametrize(
    "statement",
    [
        "import dist_graft",
        "import dist_graft; dir(dist_graft); dist_graft.__version__",
        "import dist_graft.config, dist_graft.errors, dist_graft.seeding, dist_graft.version",
        "import dist_graft.grafting.rules",
        "from dist_graft import ConfigError, DisagreementError, NonFiniteError, PeerError",
    ],
)
def test_light_imports_load_no_torch(statement):
    loaded = modules_after(statement)
    assert "dist_graft" in loaded
    assert not loaded & {"torch", "torchvision", "numpy", "tensorboard"}


def test_grafting_does_not_load_population():
    loaded = modules_after("from dist_graft import entropy, graft_units, mix, Graft")
    assert "torch" in loaded
    assert not any(name.startswith("dist_graft.population") for name in loaded)


def test_public_names():
    import dist_graft

    assert set(dir(dist_graft)) >= set(dist_graft.__all__)
    assert all(getattr(dist_graft, name) is not None for name in dist_graft.__all__)
    with pytest.raises(AttributeError, match="module 'dist_graft' has no attribute 'graft'"):
        _ = dist_graft.graft
