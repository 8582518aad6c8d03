"""Buckets: tensors cut into flat buffers of bounded size."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


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
                length = min(stop - start, room - filled)
                pieces.append(Piece(index, start, filled, length))
                start += length
                filled += length
                if filled == room:
                    buckets.append(Bucket(dtype, filled, tuple(pieces)))
                    pieces, filled = [], 0
        if pieces:
            buckets.append(Bucket(dtype, filled, tuple(pieces)))
    return buckets


def slices(pieces: Sequence[Piece], views: Sequence[Tensor]) -> list[Tensor]:
    """Return views of the pieces' elements in the tensors.

    Args:
        pieces: pieces of one bucket.
        views: one-dimensional views of all tensors.
    """
    return [views[piece.tensor][piece.start : piece.start + piece.length] for piece in pieces]


def parts(pieces: Sequence[Piece], buffer: Tensor) -> list[Tensor]:
    """Return views of the pieces' elements in a buffer that holds their bucket."""
    return [buffer[piece.offset : piece.offset + piece.length] for piece in pieces]


def cut_pieces(pieces: Sequence[Piece], elements: int) -> Iterator[list[Piece]]:
    """Cut pieces to at most so many elements, and yield groups of at most so many."""
    group: list[Piece] = []
    filled = 0
    for piece in pieces:
        for done in range(0, piece.length, elements):
            length = min(elements, piece.length - done)
            if filled + length > elements:
                yield group
                group, filled = [], 0
            group.append(Piece(piece.tensor, piece.start + done, piece.offset + done, length))
            filled += length
    yield group


def pack_(buffer: Tensor, bucket: Bucket, views: Sequence[Tensor]) -> None:
    """Copy a bucket's pieces from the tensors into a buffer.

    Args:
        buffer: [bucket.length], on any device; overwritten. Elements are converted to its dtype.
        bucket: the pieces to copy.
        views: one-dimensional views of all tensors.
    """
    sources = slices(bucket.pieces, views)
    staged = buffer
    if buffer.device != sources[0].device:  # one transfer for the bucket, not one for each piece
        staged = torch.empty(bucket.length, dtype=buffer.dtype, device=sources[0].device)
    torch._foreach_copy_(parts(bucket.pieces, staged), sources)
    if staged is not buffer:
        buffer.copy_(staged)


def unpack_(views: Sequence[Tensor], bucket: Bucket, buffer: Tensor) -> None:
    """Copy a bucket's pieces from a buffer into the tensors; the inverse of `pack_`.

    Args: as `pack_`, except that the views are overwritten.
    """
    targets = slices(bucket.pieces, views)
    staged = buffer.to(targets[0].device)
    torch._foreach_copy_(targets, parts(bucket.pieces, staged))
