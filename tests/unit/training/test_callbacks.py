"""When the hooks of callbacks are called, with what, and what happens when one fails."""

from __future__ import annotations

import itertools
import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from launching import SMALL, run_population
from runs import (
    EPOCHS,
    HOOKS,
    REGRESSION,
    STEPS,
    Failing,
    Recorder,
    StopAfter,
    config_of,
)

from dist_graft import Callback, EpochReport, Trainer, cli
from dist_graft.errors import (
    CallbackError,
    ConfigError,
    NonFiniteError,
    RunDirectoryError,
    StoppedEarlyError,
)
from dist_graft.monitoring.console import EpochLog
from dist_graft.monitoring.jsonl import MetricsJsonl
from dist_graft.monitoring.run_events import RunEvents
from dist_graft.training.callbacks import CallbackList, load_callbacks

TESTS = Path(__file__).parents[2]


def epoch_hooks(epoch: int, first: int = 0) -> list[tuple[str, int, int]]:
    """Hooks of an epoch after its first steps; a round follows every third step of the run."""
    hooks = [("on_epoch_start", epoch, first)]
    for step in range(first + 1, STEPS + 1):
        hooks.append(("on_step_end", epoch, step))
        if step == STEPS:
            hooks += [(name, epoch, STEPS) for name in ("on_evaluate_start", "on_evaluate_end")]
        if step == STEPS or (epoch * STEPS + step) % 3 == 0:
            hooks.append(("on_round_start", epoch, step))
    return [*hooks, ("on_epoch_end", epoch, STEPS)]


class TestOrder:
    def test_a_whole_run(self, tmp_path: Path) -> None:
        recorder = Recorder()
        trainer = REGRESSION.trainer(config_of(tmp_path), recorder)
        trainer.fit()
        assert recorder.hooks() == [
            ("setup", 0, 0),
            ("on_fit_start", 0, 0),
            *itertools.chain(*map(epoch_hooks, range(EPOCHS))),
            ("on_fit_end", EPOCHS, 0),
            ("teardown", EPOCHS, 0),
        ]
        reports = recorder.arguments("on_epoch_end")
        assert [report.metrics.epoch for (report,) in reports] == list(range(EPOCHS))
        assert all(isinstance(report, EpochReport) for (report,) in reports)
        evaluated = recorder.arguments("on_evaluate_end")
        for (report,), (values,) in zip(reports, evaluated, strict=True):
            assert values == {f"test_{name}": v for name, v in report.metrics.test.items()}
        assert set(evaluated[0][0]) == {"test_loss", "test_error"}
        checkpoints = [path for (path,) in recorder.arguments("on_checkpoint")]
        assert checkpoints == [
            tmp_path / f"checkpoints/epoch_{epoch:04d}" for epoch in range(1, EPOCHS + 1)
        ]
        plain = set(HOOKS) - {"on_epoch_end", "on_evaluate_end", "on_checkpoint"}
        assert all(arguments == () for hook in plain for arguments in recorder.arguments(hook))
        assert trainer.global_step == EPOCHS * STEPS

    @pytest.mark.parametrize(("step", "epoch", "first"), [(6, 1, 2), (9, 2, 1)])
    def test_a_stopped_and_resumed_run(
        self, tmp_path: Path, step: int, epoch: int, first: int
    ) -> None:
        """A round that is due where the run stopped is the first thing after resuming."""
        stopped, resumed = Recorder(), Recorder()
        with pytest.raises(StoppedEarlyError) as caught:
            REGRESSION.trainer(config_of(tmp_path), StopAfter(step), stopped).fit()
        before = list(itertools.chain(*map(epoch_hooks, range(epoch))))
        of_epoch = epoch_hooks(epoch)
        done = of_epoch.index(("on_step_end", epoch, first)) + 1
        assert stopped.hooks() == [
            ("setup", 0, 0),
            ("on_fit_start", 0, 0),
            *before,
            *of_epoch[:done],
            ("on_round_start", epoch, first),
            ("on_exception", epoch, first),
            ("teardown", epoch, first),
        ]
        assert stopped.arguments("on_exception") == [(caught.value,)]
        REGRESSION.trainer(config_of(tmp_path), resumed).fit()
        assert resumed.hooks() == [
            ("setup", 0, 0),
            ("on_fit_start", epoch, first),
            ("on_epoch_start", epoch, first),
            *of_epoch[done:],
            *itertools.chain(*map(epoch_hooks, range(epoch + 1, EPOCHS))),
            ("on_fit_end", EPOCHS, 0),
            ("teardown", EPOCHS, 0),
        ]

    def test_a_failed_run(self, tmp_path: Path) -> None:
        class Diverge(Callback):
            def on_step_end(self, trainer: Trainer) -> None:
                if trainer.global_step == 5:
                    with torch.no_grad():
                        next(trainer.model.parameters()).fill_(torch.nan)

        recorder = Recorder()
        with pytest.raises(NonFiniteError) as caught:
            REGRESSION.trainer(config_of(tmp_path), Diverge(), recorder).fit()
        assert recorder.hooks()[-3:] == [
            ("on_epoch_end", 1, STEPS),
            ("on_exception", 1, STEPS),
            ("teardown", 1, STEPS),
        ]
        assert recorder.arguments("on_exception") == [(caught.value,)]

    def test_built_in_callbacks_come_before_those_of_the_user(self, tmp_path: Path) -> None:
        class Reader(Callback):
            """Reads files of built-in callbacks."""

            lines = 0

            def on_epoch_end(self, trainer: Trainer, report: EpochReport) -> None:
                self.lines = len(trainer.directory.metrics(0).read_text().splitlines())
                assert self.lines == report.metrics.epoch + 1

        reader = Reader()
        REGRESSION.trainer(config_of(tmp_path), reader).fit()
        assert reader.lines == EPOCHS


BEFORE_THE_END = [hook for hook in HOOKS if hook not in ("on_exception", "teardown")]


def raising(error: Exception) -> Callable[..., None]:
    def fail(*_: object) -> None:
        raise error

    return fail


class TestFailures:
    @pytest.mark.parametrize("hook", [h for h in BEFORE_THE_END if h != "on_round_end"])
    def test_a_user_callback_ends_the_run(self, tmp_path: Path, hook: str) -> None:
        recorder = Recorder()
        failing = Failing(KeyError("lost"), hook)
        with pytest.raises(CallbackError) as caught:
            REGRESSION.trainer(config_of(tmp_path), failing, recorder).fit()
        assert str(caught.value) == f"callback Failing failed in {hook}: KeyError: 'lost'"
        assert isinstance(caught.value.__cause__, KeyError)
        assert recorder.arguments("on_exception") == [(caught.value,)]
        assert recorder.calls[-1][0] == "teardown"

    def test_a_run_resumes_after_a_callback_failed(self, tmp_path: Path) -> None:
        with pytest.raises(CallbackError):
            REGRESSION.trainer(config_of(tmp_path), Failing(KeyError(), "on_fit_end")).fit()
        trainer = REGRESSION.trainer(config_of(tmp_path))
        trainer.fit()
        assert trainer.epoch == EPOCHS

    def test_an_error_of_dist_graft_is_raised_unchanged(self, tmp_path: Path) -> None:
        error = NonFiniteError("by the user's own check")
        with pytest.raises(NonFiniteError) as caught:
            REGRESSION.trainer(config_of(tmp_path), Failing(error, "on_step_end")).fit()
        assert caught.value is error

    @pytest.mark.parametrize("hook", ["on_exception", "teardown"])
    @pytest.mark.parametrize("error", [ValueError("second"), RunDirectoryError("second")])
    def test_the_first_error_is_never_hidden(
        self, tmp_path: Path, hook: str, error: Exception
    ) -> None:
        first, recorder = Failing(ValueError("first"), "on_step_end"), Recorder()
        with pytest.raises(CallbackError, match="on_step_end: ValueError: first"):
            REGRESSION.trainer(config_of(tmp_path), first, Failing(error, hook), recorder).fit()
        assert recorder.hooks()[-2:] == [("on_exception", 0, 1), ("teardown", 0, 1)]
        log = (tmp_path / "network00/log.txt").read_text()
        assert f"callback Failing failed in {hook}: {type(error).__name__}: second" in log

    def test_the_signal_of_a_launcher_does_not_replace_an_error_before_training(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A launcher stops all processes when the first one has ended."""
        call = CallbackList.call

        def call_after_a_signal(callbacks: CallbackList, hook: str, *arguments: Any) -> None:
            if hook == "on_exception":
                os.kill(os.getpid(), signal.SIGTERM)
            call(callbacks, hook, *arguments)

        monkeypatch.setattr(CallbackList, "call", call_after_a_signal)
        with pytest.raises(CallbackError, match="setup: ValueError: first"):
            REGRESSION.trainer(config_of(tmp_path), Failing(ValueError("first"), "setup")).fit()
        status = json.loads((tmp_path / "network00/status.json").read_text())
        assert status["phase"] == "failed"
        assert "ValueError: first" in status["reason"]

    def test_a_failing_teardown_does_not_fail_the_run(self, tmp_path: Path) -> None:
        REGRESSION.trainer(config_of(tmp_path), Failing(ValueError("late"), "teardown")).fit()
        assert (tmp_path / "summary.json").exists()

    @pytest.mark.parametrize(
        ("kind", "hook"),
        [
            (EpochLog, "on_epoch_end"),
            (RunEvents, "on_step_end"),
            (RunEvents, "on_checkpoint"),
            (MetricsJsonl, "on_epoch_end"),
            (EpochLog, "on_fit_end"),
        ],
    )
    @pytest.mark.parametrize("error", [ValueError("lost"), RunDirectoryError("lost")])
    def test_a_built_in_callback_is_a_warning(
        self,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        kind: type[Callback],
        hook: str,
        error: Exception,
    ) -> None:
        monkeypatch.setattr(kind, hook, raising(error))
        trainer = REGRESSION.trainer(config_of(tmp_path))
        trainer.fit()
        assert trainer.epoch == EPOCHS
        log = (tmp_path / "network00/log.txt").read_text()
        name = type(error).__name__
        assert f"{kind.__name__}.{hook} failed: {name}: lost" in log

    @pytest.mark.parametrize("hook", ["setup", "on_fit_start"])
    def test_a_user_error_found_before_training_ends_the_run(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hook: str
    ) -> None:
        error = ConfigError("monitor: wrong")
        monkeypatch.setattr(EpochLog, hook, raising(error))
        with pytest.raises(ConfigError) as caught:
            REGRESSION.trainer(config_of(tmp_path)).fit()
        assert caught.value is error

    @pytest.mark.parametrize("hook", ["setup", "on_fit_start"])
    def test_another_error_found_before_training_is_a_warning(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hook: str
    ) -> None:
        monkeypatch.setattr(EpochLog, hook, raising(ValueError("lost")))
        REGRESSION.trainer(config_of(tmp_path)).fit()
        log = (tmp_path / "network00/log.txt").read_text()
        assert f"EpochLog.{hook} failed: ValueError: lost" in log

    def test_a_stop_signal_inside_a_built_in_callback_is_raised(self) -> None:
        error = StoppedEarlyError("by a signal")
        callbacks = CallbackList([Failing(error, "on_step_end")], [])
        with pytest.raises(StoppedEarlyError):
            callbacks.call("on_step_end", None)  # type: ignore[arg-type]


class TestReferences:
    """--callbacks package.module:Name."""

    def test_two_on_the_command_line(
        self, tmp_path: Path, capfd: pytest.CaptureFixture[str]
    ) -> None:
        """One class, and one function that returns an instance."""
        Recorder.created.clear()
        status = cli.run(
            [
                *("train", "--run_dir", str(tmp_path), *SMALL, "--epochs", "1"),
                *("--model.name", "tiny_network:TinyNetwork"),
                *("--callbacks", "runs:Recorder", "--callbacks", "runs:make_recorder"),
            ]
        )
        assert status == 0, capfd.readouterr()
        first, second = Recorder.created
        assert first.hooks() == second.hooks()
        assert first.hooks()[-3:] == [
            ("on_epoch_end", 0, 2),
            ("on_fit_end", 1, 0),
            ("teardown", 1, 0),
        ]
        ((values,),) = first.arguments("on_evaluate_end")
        line = json.loads((tmp_path / "network00/metrics.jsonl").read_text())
        assert values["test_accuracy"] == line["test_accuracy"]

    def test_references_precede_callbacks_of_the_trainer(self, tmp_path: Path) -> None:
        Recorder.created.clear()
        failing = Failing(KeyError(), "setup")
        config = config_of(tmp_path, callbacks=["runs:Recorder"])
        with pytest.raises(CallbackError):
            REGRESSION.trainer(config, failing).fit()
        (recorder,) = Recorder.created
        assert [call[0] for call in recorder.calls] == ["setup", "on_exception", "teardown"]

    @pytest.mark.parametrize(
        ("reference", "message"),
        [
            ("runs:Nothing", "callbacks .*Nothing"),
            ("nowhere_at_all:Recorder", "callbacks .*nowhere_at_all"),
            ("runs:Regressor", "'runs:Regressor' must be a subclass of dist_graft.Callback"),
            ("builtins:dict", "must be a subclass"),
            ("time:monotonic", "'time:monotonic' must return a dist_graft.Callback, got "),
        ],
    )
    def test_an_object_that_is_not_a_callback_is_an_error(
        self, reference: str, message: str
    ) -> None:
        with pytest.raises(ConfigError, match=message):
            load_callbacks([reference])

    def test_a_malformed_reference_is_an_error_of_the_configuration(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match="callbacks"):
            config_of(tmp_path, callbacks=["Recorder"])


def test_rounds_between_two_networks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = [str(TESTS), str(TESTS / "unit/training"), os.environ.get("PYTHONPATH", "")]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(paths))
    run_population(
        *(2, tmp_path, "--epochs", "2", "--model.name", "tiny_network:TinyNetwork"),
        *("--callbacks", "runs:RecordToFile"),
    )
    for network in range(2):
        calls = json.loads((tmp_path / f"network{network:02d}/hooks.json").read_text())
        assert [call for call in calls if call[0] != "on_checkpoint"] == [
            ["setup", 0, 0, 0, []],
            ["on_fit_start", 0, 0, 0, []],
            *(
                [hook, epoch, step, rounds, arguments]
                for epoch in range(2)
                for hook, step, rounds, arguments in (
                    ("on_epoch_start", 0, epoch, []),
                    ("on_step_end", 1, epoch, []),
                    ("on_step_end", 2, epoch, []),
                    ("on_evaluate_start", 2, epoch, []),
                    ("on_evaluate_end", 2, epoch, ["dict"]),
                    ("on_round_start", 2, epoch, []),
                    ("on_round_end", 2, epoch + 1, ["GraftRecord"]),
                    ("on_epoch_end", 2, epoch + 1, ["EpochReport"]),
                )
            ),
            ["on_fit_end", 2, 0, 2, []],
            ["teardown", 2, 0, 2, []],
        ]
