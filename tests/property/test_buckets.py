"""Properties of buckets: packing and unpacking is lossless."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from dist_graft.grafting.memory_layout import flat, memory_order, memory_positions
from dist_graft.population.round.buckets import cut_buckets, cut_pieces, pack_, unpack_

TYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
shapes = st.lists(st.integers(0, 5), max_size=4)
bucket_sizes = st.one_of(st.integers(1, 64), st.integers(64, 1 << 16))


@st.composite
def dense(draw: st.DrawFn, dtype: torch.dtype | None = None) -> torch.Tensor:
    """Dense tensors of any shape, dtype and memory order."""
    shape = draw(shapes)
    order = draw(st.permutations(range(len(shape))))
    kind = dtype or draw(st.sampled_from(TYPES))
    tensor = torch.empty_permuted(shape, tuple(order), dtype=kind)
    count = tensor.numel()
    return tensor.copy_(torch.arange(count, dtype=torch.float64).reshape(shape))


def check_round_trip(views: list[torch.Tensor], bucket_bytes: int) -> None:
    """Pack every bucket and copy its pieces back by their positions."""
    copies = [torch.full_like(view, -1) for view in views]
    for bucket in cut_buckets(
        [view.numel() for view in views], [view.dtype for view in views], bucket_bytes=bucket_bytes
    ):
        buffer = torch.full((bucket.length,), -2.0, dtype=bucket.dtype)
        pack_(buffer, bucket, views)
        for piece in bucket.pieces:
            copies[piece.tensor][piece.start : piece.start + piece.length] = buffer[
                piece.offset : piece.offset + piece.length
            ]
    assert all(torch.equal(copy, view) for copy, view in zip(copies, views, strict=True))


@given(st.lists(dense(), max_size=8), bucket_sizes)
def test_packing_and_unpacking_is_the_identity(tensors, bucket_bytes):
    check_round_trip([flat(tensor) for tensor in tensors], bucket_bytes)


@given(st.lists(st.integers(1, 1 << 19), min_size=1, max_size=3), st.integers(1 << 16, 1 << 22))
def test_packing_and_unpacking_large_tensors_is_the_identity(counts, bucket_bytes):
    check_round_trip([torch.arange(float(count)) for count in counts], bucket_bytes)


@given(st.lists(dense(), max_size=8), bucket_sizes, st.integers(1, 5))
def test_shares_together_hold_every_element_once(tensors, bucket_bytes, shares):
    views = [flat(tensor) for tensor in tensors]
    counts, dtypes = [view.numel() for view in views], [view.dtype for view in views]
    copies, seen = [torch.full_like(view, -1) for view in views], [0] * shares
    for share in range(shares):
        for bucket in cut_buckets(
            counts, dtypes, bucket_bytes=bucket_bytes, share=share, shares=shares
        ):
            assert bucket.bytes <= max(bucket_bytes, bucket.dtype.itemsize)
            buffer = torch.empty(bucket.length, dtype=bucket.dtype)
            pack_(buffer, bucket, views)
            unpack_(copies, bucket, buffer)
            seen[share] += bucket.length
    assert all(torch.equal(copy, view) for copy, view in zip(copies, views, strict=True))
    assert sum(seen) == sum(counts)
    assert max(seen) - min(seen) <= len(set(dtypes))


sizes = st.one_of(st.integers(0, 300), st.integers(0, 1 << 19))


@given(st.lists(st.tuples(sizes, st.sampled_from(TYPES)), max_size=8), st.integers(400, 1 << 21))
def test_every_element_is_in_exactly_one_piece(tensors, bucket_bytes):
    counts, dtypes = [size for size, _ in tensors], [dtype for _, dtype in tensors]
    buckets = cut_buckets(counts, dtypes, bucket_bytes=bucket_bytes)
    reached = [0] * len(tensors)
    for bucket in buckets:
        filled = 0
        for piece in bucket.pieces:
            assert piece.length > 0
            assert dtypes[piece.tensor] == bucket.dtype
            assert piece.offset == filled
            assert piece.start == reached[piece.tensor]
            filled += piece.length
            reached[piece.tensor] += piece.length
        assert filled == bucket.length
        assert bucket.bytes == bucket.length * bucket.dtype.itemsize <= bucket_bytes
    assert reached == counts


@given(st.lists(st.tuples(sizes, st.sampled_from(TYPES)), max_size=8), st.integers(400, 1 << 21))
def test_only_the_last_bucket_of_a_dtype_is_not_full(tensors, bucket_bytes):
    counts, dtypes = [size for size, _ in tensors], [dtype for _, dtype in tensors]
    buckets = cut_buckets(counts, dtypes, bucket_bytes=bucket_bytes)
    order = [bucket.dtype for bucket in buckets]
    for dtype in set(order):
        same_dtype = [bucket for bucket in buckets if bucket.dtype == dtype]
        full = bucket_bytes // dtype.itemsize
        assert all(bucket.length == full for bucket in same_dtype[:-1])
        assert order[order.index(dtype) :][: len(same_dtype)] == [dtype] * len(same_dtype)


@given(st.lists(st.integers(0, 20), max_size=5), st.sampled_from(TYPES))
def test_buckets_hold_at_least_one_element(sizes_, dtype):
    buckets = cut_buckets(sizes_, [dtype] * len(sizes_), bucket_bytes=1)
    assert [bucket.length for bucket in buckets] == [1] * sum(sizes_)


@given(dense(), st.data())
def test_equal_memory_order_means_that_flat_views_match(one, data):
    """Flat views of equal tensors are equal exactly when their memory orders are."""
    order = data.draw(st.permutations(range(one.dim())))
    other = torch.empty_permuted(one.shape, tuple(order), dtype=one.dtype).copy_(one)
    matches = torch.equal(flat(one), flat(other))
    if one.numel():
        assert matches == (memory_order(one) == memory_order(other))
    assert sorted(flat(other).tolist()) == sorted(one.flatten().tolist())


@given(st.lists(st.integers(1, 300), min_size=1, max_size=8), st.integers(1, 400))
def test_groups_cut_pieces_at_multiples_of_their_size(sizes_, elements):
    (bucket,) = cut_buckets(sizes_, [torch.float32] * len(sizes_), bucket_bytes=1 << 20)
    groups = list(cut_pieces(bucket.pieces, elements))
    assert all(sum(piece.length for piece in group) <= elements for group in groups)
    offset, starts = 0, []
    for piece in (piece for group in groups for piece in group):
        assert piece.offset == offset
        assert piece.start % elements == 0
        starts.append((piece.tensor, piece.start))
        offset += piece.length
    assert offset == bucket.length
    assert starts == [(t, at) for t, size in enumerate(sizes_) for at in range(0, size, elements)]


@given(dense())
def test_positions_in_logical_order_become_positions_in_memory(tensor):
    positions = torch.arange(tensor.numel()).flip(0)
    found = flat(tensor)[memory_positions(tensor, positions)]
    assert torch.equal(found, tensor.flatten()[positions])
