"""Distributions are complete, and what pip installs trains without the checkout."""

from __future__ import annotations

import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest
from documents import ROOT
from launching import environment
from reading import metrics

pytestmark = pytest.mark.slow
PACKAGE_DATA = sorted(
    str(path.relative_to(ROOT))
    for pattern in (
        "py.typed",
        "training/data/fashion_mini/*",
        "studies/published.yaml",
        "studies/templates/*",
    )
    for path in (ROOT / "dist_graft").glob(pattern)
)
OPTIONS = (
    *("--config", str(ROOT / "launch/configs/quickstart.yaml"), "--epochs", "1"),
    *("--run_dir", "run", "--data.train_samples", "128"),
    *("--data.test_samples", "64", "--runtime.device", "cpu", "--runtime.threads", "1"),
)


def run(*command: str | Path, cwd: Path) -> None:
    done = subprocess.run(
        [str(word) for word in command],
        cwd=cwd,
        env={name: value for name, value in environment().items() if name != "PYTHONPATH"},
        capture_output=True,
        text=True,
        timeout=250,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def copy_checkout(folder: Path) -> Path:
    """Copy the files under version control."""
    files = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        check=True,
    ).stdout.split(b"\0")
    for name in (file.decode() for file in files if file):
        if (ROOT / name).is_file():  # not deleted since the last commit
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes((ROOT / name).read_bytes())
    return folder


@pytest.fixture(scope="module")
def distributions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with a wheel and an sdist."""
    folder = tmp_path_factory.mktemp("distributions")
    source = copy_checkout(folder / "source")
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, cwd=source)
    return folder


def test_the_distributions_are_complete(distributions: Path) -> None:
    (wheel,), (sdist,) = distributions.glob("*.whl"), distributions.glob("*.tar.gz")
    run(sys.executable, "-m", "twine", "check", "--strict", wheel, sdist, cwd=distributions)
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    assert names >= set(PACKAGE_DATA)
    assert not [name for name in names if not name.startswith("dist_graft")]
    licenses = {name.partition(".dist-info/licenses/")[2] for name in names}
    expected = {"LICENSE", "dist_graft/training/data/fashion_mini/LICENSE"}
    assert licenses - {""} == expected
    with tarfile.open(sdist) as archive:
        sources = {name.partition("/")[2] for name in archive.getnames()}
    assert sources >= expected | {"README.md", "pyproject.toml", "setup.cfg", *PACKAGE_DATA}


@pytest.mark.parametrize("kind", ["wheel", "checkout"])
def test_an_installed_package_trains(kind: str, distributions: Path, tmp_path: Path) -> None:
    """In a new virtual environment with the dependencies but without dist_graft."""
    environment_folder, folder = tmp_path / "venv", tmp_path / "empty"
    folder.mkdir()
    venv.create(environment_folder, with_pip=False)
    python = environment_folder / "bin/python"
    (site_packages,) = environment_folder.glob("lib/python*/site-packages")
    dependencies = tmp_path / "dependencies"
    dependencies.mkdir()
    for path in Path(sysconfig.get_path("purelib")).iterdir():
        if "dist_graft" not in path.name:
            (dependencies / path.name).symlink_to(path)
    (site_packages / "dependencies.pth").write_text(f"{dependencies}\n")
    absent = "from importlib import util; assert util.find_spec('dist_graft') is None"
    run(python, "-c", absent, cwd=folder)

    pip = (sys.executable, "-m", "pip", "--python", python, "--disable-pip-version-check")
    install = (*pip, "install", "--quiet", "--no-deps", "--no-index")
    if kind == "wheel":
        (wheel,) = distributions.glob("*.whl")
        run(*install, wheel, cwd=folder)
    else:
        run(*install, "--no-build-isolation", ".", cwd=copy_checkout(tmp_path / "checkout"))
    assert not [name for name in PACKAGE_DATA if not (site_packages / name).is_file()]
    installed = f"import dist_graft; assert dist_graft.__file__.startswith('{site_packages}')"
    run(python, "-c", installed, cwd=folder)
    launcher = ("torch.distributed.run", "--standalone", "--nproc-per-node=2")
    run(python, "-m", *launcher, "-m", "dist_graft", "train", *OPTIONS, cwd=folder)
    run(environment_folder / "bin/dist-graft", "evaluate", "run", cwd=folder)
    for network in (0, 1):
        assert metrics(folder / "run", network)[0]["graft"]["donor"] == 1 - network
