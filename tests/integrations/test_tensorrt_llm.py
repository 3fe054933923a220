"""kvferry's connector on TensorRT-LLM's base classes, driven by the embedded engine under TensorRT-LLM's names."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from kvferry import LLM, KvCacheConfig, KvCacheConnectorConfig, SamplingParams
from kvferry.connector.api import RequestData, SchedulerOutput
from kvferry.connector.layout import KvCacheBufferRef, KvCacheLayout, describe_kv
from kvferry.errors import ConfigError, ConnectorError
from kvferry.integrations import tensorrt_llm as adapter
from kvferry.integrations.weights import name_weights
from kvferry.testing.models import VOCAB_SIZE, make_model
from kvferry.testing.servers import PATIENT, ServerProcess

CONNECTOR = KvCacheConnectorConfig(
    connector_module="kvferry.integrations.tensorrt_llm",
    connector_scheduler_class="KVFerryConnectorScheduler",
    connector_worker_class="KVFerryConnectorWorker",
)
BLOCK, CHUNK = 32, 64
PARAMS = SamplingParams(max_tokens=4, ignore_eos=True)
PROMPT, OTHER = ([(step * i) % (VOCAB_SIZE - 2) + 2 for i in range(300)] for step in (7, 11))


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("models")
    return {family: str(make_model(family, folder / family)) for family in ("llama", "gemma3")}


@pytest.fixture(autouse=True)
def options(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("KVFERRY_CHUNK_TOKENS", str(CHUNK))
    monkeypatch.setenv("KVFERRY_L1_SIZE_GB", "0.05")
    yield
    assert not adapter._begun


def make_llm(model: str, connector: KvCacheConnectorConfig | None = CONNECTOR) -> LLM:
    cache = KvCacheConfig(tokens_per_block=BLOCK, max_tokens=384)
    return LLM(model, kv_cache_config=cache, kv_connector_config=connector)


def ask(llm: LLM) -> tuple[list[int], list[tuple[int, ...]]]:
    """Tokens from the connector, and tokens generated: of a prompt, another that takes its place, the first again."""
    outputs = [llm.generate(prompt, PARAMS) for prompt in (PROMPT, OTHER, PROMPT)]
    if llm.connector_manager is not None:
        assert not llm.connector_manager.num_errors
    llm.check()
    return [output.metrics.num_connector_tokens for output in outputs], [output.token_ids for output in outputs]


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_hits_in_memory_and_on_disk_have_the_tokens_of_no_connector(
    family: str, models: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KVFERRY_DISK_PATH", str(tmp_path))
    monkeypatch.setenv("KVFERRY_ASYNC_LOAD", "always")  # which TensorRT-LLM could not be told the end of
    with make_llm(models[family], None) as llm:
        _, expected = ask(llm)
    with make_llm(models[family]) as llm:
        cold, tokens = ask(llm)
    assert tokens == expected
    assert cold[:2] == [0, 0]
    assert cold[2] > 0
    with make_llm(models[family]) as llm:
        warm, tokens = ask(llm)
    assert tokens == expected
    assert warm[:2] == [256, 256]


@pytest.mark.parametrize("is_in_yaml", [True, False])
def test_what_one_engine_saved_another_hits_in_a_server(
    is_in_yaml: bool, models: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in PATIENT.items():
        monkeypatch.setenv(f"KVFERRY_{name.upper()}", str(value))
    with make_llm(models["llama"], None) as llm:
        _, expected = ask(llm)
    with ServerProcess(tmp_path, "--l1-size-gb", "0.05", "--chunk-size", str(CHUNK)) as server:
        if not is_in_yaml:
            monkeypatch.setenv("KVFERRY_SERVER_URL", server.url)
        connector = replace(CONNECTOR, server_url=server.url) if is_in_yaml else CONNECTOR
        for of_first in (0, 256):
            with make_llm(models["llama"], connector) as llm:
                hits, tokens = ask(llm)
            assert tokens == expected
            assert hits[:2] == [of_first, of_first]
            assert hits[2] > 0


def test_a_load_that_failed_ends_the_pass(models: dict[str, str]) -> None:
    with make_llm(models["llama"]) as llm:
        _, expected = ask(llm)
        assert llm.connector_manager is not None
        worker: Any = llm.connector_manager.worker
        worker._half._unreported.add(-1)  # as the half does with a slot that changed under its copy
        llm.generate(OTHER, PARAMS)
        again = llm.generate(PROMPT, PARAMS)
        assert llm.connector_manager.num_errors == {"wait_for_layer_load": 1}
        worker._half._unreported.add(5)
        with pytest.raises(ConnectorError, match=r"requests \[5\] were to load is not there"):
            worker.wait_for_save(None)
    assert again.token_ids == expected[0]


@dataclass
class HostRequest:
    """What TensorRT-LLM's requests have."""

    request_id: int
    tokens: list[int]
    context_current_position: int = 0
    cache_salt: str | None = None
    lora_task_id: int | None = None
    multimodal_positions: list[int] = field(default_factory=list)

    def get_tokens(self, beam: int) -> list[int]:
        return self.tokens


class Host:
    """TensorRT-LLM as far as the connector sees it: arguments, a pool, and the calls around one pass."""

    def __init__(self, model: str, **arguments: Any) -> None:
        self.args = SimpleNamespace(
            **{
                "model": model,
                "tensor_parallel_size": 1,
                "kv_cache_config": SimpleNamespace(tokens_per_block=BLOCK),
                "kv_connector_config": SimpleNamespace(server_url=None),
                **arguments,
            }
        )
        # One head more than the model's: only whole pages matter here.
        self.pool = torch.zeros(40, 3, 2, 3 * BLOCK * 8)
        self.worker = adapter.KVFerryConnectorWorker(self.args)
        self.scheduler = adapter.KVFerryConnectorScheduler(self.args)

    def start(self) -> None:
        self.worker.register_kv_caches(self.pool)
        self.scheduler.wait_for_initialization()

    def close(self) -> None:
        self.worker.shutdown()
        self.scheduler.shutdown()

    def run(self, request: HostRequest, block_ids: list[int], num_taken: int | None = None) -> int:
        """One pass that computes a prompt. `num_taken`: tokens of the offer that the engine takes; default all."""
        offered, is_async = self.scheduler.get_num_new_matched_tokens(request, 0)
        assert not is_async
        num_taken = offered if num_taken is None else num_taken
        request.context_current_position = num_taken
        self.scheduler.update_state_after_alloc(request, block_ids)
        num_scheduled = len(request.tokens) - num_taken
        data = RequestData(
            request.request_id, request.tokens, block_ids, 0, num_scheduled, cache_salt=request.cache_salt
        )
        self.worker.bind_connector_meta(self.scheduler.build_connector_meta(SchedulerOutput([data])))
        self.worker.start_load_kv(None)
        for layer in range(3):
            self.worker.wait_for_layer_load(layer, None)
            self.worker.save_kv_layer(layer, None)
        self.worker.wait_for_save(None)
        saving = [request.request_id] if self.scheduler.request_finished(request, block_ids) else []
        offered_ids = saving
        while saving:
            saved, _ = self.worker.get_finished(offered_ids, [])
            offered_ids, saving = [], [request_id for request_id in saving if request_id not in saved]
        return offered


@pytest.fixture
def host(models: dict[str, str]) -> Iterator[Host]:
    made = Host(models["llama"])
    made.start()
    yield made
    made.close()


def test_the_host_s_calls_save_and_load(host: Host) -> None:
    tokens = list(range(4 * BLOCK + 1))
    host.pool[:5] = torch.rand_like(host.pool[:5])
    assert host.run(HostRequest(1, tokens), [0, 1, 2, 3, 4]) == 0
    assert host.run(HostRequest(2, tokens), [10, 11, 12, 13, 14]) == 4 * BLOCK
    assert torch.equal(host.pool[10:14], host.pool[:4])


@pytest.mark.parametrize("unnamed", [{"lora_task_id": 3}, {"multimodal_positions": [1, 2]}], ids=["adapter", "image"])
def test_what_a_request_cannot_name_is_neither_saved_nor_loaded(unnamed: dict[str, Any], host: Host) -> None:
    tokens = list(range(4 * BLOCK + 1))
    host.run(HostRequest(1, tokens, **unnamed), [0, 1, 2, 3, 4])
    assert host.run(HostRequest(2, tokens), [10, 11, 12, 13, 14]) == 0
    assert host.run(HostRequest(3, tokens, **unnamed), [20, 21, 22, 23, 24]) == 0
    assert host.run(HostRequest(4, tokens, cache_salt="x"), [30, 31, 32, 33, 34]) == 0


def test_an_offer_that_is_taken_in_part_ends_the_pass_and_one_not_taken_does_not(host: Host) -> None:
    tokens = list(range(4 * BLOCK + 1))
    host.run(HostRequest(1, tokens), [0, 1, 2, 3, 4])
    host.pool[10:15] = 7
    assert host.run(HostRequest(2, tokens), [10, 11, 12, 13, 14], num_taken=0) == 4 * BLOCK
    assert (host.pool[10:15] == 7).all(), "nothing is written over what the engine computes"
    with pytest.raises(ConnectorError, match=r"requests \[3\]"):
        host.run(HostRequest(3, tokens), [20, 21, 22, 23, 24], num_taken=2 * BLOCK)


def test_halves_made_from_different_objects_meet_unless_it_could_be_another_s(models: dict[str, str]) -> None:
    tokens = list(range(2 * CHUNK + 1))
    hosts = [Host(models["llama"]) for _ in range(3)]
    for host in hosts:
        host.worker.register_kv_caches(host.pool)
    strangers = [adapter.KVFerryConnectorScheduler(SimpleNamespace()) for _ in range(2)]
    strangers[0].wait_for_initialization()
    assert strangers[0]._half is None, "three wait: it could be anyone's"
    hosts[0].scheduler.wait_for_initialization()
    assert hosts[1].run(HostRequest(1, tokens), [0, 1, 2, 3, 4]) == 0, "begins with the first match at the latest"
    assert hosts[1].scheduler._half is not None
    strangers[1].wait_for_initialization()
    assert strangers[1]._half is not None
    for host in hosts:
        host.close()
    for stranger in strangers:
        stranger.shutdown()


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"pipeline_parallel_size": 2}, "pipeline parallelism is not supported"),
        ({"enable_attention_dp": True}, "attention data parallelism is not supported"),
        ({"speculative_config": object()}, "speculative decoding is not supported"),
        ({"model": "no/such-model"}, "the files of no/such-model are not to be found"),
        ({"kv_cache_config": SimpleNamespace(tokens_per_block=7)}, "its layout is unknown"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_the_host_does_not_tell_is_a_reason_to_keep_nothing(
    arguments: dict[str, Any],
    reason: str,
    models: dict[str, str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    host = Host(**{"model": models["llama"], **arguments})
    try:
        with caplog.at_level(logging.WARNING):
            host.start()
        assert f"KV is not kept beyond the engine's pool: {reason}" in caplog.text
        for request_id in (1, 2):
            assert host.run(HostRequest(request_id, list(range(129))), [0, 1, 2, 3, 4]) == 0
    finally:
        host.close()


def test_wrong_options_end_the_start(models: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    for url, chunk_tokens, reason in (
        (None, 33, "chunk_tokens=33 is not a multiple"),
        ("http://x:1", 64, "http://x:1"),
    ):
        monkeypatch.setenv("KVFERRY_CHUNK_TOKENS", str(chunk_tokens))
        host = Host(models["llama"], kv_connector_config=SimpleNamespace(server_url=url))
        with pytest.raises(ConfigError, match=reason):
            host.start()
        host.close()


def test_layouts_are_taken_as_they_are_or_not_at_all() -> None:
    pools = [((0, 2), 16, torch.rand(4, 2, 2, 8)), ((1,), None, torch.rand(4, 1, 2, 8))]
    layout = KvCacheLayout(2, tuple(describe_kv(index, *pool) for index, pool in enumerate(pools)))
    own = adapter._own_layout(layout)
    assert isinstance(own, KvCacheLayout)
    assert [group.window_size for group in own.groups] == [16, None]
    for group, (layers, _, pool) in zip(own.groups, pools, strict=True):
        assert group.layer_ids == layers
        assert torch.equal(group.regions[0].memory, pool)
        assert group.regions[0].memory.data_ptr() == pool.data_ptr()
    (region,) = layout.groups[1].regions
    for buffers in (region.buffers[::-1], (KvCacheBufferRef(1, "key", 2), region.buffers[1])):
        changed = SimpleNamespace(
            tokens_per_block=2,
            dtype=torch.float32,
            groups=[SimpleNamespace(layer_group_id=0, regions=[_with(region, buffers)], replicated_regions=())],
        )
        assert "layer group 0 holds" in str(adapter._own_layout(changed))
    scales = SimpleNamespace(layer_group_id=0, regions=[region, region], replicated_regions=())
    assert adapter._own_layout(SimpleNamespace(groups=[scales])) == "layer group 0 has 2 regions"


def _with(region: Any, buffers: Any) -> Any:
    return SimpleNamespace(buffers=buffers, as_tensor=region.as_tensor, size=region.size, stride=region.stride)


def test_weights_are_named_by_content(tmp_path: Path) -> None:
    for folder in ("a", "b", "c", "d"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "config.json").write_text("{}")
        (tmp_path / folder / "README.md").write_text(folder)
    for folder, content in (("a", b"1"), ("b", b"1"), ("c", b"2")):
        (tmp_path / folder / "model.safetensors").write_bytes(content)
    names = {folder: name_weights(str(tmp_path / folder)) for folder in ("a", "b", "c", "d")}
    assert names["a"] == names["b"] != names["c"]
    assert names["d"] is None, "a folder without weights names nothing"
    snapshot = tmp_path / "models--org--name" / "snapshots" / "0123abcd"
    snapshot.mkdir(parents=True)
    assert name_weights(str(snapshot)) == "models--org--name@0123abcd"
