"""Content names of chunks and parts. Knows tokens as numbers and an engine as a `Geometry`, nothing else.

`key[i] = H(key[i-1], tokens of chunk i, extras)` with `key[-1] = H(geometry)`. H is SHA-256 over length-prefixed
fields, so that no two different inputs read the same, and every process and machine agrees (Python's `hash` is
seeded per process). Tokens are hashed as little-endian unsigned 32-bit integers.
"""

from __future__ import annotations

import struct
import sys
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256

from kvferry.blocks import Geometry
from kvferry.errors import RequestError
from kvferry.store.base import PartName

KEY_BYTES = 32
TAG_BYTES = 8
NO_TAG = bytes(TAG_BYTES)
_FORMAT = b"kvferry chunk key, format 1"
_TOKEN_BYTES = 4
_PART = struct.Struct("<HH")
assert array("I").itemsize == _TOKEN_BYTES


@dataclass(frozen=True, slots=True)
class Content:
    """What stands at tokens `start` to `end` of a prompt, named by its content."""

    name: str
    start: int
    end: int

    def encode(self, chunk_start: int) -> bytes:
        """Which part of it a chunk has follows from where it lies in the chunk."""
        return struct.pack("<qq", self.start - chunk_start, self.end - chunk_start) + _optional(self.name)


@dataclass(frozen=True, slots=True)
class Extras:
    """What changes a request's KV besides its tokens. Every field is part of every key of the request.

    cache_salt: keeps tenants apart. lora_id: content id of the LoRA adapter. contents: what stands at some of the
    tokens' positions in place of the tokens, such as images; it is part of the keys of the chunks that it reaches into.
    """

    cache_salt: str | None = None
    lora_id: str | None = None
    contents: tuple[Content, ...] = ()

    def encode(self, start: int = 0, end: int = 0) -> bytes:
        """Bytes that no other `Extras` has for tokens `start` to `end`: None and the empty string differ."""
        fields = [_optional(self.cache_salt), _optional(self.lora_id)]
        fields += [content.encode(start) for content in self.contents if content.start < end and start < content.end]
        return b"".join(map(_field, fields))


NO_EXTRAS = Extras()


def root_key(geometry: Geometry) -> bytes:
    """The parent of every first chunk: names all that a chunk's bytes depend on besides its tokens."""
    fields = [_FORMAT, geometry.identity.encode(), geometry.layout.encode()]
    fields.append(struct.pack("<QQQ", geometry.chunk_tokens, geometry.num_ranks, len(geometry.groups)))
    for group in geometry.groups:
        window = -1 if group.window_tokens is None else group.window_tokens
        fields.append(group.kind.value.encode())
        fields.append(struct.pack(f"<{len(group.layers)}Q", *group.layers))
        fields.append(struct.pack("<Qq", group.part_bytes, window) + (b"\1" if group.is_shared else b""))
    return sha256(b"".join(map(_field, fields))).digest()


def chunk_keys(parent: bytes, tokens: Sequence[int], chunk_tokens: int, extras: Extras = NO_EXTRAS) -> list[bytes]:
    """Keys of the full chunks of `tokens`, which follow the chunk named `parent`.

    RequestError: a token id is not a whole number in [0, 2**32).
    """
    return _hash_chunks(parent, _encode(tokens), chunk_tokens, extras, 0)


def part_name(key: bytes, group: int, rank: int) -> PartName:
    """The name of one rank's bytes of one group of a chunk, below memory: `KEY_BYTES + 4` bytes."""
    return key + _PART.pack(group, rank)


def geometry_tag(root: bytes) -> bytes:
    """A short name of a geometry, of its root key, for those who list what a store keeps."""
    return root[:TAG_BYTES]


def salt_tag(salt: str | None) -> bytes:
    """A short name of a cache salt; `NO_TAG` for none."""
    return NO_TAG if salt is None else sha256(b"kvferry salt" + _optional(salt)).digest()[:TAG_BYTES]


class KeyChain:
    """Keys of a request that grows: each token is hashed once.

    `keys` are those of the full chunks so far and `num_tokens` counts all tokens, those of the open chunk included.
    """

    def __init__(self, root: bytes, chunk_tokens: int, extras: Extras = NO_EXTRAS) -> None:
        self.root = root
        self.keys: list[bytes] = []
        self._parent = root
        self._chunk_tokens = chunk_tokens
        self._extras = extras
        self._open = b""

    @property
    def num_tokens(self) -> int:
        return len(self.keys) * self._chunk_tokens + len(self._open) // _TOKEN_BYTES

    def extend(self, tokens: Sequence[int]) -> None:
        """Append tokens. RequestError, and nothing appended: a token id is not a whole number in [0, 2**32)."""
        self._open += _encode(tokens)
        keys = _hash_chunks(self._parent, self._open, self._chunk_tokens, self._extras, len(self.keys))
        if keys:
            self.keys += keys
            self._parent = keys[-1]
            self._open = self._open[len(keys) * self._chunk_tokens * _TOKEN_BYTES :]


def _hash_chunks(parent: bytes, tokens: bytes, chunk_tokens: int, extras: Extras, first_chunk: int) -> list[bytes]:
    """Keys of the full chunks of `tokens`, the first of which is the request's chunk `first_chunk`."""
    chunk_bytes = chunk_tokens * _TOKEN_BYTES
    token_prefix = struct.pack("<Q", chunk_bytes)
    of_all = _field(extras.encode())
    keys = []
    for chunk in range(len(tokens) // chunk_bytes):
        of_chunk = tokens[chunk * chunk_bytes : (chunk + 1) * chunk_bytes]
        start = (first_chunk + chunk) * chunk_tokens
        also = _field(extras.encode(start, start + chunk_tokens)) if extras.contents else of_all
        parent = sha256(b"".join((parent, token_prefix, of_chunk, also))).digest()
        keys.append(parent)
    return keys


def _encode(tokens: Sequence[int]) -> bytes:
    try:
        packed = array("I", tokens)
    except (OverflowError, TypeError) as error:
        raise RequestError(f"token ids must be whole numbers in [0, 2**32): {error}") from error
    if sys.byteorder != "little":
        packed.byteswap()
    return packed.tobytes()


def _field(value: bytes) -> bytes:
    return struct.pack("<Q", len(value)) + value


def _optional(text: str | None) -> bytes:
    return b"\0" if text is None else b"\1" + text.encode("utf-8", "surrogatepass")
