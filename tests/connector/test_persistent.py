from __future__ import annotations

import logging
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from kvferry.config import KvCacheConfig
from kvferry.connector import KvCacheConnectorConfig, LlmArgs, RequestData, SchedulerOutput
from kvferry.connector.persistent import PersistentConnectorScheduler, PersistentConnectorWorker
from kvferry.errors import ConfigError

BLOCK = 4


@dataclass
class FakeRequest:
    tokens: list[int]
    request_id: int = 1
    cache_salt: str | None = None
    lora_id: str | None = None
    num_connector_matched_tokens: int = 0

    def get_tokens(self, beam: int) -> list[int]:
        return self.tokens


def llm_args(folder: Path, **changes: Any) -> LlmArgs:
    config = KvCacheConnectorConfig(connector="persistent", options={"folder": folder})
    args = LlmArgs("e", "m", "weights", "float32", 2, 1, 2, 4, 64, KvCacheConfig(tokens_per_block=BLOCK), config)
    return replace(args, **changes)


@dataclass
class Run:
    """One life of an engine with this connector; `kv` says what its model computes for a block."""

    args: LlmArgs
    pool: torch.Tensor = field(default_factory=lambda: torch.zeros(16, 2, 2, 1 * BLOCK * 2))

    def __post_init__(self) -> None:
        self.worker = PersistentConnectorWorker(self.args)
        self.worker.register_kv_caches(self.pool)
        self.scheduler = PersistentConnectorScheduler(self.args)
        self.scheduler.wait_for_initialization()

    def compute(self, tokens: list[int], block_ids: list[int], start: int, end: int) -> None:
        for position in range(start, end):
            block = self.pool[block_ids[position // BLOCK]]
            block.view(2, 2, BLOCK, 2)[:, :, position % BLOCK] = float(sum(tokens[: position + 1]))

    def forward(self, output: SchedulerOutput, tokens: list[int], blocks: list[int], start: int, end: int) -> list[int]:
        self.worker.bind_connector_meta(self.scheduler.build_connector_meta(output))
        self.worker.start_load_kv(None)
        for layer in range(2):
            self.worker.wait_for_layer_load(layer, None)
            self.worker.save_kv_layer(layer, None)
        self.compute(tokens, blocks, start, end)
        self.worker.wait_for_save(None)
        assert self.worker.get_finished([], []) == ([], [])
        return self.worker.take_failed_loads()

    def prefill(self, request: FakeRequest, blocks: list[int], num_pool: int = 0) -> tuple[int, list[int]]:
        """Returns the tokens that the connector matched and the failed loads."""
        tokens = request.tokens
        matched, is_async = self.scheduler.get_num_new_matched_tokens(request, num_pool)
        assert not is_async
        assert matched % BLOCK == 0
        request.num_connector_matched_tokens = matched
        self.scheduler.update_state_after_alloc(request, blocks)
        start = num_pool + matched
        data = RequestData(request.request_id, list(tokens), list(blocks), num_pool, len(tokens) - start)
        failed = self.forward(SchedulerOutput([data]), tokens, blocks, start, len(tokens))
        return matched, failed

    def decode(self, request: FakeRequest, blocks: list[int], token: int, new_blocks: list[int]) -> None:
        position = len(request.tokens)
        request.tokens.append(token)
        blocks += new_blocks
        data = RequestData(request.request_id, [token], new_blocks, position, 1)
        self.forward(SchedulerOutput([], [data]), request.tokens, blocks, position, position + 1)

    def finish(self, request: FakeRequest) -> None:
        assert self.scheduler.request_finished(request, []) is False


def expected(tokens: list[int], num_blocks: int) -> torch.Tensor:
    scratch = Run.__new__(Run)
    scratch.pool = torch.zeros(num_blocks, 2, 2, BLOCK * 2)
    scratch.compute(tokens, list(range(num_blocks)), 0, num_blocks * BLOCK)
    return scratch.pool


def files(folder: Path) -> list[Path]:
    return sorted(folder.iterdir())


def test_a_later_run_loads_what_an_earlier_one_computed(tmp_path: Path) -> None:
    tokens = list(range(10, 21))
    first = Run(llm_args(tmp_path))
    assert first.prefill(FakeRequest(tokens), [3, 1, 2]) == (0, [])
    assert len(files(tmp_path)) == 2
    later = Run(llm_args(tmp_path, engine_id="f"))
    assert later.prefill(FakeRequest(tokens), [9, 7, 8]) == (8, [])
    torch.testing.assert_close(later.pool[[9, 7]], expected(tokens, 2), rtol=0, atol=0)


@pytest.mark.parametrize(("num_tokens", "matched"), [(3, 0), (4, 0), (5, 4), (8, 4), (9, 8)])
def test_at_least_one_token_is_left_to_compute(tmp_path: Path, num_tokens: int, matched: int) -> None:
    Run(llm_args(tmp_path)).prefill(FakeRequest(list(range(12))), [0, 1, 2])
    assert Run(llm_args(tmp_path)).prefill(FakeRequest(list(range(num_tokens))), [4, 5, 6]) == (matched, [])


def test_blocks_of_the_pool_are_not_loaded_again(tmp_path: Path) -> None:
    tokens = list(range(13))
    Run(llm_args(tmp_path)).prefill(FakeRequest(tokens), [0, 1, 2, 3])
    later = Run(llm_args(tmp_path))
    assert later.prefill(FakeRequest(tokens), [4, 5, 6, 7], num_pool=8) == (4, [])
    assert not later.pool[[4, 5]].any()
    torch.testing.assert_close(later.pool[6], expected(tokens, 3)[2], rtol=0, atol=0)


def test_decoded_blocks_are_saved(tmp_path: Path) -> None:
    run, request, blocks = Run(llm_args(tmp_path)), FakeRequest([5, 6, 7]), [0]
    run.prefill(request, blocks)
    assert files(tmp_path) == []
    for step in range(6):
        run.decode(request, blocks, 50 + step, [1 + step // 4] if len(request.tokens) % BLOCK == 0 else [])
    assert len(request.tokens) == 9
    assert len(files(tmp_path)) == 2
    later = Run(llm_args(tmp_path))
    assert later.prefill(FakeRequest(list(request.tokens)), [4, 5, 6]) == (8, [])
    torch.testing.assert_close(later.pool[[4, 5]], expected(request.tokens, 2), rtol=0, atol=0)


def test_a_chunked_prefill_saves_each_block_once_it_is_full(tmp_path: Path) -> None:
    run, tokens, blocks = Run(llm_args(tmp_path)), list(range(12)), [2, 1, 0]
    request = FakeRequest(tokens)
    assert run.scheduler.get_num_new_matched_tokens(request, 0) == (0, False)
    run.scheduler.update_state_after_alloc(request, blocks)
    run.forward(SchedulerOutput([RequestData(1, tokens, blocks, 0, 6)]), tokens, blocks, 0, 6)
    assert len(files(tmp_path)) == 1
    run.forward(SchedulerOutput([], [RequestData(1, [], [], 6, 6)]), tokens, blocks, 6, 12)
    assert len(files(tmp_path)) == 3
    later = Run(llm_args(tmp_path))
    assert later.prefill(FakeRequest([*tokens, 99]), [4, 5, 6, 7]) == (12, [])
    torch.testing.assert_close(later.pool[[4, 5, 6]], expected(tokens, 3), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("request_change", "args_change"),
    [
        ({"cache_salt": "other"}, {}),
        ({"lora_id": "adapter"}, {}),
        ({}, {"model_identity": "other weights"}),
        ({}, {"kv_dtype": "bfloat16"}),
        ({}, {"kv_cache_config": KvCacheConfig(tokens_per_block=2 * BLOCK)}),
    ],
)
def test_whatever_changes_the_kv_changes_the_names(
    tmp_path: Path, request_change: dict[str, Any], args_change: dict[str, Any]
) -> None:
    tokens = list(range(20))
    Run(llm_args(tmp_path)).prefill(FakeRequest(tokens), [0, 1, 2, 3, 4])
    scheduler = PersistentConnectorScheduler(llm_args(tmp_path, **args_change))
    assert scheduler.get_num_new_matched_tokens(FakeRequest(tokens, **request_change), 0) == (0, False)


def test_a_block_after_other_tokens_is_another_block(tmp_path: Path) -> None:
    Run(llm_args(tmp_path)).prefill(FakeRequest([1, 2, 3, 4, 5, 6, 7, 8, 9]), [0, 1, 2])
    other = FakeRequest([0, 2, 3, 4, 5, 6, 7, 8, 9])
    assert Run(llm_args(tmp_path)).prefill(other, [0, 1, 2]) == (0, [])


def test_a_match_that_is_not_taken_is_not_loaded(tmp_path: Path) -> None:
    request = FakeRequest(list(range(9)))
    Run(llm_args(tmp_path)).prefill(request, [0, 1, 2])
    later, declined = Run(llm_args(tmp_path)), FakeRequest(request.tokens)
    assert later.scheduler.get_num_new_matched_tokens(declined, 0) == (8, False)
    later.scheduler.update_state_after_alloc(declined, [3, 4, 5])
    plan = later.scheduler.build_connector_meta(SchedulerOutput([RequestData(1, request.tokens, [3, 4, 5], 0, 9)]))
    assert plan.loads == []
    assert [save.block_id for save in plan.saves] == [3, 4]


def test_a_hit_needs_the_files_of_all_ranks(tmp_path: Path) -> None:
    tokens = list(range(9))
    ranks = [llm_args(tmp_path, tensor_parallel_size=2, rank=rank) for rank in (0, 1)]
    for args, matched in ((ranks[0], 0), (ranks[1], 0), (ranks[0], 8)):
        assert Run(args).prefill(FakeRequest(tokens), [0, 1, 2]) == (matched, [])
    assert Run(llm_args(tmp_path)).prefill(FakeRequest(tokens), [0, 1, 2]) == (0, [])


def test_weights_without_a_name_keep_nothing(tmp_path: Path) -> None:
    run = Run(llm_args(tmp_path, model_identity=None))
    assert run.prefill(FakeRequest(list(range(9))), [0, 1, 2]) == (0, [])
    assert files(tmp_path) == []


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def empty(path: Path) -> None:
    path.write_bytes(b"")


def swap(path: Path) -> None:
    """Another block's file, sound in itself, under this name."""
    other = next(each for each in files(path.parent) if each != path)
    path.write_bytes(other.read_bytes())


@pytest.mark.parametrize("damage", [truncate, flip, empty, swap])
def test_a_damaged_file_is_a_failed_load_and_is_deleted(
    tmp_path: Path, damage: Any, caplog: pytest.LogCaptureFixture
) -> None:
    tokens = list(range(10))
    Run(llm_args(tmp_path)).prefill(FakeRequest(tokens), [0, 1, 2])
    victim = files(tmp_path)[0]
    damage(victim)
    later, request = Run(llm_args(tmp_path)), FakeRequest(tokens, request_id=7)
    with caplog.at_level(logging.WARNING):
        assert later.prefill(request, [3, 4, 5]) == (8, [7])
    assert "damaged" in caplog.text
    assert not victim.exists()
    # The engine computes the tokens again, and only then is there something to save.
    later.forward(SchedulerOutput([], [RequestData(7, [], [], 0, 10)]), tokens, [3, 4, 5], 0, 10)
    assert victim.exists()
    assert Run(llm_args(tmp_path)).prefill(FakeRequest(tokens), [0, 1, 2]) == (8, [])


def test_a_pass_with_a_failed_load_saves_nothing_of_its_request(tmp_path: Path) -> None:
    short, long = list(range(9)), list(range(13))
    Run(llm_args(tmp_path)).prefill(FakeRequest(short), [0, 1, 2])
    flip(files(tmp_path)[0])
    assert Run(llm_args(tmp_path)).prefill(FakeRequest(long), [3, 4, 5, 6]) == (8, [1])
    assert len(files(tmp_path)) == 1


def test_a_file_that_vanished_since_the_match_is_a_failed_load(tmp_path: Path) -> None:
    request = FakeRequest(list(range(9)))
    Run(llm_args(tmp_path)).prefill(request, [0, 1, 2])
    later = Run(llm_args(tmp_path))
    matched, _ = later.scheduler.get_num_new_matched_tokens(request, 0)
    request.num_connector_matched_tokens = matched
    assert matched == 8
    for path in files(tmp_path):
        path.unlink()
    later.scheduler.update_state_after_alloc(request, [3, 4, 5])
    output = SchedulerOutput([RequestData(1, request.tokens, [3, 4, 5], 0, 1)])
    assert later.forward(output, request.tokens, [3, 4, 5], 8, 9) == [1]


def test_a_folder_that_cannot_be_written_costs_one_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = tmp_path / "kv"
    run = Run(llm_args(folder))
    folder.rmdir()
    with caplog.at_level(logging.WARNING):
        for request_id in (1, 2):
            assert run.prefill(FakeRequest(list(range(9)), request_id), [0, 1, 2]) == (0, [])
    assert len(caplog.records) == 1
    assert "cannot write" in caplog.text


def test_wrong_options_are_refused(tmp_path: Path) -> None:
    wrong = KvCacheConnectorConfig(connector="persistent", options={"folders": tmp_path})
    with pytest.raises(ConfigError, match="'folders'"):
        PersistentConnectorScheduler(llm_args(tmp_path, kv_connector_config=wrong))
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="'folder'"):
        PersistentConnectorWorker(llm_args(tmp_path / "file"))


def test_a_finished_request_leaves_nothing(tmp_path: Path) -> None:
    run, request = Run(llm_args(tmp_path)), FakeRequest(list(range(9)))
    run.prefill(request, [0, 1, 2])
    run.finish(request)
    assert run.scheduler._requests == {}
    plan = run.scheduler.build_connector_meta(SchedulerOutput([], [RequestData(1, [1], [], 9, 1)]))
    assert (plan.loads, plan.saves) == ([], [])
