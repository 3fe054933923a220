"""How commands reach a cache server, what they mean by a model, a salt and tokens, and how they write sizes.

Prints nothing.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final

from kvferry.config import default_server_url, load_options
from kvferry.errors import ConfigError

if TYPE_CHECKING:
    from kvferry.server.console import Console
    from kvferry.server.protocol import Model
    from kvferry.store.base import Selection

_SECONDS: Final = {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86_400}


def add_connection_arguments(parser: argparse.ArgumentParser) -> None:
    """Which server."""
    parser.add_argument("--socket", metavar="URL", help="the server's; default KVFERRY_SERVER_URL, then the user's own")


def add_selection_arguments(parser: argparse.ArgumentParser) -> None:
    """Which server, and which chunks."""
    add_connection_arguments(parser)
    parser.add_argument("--model", metavar="NAME", help="of engines' models, or a tag that `kvferry ls` shows")
    parser.add_argument("--salt", help="the cache salt of requests")
    parser.add_argument("--tokens-file", metavar="FILE", help="a prompt, as a JSON list of token ids; takes --model")


def connect(arguments: argparse.Namespace) -> Console:
    """ConfigError: no server answers."""
    from kvferry.server.console import Console

    options = load_options()
    return Console(arguments.socket or options.server_url or default_server_url(), options)


def duration(text: str) -> float:
    """Seconds, of texts such as 90, 15m, 2h or 7d. For argparse."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([smhd]?)", text)
    if found is None:
        raise argparse.ArgumentTypeError(f"{text!r} is no duration such as 90, 15m, 2h or 7d")
    return float(found[1]) * _SECONDS[found[2]]


def megabytes(num_bytes: float) -> str:
    """In millions of bytes, which is what sizes of stores are given in a thousand of."""
    return f"{num_bytes / 1e6:,.1f} MB"


def find_models(console: Console, name: str) -> list[Model]:
    """Those of live engines that are called so: with the whole name, its last part, or a tag."""
    from kvferry.store.keys import geometry_tag

    return [
        model
        for model in console.models()
        if name in {model.name, Path(model.name).name, geometry_tag(model.root).hex()}
    ]


def need_models(console: Console, name: str) -> list[Model]:
    """ConfigError: no live engine has a model that is called so."""
    models = find_models(console, name)
    if not models:
        known = ", ".join(sorted({model.name for model in console.models()})) or "none"
        raise ConfigError(f"no engine that is connected serves a model {name!r}; those that are: {known}")
    return models


def keys_of(model: Model, tokens: Sequence[int], salt: str | None) -> list[bytes]:
    """Of a prompt's full chunks. RequestError: a token id is none."""
    from kvferry.store.keys import Extras, chunk_keys

    return chunk_keys(model.root, tokens, model.geometry.chunk_tokens, Extras(cache_salt=salt))


def selection(console: Console, arguments: argparse.Namespace) -> Selection:
    """What the arguments select; nothing given: everything. ConfigError: no such model, or no tokens."""
    import msgspec

    from kvferry.store.base import Selection
    from kvferry.store.keys import geometry_tag, salt_tag

    tags, keys = None, None
    if arguments.tokens_file is not None:
        if arguments.model is None:
            raise ConfigError("--tokens-file takes --model: other models have other chunks")
        try:
            tokens = msgspec.json.decode(Path(arguments.tokens_file).read_bytes(), type=list[int])
        except (OSError, msgspec.MsgspecError) as error:
            raise ConfigError(f"--tokens-file {arguments.tokens_file}: {error}") from error
        models = need_models(console, arguments.model)
        keys = frozenset(key for model in models for key in keys_of(model, tokens, arguments.salt))
    if arguments.model is not None:
        tags = frozenset(geometry_tag(model.root) for model in find_models(console, arguments.model))
        if not tags:
            tags = frozenset(use.geometry_tag for use in console.usage() if use.geometry_tag.hex() == arguments.model)
        if not tags:
            need_models(console, arguments.model)
    return Selection(
        geometry_tags=tags,
        salt_tag=salt_tag(arguments.salt) if arguments.salt is not None else None,
        keys=keys,
        unused_seconds=getattr(arguments, "older_than", None),
    )
