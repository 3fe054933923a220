"""Threads, queues and breakers around a backend with faults at command."""

from __future__ import annotations

import errno
import logging
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future

import pytest

from kvferry.blocks import Tier
from kvferry.store import tier as tier_module
from kvferry.store.base import PartName
from kvferry.store.tier import ByteTier
from kvferry.testing.byte_store import DictByteStore, name_of, value_of
from kvferry.testing.faults import FaultyByteStore

PART_BYTES = 1000
FULL = OSError(errno.ENOSPC, "No space left on device")
BROKEN = OSError(errno.EIO, "Input/output error")
Make = Callable[..., ByteTier]


@pytest.fixture
def backend() -> FaultyByteStore:
    return FaultyByteStore(DictByteStore())


@pytest.fixture
def make(backend: FaultyByteStore) -> Iterator[Make]:
    made: list[ByteTier] = []

    def make_tier(num_threads: int = 2, max_queued_bytes: int = 1 << 20) -> ByteTier:
        made.append(ByteTier(backend, Tier.DISK, num_threads=num_threads))
        made[-1].max_queued_bytes = max_queued_bytes
        return made[-1]

    yield make_tier
    backend.gate.set()
    for tier in made:
        tier.close(10.0)
        assert not any(thread.is_alive() for thread in tier._threads)


def put(tier: ByteTier, number: int) -> Future[bool]:
    done: Future[bool] = Future()
    if not tier.put(name_of(number), value_of(name_of(number), PART_BYTES), done.set_result):
        done.cancel()
    return done


def get(tier: ByteTier, number: int, timeout_seconds: float = 10.0) -> bool:
    done: Future[bool] = Future()
    buffer = bytearray(PART_BYTES)
    tier.get(name_of(number), memoryview(buffer), done.set_result, timeout_seconds=timeout_seconds)
    ok = done.result(10.0)
    assert not ok or buffer == value_of(name_of(number), PART_BYTES)
    return ok


def test_what_is_put_is_got(make: Make) -> None:
    tier = make()
    assert put(tier, 1).result(10.0)
    assert get(tier, 1)
    assert not get(tier, 2)
    assert tier.contains([name_of(1), name_of(2)]) == [True, False]
    stats = tier.stats()
    assert (stats["disk_written_bytes"], stats["disk_read_bytes"], stats["disk_failed_reads"]) == (1000, 1000, 1)


def test_writes_beyond_the_bound_are_refused(make: Make, backend: FaultyByteStore) -> None:
    tier = make(max_queued_bytes=2 * PART_BYTES)
    backend.gate.clear()
    accepted = [put(tier, number) for number in range(4)]
    assert [future.cancelled() for future in accepted] == [False, False, True, True]
    backend.gate.set()
    assert all(future.result(10.0) for future in accepted[:2])
    assert put(tier, 5).result(10.0)
    assert tier.stats()["disk_refused_writes"] == 2
    assert tier.stats()["disk_queued_write_bytes"] == 0


def test_a_write_larger_than_the_bound_goes_alone(make: Make) -> None:
    assert put(make(max_queued_bytes=1), 1).result(10.0)


def test_reads_do_not_wait_behind_writes(make: Make, backend: FaultyByteStore) -> None:
    tier = make(num_threads=2)
    assert put(tier, 0).result(10.0)
    backend.gate.clear()
    writes = [put(tier, number) for number in range(1, 4)]
    reading: Future[bool] = Future()
    view = memoryview(bytearray(PART_BYTES))
    tier.get(name_of(0), view, reading.set_result, timeout_seconds=10.0)
    while backend.num_gets < 1 or backend.num_puts < 2:
        threading.Event().wait(0.001)
    assert backend.num_puts == 2, "one write of the three had begun, beside the first"
    backend.gate.set()
    assert reading.result(10.0)
    assert all(write.result(10.0) for write in writes)


def test_a_failed_name_is_forgotten_until_it_is_put_again(make: Make, backend: FaultyByteStore) -> None:
    tier = make()
    put(tier, 1).result(10.0)
    backend.short_reads = True
    assert not get(tier, 1)
    backend.short_reads = False
    assert tier.contains([name_of(1)]) == [False]
    put(tier, 1).result(10.0)
    assert tier.contains([name_of(1)]) == [True]
    assert get(tier, 1)


def test_a_read_that_waited_too_long_is_not_begun(make: Make, backend: FaultyByteStore) -> None:
    tier = make()
    put(tier, 1).result(10.0)
    assert not get(tier, 1, timeout_seconds=0.0)
    assert backend.num_gets == 0


def wait_for(condition: Callable[[], bool]) -> None:
    for _ in range(10_000):
        if condition():
            return
        threading.Event().wait(0.001)
    raise AssertionError("it did not come about")


def test_a_full_disk_stops_writing_and_serves_on(
    make: Make, backend: FaultyByteStore, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(tier_module, "_FIRST_DELAY_SECONDS", 0.01)
    tier = make()
    put(tier, 0).result(10.0)
    with caplog.at_level(logging.INFO, "kvferry"):
        backend.put_error = FULL
        for number in range(1, 4):
            assert not put(tier, number).result(10.0)
        assert put(tier, 4).cancelled(), "after three failures nothing is tried for callers"
        assert tier.stats()["disk_writing_off"] == 1
        assert get(tier, 0), "reading goes on"
        before = backend.num_puts
        wait_for(lambda: backend.num_puts >= before + 2)
        backend.put_error = None
        wait_for(lambda: tier.stats()["disk_writing_off"] == 0)
    assert put(tier, 4).result(10.0)
    assert [(record.levelname, record.message[:15]) for record in caplog.records] == [
        ("WARNING", "writing to disk"),
        ("INFO", "writing to disk"),
    ]
    assert isinstance(backend.inner, DictByteStore)
    assert set(backend.inner.values) == {name_of(0), name_of(4)}, "the probe left nothing"


def test_a_broken_disk_is_asked_by_nobody_until_it_works(
    make: Make, backend: FaultyByteStore, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(tier_module, "_FIRST_DELAY_SECONDS", 0.01)
    tier = make()
    names: list[PartName] = [name_of(number) for number in range(4)]
    for number in range(4):
        put(tier, number).result(10.0)
    with caplog.at_level(logging.WARNING, "kvferry"):
        backend.get_error = BROKEN
        assert [get(tier, number) for number in range(3)] == [False] * 3
        assert tier.contains(names) == [False] * 4
        num_gets = backend.num_gets
        assert not get(tier, 3)
        assert put(tier, 7).result(10.0), "writing goes on"
    assert len(caplog.records) == 1
    backend.get_error = None
    wait_for(lambda: tier.stats()["disk_reading_off"] == 0)
    assert backend.num_gets > num_gets, "probed in the background"
    assert tier.contains(names) == [True] * 4
    assert get(tier, 1)


def test_the_probe_asks_less_and_less(make: Make, backend: FaultyByteStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tier_module, "_FIRST_DELAY_SECONDS", 0.001)
    tier = make()
    backend.get_error = BROKEN
    for number in range(3):
        get(tier, number)
    wait_for(lambda: backend.num_gets >= 6)
    assert tier._reads._delay_seconds >= 0.001 * 2**4


def test_overdue_answers_count_as_failures(make: Make) -> None:
    tier = make()
    put(tier, 1).result(10.0)
    for _ in range(3):
        tier.overdue([name_of(9)])
    assert tier.contains([name_of(1)]) == [False]


def test_closing_finishes_writes_and_gives_up_reads(make: Make, backend: FaultyByteStore) -> None:
    tier = make(num_threads=2)
    backend.gate.clear()
    writes = [put(tier, number) for number in range(5)]
    threading.Timer(0.05, backend.gate.set).start()
    tier.close(10.0)
    assert all(write.result(0) for write in writes)
    assert put(tier, 6).cancelled()
    assert not get(tier, 1)
    assert tier.contains([name_of(1)]) == [False]


def test_closing_gives_up_writes_at_its_deadline(make: Make, backend: FaultyByteStore) -> None:
    tier = make(num_threads=2)
    backend.gate.clear()
    writes = [put(tier, number) for number in range(3)]
    wait_for(lambda: backend.num_puts == 1)
    closing = threading.Thread(target=tier.close, args=(0.05,))
    closing.start()
    assert writes[1].result(10.0) is False
    assert writes[2].result(10.0) is False
    backend.gate.set()
    closing.join()
    assert writes[0].result(10.0)


def test_what_is_deleted_is_absent_at_once_and_gone_soon(make: Make, backend: FaultyByteStore) -> None:
    tier = make(num_threads=2)
    assert isinstance(backend.inner, DictByteStore)
    for number in range(3):
        assert put(tier, number).result(10.0)
    backend.gate.clear()
    readings: list[Future[bool]] = [Future() for _ in range(2)]
    for reading in readings:
        tier.get(name_of(2), memoryview(bytearray(PART_BYTES)), reading.set_result, timeout_seconds=10.0)
    wait_for(lambda: backend.num_gets == 2)
    tier.delete([name_of(0), name_of(1)])
    assert tier.contains([name_of(0), name_of(1), name_of(2)]) == [False, False, True]
    assert len(backend.inner.values) == 3, "every thread is busy"
    backend.gate.set()
    assert all(reading.result(10.0) for reading in readings)
    wait_for(lambda: not tier.stats()["disk_queued_deletes"])
    assert list(backend.inner.values) == [name_of(2)]
    assert put(tier, 0).result(10.0)
    assert get(tier, 0)


def test_closing_deletes_what_is_left_to_delete(make: Make, backend: FaultyByteStore) -> None:
    tier = make(num_threads=2)
    assert isinstance(backend.inner, DictByteStore)
    assert put(tier, 0).result(10.0)
    for _ in range(50):
        tier.delete([name_of(0)])
    tier.close(10.0)
    assert backend.inner.values == {}
    assert tier.stats()["disk_queued_deletes"] == 0


def test_a_delete_that_fails_is_counted(make: Make, backend: FaultyByteStore, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(names: list[PartName]) -> None:
        raise BROKEN

    monkeypatch.setattr(backend, "delete", fail)
    tier = make()
    assert put(tier, 0).result(10.0)
    tier.delete([name_of(0)])
    wait_for(lambda: not tier.stats()["disk_queued_deletes"])
    assert tier.stats()["disk_failed_deletes"] == 1
    assert not tier.contains([name_of(0)])[0], "it is not to be found again"
