"""TCP: on this machine alone, or with keys, without which nobody is answered."""

from __future__ import annotations

import socket
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from kvferry.cli import main
from kvferry.config import StoreOptions
from kvferry.errors import ConfigError
from kvferry.server.answers import Answerer
from kvferry.server.client import StoreClient
from kvferry.server.curve import ServerKeys
from kvferry.server.endpoint import Endpoint
from kvferry.server.server import StoreServer
from kvferry.testing.servers import Served, serve, wait_until


def free_url(host: str = "127.0.0.1") -> str:
    with socket.socket() as taken:
        taken.bind((host, 0))
        return f"tcp://{host}:{taken.getsockname()[1]}"


@pytest.fixture
def keys(tmp_path: Path) -> Path:
    """A folder with the keys of a server, of a client it lists and of one that it does not."""
    for name in ("server", "client", "stranger"):
        assert main(["keygen", str(tmp_path / name)]) == 0
    return tmp_path


@pytest.fixture
def local(tmp_path: Path) -> Iterator[Served]:
    served = serve(tmp_path)
    yield served
    served.close()


@pytest.fixture
def url(keys: Path, local: Served) -> Iterator[str]:
    """Of a server with keys for the store of another."""
    url = free_url()
    known = ServerKeys.read(str(keys / "server"), str(keys / "client.pub"))
    server = StoreServer(Answerer(local.store, StoreOptions(chunk_tokens=16)), Endpoint.parse(url), known)
    yield url
    server.close()


def answers(client: StoreClient) -> bool:
    return client._attendance.await_on()


def test_with_both_keys_it_answers(url: str, keys: Path, make_client: Callable[..., StoreClient]) -> None:
    server_key = (keys / "server.pub").read_text().strip()
    for key in (server_key, str(keys / "server.pub")):
        assert answers(make_client(url, server_key=key, client_secret=str(keys / "client"), connect_deadline_seconds=5))


@pytest.mark.parametrize("wrong", ["none", "server", "client", "anonymous"])
def test_with_a_wrong_key_nothing_is_answered(
    url: str, keys: Path, make_client: Callable[..., StoreClient], wrong: str
) -> None:
    options = {
        "none": {},
        "server": {"server_key": str(keys / "stranger.pub"), "client_secret": str(keys / "client")},
        "client": {"server_key": str(keys / "server.pub"), "client_secret": str(keys / "stranger")},
        "anonymous": {"server_key": str(keys / "server.pub")},
    }
    assert not answers(make_client(url, connect_deadline_seconds=0.3, **options[wrong]))


def test_without_a_list_the_server_s_key_is_enough(
    keys: Path, local: Served, make_client: Callable[..., StoreClient]
) -> None:
    url = free_url()
    known = ServerKeys.read(str(keys / "server"), None)
    server = StoreServer(Answerer(local.store, StoreOptions(chunk_tokens=16)), Endpoint.parse(url), known)
    client = make_client(url, server_key=str(keys / "server.pub"), connect_deadline_seconds=5)
    assert answers(client)
    server.close()
    wait_until(lambda: not client.is_alive())


def test_a_client_s_key_that_cannot_be_read_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no key can be read"):
        StoreClient(free_url(), StoreOptions(server_key=str(tmp_path / "missing")))


def test_other_machines_need_keys() -> None:
    with pytest.raises(ConfigError, match="takes keys"):
        StoreServer(None, Endpoint.parse(free_url("0.0.0.0")))


def test_keys_are_the_user_s_own(keys: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert stat.S_IMODE((keys / "server").stat().st_mode) == 0o600
    assert main(["keygen", str(keys / "server")]) == 2
    assert "no key can be written" in capsys.readouterr().err
    (keys / "server").chmod(0o644)
    with pytest.raises(ConfigError, match="open to other users"):
        ServerKeys.read(str(keys / "server"), None)
    (keys / "text").write_text("not a key")
    with pytest.raises(ConfigError, match="holds no keys"):
        ServerKeys.read(str(keys / "text"), None)
    with pytest.raises(ConfigError, match="no key can be read"):
        ServerKeys.read(str(keys / "missing"), None)
