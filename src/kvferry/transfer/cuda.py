"""Copies between a CUDA device and an arena, enqueued on streams of their own.

What is registered with the driver is copied by the device's copy engines at the speed of the wire, pages that lie side
by side in the arena together (`runs`). What is not registered yet goes through two pinned buffers. The arena is
registered in pieces by a thread, those first that copies ask for, so that a large arena delays nobody. Calls the
runtime that torch has loaded, through ctypes; every return code is looked at.

Knows addresses and streams; no block, no part and no store.
"""

from __future__ import annotations

import ctypes
import logging
import re
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch

from kvferry.memory import node_of_pci_device, populate, prefer_node
from kvferry.observability.log import OnceLog
from kvferry.transfer.host import move
from kvferry.transfer.kernels import PageKernel, after_allocating
from kvferry.transfer.plan import Addresses, Direction, Pages, Plan
from kvferry.transfer.runs import PageMover, RunCopies

logger = logging.getLogger(__name__)

PIECE_BYTES: Final = 64 << 20
"""Registering takes about 0.04 s a GB, so a piece whose pages exist holds the driver up for 3 ms."""
_PIECES_AHEAD: Final = 4
_STAGE_BYTES: Final = 16 << 20
_BATCH_WITH_FAIL_INDEX: Final = 12_080
_BATCH_WITHOUT_FAIL_INDEX: Final = 13_000
_BATCH_COPIES: Final = 1024
"""Of one call, all of which are submitted, at about a microsecond each, before the device begins with the first."""
_DEVICE, _HOST = 1, 2
"""cudaMemLocationType."""
_IN_STREAM_ORDER, _ANY_ORDER = 1, 3
"""cudaMemcpySrcAccessOrder: slots do not change while they are leased, so the device may read them at any time."""
_BUS_ID_BYTES: Final = 32
_TO_DEVICE, _TO_HOST = 1, 2
"""cudaMemcpyKind."""


class CudaError(RuntimeError):
    """A call of the CUDA runtime failed."""


class _Location(ctypes.Structure):
    _fields_ = (("type", ctypes.c_int), ("id", ctypes.c_int))


class _Attributes(ctypes.Structure):
    _fields_ = (("order", ctypes.c_int), ("source", _Location), ("destination", _Location), ("flags", ctypes.c_uint))


class Runtime:
    """The CUDA runtime of this process. CudaError: it cannot be found, or a call fails."""

    def __init__(self, device: torch.device) -> None:
        torch.cuda.init()  # type: ignore[no-untyped-call]
        found = re.search(r"\S*libcudart\.so\S*", Path("/proc/self/maps").read_text(encoding="utf-8"))
        if found is None:
            raise CudaError("torch has loaded no CUDA runtime as a library")
        self._library = ctypes.CDLL(found.group())
        self._library.cudaGetErrorName.restype = ctypes.c_char_p
        version = ctypes.c_int()
        self.call("cudaRuntimeGetVersion", ctypes.byref(version))
        self._version = version.value
        self._device = torch.cuda.current_device() if device.index is None else device.index
        self._can_batch = self._version >= _BATCH_WITH_FAIL_INDEX
        bus_id = ctypes.create_string_buffer(_BUS_ID_BYTES)
        self.call("cudaDeviceGetPCIBusId", bus_id, ctypes.c_int(_BUS_ID_BYTES), ctypes.c_int(self._device))
        self._node = node_of_pci_device(bus_id.value.decode())
        self._log = OnceLog(logger)

    def call(self, name: str, *arguments: Any) -> None:
        """CudaError: it did not return success; the runtime's own record of the error is cleared."""
        code = getattr(self._library, name)(*arguments)
        if code != 0:
            self._library.cudaGetLastError()
            raise CudaError(f"{name}: {self._library.cudaGetErrorName(code).decode()} ({code})")

    def use_device(self) -> None:
        """Make the device this thread's."""
        self.call("cudaSetDevice", ctypes.c_int(self._device))

    def register(self, address: int, num_bytes: int) -> None:
        """Pin host memory, next to the device where there are several nodes. Pages that do not exist yet are made
        first, while the driver is still free for others."""
        if self._node is not None:
            try:
                prefer_node(address, num_bytes, self._node)
            except OSError as error:
                self._log.warn("node", "memory is not next to the device, which is slower: %s", error)
        populate(address, num_bytes)
        self.call("cudaHostRegister", ctypes.c_void_p(address), ctypes.c_size_t(num_bytes), ctypes.c_uint(0))

    def unregister(self, address: int) -> None:
        self.call("cudaHostUnregister", ctypes.c_void_p(address))

    def copy(self, plan: Plan, direction: Direction, stream: Any) -> None:
        """Enqueue copies between the device and pinned memory: many in one call where the runtime has such a call."""
        if self._can_batch:
            try:
                for first in range(0, len(plan.sizes), _BATCH_COPIES):
                    self._copy_batch(plan.only(slice(first, first + _BATCH_COPIES)), direction, stream)
            except (CudaError, AttributeError) as error:
                self._can_batch = False
                self._log.warn("batch", "copies are submitted one by one, which is slower: %s", error)
            else:
                return
        kind = ctypes.c_int(_TO_DEVICE if direction is Direction.TO_POOL else _TO_HOST)
        on = ctypes.c_void_p(stream.cuda_stream)
        for source, destination, size in zip(
            plan.sources.tolist(), plan.destinations.tolist(), plan.sizes.tolist(), strict=True
        ):
            to, of, count = ctypes.c_void_p(destination), ctypes.c_void_p(source), ctypes.c_size_t(size)
            self.call("cudaMemcpyAsync", to, of, count, kind, on)

    def _copy_batch(self, plan: Plan, direction: Direction, stream: Any) -> None:
        device, host = _Location(_DEVICE, self._device), _Location(_HOST, 0)
        attributes = (
            _Attributes(_ANY_ORDER, host, device, 0)
            if direction is Direction.TO_POOL
            else _Attributes(_IN_STREAM_ORDER, device, host, 0)
        )
        # Named, so that they live until the call returns; by then the runtime has its own copies.
        arrays = [np.ascontiguousarray(side) for side in (plan.destinations, plan.sources, plan.sizes)]
        pointers = [ctypes.c_void_p(side.ctypes.data) for side in arrays]
        first, fail_index = ctypes.c_size_t(0), ctypes.c_size_t(0)
        count, one = ctypes.c_size_t(len(plan.sizes)), ctypes.c_size_t(1)
        has_index = self._version < _BATCH_WITHOUT_FAIL_INDEX
        self.call(
            "cudaMemcpyBatchAsync",
            *pointers,
            count,
            ctypes.byref(attributes),
            ctypes.byref(first),
            one,
            *([ctypes.byref(fail_index)] if has_index else []),
            ctypes.c_void_p(stream.cuda_stream),
        )


class PinnedPieces:
    """Registers `num_bytes` of host memory from `base` on, piece by piece, in a thread."""

    def __init__(self, runtime: Runtime, base: int, num_bytes: int) -> None:
        self._runtime = runtime
        self._base = base
        self._num_bytes = num_bytes
        num_pieces = -(-num_bytes // PIECE_BYTES)
        self._pinned: npt.NDArray[np.bool_] = np.zeros(num_pieces, np.bool_)
        self._refused: npt.NDArray[np.bool_] = np.zeros(num_pieces, np.bool_)
        self._wanted: list[int] = []
        self._closed = False
        self._changed = threading.Condition()
        self._log = OnceLog(logger)
        self._thread = threading.Thread(target=self._register_pieces, name="kvferry-pin", daemon=True)
        self._thread.start()

    def __len__(self) -> int:
        return len(self._pinned)

    def split(self, firsts: Addresses, lasts: Addresses) -> npt.NDArray[np.bool_]:
        """Which of these ranges, by the addresses of their first and last byte, lie in registered pieces; asks for the
        pieces of the others."""
        pinned = self._pinned.copy()
        first, last = (
            ((side - np.uint64(self._base)) // np.uint64(PIECE_BYTES)).astype(np.int64) for side in (firsts, lasts)
        )
        num_before = np.concatenate([[0], np.cumsum(pinned)])
        are_in: npt.NDArray[np.bool_] = num_before[last + 1] - num_before[first] == last + 1 - first
        if not are_in.all():
            changes = np.bincount(first, minlength=len(pinned) + 1) - np.bincount(last + 1, minlength=len(pinned) + 1)
            self.want(np.flatnonzero((np.cumsum(changes)[:-1] > 0) & ~pinned).tolist())
        return are_in

    def cut(self, plan: Plan, way: Direction) -> Plan:
        """The same copies, none of which crosses from one piece to another."""
        return plan.cut_at_edges(plan.in_arena(way), self._base, PIECE_BYTES)

    def want(self, pieces: list[int]) -> None:
        """Register these, and some after the last, as arenas fill upwards."""
        ahead = range(max(pieces) + 1, min(max(pieces) + 1 + _PIECES_AHEAD, len(self._pinned)))
        with self._changed:
            self._wanted = [*pieces, *ahead, *self._wanted]
            self._changed.notify()

    def wait(self, seconds: float) -> bool:
        """Until nothing is left to register; false: it took longer."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._wanted, seconds)

    def close(self) -> None:
        """No copy may be under way."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()
        for piece in np.flatnonzero(self._pinned).tolist():
            self._runtime.unregister(self._base + piece * PIECE_BYTES)
            self._pinned[piece] = False

    def _register_pieces(self) -> None:
        self._runtime.use_device()
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._wanted or self._closed)
                if self._closed:
                    return
                piece = self._wanted[0]
            if not (self._pinned[piece] or self._refused[piece]):
                start = piece * PIECE_BYTES
                try:
                    self._runtime.register(self._base + start, min(PIECE_BYTES, self._num_bytes - start))
                    self._pinned[piece] = True
                except CudaError as error:
                    self._refused[piece] = True
                    self._log.warn("register", "memory that cannot be pinned is copied more slowly: %s", error)
            with self._changed:
                self._wanted.remove(piece)
                self._changed.notify_all()


class CudaCopier:
    """Enqueues copies between one device and one arena. Thread-safe. CudaError: the runtime cannot be used.

    streams: what runs on each is in the order in which it was enqueued.
    """

    def __init__(self, device: torch.device, arena: torch.Tensor) -> None:
        self.streams = {way: torch.cuda.Stream(device) for way in Direction}  # type: ignore[no-untyped-call]
        self._wires = {way: torch.cuda.Stream(device) for way in Direction}  # type: ignore[no-untyped-call]
        self._all_streams = (*self.streams.values(), *self._wires.values())
        self._runtime = Runtime(device)
        self._arena_base = arena.data_ptr()
        self._pieces = PinnedPieces(self._runtime, self._arena_base, arena.numel())
        self._device = device
        self._lock = threading.Lock()
        self._stages: list[tuple[torch.Tensor, Any]] = []
        self._buffers: list[torch.Tensor] = []
        self._runs = {way: self._run_copies(way, PageKernel(stream)) for way, stream in self.streams.items()}
        self._warming = threading.Thread(target=self._warm, name="kvferry-warm", daemon=True)
        self._warming.start()

    def _run_copies(self, way: Direction, mover: PageMover) -> RunCopies:
        return RunCopies(
            way,
            self._wires[way],
            self._allocate,
            mover,
            lambda plan: self._pieces.cut(plan, way),
            lambda plan, wire: self._runtime.copy(plan, way, wire),
        )

    def copy(self, pages: Pages) -> Any:
        """Enqueue after what the direction's stream was given so far. Returns at once for registered memory; waits for
        most of the rest. Returns the stream with whose work so far the copies end."""
        way = pages.direction
        stream = self.streams[way]
        pinned = self._pieces.split(*pages.spans())
        direct, staged = (pages, None) if pinned.all() else (pages.only(pinned), pages.only(~pinned))
        last = self._runs[way].copy(direct, stream)
        if last is None:
            self._runtime.copy(self._pieces.cut(direct.plan(), way), way, stream)
        if staged is not None:
            with self._lock, torch.cuda.stream(stream):
                self._copy_staged(staged.plan(), way, stream)
        if last is None or staged is not None:
            stream.wait_stream(self._wires[way])  # Earlier copies of the same job may end there.
            last = stream
        return last

    def are_pinned(self, ranges: Sequence[tuple[int, int]]) -> bool:
        """Whether these ranges of the arena, (offset, bytes), are registered; what is not is asked for."""
        offsets, num_bytes = np.array(ranges, np.uint64).reshape(-1, 2).T
        firsts = offsets + np.uint64(self._arena_base)
        return bool(self._pieces.split(firsts, firsts + num_bytes - np.uint64(1)).all())

    def synchronize(self) -> None:
        """Wait for what was enqueued."""
        for stream in self._all_streams:
            stream.synchronize()

    def close(self) -> None:
        """Wait for what was enqueued. Calling it again does nothing."""
        self._warming.join()
        self.synchronize()
        self._pieces.close()
        # Their memory is free at once: this and its runs know each other, so that only the collector would find it.
        self._stages.clear()
        self._buffers.clear()
        self._runs.clear()

    def pin(self, seconds: float) -> bool:
        """Register the whole arena now; for benchmarks and tests. False: it took longer."""
        self.wait_until_warm()
        self._pieces.want(list(range(len(self._pieces))))
        return self._pieces.wait(seconds)

    def _allocate(self, num_bytes: int) -> int:
        """The address of memory on the device that is this copier's until it is closed."""
        buffer = torch.empty(num_bytes, dtype=torch.uint8, device=self._device)
        self._buffers.append(buffer)
        for stream in self._all_streams:
            after_allocating(stream)
        return buffer.data_ptr()

    def wait_until_warm(self) -> None:
        """Until then pages are copied one by one."""
        self._warming.join()

    def _warm(self) -> None:
        try:
            self._runtime.use_device()
            with self._lock:
                self._make_stages()
            for runs in self._runs.values():
                runs.warm()
        except Exception as error:  # noqa: BLE001 - the thread's boundary; compilers raise what they like
            logger.warning("pages are copied one by one, which is slower: %r", error)

    def _make_stages(self) -> None:
        """If there are none yet. Within the lock."""
        if not self._stages:
            self._stages = [(torch.empty(_STAGE_BYTES, dtype=torch.uint8, pin_memory=True), _event()) for _ in range(2)]

    def _copy_staged(self, plan: Plan, direction: Direction, stream: Any) -> None:
        """Through two pinned buffers in turn."""
        self._make_stages()
        for turn, share in enumerate(plan.split(-(-plan.num_bytes // _STAGE_BYTES))):
            stage, free = self._stages[turn % 2]
            free.synchronize()
            starts = np.cumsum(share.sizes) - share.sizes + np.uint64(stage.data_ptr())
            if direction is Direction.TO_POOL:
                move(Plan(share.sources, starts, share.sizes))
                self._runtime.copy(Plan(starts, share.destinations, share.sizes).joined(), direction, stream)
            else:
                self._runtime.copy(Plan(share.sources, starts, share.sizes), direction, stream)
                stream.synchronize()
                move(Plan(starts, share.destinations, share.sizes))
            free.record(stream)


def _event() -> Any:
    return torch.cuda.Event()  # type: ignore[no-untyped-call]
