"""An event file of TensorBoard that says what it could not write."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams

from dist_graft.errors import RunDirectoryError
from dist_graft.monitoring.chart_layout import Layout
from dist_graft.monitoring.figures import Pixels


def _told_by_the_main_thread(failure: threading.ExceptHookArgs) -> None:
    """The event writer's thread hands a disk's error on; only what is not one is printed."""
    if not isinstance(failure.exc_value, OSError):
        threading.__excepthook__(failure)


class EventFile:
    """Takes numbers, texts and pictures; they may reach the disk later.

    Every method raises RunDirectoryError when the disk refuses, also what was written before.

    Args:
        folder: that the file is made in.
        start_epoch: what older files of the folder hold from there on is dropped by readers.
    """

    def __init__(self, folder: Path, start_epoch: int) -> None:
        self._folder = folder
        threading.excepthook = _told_by_the_main_thread
        with self._told():
            self._writer = SummaryWriter(str(folder), purge_step=start_epoch)

    def scalar(self, tag: str, value: float, step: int) -> None:
        """Write one number."""
        with self._told():
            self._writer.add_scalar(tag, value, step)

    def text(self, tag: str, text: str, step: int) -> None:
        """Write a text, in Markdown."""
        with self._told():
            self._writer.add_text(tag, text, step)

    def picture(self, tag: str, pixels: Pixels, step: int) -> None:
        """Write a picture."""
        with self._told():
            self._writer.add_image(tag, pixels, step, dataformats="HWC")

    def layout(self, layout: Layout) -> None:
        """Write what the custom scalars' tab shows, of all runs beside this one."""
        with self._told():
            self._writer.add_custom_scalars(layout)

    def begin_session(
        self, options: Mapping[str, float | str], *, first: Sequence[str], results: Sequence[str]
    ) -> None:
        """Write this run's row of the hyperparameters' tab.

        Args:
            options: its columns.
            first: names of those that come first.
            results: tags of the numbers that are its results, written or to be written.
        """
        experiment, start, _ = hparams(dict(options), dict.fromkeys(results, 0.0))
        plugin = experiment.value[0].metadata.plugin_data
        content = HParamsPluginData.FromString(plugin.content)
        for column in content.experiment.hparam_infos:
            column.differs = column.name in first
        plugin.content = content.SerializeToString()
        with self._told():
            for part in (experiment, start):
                self._writer._get_file_writer().add_summary(part)

    def end_session(self) -> None:
        """Write that the run of `begin_session` came to its end."""
        _, _, end = hparams({}, {})
        with self._told():
            self._writer._get_file_writer().add_summary(end)

    def flush(self) -> None:
        """Have all that was written reach the disk."""
        with self._told():
            self._writer.flush()

    def close(self) -> None:
        """Flush and close the file."""
        with self._told():
            self._writer.close()

    @contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise RunDirectoryError(
                f"events in {self._folder} cannot be written: {error.strerror}; free space or "
                "choose another run_dir"
            ) from error
