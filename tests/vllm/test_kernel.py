"""The kernel that moves pages, run by the interpreter of Triton, which is part of vLLM's environment."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap


def test_the_kernel_moves_what_it_is_told_and_nothing_else() -> None:
    code = """
        import numpy as np
        import torch
        from kvferry.transfer.kernels import _NUM_WARPS, _WORDS, _move

        rng = np.random.default_rng(0)
        for _ in range(12):
            num_copies = int(rng.integers(1, 9))
            sizes = 16 * rng.integers(1, 1200, num_copies)
            source = rng.integers(1, 256, int(sizes.sum()), dtype=np.uint8)
            starts = np.cumsum(sizes) - sizes
            order = rng.permutation(num_copies)
            places = np.empty(num_copies, np.int64)
            places[order] = np.cumsum(sizes[order] + 16) - sizes[order]  # 16 bytes between them
            target = np.zeros(int((sizes + 16).sum()), np.uint8)
            expected = target.copy()
            first, end = sorted(int(at) for at in rng.choice(num_copies + 1, 2, replace=False))
            for copy in range(first, end):
                start, place, size = int(starts[copy]), int(places[copy]), int(sizes[copy])
                expected[place : place + size] = source[start : start + size]
            lists = (places + target.ctypes.data, starts + source.ctypes.data, sizes)
            grid = (int(rng.integers(1, 5)),)
            _move[grid](*map(torch.from_numpy, lists), first, end, WORDS=_WORDS, num_warps=_NUM_WARPS)
            assert np.array_equal(target, expected)
        print("moved")
    """
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    run = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], env=environment, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout == "moved\n"
