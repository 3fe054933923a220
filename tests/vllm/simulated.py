"""vLLM's own scheduler and kvferry's connector on it, without a model: blocks hold what names the tokens before them.

Each step writes into the blocks that the scheduler gave, and proves before that all that attention would read is there:
of full attention every position, of a window those in it, of recurrent layers the state where the last pass ended.
Groups share memory, as vLLM's do. Copies run when the test says so, in its order; some loads fail. With a late device
steps and copies are enqueued on its streams, layer by layer, and happen when events permit and chance decides. Some
passes are one CUDA graph, from within which no layer calls a hook.
"""

from __future__ import annotations

import itertools
import os
import random
from collections import deque
from collections.abc import Callable, Collection
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from vllm.config import CUDAGraphMode
from vllm.engine.arg_utils import EngineArgs
from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash, resolve_kv_cache_block_sizes
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.kv_cache_interface import (
    FullAttentionSpec,
    KVCacheConfig,
    KVCacheGroupSpec,
    KVCacheTensor,
    MambaSpec,
    SlidingWindowSpec,
)
from vllm.v1.outputs import KVConnectorOutput, ModelRunnerOutput
from vllm.v1.request import Request
from vllm.v1.structured_output import StructuredOutputManager

from kvferry.integrations.vllm import KVConnectorRole, KVFerryConnector
from kvferry.offload.background import Readiness, Task
from kvferry.testing.late_device import Event, LateCopier, LateDevice, mark

BLOCK, CHUNK, WINDOW, LAYERS = 4, 8, 10, 3
_NAMES = 1 << 40
_ATTENTION: dict[str, Any] = {"block_size": BLOCK, "num_kv_heads": 1, "head_size": 1, "dtype": torch.int64}
_STOP_TOKENS = [2]
"""A request ends when vLLM hears of one, and may be in a pass by then that was planned before."""
_PAGE = BLOCK * 2
"""Elements of a block of one layer: a key and a value a token."""


def name_after(name: int, token: int) -> int:
    """Names the tokens so far and one more."""
    return (name * 1_000_003 + token * 7919 + 12_345) % _NAMES


class ByHand:
    """Stands for `Background`: what is submitted runs when the test says so."""

    def __init__(self, choose: random.Random) -> None:
        self._choose = choose
        self._tasks: dict[int, tuple[Task, Callable[[], Readiness] | None, bool]] = {}
        self._ended: dict[int, bool] = {}
        self.failures = self.num_waits = 0

    def submit(self, task: Task, *, wanted: bool = True) -> None:
        self._tasks[task.job_id] = task, None, wanted

    def wait_for(self, task: Task, readiness: Callable[[], Readiness], timeout_seconds: float) -> None:
        self._tasks[task.job_id] = task, readiness, True

    def run(self, share: float, failing: float = 0.0) -> None:
        """A part of what waits, in any order."""
        for job_id in self._choose.sample(list(self._tasks), len(self._tasks)):
            if self._choose.random() < share:
                self._end(job_id, fails=self._choose.random() < failing)

    def flush(self, job_ids: Collection[int]) -> None:
        for job_id in job_ids:
            if job_id in self._tasks:
                self._end(job_id, fails=False)

    @property
    def is_busy(self) -> bool:
        return bool(self._tasks)

    def wait_for_end(self, seconds: float) -> None:
        self.num_waits += 1  # in vain

    def take_ended(self) -> dict[int, bool]:
        ended, self._ended = self._ended, {}
        return ended

    def cancel(self, job_id: int) -> None:
        raise AssertionError("vLLM's adapter cancels nothing")

    def close(self) -> None:
        for job_id in list(self._tasks):
            self._end(job_id, fails=True)

    def _end(self, job_id: int, *, fails: bool) -> None:
        task, readiness, wanted = self._tasks.pop(job_id)
        ready = readiness is None or readiness() is Readiness.READY
        ok = task.run(wanted and ready and not fails)
        if ok is not None:
            self._ended[job_id] = ok
            self.failures += not ok


class Simulation:
    """kinds: of groups, "full", "window" or "state". overlap: a step is scheduled before the last one is heard of.
    is_late: what steps and copies do is done by a device, later. silent: layers that call no hook. is_second_runner: of
    vLLM's two, the one that writes to blocks before it tells of preemptions; None: one is drawn. saves_late: of models
    of full attention, as in a process of its own; None: drawn."""

    def __init__(
        self,
        model: Path,
        kinds: tuple[str, ...],
        num_blocks: int,
        seed: int,
        *,
        overlap: bool = False,
        is_late: bool = False,
        silent: Collection[int] = (),
        is_second_runner: bool | None = None,
        saves_late: bool | None = None,
    ) -> None:
        self.choose = random.Random(seed)
        self._kinds, self._overlap = kinds, overlap
        self.device = LateDevice(self.choose) if is_late else None
        self.stream = self.device.stream() if self.device is not None else None
        self._is_second_runner = self.choose.random() < 0.3 if is_second_runner is None else is_second_runner
        self.saves_late = self.choose.random() < 0.5 if saves_late is None else saves_late
        self._patches = ExitStack()
        for module in ("transfer.copy", "offload.mover", "integrations.vllm_worker") if is_late else ():
            self._patches.enter_context(patch(f"kvferry.{module}.mark", mark))
        adapter = "kvferry.integrations.vllm"
        self._patches.enter_context(patch(f"{adapter}._stream", lambda: self.stream))
        variables = SimpleNamespace(VLLM_ENABLE_V1_MULTIPROCESSING=self.saves_late)
        self._patches.enter_context(patch(f"{adapter}.envs", variables))
        self._context: SimpleNamespace | None = None
        self._patches.enter_context(patch(f"{adapter}.is_forward_context_available", lambda: bool(self._context)))
        self._patches.enter_context(patch(f"{adapter}.get_forward_context", lambda: self._context))
        self._patches.enter_context(patch.multiple("kvferry.transfer.copy", _STEP_BYTES=1, _RUN_BYTES=1))
        self._patches.enter_context(patch("kvferry.offload.mover._MOST_BEGUN", 100))  # There is no thread to wait in.
        self._silent, self.share_of_graphs = silent, 0.3
        config = EngineArgs(
            str(model),
            load_format="dummy",
            dtype="float32",
            max_model_len=96,
            max_num_batched_tokens=24,
            max_num_seqs=4,
            enforce_eager=True,
            skip_tokenizer_init=True,
            async_scheduling=overlap,
            kv_transfer_config={
                "kv_connector": "KVFerryConnector",
                "kv_role": "kv_both",
                "kv_connector_extra_config": {"chunk_tokens": CHUNK, "l1_size_gb": 0.002, "async_load": "always"},
            },
        ).create_engine_config()
        config.scheduler_config.async_scheduling = overlap  # which vLLM does not do on a CPU
        config.cache_config.block_size, config.cache_config.num_gpu_blocks = BLOCK, num_blocks
        config.cache_config.mamba_cache_mode = "align" if "state" in kinds else "none"
        config.cache_config.enable_prefix_caching = True
        cache = _cache_config(kinds, num_blocks)
        for group in cache.kv_cache_groups:
            for name in group.layer_names:
                layer = SimpleNamespace(get_attn_backend=lambda: object)
                config.compilation_config.static_forward_context[name] = layer
        self.raw = torch.zeros(LAYERS, num_blocks, _PAGE, dtype=torch.int64)
        # Of its worker alone: to make a configuration or a scheduler for it takes a device.
        with patch.dict(os.environ, {"VLLM_USE_V2_MODEL_RUNNER": str(int(self._is_second_runner))}):
            self.worker = KVFerryConnector(config, KVConnectorRole.WORKER, cache)
        layers = [
            (f"layer.{index}.{of}", self._view(kind, of)) for index, kind in enumerate(kinds) for of in range(LAYERS)
        ]
        self.worker.register_kv_caches(dict(layers))
        block_size, hash_block_size = resolve_kv_cache_block_sizes(cache, config)
        scheduler = AsyncScheduler if overlap else Scheduler
        manager = StructuredOutputManager(config)
        self.scheduler = scheduler(config, cache, manager, block_size, hash_block_size=hash_block_size)
        init_none_hash(sha256)
        self._hasher = get_request_block_hasher(hash_block_size, sha256)
        self.half = self.scheduler.connector._scheduler
        assert self.half._is_ready()
        self.copies = ByHand(self.choose)
        self._tables: dict[str, list[list[int]]] = {}
        self._tokens: dict[str, list[int]] = {}
        self._unheard: deque[tuple[Any, ModelRunnerOutput, Event | None]] = deque()
        self.wrong: list[str] = []
        self.answers: dict[str, list[int]] = {}
        self.num_preempted = self.num_ahead = self.num_by_layer = 0

    def _view(self, kind: str, layer: int) -> torch.Tensor | list[torch.Tensor]:
        return [self.raw[layer, :, :1]] if kind == "state" else self.raw[layer].view(-1, 1, BLOCK, 2)

    def add(self, name: str, prompt: list[int], num_tokens: int, salt: str | None = None) -> None:
        stop = _STOP_TOKENS if self._overlap else None  # Elsewhere it would only make lives shorter.
        sampling = SamplingParams(max_tokens=num_tokens, ignore_eos=True, temperature=0, stop_token_ids=stop)
        request = Request(name, prompt, sampling, None, block_hasher=self._hasher, cache_salt=salt)
        self.scheduler.add_request(request)
        self._tokens[name] = list(prompt)

    def abort(self, name: str) -> None:
        from vllm.v1.request import RequestStatus

        self.scheduler.finish_requests(name, RequestStatus.FINISHED_ABORTED)

    @property
    def is_busy(self) -> bool:
        return bool(self._unheard) or self.scheduler.has_requests()

    def step(self, *, failing: float = 0.0) -> None:
        output = self.scheduler.schedule()
        self.num_preempted += len(output.preempted_req_ids or ())
        self._check_backlog()
        self._unheard.append((output, self._execute(output, failing), mark(self.stream)))
        if self.device is not None:
            self.device.run(self.choose.random())
        while len(self._unheard) > (1 if self._overlap and output.num_scheduled_tokens else 0):
            *heard, end = self._unheard.popleft()
            if end is not None:
                end.synchronize()
            assert not self.wrong, self.wrong[0]
            for answered in self.scheduler.update_from_output(*heard).values():
                for of in answered.outputs:
                    self.answers.setdefault(of.request_id, []).extend(of.new_token_ids)
        self._check_backlog()

    def _check_backlog(self) -> None:
        """The planner knows how many tokens each request that has blocks is still to compute before it generates."""
        planner, num_left = self.half._planner, 0
        for name, followed in self.half._followed.items():
            request, number = self.scheduler.requests[name], followed.request_id
            num_left += (left := planner._cost._to_compute.get(number, 0))
            has_failed = name in self.scheduler.failed_recving_kv_req_ids
            if request.num_computed_tokens or has_failed:
                tracked = planner._running[number]
                end = tracked.num_prompt_tokens if request.num_preemptions else request.num_prompt_tokens
                computed = followed.num_local_tokens if has_failed else request.num_computed_tokens
                assert left == max(0, end - computed), name
        assert num_left == self.half.stats().get("tokens_to_compute", 0)

    # -- a worker ----------------------------------------------------------------------------------------------------

    def _execute(self, output: Any, failing: float) -> ModelRunnerOutput:
        metadata = output.kv_connector_metadata
        hooks = [
            lambda: self.worker.handle_preemptions(metadata),
            lambda: self._do(partial(self._write_blocks, output)),
        ]
        for hook in reversed(hooks) if self._is_second_runner else hooks:
            hook()
        is_graph = self.choose.random() < self.share_of_graphs
        mode = CUDAGraphMode.FULL if is_graph else CUDAGraphMode.NONE
        if output.num_scheduled_tokens and not (is_graph and self._is_second_runner):
            self._context = SimpleNamespace(attn_metadata={}, cudagraph_runtime_mode=mode)
        self.worker.bind_connector_metadata(metadata)
        mover = self.worker._worker._mover
        self.num_by_layer += self.worker._worker._by_layer
        if mover is not None and mover._loads is not self.copies:
            mover._loads.close()
            mover._ends.close()
            mover._saves.close()
            mover._loads = mover._ends = mover._saves = self.copies
            if self.device is not None:
                mover._copier.cuda = LateCopier(self.device)
        self.copies.run(self.choose.random(), failing)
        are_first = self.choose.random() < 0.3  # as vLLM 0.26 has it; later versions start loads after the pass
        if are_first:
            self._start_loads(failing)
        sampled = self._forward(output, has_hooks=not is_graph)
        self._context = None
        if not are_first:
            self._start_loads(failing)
        self.worker.wait_for_save()
        self.copies.run(self.choose.random(), failing)
        num_waits = self.copies.num_waits
        results = self.worker.get_transfer_results(output.finished_req_ids)
        assert num_waits == self.copies.num_waits or not output.num_scheduled_tokens, "only empty steps have time"
        told = KVConnectorOutput(
            finished_sending=results.finished_sending or None,
            finished_recving=results.finished_recving or None,
            failed_recving=results.failed_recving,
            invalid_block_ids=self.worker.get_block_ids_with_load_errors(),
            kv_connector_worker_meta=self.worker.build_connector_worker_meta(),
        )
        self.worker.clear_connector_metadata()
        names = list(sampled)
        return ModelRunnerOutput(
            req_ids=names,
            req_id_to_index={name: index for index, name in enumerate(names)},
            sampled_token_ids=[sampled[name] for name in names],
            kv_connector_output=told,
        )

    def _start_loads(self, failing: float) -> None:
        """One that counts as ended may still be under way when another rank's has failed."""
        half, mover = self.worker._worker, self.worker._worker._mover
        known = list(mover._ahead) if mover is not None else []
        self.worker.start_load_kv(None)
        if mover is not None and mover._ahead != known:
            self.num_ahead += 1
            if self.choose.random() < failing:
                self.copies.failures += 1
                half._failed.update(half._names[number] for number in half._loaded)

    def _do(self, work: Callable[[], None]) -> None:
        """Now, or when the device comes to it."""
        if self.stream is None:
            work()
        else:
            self.stream.enqueue(work)

    def _write_blocks(self, output: Any) -> None:
        for block in output.new_block_ids_to_zero or ():
            self.raw[:, block] = 0
        for copied in output.kv_cache_block_copies or ():
            self.raw[:, copied.dst_block_id] = self.raw[:, copied.src_block_id]

    def _forward(self, output: Any, *, has_hooks: bool) -> dict[str, list[int]]:
        """What each scheduled request samples."""
        computed = {}
        for new in output.scheduled_new_reqs:
            self._tables[new.req_id] = [list(ids) for ids in new.block_ids]
            computed[new.req_id] = new.num_computed_tokens
        cached = output.scheduled_cached_reqs
        for name, ids, position in zip(cached.req_ids, cached.new_block_ids, cached.num_computed_tokens, strict=True):
            if name in cached.resumed_req_ids:
                self._tables[name] = [list(of_group) for of_group in ids]
            elif ids is not None:
                for table, added in zip(self._tables[name], ids, strict=True):
                    table.extend(added)
            computed[name] = position
        names = {
            name: self._names_up_to(name, computed[name] + count) for name, count in output.num_scheduled_tokens.items()
        }
        tables = {name: [list(table) for table in self._tables[name]] for name in names}
        for layer, group in itertools.product(range(LAYERS if names else 0), range(len(self._kinds))):
            works = [(name, layer, group, tables[name][group], of, computed[name]) for name, of in names.items()]
            for work in works:
                self._do(partial(self._write, *work))
            if has_hooks and layer not in self._silent:
                self.worker.wait_for_layer_load(f"layer.{group}.{layer}")
            for work in works:
                self._do(partial(self._attend, *work))
        return {name: self._sample(name, of) for name, of in names.items()}

    def _names_up_to(self, name: str, end: int) -> list[int]:
        tokens = self._tokens[name]
        assert end <= len(tokens), "more is computed than is known"
        names = [0]
        for token in tokens[:end]:
            names.append(name_after(names[-1], token))
        salt = self.scheduler.requests[name].cache_salt if name in self.scheduler.requests else None
        return [of + (1 if salt else 0) for of in names[1:]]

    def _sample(self, name: str, names: list[int]) -> list[int]:
        tokens = self._tokens[name]
        if len(names) < len(tokens):
            return []
        tokens.append(names[-1] % 50 + 2)
        return tokens[-1:]

    def _write(self, _name: str, layer: int, group: int, table: list[int], names: list[int], computed: int) -> None:
        """Of the tokens of these names all after `computed` are written, before the layer calls its hook: in vLLM an
        operation of its own does it. Each layer has numbers of its own."""
        for position in range(computed, len(names)) if self._kinds[group] != "state" else ():
            self.raw[layer, table[position // BLOCK]].view(BLOCK, 2)[position % BLOCK] = names[position] + layer

    def _attend(self, name: str, layer: int, group: int, table: list[int], names: list[int], computed: int) -> None:
        """What the tokens of these names attend to must be there. A state is read before it is written."""
        kind, raw, names, end = self._kinds[group], self.raw[layer], [of + layer for of in names], len(names)
        if kind == "state":
            if computed and raw[table[(computed - 1) // BLOCK], 0].item() != names[computed - 1]:
                self.wrong.append(f"{name}: no state of {computed} tokens")
            raw[table[(end - 1) // BLOCK], 0] = names[end - 1]
            return
        for position in range(max(0, computed - WINDOW + 1) if kind == "window" else 0, end):
            if raw[table[position // BLOCK]].view(BLOCK, 2)[position % BLOCK].tolist() != [names[position]] * 2:
                self.wrong.append(f"{name}: layer {layer} of {kind} lacks token {position} of {end}")

    def close(self) -> None:
        self.worker.shutdown()
        self.scheduler.shutdown()
        self._patches.close()


def _cache_config(kinds: tuple[str, ...], num_blocks: int) -> KVCacheConfig:
    page_bytes = _PAGE * 8
    specs = {
        "full": FullAttentionSpec(**_ATTENTION),
        "window": SlidingWindowSpec(**_ATTENTION, sliding_window=WINDOW),
        "state": MambaSpec(
            block_size=BLOCK,
            shapes=((1,),),
            dtypes=(torch.int64,),
            page_size_padded=page_bytes,
            mamba_cache_mode="align",
        ),
    }
    names = [[f"layer.{index}.{layer}" for layer in range(LAYERS)] for index in range(len(kinds))]
    groups = [KVCacheGroupSpec(of_group, specs[kind]) for of_group, kind in zip(names, kinds, strict=True)]
    tensors = [
        KVCacheTensor(size=num_blocks * page_bytes, layers=group.layer_names, layer_stride=0, block_stride=page_bytes)
        for group in groups
    ]
    return KVCacheConfig(num_blocks=num_blocks, kv_cache_tensors=tensors, kv_cache_groups=groups)
