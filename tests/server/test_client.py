"""A client with a server that comes, goes, hangs or was never there: whatever happens is a miss in time."""

from __future__ import annotations

import logging
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from kvferry.blocks import Geometry, GroupKind, GroupSpec, Tier
from kvferry.errors import ConfigError, InvariantError
from kvferry.server.client import StoreClient
from kvferry.server.endpoint import Endpoint
from kvferry.server.server import StoreServer
from kvferry.store.base import Match, PollResult
from kvferry.store.store import Store
from kvferry.testing.servers import Served, ServerProcess, serve, wait_until

GEOMETRY = Geometry("weights", "layout", 16, 1, (GroupSpec(GroupKind.FULL, (0,), 4096),))
TWO_RANKS = Geometry("weights", "layout", 16, 2, (GroupSpec(GroupKind.FULL, (0,), 4096),))
KEYS = [bytes([number]) * 32 for number in range(3)]
MakeClient = Callable[..., StoreClient]
DEFAULTS = {"connect_deadline_seconds": 5.0, "match_deadline_seconds": 0.02, "job_deadline_seconds": 0.05}


def said(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


def save(client: StoreClient, keys: list[bytes] = KEYS) -> bool:
    """Store what is lacking, with whatever bytes there are. False: no answer came in time."""
    job = client.begin_store(GEOMETRY, keys, 0)
    if job is not None:
        client.done(job.job_id, 0, True)
    return job is not None


def has_saved(client: StoreClient) -> bool:
    """Look whether all is stored, and do what is lacking: to be asked again."""
    return client.match(GEOMETRY, KEYS).num_chunks == len(KEYS) or (save(client) and False)


def test_ranks_agree_before_the_scheduler_hears_of_it(served: Served, make_client: MakeClient) -> None:
    scheduler, *ranks = [make_client(served.url) for _ in range(3)]
    ranks[0].register("engine", 0, TWO_RANKS)
    assert scheduler.geometry("engine") is None
    ranks[1].register("engine", 1, TWO_RANKS)
    wait_until(lambda: scheduler.geometry("engine") == TWO_RANKS)
    job = scheduler.begin_store(TWO_RANKS, KEYS, 0)
    assert job is not None
    for number, rank in enumerate(ranks):
        assert scheduler.match(TWO_RANKS, KEYS) == Match(0)
        rank.done(job.job_id, number, True)
        rank.stats()
    assert scheduler.match(TWO_RANKS, KEYS) == Match(3, (Tier.MEMORY,) * 3)


def test_what_the_store_refuses_is_the_client_s_error(served: Served, make_client: MakeClient) -> None:
    client = make_client(served.url)
    with pytest.raises(ConfigError, match="impossible geometry"):
        client.register("engine", 7, GEOMETRY)
    client.register("engine", 0, GEOMETRY)
    assert save(client)


def test_what_cannot_be_is_the_client_s_error(
    served: Served, make_client: MakeClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = make_client(served.url)
    client.register("engine", 0, GEOMETRY)

    def broken(store: Store) -> None:
        raise InvariantError("two entries in one slot")

    with monkeypatch.context() as patch:
        patch.setattr(Store, "check", broken)
        with pytest.raises(InvariantError, match="two entries"):
            client.check()


def test_without_a_server_everything_is_a_miss_at_once(
    tmp_path: Path, make_client: MakeClient, caplog: pytest.LogCaptureFixture
) -> None:
    url = f"ipc://{tmp_path / 'server.sock'}"

    def first_answers() -> float:
        start = time.monotonic()
        client = make_client(url, connect_deadline_seconds=0.3)
        client.register("engine", 0, GEOMETRY)
        assert client.geometry("engine") is None
        return time.monotonic() - start

    assert min(first_answers() for _ in range(4)) < 0.5, "both wait within one deadline"
    client = make_client(url, connect_deadline_seconds=0.2)
    client.register("engine", 0, GEOMETRY)
    start = time.monotonic()
    for _ in range(100):
        assert client.match(GEOMETRY, KEYS) == Match(0)
        assert client.begin_load(GEOMETRY, KEYS, 0) is None
        assert client.begin_store(GEOMETRY, KEYS, 0) is None
        client.done(1, 0, True)
        client.cancel(1)
        assert client.poll(1.0) == PollResult()
        client.check()
    assert time.monotonic() - start < 15.0, "two answers would be waited for longer"
    wait_until(lambda: len(said(caplog)) >= 5)
    assert ["serving without" in message for message in said(caplog)] == [True] * 5, "each client says it once"


def test_a_server_that_comes_later_is_used(
    tmp_path: Path, make_client: MakeClient, caplog: pytest.LogCaptureFixture
) -> None:
    client = make_client(f"ipc://{tmp_path / 'server.sock'}", connect_deadline_seconds=0.01, maps_arena=True)
    client.register("engine", 0, GEOMETRY)
    assert client.geometry("engine") is None
    wait_until(lambda: len(said(caplog)) == 1)
    served = serve(tmp_path)
    wait_until(lambda: client.geometry("engine") == GEOMETRY and client.is_alive())
    assert client.has_other_arena
    assert client.take_arena().info == served.store.arena()
    assert not client.has_other_arena
    assert save(client)
    assert client.match(GEOMETRY, KEYS).num_chunks == 3
    assert [message.rsplit(maxsplit=2)[-1] for message in said(caplog)] == ["comes", "back"]
    served.close()
    wait_until(lambda: not client.is_alive())


def test_a_server_without_a_store_is_not_waited_for(
    tmp_path: Path, make_client: MakeClient, caplog: pytest.LogCaptureFixture
) -> None:
    url = f"ipc://{tmp_path / 'server.sock'}"
    server = StoreServer(None, Endpoint.parse(url))
    start = time.monotonic()
    client = make_client(url, connect_deadline_seconds=30.0)
    client.register("engine", 0, GEOMETRY)
    assert time.monotonic() - start < 10.0
    assert "there is no store" in said(caplog)[0]
    server.close()


def test_an_arena_that_cannot_be_mapped_is_no_use(
    served: Served, make_client: MakeClient, caplog: pytest.LogCaptureFixture
) -> None:
    Path(served.store.arena().path).unlink()
    client = make_client(served.url, connect_deadline_seconds=0.2, maps_arena=True)
    client.register("engine", 0, GEOMETRY)
    assert client.match(GEOMETRY, KEYS) == Match(0)
    assert not client.has_other_arena
    wait_until(lambda: len(said(caplog)) == 1)
    assert "cannot be opened" in said(caplog)[0]


class Mute:
    """A server that greets, and then answers as it is told to."""

    def __init__(self, served: Served) -> None:
        self.answers = True
        take = served.server._take

        def take_or_not(routing_id: bytes, frames: list[bytes]) -> None:
            if self.answers or routing_id[:1] == b"a":
                take(routing_id, frames)

        served.server._take = take_or_not  # type: ignore[method-assign]


@pytest.mark.usefixtures("real_limits")
def test_a_server_that_does_not_answer_is_soon_not_asked(
    served: Served, make_client: MakeClient, caplog: pytest.LogCaptureFixture
) -> None:
    client = make_client(served.url, **DEFAULTS)
    client.register("engine", 0, GEOMETRY)
    wait_until(lambda: has_saved(client))
    mute = Mute(served)
    caplog.clear()
    mute.answers = False
    start = time.monotonic()
    for _ in range(1000):
        assert client.match(GEOMETRY, KEYS) == Match(0)
    assert time.monotonic() - start < 15.0, "three deadlines of 20 ms, and not a thousand"
    assert client.stats()["client_unanswered"] >= 3
    mute.answers = True
    wait_until(lambda: client.match(GEOMETRY, KEYS).num_chunks == 3)
    assert len(said(caplog)) == 2
    assert said(caplog)[1].endswith("is back")


def test_a_job_that_comes_too_late_is_given_back(served: Served, make_client: MakeClient) -> None:
    client = make_client(served.url, **DEFAULTS)
    client.register("engine", 0, GEOMETRY)
    begin_store, num_leases = served.store.begin_store, []

    def slow(*arguments: Any, **named: Any) -> Any:
        time.sleep(0.1)
        job = begin_store(*arguments, **named)
        num_leases.append(served.store.stats()["leases"])
        return job

    served.store.begin_store = slow  # type: ignore[method-assign]
    assert client.begin_store(GEOMETRY, KEYS, 0) is None
    wait_until(lambda: num_leases == [1])
    wait_until(lambda: served.store.stats()["leases"] == 0)


def test_questions_wait_for_nothing_but_their_answer(served: Served, make_client: MakeClient) -> None:
    """The thread that keeps the session holds no lock while it waits for the server."""
    client = make_client(served.url)
    client.register("engine", 0, GEOMETRY)
    in_beat, may_go = threading.Event(), threading.Event()
    ask = client._attendance_link.ask

    def held(*arguments: object) -> object:
        in_beat.set()
        may_go.wait(60)
        return ask(*arguments)  # type: ignore[arg-type]

    client._attendance_link.ask = held  # type: ignore[method-assign, assignment]
    assert in_beat.wait(60)
    assert save(client)
    assert client.match(GEOMETRY, KEYS).num_chunks == 3
    may_go.set()


# -- a server in a process of its own --------------------------------------------------------------------------------


@pytest.fixture
def process(tmp_path: Path) -> Iterator[ServerProcess]:
    with ServerProcess(tmp_path, "--chunk-size", "16", "--l1-size-gb", "0.002") as process:
        yield process


def test_killed_and_started_again(
    process: ServerProcess, make_client: MakeClient, caplog: pytest.LogCaptureFixture
) -> None:
    client = make_client(process.url, maps_arena=True, **DEFAULTS)
    client.register("engine", 0, GEOMETRY)
    assert client.geometry("engine") == GEOMETRY
    first = client.take_arena().info
    wait_until(lambda: has_saved(client))
    process.kill()
    start = time.monotonic()
    while client.is_alive():
        assert client.match(GEOMETRY, KEYS) in {Match(0), Match(3, (Tier.MEMORY,) * 3)}
    assert time.monotonic() - start < 15.0, "0.1 if the machine does not stand still"
    process.start()
    wait_until(client.is_alive)
    again = client.take_arena().info
    assert (again.path, again.boot_id == first.boot_id) == (first.path, False)
    wait_until(
        lambda: client.match(GEOMETRY, KEYS).num_chunks == 3
    )  # Its memory was taken over: nothing is saved anew.
    wait_until(lambda: save(client, [*KEYS, b"?" * 32]))
    assert ["not used for now" in message for message in said(caplog)[::2]] == [True] * (len(said(caplog)) // 2)
    assert {message.rsplit(maxsplit=1)[-1] for message in said(caplog)[1::2]} == {"back"}


@pytest.mark.usefixtures("real_limits")
def test_stopped_and_continued(process: ServerProcess, make_client: MakeClient) -> None:
    client = make_client(process.url, **DEFAULTS)
    client.register("engine", 0, GEOMETRY)
    wait_until(lambda: has_saved(client))
    process.signal(signal.SIGSTOP)
    start = time.monotonic()
    while client.is_alive():
        time.sleep(0.001)
    assert time.monotonic() - start < 15.0, "0.15 if the machine does not stand still"
    assert client.match(GEOMETRY, KEYS) == Match(0)
    assert client.begin_load(GEOMETRY, KEYS, 0) is None
    time.sleep(1.0)
    process.signal(signal.SIGCONT)
    wait_until(lambda: client.match(GEOMETRY, KEYS).num_chunks == 3)
    wait_until(lambda: client.stats().get("leases") == 0)


@pytest.mark.usefixtures("real_limits")
def test_a_load_whose_server_ends_fails_at_once(served: Served, make_client: MakeClient) -> None:
    client = make_client(served.url)
    client.register("engine", 0, GEOMETRY)
    client._awaited[123] = time.monotonic() + 60.0
    threading.Timer(0.1, served.server.close).start()
    start = time.monotonic()
    assert client.poll(60.0) == PollResult(failed=(123,))
    assert time.monotonic() - start < 15.0, "0.15 if the machine does not stand still"
    served.server = StoreServer(None, Endpoint.parse(served.url))


def test_jobs_that_are_not_answered_are_not_asked_for_a_third_time(served: Served, make_client: MakeClient) -> None:
    """Matches that are answered in between change nothing about it."""
    client = make_client(served.url, **DEFAULTS)
    client.register("engine", 0, GEOMETRY)
    wait_until(lambda: has_saved(client))
    begin_load, num_asked = served.store.begin_load, 0

    def slow(*arguments: Any, **named: Any) -> Any:
        nonlocal num_asked
        num_asked += 1
        time.sleep(0.06)
        return begin_load(*arguments, **named)

    served.store.begin_load = slow  # type: ignore[method-assign]
    client._attendance._go_on = lambda: None  # type: ignore[method-assign] # however long this takes, it stays off
    start = time.monotonic()
    for _ in range(4):
        if client.match(GEOMETRY, KEYS).num_chunks:
            assert client.begin_load(GEOMETRY, KEYS, 0) is None
    assert time.monotonic() - start < 15.0
    assert num_asked <= 2
    wait_until(lambda: served.store.stats()["leases"] == 0)
