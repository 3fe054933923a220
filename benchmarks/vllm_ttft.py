"""What KV connectors do to a real vLLM: time to first token cold, from vLLM's pool and from outside it, and batches.

    python benchmarks/vllm_ttft.py none kvferry server [--model FOLDER] [--lengths 2048,8192,32768] [--rounds 5]
    python benchmarks/vllm_ttft.py none kvferry --model small --lengths 2048 --block-tokens 128    # on a CPU

Modes: none, native (vLLM's OffloadingConnector) and lmcache (both on CUDA), example (vLLM's ExampleConnector), kvferry,
server (kvferry with a cache server, which is started), liar (says that it loads and does not, so its tokens must not be
the same). Each has an engine in a process of its own. All are there at once and take turns with the same prompts, in
random order, so that the moods of the machine meet all alike. What is hit from outside was removed from vLLM's pool
before, and the pool zeroed. Tokens are the same if each hit's first one is among the three likeliest of the cold run.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import random
import signal
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from kvferry.testing import vllm_modes
from kvferry.testing.vllm_figures import plot, report
from kvferry.testing.vllm_modes import MODES, SHAPES, EngineGoneError, EngineShape, Mode, Prompt, Round


def draw(given: argparse.Namespace, num_tokens: int) -> Prompt:
    return {"prompt_token_ids": [random.randrange(10, given.vocabulary) for _ in range(num_tokens)]}


def measure_all(modes: list[Mode], given: argparse.Namespace, figures: dict[str, list[Round]]) -> None:
    """Fills `figures`: by length, or "batch", the rounds. What was measured is printed, however it ends."""

    def one_prompt(num_tokens: int) -> Round:
        return vllm_modes.measure_prompt(modes, draw(given, num_tokens), given.settle)

    def batch() -> Round:
        prompts = [draw(given, given.batch_tokens) for _ in range(given.batch)]
        return vllm_modes.measure_batch(modes, prompts, given.batch_new, given.settle)

    vllm_modes.repeat(modes, 1, partial(one_prompt, min(given.lengths)), [])  # the first of everything is slow
    parts = [(f"{of}", f"one prompt of {of:,} tokens", partial(one_prompt, of)) for of in given.lengths]
    if given.batch:
        each = f"{given.batch} prompts of {given.batch_tokens:,} tokens and {given.batch_new} new ones each"
        parts.append(("batch", each, batch))
    for key, title, measure in parts:
        print(title, flush=True)
        rounds = figures[key] = []
        try:
            vllm_modes.repeat(modes, given.rounds, measure, rounds)
        finally:
            if rounds:
                report(rounds)


def at_least(least: float, kind: type = int) -> Callable[[str], Any]:
    """A number of a command line's option."""

    def read(text: str) -> Any:
        with contextlib.suppress(ValueError):
            if (number := kind(text)) >= least:
                return number
        raise argparse.ArgumentTypeError(f"{text!r} is no {'whole ' * (kind is int)}number from {least} up")

    return read


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    option, some = parser.add_argument, at_least(1)
    option("modes", nargs="*", default=["none", "kvferry"], metavar="MODE", help=", ".join(MODES))
    option("--model", default="llama-8b", help=f"a folder, or random weights in a shape: {', '.join(SHAPES)}")
    lengths = {"default": "2048,8192,32768", "type": lambda text: [some(of) for of in text.split(",")]}
    option("--lengths", help="tokens of single prompts: %(default)s", **lengths)
    option("--rounds", type=some, default=5, help="of each length and of the batch")
    option("--block-tokens", type=some, default=16, help="of vLLM's blocks: 128 on a CPU")
    option("--vocabulary", type=at_least(100), default=40000, help="prompts are of tokens below this one")
    option("--batch", type=at_least(0), default=0, help="requests of a batch; 0: none")
    option("--batch-tokens", type=some, default=2048, help="of each prompt of the batch")
    option("--batch-new", type=some, default=256, help="tokens that each of them generates")
    option("--outside-gb", type=at_least(0.001, float), default=20.0, help="memory of each connector")
    option("--settle", type=at_least(0, float), default=1.0, help="seconds that saves have after each turn")
    option(
        "--timeout",
        type=at_least(1, float),
        default=120.0,
        help="seconds after which a mode that has started is given up",
    )
    option("--json", type=Path, help="also write the figures here")
    option("--plot", type=Path, help="also draw the times to first token here; needs matplotlib")
    given = parser.parse_args()
    if unknown := set(given.modes) - set(MODES):
        parser.error(f"no mode: {', '.join(sorted(unknown))}; there are {', '.join(MODES)}")
    if len(set(given.modes)) < len(given.modes):
        parser.error("a mode is there once")
    if given.model not in SHAPES and not Path(given.model, "config.json").is_file():
        parser.error(f"--model: {given.model} is no folder with a config.json, and no shape")
    try:  # here, not when all has been measured
        if given.plot is not None:
            plot({}, given.plot)
        if given.json is not None:
            given.json.open("a").close()
    except (ImportError, OSError, ValueError) as error:
        parser.error(f"--json or --plot: {error}")
    return given


def main() -> None:
    given = parse()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that nothing measured is lost
    if importlib.util.find_spec("vllm") is None:
        print("needs vLLM beside kvferry: see docs/vllm.md")
        return
    batch_tokens = given.batch_tokens + given.batch_new if given.batch else 0
    longest = max(*given.lengths, batch_tokens) + 8 * given.block_tokens
    pool_tokens = max(longest, given.batch * batch_tokens)
    share = round(0.9 / len(given.modes), 3)
    shape = EngineShape(given.model, longest, pool_tokens, given.block_tokens, share, given.outside_gb)
    modes: list[Mode] = []
    figures: dict[str, list[Round]] = {}
    try:
        for name in given.modes:
            try:
                modes.append(Mode(name, shape, given.timeout))
                print(f"{name}: ready after {modes[-1].start_seconds:.1f} s", flush=True)
            except EngineGoneError as error:
                print(f"left out: {error}", flush=True)
        measure_all(modes, given, figures)
    finally:
        if given.json is not None:
            given.json.write_text(json.dumps(figures, indent=1), encoding="utf-8")
        for mode in modes:
            mode.close()
    if given.plot is not None:
        plot(figures, given.plot)


if __name__ == "__main__":
    main()
