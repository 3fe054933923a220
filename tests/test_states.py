"""Recurrent layers beside attention: no request goes on from a state that is not the one at its place."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, MiniMaxConfig

from kvferry import LLM, KvCacheConfig, KvCacheConnectorConfig, SamplingParams
from kvferry.blocks import GroupKind
from kvferry.connector.api import (
    NO_BLOCK,
    KvCacheConnectorScheduler,
    KvCacheConnectorWorker,
    Request,
    SchedulerOutput,
)
from kvferry.connector.config import LlmArgs
from kvferry.connector.layout import STATE_ROLES, KvCacheLayout
from kvferry.engine.model import load_model
from kvferry.engine.partition import RankGroup
from kvferry.errors import ConnectorError, RequestError
from kvferry.testing.models import make_model

from .engine.conftest import make_prompt

BLOCK, INTERVAL = 8, 16
PARAMS = SamplingParams(max_tokens=12, ignore_eos=True)
SHORT = SamplingParams(max_tokens=5, ignore_eos=True)


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a family's model, made once."""
    root = tmp_path_factory.mktemp("states")
    return lambda family: root / family if (root / family).exists() else make_model(family, root / family)


def open_llm(model: Path, connector: KvCacheConnectorConfig | None, *, device: str = "cpu", **options: Any) -> LLM:
    pool = {"tokens_per_block": BLOCK, "max_tokens": 320, "state_interval_tokens": INTERVAL, **options}
    return LLM(
        str(model),
        kv_cache_config=KvCacheConfig(**pool),
        kv_connector_config=connector,
        max_num_tokens=44,
        max_batch_size=4,
        device=device,
    )


def kvferry(tmp_path: Path, **options: Any) -> KvCacheConnectorConfig:
    known = {"chunk_tokens": INTERVAL, "l1_size_gb": 0.02, "disk_path": str(tmp_path / "disk")}
    return KvCacheConnectorConfig(connector="kvferry", options=known | options)


def converse(model: Path, connector: KvCacheConnectorConfig, device: str = "cpu", **options: Any) -> list[int]:
    """The same tokens without caches and with them, in two runs, one by one in any order and then at once; returns the
    tokens that came from the pool and from the connector."""
    with open_llm(model, None, device=device, enable_block_reuse=False) as plain:
        said, prompts = make_prompt(30), []
        for turn in range(2):
            prompts += [list(said), make_prompt(100, seed=100 + turn)]
            said = [*said, *plain.generate(said, PARAMS).token_ids, *make_prompt(20 + turn, seed=turn)]
        expected = [plain.generate(prompt, PARAMS).token_ids for prompt in prompts]
    reused = [0, 0]
    for seed in range(2):
        with open_llm(model, connector, device=device, **options) as llm:
            order = random.Random(seed).sample(range(len(prompts)), len(prompts))
            outputs = [llm.generate(prompts[index], PARAMS) for index in order]
            llm.check()
            outputs += llm.generate([prompts[index] for index in order], PARAMS)
            llm.check()
        for index, output in zip(order * 2, outputs, strict=True):
            assert output.token_ids == expected[index], f"prompt {index}"
            reused[0] += output.metrics.num_pool_tokens
            reused[1] += output.metrics.num_connector_tokens
    return reused


@pytest.mark.parametrize(
    ("family", "chunk_tokens", "mode"),
    [("lfm2", 8, "always"), ("granitemoehybrid", 16, "auto"), ("lfm3", 32, "never")],
)
def test_a_conversation_goes_on_from_pool_memory_and_disk(
    family: str, chunk_tokens: int, mode: str, make: Callable[[str], Path], tmp_path: Path
) -> None:
    """Chunks shorter than the interval of states, equal and longer; states after prompts' parts and after decoding."""
    from_pool, loaded = converse(make(family), kvferry(tmp_path, chunk_tokens=chunk_tokens, async_load=mode))
    assert from_pool > 0
    assert loaded > 0


def test_a_loaded_state_can_be_shared_wherever_it_stands(make: Callable[[str], Path], tmp_path: Path) -> None:
    """Decoding saves a state at each chunk's end, here between the states that prompts leave."""
    config = kvferry(tmp_path, chunk_tokens=BLOCK)
    with open_llm(make("lfm2"), config) as llm:
        said = make_prompt(20) + list(llm.generate(make_prompt(20), SHORT).token_ids)
    with open_llm(make("lfm2"), config) as llm:
        loaded, shared = (llm.generate(said, SHORT) for _ in range(2))
    assert (loaded.metrics.num_connector_tokens, shared.metrics.num_pool_tokens) == (24, 24)
    assert loaded.token_ids == shared.token_ids


@pytest.mark.gpu
@pytest.mark.parametrize("family", ["granitemoehybrid", "lfm3"])
def test_a_conversation_on_a_gpu(family: str, make: Callable[[str], Path], tmp_path: Path) -> None:
    from_pool, loaded = converse(make(family), kvferry(tmp_path), "cuda")
    assert from_pool > 0
    assert loaded > 0


def test_a_request_holds_the_state_that_it_computes_and_none_behind(make: Callable[[str], Path]) -> None:
    held: list[int] = []
    with open_llm(make("lfm2"), None) as llm:
        handle = llm.generate_async(make_prompt(100), SamplingParams(max_tokens=60, ignore_eos=True))
        next(iter(handle))
        llm._core.call(lambda: held.extend(pool.num_blocks - pool.num_free for pool in llm._blocks.pools))
        handle.result(60)
    states, full = held
    assert llm._pool.groups[0].kind is GroupKind.STATE
    assert 1 <= states <= 2
    assert full >= 13


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_adapters_keep_states_apart(make: Callable[[str], Path], tmp_path: Path) -> None:
    peft = pytest.importorskip("peft", reason="needs the package peft: pip install kvferry[lora]")
    model = make("granitemoehybrid")
    expected = {}
    for seed in (1, 2):
        torch.manual_seed(seed)
        config = peft.LoraConfig(r=4, target_modules=["in_proj", "q_proj"], init_lora_weights=False)
        adapted = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(model), config)
        adapted.save_pretrained(tmp_path / str(seed))
        with open_llm(model, None, enable_block_reuse=False) as llm:
            expected[seed] = llm.generate(make_prompt(50), SHORT, str(tmp_path / str(seed))).token_ids
    assert expected[1] != expected[2]
    with open_llm(model, kvferry(tmp_path)) as llm:
        for seed in (1, 2, 1, 2):
            output = llm.generate(make_prompt(50), SHORT, str(tmp_path / str(seed)))
            assert output.token_ids == expected[seed]
        assert output.metrics.num_pool_tokens == 48


class Promiser(KvCacheConnectorScheduler):
    """Promises to load `promised` of every prompt's blocks after the pool's."""

    promised = 0
    asynchronous = False
    taken: list[int]

    def get_num_new_matched_tokens(self, request: Request, num_computed_tokens: int) -> tuple[int, bool]:
        num_tokens = max(0, self.promised * BLOCK - num_computed_tokens)
        return num_tokens, self.asynchronous and num_tokens > 0

    def update_state_after_alloc_by_layer_group(
        self, request: Request, block_ids_by_layer_group: list[list[int]]
    ) -> None:
        self.taken.append(request.num_connector_matched_tokens)
        if request.num_connector_matched_tokens:
            states = block_ids_by_layer_group[0]
            Breaker.blocks = [block_id for block_id in (states[self.promised - 1],) if block_id != NO_BLOCK]
            Breaker.failed = [request.request_id]

    def request_finished_by_layer_group(
        self, request: Request, cache_block_ids_by_layer_group: list[list[int]]
    ) -> bool:
        return False

    def build_connector_meta(self, scheduler_output: SchedulerOutput) -> object:
        return None


class Breaker(KvCacheConnectorWorker):
    """Leaves garbage in the state's block where a load should end, and says that the load failed."""

    blocks: list[int]
    failed: list[int]

    def __init__(self, llm_args: LlmArgs) -> None:
        super().__init__(llm_args)
        self._loading: list[int] = []

    def register_kv_cache_layout(self, layout: KvCacheLayout) -> None:
        self._layout = layout

    def start_load_kv(self, stream: Any) -> None:
        blocks, Breaker.blocks = Breaker.blocks, []
        for block_id in blocks:
            for region in self._layout.groups[0].regions:
                region.as_tensor()[block_id] = 77

    def wait_for_layer_load(self, layer_idx: int, stream: Any) -> None: ...

    def save_kv_layer(self, layer_idx: int, stream: Any) -> None: ...

    def wait_for_save(self, stream: Any) -> None: ...

    def get_finished(
        self, finished_gen_req_ids: list[int], started_loading_req_ids: list[int]
    ) -> tuple[list[int], list[int]]:
        return [], started_loading_req_ids

    def take_failed_loads(self) -> list[int]:
        failed, Breaker.failed = Breaker.failed, []
        return failed


@pytest.fixture
def promiser() -> KvCacheConnectorConfig:
    Promiser.promised, Promiser.asynchronous, Promiser.taken = 0, False, []
    Breaker.blocks, Breaker.failed = [], []
    names = {"connector_scheduler_class": Promiser.__name__, "connector_worker_class": Breaker.__name__}
    return KvCacheConnectorConfig(connector_module=__name__, **names)


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_load_that_fails_leaves_no_state_behind(
    asynchronous: bool, make: Callable[[str], Path], promiser: KvCacheConnectorConfig
) -> None:
    """It should have ended between two kept states, after tokens that the pool has and before tokens that it shares."""
    prompts = [make_prompt(20), make_prompt(70), make_prompt(45) + make_prompt(9, seed=1)]
    model = make("lfm2")
    with open_llm(model, None, enable_block_reuse=False) as plain:
        expected = [plain.generate(prompt, SHORT).token_ids for prompt in prompts]
    with open_llm(model, promiser) as llm:
        assert llm.generate(prompts[0], SHORT).token_ids == expected[0]
        Promiser.promised, Promiser.asynchronous = 5, asynchronous
        output = llm.generate(prompts[1], SHORT)
        assert (output.token_ids, output.metrics.num_pool_tokens) == (expected[1], 16)
        assert output.metrics.num_connector_tokens == 0
        assert Promiser.taken == [0, 24]
        Promiser.promised = 0
        output = llm.generate(prompts[2], SHORT)
        assert (output.token_ids, output.metrics.num_pool_tokens) == (expected[2], 32)
        llm.check()


def test_a_match_of_the_whole_prompt_is_not_taken(
    make: Callable[[str], Path], promiser: KvCacheConnectorConfig
) -> None:
    """The last token must be computed, and a state after it is of no use for that."""
    prompt = make_prompt(5 * BLOCK)
    with open_llm(make("lfm2"), promiser, enable_block_reuse=False) as llm:
        expected = llm.generate(prompt, SHORT).token_ids
        Promiser.promised = 5
        assert llm.generate(prompt, SHORT).token_ids == expected
        llm.check()
    assert Promiser.taken == [0, 0]


def test_a_connector_is_told_which_pages_are_states(
    make: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, promiser: KvCacheConnectorConfig
) -> None:
    seen: list[KvCacheLayout] = []
    monkeypatch.setattr(Breaker, "register_kv_cache_layout", lambda _, layout: seen.append(layout))
    with open_llm(make("granitemoehybrid"), promiser):
        (layout,) = seen
        states, full = layout.groups
        assert (states.kind, states.layer_ids, full.kind) == (GroupKind.STATE, (0, 2), GroupKind.FULL)
        buffers = [(buffer.layer_id, buffer.role) for region in states.regions for buffer in region.buffers]
        assert buffers == [(layer, role) for layer in (0, 2) for role in STATE_ROLES]
        assert layout.as_single_pool_tensor() is None
        assert {region.num_slots for region in states.regions} == {320 // INTERVAL + 3 * 4}


def test_what_cannot_be_served_is_refused_by_name(make: Callable[[str], Path], tmp_path: Path) -> None:
    flat = KvCacheConnectorConfig(connector="persistent", options={"folder": str(tmp_path / "blocks")})
    with pytest.raises(ConnectorError, match="lacks update_state_after_alloc_by_layer_group"):
        open_llm(make("lfm2"), flat)
    with pytest.raises(RequestError, match="state_interval_tokens=20 is not a multiple of tokens_per_block=8"):
        open_llm(make("lfm2"), None, state_interval_tokens=20)
    with pytest.raises(RequestError, match="runs with tensor_parallel_size=1 alone"):
        load_model(str(make("lfm2")), "auto", torch.device("cpu"), RankGroup(0, 2, tmp_path, torch.device("cpu")))
    kinds = ["linear_attention", "full_attention"]
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "num_key_value_heads": 1}
    unknown = MiniMaxConfig(**sizes, vocab_size=8, num_hidden_layers=2, layer_types=kinds, num_local_experts=2)
    AutoModelForCausalLM.from_config(unknown).save_pretrained(tmp_path / "unknown")
    with pytest.raises(RequestError, match="MiniMaxForCausalLM has recurrent layers that the embedded engine does not"):
        load_model(str(tmp_path / "unknown"), "auto", torch.device("cpu"))
