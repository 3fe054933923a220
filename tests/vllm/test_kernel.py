"""The kernel that moves pages, run by the interpreter of Triton, which is part of vLLM's environment."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap


def test_the_kernel_moves_what_it_is_told_and_nothing_else() -> None:
    code = """
        import random
        import numpy as np
        import torch
        from kvferry.testing.late_device import beside
        from kvferry.transfer import kernels
        from kvferry.transfer.host import move
        from kvferry.transfer.plan import BlockRows, Direction, Pages, Strides

        kernels._NUM_PROGRAMS, kernels._WORDS = 3, 4
        for seed in range(40):
            choose = random.Random(seed)
            num_regions, num_rows, num_blocks = choose.randrange(1, 5), choose.randrange(1, 7), 9
            page_bytes = np.array([16 * choose.choice([1, 3, 16, 17, 33]) for _ in range(num_regions)])
            stride_bytes = page_bytes + 16 * choose.randrange(3)
            pool = np.random.default_rng(seed).integers(1, 256, int(stride_bytes.sum()) * num_blocks, dtype=np.uint8)
            aside = np.random.default_rng(~seed % 97).integers(1, 256, int(page_bytes.sum()) * num_rows, dtype=np.uint8)
            bases = pool.ctypes.data + num_blocks * (np.cumsum(stride_bytes) - stride_bytes)
            ids = np.array(choose.sample(range(num_blocks), num_rows))
            rows = BlockRows(np.zeros(num_rows, np.int64), np.arange(num_rows), ids)
            first_region = choose.randrange(num_regions)
            regions = slice(first_region, choose.randrange(first_region, num_regions) + 1)
            strides = Strides(0, num_rows, bases, stride_bytes, page_bytes)
            pages = Pages(rows, strides, choose.choice(list(Direction)), regions)
            heads, lengths = rows.stretches(choose.choice([1, 2, 4]))
            first, end = sorted(choose.sample(range(num_rows + 1), 2))
            before = pool.copy(), aside.copy()
            for plan in beside(pages, heads, lengths, aside.ctypes.data)[first:end]:
                move(plan)
            expected = pool.copy(), aside.copy()
            pool[:], aside[:] = before
            numbers = torch.from_numpy(kernels._numbers(pages, heads, lengths))
            kernels._launch(numbers, aside.ctypes.data, first, end, pages.direction)
            assert np.array_equal(pool, expected[0]) and np.array_equal(aside, expected[1])
            assert not (np.array_equal(pool, before[0]) and np.array_equal(aside, before[1]))
        print("moved")
    """
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    run = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], env=environment, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout == "moved\n"


def test_the_kernel_is_compiled_once_a_direction_whatever_its_numbers_are() -> None:
    from kvferry.transfer.kernels import _move

    numbers = [param for param in _move.params if not param.is_constexpr]
    assert [param.name for param in numbers] == ["numbers", "packed", "first", "end"]
    assert all(param.do_not_specialize for param in numbers)
