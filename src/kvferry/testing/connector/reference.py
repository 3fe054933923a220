"""An engine whose connector only looks: its tokens and its KV are what a connector under test is measured by."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from kvferry.config import KvCacheConfig
from kvferry.connector.api import (
    NO_BLOCK,
    KvCacheConnectorScheduler,
    KvCacheConnectorWorker,
    Request,
    SchedulerOutput,
)
from kvferry.connector.config import LlmArgs
from kvferry.connector.layout import KvCacheLayout
from kvferry.engine.llm import LLM
from kvferry.engine.sampling import SamplingParams
from kvferry.testing.connector.faults import Fault
from kvferry.testing.connector.ledger import Ledger, content_name
from kvferry.testing.connector.session import Session
from kvferry.testing.connector.truth import kv_pools

MAX_TOKENS = 4096
"""Of a prompt with its answer."""


@dataclass(frozen=True, slots=True)
class Filled:
    """A block that a pass fills, one id a layer group."""

    name: bytes
    content: bytes
    block_ids: tuple[int, ...]


class RecorderScheduler(KvCacheConnectorScheduler):
    """Matches nothing; says which blocks each pass fills."""

    def __init__(self, llm_args: LlmArgs) -> None:
        super().__init__(llm_args)
        session = Session.of(llm_args)
        self._ledger = Ledger(llm_args.tokens_per_block, lambda what: session.found(Fault.ENGINE, what))

    def get_num_new_matched_tokens(self, request: Request, num_computed_tokens: int) -> tuple[int, bool]:
        self._ledger.matched(request, num_computed_tokens)
        return 0, False

    def update_state_after_alloc_by_layer_group(
        self, request: Request, block_ids_by_layer_group: list[list[int]]
    ) -> None:
        self._ledger.allocated(request, block_ids_by_layer_group)

    def build_connector_meta(self, scheduler_output: SchedulerOutput) -> list[Filled]:
        filled, size = [], self._ledger.block_tokens
        for share in self._ledger.advance(scheduler_output):
            entry = share.entry
            for index in range(share.start // size, share.end // size):
                content = content_name(entry.tokens[index * size : (index + 1) * size])
                block_ids = tuple(of_group[index] for of_group in entry.block_ids)
                filled.append(Filled(entry.names[index], content, block_ids))
        return filled

    def request_finished_by_layer_group(
        self, request: Request, cache_block_ids_by_layer_group: list[list[int]]
    ) -> bool:
        self._ledger.finished(request)
        return False


class RecorderWorker(KvCacheConnectorWorker):
    """Copies what each pass fills to the session's truth."""

    def register_kv_cache_layout(self, layout: KvCacheLayout) -> None:
        self._truth = Session.of(self._llm_args).truth
        self._pools = kv_pools(layout)

    def start_load_kv(self, stream: Any) -> None:
        """Nothing is loaded."""

    def wait_for_layer_load(self, layer_idx: int, stream: Any) -> None:
        """Nothing is loaded."""

    def save_kv_layer(self, layer_idx: int, stream: Any) -> None:
        """Blocks are copied whole, when all layers are written."""

    def wait_for_save(self, stream: Any) -> None:
        for filled in self.get_connector_meta():
            blocks = [
                None if block_id == NO_BLOCK or group not in self._pools else self._pools[group][block_id]
                for group, block_id in enumerate(filled.block_ids)
            ]
            self._truth.add(filled.name, filled.content, blocks)

    def get_finished(
        self, finished_gen_req_ids: list[int], started_loading_req_ids: list[int]
    ) -> tuple[list[int], list[int]]:
        return [], []


@dataclass(slots=True)
class Reference:
    """What a model answers without a connector. The session's truth gets the KV of all prompts asked for here."""

    session: Session
    model: str
    block_tokens: int
    device: str
    _llm: LLM | None = None
    _known: dict[tuple[int, ...], tuple[int, ...]] = field(default_factory=dict)

    def tokens(self, prompt: list[int], num_tokens: int) -> tuple[int, ...]:
        """The first tokens that the model generates. Errors as `start`."""
        known = self._known.get(tuple(prompt), ())
        if len(known) < num_tokens:
            output = self.start().generate(prompt, SamplingParams(max_tokens=num_tokens, ignore_eos=True))
            known = self._known[tuple(prompt)] = output.token_ids
        return known[:num_tokens]

    def start(self) -> LLM:
        """The engine, which starts the first time. RequestError: the model cannot be served."""
        if self._llm is None:
            cache = KvCacheConfig(tokens_per_block=self.block_tokens, max_tokens=MAX_TOKENS, enable_block_reuse=False)
            self._llm = LLM(
                self.model,
                kv_cache_config=cache,
                kv_connector_config=self.session.config_of(__name__, RecorderScheduler, RecorderWorker),
                dtype="float32",
                device=self.device,
            )
        return self._llm

    def close(self) -> None:
        """End the engine."""
        if self._llm is not None:
            self._llm.shutdown()
