"""How a list of tensors is cut into flat buffers of bounded size."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

_PIECE = 1 << 17  # elements that stay in a core's cache between measuring and blending


@dataclass(frozen=True)
class Piece:
    """A stretch of one tensor's elements inside a bucket."""

    tensor: int
    """Index in the list of tensors."""
    start: int
    """First element, in the tensor's memory order."""
    offset: int
    """Where it starts in the bucket."""
    length: int
    """Elements."""


@dataclass(frozen=True)
class Bucket:
    """Elements of one type that travel together."""

    dtype: torch.dtype
    length: int
    """Elements."""
    pieces: tuple[Piece, ...]

    @property
    def bytes(self) -> int:
        """Size of one network's part."""
        return self.length * self.dtype.itemsize


def cut_buckets(
    sizes: Sequence[int],
    dtypes: Sequence[torch.dtype],
    *,
    bucket_bytes: int,
    share: int = 0,
    shares: int = 1,
) -> list[Bucket]:
    """Cut tensors into buckets: type by type, in order, every element in exactly one piece.

    Args:
        sizes: elements of each tensor; empty ones get no piece.
        dtypes: of each tensor.
        bucket_bytes: largest size of a bucket; a bucket holds at least one element.
        share: which of the equal stretches, of the elements of each type, is cut.
        shares: how many of them there are; the buckets of all together hold every element once.
    """
    buckets = []
    for dtype in dict.fromkeys(dtypes):
        room = max(1, bucket_bytes // dtype.itemsize)
        mine = [size if kind == dtype else 0 for size, kind in zip(sizes, dtypes, strict=True)]
        begin, end = (sum(mine) * edge // shares for edge in (share, share + 1))
        pieces: list[Piece] = []
        filled = before = 0
        for index, size in enumerate(mine):
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
    """Copy a bucket's pieces out of the tensors.

    Args:
        buffer: [bucket.length], of the bucket's type, on any device; written to.
        bucket: what to copy.
        views: all tensors, each as one dimension.
    """
    for piece in _runs(bucket):
        source = views[piece.tensor][piece.start : piece.start + piece.length]
        buffer[piece.offset : piece.offset + piece.length].copy_(source)


def unpack_(views: Sequence[Tensor], bucket: Bucket, buffer: Tensor) -> None:
    """Copy a bucket's pieces into the tensors: what `pack_` does, backwards.

    Args:
        views: all tensors, each as one dimension; written to.
        bucket: what to copy.
        buffer: [bucket.length], of the bucket's type, on any device.
    """
    for piece in _runs(bucket):
        target = views[piece.tensor][piece.start : piece.start + piece.length]
        target.copy_(buffer[piece.offset : piece.offset + piece.length])


def _runs(bucket: Bucket) -> Iterator[Piece]:
    """The bucket's pieces with neighbouring pieces of one tensor joined."""
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
