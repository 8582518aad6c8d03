"""Buckets: tensors cut into flat buffers of bounded size."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

_PIECE = 1 << 17  # elements; fits in a core's cache between distance and blending


@dataclass(frozen=True)
class Piece:
    """Contiguous elements of one tensor inside a bucket."""

    tensor: int
    """Index of the tensor."""
    start: int
    """First element, in the tensor's memory order."""
    offset: int
    """First element in the bucket."""
    length: int
    """Number of elements."""


@dataclass(frozen=True)
class Bucket:
    """Elements of one dtype that are transferred together."""

    dtype: torch.dtype
    length: int
    """Number of elements."""
    pieces: tuple[Piece, ...]

    @property
    def bytes(self) -> int:
        """Size of one network's part in bytes."""
        return self.length * self.dtype.itemsize


def cut_buckets(
    sizes: Sequence[int],
    dtypes: Sequence[torch.dtype],
    *,
    bucket_bytes: int,
    share: int = 0,
    shares: int = 1,
) -> list[Bucket]:
    """Cut tensors into buckets, dtype by dtype and in order.

    Args:
        sizes: number of elements of each tensor; empty tensors get no piece.
        dtypes: dtype of each tensor.
        bucket_bytes: largest size of a bucket; a bucket holds at least one element.
        share: index of the share to cut, when the elements of each dtype are divided equally.
        shares: number of shares. The buckets of all shares together hold every element once.
    """
    buckets = []
    for dtype in dict.fromkeys(dtypes):
        room = max(1, bucket_bytes // dtype.itemsize)
        matching = [size if kind == dtype else 0 for size, kind in zip(sizes, dtypes, strict=True)]
        begin, end = (sum(matching) * edge // shares for edge in (share, share + 1))
        pieces: list[Piece] = []
        filled = before = 0
        for index, size in enumerate(matching):
            start, stop = max(0, begin - before), min(size, end - before)
            before += size
            while start < stop:
                length = min(stop - start, room - filled, _PIECE)
                pieces.append(Piece(index, start, filled, length))
                start += length
                filled += length
                if filled == room:
                    buckets.append(Bucket(dtype, filled, tuple(pieces)))
                    pieces, filled = [], 0
        if pieces:
            buckets.append(Bucket(dtype, filled, tuple(pieces)))
    return buckets


def pack_(buffer: Tensor, bucket: Bucket, views: Sequence[Tensor]) -> None:
    """Copy a bucket's pieces from the tensors into a buffer.

    Args:
        buffer: [bucket.length], of the bucket's dtype, on any device; overwritten.
        bucket: the pieces to copy.
        views: one-dimensional views of all tensors.
    """
    for piece in _runs(bucket):
        source = views[piece.tensor][piece.start : piece.start + piece.length]
        buffer[piece.offset : piece.offset + piece.length].copy_(source)


def unpack_(views: Sequence[Tensor], bucket: Bucket, buffer: Tensor) -> None:
    """Copy a bucket's pieces from a buffer into the tensors; the inverse of `pack_`.

    Args: as `pack_`, except that the views are overwritten.
    """
    for piece in _runs(bucket):
        target = views[piece.tensor][piece.start : piece.start + piece.length]
        target.copy_(buffer[piece.offset : piece.offset + piece.length])


def _runs(bucket: Bucket) -> Iterator[Piece]:
    """Yield the bucket's pieces, with adjacent pieces of one tensor merged."""
    run: Piece | None = None
    for piece in bucket.pieces:
        if run and run.tensor == piece.tensor:
            run = Piece(run.tensor, run.start, run.offset, run.length + piece.length)
            continue
        if run:
            yield run
        run = piece
    if run:
        yield run
