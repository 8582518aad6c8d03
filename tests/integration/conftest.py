from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from launching import LAUNCHED, PAIR, SMALL, Done, finish, together, torchrun

from dist_graft import cli
from dist_graft.monitoring.log import close_log


@pytest.fixture(scope="session")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of two networks over three epochs."""
    run = tmp_path_factory.mktemp("pair") / "run"
    done = finish(torchrun(2, run, *PAIR), timeout=150)
    assert done.status == 0, done
    (run.parent / "output.txt").write_text(done.output)
    return run


@pytest.fixture(scope="session")
def by_peers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As `pair`, but only the donor's weights travel, and all checkpoint sets are kept."""
    run = tmp_path_factory.mktemp("by_peers") / "run"
    together(2, run, *PAIR, "--graft.exchange", "p2p", "--checkpoint.keep", "3")
    return run


@pytest.fixture(scope="session")
def independent(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As `pair`, but without rounds, and all checkpoint sets are kept."""
    run = tmp_path_factory.mktemp("independent") / "run"
    together(2, run, *PAIR, "--graft.every", "0", "--checkpoint.keep", "3")
    return run


@pytest.fixture
def alone(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[..., Done]]:
    """Train one network: what `python -m dist_graft train` does, without a new process."""
    for name in LAUNCHED:
        monkeypatch.delenv(name, raising=False)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    threads = torch.get_num_threads()

    def train(run: Path, *options: str) -> Done:
        capfd.readouterr()
        status = cli.run(["train", "--run_dir", str(run), *SMALL, *options])
        output, errors = capfd.readouterr()
        return Done(status, output, errors)

    yield train
    close_log()
    torch.set_num_threads(threads)
    for number, handler in handlers.items():
        signal.signal(number, handler)
