"""Run a cache server, which keeps KV for any number of engines and outlives them.

Engines use it with the preset kvferry-server, by the same URL. What is not given here comes from KVFERRY_<NAME>, the
YAML file and the defaults, as `kvferry config` shows. SIGTERM or Ctrl-C stops it: what waits for the disk is written
first, and no shared memory is left. A second one stops it at once. After a crash the next server with the same arena
folder goes on with what was in memory.

examples:
  kvferry server --l1-size-gb 10
  kvferry server --socket ipc:///run/kvferry/server.sock --disk-path /data/kv --disk-size-gb 200
  kvferry server --quota tenant-7=2 --quota tenant-8=0.5
  kvferry server --host 127.0.0.1 --port 7440 --eviction-policy s3fifo
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import fields
from typing import Final, TypeVar

from kvferry.config import StoreOptions, default_server_url, load_options
from kvferry.errors import ConfigError, StoreError

_Made = TypeVar("_Made")

_HANDOVER_SECONDS: Final = 0.8
_SIGNALS: Final = (signal.SIGINT, signal.SIGTERM)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Where it listens, and what it keeps KV in."""
    parser.add_argument("--socket", metavar="URL", help="ipc:///PATH or tcp://HOST:PORT; default the user's own")
    parser.add_argument("--host", help="with --port: listen on TCP; without keys on this machine's loopback alone")
    parser.add_argument("--port", type=int)
    parser.add_argument("--curve-secret", metavar="FILE", help="the server's secret key, as kvferry keygen writes it")
    parser.add_argument("--curve-clients", metavar="FILE", help="public keys of the only clients that may connect")
    parser.add_argument("--l1-size-gb", type=float, metavar="GB", help="size of the shared memory")
    parser.add_argument("--eviction-policy", choices=("lru", "s3fifo"), help="which chunks leave full memory first")
    chunks = "tokens per chunk; engines must have the same"
    threads = "threads that read and write the disk tier"
    parser.add_argument("--chunk-size", type=int, metavar="TOKENS", dest="chunk_tokens", help=chunks)
    parser.add_argument("--max-workers", type=int, metavar="N", dest="disk_threads", help=threads)
    parser.add_argument("--disk-path", metavar="DIR", help="folder of the disk tier; default none")
    parser.add_argument("--disk-size-gb", type=float, metavar="GB", help="most that the disk tier may occupy")
    parser.add_argument("--arena-dir", metavar="DIR", help="folder of the shared memory; one server each")
    parser.add_argument(
        "--quota",
        action="append",
        default=[],
        type=_quota,
        metavar="SALT=GB",
        help="most memory of requests with a cache salt (repeatable)",
    )
    parser.add_argument(
        "--keep-arena", action="store_true", help="leave what is in memory to the next server, on a stop"
    )
    parser.add_argument("--log-level", choices=("debug", "info", "warning", "error"))


def run(arguments: argparse.Namespace) -> int:
    """Serve until a signal comes."""
    import logging

    from kvferry.observability.log import set_level
    from kvferry.server.answers import Answerer
    from kvferry.server.curve import ServerKeys
    from kvferry.server.endpoint import Endpoint
    from kvferry.server.server import StoreServer
    from kvferry.store.assembly import open_store

    names = {option.name for option in fields(StoreOptions)}  # An argument that sets one has its name.
    given = vars(arguments).items()
    options = load_options({name: value for name, value in given if name in names and value is not None})
    if arguments.disk_size_gb is not None and options.disk_path is None:
        raise ConfigError("--disk-size-gb says how large the disk tier may be: --disk-path says where it is")
    endpoint = Endpoint.parse(_url(arguments, options))
    has_keys = arguments.curve_secret is not None
    keys = ServerKeys.read(arguments.curve_secret, arguments.curve_clients) if has_keys else None
    logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    set_level(options.log_level)
    os.umask(0o077)
    stop = threading.Event()
    for number in _SIGNALS:
        signal.signal(number, lambda *_: stop.set())
    with contextlib.ExitStack() as at_end:
        store = _patiently(lambda: open_store(options, for_server=True, quotas=dict(arguments.quota)))
        at_end.callback(store.close, keep_arena=arguments.keep_arena)
        server = _patiently(lambda: StoreServer(Answerer(store, options), endpoint, keys))
        at_end.callback(server.close)
        for number in _SIGNALS:
            at_end.callback(signal.signal, number, signal.SIG_DFL)
        print(f"kvferry server: {options.l1_size_gb:g} GB at {endpoint.url}", flush=True)
        while not stop.wait(1.0) and server.is_alive:
            pass
    return 0 if stop.is_set() else 1


def _quota(text: str) -> tuple[str, int]:
    """For argparse."""
    salt, _, size = text.rpartition("=")
    try:
        num_bytes = int(float(size) * 1e9)
    except (OverflowError, ValueError):
        num_bytes = 0
    if not salt or num_bytes <= 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not SALT=GB, such as tenant-7=0.5")
    return salt, num_bytes


def _patiently(make: Callable[[], _Made]) -> _Made:
    """A server that was killed a moment ago may not have let go of everything yet."""
    until = time.monotonic() + _HANDOVER_SECONDS
    while True:
        try:
            return make()
        except StoreError:
            if time.monotonic() >= until:
                raise
        time.sleep(_HANDOVER_SECONDS / 20)


def _url(arguments: argparse.Namespace, options: StoreOptions) -> str:
    has_tcp = arguments.host is not None or arguments.port is not None
    if has_tcp and (arguments.socket or arguments.host is None or arguments.port is None):
        raise ConfigError("give --socket, or --host and --port together")
    if has_tcp:
        return f"tcp://{arguments.host}:{arguments.port}"
    return arguments.socket or options.server_url or default_server_url()
