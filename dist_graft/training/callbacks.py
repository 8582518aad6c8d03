"""Calls the callbacks of a run."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from dist_graft.config.train import callback_with_arguments
from dist_graft.config.validation import own
from dist_graft.errors import CallbackError, ConfigError, DistGraftError, StoppedError
from dist_graft.monitoring.callback import Callback

if TYPE_CHECKING:
    from dist_graft.training.trainer import Trainer

_FATAL_HOOKS = ("setup", "on_fit_start")
"""Hooks in which a DistGraftError of a built-in callback ends the run: nothing is lost yet."""
_FINAL_HOOKS = ("on_exception", "teardown")
"""Hooks that run after an error, which their own failure must not replace."""


class CallbackList:
    """Calls the hooks of the built-in callbacks, then those of the user's callbacks, in order.

    Args:
        built_in: callbacks whose failures are warnings.
        user: callbacks whose failures end the run.
    """

    def __init__(self, built_in: Sequence[Callback], user: Sequence[Callback]) -> None:
        self._built_in = list(built_in)
        self._user = list(user)

    def call(self, hook: str, trainer: Trainer, *arguments: object) -> None:
        """Call one hook of all callbacks.

        Args:
            hook: name of a method of `Callback`.
            trainer: first argument of the hook.
            arguments: further arguments of the hook.

        Raises: CallbackError when a user's callback fails.
        """
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


def load_callbacks(entries: Sequence[str | dict[str, dict[str, Any]]]) -> list[Callback]:
    """Create the callbacks that `--callbacks` names, with their arguments.

    Raises: ConfigError when a name is neither a subclass of Callback nor a function that returns
        an instance of one; CallbackError when creating one fails.
    """
    callbacks = []
    for entry in entries:
        reference, kwargs = callback_with_arguments(entry)
        factory = own("callbacks", reference)
        if inspect.isclass(factory) and not issubclass(factory, Callback):
            raise ConfigError(f"callbacks {reference!r} must be a subclass of dist_graft.Callback")
        try:
            callback = factory(**kwargs)
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
