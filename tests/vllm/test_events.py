"""What vLLM publishes of the store: what a subscriber believes to be there is there, under vLLM's own hashes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import msgspec
import pytest
import zmq
from vllm.config import KVEventsConfig
from vllm.distributed.kv_events import BlockRemoved, BlockStored, KVEventBatch
from vllm.v1.core.kv_cache_utils import maybe_convert_block_hash
from vllm_engines import BLOCK, Engine, running, tokens

from kvferry.blocks import Geometry, GroupKind, GroupSpec, Tier
from kvferry.integrations import vllm_events
from kvferry.integrations.vllm_events import BlockEvents
from kvferry.store.base import BlockStore
from kvferry.testing.servers import wait_until

CHUNK = 2 * BLOCK
PROMPTS = [tokens(3 * CHUNK + 10, 300 + seed) for seed in range(8)]
BEFORE = {
    (*prompt[start : start + CHUNK],): (*prompt[max(0, start - BLOCK) : start],)
    for prompt in PROMPTS
    for start in range(0, 3 * CHUNK, CHUNK)
}
"""By a chunk's tokens, those of the block before it."""


class Subscriber:
    """A router's view. blocks: of kvferry, each with its event; pool: hashes of vLLM's own by their tokens."""

    def __init__(self, url: str, publisher: Any) -> None:
        self._publisher = publisher
        self._socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.SUB)
        self._socket.connect(url)
        self._socket.subscribe(b"")
        wait_until(self._is_heard)
        self.blocks: dict[Any, BlockStored] = {}
        self.pool: dict[tuple[int, ...], Any] = {}
        self.num_removed = 0

    def _is_heard(self) -> bool:
        """Whether what is published from now on arrives here."""
        self._publisher.publish(KVEventBatch(ts=0.0, events=[]))
        return bool(self._socket.poll(100))

    def read(self) -> None:
        """What was published until now."""
        wait_until(lambda: not self._publisher._event_queue.unfinished_tasks)
        while self._socket.poll(300):
            *_, payload = self._socket.recv_multipart()
            for event in msgspec.msgpack.decode(payload, type=KVEventBatch).events:
                if isinstance(event, BlockStored | BlockRemoved) and event.medium == "CPU":
                    self._take(event)
                elif isinstance(event, BlockStored):
                    for block, of in enumerate(event.block_hashes):
                        self.pool[(*event.token_ids[block * BLOCK : (block + 1) * BLOCK],)] = of

    def _take(self, event: BlockStored | BlockRemoved) -> None:
        for of in event.block_hashes:
            if isinstance(event, BlockStored):
                assert of not in self.blocks, "announced once"
                self.blocks[of] = event
            else:
                del self.blocks[of]
                self.num_removed += 1

    def close(self) -> None:
        self._socket.close(0)


@pytest.fixture(params=["llama", "gemma"])
def engine(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Engine]:
    monkeypatch.setattr(vllm_events, "_LOOK_SECONDS", 0.0)
    monkeypatch.setattr(vllm_events, "_MOST_AT_ONCE", 5)
    model: Path = request.getfixturevalue(request.param)
    events = KVEventsConfig(enable_kv_cache_events=True, publisher="zmq", endpoint=f"ipc://{tmp_path}/events")
    pool = 40 if "gemma" in model.name else 22
    with running(model, num_gpu_blocks_override=pool, kv_events_config=events, extra={"l1_size_gb": 0.008}) as engine:
        yield engine


@pytest.fixture
def subscriber(engine: Engine, tmp_path: Path) -> Iterator[Subscriber]:
    subscriber = Subscriber(f"ipc://{tmp_path}/events", engine.scheduler.kv_event_publisher)
    yield subscriber
    subscriber.close()


def num_held(engine: Engine) -> int:
    """Chunks that were announced and are in the store."""
    events = engine.half._events
    return sum(tier is not None for tier in engine.half._store.locate(events._geometry, [*events._announced]))


class Shelf:
    """What `BlockStore.locate` answers: the keys that it has, or nothing while it is off."""

    def __init__(self) -> None:
        self.keys: set[bytes] = set()
        self.is_off = False

    def locate(self, geometry: Geometry, keys: list[bytes]) -> list[Tier | None]:
        return [] if self.is_off else [Tier.DISK if key in self.keys else None for key in keys]


def test_a_store_that_does_not_answer_changes_nothing() -> None:
    shelf, now = Shelf(), [0.0]
    geometry = Geometry("model", "", 4, 1, (GroupSpec(GroupKind.FULL, (0,), 64),))
    events = BlockEvents(cast("BlockStore", shelf), geometry, 2, clock=lambda: now[0])
    request = SimpleNamespace(
        block_hashes=[bytes([block]) * 32 for block in range(4)],
        all_token_ids=[*range(9)],
        num_tokens=9,
        lora_request=None,
        mm_features=[],
        cache_salt=None,
        prompt_embeds=None,
    )

    first, second = ([maybe_convert_block_hash(of) for of in request.block_hashes[at : at + 2]] for at in (0, 2))

    def news(seconds: float) -> list[tuple[type, list[Any]]]:
        now[0] += seconds
        return [(type(event), event.block_hashes) for event in events.take()]

    events.follow(request, [b"a", b"b"])
    assert news(0.2) == []
    shelf.keys.add(b"a")
    assert news(0.01) == [], "it is not asked again so soon"
    assert news(0.2) == [(BlockStored, first)]
    shelf.is_off = True
    assert news(0.2) == []
    shelf.is_off = False
    assert news(30.0) == [], "the second chunk has not come, and is not waited for any longer"
    shelf.keys.add(b"b")
    assert news(0.2) == []
    events.follow(request, [b"a", b"b"])
    assert news(0.2) == [(BlockStored, second)]
    shelf.keys.remove(b"a")
    assert news(0.2) == [(BlockRemoved, first)]
    events.disown()
    assert news(0.01) == [(BlockRemoved, second)]
    events.follow(SimpleNamespace(**{**vars(request), "block_hashes": request.block_hashes * 2}), [b"b"])
    assert news(0.2) == [], "its hashes are those of smaller blocks"


def test_what_a_subscriber_believes_is_so(engine: Engine, subscriber: Subscriber) -> None:
    for prompt in PROMPTS:
        engine.generate([prompt], 2)
        engine.settle()
    for _ in range(10):  # Steps in which everything is looked for again.
        engine.generate([tokens(20, 1)], 2)
    subscriber.read()
    assert subscriber.num_removed > 0, "the store is too large to show what is removed"
    assert 0 < num_held(engine) * 2 == len(subscriber.blocks)
    for of, event in subscriber.blocks.items():
        assert (event.block_size, len(event.token_ids), len(event.block_hashes)) == (BLOCK, CHUNK, 2)
        block = event.block_hashes.index(of)
        assert subscriber.pool[(*event.token_ids[block * BLOCK : (block + 1) * BLOCK],)] == of
        before = BEFORE[(*event.token_ids,)]
        assert event.parent_block_hash == (subscriber.pool[before] if before else None)
    engine.clear_pool(connector=True)
    engine.generate([tokens(20, 2)], 2)
    subscriber.read()
    assert not subscriber.blocks


def test_salts_are_told(engine: Engine, subscriber: Subscriber) -> None:
    engine.generate([{"prompt_token_ids": PROMPTS[0], "cache_salt": "tenant"}], 2)
    engine.settle()
    engine.generate([tokens(20, 1)], 2)
    subscriber.read()
    first = next(event for event in subscriber.blocks.values() if event.parent_block_hash is None)
    assert first.extra_keys == [("tenant",), None]
