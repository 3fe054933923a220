"""Measures, once a device, below which size of page the kernel beats the copy engines and how many programs it needs.

The answer is kept in ~/.cache/kvferry, in a file named after the device and the version of CUDA, which may be edited.
Knows `cuda`'s two ways to copy; no block and no store.
"""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch

from kvferry.transfer.kernels import PageKernel, Tuning, after_allocating
from kvferry.transfer.plan import Direction, Plan

logger = logging.getLogger(__name__)

_PAGES_KIB: Final = (16, 32, 48)
LARGEST_IN_DOUBT_BYTES: Final = 64 << 10
"""From here on copy engines keep up, and leave the processors alone."""
_PROGRAMS: Final = (32, 64, 128)
_SAMPLE_BYTES: Final = 96 << 20
_ROUNDS: Final = 5
_FOLDER: Final = Path("~/.cache/kvferry")

Submit = Callable[[Plan, Direction, Any], None]


def find(device: torch.device, kernel: PageKernel, engines: Submit) -> Tuning:
    """As the file says, or measured now: some tenths of a second, beside whatever else the device does."""
    properties = torch.cuda.get_device_properties(device)
    name = "".join(letter if letter.isalnum() else "-" for letter in properties.name)
    file = _FOLDER.expanduser() / f"copies-{name}-{torch.version.cuda}.json"
    try:
        return Tuning(**json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        tuning = _measure(device, kernel, engines)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        scratch = file.with_suffix(f".{os.getpid()}")
        scratch.write_text(json.dumps(asdict(tuning)), encoding="utf-8")
        scratch.replace(file)
    except OSError as error:
        logger.info("what was measured of copies cannot be kept: %s", error)
    return tuning


def _measure(device: torch.device, kernel: PageKernel, engines: Submit) -> Tuning:
    stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    host = torch.empty(_SAMPLE_BYTES, dtype=torch.uint8, pin_memory=True)
    pool = torch.empty(2 * _SAMPLE_BYTES, dtype=torch.uint8, device=device)
    after_allocating(stream)
    plans = {kib: _sample(host, pool, kib << 10) for kib in _PAGES_KIB}

    def seconds(tuning: Tuning, plan: Plan) -> float:
        """Of the kernel if `tuning` gives it the pages, else of the copy engines."""
        best = float("inf")
        for _ in range(_ROUNDS):
            stream.synchronize()
            started = time.perf_counter()
            if not kernel.copy(plan, stream, tuning):
                engines(plan, Direction.TO_POOL, stream)
            stream.synchronize()
            best = min(best, time.perf_counter() - started)
        return best

    always = {programs: Tuning(1 << 30, programs) for programs in _PROGRAMS}
    num_programs = min(_PROGRAMS, key=lambda programs: seconds(always[programs], plans[_PAGES_KIB[0]]))
    below = LARGEST_IN_DOUBT_BYTES >> 10
    for kib in reversed(_PAGES_KIB):
        if seconds(Tuning(0), plans[kib]) > seconds(always[num_programs], plans[kib]):
            break
        below = kib
    logger.info("copies: pages below %d KiB go to %d programs of a kernel", below, num_programs)
    return Tuning(below << 10, num_programs)


def _sample(host: torch.Tensor, pool: torch.Tensor, page_bytes: int) -> Plan:
    """Pages of pinned memory in order to pages of the pool in no order."""
    num_pages = host.numel() // page_bytes
    order = np.random.default_rng(0).permutation(2 * num_pages)[:num_pages].astype(np.uint64)
    size = np.uint64(page_bytes)
    sources = np.uint64(host.data_ptr()) + np.arange(num_pages, dtype=np.uint64) * size
    return Plan(sources, np.uint64(pool.data_ptr()) + order * size, np.full(num_pages, size))
