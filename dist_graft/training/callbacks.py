"""Calls the callbacks of a run."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dist_graft.config.validation import own
from dist_graft.errors import CallbackError, ConfigError, DistGraftError, StoppedError
from dist_graft.monitoring.callback import Callback
from dist_graft.monitoring.metrics import EpochReport
from dist_graft.population.round.record import GraftRecord

if TYPE_CHECKING:
    from dist_graft.training.trainer import Trainer

_FATAL_HOOKS = ("setup", "on_fit_start")
"""Hooks in which a user error found by a built-in callback ends the run: nothing is lost yet."""
_FINAL_HOOKS = ("on_exception", "teardown")
"""Hooks whose failures never hide how the run ended."""


class CallbackList:
    """Calls each hook of the built-in callbacks, then of the user's, in order.

    Args:
        built_in: callbacks whose failures are warnings.
        user: callbacks whose failures end the run.
    """

    def __init__(self, built_in: Sequence[Callback], user: Sequence[Callback]) -> None:
        self._built_in = list(built_in)
        self._user = list(user)

    def setup(self, trainer: Trainer) -> None:
        self._call("setup", trainer)

    def on_fit_start(self, trainer: Trainer) -> None:
        self._call("on_fit_start", trainer)

    def on_epoch_start(self, trainer: Trainer) -> None:
        self._call("on_epoch_start", trainer)

    def on_step_end(self, trainer: Trainer) -> None:
        self._call("on_step_end", trainer)

    def on_evaluate_start(self, trainer: Trainer) -> None:
        self._call("on_evaluate_start", trainer)

    def on_evaluate_end(self, trainer: Trainer, metrics: Mapping[str, float]) -> None:
        self._call("on_evaluate_end", trainer, metrics)

    def on_round_start(self, trainer: Trainer) -> None:
        self._call("on_round_start", trainer)

    def on_round_end(self, trainer: Trainer, record: GraftRecord) -> None:
        self._call("on_round_end", trainer, record)

    def on_epoch_end(self, trainer: Trainer, report: EpochReport) -> None:
        self._call("on_epoch_end", trainer, report)

    def on_checkpoint(self, trainer: Trainer, path: Path) -> None:
        self._call("on_checkpoint", trainer, path)

    def on_exception(self, trainer: Trainer, error: BaseException) -> None:
        self._call("on_exception", trainer, error)

    def on_fit_end(self, trainer: Trainer) -> None:
        self._call("on_fit_end", trainer)

    def teardown(self, trainer: Trainer) -> None:
        self._call("teardown", trainer)

    def _call(self, hook: str, trainer: Trainer, *arguments: Any) -> None:
        for callback in self._built_in:
            try:
                getattr(callback, hook)(trainer, *arguments)
            except Exception as error:
                if isinstance(error, StoppedError) or (
                    isinstance(error, DistGraftError) and hook in _FATAL_HOOKS
                ):
                    raise
                trainer.log.warning(
                    "%s.%s failed: %s: %s", _name(callback), hook, type(error).__name__, error
                )
        for callback in self._user:
            try:
                getattr(callback, hook)(trainer, *arguments)
            except Exception as error:
                text = (
                    f"callback {_name(callback)} failed in {hook}: {type(error).__name__}: {error}"
                )
                if hook in _FINAL_HOOKS:
                    trainer.log.warning("%s", text)
                elif isinstance(error, DistGraftError):
                    raise
                else:
                    raise CallbackError(text) from error


def _name(callback: Callback) -> str:
    return type(callback).__name__


def load_callbacks(references: Sequence[str]) -> list[Callback]:
    """Create the callbacks that `--callbacks package.module:Name` names, without arguments.

    Raises: ConfigError when a name does not lead to a subclass of Callback, or a function that
        returns an instance of one.
    """
    callbacks = []
    for reference in references:
        factory = own("callbacks", reference)
        if inspect.isclass(factory) and not issubclass(factory, Callback):
            raise ConfigError(f"callbacks {reference!r} must be a subclass of dist_graft.Callback")
        try:
            callback = factory()
        except Exception as error:
            raise CallbackError(
                f"callbacks {reference!r} cannot be created: {type(error).__name__}: {error}"
            ) from error
        if not isinstance(callback, Callback):
            raise ConfigError(
                f"callbacks {reference!r} must return a dist_graft.Callback, got {callback!r}"
            )
        callbacks.append(callback)
    return callbacks
