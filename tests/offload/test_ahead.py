"""Loads ahead: their blocks count as filled once the copies are enqueued, and passes wait for them on the device."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from kvferry.config import StoreOptions
from kvferry.offload.metadata import CopyJob, PartCopy
from kvferry.offload.mover import Mover
from kvferry.store.store import Store
from kvferry.testing.block_store import CHUNK_TOKENS, bytes_of, copy_in, full_geometry, keys_of, register
from kvferry.transfer.copy import mark
from kvferry.transfer.layout import Layout, PoolSpec, read_pool_tensor
from kvferry.transfer.plan import Direction

GEOMETRY = full_geometry()
KEYS = keys_of(GEOMETRY, 3)


class Load(NamedTuple):
    """A load that has not begun, and the bytes that it brings."""

    mover: Mover
    store: Store
    job: CopyJob
    expected: bytes


@pytest.fixture
def layout() -> Layout:
    """Parts of the geometry's are four blocks of it."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    page = GEOMETRY.groups[0].part_bytes // 4 // 2 // 4
    spec = PoolSpec(num_heads=1, head_dim=page * 4 // CHUNK_TOKENS, tokens_per_block=CHUNK_TOKENS // 4, dtype="float32")
    layout = read_pool_tensor(torch.zeros(16, 1, 2, page, device=device), spec, (0,))
    assert isinstance(layout, Layout)
    return layout


@pytest.fixture
def load(tmp_path: Path, layout: Layout) -> Load:
    """Blocks 0 to 11 are to be filled."""
    options = StoreOptions(chunk_tokens=CHUNK_TOKENS, l1_size_gb=0.001, arena_dir=str(tmp_path / "arenas"))
    store = Store(options)
    register(store, GEOMETRY)
    saved = store.begin_store(GEOMETRY, KEYS, 0)
    assert saved is not None
    copy_in(store.mapping, saved, KEYS, 0)
    store.done(saved.job_id, 0, True)
    job = store.begin_load(GEOMETRY, KEYS, 0)
    assert job is not None
    parts = [PartCopy(0, part.slots, 0, list(range(4 * part.chunk, 4 * part.chunk + 4))) for part in job.parts]
    mover = Mover(store, store.mapping, [layout], options, 0)
    return Load(mover, store, CopyJob(job.job_id, parts), b"".join(bytes_of(KEYS[of.chunk], of, 0) for of in job.parts))


def end(mover: Mover, store: Store) -> None:
    mover.close()
    store.check()
    assert store.stats()["leases"] == 0
    store.close()


def test_on_a_cpu_there_is_no_order_to_rely_on(load: Load) -> None:
    mover, store, job, _ = load
    if not torch.cuda.is_available():
        assert not mover.load_ahead(job, None)
    store.cancel(job.job_id)
    end(mover, store)


def test_a_load_whose_slots_cannot_be_locked_ends(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    mover, store, job, _ = load

    def refuse(_slots: object) -> None:
        raise OSError("no locks available")

    monkeypatch.setattr(store.mapping, "begin_reading", refuse)
    mover.load_beside(job, None)
    mover.flush([job.job_id])
    assert mover.take_ended() == {job.job_id: False}
    end(mover, store)


@pytest.mark.parametrize("is_pinned", [True, False])
def test_a_load_that_needs_no_host_is_begun_by_who_asks_for_it(
    load: Load, layout: Layout, is_pinned: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And only its end is waited for in the thread."""
    mover, store, job, expected = load
    began_in = []
    submit = mover._submit

    def look(*of: Any) -> Any:
        began_in.append(threading.current_thread())
        return submit(*of)

    monkeypatch.setattr(mover, "_submit", look)
    monkeypatch.setattr(mover, "_is_pinned", lambda _job: is_pinned)
    mover.load_beside(job, None)
    mover.flush([job.job_id])
    assert [thread is threading.current_thread() for thread in began_in] == [is_pinned]
    assert mover.take_ended() == {job.job_id: True}
    assert [(told.job_id, told.ok) for told in mover.take_load_ends()] == [(job.job_id, True)]
    assert layout.regions[0].pages[:12].clone().cpu().numpy().tobytes() == expected
    end(mover, store)


@pytest.mark.parametrize(("most", "most_bytes"), [(1, 1 << 30), (8, 3 << 13)])
def test_what_is_much_is_begun_in_the_thread_when_others_have_ended(
    load: Load, most: int, most_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    mover, store, first, _ = load
    monkeypatch.setattr("kvferry.offload.mover._MOST_BEGUN", most)
    monkeypatch.setattr("kvferry.offload.mover._MOST_BEGUN_BYTES", most_bytes)
    monkeypatch.setattr(mover, "_is_pinned", lambda _job: True)
    may_end, began_in, most_begun = threading.Event(), [], [0]
    submit, finish = mover._submit, mover._finish

    def look(*of: Any) -> Any:
        began_in.append(threading.current_thread() is threading.main_thread())
        most_begun[0] = max(most_begun[0], len(mover._begun))
        return submit(*of)

    def hold_back(copies: Any) -> bool:
        assert may_end.wait(30)
        return finish(copies)

    monkeypatch.setattr(mover, "_submit", look)
    monkeypatch.setattr(mover, "_finish", hold_back)
    again = [store.begin_load(GEOMETRY, KEYS, 0) for _ in range(10)]
    jobs = [first, *(CopyJob(job.job_id, first.parts) for job in again if job is not None)]
    for job in jobs:
        mover.load_beside(job, None)
    may_end.set()
    mover.flush([job.job_id for job in jobs])
    assert mover.take_ended() == {job.job_id: True for job in jobs}
    assert sorted(began_in) == [False] * 10 + [True]
    assert most_begun[0] <= most
    end(mover, store)


@pytest.mark.parametrize("is_pinned", [True, False])
def test_a_load_that_cannot_be_begun_ends_once(load: Load, is_pinned: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    mover, store, job, _ = load
    monkeypatch.setattr(mover, "_submit", lambda *_: None)
    monkeypatch.setattr(mover, "_is_pinned", lambda _job: is_pinned)
    mover.load_beside(job, None)
    mover.flush([job.job_id])
    assert mover.take_ended() == {job.job_id: False}
    assert store.stats()["failed_loads"] == 1
    assert store.stats().get("unknown_jobs", 0) == 0
    end(mover, store)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device and a CUDA build of torch")
@pytest.mark.parametrize("is_ordered", [True, False])
def test_a_pass_waits_on_the_device(load: Load, layout: Layout, is_ordered: bool) -> None:
    mover, store, job, expected = load
    stream = torch.cuda.current_stream()
    assert mover._copier.cuda is not None
    with torch.cuda.stream(mover._copier.cuda.streams[Direction.TO_POOL]):
        torch.cuda._sleep(2_000_000_000)  # a second, before which no copy begins
    assert mover.load_ahead(job, mark(stream))
    assert not mover.take_ended()
    if is_ordered:
        mover.order_after_loads(stream)
    seen = layout.regions[0].pages[:12].clone().cpu().numpy().tobytes()
    assert (seen == expected) == is_ordered
    mover.flush([job.job_id])
    assert mover.take_ended() == {job.job_id: True}
    assert [(told.job_id, told.ok) for told in mover.take_load_ends()] == [(job.job_id, True)]
    mover.order_after_loads(stream)
    assert not mover._ahead
    end(mover, store)
