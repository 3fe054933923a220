"""What a server lets in and what it answers, down to single messages."""

from __future__ import annotations

import contextlib
import os
import socket as sockets
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import zmq

from kvferry.blocks import Geometry, GroupKind, GroupSpec, Tier
from kvferry.config import StoreOptions, default_server_url
from kvferry.errors import ConfigError, InvariantError, StoreError
from kvferry.server import sessions
from kvferry.server.answers import Answerer
from kvferry.server.endpoint import Endpoint
from kvferry.server.protocol import (
    MOST_MESSAGE_BYTES,
    UNNUMBERED,
    VERSION,
    Answer,
    AskMatch,
    AskStats,
    Beat,
    BeginStore,
    Begun,
    Bye,
    Done,
    Found,
    Hello,
    JobDone,
    Question,
    Refused,
    Register,
    Stranger,
    Values,
    Welcome,
    decode_answer,
    encode,
    join_keys,
)
from kvferry.server.server import StoreServer
from kvferry.server.sessions import SILENCE_SECONDS, greeting
from kvferry.store.base import Match
from kvferry.store.keys import root_key
from kvferry.testing.servers import Served, ServerProcess, serve, wait_until

GEOMETRY = Geometry("weights", "layout", 16, 1, (GroupSpec(GroupKind.FULL, (0,), 4096),))
ROOT = root_key(GEOMETRY)
KEYS = [bytes([number]) * 32 for number in range(3)]
SOON_SECONDS = 60.0


class Peer:
    """A client by hand."""

    def __init__(self, url: str, name: bytes = b"q" + 16 * b"p") -> None:
        self.context = zmq.Context(io_threads=1)
        self.socket = self.context.socket(zmq.DEALER)
        self.socket.routing_id = name
        self.socket.linger = 0
        self.socket.rcvtimeo = int(1000 * SOON_SECONDS)
        self.socket.connect(url)

    def send(self, *frames: bytes) -> None:
        self.socket.send_multipart(frames)

    def receive(self) -> tuple[int, Answer]:
        return decode_answer(self.socket.recv())

    def ask(self, question: Question, number: int = 5) -> Answer:
        self.send(encode((number, time.monotonic() + SOON_SECONDS, question)))
        answered, answer = self.receive()
        assert answered == number
        return answer

    def greet(self) -> None:
        assert isinstance(self.ask(greeting(VERSION, time.monotonic(), "peer")), Welcome)

    def stats(self) -> dict[str, float]:
        answer = self.ask(AskStats())
        assert isinstance(answer, Values)
        return answer.values

    def close(self) -> None:
        self.socket.close()
        self.context.term()


@pytest.fixture
def make_peer(served: Served) -> Iterator[Callable[..., Peer]]:
    with contextlib.ExitStack() as stack:

        def make(**arguments: Any) -> Peer:
            peer = Peer(served.url, **arguments)
            stack.callback(peer.close)
            return peer

        yield make


@pytest.fixture
def peer(make_peer: Callable[..., Peer]) -> Peer:
    """One that has been greeted."""
    peer = make_peer()
    peer.greet()
    return peer


# -- where it listens ------------------------------------------------------------------------------------------------


def test_only_the_user_may_open_the_socket(tmp_path: Path) -> None:
    served = serve(tmp_path / "made", arena_dir=str(tmp_path / "arena"))
    path = Path(served.url.removeprefix("ipc://"))
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.with_name(path.name + ".lock").stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    served.close()


def test_a_folder_that_everybody_may_change_holds_no_socket(tmp_path: Path) -> None:
    tmp_path.chmod(0o777)
    with pytest.raises(StoreError, match="other users"):
        StoreServer(None, Endpoint.parse(f"ipc://{tmp_path / 'server.sock'}"))


@pytest.mark.skipif(os.getuid() != 0, reason="only root may give files away")
def test_what_is_another_user_s_is_not_trusted(served: Served, tmp_path: Path) -> None:
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    os.chown(theirs, 12345, 12345)
    with pytest.raises(StoreError, match="other users"):
        StoreServer(None, Endpoint.parse(f"ipc://{theirs / 'server.sock'}"))
    theirs.rmdir()
    os.chown(served.url.removeprefix("ipc://"), 12345, 12345)
    with pytest.raises(StoreError, match="belongs to user 12345"):
        Endpoint.parse(served.url).check_owner()


def test_a_server_that_lives_keeps_its_socket(served: Served, make_peer: Callable[..., Peer]) -> None:
    with pytest.raises(StoreError, match="another server listens"):
        StoreServer(None, Endpoint.parse(served.url))
    make_peer().greet()


def test_the_socket_of_a_dead_server_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "server.sock"
    with sockets.socket(sockets.AF_UNIX) as left:
        left.bind(str(path))
    path.with_name("server.sock.lock").touch()
    served = serve(tmp_path)
    peer = Peer(served.url)
    peer.greet()
    peer.close()
    served.close()
    assert not path.exists()


def test_a_socket_that_cannot_be_made_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StoreError, match="no socket"):
        StoreServer(None, Endpoint.parse(f"ipc://{tmp_path / 'file' / 'server.sock'}"))


@pytest.mark.parametrize(
    "url", ["", "ipc://relative", "http://127.0.0.1:80", "tcp://127.0.0.1", "tcp://h:x", f"ipc:///{'x' * 200}"]
)
def test_what_is_no_url_is_said(url: str) -> None:
    with pytest.raises(ConfigError, match="server URL"):
        Endpoint.parse(url)


def test_the_default_url_is_the_user_s_own() -> None:
    assert default_server_url({"XDG_RUNTIME_DIR": "/run/user/7"}) == "ipc:///run/user/7/kvferry/server.sock"
    assert f"kvferry-{os.getuid()}/server.sock" in default_server_url({})


# -- what it answers -------------------------------------------------------------------------------------------------


def test_a_session(served: Served, peer: Peer) -> None:
    assert peer.ask(Register("engine", 0, GEOMETRY)) == Done()
    begun = peer.ask(BeginStore(ROOT, join_keys(KEYS), 0))
    assert isinstance(begun, Begun)
    assert begun.job is not None
    assert peer.ask(JobDone(begun.job.job_id, 0, True)) == Done()
    assert peer.ask(AskMatch(ROOT, join_keys(KEYS))) == Found(Match(3, (Tier.MEMORY,) * 3))
    peer.send(encode((UNNUMBERED, 0.0, Bye())))
    assert peer.ask(AskMatch(ROOT, join_keys(KEYS))) == Stranger()
    assert served.store.geometry("engine") is None


def test_whoever_has_not_said_hello_is_a_stranger(make_peer: Callable[..., Peer]) -> None:
    peer = make_peer()
    assert peer.ask(AskMatch(ROOT, b"")) == Stranger()
    peer.send(encode((UNNUMBERED, 0.0, JobDone(1, 0, True))))
    peer.greet()
    assert peer.stats()["server_strangers"] == 2


def test_hello_with_another_version_or_clock_is_refused(make_peer: Callable[..., Peer]) -> None:
    peer = make_peer()
    for hello, reason in (
        (greeting(999, time.monotonic(), ""), "version"),
        (greeting(VERSION, time.monotonic() + 1e6, ""), "another machine"),
    ):
        answer = peer.ask(hello)
        assert isinstance(answer, Refused)
        assert reason in answer.reason


def test_a_server_without_a_store_says_so(tmp_path: Path) -> None:
    url = f"ipc://{tmp_path / 'server.sock'}"
    server = StoreServer(None, Endpoint.parse(url))
    peer = Peer(url)
    assert peer.ask(greeting(VERSION, time.monotonic(), "")) == Refused("there is no store")
    peer.close()
    server.close()


@pytest.mark.parametrize(
    "frames",
    [
        (b"",),
        (b"\xc1",),
        (encode([1, 2, 3]),),
        (encode((1, 0.0, ["Nonsense"])),),
        (encode((1, 0.0, ["AskMatch", ROOT])),),
        (encode((1, 0.0, Beat())), b"and more"),
        (os.urandom(1000),),
        (b"\x81" * 100_000,),
    ],
)
def test_messages_of_no_protocol_are_refused(peer: Peer, frames: tuple[bytes, ...]) -> None:
    peer.send(*frames)
    number, answer = peer.receive()
    assert number == UNNUMBERED
    assert isinstance(answer, Refused)
    assert peer.stats()["server_undecodable"] == 1


@pytest.mark.parametrize(
    "question",
    [
        AskMatch(32 * b"?", join_keys(KEYS)),
        AskMatch(ROOT, b"no key"),
        BeginStore(ROOT, join_keys(KEYS) + b"?", 0),
        Register("engine", 7, GEOMETRY),
        Register("engine", 0, Geometry("weights", "layout", 32, 1, GEOMETRY.groups)),
        Register("engine", 0, Geometry("weights", "layout", 16, 1, ())),
        Register("engine", 0, Geometry("weights", "layout", 16, 1 << 40, GEOMETRY.groups)),
        Register("engine", 0, Geometry("weights", "layout", 16, 1, GEOMETRY.groups * 5000)),
        Register("engine", 0, Geometry("weights", "layout", 16, 1, (GroupSpec(GroupKind.FULL, (0,), 1 << 60),))),
    ],
)
def test_what_cannot_be_is_refused(served: Served, peer: Peer, question: Question) -> None:
    assert peer.ask(Register("other", 0, GEOMETRY)) == Done()
    assert isinstance(peer.ask(question), Refused)
    assert peer.stats()["server_refused"] == 1
    served.store.check()


def test_a_message_that_is_too_long_ends_the_connection_alone(peer: Peer, make_peer: Callable[..., Peer]) -> None:
    other = make_peer(name=b"q" + 16 * b"o")
    other.greet()
    peer.send(encode((7, time.monotonic() + SOON_SECONDS, AskMatch(ROOT, bytes(MOST_MESSAGE_BYTES)))))
    assert other.ask(Beat()) == Done()
    assert peer.ask(Beat()) == Done()  # The connection was made again.


def test_what_nobody_waits_for_any_more_is_not_done(served: Served, peer: Peer) -> None:
    assert peer.ask(Register("engine", 0, GEOMETRY)) == Done()
    peer.send(encode((6, time.monotonic() - 0.001, BeginStore(ROOT, join_keys(KEYS), 0))))
    assert peer.stats()["server_stale_questions"] == 1
    assert served.store.stats()["leases"] == 0


def test_random_bytes_in_place_of_each_message_do_no_harm(served: Served, peer: Peer) -> None:
    valid = encode((3, time.monotonic() + SOON_SECONDS, Register("engine", 0, GEOMETRY)))
    for position in range(len(valid)):
        peer.send(valid[:position] + os.urandom(1) + valid[position + 1 :])
    last = 1 << 40
    peer.send(encode((last, time.monotonic() + SOON_SECONDS, Beat())))
    while peer.receive()[0] != last:
        pass
    served.store.check()
    peer.greet()


# -- who dies --------------------------------------------------------------------------------------------------------


def leases(served: Served) -> float:
    return served.store.stats()["leases"]


def begin(peer: Peer) -> None:
    peer.greet()
    assert peer.ask(Register("engine", 0, GEOMETRY)) == Done()
    begun = peer.ask(BeginStore(ROOT, join_keys(KEYS), 0))
    assert isinstance(begun, Begun)
    assert begun.job is not None


@pytest.mark.usefixtures("real_limits")
def test_a_silent_client_loses_its_leases(served: Served, peer: Peer) -> None:
    begin(peer)
    start = time.monotonic()
    assert leases(served) == 1
    wait_until(lambda: leases(served) == 0)
    assert SILENCE_SECONDS - 0.2 <= time.monotonic() - start < SILENCE_SECONDS + 15
    assert peer.ask(Beat()) == Stranger()


CLIENT_IN_A_PROCESS = """
import sys, time
from tests.server.test_server import Peer, begin
begin(Peer(sys.argv[1], b"q" + 16 * b"z"))
print("leased", flush=True)
time.sleep(60)
"""


def test_a_killed_client_loses_its_leases_at_once(served: Served) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", CLIENT_IN_A_PROCESS, served.url], stdout=subprocess.PIPE, cwd=Path(__file__).parents[2]
    )
    assert process.stdout is not None
    assert process.stdout.readline() == b"leased\n"
    assert leases(served) == 1
    process.kill()
    start = time.monotonic()
    wait_until(lambda: leases(served) == 0)
    assert time.monotonic() - start < sessions.SILENCE_SECONDS / 2, "it is not its silence that tells"
    process.communicate()


def test_a_client_that_greets_again_begins_anew(served: Served, peer: Peer) -> None:
    begin(peer)
    peer.greet()
    assert leases(served) == 0
    assert served.store.geometry("engine") is None


def test_a_clock_that_stood_still_ends_no_session(served: Served, peer: Peer) -> None:
    """As after SIGSTOP: the server itself did not run, so it cannot have heard anybody."""
    begin(peer)
    served.server._last_sweep -= 100.0
    time.sleep(0.3)
    assert leases(served) == 1


def test_the_process_maps_no_torch(tmp_path: Path) -> None:
    process = ServerProcess(tmp_path, "--l1-size-gb", "0.002")
    mapped = Path(f"/proc/{process.popen.pid}/maps").read_text()
    assert "libzmq" in mapped
    assert "libtorch" not in mapped
    process.stop()


def test_options_of_another_chunk_size_are_named(tmp_path: Path) -> None:
    served = serve(tmp_path)
    answerer = Answerer(served.store, StoreOptions(chunk_tokens=64))
    client = 16 * b"c"
    assert isinstance(answerer.answer(client, Hello(VERSION, 1, 0, 0, time.monotonic(), "")), Welcome)
    answer = answerer.answer(client, Register("engine", 0, GEOMETRY))
    assert isinstance(answer, Refused)
    assert "chunk_tokens=64" in answer.reason
    for session in answerer.sessions:
        answerer.end(session, "ends with the test")
    served.close()


def test_books_are_looked_at_when_nobody_asks(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    now = 1000.0
    served = serve(tmp_path)
    answerer = Answerer(served.store, StoreOptions(chunk_tokens=16), clock=lambda: now)
    client = 16 * b"c"
    answerer.answer(client, greeting(VERSION, now, ""))
    answerer.answer(client, Register("engine", 0, GEOMETRY))
    num_checks = 0

    def check() -> None:
        nonlocal num_checks
        num_checks += 1
        raise InvariantError("two entries in one slot")

    served.store.check, kept = check, served.store.check  # type: ignore[method-assign]
    answerer.check_when_idle()
    assert num_checks == 0, "somebody has just asked"
    now += 10
    answerer.check_when_idle()
    answerer.check_when_idle()
    assert num_checks == 1, "nothing has changed since"
    assert answerer.meter.snapshot()["server_broken_invariants"] == 1
    assert "two entries in one slot" in caplog.text
    answerer.answer(client, AskMatch(ROOT, b""))
    now += 10
    answerer.check_when_idle()
    assert num_checks == 1, "not so soon again"
    now += 100
    answerer.check_when_idle()
    assert num_checks == 2
    served.store.check = kept  # type: ignore[method-assign]
    for session in answerer.sessions:
        answerer.end(session, "ends with the test")
    served.close()
