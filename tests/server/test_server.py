"""A store's server and its client, over a socket of their own."""

from __future__ import annotations

import stat
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import zmq

from kvferry.blocks import Geometry, GroupKind, GroupSpec
from kvferry.config import StoreOptions
from kvferry.errors import ConfigError, StoreError
from kvferry.server.client import StoreClient
from kvferry.server.protocol import Hello, Refused, decode_answer, encode
from kvferry.server.server import StoreServer
from kvferry.store.store import Store

GEOMETRY = Geometry("weights", "layout", 16, 2, (GroupSpec(GroupKind.FULL, (0,), 4096),))
KEYS = [bytes([number]) * 32 for number in range(3)]


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    store = Store(StoreOptions(l1_size_gb=0.002, arena_dir=str(tmp_path / "arena")))
    yield store
    store.check()
    store.close()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "store.sock"


@pytest.fixture
def server(store: Store, path: Path) -> Iterator[StoreServer]:
    server = StoreServer(store, path)
    yield server
    server.close()
    assert not path.exists()
    assert not [thread for thread in threading.enumerate() if thread.name == "kvferry-server"]


@pytest.fixture
def client(server: StoreServer, path: Path) -> Iterator[StoreClient]:
    client = StoreClient(path)
    yield client
    client.close()


def test_only_the_user_may_open_the_socket(server: StoreServer, path: Path) -> None:
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_ranks_register_and_end_jobs(store: Store, client: StoreClient) -> None:
    assert client.arena() == store.arena()
    store.register("engine", 0, GEOMETRY)
    assert store.geometry("engine") is None
    client.register("engine", 1, GEOMETRY)
    assert store.geometry("engine") == GEOMETRY
    job = store.begin_store(GEOMETRY, KEYS, 0)
    assert job is not None
    store.done(job.job_id, 0, True)
    client.done(job.job_id, 1, True)
    client.register("engine", 1, GEOMETRY)  # answered after what was said before it
    assert store.match(GEOMETRY, KEYS).num_chunks == 3
    assert store.stats()["leases"] == 0


def test_what_the_store_refuses_is_the_client_s_error(store: Store, client: StoreClient) -> None:
    with pytest.raises(ConfigError, match="impossible geometry"):
        client.register("engine", 7, GEOMETRY)


def test_without_a_server_a_client_gives_up(path: Path) -> None:
    with pytest.raises(StoreError, match="no answer"):
        StoreClient(path, setup_seconds=0.05)


def test_a_server_without_a_store_says_so_at_once(path: Path) -> None:
    server = StoreServer(None, path)
    with pytest.raises(StoreError, match="there is no store"):
        StoreClient(path)
    server.close()


def test_a_client_may_come_before_its_server(store: Store, path: Path) -> None:
    made: list[StoreClient] = []
    thread = threading.Thread(target=lambda: made.append(StoreClient(path)))
    thread.start()
    server = StoreServer(store, path)
    thread.join()
    made[0].close()
    server.close()


@pytest.mark.parametrize("message", [b"", b"\xc1", encode((1, {"type": "Nonsense"})), encode([1, 2, 3])])
def test_messages_of_no_protocol_are_ignored(server: StoreServer, path: Path, message: bytes) -> None:
    with zmq.Context() as context, context.socket(zmq.DEALER) as socket:
        socket.connect(f"ipc://{path}")
        socket.send(message)
        socket.send(encode((5, Hello(version=999))))
        number, answer = decode_answer(socket.recv())
    assert number == 5
    assert isinstance(answer, Refused)
    assert "version" in answer.reason


def test_a_socket_that_cannot_be_made_is_an_error(store: Store, tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="no socket"):
        StoreServer(store, tmp_path / "missing" / "store.sock")
