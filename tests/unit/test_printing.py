"""Lines of processes that share a pipe."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest


@pytest.mark.parametrize("stream", ["stderr", "stdout"])
def test_a_line_and_its_end_are_one_write(stream: str) -> None:
    """In packet mode, a pipe keeps writes apart: each read returns one of them."""
    reader, writer = os.pipe2(os.O_DIRECT)
    program = (
        "import sys; from dist_graft.printing import print_line; "
        f"print_line('first', sys.{stream}); print_line('second', sys.{stream})"
    )
    subprocess.run([sys.executable, "-c", program], check=True, **{stream: writer})
    os.close(writer)
    assert [os.read(reader, 4096) for _ in range(3)] == [b"first\n", b"second\n", b""]
    os.close(reader)
