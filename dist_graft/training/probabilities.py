"""Predicted probabilities of a test set, in bounded memory."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import IO

import numpy as np
import torch
from torch import Tensor

from dist_graft.errors import RunDirectoryError


class Probabilities:
    """Float32 probabilities of batches, [samples, classes] each.

    Args:
        limit: numbers to keep on the batches' device, and in host memory if there is a folder.
        folder: for a temporary file of the others; None: keep all in host memory.

    Raises: RunDirectoryError, from all methods, if the folder cannot hold them.
    """

    def __init__(self, limit: int, folder: Path | None) -> None:
        self._limit = limit
        self._folder = folder
        self._file: IO[bytes] | None = None
        self._on_device: list[Tensor] = []
        self._on_host: list[Tensor] = []
        self._numbers = 0
        self._classes = 0

    def append(self, batch: Tensor) -> None:
        """Add a batch."""
        self._on_device.append(batch)
        self._numbers += batch.numel()
        self._classes = batch.shape[1]
        if self._numbers > self._limit:
            self._to_host()
            if self._folder is not None:
                self._to_file(self._folder)

    def clear(self) -> None:
        """Forget all batches."""
        if self._file is not None:
            self._file.close()
            self._file = None
        self._on_device.clear()
        self._on_host.clear()
        self._numbers = 0

    def tensor(self) -> Tensor:
        """All batches on the CPU: [samples, classes]; mapped from the file, if there is one."""
        self._to_host()
        if self._file is None or self._folder is None:
            return torch.cat(self._on_host)
        self._to_file(self._folder)
        with self._file as file:
            return torch.from_numpy(np.memmap(file, np.float32, "r+")).view(-1, self._classes)

    def _to_host(self) -> None:
        self._on_host += [batch.cpu() for batch in self._on_device]
        self._on_device.clear()
        self._numbers = 0

    def _to_file(self, folder: Path) -> None:
        try:
            if self._file is None:  # without a name: nothing remains after a crash
                folder.mkdir(parents=True, exist_ok=True)
                self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115  closed by tensor
            for batch in self._on_host:
                self._file.write(batch.numpy().tobytes())
            self._file.flush()
        except OSError as error:
            raise RunDirectoryError(
                f"{folder} cannot hold the predictions on the test images: {error.strerror}; make "
                "room there, and rerun the command to resume"
            ) from error
        self._on_host.clear()
