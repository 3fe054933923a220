"""Write a pair of keys for a server or client on TCP.

FILE gets the secret key, which only you can read; FILE.pub the public one. A server's public key goes to its clients;
a client's goes to servers that list their clients.

examples:
  kvferry keygen server.key
  kvferry server --host 0.0.0.0 --port 7440 --curve-secret server.key
  KVFERRY_SERVER_KEY=server.key.pub kvferry generate MODEL -p PROMPT --config engine.yaml
"""

from __future__ import annotations

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Where to."""
    parser.add_argument("file", metavar="FILE", type=Path)


def run(arguments: argparse.Namespace) -> int:
    """Print the public key."""
    from kvferry.server.curve import write_pair

    print(write_pair(arguments.file).decode())
    return 0
