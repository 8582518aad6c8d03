"""TensorBoard event file that reports disk errors."""

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


def _ignore_disk_errors(failure: threading.ExceptHookArgs) -> None:
    """Print exceptions of the event writer's thread, except those that the main thread raises."""
    if not isinstance(failure.exc_value, OSError):
        threading.__excepthook__(failure)


class EventFile:
    """Writes scalars, texts and images, which can be read immediately.

    Every method raises RunDirectoryError on a disk error, which may concern an earlier write.

    Args:
        folder: folder of the file.
        start_epoch: TensorBoard drops the events of older files from this epoch on.
    """

    def __init__(self, folder: Path, start_epoch: int) -> None:
        self._folder = folder
        threading.excepthook = _ignore_disk_errors
        with self._disk_errors():
            self._writer = SummaryWriter(str(folder), purge_step=start_epoch)

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """Write values by tag."""
        with self._disk_errors():
            for tag, value in values.items():
                self._writer.add_scalar(tag, value, step)
            self._writer.flush()

    def texts(self, texts: Mapping[str, str], step: int) -> None:
        """Write texts in Markdown by tag."""
        with self._disk_errors():
            for tag, text in texts.items():
                self._writer.add_text(tag, text, step)
            self._writer.flush()

    def image(self, tag: str, pixels: Pixels, step: int) -> None:
        """Write an image."""
        with self._disk_errors():
            self._writer.add_image(tag, pixels, step, dataformats="HWC")
            self._writer.flush()

    def layout(self, layout: Layout) -> None:
        """Write the layout of the Custom Scalars tab, for all runs in the parent folder."""
        # TensorBoard shows the bands of a category in reverse order.
        shown = {name: dict(reversed(charts.items())) for name, charts in layout.items()}
        with self._disk_errors():
            self._writer.add_custom_scalars(shown)

    def begin_session(
        self, options: Mapping[str, float | str], *, first: Sequence[str], results: Sequence[str]
    ) -> None:
        """Write this run's row in the HParams tab.

        Args:
            options: columns of the row.
            first: names of the columns that come first.
            results: tags of the scalars that are results, written now or later.
        """
        experiment, start, _ = hparams(dict(options), dict.fromkeys(results, 0.0))
        plugin = experiment.value[0].metadata.plugin_data
        content = HParamsPluginData.FromString(plugin.content)
        for column in content.experiment.hparam_infos:
            column.differs = column.name in first
        plugin.content = content.SerializeToString()
        with self._disk_errors():
            for part in (experiment, start):
                self._writer._get_file_writer().add_summary(part)

    def end_session(self) -> None:
        """Write that the run of `begin_session` has ended."""
        _, _, end = hparams({}, {})
        with self._disk_errors():
            self._writer._get_file_writer().add_summary(end)

    def close(self) -> None:
        """Flush and close the file."""
        with self._disk_errors():
            self._writer.close()

    @contextmanager
    def _disk_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise RunDirectoryError.not_written(f"events in {self._folder}", error) from error
