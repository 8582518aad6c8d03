from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from launching import LAUNCHED, PAIR, SMALL, Done, Train, run_population, run_program, torchrun
from tensorboard.summary.writer import event_file_writer

from dist_graft import cli
from dist_graft.monitoring.log import close_log


@pytest.fixture(scope="session")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run directory of two networks after three epochs."""
    run = tmp_path_factory.mktemp("pair") / "run"
    done = run_program(torchrun(2, run, *PAIR), timeout=150)
    assert done.status == 0, done
    (run.parent / "output.txt").write_text(done.output)
    return run


@pytest.fixture(scope="session")
def by_peers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Like `pair`, but with the p2p exchange, and all checkpoints are kept."""
    run = tmp_path_factory.mktemp("by_peers") / "run"
    run_population(2, run, *PAIR, "--graft.exchange", "p2p", "--checkpoint.keep", "3")
    return run


@pytest.fixture(scope="session")
def independent(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Like `pair`, but without rounds, and all checkpoints are kept."""
    run = tmp_path_factory.mktemp("independent") / "run"
    run_population(2, run, *PAIR, "--graft.every", "0", "--checkpoint.keep", "3")
    return run


@pytest.fixture
def train(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Iterator[Train]:
    """Return a function that trains one network in this process, as `dist-graft train` does."""
    for name in LAUNCHED:
        monkeypatch.delenv(name, raising=False)
    # Event files of one second are read in the order of their names, which end with this counter:
    # .10 would come before .9.
    monkeypatch.setattr(event_file_writer, "_global_uid", event_file_writer.AtomicCounter(100))
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    threads = torch.get_num_threads()

    def train_here(run: Path, *options: str) -> Done:
        capfd.readouterr()
        status = cli.run(["train", "--run_dir", str(run), *SMALL, *options])
        output, errors = capfd.readouterr()
        return Done(status, output, errors)

    yield train_here
    close_log()
    torch.set_num_threads(threads)
    for number, handler in handlers.items():
        signal.signal(number, handler)
