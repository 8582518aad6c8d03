"""Publications: the weights of one network at one round, as a safetensors file (ADR 39)."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import re
import stat
import threading
from collections import deque
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from dist_graft.grafting.information import is_finite
from dist_graft.population.round.file_choice import Place, Published
from dist_graft.run_directory import atomic_path, network_name
from dist_graft.version import VERSION

FORMAT = "1"
_NAME = re.compile(r"epoch_(\d{4,})(?:_step_(\d+))?\.safetensors")
_NETWORK = re.compile(r"network(\d{2,})")
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
_MAX_HEADER_BYTES = 100_000_000  # as in the safetensors library
_RETRY_SECONDS = 5.0
_log = logging.getLogger("dist_graft")


class PublicationError(Exception):
    """A publication cannot be used; the message is the reason."""


def network_folder(exchange: Path, network: int) -> Path:
    """Folder of one network's publications."""
    return exchange / network_name(network)


def published_networks(exchange: Path) -> list[int]:
    """Networks that have a folder of publications, in order."""
    try:
        names = os.listdir(exchange)  # noqa: PTH208  names are enough
    except OSError:
        return []
    return sorted(int(match[1]) for name in names if (match := _NETWORK.fullmatch(name)))


def _strings(published: Published) -> dict[str, str]:
    """Entries of the file's metadata, without checksums."""
    resume = published.resume
    return {
        "format": FORMAT,
        "dist_graft": VERSION,
        "network": str(published.network),
        "epoch": str(published.place.epoch),
        "step": str(published.place.step),
        "steps_per_epoch": str(published.place.steps_per_epoch),
        "round": str(published.round),
        "schema": published.schema,
        "information": json.dumps(published.information),
        "lr": json.dumps(published.lr),
        "resume": json.dumps(resume and [resume.epoch, resume.step]),
        "diverged": published.diverged,
    }


def publication_path(folder: Path, place: Place) -> Path:
    """File of the publication at a place: epochs finished, and steps inside an epoch."""
    step = f"_step_{place.step}" if place.step else ""
    return folder / f"epoch_{place.epoch:04d}{step}.safetensors"


def published_places(folder: Path, steps_per_epoch: int) -> list[Place]:
    """Places of the files in a network's folder, the newest last. Files are not opened."""
    try:
        names = os.listdir(folder)  # noqa: PTH208  names are enough
    except OSError:
        return []
    matches = (_NAME.fullmatch(name) for name in names)
    return sorted(
        Place(int(match[1]), int(match[2] or 0), steps_per_epoch) for match in matches if match
    )


# ------------------------------------------------------------------------------------------------
# Reading
# ------------------------------------------------------------------------------------------------


class Publication:
    """An open publication of another network. Every byte that is used was checked before.

    The file is read with `pread`, one tensor at a time, and not mapped: a mapped file that another
    machine truncates or deletes kills the process that reads it (SIGBUS).

    Args:
        path: the file.

    Raises: PublicationError when it cannot be opened, is not a safetensors file of this package, or
        its metadata is damaged.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._file = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # a FIFO does not block
        except OSError as error:
            raise PublicationError(error.strerror or str(error)) from error
        try:
            self._data, self._tensors, self.published, self._sha256 = self._read_header()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Publication:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    @property
    def keys(self) -> list[str]:
        """State-dict keys of the tensors."""
        return list(self._tensors)

    def check_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Check that the file holds tensors of the same names, shapes and dtypes.

        Raises: PublicationError naming the first difference.
        """
        if self.published.diverged:
            return
        for key in {*tensors, *self._tensors}:
            one = tensors.get(key)
            other = self._tensors.get(key, {})
            ours = None if one is None else (one.dtype, list(one.shape))
            if ours != (_DTYPES.get(str(other.get("dtype"))), other.get("shape")):
                raise PublicationError(f"{key} is not as in this network")

    def read(self, key: str) -> Tensor:
        """Read one tensor onto the CPU, and compare its checksum.

        Raises: PublicationError when the file cannot be read, the tensor is damaged, or it is not
            finite.
        """
        entry = self._tensors[key]
        start, end = entry["data_offsets"]
        content = self._bytes(self._data + start, end - start)
        if hashlib.sha256(content).hexdigest() != self._sha256.get(key):
            raise PublicationError(f"{key} is damaged: its checksum differs")
        dtype, shape = _DTYPES[entry["dtype"]], entry["shape"]
        if not content:
            return torch.empty(shape, dtype=dtype)
        tensor = torch.frombuffer(content, dtype=dtype).view(shape)
        if not is_finite(tensor):
            raise PublicationError(f"{key} is not finite")
        return tensor

    def _bytes(self, offset: int, length: int) -> bytearray:
        content = bytearray(length)
        view, done = memoryview(content), 0
        try:
            while done < length:
                count = os.preadv(self._file, [view[done:]], offset + done)
                if not count:
                    raise PublicationError("the file is truncated")
                done += count
        except OSError as error:
            raise PublicationError(error.strerror or str(error)) from error
        return content

    def _read_header(self) -> tuple[int, dict[str, Any], Published, dict[str, str]]:
        """Offset of the data, description of the tensors, metadata, checksum of each tensor."""
        status = os.fstat(self._file)
        if not stat.S_ISREG(status.st_mode):
            raise PublicationError("it is not a file")
        length = int.from_bytes(self._bytes(0, 8), "little")
        if length > min(status.st_size - 8, _MAX_HEADER_BYTES):
            raise PublicationError("the file is truncated, or not in safetensors format")
        try:
            header = json.loads(self._bytes(8, length).decode())
            strings = header.pop("__metadata__")
            digest = strings.pop("sha256")
            damaged = digest != _digest(strings)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise PublicationError("its header is damaged, or of another program") from error
        if damaged:
            raise PublicationError("its metadata is damaged: the checksum differs")
        if strings["format"] != FORMAT:
            raise PublicationError(f"it has format {strings['format']}, not {FORMAT}")
        for entry in header.values():  # the metadata is ours, the rest of the header may be damaged
            if not _is_sound(entry, status.st_size - 8 - length):
                raise PublicationError("its header is damaged")
        steps = int(strings["steps_per_epoch"])
        resume = json.loads(strings["resume"])
        published = Published(
            network=int(strings["network"]),
            place=Place(int(strings["epoch"]), int(strings["step"]), steps),
            round=int(strings["round"]),
            schema=strings["schema"],
            information=tuple(json.loads(strings["information"])),
            lr=json.loads(strings["lr"]),
            resume=Place(int(resume[0]), int(resume[1]), steps) if resume else None,
            diverged=strings["diverged"],
            digest=digest,
        )
        return 8 + length, header, published, json.loads(strings["tensors"])


def _is_sound(entry: Any, data_bytes: int) -> bool:
    """Whether a tensor's entry in the header describes a part of the file."""
    try:
        (start, end), shape = entry["data_offsets"], entry["shape"]
        size = _DTYPES[entry["dtype"]].itemsize
        for length in shape:
            size *= length
        return bool(0 <= start <= end <= data_bytes and end - start == size)
    except (KeyError, TypeError, ValueError):
        return False


def _digest(strings: Mapping[str, str]) -> str:
    return hashlib.sha256(json.dumps(strings, sort_keys=True).encode()).hexdigest()


# ------------------------------------------------------------------------------------------------
# Writing
# ------------------------------------------------------------------------------------------------


def write_publication(folder: Path, published: Published, tensors: Mapping[str, Tensor]) -> Path:
    """Write a publication atomically.

    Args:
        folder: of the network's publications.
        published: description; `digest` is ignored.
        tensors: weights and buffers on the CPU, in any memory format.

    Raises: OSError.
    """
    path = publication_path(folder, published.place)
    contiguous = {key: tensor.contiguous() for key, tensor in tensors.items()}
    sha256 = {key: _tensor_digest(tensor) for key, tensor in contiguous.items()}
    strings = _strings(published) | {"tensors": json.dumps(sha256)}
    try:
        with atomic_path(path) as temporary:
            save_file(contiguous, temporary, strings | {"sha256": _digest(strings)})
    except OSError:
        raise
    except Exception as error:  # safetensors has its own error for a full disk
        raise OSError(str(error)) from error
    return path


def _tensor_digest(tensor: Tensor) -> str:
    content: Any = tensor.reshape(-1).view(torch.uint8).numpy()
    return hashlib.sha256(content).hexdigest()


def prune_publications(
    folder: Path, places: Collection[Place], *, keep: int, needed_from: Place | None
) -> None:
    """Delete all publications but the newest.

    Args:
        folder: of the network's publications.
        places: of its files, the newest last.
        keep: number of the newest ones to keep.
        needed_from: also keep everything from this place on; None: nothing else.
    """
    for place in list(places)[:-keep]:
        if needed_from is None or place < needed_from:
            publication_path(folder, place).unlink(missing_ok=True)


@dataclass(frozen=True)
class _Job:
    published: Published
    tensors: Mapping[str, Tensor]
    needed_from: Place | None


class Publisher:
    """Writes the publications of one network in a thread, beside the training.

    A disk error is a warning, and the write is retried every few seconds.

    Args:
        folder: of the network's publications.
        keep_all: whether every publication must be written, and stays until no network needs it;
            otherwise a newer one replaces one that still waits, and the newest two are kept.
    """

    def __init__(self, folder: Path, *, keep_all: bool) -> None:
        self._folder = folder
        self._keep_all = keep_all
        self._queue: deque[_Job] = deque()
        self._changed = threading.Condition()
        self._failing = False
        self._closing = False
        self._is_writing = False
        self._has_cleaned = False

    def publish(
        self, published: Published, tensors: Mapping[str, Tensor], needed_from: Place | None
    ) -> None:
        """Start writing a publication.

        Args:
            published: description of the network.
            tensors: on the CPU; must not be changed afterwards.
            needed_from: older publications are no longer needed by any network.
        """
        with self._changed:
            if not self._keep_all:
                while len(self._queue) > 1:  # the first is being written
                    self._queue.pop()
            self._queue.append(_Job(published, tensors, needed_from))
            self._changed.notify_all()
            if self._is_writing:
                return
            self._is_writing = True
            # Started under the lock: the thread does not run before this method returns.
            threading.Thread(target=self._write_all, name="publish", daemon=True).start()

    def discard_after(self, place: Place) -> None:
        """Delete publications beyond a place, which belong to work that was lost."""
        for other in published_places(self._folder, place.steps_per_epoch):
            if other > place:
                with contextlib.suppress(OSError):
                    publication_path(self._folder, other).unlink(missing_ok=True)

    def flush(self) -> None:
        """Wait until everything is written, or cannot be written."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
            self._changed.wait_for(lambda: not self._is_writing)
            self._closing = False

    def _write_all(self) -> None:
        """Write the pending publications, then exit."""
        while True:
            with self._changed:
                if not self._queue:
                    self._is_writing = False
                    self._changed.notify_all()
                    return
                job = self._queue[0]
            failed = not self._write(job)
            with self._changed:
                if failed and not self._closing:
                    self._changed.wait_for(self._has_news, timeout=_RETRY_SECONDS)
                    if self._keep_all or len(self._queue) == 1:
                        continue  # once more
                self._queue.popleft()
                self._changed.notify_all()

    def _has_news(self) -> bool:
        return self._closing or (not self._keep_all and len(self._queue) > 1)

    def _write(self, job: _Job) -> bool:
        if not self._has_cleaned:
            self._has_cleaned = True
            for leftover in self._folder.glob(".epoch_*"):  # of a job that was killed
                with contextlib.suppress(OSError):
                    leftover.unlink(missing_ok=True)
        try:
            path = write_publication(self._folder, job.published, job.tensors)
        except OSError as error:
            if not self._failing:
                _log.warning(
                    "%s cannot be written: %s; training continues, and the write will be retried",
                    publication_path(self._folder, job.published.place),
                    error.strerror or error,
                )
            self._failing = True
            return False
        if self._failing:
            _log.warning("%s was written: publishing resumed", path)
        self._failing = False
        with contextlib.suppress(OSError):  # leftover files do no harm
            places = published_places(self._folder, job.published.place.steps_per_epoch)
            prune_publications(self._folder, places, keep=2, needed_from=job.needed_from)
        return True
