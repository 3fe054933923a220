"""Keys for servers that listen on TCP: CURVE, by ZeroMQ. Knows files and sockets, and no message.

Whoever lacks the server's public key is not answered at all. Where the server has a list of clients' keys, neither is
who is not on it.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import zmq

from kvferry.errors import ConfigError

if TYPE_CHECKING:
    from zmq.auth.thread import ThreadAuthenticator

_KEY_CHARACTERS = 40
"""Of a key in Z85, the form in which ZeroMQ writes them."""


@dataclass(frozen=True, slots=True)
class ServerKeys:
    """secret: the server's. clients: the public keys of those that may connect; None: all that know the server's."""

    secret: bytes
    clients: frozenset[bytes] | None = None

    @classmethod
    def read(cls, secret_file: str, clients_file: str | None) -> ServerKeys:
        """ConfigError: a file is missing, open to others, or holds no keys."""
        return cls(_read_secret(secret_file), frozenset(_read_keys(clients_file)) if clients_file else None)


def write_pair(path: Path) -> bytes:
    """Write a new secret key to `path`, which only its user can read, and its public key to `path`.pub; returns the
    public one. ConfigError: a file is already there or cannot be made."""
    public, secret = zmq.curve_keypair()
    for file, key in ((path, secret), (path.with_name(path.name + ".pub"), public)):
        try:
            descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
        except OSError as error:
            raise ConfigError(f"no key can be written to {file}: {error.strerror}") from error
        with os.fdopen(descriptor, "wb") as stream:
            stream.write(key + b"\n")
    return public


def protect_server(socket: zmq.Socket[Any], keys: ServerKeys) -> ThreadAuthenticator | None:
    """To be called before `socket` is bound. What is returned is to be stopped before its context ends."""
    socket.curve_server = True
    socket.curve_secretkey = keys.secret
    if keys.clients is None:
        return None
    from zmq.auth.thread import ThreadAuthenticator

    guard = ThreadAuthenticator(socket.context)
    guard.start()
    listed = keys.clients
    guard.configure_curve_callback(credentials_provider=SimpleNamespace(callback=lambda domain, key: key in listed))
    return guard


def protect_client(socket: zmq.Socket[Any], server_key: str, secret_file: str | None) -> None:
    """To be called before `socket` connects. server_key: the server's public key, or a file that holds it. secret_file:
    the client's own key; None: one for this connection. ConfigError: no keys."""
    is_key = len(server_key) == _KEY_CHARACTERS and not Path(server_key).is_file()
    socket.curve_serverkey = server_key.encode() if is_key else _read_keys(server_key)[0]
    public, secret = zmq.curve_keypair()
    if secret_file is not None:
        secret = _read_secret(secret_file)
        public = zmq.curve_public(secret)
    socket.curve_publickey, socket.curve_secretkey = public, secret


def _read_secret(path: str) -> bytes:
    (key, *_) = _read_keys(path)
    if Path(path).stat().st_mode & 0o077:
        raise ConfigError(f"the secret key in {path} is open to other users: chmod 600 {path}")
    return key


def _read_keys(path: str) -> list[bytes]:
    """One key a line."""
    try:
        keys = Path(path).read_bytes().split()
    except OSError as error:
        raise ConfigError(f"no key can be read from {path}: {error.strerror}") from error
    if not keys or any(len(key) != _KEY_CHARACTERS for key in keys):
        raise ConfigError(f"{path} holds no keys of {_KEY_CHARACTERS} characters, as `kvferry keygen` writes them")
    return keys
