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


def has(pieces: PinnedPieces, offset: int, num_bytes: int) -> bool:
    first = np.array([BASE + offset], np.uint64)
    return pieces.split(first, first + np.uint64(num_bytes - 1)).tolist() == [True]


def test_what_is_asked_for_is_registered_with_what_follows(pieces: PinnedPieces, runtime: Counting) -> None:
    assert not has(pieces, 2 * PIECE_BYTES - 1, 2)
    runtime.go_on.set()
    assert pieces.wait(30)
    assert runtime.registered == [1, 2, 3, 4, 5, 6]
    assert has(pieces, 2 * PIECE_BYTES - 1, 2)
    assert has(pieces, PIECE_BYTES, 6 * PIECE_BYTES)
    assert not has(pieces, PIECE_BYTES, 6 * PIECE_BYTES + 1)
    assert not has(pieces, PIECE_BYTES - 1, 1)


def test_the_last_piece_ends_with_the_arena(pieces: PinnedPieces, runtime: Counting) -> None:
    runtime.go_on.set()
    assert not has(pieces, (NUM_PIECES - 1) * PIECE_BYTES, 4096)
    assert pieces.wait(30)
    assert runtime.registered == [NUM_PIECES - 1]
    assert has(pieces, (NUM_PIECES - 1) * PIECE_BYTES, 4096)


def test_what_cannot_be_registered_is_not_tried_again_and_named_once(
    pieces: PinnedPieces, runtime: Counting, caplog: pytest.LogCaptureFixture
) -> None:
    runtime.go_on.set()
    addresses = np.array([BASE + piece * PIECE_BYTES for piece in (6, 7, 8)], np.uint64)
    for expected in ([False, False, False], [True, False, True], [True, False, True]):
        assert pieces.split(addresses, addresses).tolist() == expected
        assert pieces.wait(30)
    assert [record.message for record in caplog.records] == [
        "memory that cannot be pinned is copied more slowly: no memory of this kind"
    ]


def test_a_range_is_registered_if_all_its_pieces_are(pieces: PinnedPieces, runtime: Counting) -> None:
    runtime.go_on.set()
    pieces.want([0, 1, 2])
    assert pieces.wait(30)  # All but piece 7 up to the last that comes ahead of others.
    ends = [(0, 1), (1, 6), (6, 6), (6, 7), (7, 7), (8, 9)]
    firsts, lasts = (
        np.array([BASE + (piece + 1) * PIECE_BYTES - 1 for piece in side], np.uint64)
        for side in zip(*ends, strict=False)
    )
    assert pieces.split(firsts, lasts).tolist() == [True, True, True, False, False, False]
    assert pieces.wait(30)
    assert pieces.split(firsts, lasts).tolist() == [True, True, True, False, False, True]
