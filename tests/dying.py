"""Callback that ends its process at a step: END_AT is STEP:kill, or STEP:stop for a signal."""

from __future__ import annotations

import os
import signal

from dist_graft import Callback, Trainer


class EndAtStep(Callback):
    def on_step_end(self, trainer: Trainer) -> None:
        step, _, way = os.environ.get("END_AT", "").partition(":")
        if step == str(trainer.global_step):
            os.kill(os.getpid(), signal.SIGKILL if way == "kill" else signal.SIGUSR1)
