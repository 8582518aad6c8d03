"""Runs in which one network fails: real processes and real faults."""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path

import pytest
import torch
from launching import (
    PROMPT_SECONDS,
    end_population,
    error_line,
    faulty,
    program,
    run_population,
    run_program,
)
from reading import (
    assert_same_bits,
    checkpoint,
    event_rows,
    events,
    metrics,
    scalars,
    summary,
    texts,
)

EPOCHS = 4
STEPS = 8
OPTIONS = (
    *("--epochs", str(EPOCHS), "--data.train_samples", str(16 * STEPS)),
    *("--data.batch_size", "16", "--model.name", "resnet8"),
)


def checkpoints(run: Path) -> list[str]:
    return sorted(path.parent.name for path in run.glob("checkpoints/*/COMPLETE.json"))


def finite(run: Path, network: int) -> bool:
    model = checkpoint(run, EPOCHS, network)["model"]
    return all(bool(tensor.isfinite().all()) for tensor in model.values())


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("straight") / "run"
    run_population(3, run, *OPTIONS)
    return run


def assert_ends_as(straight: Path, run: Path, networks: int = 3) -> None:
    for network in range(networks):
        before, after = (checkpoint(path, EPOCHS, network) for path in (straight, run))
        assert_same_bits(before["model"], after["model"])
        assert before["scheduler"] == after["scheduler"]
        for one, other in zip(metrics(straight, network), metrics(run, network), strict=True):
            assert one["test_loss"] == other["test_loss"]


@pytest.mark.slow
class TestADivergedNetwork:
    def test_is_healed(self, tmp_path: Path) -> None:
        run = tmp_path / "run"
        run_population(3, run, *OPTIONS, faults=f"nan 1 {STEPS + 2}")
        assert all(finite(run, network) for network in range(3))
        (event,) = events(run)
        assert (event["kind"], event["network"], event["epoch"]) == ("healed", 1, 1)
        assert "copied the weights of network 0" in event["text"]
        assert summary(run)["diverged"] == []
        for network in range(3):
            assert event["text"] in (run / f"network{network:02d}/log.txt").read_text()
        healed = [[line["graft"]["healed_from"] for line in metrics(run, k)] for k in (1, 2)]
        assert healed == [[None, 0, None, None], [None] * EPOCHS]
        assert metrics(run, 1)[1]["train_loss"] is None
        assert set(metrics(run, 1)[1]["graft"]["coefficient"].values()) == {0.0}
        assert set(metrics(run, 2)[1]["graft"]["coefficient"].values()) == {1.0}
        tables = texts(run / "population")["run/events"]
        assert f"| 1 | healed | {event['text']} |" in tables[1]
        assert len(event_rows(run)) == 1

    def test_is_excluded_if_configured(self, tmp_path: Path) -> None:
        run = tmp_path / "run"
        options = (*OPTIONS, "--on_divergence", "exclude", "--graft.every_steps", "4")
        run_population(3, run, *options, faults="nan 1 2")
        assert [finite(run, network) for network in range(3)] == [True, False, True]
        assert summary(run)["diverged"] == [1]
        assert [event["kind"] for event in events(run)] == ["diverged"]
        assert math.isfinite(summary(run)["ensemble_accuracy_after_last_round"])

    def test_aborts_the_run_if_configured(self, tmp_path: Path) -> None:
        run = tmp_path / "run"
        options = (*OPTIONS, "--on_divergence", "abort")
        done, *_ = end_population(3, run, *options, faults=f"nan 1 {STEPS + 2}")
        error_line(done, "epoch 1", "network 1 has a weight that is not finite in conv1.weight")
        assert checkpoints(run) == ["epoch_0001"]

    def test_the_run_ends_and_keeps_its_checkpoint_if_all_diverge(self, tmp_path: Path) -> None:
        run = tmp_path / "run"
        faults = f"nan 0 {STEPS + 2} nan 1 {STEPS + 2}"
        done, _ = end_population(2, run, *OPTIONS, faults=faults)
        error_line(done, "network 0 has a weight", "network 1 has a weight")
        assert checkpoints(run) == ["epoch_0001"]

    def test_ends_a_run_of_independent_networks(self, tmp_path: Path) -> None:
        run = tmp_path / "run"
        _, done = end_population(2, run, *OPTIONS, "--method", "none", faults="nan 1 2")
        error_line(done, "epoch 0: network 1 has a weight that is not finite in")

    def test_is_healed_by_wash(self, tmp_path: Path) -> None:
        """Other rules: test_rules_between_processes.py. WASH has a round in every step."""
        run = tmp_path / "run"
        run_population(3, run, *OPTIONS, "--method", "wash", faults="nan 2 3")
        assert all(finite(run, network) for network in range(3))
        assert [event["network"] for event in events(run)] == [2]


@pytest.mark.slow
def test_the_launcher_restarts_a_run_with_a_dead_network(tmp_path: Path) -> None:
    straight, run = tmp_path / "straight", tmp_path / "run"
    run_population(2, straight, *OPTIONS)
    faults = f"kill 0 {STEPS + 3} raise 1 {STEPS + 1}"
    done = run_program(faulty(2, run, faults, *OPTIONS, restarts=3), timeout=250)
    assert done.status == 0, done
    assert_ends_as(straight, run, networks=2)
    kinds = [event["kind"] for event in events(run)]
    assert set(kinds) == {"resumed"}
    assert 1 <= len(kinds) <= 2


@pytest.mark.slow
def test_a_slow_network_is_waited_for_and_named(tmp_path: Path) -> None:
    """In the first epoch it is late by more than the initial timeout: 40 steps of 0.3 s."""
    run = tmp_path / "run"
    options = ("--epochs", "2", "--data.train_samples", "640")
    options += ("--runtime.timeout_seconds", "10", "--runtime.timeout_epochs", "50")
    run_population(2, run, *OPTIONS, *options, faults="slow 1 0")
    found = summary(run)["events"]
    assert {(event["kind"], event["network"]) for event in found} == {("slow", 1)}
    assert "network 1 is slow: its epoch took" in (run / "network00/log.txt").read_text()


@pytest.mark.slow
class TestADiskError:
    def test_training_continues_and_later_checkpoints_are_complete(
        self, straight: Path, tmp_path: Path
    ) -> None:
        run = tmp_path / "run"
        faults = f"full 1 {STEPS + 2} space 1 {3 * STEPS + 2}"
        done, *_ = run_population(3, run, *OPTIONS, "--checkpoint.keep", "9", faults=faults)
        assert checkpoints(run) == ["epoch_0001", "epoch_0004"]
        assert_ends_as(straight, run)
        assert "epoch_0002 is not complete" in done.output
        assert "File too large" in done.output

    def test_a_deleted_run_directory_is_recreated(self, straight: Path, tmp_path: Path) -> None:
        run = tmp_path / "run"
        done, *_ = run_population(3, run, *OPTIONS, faults=f"vanish 1 {STEPS + 2}")
        for network in range(3):
            states = [checkpoint(path, EPOCHS, network)["model"] for path in (straight, run)]
            assert_same_bits(*states)
            assert [line["epoch"] for line in metrics(run, network)] == [1, 2, 3]
            assert list(scalars(run / f"network{network:02d}")["loss/test"]) == [1, 2, 3]
            assert "it is recreated" in (run / f"network{network:02d}/log.txt").read_text()
        assert f"{run} was deleted: it is recreated without its previous contents" in done.output
        assert (run / "config.yaml").read_text() == (
            (tmp_path / "vanished/config.yaml").read_text()
        )
        assert len(metrics(tmp_path / "vanished", 2)) == 1

    def test_repeated_failures_end_the_run(self, tmp_path: Path) -> None:
        run = tmp_path / "run"
        options = ("--checkpoint.max_failures", "1", "--checkpoint.keep", "9")
        _, done = end_population(2, run, *OPTIONS, *options, faults=f"full 1 {STEPS + 2}")
        error_line(done, "2 checkpoints in a row", "File too large", "network01.pt")
        assert checkpoints(run) == ["epoch_0001"]

    def test_a_failed_last_checkpoint_is_written_when_the_run_is_rerun(
        self, straight: Path, tmp_path: Path
    ) -> None:
        run = tmp_path / "run"
        *_, done = end_population(3, run, *OPTIONS, faults=f"full 2 {3 * STEPS + 2}")
        error_line(done, "the last checkpoint is not complete", "network02.pt")
        run_population(3, run, *OPTIONS)
        assert_ends_as(straight, run)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["graft", "papa", "none"])
def test_checkpoints_within_an_epoch_resume_exactly(method: str, tmp_path: Path) -> None:
    """Checkpoints by the clock; one network is killed as soon as one of them is complete.

    They are saved where all networks have finished the same steps.
    """
    run, straight = tmp_path / "run", tmp_path / "straight"
    interval = "papa" if method == "papa" else "graft"
    options = ("--method", method, f"--{interval}.every_steps", "5", "--checkpoint.every", "0")
    options += ("--model.name", "resnet20")  # epochs long enough for a checkpoint inside
    run_population(3, straight, *OPTIONS, *options)
    timed = (*options, "--checkpoint.every_minutes", "0.003", "--checkpoint.keep", "99")
    lost = end_population(3, run, *OPTIONS, *timed, faults=f"lose 1 {STEPS + 3}")
    assert all(done.status for done in lost)
    run_population(3, run, *OPTIONS, *timed)
    assert (tmp_path / "run.lose0").exists(), "no checkpoint was complete before the last step"
    inside = [name for name in checkpoints(run) if "round" in name]
    assert inside
    for name in checkpoints(run):
        complete = json.loads((run / "checkpoints" / name / "COMPLETE.json").read_text())
        first, *others = complete["positions"]
        assert others == [first] * 2, name
        assert ("round" in name) == (first["step"] > 0)
    (event,) = events(run)
    assert event["text"].startswith(f"resumed from {run}/checkpoints/epoch_")
    assert_ends_as(straight, run)


def test_a_file_of_another_network_is_an_error(tmp_path: Path) -> None:
    """A network's identity comes from its file, not from the process that reads it."""
    run = tmp_path / "run"
    one = ("--epochs", "1")
    assert run_program(program(run, *one), timeout=60).status == 0
    path = run / "checkpoints/epoch_0001/network00.pt"
    state = torch.load(path, weights_only=True)
    torch.save(state | {"network": 1}, path)
    complete = path.with_name("COMPLETE.json")
    content = json.loads(complete.read_text())
    content["sha256"][path.name] = hashlib.sha256(path.read_bytes()).hexdigest()
    complete.write_text(json.dumps(content))
    done = run_program(program(run, *one), timeout=PROMPT_SECONDS * 3)
    error_line(done, "holds network 1, not network 0")
