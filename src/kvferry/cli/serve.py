"""Serve a model over HTTP, in the shape of OpenAI's API.

MODEL is a folder in the layout of Hugging Face, a .gguf file, or a name on the hub. The address is printed once the
server answers. Ctrl-C or SIGTERM lets requests end for a while, then ends them, and keeps what the connector keeps.

examples:
  kvferry serve HuggingFaceTB/SmolLM2-135M-Instruct --connector kvferry
  kvferry serve ./model --config engine.yaml --host 0.0.0.0 --port 9000 --served-model-name my-model

asking it:
  curl http://127.0.0.1:8000/v1/chat/completions -H 'Content-Type: application/json' \\
    -d '{"messages": [{"role": "user", "content": "Why is the sky blue?"}], "max_tokens": 50}'
  python -c 'from openai import OpenAI; c = OpenAI(base_url="http://127.0.0.1:8000/v1", api_key="none"); \\
    print(c.completions.create(model=c.models.list().data[0].id, prompt="Once upon a time").choices[0].text)'

engine.yaml holds the keyword arguments of kvferry.LLM; `kvferry generate --help` shows one.
"""

from __future__ import annotations

import argparse
import contextlib
import signal
import socket
import sys
from collections.abc import Iterator
from importlib import import_module

from kvferry.cli.engine import add_engine_arguments, engine_options, set_up_output
from kvferry.errors import ConfigError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Engine, address and limits."""
    add_engine_arguments(parser)
    server = parser.add_argument_group("server")
    server.add_argument("--host", default="127.0.0.1", help="address to listen on (default %(default)s)")
    server.add_argument("--port", type=int, default=8000, help="0 takes a free one (default %(default)s)")
    server.add_argument("--served-model-name", metavar="NAME", help="what clients call the model (default MODEL)")
    server.add_argument(
        "--max-queued",
        type=int,
        default=1024,
        metavar="N",
        help="most requests that wait; then clients get status 429 (default %(default)s)",
    )
    server.add_argument(
        "--grace-seconds",
        type=float,
        default=5.0,
        metavar="S",
        help="how long requests may go on after Ctrl-C or SIGTERM (default %(default)s)",
    )


def run(arguments: argparse.Namespace) -> int:
    """Serve until told to end."""
    for package in ("fastapi", "prometheus_client", "uvicorn"):
        import_module(package)  # what is not installed is said before the model is loaded
    if arguments.max_queued < 1 or not 0 <= arguments.grace_seconds < float("inf"):
        raise ConfigError("--max-queued must be at least 1, and --grace-seconds a finite number of at least 0")
    name = arguments.served_model_name or arguments.model
    with _bind(arguments.host, arguments.port) as listener, _signals_as_interrupts():
        host, port = listener.getsockname()[:2]
        address = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
        print(f"Loading {arguments.model} ...", file=sys.stderr, flush=True)

        from kvferry import LLM
        from kvferry.serving.server import Server
        from kvferry.serving.service import Service

        set_up_output()
        with LLM(arguments.model, **engine_options(arguments)) as llm:
            server = Server(Service(llm, name, arguments.max_queued), arguments.grace_seconds)
            server.serve_on(listener, lambda: print(f"{name} is served at {address}", flush=True))
    return 0


def _bind(host: str, port: int) -> socket.socket:
    """Take an address before the model is loaded; nobody is let in yet. ConfigError: it cannot be had."""
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
    except (OSError, OverflowError) as error:
        listener.close()
        raise ConfigError(f"cannot listen on {host}:{port}: {error}") from error
    return listener


@contextlib.contextmanager
def _signals_as_interrupts() -> Iterator[None]:
    """SIGTERM, and SIGINT even where a shell's `&` had it ignored, unwind while the engine opens or closes, so that
    nothing is left in shared memory."""
    before = {end: signal.signal(end, signal.default_int_handler) for end in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for end, handler in before.items():
            signal.signal(end, handler)
