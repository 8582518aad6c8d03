"""Training program whose network 1 stops itself (SIGSTOP) in a phase of its run.

    python blocking.py PHASE train --run_dir RUN ...

Before, it creates the file RUN/PHASE.stopped.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

from dist_graft.__main__ import main
from dist_graft.population import grafter
from dist_graft.training import trainer
from dist_graft.training.checkpoint import writer

PLACES: dict[str, tuple[Any, str]] = {
    "step": (trainer, "train_step"),
    "round": (grafter.Grafter, "graft"),
    "evaluate": (trainer, "evaluate"),
    "save": (writer, "save_network"),
}
"""Function in which a process stops, by phase."""


def stop_in(phase: str, run: Path) -> None:
    """Replace the function of a phase by one that stops this process first."""
    owner, name = PLACES[phase]
    function = getattr(owner, name)

    def stop(*arguments: Any, **keywords: Any) -> Any:
        if not (run / f"{phase}.stopped").exists():
            (run / f"{phase}.stopped").touch()
            os.kill(os.getpid(), signal.SIGSTOP)
        return function(*arguments, **keywords)

    setattr(owner, name, stop)


if __name__ == "__main__":
    phase, *arguments = sys.argv[1:]
    if os.environ["RANK"] == "1":
        stop_in(phase, Path(arguments[arguments.index("--run_dir") + 1]))
    sys.argv[1:] = arguments
    sys.exit(main())
