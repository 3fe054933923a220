"""Which memory is registered, and that what is asked for comes first. The runtime is one that counts."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from kvferry.transfer.cuda import PIECE_BYTES, CudaError, PinnedPieces

BASE, NUM_PIECES = 1 << 40, 12


class Counting:
    """Registers when it is let go on, but never piece 7."""

    def __init__(self) -> None:
        self.registered: list[int] = []
        self.go_on = threading.Event()

    def use_device(self) -> None:
        """Nothing to use."""

    def register(self, address: int, num_bytes: int) -> None:
        self.go_on.wait(30)
        piece = (address - BASE) // PIECE_BYTES
        if piece == 7:
            raise CudaError("no memory of this kind")
        assert num_bytes == (PIECE_BYTES if piece < NUM_PIECES - 1 else 4096)
        self.registered.append(piece)

    def unregister(self, address: int) -> None:
        self.registered.remove((address - BASE) // PIECE_BYTES)


@pytest.fixture
def runtime() -> Counting:
    return Counting()


@pytest.fixture
def pieces(runtime: Any) -> Iterator[PinnedPieces]:
    pieces = PinnedPieces(runtime, BASE, (NUM_PIECES - 1) * PIECE_BYTES + 4096)
    yield pieces
    runtime.go_on.set()
    pieces.close()
    assert not runtime.registered


def test_what_is_asked_for_is_registered_with_what_follows(pieces: PinnedPieces, runtime: Counting) -> None:
    assert not pieces.has(2 * PIECE_BYTES - 1, 2)
    runtime.go_on.set()
    assert pieces.wait(30)
    assert runtime.registered == [1, 2, 3, 4, 5, 6]
    assert pieces.has(2 * PIECE_BYTES - 1, 2)
    assert pieces.has(PIECE_BYTES, 6 * PIECE_BYTES)
    assert not pieces.has(PIECE_BYTES, 6 * PIECE_BYTES + 1)
    assert not pieces.has(PIECE_BYTES - 1, 1)


def test_the_last_piece_ends_with_the_arena(pieces: PinnedPieces, runtime: Counting) -> None:
    runtime.go_on.set()
    assert not pieces.has((NUM_PIECES - 1) * PIECE_BYTES, 4096)
    assert pieces.wait(30)
    assert runtime.registered == [NUM_PIECES - 1]
    assert pieces.has((NUM_PIECES - 1) * PIECE_BYTES, 4096)


def test_what_cannot_be_registered_is_not_tried_again_and_named_once(
    pieces: PinnedPieces, runtime: Counting, caplog: pytest.LogCaptureFixture
) -> None:
    runtime.go_on.set()
    addresses = np.array([BASE + piece * PIECE_BYTES for piece in (6, 7, 8)], np.uint64)
    for expected in ([False, False, False], [True, False, True], [True, False, True]):
        assert pieces.split(addresses).tolist() == expected
        assert pieces.wait(30)
    assert [record.message for record in caplog.records] == [
        "memory that cannot be pinned is copied more slowly: no memory of this kind"
    ]
