"""Errors of a single process: one line, an exit status, and nothing is overwritten."""

from __future__ import annotations

import itertools
import os
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from launching import (
    ERROR,
    PAIR,
    PROMPT_SECONDS,
    Done,
    Train,
    checkpoint_is_complete,
    error_line,
    program,
    run_program,
    run_programs,
    running,
    wait_for_end,
    wait_until,
)
from PIL import Image
from reading import checkpoint, contents, metrics

from dist_graft import cli

ONE = ("--epochs", "1")


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--model.name", "fasterrcnn_resnet50_fpn"], ["not an image classifier"]),
        (["--model.name", "vgg16_bn", "--model.activation", "leaky_relu"], ["model.activation"]),
        (["--data.image_size", "20"], ["data.image_size", "at least 28"]),
        (["--data.val_fraction", "0.999"], ["data.val_fraction"]),
        (["--runtime.precision", "fp16"], ["runtime.precision fp16 needs a GPU", "bf16"]),
        (["--runtime.backend", "nccl"], ["runtime.backend nccl needs a GPU", "gloo"]),
        (["--runtime.device", "cuda:99"], ["runtime.device cuda:99", "use cpu or auto"]),
        (["--runtime.device", "tpu"], ["runtime.device must be auto, cpu, cuda", "'tpu'"]),
        (["--resume", "must"], ["no complete checkpoint to resume from", "--resume must"]),
    ],
)
def test_unavailable_option(
    train: Train, tmp_path: Path, options: list[str], says: list[str]
) -> None:
    done = train(tmp_path / "run", *ONE, *options)
    error_line(done, *says)
    assert not (tmp_path / "run/checkpoints").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_no_gpu(train: Train, tmp_path: Path) -> None:
    done = train(tmp_path / "run", *ONE, "--runtime.device", "cuda")
    error_line(done, "runtime.device cuda", "0 GPUs", "use cpu or auto")


@pytest.mark.parametrize(
    ("name", "folders", "says"),
    [
        ("imagefolder", [], ["train is missing", "train/CLASS/*"]),
        ("imagefolder", ["train/cat", "val/cat"], ["train/cat", "image"]),
        ("fashion-mnist", [], ["FashionMNIST/raw", "dist-graft prepare fashion-mnist"]),
        ("fashion-mnist", ["FashionMNIST/raw"], ["FashionMNIST/raw", "dist-graft prepare"]),
        ("cifar10", [], ["cifar-10-batches-py", "dist-graft prepare cifar10"]),
    ],
)
def test_missing_or_empty_data_folder(
    train: Train, tmp_path: Path, name: str, folders: list[str], says: list[str]
) -> None:
    root = tmp_path / "images"
    for folder in folders:
        (root / folder).mkdir(parents=True)
    options = ("--data.name", name, "--data.root", str(root), "--data.download", "false")
    done = train(tmp_path / "run", *ONE, *options)
    error_line(done, str(root), *says, log=tmp_path / "run/network00/log.txt")


def test_broken_images_are_reported_or_skipped(train: Train, tmp_path: Path) -> None:
    root, run = tmp_path / "images", tmp_path / "run"
    random = np.random.default_rng(0)
    for split, name in itertools.product(("train", "val"), ("cat", "dog")):
        (root / split / name).mkdir(parents=True)
        for number in range(5):
            pixels = random.integers(0, 256, (40, 40, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / split / name / f"{number}.png")
    broken = root / "val/dog/3.png"
    broken.write_bytes(broken.read_bytes()[:500])
    options = (
        *("--data.name", "imagefolder", "--data.root", str(root), "--data.workers", "1"),
        *("--data.image_size", "32", "--data.batch_size", "4", "--epochs", "2"),
    )
    error_line(
        train(run, *options), str(broken), "--data.skip_broken true", log=run / "network00/log.txt"
    )

    done = train(run, *options, "--data.skip_broken", "true")
    assert done.status == 0, done
    log = (run / "network00/log.txt").read_text().splitlines()
    warnings = [line for line in log if " WARNING " in line]
    assert len(warnings) == 2
    for epoch, line in enumerate(warnings):
        assert f"epoch {epoch}: broken images skipped so far: 1, the first is {broken} (" in line
    hits = [line["test_accuracy"] * 9 / 100 for line in metrics(run, 0)]
    assert hits == pytest.approx([round(hit) for hit in hits])


def test_non_finite_weight(train: Train, tmp_path: Path) -> None:
    done = train(tmp_path / "run", *ONE, "--optim.lr", "1e30")
    line = error_line(done, "epoch 0", "network 0", log=tmp_path / "run/network00/log.txt")
    assert ".weight" in line
    assert "learning rate" in line
    assert not (tmp_path / "run/checkpoints").exists()


class TestRunDirectory:
    def test_file_in_place_of_the_run_directory(self, train: Train, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("here")
        for place in ("file", "file/far/below"):
            done = train(tmp_path / place, *ONE)
            error_line(done, f"{place}/lease.json cannot be written", "run_dir")
        assert (tmp_path / "file").read_text() == "here"

    def test_folder_is_not_writable(self, train: Train) -> None:
        error_line(
            train(Path("/proc/run"), *ONE), "/proc/run/lease.json cannot be written", "run_dir"
        )

    @pytest.mark.parametrize("part", ["network00", "population", "checkpoints"])
    def test_file_in_place_of_a_folder(self, train: Train, tmp_path: Path, part: str) -> None:
        path = tmp_path / "run" / part
        path.parent.mkdir(parents=True)
        path.write_text("here")
        error_line(train(tmp_path / "run", *ONE), str(path), "cannot be written", "run_dir")
        assert path.read_text() == "here"

    @pytest.fixture
    def finished(self, train: Train, tmp_path: Path) -> Path:
        assert train(tmp_path / "run", *ONE).status == 0
        return tmp_path / "run"

    def test_different_options(self, train: Train, finished: Path) -> None:
        """Others: tests/unit/test_run_directory.py."""
        before = contents(finished)
        done = train(finished, *ONE, "--seed", "1", "--data.train_samples", "65")
        says = ("seed was 0 and is now 1", "data.train_samples was 64 and is now 65", "run_dir")
        error_line(done, str(finished), *says)
        assert contents(finished) == before

    def test_different_number_of_networks(self, train: Train, pair: Path, tmp_path: Path) -> None:
        shutil.copytree(pair, tmp_path / "run")
        before = contents(tmp_path / "run")
        done = train(tmp_path / "run", *PAIR)
        error_line(done, "run of 2 networks", "1 processes", "start 2, name the networks")
        assert contents(tmp_path / "run") == before

    def test_no_complete_checkpoint(self, train: Train, finished: Path) -> None:
        (finished / "checkpoints/epoch_0001/network00.pt").write_bytes(b"damaged")
        before = contents(finished, without=("log.txt", "status.json"))
        error_line(
            train(finished, *ONE), "epoch_0001/network00.pt is missing or damaged", "run_dir"
        )
        assert contents(finished, without=("log.txt", "status.json")) == before

    def test_an_option_that_is_not_valid(self, train: Train, finished: Path) -> None:
        before = contents(finished)
        error_line(train(finished, *ONE, "--optim.lr", "-1"), "optim.lr")
        assert contents(finished) == before


class TestFullDisk:
    """A limit on file sizes imitates a full disk."""

    def limited(self, run: Path, kilobytes: int, *options: str) -> Done:
        limit = ["bash", "-c", f'ulimit -f {kilobytes}; exec "$@"', "limited"]
        return run_program([*limit, *program(run, *options)], timeout=60)

    def test_checkpoint_does_not_fit(self, train: Train, tmp_path: Path) -> None:
        """Earlier checkpoints remain, and the run resumes when there is space again."""
        run, schedule = tmp_path / "run", ("--optim.schedule", "constant")
        assert train(run, "--epochs", "1", *schedule).status == 0
        before = contents(run / "checkpoints")
        done = self.limited(run, 1000, "--epochs", "2", *schedule)
        log = run / "network00/log.txt"
        error_line(done, "epoch_0002/network00.pt cannot be written", "free space", log=log)
        complete = {name: value for name, value in contents(run / "checkpoints").items()
                 if name.startswith("epoch_0001")}  # fmt: skip
        assert complete == before
        assert train(run, "--epochs", "2", *schedule).status == 0
        assert checkpoint(run, 2, 0)["epoch"] == 2
        assert [line["epoch"] for line in metrics(run, 0)] == [0, 1]

    def test_events_do_not_fit(self, tmp_path: Path) -> None:
        done = self.limited(tmp_path / "run", 2, *ONE)
        error_line(done, "cannot be written", "free space", log=tmp_path / "run/network00/log.txt")


def test_run_is_stopped_by_a_signal_and_resumed(train: Train, tmp_path: Path) -> None:
    run, options = tmp_path / "run", ("--epochs", "300", "--optim.schedule", "constant")
    with running([program(run, *options)]) as (process,):
        wait_until(checkpoint_is_complete(run, 1), "the first checkpoint", meanwhile=[process])
        process.send_signal(signal.SIGTERM)
        done = wait_for_end(process, PROMPT_SECONDS)
    assert done.status == 75
    (line,) = done.errors.splitlines()
    assert line.startswith("dist-graft: stopped early by SIGTERM; everything is saved in ")
    assert line.endswith("rerun the command to resume")
    assert line.removeprefix("dist-graft: ") in (run / "network00/log.txt").read_text()
    (newest,) = sorted(run.glob("checkpoints/*/COMPLETE.json"))[-1:]
    epochs = int(newest.parent.name.split("_")[1]) + 1
    (run / "config.yaml").write_text(
        (run / "config.yaml").read_text().replace("epochs: 300", f"epochs: {epochs}")
    )
    done = train(run, "--epochs", str(epochs), "--optim.schedule", "constant")
    assert done.status == 0, done
    assert [line["epoch"] for line in metrics(run, 0)] == list(range(epochs))


def test_invalid_option_is_refused_before_torch_is_imported(tmp_path: Path) -> None:
    """Each process of several names its network."""
    ends = run_programs(
        [program(tmp_path / "run", "--optim.lrs", "[0.1, 0.2, 0.3]")] * 2, timeout=PROMPT_SECONDS
    )
    for network, done in enumerate(ends):
        assert done.status == 2
        assert done.errors.count(ERROR) == len(done.errors.splitlines()) == 1
        line = error_line(done, "optim.lrs has 3 learning rates for 2 networks")
        assert line.startswith(f"network {network} (rank {network} on {os.uname().nodename})")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--optim.lr", "1e308"], ["optim.lr must be below 3.4e+38"]),
        (["--data.batch_size", str(2**63)], ["data.batch_size must be at most 2147483647"]),
        (["--data.batch_size", "1" + "0" * 400], ["data.batch_size must be at most 2147483647"]),
        (["--runtime.timeout_seconds", "1e12"], ["runtime.timeout_seconds must be at most 1e+08"]),
        (["--checkpoint.grace_seconds", "1e9"], ["checkpoint.grace_seconds must be at most"]),
        (["--runtime.threads", "1000"], ["runtime.threads 1000 exceeds the limit for"]),
        (
            ["--data.name", "errors_of_users:no_memory"],
            ["data.name errors_of_users:no_memory failed"],
        ),
        (["--model.name", "errors_of_users:no_model"], ["no_model failed: ZeroDivisionError"]),
        (["--graft.rule", "errors_of_users:no_rule"], ["no_rule failed: ZeroDivisionError"]),
    ],
)
def test_impossible_numbers_and_failing_functions(
    options: list[str],
    says: list[str],
    train: Train,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.syspath_prepend(Path(__file__).parent)
    done = train(tmp_path / "run", *ONE, *options)
    (line,) = [line for line in done.errors.splitlines() if line.startswith(ERROR)]
    assert done.status in (1, 2)
    for part in says:
        assert part in line
    if "failed" in says[0]:
        assert "errors_of_users.py" in done.errors  # the traceback of the user's function


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (MemoryError("Unable to allocate 9 TiB"), "out of memory (Unable to allocate 9 TiB)"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate"), "out of memory"),
        (RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed."), "data.workers"),
        (RuntimeError("can't start new thread"), "ulimit -u"),
    ],
)
def test_errors_of_the_system_say_what_to_do(
    error: Exception, says: str, train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("dist_graft.training.trainer.train_step", fail)
    error_line(train(tmp_path / "run", *ONE), says)


def test_names_that_are_not_utf_8(train: Train, tmp_path: Path) -> None:
    run = Path(os.fsdecode(os.fsencode(tmp_path) + b"/run\xff"))
    done = train(run, *ONE)
    assert done.status == 0, done.errors
    assert train(run, *ONE).status == 0
    error_line(train(run, *ONE, "--seed", "3"), "seed was 0 and is now 3")
    assert cli.run(["status", str(run)]) == 0
    assert cli.run(["evaluate", str(run), "--batch_norm_batches", "1"]) == 0
